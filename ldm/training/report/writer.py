"""The part of the training loop that writes report.html, run.json and TensorBoard's events."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Optional

from ldm.errors import UserError, system_reason
from ldm.files.atomic import atomic_path
from ldm.files.documents import json_text
from ldm.files.inputs import is_file, open_file
from ldm.files.paths import writing
from ldm.runtime.script import at_interrupt, was_interrupted
from ldm.training.metrics_file import Metrics
from ldm.training.own_files import make_room
from ldm.training.rates import STARTS_AT_ZERO
from ldm.training.report.facts import begin_session, describe_run, device_peak_memory, now, peak_memory
from ldm.training.report.page import GENERATOR, report_page
from ldm.training.report.records import FACTS, PARTS, RunRecord, read_facts, read_record
from ldm.training.report.tensorboard import TensorBoard
from ldm.weights.names import COMPONENTS

if TYPE_CHECKING:
    from ldm.training.setup import Run

logger = logging.getLogger(__name__)

PAGE = "report.html"
SHARE = 0.02  # of the training's time that reports before the last one may take
MOST_SESSIONS = 100  # starts that run.json keeps


class Reports:
    """Writes what report_to names, as a context around the loop: at its end, however it ends, the last report.

    Only the first process writes. An error of the disk is a warning, and the training goes on.

    Args:
        run: The run.
    """

    def __init__(self, run: Run):
        self.run, self.output = run, run.output
        self.session: dict[str, Any] = begin_session(run.status.steps_done)
        self.facts: dict[str, Any] = {}
        self.tensorboard: Optional[TensorBoard] = None
        self._began = time.perf_counter()
        self._next = 0.0  # time.perf_counter() from which another report may be written
        self._warned = False
        self._writing, self._has_ended = threading.Lock(), False

    def __enter__(self) -> Reports:
        if not self.run.is_first_process:
            return self
        steps_done = self.run.status.steps_done
        self.facts = describe_run(self.run)
        self.facts["sessions"] = [self.session]
        if steps_done:
            self._continue(read_facts(self.output))
        else:
            self._set_aside()
        if "tensorboard" in self.run.settings.report_to:
            self.tensorboard = TensorBoard(
                self.output, steps_done, self._rates(), self.run.plan.steps_per_epoch, self.facts["parts"]
            )
        with self._warning():
            self._write_facts()  # a run that is killed before its first report does not seem to be an earlier one
        # The main thread may be in a step that takes longer than an interrupted script waits.
        at_interrupt(lambda: self._write("interrupted"))
        return self

    def _continue(self, earlier: RunRecord) -> None:
        """Add what run.json says of the starts before this one, and of what they wrote."""
        for session in earlier.sessions:
            if session.get("ended") == "running":
                session["ended"] = "killed"
        self.facts["sessions"] = [*earlier.sessions[-MOST_SESSIONS + 1 :], self.session]
        self.facts["parts"] = [part for part in PARTS if part in (*earlier.parts, *self.facts["parts"])]

    def _set_aside(self) -> None:
        """Rename files in the place of this run's that no run wrote. Raises UserError if that is not possible."""
        for path, is_own in ((self.output / FACTS, _is_facts), (self.output / PAGE, _is_report)):
            is_written = path.name == FACTS or "html" in self.run.settings.report_to
            if is_written and is_file(path) and not is_own(path):
                with writing(path):
                    make_room(path)

    def add(self, metrics: Metrics, mean_loss: float) -> None:
        """Take a row of metrics.csv, and the mean loss that the log shows."""
        if self.session["first_step_seconds"] is None:
            self.session["first_step_seconds"] = metrics.seconds
        self.session["last_step"] = metrics.step
        if self.tensorboard is not None:
            self.tensorboard.add(metrics, mean_loss)

    def update(self) -> None:
        """Write the report of a run that goes on, unless that would take more than SHARE of its time."""
        run = self.run
        if run.is_first_process and run.status.steps_done < run.plan.steps and time.perf_counter() >= self._next:
            self._write("running")

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        if not self.run.is_first_process:
            return
        if error is None:
            ended = "finished"
        elif was_interrupted() or not isinstance(error, Exception):  # MindSpore raises others than KeyboardInterrupt
            ended = "interrupted"
        else:
            ended = "failed"
            self.session["error"] = str(error) if isinstance(error, UserError) else type(error).__name__
        self._write(ended)
        at_interrupt(None)

    def _write(self, ended: str) -> None:
        """Write the files, unless the last ones are written already."""
        with self._writing:
            if not self._has_ended:
                self._write_files(ended)
                self._has_ended = ended != "running"  # not before, as a signal may interrupt the writing

    def _write_files(self, ended: str) -> None:
        began = time.perf_counter()
        self.session.update(
            ended=ended,
            seconds=began - self._began,
            peak_memory=peak_memory(),
            device_peak_memory=device_peak_memory(self.run.runtime.is_ascend),
            written=now(),
        )
        with self._warning():
            self._write_facts()
            if "html" in self.run.settings.report_to:
                write_report(self.output)
        if self.tensorboard is not None:
            with self._warning():
                self.tensorboard.update()
            if ended != "running":
                self.tensorboard.close()
        took = time.perf_counter() - began
        self._next = time.perf_counter() + took / SHARE
        logger.debug("the report took %.0f ms", 1000 * took)

    def _write_facts(self) -> None:
        _write_text(self.output / FACTS, json_text(self.facts, indent=1) + "\n")

    @contextlib.contextmanager
    def _warning(self) -> Iterator[None]:
        """Make a warning, the first time, of an error in the block."""
        try:
            yield
        except (UserError, OSError) as error:
            if not self._warned:
                reason = error if isinstance(error, UserError) else system_reason(error)
                logger.warning("the report cannot be written (%s): the training goes on without it", reason)
            self._warned = True

    def _rates(self) -> dict[str, float]:
        """Return the learning rate of each network that is trained, as a factor of the one that is logged."""
        rates = self.run.rates
        tags: dict[str, float] = {}
        for name, factor in rates.factors.items():
            tag = "lr/textencoder" if name.startswith(COMPONENTS["text_encoder"]) else "lr/unet"
            if not name.endswith(STARTS_AT_ZERO):  # whose rate LoRA+ makes larger
                tags.setdefault(tag, factor * rates.largest / rates.shown)
        return tags


def write_report(output: Path, page: Optional[Path] = None) -> None:
    """Write the report of the run in `output`. Raises UserError if it cannot be written."""
    _write_text(output / PAGE if page is None else page, report_page(read_record(output)))


def _is_facts(path: Path) -> bool:
    """Whether a run wrote this run.json."""
    return "sessions" in read_facts(path.parent).facts


def _is_report(path: Path) -> bool:
    """Whether a run wrote this page."""
    try:
        with open_file(path) as file:
            return f'name="generator" content="{GENERATOR}"'.encode() in file.read(4096)
    except (UserError, OSError):
        return False


def _write_text(path: Path, text: str) -> None:
    with writing(path), atomic_path(path, sync=False) as temporary:
        temporary.write_text(text, encoding="utf-8")
