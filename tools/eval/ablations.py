r"""What each option of training does: one recipe with one thing changed at a time, over several seeds.

    python -m tools.eval.ablations --output_path output/ablations

Each variant trains a LoRA on the nano model with the same images in the same order, noise and time steps for every
variant of a seed. Measured are the loss on held-out images, which is the same plain mean squared error whatever the
variant's own loss is, and the CLIP score of held-out prompts by the nano CLIP. The table is written into
docs/ablations.md between its markers. An interrupted run continues with the trainings that are not done.

Settings of train_text_to_image.py may follow, and hold for all variants.

    OUTPUT/ablations.json, ablations.csv    every run, and the table
    OUTPUT/VARIANT/seedN                    the training
    OUTPUT/images                           the images of each run
"""

from __future__ import annotations

import csv
import math
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, Optional

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ldm.runtime.script import describe_progress, run_script, start_script  # noqa: E402

if __name__ == "__main__":
    start_script()

import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402

from ldm.data.dataset import read_image_text_csv  # noqa: E402
from ldm.errors import UserError, plain  # noqa: E402
from ldm.files.atomic import atomic_path  # noqa: E402
from ldm.files.inputs import content_hash, is_there, read_text  # noqa: E402
from ldm.files.outputs import claim_file, claim_folder  # noqa: E402
from ldm.files.paths import writing  # noqa: E402
from ldm.metrics.report import write_json  # noqa: E402
from ldm.settings.declare import MAX_COUNT, MAX_SEED, setting  # noqa: E402
from ldm.settings.read import read_settings, split_flags  # noqa: E402
from ldm.settings.train import TrainSettings  # noqa: E402
from ldm.training.own_files import find_states  # noqa: E402
from tools.commands import call, from_root  # noqa: E402
from tools.eval.choosing.run_folder import validation_losses  # noqa: E402
from tools.eval.comparison.stages import Stages  # noqa: E402
from tools.grid import evenly  # noqa: E402

BASE = "base recipe"
# name -> what is changed of the recipe. Those of the AdamW rates are the competitors of untuned Prodigy.
ADAMW_RATES = {
    "AdamW, rate 1e-4": ("--start_learning_rate", "1e-4"),
    "AdamW, rate 3e-4": ("--start_learning_rate", "3e-4"),
    "AdamW, rate 3e-3": ("--start_learning_rate", "3e-3"),
    "AdamW, rate 1e-2": ("--start_learning_rate", "1e-2"),
}
# With the arguments of diffusers' scripts. The bare one is as the paper's code is by default.
PRODIGY = "Prodigy, untuned"
VARIANTS: dict[str, tuple[str, ...]] = {
    BASE: (),
    "min-SNR 5": ("--min_snr_gamma", "5"),
    "min-SNR 1": ("--min_snr_gamma", "1"),
    "debiased": ("--debiased_estimation_loss", "True"),
    "huber": ("--loss_type", "huber"),
    "noise offset 0.05": ("--noise_offset", "0.05"),
    "noise offset 0.1": ("--noise_offset", "0.1"),
    **ADAMW_RATES,
    PRODIGY: (
        "--optim", "prodigy", "--start_learning_rate", "1",
        "--optimizer_args", "use_bias_correction=True", "safeguard_warmup=True",
    ),
    "Prodigy, bare": ("--optim", "prodigy", "--start_learning_rate", "1", "--warmup_steps", "0"),
    "rank 1": ("--lora_rank", "1"),
    "rank 4": ("--lora_rank", "4"),
    "rank 64": ("--lora_rank", "64"),
    "attention alone": ("--lora_targets", "attention"),
    "queries and values alone": ("--lora_targets", "to_q", "to_v"),
}  # fmt: skip
BEGIN = "<!-- written by tools/eval/ablations.py: begin -->"
END = "<!-- written by tools/eval/ablations.py: end -->"
# Student's t for 95 %: a mean of n differences is this many standard errors from 0 by chance in 5 of 100 cases.
STUDENT_T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}
PRODIGY_MAY_BE_ABOVE = 0.05


