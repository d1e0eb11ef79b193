"""metrics.csv, one row a step."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

from ldm.atomic import atomic_path
from ldm.paths import writing

LOG_EVERY = 50  # steps between two lines of log.txt


class Metrics(NamedTuple):
    """One row of metrics.csv; the names are its header."""

    step: int  # updates done
    loss: float
    learning_rate: float
    loss_scale: float
    seconds: float  # of this step
    gradient_norm: float  # before clipping


class MetricsFile:
    """metrics.csv, one row a step, flushed as it is written.

    Opening it keeps the rows up to `step` and drops those after it, which a killed run wrote beyond its last state.
    """

    def __init__(self, path: Path, step: int):
        kept = []
        if step and path.exists():
            # by hand: csv and int would fail on what a crash may leave at its end
            rows = [line.split(",") for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
            kept = [
                row for row in rows if len(row) == len(Metrics._fields) and row[0].isdecimal() and int(row[0]) <= step
            ]
        self.path = path
        with writing(path):
            with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([Metrics._fields, *kept])
            self.file = open(path, "a", newline="", encoding="utf-8")
        self.writer = csv.writer(self.file)

    def write(self, metrics: Metrics) -> None:
        with writing(self.path):
            self.writer.writerow([metrics.step, *(f"{value:.10g}" for value in metrics[1:])])
            self.file.flush()

    def close(self) -> None:
        self.file.close()
