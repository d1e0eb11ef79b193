"""The strength of a LoRA at generation and in merging: how much of it is applied to each network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ldm.errors import UserError
from ldm.weights.names import component_of


@dataclass(frozen=True)
class Strength:
    """How much of a LoRA is applied to the UNet and to the text encoder. Any finite numbers."""

    unet: float = 1.0
    text_encoder: float = 1.0

    @classmethod
    def from_value(cls, value: float | Strength) -> Strength:
        """Return `value` itself, or a number as the strength for both networks."""
        return value if isinstance(value, Strength) else cls(value, value)

    @classmethod
    def from_numbers(cls, numbers: Sequence[float], default: float = 1.0) -> Strength:
        """Return the strength that 0 to 2 numbers after a LoRA's path stand for. One number is for both networks."""
        unet, *text_encoder = numbers or (default,)
        return cls(unet, *(text_encoder or [unet]))

    def of_layer(self, name: str) -> float:
        """Return the strength for a layer, given its canonical name."""
        return self.text_encoder if component_of(name) == "text_encoder" else self.unet

    def check(self, path: str) -> None:
        """Raise UserError for a strength that is not finite. `path` names the LoRA in the error."""
        for value in (self.unet, self.text_encoder):
            if not math.isfinite(value):
                raise UserError(f"the strength of {path} is {value}: it must be a finite number")

    def __neg__(self) -> Strength:
        return Strength(-self.unet, -self.text_encoder)

    def __str__(self) -> str:
        unet = f"{self.unet:g}"
        return unet if self.unet == self.text_encoder else f"{unet} (text encoder {self.text_encoder:g})"