@dataclass
class Settings:
    """The command line."""

    output_path: Path = setting(Path("output/ablations"), "folder of the results", path=True)
    page: Path = setting(
        ROOT / "docs/ablations.md", "Markdown page whose part between the markers is replaced", path=True
    )
    steps: int = setting(300, "steps of each training", low=1, high=MAX_COUNT)
    seeds: list[int] = setting([1, 2, 3], "a training of each variant for each", low=0, high=MAX_SEED, length=(1, 8))
    variants: Optional[list[str]] = setting(None, "names of the variants; None: all", choices=tuple(VARIANTS))
    prompts: int = setting(24, "held-out prompts of the CLIP score, evenly spread", low=2, high=10_000)
    sampling_steps: int = setting(20, "steps of DPM-Solver++", low=1, high=1000)
    train_config: Path = setting(
        ROOT / "configs/train/train_config_lora_nano.yaml", "the base recipe, a YAML of configs/train", path=True
    )
    base_model: Path = setting(ROOT / "models/nano/nano.safetensors", "the base model", path=True)
    data_path: Path = setting(ROOT / "datasets/emoji_fluent_hc", "data set to train on", path=True)
    held_out: Path = setting(
        ROOT / "datasets/emoji_fluent_hc/test", "folder with held-out images and img_txt.csv", path=True
    )


class Row(NamedTuple):
    """A variant's results: one number a seed, in the order of the seeds."""

    name: str
    flags: tuple[str, ...]
    losses: list[float]
    clip_scores: list[float]


