"""The setting of training that prints advice before the first step. TrainSettings holds it."""

from __future__ import annotations

from dataclasses import dataclass

from ldm.settings.declare import setting


@dataclass
class AdviceSettings:
    """Whether a run says what would suit its data."""

    advise: bool = setting(
        False,
        "before the first step, print a rank, a learning rate and a number of steps for this data and base model, each "
        "with its reason, and warn of settings outside what other projects use (docs/choosing.md). It changes nothing",
        group="advice",
    )
