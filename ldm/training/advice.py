"""Advice before the first step: a rank, a rate and a number of steps for the data and the base model, with reasons.

The figures are those of published recipes. PEERS is their one table: what each setting is in them, and where that is
written. Settings outside are warned of. Nothing here changes a run.
"""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ldm.data.decoding import BrokenImage, read_size
from ldm.data.training_data import TrainingData
from ldm.settings.model import ModelConfig
from ldm.settings.train import TrainSettings
from ldm.training.plan import RunPlan

logger = logging.getLogger(__name__)

MOST_READ = 200  # images whose sizes and captions are looked at, evenly spread: the advice needs no exact figures
ALIKE = 0.5  # share of common words from which captions describe one subject
MOST_OF_SUBJECT = 100  # images; one subject is rarely seen in more
MOST_COUNTED = 20_000  # images whose captions are compared
MANY_SMALL = 0.1  # share of images that are enlarged, from which that is warned of
FEWEST_IMAGES = 3
FEW_ENOUGH = 1_000  # images; of more, each is seen less often than in the recipes of PEERS


class Range(NamedTuple):
    """What a setting is in other projects, ends included, and where that is written."""

    low: float
    high: float
    source: str

    def outside(self, name: str, value: float, advice: str = "") -> str:
        """Return a line on a value outside of the range, "" for one inside."""
        if self.low * (1 - 1e-9) <= value <= self.high * (1 + 1e-9):
            return ""
        usual = f"{self.low:g}" if self.low == self.high else f"{self.low:g} to {self.high:g}"
        end = f": {advice}" if advice else ""
        return f"{name} is {value:.3g}, in other projects {usual} ({self.source}){end}"


_SD = {
    "lora_rank": Range(1, 128, "cloneofsimo's README 1; diffusers, mindone 4; sd-scripts' train_network.md 4 to 128"),
    "lora_alpha": Range(1, math.inf, "sd-scripts' train_network.md: 1, half the rank, or the rank, which is the most"),
    "rate": Range(5e-5, 1e-3, "mindone's DreamBooth 5e-5; diffusers, mindone and cloneofsimo 1e-4; OneTrainer 3e-4; "
                  "sd-scripts' train_network.md up to 1e-3 where alpha is 1"),
    "views": Range(70, 280, "mindone's style recipe 72; diffusers 100; mindone's DreamBooth 160; cloneofsimo's README "
                   "278 (2,500 steps of 9 images)"),
    "text_encoder": Range(0.1, 1, "cloneofsimo's README and sd-scripts' train_network.md 0.1; mindone's DreamBooth 1"),
}  # fmt: skip
_NANO = {
    "lora_rank": Range(4, 32, "docs/nano.md"),
    "lora_alpha": _SD["lora_alpha"],
    "rate": Range(5e-4, 2e-3, "docs/nano.md"),
    "views": Range(20, 100, "configs/train, *_nano.yaml: lora 22, lora_text 45, dreambooth_lora 80"),
    "text_encoder": _SD["text_encoder"],
}
_ALL = {
    "min_snr_gamma": Range(1, 5, "Hang et al. (2303.09556) 5; diffusers' README 1 and 5"),
    "noise_offset": Range(0.05, 0.1, "sd-scripts"),
    "ip_noise_gamma": Range(0, 0.1, "sd-scripts"),
    "multires_noise_iterations": Range(6, 10, "sd-scripts"),
    "loraplus_lr_ratio": Range(1, 16, "Hayou et al. (2402.12354)"),
    "caption_dropout": Range(0, 0.2, "Ho and Salimans (2207.12598) 0.1 to 0.2"),
}
# In one table: architecture -> setting -> range. Other architectures have no peers.
PEERS: dict[str, dict[str, Range]] = {"sd1": {**_SD, **_ALL}, "sd2": {**_SD, **_ALL}, "nano": {**_NANO, **_ALL}}