class Ablations:
    """The trainings, their measures and the page.

    Args:
        args: The command line.
        flags: Settings of train_text_to_image.py for all variants.
        words: The whole command line, for the page.

    Raises UserError if a file is missing or a setting is wrong, before any work.
    """

    def __init__(self, args: Settings, flags: Sequence[str] = (), words: Sequence[str] = ()):
        self.args, self.flags, self.words = args, list(flags), list(words)
        self.output = Path(from_root(args.output_path))
        self.variants = {name: VARIANTS[name] for name in dict.fromkeys(args.variants or VARIANTS)}
        if len(set(args.seeds)) < len(args.seeds):
            raise UserError(f"--seeds {' '.join(map(str, args.seeds))}: give different ones")
        for name in ("train_config", "base_model", "data_path", "held_out"):
            if not is_there(getattr(args, name), f"--{name}"):
                raise UserError(f"--{name} {plain(getattr(args, name))} does not exist")
        for variant in self.variants.values():
            read_settings(TrainSettings, self.training_flags(variant, args.seeds[0]), yaml_flag="train_config")
        captions = [" ".join(row.caption.split()) for row in read_image_text_csv(args.held_out).rows]
        self.prompts = [captions[i] for i in evenly(len(captions), args.prompts)]
        check_page(args.page)

    def training_flags(self, variant: Sequence[str], seed: int) -> list[str]:
        """Return the flags of a training, without its output folder."""
        args = self.args
        paths = {
            "--train_config": args.train_config, "--data_path": args.data_path,
            "--pretrained_model_path": args.base_model, "--validation_data_path": args.held_out,
        }  # fmt: skip
        steps = str(args.steps)
        # One checkpoint, at the end. The validation loss is computed before the first step and after the last one, with
        # the same noise for all seeds.
        every = ["--step_mode", "True", "--ckpt_save_interval", steps, "--ckpt_max_keep", "1"]
        every += ["--validate_every_n_steps", steps]
        return [
            *(part for flag, path in paths.items() for part in (flag, from_root(path))),
            "--max_steps", steps, *every, *self.flags, *variant, "--seed", str(seed), "--validation_seed", "1",
        ]  # fmt: skip

    def run(self) -> None:
        """Train what is not trained yet, measure it, and write the results and the page."""
        describe_progress(
            lambda: f"before the end; finished trainings are kept in {self.output}: the same command continues there"
        )
        args = self.args
        common = {
            "base": content_hash(args.base_model),
            "recipe": content_hash(args.train_config),
            "data": [str(args.data_path), content_hash(args.data_path / "img_txt.csv")],
            "held_out": [str(args.held_out), content_hash(args.held_out / "img_txt.csv")],
        }
        stages = Stages(self.output, len(self.variants) * len(args.seeds) + 1)
        trained = {}
        for name, variant in self.variants.items():
            for seed in args.seeds:
                flags = self.training_flags(variant, seed)
                trained[name, seed] = stages.run(
                    f"{folder_name(name)}/seed{seed}", {**common, "flags": flags},
                    lambda folder, flags=flags: self._train(flags, folder), can_continue=True,
                )  # fmt: skip
        scores = stages.run(
            "scores",
            {
                "loras": [run["sha256"] for run in trained.values()], "base": common["base"], "prompts": self.prompts,
                "sampling_steps": args.sampling_steps, "seeds": args.seeds,
            },
            lambda folder: self._score(list(trained)),
        )  # fmt: skip
        of_run = dict(zip(trained, scores["clip_scores"]))
        rows = [
            Row(
                name,
                flags,
                [trained[name, seed]["loss"] for seed in args.seeds],
                [of_run[name, seed] for seed in args.seeds],
            )
            for name, flags in self.variants.items()
        ]
        start = trained[next(iter(trained))]["loss_before"]
        lines = self._page(rows, start, scores)
        self._write(rows, start, scores)
        write_page(args.page, lines)
        print("\n" + "\n".join(lines) + f"\n\n{args.page}, {self.output / 'ablations.json'}, ablations.csv")

    def _train(self, flags: Sequence[str], folder: Path) -> dict[str, Any]:
        """Train a LoRA, and return its hash and its validation losses."""
        from ldm.runtime.device import has_ascend

        # All runs share their latents and text embeddings, and the seeds of a variant its compiled graph.
        cache = self.output / "cache"
        cache.mkdir(parents=True, exist_ok=True)
        if not os.path.lexists(folder / "cache"):
            os.symlink(os.path.relpath(cache, folder), folder / "cache")
        # Trainings of one table are compared, and some may have been made where auto is not bf16.
        precision = [] if has_ascend() or "--precision" in flags else ["--precision", "fp32"]
        call(
            "train_text_to_image.py", *flags, *precision, "--output_path", from_root(folder), "--compile_cache", "True",
            "--resume", "True",
        )  # fmt: skip
        losses = validation_losses(folder)
        if self.args.steps not in losses or 0 not in losses:
            raise UserError(
                f"{plain(folder / 'validation.csv')} has no validation loss at step 0 and step {self.args.steps}: the "
                "settings that follow on the command line must not turn it off"
            )
        for state in find_states(folder / "ckpt"):
            state.unlink()  # 19 MB for each run of the base recipe, which is not continued any more
        return {
            "loss": losses[self.args.steps],
            "loss_before": losses[0],
            "sha256": content_hash(folder / "ckpt" / "lora.ckpt"),
        }

    def _score(self, runs: Sequence[tuple[str, int]]) -> dict[str, Any]:
        """Draw the prompts with each LoRA and without one where that is not done, and return the CLIP scores."""
        from ldm.generation.pipeline import Pipeline
        from ldm.metrics.clip_score import clip_scores
        from ldm.metrics.evaluate import encode_images
        from ldm.metrics.networks import nano_clip
        from ldm.runtime.device import setup_runtime
        from ldm.settings.versions import default_guidance_scale
        from tools.eval.choosing.drawing import Drawing, make_sampling

        setup_runtime()  # as the trainings
        pipeline = Pipeline.from_checkpoint(self.args.base_model)
        config = pipeline.config
        sampling = make_sampling(
            config.image_size, self.args.sampling_steps, default_guidance_scale(config.architecture), len(self.prompts)
        )
        drawing = Drawing(pipeline, self.prompts, 1, sampling, {"base": content_hash(self.args.base_model)})
        network = nano_clip()
        texts = network.encode_texts(self.prompts)

        def score(place: Path) -> float:
            encoded = encode_images(drawing.files(place), network, min(32, len(self.prompts)), place.name)
            return float(clip_scores(encoded.features, texts[encoded.indices]).mean())

        folder, places = self.output / "images", []
        with tqdm(total=len(self.prompts) * (len(runs) + 1), desc="drawing", unit="image") as bar:
            drawing.draw(folder / "base", [], {"lora": None}, bar)
            for name, seed in runs:
                lora = self.output / folder_name(name) / f"seed{seed}" / "ckpt" / "lora.ckpt"
                places.append(folder / f"{folder_name(name)}-seed{seed}")
                drawing.draw(places[-1], [(lora, 1.0)], {"lora": content_hash(lora)}, bar)
        return {
            "clip_scores": [score(place) for place in places],
            "base": score(folder / "base"),
            "network": network.identity,
        }

    def _page(self, rows: Sequence[Row], start: float, scores: Mapping[str, Any]) -> list[str]:
        """Return the lines between the markers of the page."""
        args = self.args
        base = next((row for row in rows if row.name == BASE), None)
        table = [
            f"| base model, before training | | {start:.4f} | | {scores['base']:.2f} | |",
            *(_line(row, base) for row in rows),
        ]
        count = len(args.seeds)
        seeds = f"{count} seeds" if count > 1 else "one seed"
        command = ["python", "-m", "tools.eval.ablations", *_shown(self.words)]
        spread = "With one seed there is no standard deviation, and no difference can be told from chance."
        if count > 1:
            spread = (
                f"+- is the standard deviation over the {seeds}. The differences are to the base recipe with the same "
                "seed, so with the same images, noise and time steps. **Bold** ones are larger than chance allows "
                "(Student's t, 95 %)."
            )
        return [
            f"`{shlex.join(command)}`",
            "",
            f"{args.steps} steps of the recipe {args.train_config.name} on {args.data_path.name}, {seeds}. Validation "
            f"loss: mean squared error on held-out images, lower is better. CLIP score: {len(self.prompts)} held-out "
            "prompts at strength 1, by the nano CLIP; it compares with the others here alone, and line art scores "
            "lower than the base model's colours.",
            "",
            "| variant | flags | validation loss | difference | CLIP score | difference |",
            "| --- | --- | --- | --- | --- | --- |",
            *table,
            "",
            spread,
            "",
            *prodigy_sentence(rows),
            f"Base model: {args.base_model.name}, sha256 {content_hash(args.base_model)[:16]}. "
            f"CLIP: {scores['network']}. mindspore {metadata.version('mindspore')}.",
        ]

    def _write(self, rows: Sequence[Row], start: float, scores: Mapping[str, Any]) -> None:
        """Write ablations.json and ablations.csv."""
        write_json(
            self.output / "ablations.json",
            {
                "steps": self.args.steps,
                "seeds": self.args.seeds,
                "prompts": self.prompts,
                "base_model": {"validation_loss": start, "clip_score": scores["base"]},
                "network": scores["network"],
                "variants": [row._asdict() for row in rows],
            },
        )
        path = self.output / "ablations.csv"
        with writing(path), atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["variant", "seed", "validation_loss", "clip_score"])
            for row in rows:
                writer.writerows(zip([row.name] * len(row.losses), self.args.seeds, row.losses, row.clip_scores))


