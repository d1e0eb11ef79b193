r"""Choose the checkpoint of a LoRA training, and the strength to use it with, on prompts that it has not seen.

    python tools/eval/choose_checkpoint.py --run output/lora

Every checkpoint in the run's ckpt/ draws the captions of the held-out images (or --prompts) at every strength, from the
same starting latents. The images are scored, and the scores of all candidates are compared on the same bootstrap
samples of the prompts. The table says which candidates cannot be told apart from the best. One is named, with the rule
that chose it. A killed run of this tool continues with the images that are missing. docs/choosing.md explains the
scores.

    RUN/choice/choice.json, choice.csv    the scores with their standard deviations, and the choice
    RUN/choice/sheet.png                  a row for each checkpoint, a column for each strength
    RUN/choice/images                     all images
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ldm.runtime.script import describe_progress, run_script, start_script  # noqa: E402

if __name__ == "__main__":
    start_script()

import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402

from ldm.errors import UserError, plain  # noqa: E402
from ldm.files.atomic import atomic_path  # noqa: E402
from ldm.files.inputs import is_file, is_there  # noqa: E402
from ldm.files.outputs import claim_folder  # noqa: E402
from ldm.files.paths import MAX_STRENGTH, under_root, writing  # noqa: E402
from ldm.files.prompts import read_prompts  # noqa: E402
from ldm.metrics.bootstrap import resampled_indices  # noqa: E402
from ldm.metrics.clip_score import clip_scores  # noqa: E402
from ldm.metrics.report import describe_network, print_network, write_json  # noqa: E402
from ldm.runtime.logs import set_up_logging  # noqa: E402
from ldm.settings.declare import MAX_COUNT, MAX_SEED, REQUIRED, setting  # noqa: E402
from ldm.settings.model import ModelConfig, load_model_config  # noqa: E402
from ldm.settings.read import read_settings  # noqa: E402
from ldm.settings.train import TrainSettings  # noqa: E402
from ldm.settings.versions import default_guidance_scale  # noqa: E402
from ldm.training.checks import image_size  # noqa: E402
from ldm.weights.architecture import config_with_tokens, detect_model_config  # noqa: E402
from ldm.weights.base_model import base_model_hash  # noqa: E402
from tools.eval.choosing.run_folder import (  # noqa: E402
    Checkpoint,
    Material,
    find_checkpoints,
    read_material,
    read_run,
    reference_content,
    reference_pixels,
    validation_losses,
)
from tools.eval.choosing.scores import FEWEST_FOR_KID, Score, clip_score, image_score, kid, mean_rank  # noqa: E402
from tools.grid import draw_grid, evenly  # noqa: E402

if TYPE_CHECKING:
    from ldm.metrics.networks import ClipNetwork

RULES = ("mean_rank", "clip_score", "image_score", "kid", "validation_loss")
FEW_PROMPTS = 16  # below, few candidates can be told apart
MOST_NAMED = 6  # candidates in a sentence


@dataclass
class Settings:
    """The command line."""

    run: str = setting(REQUIRED, "output folder of a LoRA training (its output_path)", path=True)
    strengths: list[float] = setting(
        [0.6, 0.8, 1.0], "strengths of the LoRA", low=-MAX_STRENGTH, high=MAX_STRENGTH, length=(1, 20)
    )
    steps: Optional[list[int]] = setting(
        None, "only the checkpoints after these steps; None: all", low=1, high=MAX_COUNT, length=(1, 1000)
    )
    prompts: Optional[str] = setting(
        None, "text file with one prompt a line; None: the captions of the held-out images", path=True
    )
    held_out: Optional[str] = setting(
        None,
        "data set that the run has not seen; None: what the run held out (validation_split, validation_data_path), "
        "else test/ in its data set",
        path=True,
    )
    count: int = setting(24, "the most prompts, evenly spread over those there are", low=2, high=10_000)
    rule: str = setting(
        "mean_rank",
        "what chooses: mean_rank is the mean of the ranks by all scores there are, others are that score alone",
        choices=RULES,
    )
    resamples: int = setting(1000, "bootstrap samples of the prompts", low=100, high=100_000)
    output_path: Optional[str] = setting(None, "folder of the results; None: choice in the run's folder", path=True)
    clip_path: Optional[str] = setting(
        None,
        "CLIP weights for all scores: a Hugging Face folder or a file, as in eval_clip_score.py; None: the nano CLIP",
        path=True,
    )
    sampling_steps: int = setting(20, "steps of DPM-Solver++", group="sampling", low=1, high=1000)
    scale: Optional[float] = setting(
        None, "guidance, 1 for none; None: 9.0 (SD2.x), 7.5 (SD1.5), 4.0 (nano)", low=1, high=1000
    )
    seed: int = setting(1, "seed of the starting latents", low=0, high=MAX_SEED)
    base: Optional[str] = setting(
        None, "base checkpoint; None: the run's pretrained_model_path", group="moved files", path=True
    )
    data: Optional[str] = setting(None, "data set of the run; None: the run's data_path", path=True)
    sheet_prompts: int = setting(2, "prompts of the sheet, each with all checkpoints", group="output", low=1, high=20)
    device_target: Optional[str] = setting(
        None, "device; None: Ascend where there is one, else CPU", choices=("Ascend", "CPU")
    )


class Candidate(NamedTuple):
    """A checkpoint at a strength."""

    checkpoint: Checkpoint
    strength: float
    folder: Path

    @property
    def label(self) -> str:
        return f"{self.checkpoint.label} at {self.strength:g}"


class Choice:
    """What is compared. Raises UserError for mistakes before any work, and before MindSpore is imported."""

    def __init__(self, args: Settings):
        self.args, run = args, Path(args.run)
        self.run, self.settings = run, read_run(run)
        self.checkpoints = find_checkpoints(run, args.steps)
        if len(set(args.strengths)) < len(args.strengths):
            raise UserError(f"--strengths {' '.join(map(str, args.strengths))}: give different ones")
        self.settings.pretrained_model_path = _path(args.base, self.settings.pretrained_model_path, "base")
        self.settings.data_path = _path(args.data, self.settings.data_path, "data")
        self.losses = validation_losses(run)
        if args.rule == "validation_loss" and not self._has_losses():
            raise UserError(
                f"--rule validation_loss: {plain(run / 'validation.csv')} has no loss at the step of every checkpoint: "
                "choose another rule, or give --steps with those that it has"
            )
        self.config = _model_config(self.settings)
        self.size = image_size(self.settings, self.config)
        self.prompts = None if args.prompts is None else read_prompts(args.prompts, "--prompts")
        self.output = Path(run / "choice" if args.output_path is None else args.output_path)
        self.candidates = [
            Candidate(checkpoint, strength, self.output / "images" / checkpoint.path.stem / f"{strength:g}")
            for checkpoint in self.checkpoints
            for strength in args.strengths
        ]

    def _has_losses(self) -> bool:
        return all(checkpoint.step in self.losses for checkpoint in self.checkpoints)

    def make(self) -> None:
        """Draw what is missing, score it, and write the results."""
        args = self.args
        describe_progress(
            lambda: f"before the end; images are kept in {self.output}: the same command continues from there"
        )
        material = read_material(
            self.settings, self.config, self.output / "cache" / "images.json",
            prompts=self.prompts, held_out=args.held_out, count=args.count,
        )  # fmt: skip
        if len(material.prompts) < 2:
            raise UserError("there is one held-out prompt: give 2 or more, or nothing can be told apart")
        self.has_kid = min(len(material.prompts), len(material.rows)) >= FEWEST_FOR_KID
        if args.rule == "kid" and not self.has_kid:
            raise UserError(
                f"--rule kid needs {FEWEST_FOR_KID} prompts and real images or more: give more, or another rule"
            )
        drawn, base = self._draw(material)
        references = self._write_references(material)
        scores, notes = self._score(material, references, drawn, base)
        ranked = [score for score in scores if score.key != "mean_rank"]
        chosen_by = next(score for score in scores if score.key == args.rule)
        # Of equal ones the first is the earliest step with the lowest strength.
        chosen = chosen_by.best
        lines = [
            *table(self.candidates, scores, chosen), "", *notes, *sentences(self.candidates, ranked, args.resamples),
            verdict(self.candidates, chosen_by, chosen, ranked),
        ]  # fmt: skip
        self._write(material, scores, chosen_by, chosen, notes)
        self._draw_sheet(material, drawn, base)
        print("\n" + "\n".join(lines))
        print(f"\n{self.output / 'sheet.png'}, choice.json, choice.csv")

    def _draw(self, material: Material) -> tuple[list[list[Path]], list[Path]]:
        """Draw all candidates and the base model, and return their images."""
        from ldm.generation.pipeline import Pipeline
        from ldm.runtime.device import setup_runtime
        from ldm.training.resume import precision_of_run
        from tools.eval.choosing.drawing import Drawing, make_sampling

        settings, args, prompts = self.settings, self.args, material.prompts
        scale = default_guidance_scale(self.config.architecture) if args.scale is None else args.scale
        assert settings.pretrained_model_path is not None  # _path
        setup_runtime(
            args.device_target, automatic=lambda: "bf16" if precision_of_run(Path(args.run)) == "bf16" else "fp32"
        )
        pipeline = Pipeline.from_checkpoint(
            settings.pretrained_model_path, config=self.config, vae=settings.vae_ckpt_path,
            ema=settings.pretrained_model_ema, device=args.device_target,
        )  # fmt: skip
        inputs = {
            "base": base_model_hash(settings.pretrained_model_path),
            "vae": settings.vae_ckpt_path and base_model_hash(settings.vae_ckpt_path),
            "ema": settings.pretrained_model_ema,
            "model": self.config.content(),
        }
        sampling = make_sampling(self.size, args.sampling_steps, scale, len(prompts))
        drawing = Drawing(pipeline, prompts, args.seed, sampling, inputs)
        base_folder = self.output / "images" / "base"
        print(
            f"{len(self.checkpoints)} checkpoints x {len(args.strengths)} strengths, and the base model: "
            f"{len(prompts)} prompts each, DPM-Solver++ {args.sampling_steps} steps, guidance {scale:g}",
            flush=True,
        )
        with tqdm(total=len(prompts) * (len(self.candidates) + 1), desc="drawing", unit="image") as bar:
            drawing.draw(base_folder, [], {"lora": None}, bar)
            for candidate in self.candidates:
                lora = {"lora": candidate.checkpoint.sha256, "strength": candidate.strength}
                drawing.draw(candidate.folder, [(candidate.checkpoint.path, candidate.strength)], lora, bar)
        return [drawing.files(candidate.folder) for candidate in self.candidates], drawing.files(base_folder)

    def _write_references(self, material: Material) -> list[Path]:
        """Write the real images as they are trained, and return their files."""
        from ldm.generation.image_files import write_png
        from tools.eval.choosing.drawing import begin_folder

        folder = self.output / "real"
        begin_folder(folder, {"images": reference_content(material)})
        files = [folder / f"{i:05d}.png" for i in range(len(material.rows))]
        for row, file in zip(material.rows, files):
            if not is_file(file):
                write_png(file, reference_pixels(material, row), {})
        return files

    def _network(self) -> ClipNetwork:
        from ldm.metrics.networks import clip, nano_clip

        network = nano_clip() if self.args.clip_path is None else clip(self.args.clip_path)
        print_network(network)
        if network.is_nano and self.config.architecture != "nano":
            print("warning: the nano CLIP knows emoji of 64 pixels alone: give --clip_path for a model of other images")
        return network

    def _score(
        self, material: Material, references: Sequence[Path], drawn: Sequence[Sequence[Path]], base: Sequence[Path]
    ) -> tuple[list[Score], list[str]]:
        """Return all scores of the candidates, and lines about the base model and the real images."""
        from ldm.metrics.evaluate import encode_images

        network = self._network()
        self.network = describe_network(network)
        batch_size = min(32, len(material.prompts))

        def features(files: Sequence[Path], label: str) -> np.ndarray:
            encoded = encode_images(files, network, batch_size, label)
            if encoded.broken:
                path, fault = encoded.broken[0]
                raise UserError(f"{plain(path)} {fault}: remove it and run again")
            return encoded.features

        images = np.stack([features(files, candidate.label) for files, candidate in zip(drawn, self.candidates)])
        real, of_base = features(references, "real images"), features(base, "base model")
        prompts, resamples = network.encode_texts(material.prompts, batch_size), self.args.resamples
        indices = resampled_indices(len(material.prompts), resamples)
        enough = float(clip_scores(real[: len(prompts)], prompts).mean()) if material.paired else None
        scores = [clip_score(images, prompts, indices, enough), image_score(images, real, indices)]
        base_scores = [clip_score(of_base[None], prompts, indices), image_score(of_base[None], real, indices)]
        notes = []
        if len(material.prompts) < FEW_PROMPTS:
            notes.append(f"{len(material.prompts)} prompts are few: only large differences can be told apart")
        if self.has_kid:
            real_indices = resampled_indices(len(real), resamples, seed=1)  # other draws than those of the prompts
            scores.append(kid(images, real, indices, real_indices))
            base_scores.append(kid(of_base[None], real, indices, real_indices))
        else:
            notes.append(f"no KID: it needs {FEWEST_FOR_KID} prompts and real images or more")
        if self._has_losses():
            losses = np.array([self.losses[candidate.checkpoint.step or 0] for candidate in self.candidates])
            scores.append(Score("validation_loss", "validation loss", False, losses, None, digits=5))
        elif self.losses:
            notes.append("no validation loss: validation.csv does not have one at the step of every checkpoint")
        shown = ", ".join(f"{score.label} {_cell(score, 0)}" for score in base_scores)
        notes.append(f"the base model without a LoRA: {shown}")
        if enough is not None:
            notes.append(
                f"CLIP score of the real images of these prompts: {enough:.2f}; more is no better, and has equal ranks"
            )
        notes.append(f"image score and KID: against {len(real)} {material.origin}")
        scores.append(mean_rank(scores, resamples))
        return scores, notes

    def _write(self, material: Material, scores: list[Score], rule: Score, chosen: int, notes: list[str]) -> None:
        """Write choice.json and choice.csv."""
        rows = []
        for i, candidate in enumerate(self.candidates):
            row: dict[str, Any] = {
                "checkpoint": candidate.checkpoint.path.name,
                "step": candidate.checkpoint.step,
                "strength": candidate.strength,
            }
            for score in scores:
                row[score.key] = float(score.values[i])
                if score.samples is not None:
                    row[f"{score.key}_std"] = score.std(i)
            row["chosen"] = i == chosen
            row["like_chosen"] = i in rule.alike(chosen)
            rows.append(row)
        result = {
            "run": str(self.run),
            "chosen": rows[chosen],
            "rule": rule.key,
            "resamples": self.args.resamples,
            "prompts": material.prompts,
            "real_images": {"count": len(material.rows), "origin": material.origin},
            "notes": notes,
            "candidates": rows,
            "best": {score.key: self.candidates[score.best].label for score in scores},
            "like_best": {score.key: [self.candidates[i].label for i in score.alike(score.best)] for score in scores},
            **self.network,
        }
        write_json(self.output / "choice.json", result)
        path = self.output / "choice.csv"
        with writing(path), atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)

    def _draw_sheet(self, material: Material, drawn: Sequence[Sequence[Path]], base: Sequence[Path]) -> None:
        """Write sheet.png: for each of some prompts a row for each checkpoint, and a column for each strength."""
        shown = evenly(len(material.prompts), self.args.sheet_prompts)
        names = [f"{checkpoint.label}: {material.prompts[i]}" for i in shown for checkpoint in self.checkpoints]
        strengths = self.args.strengths
        columns = {"base model": [base[i] for i in shown for _ in self.checkpoints]}
        for column, strength in enumerate(strengths):
            columns[f"{strength:g}"] = [
                drawn[row * len(strengths) + column][i] for i in shown for row in range(len(self.checkpoints))
            ]
        with writing(self.output / "sheet.png"):
            draw_grid(names, columns, self.output / "sheet.png", header="checkpoint / strength")


def _path(given: str | None, of_run: str | None, flag: str) -> str:
    """Return a path of the run, or the one that is given instead. Raises UserError if there is nothing."""
    path = of_run if given is None else given
    if path is None or not is_there(path, f"--{flag}"):
        raise UserError(f"{plain(path)}, which the run used, is not there: give --{flag} with its place today")
    return path


def _model_config(settings: TrainSettings) -> ModelConfig:
    base = settings.pretrained_model_path
    assert base is not None  # _path
    if settings.model_config is not None:
        return config_with_tokens(load_model_config(under_root(settings.model_config)), base)
    return detect_model_config(base, way_out="the run's train_args.yaml names no model_config")


def table(candidates: Sequence[Candidate], scores: Sequence[Score], chosen: int) -> list[str]:
    """Return the lines of the table. `*` is the best of a column, `=` what cannot be told apart from it."""
    header = ["", "checkpoint", "strength", *(score.label for score in scores)]
    alike = [set(score.alike(score.best)) for score in scores]
    rows = []
    for i, candidate in enumerate(candidates):
        marks = ["*" if i == score.best else "=" if i in same else " " for score, same in zip(scores, alike)]
        cells = [f"{_cell(score, i)} {mark}" for score, mark in zip(scores, marks)]
        rows.append([">" if i == chosen else "", candidate.checkpoint.label, f"{candidate.strength:g}", *cells])
    widths = [max(len(row[k]) for row in [header, *rows]) for k in range(len(header))]
    lines = []
    for row in [header, *rows]:
        left = [cell.ljust(width) for cell, width in zip(row[:2], widths)]
        lines.append("  ".join([*left, *(cell.rjust(width) for cell, width in zip(row[2:], widths[2:]))]).rstrip())
    return [*lines, "> chosen; * best; = cannot be told apart from the best; +- standard deviation (bootstrap)"]


def _cell(score: Score, candidate: int) -> str:
    std = score.std(candidate)
    value = f"{score.values[candidate] * score.factor:.{score.digits}f}"
    return value if std is None else f"{value} +- {std * score.factor:.{score.digits}f}"


def sentences(candidates: Sequence[Candidate], scores: Sequence[Score], resamples: int) -> list[str]:
    """Return a line for each score: its best candidate, and which cannot be told apart from it."""
    lines = []
    for score in scores if len(candidates) > 1 else ():
        alike = score.alike(score.best)
        same = f"cannot be told apart from {_names(candidates, alike)}" if alike else "differs from all others"
        how = "equal values" if score.samples is None else f"paired bootstrap, {resamples} samples"
        lines.append(f"{score.label}: best is {candidates[score.best].label}; it {same} ({how})")
    return lines


def _names(candidates: Sequence[Candidate], chosen: Sequence[int]) -> str:
    if len(chosen) == len(candidates) - 1:
        return "any other"
    named = [candidates[i].label for i in chosen[:MOST_NAMED]]
    more = [f"{len(chosen) - MOST_NAMED} more"] if len(chosen) > MOST_NAMED else []
    return ", ".join([*named, *more])


def verdict(candidates: Sequence[Candidate], rule: Score, chosen: int, scores: Sequence[Score]) -> str:
    """Return the sentences that name the chosen candidate, the rule, and what is as good."""
    candidate = candidates[chosen]
    if len(candidates) == 1:
        return f"chosen: {candidate.checkpoint.path} at strength {candidate.strength:g}, the only candidate"
    by = "highest" if rule.higher_is_better else "lowest"
    of = f" over {', '.join(score.label for score in scores)}" if rule.key == "mean_rank" else ""
    alike = rule.alike(chosen)
    same = (
        f" It cannot be told apart from {_names(candidates, alike)}: choose among these by the sheet."
        if alike
        else " It differs from all others."
    )
    return (
        f"chosen: {candidate.checkpoint.path} at strength {candidate.strength:g}, by the {by} {rule.label}{of} "
        f"(of equal ones the earliest step, then the first strength).{same}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    args = read_settings(Settings, argv, description=__doc__)
    set_up_logging("WARNING")
    choice = Choice(args)
    with claim_folder(choice.output, "--output_path"):
        choice.make()


if __name__ == "__main__":
    run_script(main)
