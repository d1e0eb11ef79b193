"""The numbers of compare_diffusers.py and the page made of them."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.errors import UserError

SIDES = ("ours", "diffusers")
# Two fp32 implementations given the same draws stay this close for so many steps; later small differences have grown.
EARLY_STEPS, ALLOWED = 20, 0.01
RESAMPLES = 200
COLUMNS = (("fid", "FID", 1), ("kid", "KID x 1000", 1000), ("clip_score", "CLIP score", 1))


class Scores:
    """Scores of sets of images of the same prompts by the same networks, with bootstrap deviations over the prompts.

    real: the real images' files, one a prompt; empty where there are none, and then no distances.
    """

    def __init__(self, prompts: Sequence[str], real: Sequence[Path], image_network: Any, text_network: Any):
        from ldm.metrics.evaluate import encode_images

        self.encode, self.batch_size = encode_images, min(32, len(prompts))
        self.image_network, self.text_network = image_network, text_network
        self.count = len(prompts)
        self.texts = text_network.encode_texts(prompts, self.batch_size)
        self.real = self._features(real, image_network) if real else None
        self.real_clip_scores = self._clip_scores(real) if real else None
        self.features: dict[str, np.ndarray] = {}
        self.clip_scores: dict[str, np.ndarray] = {}
        self.pixels: dict[str, np.ndarray] = {}

    def add(self, name: str, files: Sequence[Path]) -> dict[str, float | None]:
        """{"fid", "fid_std", "kid", "kid_std", "clip_score", "clip_score_std"} of one set."""
        from ldm.metrics.bootstrap import bootstrap_std
        from ldm.metrics.kernel import kernel_distance

        if len(files) != self.count:
            raise UserError(f"{name} has {len(files)} images for {self.count} prompts: remove it and run again")
        self.clip_scores[name] = values = self._clip_scores(files)
        self.pixels[name] = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
        found: dict[str, float | None] = {
            "fid": None, "fid_std": None, "kid": None, "kid_std": None,
            "clip_score": float(values.mean()),
            "clip_score_std": bootstrap_std(lambda i: float(values[i].mean()), self.count, RESAMPLES),
        }  # fmt: skip
        if self.real is not None:
            self.features[name] = self._features(files, self.image_network)
            everything = np.arange(self.count)
            found["fid"] = self._fid(name, everything)
            found["fid_std"] = bootstrap_std(lambda i: self._fid(name, i), self.count, RESAMPLES)
            if self.count >= 4:
                found["kid"], found["kid_std"] = kernel_distance(self.real, self.features[name])
        return found

    def of_real(self) -> float | None:
        """The CLIP score of the real images: what generated ones can be expected to come near."""
        return None if self.real_clip_scores is None else float(self.real_clip_scores.mean())

    def difference(self, name: str, other: str) -> dict[str, float | None]:
        """Scores of `name` less those of `other`, their deviations with the prompts drawn alike for both, and how far
        the images are apart: the mean over pixels and channels, of 255.
        """
        from ldm.metrics.bootstrap import bootstrap_std

        clip = self.clip_scores[name] - self.clip_scores[other]
        pixels = np.abs(self.pixels[name].astype(np.float64) - self.pixels[other])
        found: dict[str, float | None] = {
            "fid": None, "fid_std": None,
            "clip_score": float(clip.mean()),
            "clip_score_std": bootstrap_std(lambda i: float(clip[i].mean()), self.count, RESAMPLES),
            "pixels": float(pixels.mean()),
        }  # fmt: skip
        if self.real is not None:

            def fid(i: np.ndarray) -> float:
                return self._fid(name, i) - self._fid(other, i)

            found["fid"] = fid(np.arange(self.count))
            found["fid_std"] = bootstrap_std(fid, self.count, RESAMPLES)
        return found

    def _fid(self, name: str, indices: np.ndarray) -> float:
        from ldm.metrics.frechet import frechet_of_features

        return frechet_of_features(self.real[indices], self.features[name][indices])

    def _clip_scores(self, files: Sequence[Path]) -> np.ndarray:
        from ldm.metrics.clip_score import clip_scores

        return clip_scores(self._features(files, self.text_network), self.texts)

    def _features(self, files: Sequence[Path], network: Any) -> np.ndarray:
        return self.encode(files, network, self.batch_size).features


def read_metrics(folder: Path) -> dict[str, list[float]]:
    """The columns of metrics.csv, a value a step."""
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


def compare_runs(ours: Mapping[str, Sequence[float]], diffusers: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """How far two runs' metrics are apart, relatively: the largest difference of a step's loss and of its gradients'
    norm over the first EARLY_STEPS, the loss's over all with that step; and the mean losses of the last tenth.
    """
    steps = len(ours["loss"])
    if steps != len(diffusers["loss"]):
        raise UserError(
            f"{steps} steps here and {len(diffusers['loss'])} with diffusers: remove the training folders and run again"
        )

    def apart(name: str) -> np.ndarray:
        return np.abs(np.divide(ours[name], diffusers[name]) - 1.0)

    loss, tail = apart("loss"), slice(-max(1, steps // 10), None)
    return {
        "early_steps": min(EARLY_STEPS, steps),
        "early": float(loss[:EARLY_STEPS].max()),
        "early_gradient_norm": float(apart("gradient_norm")[:EARLY_STEPS].max()),
        "largest": float(loss.max()),
        "largest_at": int(loss.argmax()) + 1,
        "agree": bool(loss[:EARLY_STEPS].max() <= ALLOWED),
        "last_ours": float(np.mean(ours["loss"][tail])),
        "last_diffusers": float(np.mean(diffusers["loss"][tail])),
    }


def seconds_per_step(metrics: Mapping[str, Sequence[float]]) -> float:
    """The median, without the first step, which compiles."""
    return float(np.median(metrics["seconds"][1:] or metrics["seconds"]))


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """(mean, standard deviation); one value has no deviation."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def markdown(table: Mapping[str, Any], command: str) -> str:
    """The results as a Markdown page: the published table's columns, then how far the two are apart, then training."""
    scores, seeds, recipe = table["scores"], table["seeds"], table["recipe"]
    base, data, sampling = table["base"], table["data"], table["sampling"]
    places = [("base", ["base_"]), *((f"LoRA, seed {seed}", [f"seed{seed}/"]) for seed in seeds)]
    if len(seeds) > 1:
        places.append((f"LoRA, mean of {len(seeds)} seeds", [f"seed{seed}/" for seed in seeds]))

    # the embedded network's FID is far below 1
    digits = {key: 2 if max(abs(found[key] or 0) * factor for found in scores["sets"].values()) >= 0.5 else 4
              for key, _, factor in COLUMNS}  # fmt: skip
    published, differences = [], []
    for label, prefixes in places:
        sets = [[scores["sets"][prefix + side] for prefix in prefixes] for side in SIDES]
        published.append(
            [label, *(_cell(side, key, digits[key], factor) for key, _, factor in COLUMNS for side in sets)]
        )
        pairs = [scores["pairs"][prefix] for prefix in prefixes]
        pixels = f"{np.mean([pair['pixels'] for pair in pairs]):.3f}"
        differences.append([label, *(_cell(pairs, key, digits[key], 1, "+") for key in ("fid", "clip_score")), pixels])

    training = []
    for seed in seeds:
        losses = table["losses"][str(seed)]
        runs = [table["training"][f"seed{seed}/{side}"] for side in SIDES]
        training.append([
            f"seed {seed}",
            f"{losses['early']:.1e}, {losses['early_gradient_norm']:.1e}"
            + ("" if losses["agree"] else f" (more than {ALLOWED:.0%})"),
            f"{losses['largest']:.1e} at step {losses['largest_at']}",
            f"{losses['last_ours']:.5f} / {losses['last_diffusers']:.5f}",
            " / ".join(f"{run['seconds_per_step']:.3f}" for run in runs),
            " / ".join(f"{run['peak_memory_mb']:.0f}" if run["peak_memory_mb"] else "-" for run in runs),
        ])  # fmt: skip
    early = min(EARLY_STEPS, table["updates"])
    batch = recipe["train_batch_size"] * recipe["gradient_accumulation_steps"]
    kept = [what for what, is_kept in (
        ("latents", recipe["cache_latents"] and not (recipe["random_crop"] or recipe["random_flip"])),
        ("text states", recipe["cache_text"])) if is_kept]  # fmt: skip
    cached = f"{' and '.join(kept)} cached by both" if kept else "nothing cached by either"
    networks = [scores[name] for name in ("image_network", "text_network")]
    notes = []
    if scores["real_clip_score"] is not None:
        notes.append(f"The CLIP score of the real images is {scores['real_clip_score']:.2f}.")
    if data["prompts"] < 2048:
        notes.append(f"{data['prompts']} images are fewer than 2,048: an FID compares only within this table.")
    if any(network["compares_only_with_itself"] for network in networks):
        notes.append("Scores by the embedded nano CLIP compare only with one another, never with published ones.")
    ours, theirs = (", ".join(f"{name} {value}" for name, value in table["versions"][side].items()) for side in SIDES)
    return "\n".join([
        f"# {base['file']}, LoRA on {data['folder']}",
        "",
        f"{table['updates']} steps of {batch} of {data['rows']} images, rank {recipe['lora_rank']}, learning rate "
        f"{recipe['start_learning_rate']:g} "
        f"({recipe['scheduler']}), fp32, {cached}. {data['prompts']} held-out prompts, {sampling['sampler']} "
        f"{sampling['steps']} steps, guidance {sampling['scale']:g}, the same starting latents for all sets.",
        "",
        *_table(["", *(f"{name} ({side})" for _, name, _ in COLUMNS for side in SIDES)], published),
        "",
        "+- is the bootstrap deviation over the prompts (KID: over random halves); of a mean, the deviation between "
        f"the seeds. {' '.join(notes)}".rstrip(),
        "",
        "Ours less diffusers', with the same prompts drawn again for both:",
        "",
        *_table(["", "FID", "CLIP score", "mean difference of the images, of 255"], differences),
        "",
        "Training (ours / diffusers):",
        "",
        *_table(["", f"losses and gradient norms apart, first {early} steps (relative)", "losses apart, all steps",
                 "mean loss of the last tenth", "seconds a step (median)", "peak memory, MB"], training),
        "",
        "![losses](curves/losses.png)",
        "",
        *(f"![images](grid_seed{seed}.png)" for seed in seeds[:1]),
        "",
        f"- `{command}`",
        f"- base: {base['file']}, sha256 {base['sha256'][:16]}, {base['architecture']}",
        *(f"- {what} by {network['network']}, sha256 {network['sha256'][:16]}; {network['preprocessing']}"
          for what, network in zip(("FID and KID", "CLIP score"), networks)),
        f"- ours: {ours}; diffusers' side: {theirs}; tokens by this project's tokenizer on both sides",
        "",
    ])  # fmt: skip


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def _cell(found: Sequence[Mapping[str, float | None]], key: str, digits: int, factor: float, sign: str = "") -> str:
    """A score with its deviation: the bootstrap's of one run, that between the runs of several."""
    values = [run[key] for run in found]
    if any(value is None for value in values):
        return "-"
    mean, deviation = (values[0], found[0][f"{key}_deviation"]) if len(values) == 1 else spread(values)
    mean = round(mean * factor, digits) + 0.0  # no -0.00
    spelt = "" if deviation is None else f" +- {deviation * factor:.{digits}f}"
    return f"{mean:{sign}.{digits}f}{spelt}"
