"""Optimizers, a module for each. `interface` says what an optimizer is to the training step."""

from __future__ import annotations

import math
from dataclasses import asdict

from ldm.settings.optimizer import (
    AdafactorOptions,
    AdamWOptions,
    LionOptions,
    OptimizerSettings,
    ProdigyOptions,
    ScheduleFreeOptions,
)
from ldm.training.optimizers.adafactor import Adafactor
from ldm.training.optimizers.adamw import AdamW, AdamWScalars, adamw_scalars
from ldm.training.optimizers.adamw_schedulefree import AdamWScheduleFree
from ldm.training.optimizers.interface import CellOptions, Optimizer, OptimizerCell, averages, companion
from ldm.training.optimizers.lion import Lion
from ldm.training.optimizers.prodigy import Prodigy

__all__ = [
    "Adafactor",
    "AdamW",
    "AdamWScalars",
    "AdamWScheduleFree",
    "CellOptions",
    "Lion",
    "Optimizer",
    "OptimizerCell",
    "Prodigy",
    "adamw_scalars",
    "averages",
    "companion",
    "make_optimizer",
]

_OPTIMIZERS: dict[type, type[Optimizer]] = {
    AdamWOptions: AdamW,
    LionOptions: Lion,
    AdafactorOptions: Adafactor,
    ScheduleFreeOptions: AdamWScheduleFree,
    ProdigyOptions: Prodigy,
}


def make_optimizer(settings: OptimizerSettings) -> Optimizer:
    """Return the optimizer that the settings ask for, with its hyperparameters."""
    options = settings.optimizer_options()
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in asdict(options).items()}
    if isinstance(options, ProdigyOptions):
        del values["decouple"]  # it is always True
        values["growth_rate"] = math.inf if options.growth_rate is None else options.growth_rate
    return _OPTIMIZERS[type(options)](**values)
