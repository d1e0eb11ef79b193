"""Learning rates that are not the same for all parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ldm.settings.train import TrainSettings
from ldm.weights.names import COMPONENTS


class Rates(NamedTuple):
    """What start_learning_rate and its schedule are multiplied by.

    Attributes:
        largest: The largest factor of a parameter.
        shown: The factor of the first parameter without LoRA+, whose rate is logged.
        factors: Factors of that rate by parameter name, from 0 to 1. An update at the largest rate that is made smaller
            has the rounding errors of the largest; one that is made larger would enlarge them.
    """

    largest: float
    shown: float
    factors: dict[str, float]

    @property
    def differ(self) -> bool:
        """Whether not all parameters have one rate."""
        return any(factor != 1.0 for factor in self.factors.values())


def make_rates(settings: TrainSettings, names: Sequence[str]) -> Rates:
    """Return the rates of the trained parameters: unet_lr, text_encoder_lr, and LoRA+ (Hayou et al. 2024).

    Args:
        settings: Those of the run.
        names: Of the trained parameters.
    """
    start, ratio = settings.start_learning_rate, settings.loraplus_lr_ratio
    plain = {}
    for name in names:
        own = settings.text_encoder_lr if name.startswith(COMPONENTS["text_encoder"]) else settings.unet_lr
        plain[name] = 1.0 if own is None else own / start
    factors = dict(plain)
    if ratio is not None:
        factors.update({name: factor * ratio for name, factor in plain.items() if name.endswith(".lora_up.weight")})
    largest = max(factors.values())
    return Rates(largest, plain[names[0]], {name: factor / largest for name, factor in factors.items()})
