"""What a run wrote into its output folder, read for a report. A file that is missing or damaged leaves its part empty.

The folder may be that of a run that was killed: the last row of a table may be cut off, and rows that are no numbers
are passed over.
"""

from __future__ import annotations

import io
import logging
import os
import re
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np

from ldm.errors import UserError
from ldm.files.documents import read_json, read_yaml
from ldm.files.inputs import is_file, is_folder, list_folder, read_bytes, read_text
from ldm.training.metrics_file import Metrics

logger = logging.getLogger(__name__)

FACTS = "run.json"
PARTS = ("validation", "samples")  # of a run that its settings turn on and off
MAX_TABLE = 1 << 30  # bytes of a table
MAX_STRIPS = 100  # prompts of a run that are looked at

FRAME = re.compile(r"step-([0-9]{8,12})\.png")  # the name of a sample image
_STRIP = re.compile(r"prompt-([0-9]{1,6})")


class Frame(NamedTuple):
    """A sample image."""

    step: int
    path: Path


class Strip(NamedTuple):
    """The sample images of a prompt, the oldest first."""

    name: str  # of its folder, such as "prompt-01"
    prompt: str  # the line of prompts.txt, "" if it is not known
    frames: list[Frame]
    whole: Optional[Path] = None  # the film strip as one image, which is shown where there are no frames


class ValidationLoss(NamedTuple):
    """The loss at fixed time steps and noise, of N validations."""

    steps: np.ndarray  # (N,) of the training
    mean: np.ndarray  # (N,)
    by_timestep: dict[int, np.ndarray]  # time step -> (N,)