def folder_name(variant: str) -> str:
    """Return the folder of a variant."""
    return variant.lower().replace(",", "").replace(" ", "_")


def _line(row: Row, base: Row | None) -> str:
    cells = [row.name, f"`{' '.join(row.flags)}`" if row.flags else ""]
    columns = ((row.losses, base and base.losses, 4), (row.clip_scores, base and base.clip_scores, 2))
    for values, of_base, digits in columns:
        cells.append(_mean(values, digits))
        cells.append(_difference(values, of_base, digits) if of_base is not None and row is not base else "")
    return f"| {' | '.join(cells)} |"


def _mean(values: Sequence[float], digits: int, sign: str = "") -> str:
    mean = f"{np.mean(values):{sign}.{digits}f}"
    return mean if len(values) < 2 else f"{mean} +- {np.std(values, ddof=1):.{digits}f}"


def _difference(values: Sequence[float], others: Sequence[float], digits: int) -> str:
    text = _mean(np.subtract(values, others), digits, "+")
    return f"**{text}**" if is_more_than_chance(values, others) else text


def is_more_than_chance(values: Sequence[float], others: Sequence[float]) -> bool:
    """Return whether the mean of the differences, in pairs, is further from 0 than chance allows in 95 of 100 cases."""
    differences = np.subtract(values, others)
    count = len(differences)
    if count < 2:
        return False
    error = float(differences.std(ddof=1)) / math.sqrt(count)
    return bool(abs(differences.mean()) > STUDENT_T[count] * error)


