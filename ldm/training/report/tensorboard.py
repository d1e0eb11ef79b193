"""TensorBoard's event files, in `{output_path}/tensorboard`, with the tags of kohya's sd-scripts.

tensorboardX writes them. It needs no TensorFlow, and is installed by the user. Validation and samples are taken from
the files that the run writes.

Its SummaryWriter is not used: its thread ends when the disk refuses, and the queue before that thread then blocks the
training, or the end of the process, for ever. Events are written by the thread that adds them, 0.1 ms for a step.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import threading
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.errors import UserError, plain, system_reason
from ldm.files.atomic import atomic_path
from ldm.files.documents import read_json
from ldm.files.inputs import is_file, open_file
from ldm.files.paths import writing
from ldm.training.metrics_file import Metrics
from ldm.training.plan import completes_interval
from ldm.training.report.records import PARTS, Frame, read_strips, read_validation

logger = logging.getLogger(__name__)

FOLDER = "tensorboard"
WRITTEN = "written.json"  # beside the event files, which TensorBoard does not read
INSTALL = "pip install tensorboardX"


def check_tensorboard(report_to: list[str]) -> None:
    """Raise UserError if TensorBoard is asked for and tensorboardX is not installed."""
    if "tensorboard" in report_to and importlib.util.find_spec("tensorboardX") is None:
        raise UserError(f"report_to tensorboard needs tensorboardX: {INSTALL}, or leave tensorboard out")


class TensorBoard:
    """Writes event files. If the disk refuses, it warns once and writes no more.

    `written.json` holds the step up to which the validations and each prompt's samples are written. A resumed run adds
    all later ones, also those before its training state, which a kill may have left out.

    Args:
        output: The output folder of the run.
        step: Number of steps that are done. TensorBoard hides what an earlier start wrote beyond it.
        rates: Tag -> factor of the logged learning rate, such as {"lr/unet": 1.0}.
        steps_per_epoch: Of the run.
        parts: Which of PARTS the run writes.

    Raises:
        UserError: The files cannot be made.
    """

    def __init__(
        self,
        output: Path,
        step: int,
        rates: Mapping[str, float],
        steps_per_epoch: float,
        parts: Collection[str] = PARTS,
    ):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        self.output, self.rates, self.steps_per_epoch, self.parts = output, rates, steps_per_epoch, parts
        self._written = _read_written(output / FOLDER / WRITTEN, step)
        self._lock = threading.Lock()  # an interrupt closes the file in another thread
        with writing(output / FOLDER):
            (output / FOLDER).mkdir(parents=True, exist_ok=True)
            # The step tells apart two starts in the same second.
            self._events: Any = EventsWriter(str(output / FOLDER / "events"), f".{step}")
        self._write(step + 1 if step else 0, session_log=SessionLog(status=SessionLog.START))

    def add(self, metrics: Metrics, mean_loss: float) -> None:
        """Add a step."""
        values = {
            "loss/current": metrics.loss,
            "loss/average": mean_loss,
            "norm/gradient": metrics.gradient_norm,
            "loss_scale": metrics.loss_scale,
            "seconds_per_step": metrics.seconds,
            **{tag: metrics.learning_rate * factor for tag, factor in self.rates.items()},
        }
        for tag, value in values.items():
            self._add_scalar(tag, value, metrics.step)

    def update(self) -> None:
        """Add the validations and samples that are new, and write what is waiting.

        Raises:
            UserError: A file of the run cannot be read.
        """
        if self._events is None:
            return
        if "validation" in self.parts:
            self._add_validations()
        if "samples" in self.parts:
            self._add_samples()
        self._flush()

    def close(self) -> None:
        """End. `update` has written what was waiting."""
        with self._lock:
            events, self._events = self._events, None
            if events is not None:
                try:
                    events.close()
                except OSError as error:
                    self._warn(error)

    def _add_validations(self) -> None:
        path = self.output / "validation.csv"
        found = read_validation(path) if is_file(path) else {}
        for images, losses in found.items():
            prefix = "loss/validation" if images == "validation" else "loss/validation_training"
            for place in np.flatnonzero(losses.steps > self._written.get(images, -1)).tolist():
                step = int(losses.steps[place])
                self._add_scalar(f"{prefix}/step_average", losses.mean[place], step)
                if completes_interval(step, self.steps_per_epoch):
                    self._add_scalar(f"{prefix}/epoch_average", losses.mean[place], step)
                for timestep, values in losses.by_timestep.items():
                    self._add_scalar(f"{prefix}/timestep_{timestep}", values[place], step)
                self._written[images] = step

    def _add_samples(self) -> None:
        for strip in read_strips(self.output / "samples"):
            for frame in strip.frames:
                if frame.step > self._written.get(strip.name, -1):
                    self._add_image(f"samples/{strip.name}", frame)
                    self._written[strip.name] = frame.step

    def _add_image(self, tag: str, frame: Frame) -> None:
        """Add a sample image. One that cannot be read is left out, with a warning."""
        from tensorboardX.summary import image as summary_of_image

        try:
            with open_file(frame.path) as file, Image.open(file, formats=("PNG",)) as image:
                pixels = np.asarray(image.convert("RGB"))
        except (UserError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            logger.warning("%s is not in TensorBoard's events: %s", frame.path, plain(error))
            return
        self._write(frame.step, summary=summary_of_image(tag, pixels, dataformats="HWC"))

    def _add_scalar(self, tag: str, value: float, step: int) -> None:
        """Add a value, unless it is not finite."""
        from tensorboardX.summary import scalar

        if math.isfinite(value):
            self._write(step, summary=scalar(tag, float(value)))

    def _write(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        with self._lock:
            if self._events is not None:
                try:
                    self._events.write_event(Event(step=step, wall_time=time.time(), **content))
                except OSError as error:
                    self._give_up(error)

    def _flush(self) -> None:
        with self._lock:
            if self._events is not None:
                try:
                    self._events.flush()
                    with atomic_path(self.output / FOLDER / WRITTEN, sync=False) as temporary:
                        temporary.write_text(json.dumps(self._written) + "\n", encoding="utf-8")
                except OSError as error:
                    self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """Warn, and write no more events. The file is not closed: that would write again."""
        self._events = None
        self._warn(error)

    def _warn(self, error: OSError) -> None:
        logger.warning(
            "%s cannot be written (%s): the training goes on without TensorBoard's events",
            self.output / FOLDER, system_reason(error),
        )  # fmt: skip


def _read_written(path: Path, step: int) -> dict[str, int]:
    """Return up to which step a run that continues after `step` has written, nothing for a new run."""
    try:
        content = read_json(path) if step and is_file(path) else None
    except UserError:  # it is damaged: events that are written twice do no harm
        content = None
    if not isinstance(content, dict):
        return {}
    return {name: min(last, step) for name, last in content.items() if type(last) is int}
