"""metrics.csv with one row for each step."""

from __future__ import annotations

import contextlib
import csv
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

from ldm.errors import system_reason
from ldm.files.atomic import atomic_path
from ldm.files.inputs import is_there, read_bytes
from ldm.files.paths import writing

logger = logging.getLogger(__name__)


class Metrics(NamedTuple):
    """One row of metrics.csv. The field names are its header."""

    step: int  # number of steps done
    loss: float
    learning_rate: float
    loss_scale: float
    seconds: float  # that this step took, or since the result of the step before if that was read late
    gradient_norm: float  # before clipping


class StepRows:
    """A CSV file whose rows begin with a step, flushed as it is written.

    Args:
        path: The file.
        header: Names of the columns.
        step: Number of steps that are done. Rows up to it are kept. Later rows are dropped: a killed run wrote them
            after its last training state.
    """

    def __init__(self, path: Path, header: Sequence[str], step: int):
        kept = []
        if step and is_there(path):
            # Not by the csv module, which may fail on what a crash leaves at the end of the file.
            text = read_bytes(path, "the metrics of this run").decode("utf-8", "replace")
            rows = [line.split(",") for line in text.splitlines()]
            kept = [row for row in rows if len(row) == len(header) and _is_step(row[0], step)]
        self.path = path
        with writing(path):
            with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([header, *kept])
            self.file: TextIO | None = open(path, "a", newline="", encoding="utf-8")
        self.writer = csv.writer(self.file)

    def write_row(self, step: int, values: Sequence[object]) -> None:
        """Write a row, its numbers with ten digits. If the disk refuses, warn once and write no more."""
        if self.file is None:
            return
        try:
            self.writer.writerow([step, *(f"{v:.10g}" if isinstance(v, (int, float)) else v for v in values)])
            self.file.flush()
        except OSError as error:
            logger.warning("%s cannot be written (%s): it ends before step %d", self.path, system_reason(error), step)
            self.close()

    def close(self) -> None:
        if self.file is not None:
            with contextlib.suppress(OSError):  # from a row that the disk refused before
                self.file.close()
            self.file = None


class MetricsFile(StepRows):
    """metrics.csv with one row for each step. See `StepRows`."""

    def __init__(self, path: Path, step: int):
        super().__init__(path, Metrics._fields, step)

    def write(self, metrics: Metrics) -> None:
        """Write a row."""
        self.write_row(metrics.step, metrics[1:])


def _is_step(text: str, last: int) -> bool:
    return text.isdecimal() and len(text) <= 12 and int(text) <= last
