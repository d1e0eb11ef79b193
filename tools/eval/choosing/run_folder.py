"""What a run left in its output folder: settings, checkpoints, validation losses; and its held-out images."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np

from ldm.data.captions import longest_caption
from ldm.data.preparation import prepare_data, read_listing
from ldm.data.training_data import TrainingData
from ldm.errors import UserError, plain
from ldm.files.inputs import content_hash, is_file, is_folder, is_there, list_folder, read_text
from ldm.settings.model import ModelConfig
from ldm.settings.read import read_settings
from ldm.settings.train import TrainSettings
from ldm.training.own_files import parse_name
from tools.grid import evenly

MAX_REFERENCES = 200  # real images that the drawn ones are compared with; more change the scores by less than their std
ENOUGH_HELD_OUT = 8  # with fewer held-out images, the training images are the real ones


class Checkpoint(NamedTuple):
    """A LoRA that a run saved."""

    label: str
    path: Path
    step: Optional[int]  # None for a lora.ckpt that is none of the numbered ones
    sha256: str


class Material(NamedTuple):
    """What the images of a run are drawn from and compared with.

    Attributes:
        prompts: The held-out prompts.
        data: The data set of the real images.
        rows: Their rows in it.
        paired: Whether the first of them are those of the prompts, in their order.
        origin: What the real images are, for the report.
    """

    prompts: list[str]
    data: TrainingData
    rows: list[int]
    paired: bool
    origin: str


def read_run(run: Path) -> TrainSettings:
    """Return the settings of a run that trained a LoRA.

    Raises:
        UserError: The folder is not that of a run, or it trained the whole UNet.
    """
    if not is_folder(run, "--run"):
        raise UserError(f"--run {plain(run)} is no folder: give the output_path of a training")
    args = run / "train_args.yaml"
    if not is_file(args):
        raise UserError(
            f"--run {plain(run)} holds no train_args.yaml, which every training writes: give the output_path of a "
            "training, the folder with ckpt/ in it"
        )
    settings = read_settings(TrainSettings, ["--train_config", str(args)], yaml_flag="train_config")
    if not settings.use_lora:
        raise UserError(f"--run {plain(run)} trained the whole UNet: this tool compares LoRAs and their strengths")
    return settings


def find_checkpoints(run: Path, steps: Sequence[int] | None = None) -> list[Checkpoint]:
    """Return the different LoRAs of a run, by step. lora.ckpt and best.ckpt count where they are no numbered one.

    Args:
        run: The folder of the run.
        steps: Those after these steps alone. None: all of them.

    Raises:
        UserError: There is none, or none after one of `steps`.
    """
    folder = run / "ckpt"
    names = list_folder(folder) if is_folder(folder) else []
    numbered = [number for name in names if (number := parse_name(name)) is not None and number.kind == "lora"]
    found = {}
    for number in sorted(numbered, key=lambda number: number.step):
        path = folder / number.name
        found[content_hash(path)] = Checkpoint(f"step {number.step}", path, number.step, "")
    for name, step in (("best.ckpt", _best_step(run)), ("lora.ckpt", None)):
        if name in names and (digest := content_hash(folder / name)) not in found:
            label = name if step is None else f"{name} (step {step})"
            found[digest] = Checkpoint(label, folder / name, step, "")
    checkpoints = [checkpoint._replace(sha256=digest) for digest, checkpoint in found.items()]
    if not checkpoints:
        raise UserError(
            f"{plain(folder)} holds no LoRA (lora-<step>.ckpt or lora.ckpt): train until the first checkpoint is saved"
        )
    if steps is not None:
        known = [checkpoint.step for checkpoint in checkpoints if checkpoint.step is not None]
        for step in steps:
            if step not in known:
                raise UserError(
                    f"--steps {step}: {plain(folder)} holds no checkpoint of that step, but of "
                    f"{', '.join(map(str, sorted(known))) or 'none that is known'}"
                )
        checkpoints = [checkpoint for checkpoint in checkpoints if checkpoint.step in steps]
    last = math.inf
    return sorted(checkpoints, key=lambda checkpoint: last if checkpoint.step is None else checkpoint.step)


def _best_step(run: Path) -> int | None:
    """Return the step that best.json gives for best.ckpt, None where it is missing or says something else."""
    try:
        step = json.loads((run / "ckpt" / "best.json").read_text(encoding="utf-8"))["step"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return step if type(step) is int else None


def validation_losses(run: Path) -> dict[int, float]:
    """Return the loss on held-out images by step, from a run's validation.csv. It is empty where there is no such file.

    Raises:
        UserError: The file has other columns.
    """
    path = run / "validation.csv"
    if not is_file(path):
        return {}
    rows = csv.DictReader(io.StringIO(read_text(path, "validation.csv")))
    missing = [name for name in ("step", "images", "loss") if name not in (rows.fieldnames or ())]
    if missing:
        raise UserError(f"{plain(path)} has no column {missing[0]}: it is no validation.csv of a training; rename it")
    losses = {}
    for row in rows:
        if row["images"] == "validation":
            try:
                losses[int(row["step"])] = float(row["loss"])
            except (TypeError, ValueError):  # a line that a killed run left half-written
                continue
    return losses


def read_material(
    settings: TrainSettings,
    config: ModelConfig,
    record: Path,
    *,
    prompts: Sequence[str] | None,
    held_out: str | None,
    count: int,
) -> Material:
    """Return the held-out prompts of a run and the real images to compare with.

    Held-out images are those of `held_out`, those that the run itself held out, or those in test/ in its data set, or
    beside its train/, in this order. Where there are fewer than ENOUGH_HELD_OUT, the training images are the real ones.

    Args:
        settings: Those of the run.
        config: Of its model.
        record: File that remembers which images decode.
        prompts: Prompts to draw, None for the captions of held-out images.
        held_out: A data set of held-out images, None for those of the run.
        count: The most prompts, evenly spread.

    Raises:
        UserError: The data cannot be read, or there are neither prompts nor held-out images.
    """
    # Class images are drawn for a training alone.
    settings = replace(settings, with_prior_preservation=False, class_prompt=None)
    own = settings.validation_split or settings.validation_data_path
    if held_out is None and not own:
        held_out = _test_folder(Path(settings.data_path or ""))
    if held_out is not None:
        settings = replace(settings, validation_data_path=held_out)
    training, validation = prepare_data(read_listing(settings), settings, config, record)
    rows: list[int] = []
    paired = False
    if prompts is None:
        if validation is None:
            raise UserError(
                "the run held out no images (validation_split, validation_data_path), and its data set has no test/: "
                "give --prompts, a file with one prompt a line, or --held_out, a data set that it has not seen"
            )
        captions = {_caption(validation, row): row for row in reversed(range(len(validation)))}
        captions.pop("", None)
        if not captions:
            raise UserError("no held-out image has a caption: give --prompts, a file with one prompt a line")
        of_prompts = sorted(captions.items(), key=lambda item: item[1])
        chosen = [of_prompts[i] for i in evenly(len(of_prompts), count)]
        prompts, rows, paired = [caption for caption, _ in chosen], [row for _, row in chosen], True
    else:
        prompts = [prompts[i] for i in evenly(len(prompts), count)]
    if validation is not None and len(validation) >= ENOUGH_HELD_OUT:
        data, origin = validation, "held-out images"
    else:
        # The prompts keep their captions, but the few held-out images are not compared with.
        data, origin, rows, paired = training, "training images", [], False
    others = [row for row in range(len(data)) if row not in set(rows) and not data.is_class_image(row)]
    rows += [others[i] for i in evenly(len(others), max(0, MAX_REFERENCES - len(rows)))] if others else []
    return Material(list(prompts), data, rows, paired, origin)


def _caption(data: TrainingData, row: int) -> str:
    """Return a row's caption with prefix and suffix, with all tags and without random changes."""
    return longest_caption(data.text(row), data.rules[data.rows[row].subset].captions, len)


def _test_folder(data: Path) -> str | None:
    """Return the folder test/ in a data set, or beside its train/, as this project's data sets have it."""
    folder = data.parent / "test" if data.name == "train" else data / "test"
    return str(folder) if is_there(folder / "img_txt.csv") else None


def reference_content(material: Material) -> list[str]:
    """Return what tells the real images from others, for the record beside them."""
    return [f"{material.data.content(row)} {material.data.buckets.size(row)}" for row in material.rows]


def reference_pixels(material: Material, row: int) -> np.ndarray:
    """Return a real image as it is trained, cropped, (H, W, C) uint8."""
    return np.round((material.data.image(row) + 1.0) * 127.5).astype(np.uint8).transpose(1, 2, 0)
