"""TensorBoard's event files, in `{output_path}/tensorboard`, with the tags of kohya's sd-scripts.

tensorboardX writes them. It needs no TensorFlow, and is installed by the user. Validation and samples are taken from
the files that the run writes.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.errors import UserError
from ldm.files.inputs import is_file
from ldm.files.paths import writing
from ldm.training.metrics_file import Metrics
from ldm.training.report.records import read_strips, read_validation

logger = logging.getLogger(__name__)

FOLDER = "tensorboard"
INSTALL = "pip install tensorboardX"


def check_tensorboard(report_to: list[str]) -> None:
    """Raise UserError if TensorBoard is asked for and tensorboardX is not installed."""
    if "tensorboard" in report_to and importlib.util.find_spec("tensorboardX") is None:
        raise UserError(f"report_to tensorboard needs tensorboardX: {INSTALL}, or leave tensorboard out")


class TensorBoard:
    """Writes event files.

    Args:
        output: The output folder of the run.
        step: Number of steps that are done. TensorBoard hides what an earlier start wrote beyond it.
        rates: Tag -> factor of the logged learning rate, such as {"lr/unet": 1.0}.
        steps_per_epoch: Of the run.
    """

    def __init__(self, output: Path, step: int, rates: Mapping[str, float], steps_per_epoch: float):
        from tensorboardX import SummaryWriter

        self.output, self.rates, self.steps_per_epoch = output, rates, steps_per_epoch
        self._validated = self._sampled = step or -1  # steps up to which they are written
        with writing(output / FOLDER):
            self._writer: Any = SummaryWriter(str(output / FOLDER), purge_step=step + 1 if step else None)

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
            if math.isfinite(value):
                self._writer.add_scalar(tag, value, metrics.step)

    def update(self) -> None:
        """Add the validations and samples that are new, and write what is waiting."""
        self._add_validations()
        self._add_samples()
        self._writer.flush()

    def close(self) -> None:
        """Write what is waiting, and end."""
        self._writer.close()

    def _add_validations(self) -> None:
        path = self.output / "validation.csv"
        found = read_validation(path) if is_file(path) else {}
        newest = self._validated
        for images, losses in found.items():
            prefix = "loss/validation" if images == "validation" else "loss/validation_training"
            for place in np.flatnonzero(losses.steps > self._validated).tolist():
                step = int(losses.steps[place])
                newest = max(newest, step)
                self._writer.add_scalar(f"{prefix}/step_average", losses.mean[place], step)
                if int(step / self.steps_per_epoch + 1e-9) > int((step - 1) / self.steps_per_epoch + 1e-9):
                    self._writer.add_scalar(f"{prefix}/epoch_average", losses.mean[place], step)
                for timestep, values in losses.by_timestep.items():
                    self._writer.add_scalar(f"{prefix}/timestep_{timestep}", values[place], step)
        self._validated = newest

    def _add_samples(self) -> None:
        newest = self._sampled
        for strip in read_strips(self.output / "samples"):
            for frame in strip.frames:
                if frame.step > self._sampled:
                    newest = max(newest, frame.step)
                    with Image.open(frame.path) as image:
                        pixels = np.asarray(image.convert("RGB"))
                    self._writer.add_image(f"samples/{strip.name}", pixels, frame.step, dataformats="HWC")
        self._sampled = newest
