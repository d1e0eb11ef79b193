"""The settings of training that say something of a run before it begins. TrainSettings holds them."""

from __future__ import annotations

from dataclasses import dataclass

from ldm.settings.declare import setting


@dataclass
class AdviceSettings:
    """Whether a run says what would suit its data, and what it will take."""

    advise: bool = setting(
        False,
        "before the first step, print a rank, a learning rate and a number of steps for this data and base model, each "
        "with its reason, and warn of settings outside what other projects use (docs/choosing.md). It changes nothing",
        group="advice",
    )
    estimate: bool = setting(
        False,
        "print the memory and the time of a step, from measured tables and these settings, and end: nothing is loaded, "
        "read or written (docs/performance.md)",
        set_by_comparison=True,
    )
