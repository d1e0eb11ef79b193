"""What a run tells: log.txt, metrics.csv, a progress bar."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

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


class _TqdmHandler(logging.StreamHandler):
    """Writes above the progress bar, not through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=self.stream)


def set_up_logging(log_file: Path | None, level: str) -> None:
    """Send the project's log to standard error and, where given, to the end of `log_file`."""
    root = logging.getLogger("ldm")
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)
    screen = _TqdmHandler()
    screen.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    root.addHandler(screen)
    if log_file is not None:
        with writing(log_file):
            log_file.parent.mkdir(parents=True, exist_ok=True)
            file = logging.FileHandler(log_file, encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        root.addHandler(file)


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
