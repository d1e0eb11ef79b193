"""What was measured of the validation loss: its file, its form in a training state, and the summary at the end."""

from __future__ import annotations

import base64
import logging
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ldm.files.inputs import is_there, read_bytes
from ldm.files.paths import writing
from ldm.training.metrics_file import StepRows
from ldm.training.own_files import free_name, make_room

logger = logging.getLogger(__name__)

_FILE = "validation.csv"
# Student's t: a mean is this many standard errors from 0 by chance in 5 of 100 cases, for 1, 2, ... degrees of freedom.
_STUDENT_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)


class Measured(NamedTuple):
    """What was measured at a step. `losses` are float32 (images,), each the mean over the time steps."""

    step: int
    loss: float  # mean of the held-out images and time steps
    training_loss: float  # that of the training images
    losses: np.ndarray  # of the held-out images

    def content(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        losses = base64.b64encode(self.losses.astype("<f4").tobytes()).decode("ascii")
        return {**self._asdict(), "losses": losses}

    @classmethod
    def parse(cls, content: Any) -> Measured | None:
        """Return what `content` was made from, or None if it was made from nothing that can be used."""
        try:
            raw = base64.b64decode(content["losses"], validate=True)
            losses = np.frombuffer(raw, "<f4").astype(np.float32)
            step, loss, training_loss = content["step"], float(content["loss"]), float(content["training_loss"])
        except (KeyError, TypeError, ValueError):
            return None
        is_step = type(step) is int and 0 <= step < 10**12
        return cls(step, loss, training_loss, losses) if is_step and math.isfinite(loss) else None


def open_validation_file(output: Path, timesteps: Sequence[int], step: int) -> StepRows:
    """Open validation.csv in the folder of a run of which `step` steps are done, and return it."""
    path = output / _FILE
    header = ["step", "images", "loss", *(f"loss_{timestep}" for timestep in timesteps)]
    _set_aside_other_columns(path, header, step)
    return StepRows(path, header, step)


def _set_aside_other_columns(path: Path, header: Sequence[str], step: int) -> None:
    """Rename a file that no run wrote, or that of a run which is resumed with other time steps."""
    if not is_there(path):
        return
    found = read_bytes(path).partition(b"\n")[0].strip()
    is_of_a_run = found.startswith(b"step,images,loss")
    if is_of_a_run and (not step or found == ",".join(header).encode()):
        return
    with writing(path):
        if not is_of_a_run:
            make_room(path)
            return
        kept = free_name(path.with_name(f"validation-until-{step:08d}.csv"))
        os.replace(path, kept)
    logger.warning("validation_timesteps has changed: the rows until step %d are in %s", step, kept)


def log_summary(best: Measured, last: Measured, kept: Callable[[int], Path | None]) -> None:
    """Say which step was the best, and whether the last one is worse by more than chance.

    Args:
        best: The best step.
        last: The last one.
        kept: Returns the file with the weights of a step, None if it was not kept.
    """
    logger.info(
        "validation loss: the best is %.5f at step %d, with %.5f of the training images; at the end it is %.5f, "
        "with %.5f",
        best.loss, best.step, best.training_loss, last.loss, last.training_loss,
    )  # fmt: skip
    if not best.loss < last.loss:
        return
    difference, chance = compare(last.losses, best.losses)
    if not difference > chance:
        logger.info(
            "the last step is worse than the best one by %.2g, which may be chance (+- %.2g, from %d images)",
            difference, chance, len(last.losses),
        )  # fmt: skip
        return
    path = kept(best.step)
    if path is not None:
        advice = f"use {path}, which is from step {best.step}"
    elif best.step == 0:
        advice = "no step was better than what the training started from; lower the learning rate"
    else:
        advice = f"step {best.step} was not kept; train again with --keep_best True, or with fewer steps"
    logger.warning(
        "the last step is worse than step %d by more than chance (%.2g +- %.2g, from %d images): %s",
        best.step, difference, chance, len(last.losses), advice,
    )  # fmt: skip


def compare(losses: np.ndarray, others: np.ndarray) -> tuple[float, float]:
    """Return the mean of losses - others, and how far from 0 it may be by chance in 95 of 100 cases.

    The losses are of the same images with the same noise, so that their differences count, which vary much less than
    the losses. "By chance" is about which images were held out.

    Args:
        losses: (images,).
        others: (images,).

    Returns:
        The mean, and Student's t times its standard error. That is inf for one image.
    """
    differences = losses.astype(np.float64) - others
    if len(differences) < 2:
        return float(differences.mean()), math.inf
    free = len(differences) - 1
    student_t = _STUDENT_T[free - 1] if free <= len(_STUDENT_T) else 1.96 + 2.5 / free
    return float(differences.mean()), student_t * float(differences.std(ddof=1)) / math.sqrt(len(differences))