class _Recipe(NamedTuple):
    """The figures that are advised for an architecture."""

    rank_of_subject: int
    rank_of_style: int
    rate: float  # for AdamW
    views_of_subject: float  # of each image in the whole training
    views_of_style: float
    most_views: int  # of all images together, for large data sets
    fewest_views: float  # of each image, however many there are
    source: str
    subject_views: str  # why so many views
    style_views: str


_RECIPES = {
    "nano": _Recipe(
        rank_of_subject=16,
        rank_of_style=16,
        rate=1e-3,
        views_of_subject=80,
        views_of_style=22,
        most_views=16_000,
        fewest_views=10,
        source="this project's recipes for nano",
        subject_views="its DreamBooth recipe shows each 80 times",
        style_views="its recipe shows each of 358 images 22 times",
    ),
    "sd": _Recipe(
        rank_of_subject=8,
        rank_of_style=16,
        rate=1e-4,
        views_of_subject=120,
        views_of_style=75,
        most_views=60_000,
        fewest_views=10,
        source="mindone's and diffusers' recipes",
        subject_views="diffusers' DreamBooth shows each 100 times, mindone's 160",
        style_views="mindone's recipe shows each 72 times, diffusers' 100",
    ),
}


class _Factor(NamedTuple):
    """An optimizer's rate as a factor of AdamW's: the usual one, the smallest and the largest (docs/optimizers.md)."""

    usual: float
    low: float
    high: float
    why: str


_OPTIMIZERS = {
    "adamw": _Factor(1.0, 1.0, 1.0, ""),
    "adafactor": _Factor(1.0, 1.0, 1.0, ", and Adafactor's is the same"),
    "adamwschedulefree": _Factor(3.0, 1.0, 10.0, ", and without a schedule one to ten times as much is usual"),
    "lion": _Factor(0.2, 0.1, 1 / 3, ", and with Lion a tenth to a third of it is usual"),
}
WHOLE_UNET_RATE = 1e-5  # diffusers' and mindone's recipes


@dataclass(frozen=True)
class DataFacts:
    """What the advice needs to know of a data set.

    Attributes:
        images: Number of images that are trained, without class images.
        captions: Number of different captions, of at most MOST_COUNTED images.
        own_samples: How many of the images an epoch has, with repeats.
        samples: The same with class images.
        alike: Mean share of the words that two captions have in common, 0 to 1.
        shorter_side: Median of the shorter sides of the images, in pixels. 0 if no size could be read.
        enlarged: Share of the images that are enlarged for training.
    """

    images: int
    captions: int
    own_samples: int
    samples: int
    alike: float
    shorter_side: int
    enlarged: float

    @property
    def is_subject(self) -> bool:
        """Whether the images are likely to show one subject, not a style or many things."""
        return self.alike >= ALIKE and self.images <= MOST_OF_SUBJECT


class Advice(NamedTuple):
    """What is printed: lines of advice, and warnings of settings that are given."""

    lines: list[str]
    warnings: list[str]


def give_advice(
    data: TrainingData, settings: TrainSettings, config: ModelConfig, plan: RunPlan, process_count: int
) -> None:
    """Log the advice for a run, and the warnings of its settings."""
    advice = advise(look_at(data), settings, config, plan, process_count)
    for line in advice.lines:
        logger.info("advice: %s", line)
    for line in advice.warnings:
        logger.warning("advice: %s", line)


def look_at(data: TrainingData) -> DataFacts:
    """Return the facts of a data set, from at most MOST_READ of its images."""
    rows = np.arange(len(data))
    if any(subset.is_reg for subset in data.subsets):
        rows = np.array([row for row in rows.tolist() if not data.is_class_image(row)])
    seen = _evenly(rows, MOST_READ)
    sides, enlarged = [], 0
    for row in seen:
        try:
            size = read_size(data.rows[row].image)
        except BrokenImage:  # the training says so, and replaces it
            continue
        sides.append(min(size))
        enlarged += any(own < trained for own, trained in zip(size, data.buckets.size(row)))
    return DataFacts(
        images=len(rows),
        captions=len({data.text(row) for row in _evenly(rows, MOST_COUNTED)}),
        own_samples=int(data.buckets.repeats[rows].sum()),
        samples=int(data.buckets.repeats.sum()),
        alike=alikeness([data.text(row) for row in seen]),
        shorter_side=int(np.median(sides)) if sides else 0,
        enlarged=enlarged / max(1, len(sides)),
    )