@dataclass
class RunRecord:
    """A run as its output folder shows it.

    Args:
        folder: The output folder.
        settings: The values of train_args.yaml.
        metrics: Columns (N,) float64 of metrics.csv by name, in the order of the steps.
        validation: The loss of images that were held out ("validation") and of images that are trained ("training").
        best: Step and loss of the best validation.
        strips: The sample images.
        facts: What run.json says of data, model, environment and time.
        faults: What could not be read.
    """

    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, np.ndarray] = field(default_factory=dict)
    validation: dict[str, ValidationLoss] = field(default_factory=dict)
    best: Optional[tuple[int, float]] = None
    strips: list[Strip] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The name of the output folder."""
        return self.folder.name or os.path.basename(os.path.realpath(self.folder)) or "run"

    @property
    def steps(self) -> np.ndarray:
        """The steps (N,) int64 of metrics.csv."""
        return self.metrics["step"].astype(np.int64) if "step" in self.metrics else np.zeros(0, np.int64)

    def section(self, name: str) -> dict[str, Any]:
        """Return a part of the facts, empty if there is none."""
        part = self.facts.get(name)
        return part if isinstance(part, dict) else {}

    @property
    def parts(self) -> list[str]:
        """Which of PARTS the run writes, all if run.json does not say. Others in the folder are of an earlier run."""
        found = self.facts.get("parts")
        return [part for part in PARTS if not isinstance(found, list) or part in found]

    @property
    def sessions(self) -> list[dict[str, Any]]:
        """The starts of the run: the first one and each resume."""
        found = self.facts.get("sessions")
        return [session for session in found if isinstance(session, dict)] if isinstance(found, list) else []


def read_facts(folder: Path) -> RunRecord:
    """Read run.json alone. The facts are empty if it cannot be read."""
    record = RunRecord(folder)
    record.facts = _mapping(record, FACTS, read_json)
    return record


def read_record(folder: Path) -> RunRecord:
    """Read the output folder of a run. Raises UserError if it is no folder or may not be read."""
    list_folder(folder, "the output folder")
    record = read_facts(folder)
    record.settings = _mapping(record, "train_args.yaml", read_yaml)
    record.metrics = _read(record, "metrics.csv", read_metrics, {})
    if "validation" in record.parts:
        record.validation = _read(record, "validation.csv", read_validation, {})
        record.best = _best(record)
    if "samples" in record.parts:
        record.strips = _read(record, "samples", read_strips, [])
    return record


def read_metrics(path: Path) -> dict[str, np.ndarray]:
    """Return the columns (N,) float64 of metrics.csv by name. Of rows with the same step, the last one counts."""
    rows = _table(path)
    header = next(rows, [])
    names = [name for name in Metrics._fields if name in header]
    if "step" not in names:
        return {}
    places, values = [header.index(name) for name in names], array("d")  # 48 bytes for a row, a list has 250
    for row in rows:
        if (numbers := _numbers(row, places, len(header))) is not None:
            values.extend(numbers)
    table = _by_step(np.array(values).reshape(-1, len(names)), names.index("step"))
    return {name: table[:, column] for column, name in enumerate(names)}


def read_validation(path: Path) -> dict[str, ValidationLoss]:
    """Return the losses in validation.csv by the images that they are of."""
    rows = _table(path)
    header = next(rows, [])
    if not {"step", "images", "loss"} <= set(header):
        return {}
    timesteps = {
        int(match[1]): place for place, name in enumerate(header) if (match := re.fullmatch(r"loss_([0-9]{1,6})", name))
    }
    places = [header.index("step"), header.index("loss"), *timesteps.values()]
    values: dict[str, list[list[float]]] = {}
    for row in rows:
        numbers = _numbers(row, places, len(header))
        if numbers is not None:
            values.setdefault(row[header.index("images")], []).append(numbers)
    losses = {}
    for images in ("validation", "training"):
        if images in values:
            table = _by_step(np.array(values[images], np.float64), 0)
            columns = {timestep: table[:, 2 + number] for number, timestep in enumerate(timesteps)}
            losses[images] = ValidationLoss(table[:, 0].astype(np.int64), table[:, 1], columns)
    return losses


def read_strips(folder: Path) -> list[Strip]:
    """Return the sample images of a folder `samples`, by prompt."""
    if not is_folder(folder):
        return []
    prompts = _prompts(folder / "prompts.txt")
    names = list_folder(folder)
    numbers = sorted({int(match[1]): match[0] for name in names if (match := _STRIP.match(name))}.items())
    strips = []
    for number, name in numbers[:MAX_STRIPS]:
        frames: list[Frame] = []
        if is_folder(folder / name):
            found = (FRAME.fullmatch(entry) for entry in list_folder(folder / name))
            frames = [Frame(int(match[1]), folder / name / match[0]) for match in found if match]
        whole = folder / f"{name}.png"
        strip = Strip(name, prompts.get(number, ""), sorted(frames), whole if is_file(whole) else None)
        if strip.frames or strip.whole:
            strips.append(strip)
    return strips


def _prompts(path: Path) -> dict[int, str]:
    """Return the lines of prompts.txt by their number, from 1. Each is a prompt: the run wrote the file itself."""
    return dict(enumerate(read_text(path).split("\n"), 1)) if is_file(path) else {}


def _best(record: RunRecord) -> Optional[tuple[int, float]]:
    """Return step and loss of the best validation: those of best.json, or the least of validation.csv."""
    best = _mapping(record, "ckpt/best.json", read_json)
    step, loss = best.get("step"), best.get("loss")
    if isinstance(step, int) and isinstance(loss, (int, float)):
        return step, float(loss)
    losses = record.validation.get("validation")
    if losses is None or not np.isfinite(losses.mean).any():
        return None
    place = int(np.nanargmin(np.where(np.isfinite(losses.mean), losses.mean, np.nan)))
    return int(losses.steps[place]), float(losses.mean[place])


def _read(record: RunRecord, name: str, read: Callable[[Path], Any], empty: Any) -> Any:
    """Return what `read` makes of a file or folder of the run, `empty` if it is missing or cannot be read."""
    path = record.folder / name
    try:
        return read(path) if os.path.lexists(path) else empty
    except UserError as error:
        record.faults.append(str(error).replace(str(path), name))
        return empty


def _mapping(record: RunRecord, name: str, read: Callable[[Path], Any]) -> dict[str, Any]:
    content = _read(record, name, read, {})
    return {str(key): value for key, value in content.items()} if isinstance(content, Mapping) else {}


def _table(path: Path) -> Iterator[list[str]]:
    """Yield the rows of a CSV without quoted fields, each as its fields. A crash may leave anything at its end."""
    for line in io.BytesIO(read_bytes(path, most=MAX_TABLE)):
        if text := line.decode("utf-8", "replace").rstrip("\r\n"):
            yield text.split(",")


def _numbers(row: list[str], places: list[int], length: int) -> Optional[list[float]]:
    """Return the numbers at these places of a row, None if it is cut off or damaged. The first must be a whole one."""
    if len(row) != length or not (row[places[0]].isascii() and row[places[0]].isdigit() and len(row[places[0]]) <= 12):
        return None
    try:
        return [float(row[place]) for place in places]
    except ValueError:
        return None


def _by_step(table: np.ndarray, column: int) -> np.ndarray:
    """Return the rows in the order of their steps, the last of each."""
    _, last = np.unique(table[::-1, column], return_index=True)
    return table[len(table) - 1 - last]


def smoothed(values: np.ndarray, span: int) -> np.ndarray:
    """Return the mean (N,) of each value and those before it, weighted by (1 - 1 / span) for each step back.

    Values that are not finite, those of steps that overflowed, do not count.
    """
    weight = 1.0 - 1.0 / max(1, span)
    means, total, weights = np.full(len(values), np.nan), 0.0, 0.0
    for place, value in enumerate(_plain(values)):
        if np.isfinite(value):
            total, weights = weight * total + value, weight * weights + 1.0
        if weights:
            means[place] = total / weights
    return means


def _plain(values: np.ndarray) -> Iterator[float]:
    return iter(values.tolist())


def smoothing_span(steps: int) -> int:
    """Return over how many steps the loss is averaged: 50 as in the log, and more in runs of more than 2,000 steps."""
    return max(50, steps // 40)


def overflows(metrics: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return which steps (N,) bool overflowed: gradients are not finite, or the loss scale is smaller afterwards."""
    count = len(metrics.get("step", ()))
    found = np.zeros(count, bool)
    if "gradient_norm" in metrics:
        found |= ~np.isfinite(metrics["gradient_norm"])
    if "loss_scale" in metrics and count > 1:
        found[:-1] |= metrics["loss_scale"][1:] < metrics["loss_scale"][:-1]
    return found