def prodigy_sentence(rows: Sequence[Row]) -> list[str]:
    """Return the line on whether untuned Prodigy ends near the best AdamW, [] where one of them was not trained."""
    prodigy = next((row for row in rows if row.name == PRODIGY), None)
    adamw = [row for row in rows if row.name == BASE or row.name in ADAMW_RATES]
    if prodigy is None or not adamw:
        return []
    best = min(adamw, key=lambda row: float(np.mean(row.losses)))
    share = float(np.mean(prodigy.losses) / np.mean(best.losses)) - 1
    within = "within" if share <= PRODIGY_MAY_BE_ABOVE else "not within"
    return [
        f"Prodigy without any tuning ends at a validation loss of {np.mean(prodigy.losses):.4f}, {share:+.1%} beside "
        f"the best of {len(adamw)} {'rates' if len(adamw) > 1 else 'rate'} of AdamW ({best.name}, "
        f"{np.mean(best.losses):.4f}): {within} {PRODIGY_MAY_BE_ABOVE:.0%}.",
        "",
    ]


def _shown(argv: Sequence[str]) -> list[str]:
    """Return the words of the command line, without folders outside of the project."""
    return [Path(word).name if os.path.isabs(word) else word for word in argv]


def check_page(page: Path) -> None:
    """Raise UserError if a page cannot be read or has not both markers, in order."""
    if not is_there(page, "--page"):
        return
    text = read_text(page, "--page")
    if not 0 <= text.find(BEGIN) < text.find(END):
        raise UserError(
            f"--page {plain(page)} has no lines '{BEGIN}' and '{END}', between which the results are written: add "
            "them, or name a new file"
        )


def write_page(page: Path, lines: Sequence[str]) -> None:
    """Write the lines between the markers of a page, which is made where there is none."""
    text = read_text(page, "--page") if is_there(page) else f"# What each option does\n\n{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    with writing(page), atomic_path(page) as temporary:
        body = "\n".join(lines).strip("\n")
        temporary.write_text(f"{before}{BEGIN}\n\n{body}\n\n{END}{after}", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    own, flags = split_flags(Settings, words)
    args = read_settings(Settings, own, description=__doc__)
    args.page, args.output_path = args.page.resolve(), args.output_path.resolve()
    for name in ("train_config", "base_model", "data_path", "held_out"):
        setattr(args, name, getattr(args, name).resolve())
    os.chdir(ROOT)  # so that all paths are those of the printed commands
    ablations = Ablations(args, flags, words)
    with claim_folder(ablations.output, "--output_path"), claim_file(args.page, "--page"):
        ablations.run()


if __name__ == "__main__":
    run_script(main)