def _evenly(rows: np.ndarray, count: int) -> list[int]:
    """Return at most `count` of the rows, evenly spread."""
    return rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)].tolist()


def alikeness(captions: Sequence[str]) -> float:
    """Return the mean share of words that two captions have in common (Jaccard's index), 1 for a single caption."""
    words = [frozenset(re.findall(r"\w+", caption.lower())) for caption in captions]
    shares = [len(a & b) / len(a | b) if a | b else 1.0 for a, b in itertools.combinations(words, 2)]
    return float(np.mean(shares)) if shares else 1.0


def advise(
    facts: DataFacts, settings: TrainSettings, config: ModelConfig, plan: RunPlan, process_count: int = 1
) -> Advice:
    """Return a rank, a rate and a number of steps with their reasons, and what is unusual in the settings.

    Args:
        facts: Of the data.
        settings: Those of the run.
        config: Of the base model.
        plan: The length of the run as it is set.
        process_count: Processes that divide the batches.
    """
    recipe = _RECIPES.get(config.architecture, _RECIPES["sd"])
    batch = settings.train_batch_size * settings.gradient_accumulation_steps * process_count
    views_a_step = batch * facts.own_samples / facts.samples / facts.images  # of each image
    lines = [_of_data(facts, config, settings)]
    if config.architecture not in PEERS:
        lines.append(f"no other project trains {config.path}: the figures are those for Stable Diffusion")
    if settings.use_lora:
        lines.append(_of_rank(facts, settings, recipe))
    lines.append(_of_rate(settings, recipe))
    lines.append(_of_steps(facts, plan, recipe, views_a_step))
    warnings = _unusual_settings(facts, settings, config, plan.steps * views_a_step) + _lacks(facts, settings, config)
    if batch > facts.samples:
        warnings.append(f"a step sees {batch} images, an epoch has {facts.samples}: lower train_batch_size")
    return Advice(lines, warnings)


def _of_data(facts: DataFacts, config: ModelConfig, settings: TrainSettings) -> str:
    side = settings.image_size or config.image_size
    why = f"two captions have {facts.alike:.0%} of their words in common"
    if facts.alike >= ALIKE and not facts.is_subject:
        why += f", but more than {MOST_OF_SUBJECT} images"
    kind = "one subject" if facts.is_subject else "a style or many things"
    return (
        f"{_count(facts.images, 'image')} with {_count(facts.captions, 'caption')}, {facts.samples:,} samples an "
        f"epoch, shorter side {facts.shorter_side} pixels (median), trained at {side} for {config.architecture}; taken "
        f"for {kind} ({why})"
    )


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _of_rank(facts: DataFacts, settings: TrainSettings, recipe: _Recipe) -> str:
    rank = recipe.rank_of_subject if facts.is_subject else recipe.rank_of_style
    if recipe is _RECIPES["nano"]:
        why = "with the first base, rank 4 left 10 % of its colours, 16 6 %, and 32 gained nothing (docs/nano.md)"
    elif facts.is_subject:
        why = "one subject has little to learn: diffusers takes 4, mindone 64; a higher rank learns more by heart"
    else:
        why = "diffusers and mindone take 4 for a style, sd-scripts' example 16; a higher rank learns more by heart"
    return f"--lora_rank {rank} (this run: {settings.lora_rank}): {why}"


def _of_rate(settings: TrainSettings, recipe: _Recipe) -> str:
    if settings.optim == "prodigy":
        rate, why = 1.0, "Prodigy finds the rate, and this is a factor of it"
    elif not settings.use_lora:
        rate, why = WHOLE_UNET_RATE, "diffusers and mindone take it for the whole UNet, a tenth of a LoRA's"
    else:
        factor = _OPTIMIZERS[settings.optim]
        rate, why = recipe.rate * factor.usual, f"{recipe.source} take {recipe.rate:g} with AdamW{factor.why}"
    return f"--start_learning_rate {rate:g} (this run: {settings.start_learning_rate:g}): {why}"


