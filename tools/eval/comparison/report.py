"""The report of a comparison: how far the trainings differ, and the page with all results."""

from __future__ import annotations

import csv
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm.errors import UserError
from ldm.files.paths import ROOT
from tools.eval.comparison.experiment import SIDES

# Two fp32 implementations with the same draws stay this close for so many steps. Later, small differences have grown.
EARLY_STEPS, ALLOWED = 20, 0.01
COLUMNS = (("fid", "FID", 1), ("kid", "KID x 1000", 1000), ("clip_score", "CLIP score", 1))


def read_metrics(folder: Path) -> dict[str, list[float]]:
    """Return the columns of a run's metrics.csv, with one value per step."""
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


def compare_runs(ours: Mapping[str, Sequence[float]], diffusers: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Compare the metrics of two runs.

    Returns:
        The largest relative differences of a step's loss and gradient norm over the first EARLY_STEPS ("early"), that
        of the loss over all steps with its step ("largest"), and the mean losses of the last tenth ("last").
    """
    steps = len(ours["loss"])
    if steps != len(diffusers["loss"]):
        raise UserError(
            f"{steps} steps here and {len(diffusers['loss'])} with diffusers: remove the training folders and run again"
        )

    def relative_difference(name: str) -> np.ndarray:
        return np.abs(np.divide(ours[name], diffusers[name]) - 1.0)

    loss, tail = relative_difference("loss"), slice(-max(1, steps // 10), None)
    return {
        "early_steps": min(EARLY_STEPS, steps),
        "early": float(loss[:EARLY_STEPS].max()),
        "early_gradient_norm": float(relative_difference("gradient_norm")[:EARLY_STEPS].max()),
        "largest": float(loss.max()),
        "largest_at": int(loss.argmax()) + 1,
        "agree": bool(loss[:EARLY_STEPS].max() <= ALLOWED),
        "last_ours": float(np.mean(ours["loss"][tail])),
        "last_diffusers": float(np.mean(diffusers["loss"][tail])),
    }


def seconds_per_step(metrics: Mapping[str, Sequence[float]]) -> float:
    """Return the median over the steps without the first, which compiles."""
    return float(np.median(metrics["seconds"][1:] or metrics["seconds"]))


def markdown(table: Mapping[str, Any], command: str) -> str:
    """Return the results as a Markdown page: the scores, their differences between the sides, and the trainings."""
    scores, seeds, recipe = table["scores"], table["seeds"], table["recipe"]
    base, data, sampling = table["base"], table["data"], table["sampling"]
    rows = [("base", ["base_"]), *((f"LoRA, seed {seed}", [f"seed{seed}/"]) for seed in seeds)]
    if len(seeds) > 1:
        rows.append((f"LoRA, mean of {len(seeds)} seeds", [f"seed{seed}/" for seed in seeds]))

    # FIDs of the nano CLIP are far below 1.
    digits = {key: 2 if max(abs(score[key] or 0) * factor for score in scores["sets"].values()) >= 0.5 else 4
              for key, _, factor in COLUMNS}  # fmt: skip
    score_rows, difference_rows, training_rows = [], [], []
    for label, prefixes in rows:
        sets = [[scores["sets"][prefix + side] for prefix in prefixes] for side in SIDES]
        score_rows.append(
            [label, *(_cell(side, key, digits[key], factor) for key, _, factor in COLUMNS for side in sets)]
        )
        pairs = [scores["pairs"][prefix] for prefix in prefixes]
        pixels = f"{np.mean([pair['pixels'] for pair in pairs]):.3f}"
        difference_rows.append(
            [label, *(_cell(pairs, key, digits[key], 1, "+") for key in ("fid", "clip_score")), pixels]
        )

    for seed in seeds:
        losses = table["losses"][str(seed)]
        runs = [table["training"][f"seed{seed}/{side}"] for side in SIDES]
        training_rows.append([
            f"seed {seed}",
            f"{losses['early']:.1e}, {losses['early_gradient_norm']:.1e}"
            + ("" if losses["agree"] else f" (more than {ALLOWED:.0%})"),
            f"{losses['largest']:.1e} at step {losses['largest_at']}",
            f"{losses['last_ours']:.5f} / {losses['last_diffusers']:.5f}",
            " / ".join(f"{run['seconds_per_step']:.3f}" for run in runs),
            " / ".join(f"{run['peak_memory_mb']:.0f}" if run["peak_memory_mb"] else "-" for run in runs),
        ])  # fmt: skip
    early = min(EARLY_STEPS, table["steps"])
    batch = recipe["train_batch_size"] * recipe["gradient_accumulation_steps"]
    cached = [what for what, is_cached in (
        ("latents", recipe["cache_latents"] and not (recipe["random_crop"] or recipe["random_flip"])),
        ("text embeddings", recipe["cache_text"])) if is_cached]  # fmt: skip
    caching = f"{' and '.join(cached)} cached by both" if cached else "nothing cached by either"
    networks = [scores[name] for name in ("image_network", "clip_network")]
    notes = []
    if scores["real_clip_score"] is not None:
        notes.append(f"The CLIP score of the real images is {scores['real_clip_score']:.2f}.")
    if data["prompts"] < 2048:
        notes.append(f"{data['prompts']} images are fewer than 2,048: an FID compares only within this table.")
    if any(network["compares_only_with_itself"] for network in networks):
        notes.append("Scores by the nano CLIP compare only with each other, never with published scores.")
    ours, theirs = (", ".join(f"{name} {value}" for name, value in table["versions"][side].items()) for side in SIDES)
    return "\n".join([
        f"# {base['file']}, LoRA on {data['folder']}",
        "",
        f"{table['steps']} steps of {batch} of {data['rows']} images, rank {recipe['lora_rank']}, learning rate "
        f"{recipe['start_learning_rate']:g} "
        f"({recipe['scheduler']}), fp32, {caching}. {data['prompts']} held-out prompts, {sampling['sampler']} "
        f"{sampling['steps']} steps, guidance {sampling['scale']:g}, the same starting latents for all sets.",
        "",
        *_table(["", *(f"{name} ({side})" for _, name, _ in COLUMNS for side in SIDES)], score_rows),
        "",
        "+- is the standard deviation by bootstrap over the prompts (KID: over random halves), or that between the "
        f"seeds in the row of their mean. {' '.join(notes)}".rstrip(),
        "",
        "Ours minus diffusers', with the same prompts drawn for both:",
        "",
        *_table(["", "FID", "CLIP score", "mean difference of the images, of 255"], difference_rows),
        "",
        "Training (ours / diffusers), with relative differences:",
        "",
        *_table(["", f"difference of losses, of gradient norms, first {early} steps", "of losses, all steps",
                 "mean loss of the last tenth", "seconds a step (median)", "peak memory, MB"], training_rows),
        "",
        "![losses](curves/losses.png)",
        "",
        *(f"![images](grid_seed{seed}.png)" for seed in seeds[:1]),
        "",
        f"- `{command}`",
        f"- base: {base['file']}, sha256 {base['sha256'][:16]}, {base['architecture']}",
        *(f"- {what} by {network['network']}, sha256 {network['sha256'][:16]}; {network['preprocessing']}"
          for what, network in zip(("FID and KID", "CLIP score"), networks)),
        f"- ours: {ours}; diffusers: {theirs}; both use this project's tokenizer",
        "",
    ])  # fmt: skip


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def _cell(scores: Sequence[Mapping[str, float | None]], key: str, digits: int, factor: float, sign: str = "") -> str:
    """Format a score with its standard deviation: by bootstrap for one run, between the runs for several."""
    values = [value for run in scores if (value := run[key]) is not None]
    if len(values) < len(scores):
        return "-"
    std = scores[0][f"{key}_std"] if len(values) == 1 else float(np.std(values, ddof=1))
    mean = round(float(np.mean(values)) * factor, digits) + 0.0  # no -0.00
    return f"{mean:{sign}.{digits}f}" + ("" if std is None else f" +- {std * factor:.{digits}f}")


def shown_command(argv: Sequence[str]) -> str:
    """Return the command for the report, with paths relative to the project, and without other folders."""
    parts = list(argv)
    for i in reversed([i for i, part in enumerate(parts) if part.partition("=")[0] == "--reference_python"]):
        del parts[i : i + (1 if "=" in parts[i] else 2)]

    def shown(part: str) -> str:
        flag, equals, value = part.partition("=") if part.startswith("--") else ("", "", part)
        if not os.path.isabs(value):
            return part
        path = Path(value)
        return flag + equals + (str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name)

    return shlex.join(["python", "tools/eval/compare_diffusers.py", *map(shown, parts)])
