"""Learning rates that are not the same for all parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ldm.errors import UserError
from ldm.lora.spec import LoRASpec
from ldm.settings.train import TrainSettings
from ldm.textual_inversion.inject import NAME as LEARNED_ROWS
from ldm.weights.names import COMPONENTS

# The factors that start at zero: those whose rate LoRA+ makes larger, as that of `up`. hada_w1_a does not.
STARTS_AT_ZERO = (".lora_up.weight", ".lora_hada_w2_a", ".lora_lokr_w2", ".lora_lokr_w2_b")


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


def make_rates(settings: TrainSettings, names: Sequence[str], lora_spec: LoRASpec) -> Rates:
    """Return the rates of the trained parameters: of networks and modules, and LoRA+ (Hayou et al. 2024).

    Args:
        settings: Those of the run.
        names: Of the trained parameters.
        lora_spec: The LoRA layers.

    Raises:
        UserError: The rates differ, and the optimizer has one.
    """
    start, ratio = settings.start_learning_rate, settings.loraplus_lr_ratio
    plain = {}
    for name in names:
        own = settings.text_encoder_lr if name.startswith(COMPONENTS["text_encoder"]) else settings.unet_lr
        if name == LEARNED_ROWS:
            own = settings.ti_lr
        layer, dot, _ = name.partition(".lora_")
        if dot and (rate := lora_spec.learning_rate_of(layer)) is not None:
            own = rate
        plain[name] = 1.0 if own is None else own / start
    factors = dict(plain)
    if ratio is not None:
        factors.update({name: factor * ratio for name, factor in plain.items() if name.endswith(STARTS_AT_ZERO)})
    largest = max(factors.values())
    rates = Rates(largest, plain[names[0]], {name: factor / largest for name, factor in factors.items()})
    if settings.optim == "prodigy" and (rates.differ or largest != 1.0):
        raise UserError("prodigy finds one learning rate for all layers: leave lr out of lora_config")
    return rates