def _of_steps(facts: DataFacts, plan: RunPlan, recipe: _Recipe, views_a_step: float) -> str:
    wanted = recipe.views_of_subject if facts.is_subject else recipe.views_of_style
    views = max(recipe.fewest_views, min(wanted, recipe.most_views / facts.images))
    why = recipe.subject_views if facts.is_subject else recipe.style_views
    many = "" if views == wanted else f", not {wanted:g} times, because {facts.images:,} images are many"
    return (
        f"--max_steps {_rounded(views / views_a_step)} (this run: {plan.steps}): each image is then seen {views:.3g} "
        f"times{many} ({why}); save often, and compare the checkpoints with choose_checkpoint"
    )


def _rounded(steps: float) -> int:
    """Round up to two significant digits."""
    digit = 10 ** max(0, math.floor(math.log10(max(1.0, steps))) - 1)
    return max(1, math.ceil(steps / digit - 1e-9) * digit)


def _unusual_settings(facts: DataFacts, settings: TrainSettings, config: ModelConfig, views: float) -> list[str]:
    """Return a line for each setting outside what other projects use. `views`: of each image in the whole run."""
    peers = PEERS.get(config.architecture, PEERS["sd1"])
    lines = [peers[name].outside(name, value) for name in _ALL if (value := getattr(settings, name))]
    if settings.use_lora:
        lines.append(peers["lora_rank"].outside("lora_rank", settings.lora_rank))
        if settings.lora_alpha is not None:
            alpha = peers["lora_alpha"]._replace(high=settings.lora_rank)
            lines.append(alpha.outside("lora_alpha", settings.lora_alpha))
        lines += _unusual_rates(settings, peers)
        if facts.images <= FEW_ENOUGH:
            advice = "more steps may be needed" if views < peers["views"].low else "it may learn the images by heart"
            lines.append(peers["views"].outside("the number of times that each image is seen", views, advice))
    return [line for line in lines if line]


def _unusual_rates(settings: TrainSettings, peers: Mapping[str, Range]) -> list[str]:
    rate = settings.start_learning_rate
    if settings.optim == "prodigy":
        return [Range(1, 1, "its authors, 2306.06101").outside("start_learning_rate with prodigy", rate)]
    factor = _OPTIMIZERS[settings.optim]
    usual = peers["rate"]._replace(low=peers["rate"].low * factor.low, high=peers["rate"].high * factor.high)
    unet = rate if settings.unet_lr is None else settings.unet_lr
    text_encoder = rate if settings.text_encoder_lr is None else settings.text_encoder_lr
    lines = []
    if settings.lora_ft_unet:
        name = "start_learning_rate" if settings.unet_lr is None else "unet_lr"
        lines.append(usual.outside(f"{name} with {settings.optim}", unet))
        if settings.lora_ft_text_encoder:
            name = "text_encoder_lr" if settings.text_encoder_lr is not None else "start_learning_rate"
            share = f"{name} of the text encoder, as a share of the UNet's rate,"
            lines.append(peers["text_encoder"].outside(share, text_encoder / unet))
    return lines


def _lacks(facts: DataFacts, settings: TrainSettings, config: ModelConfig) -> list[str]:
    """Return a line for each thing in which data or size fall short."""
    lines = []
    if facts.enlarged >= MANY_SMALL:
        lines.append(
            f"{facts.enlarged:.0%} of the images are smaller than they are trained, and a LoRA learns their blur: use "
            "larger originals, or enable_bucket with bucket_no_upscale"
        )
    if settings.image_size is not None and settings.image_size < config.image_size:
        lines.append(
            f"image_size is {settings.image_size}, the base model draws at {config.image_size}, and knows no smaller "
            "images: leave image_size out"
        )
    if facts.images < FEWEST_IMAGES:
        lines.append(
            f"{_count(facts.images, 'image')} to train on: DreamBooth's paper (2208.12242) has 3 to 5 of one subject"
        )
    return lines
