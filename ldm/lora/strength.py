"""The strength of a LoRA at generation and in merging: how much of it is applied to each network, and to each block."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Optional

from ldm.errors import UserError, plain
from ldm.lora.lora import LoRA
from ldm.settings.block_weights import BASE, SD_ATTENTION_BLOCKS, BlockWeights, block_of, in_order, spans
from ldm.weights.names import component_of
from ldm.weights.names.tables import UNET_PREFIX

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Strength:
    """How much of a LoRA is applied to the UNet and to the text encoder. Any finite numbers.

    `blocks` multiplies them: that of the UNet by the factor of a layer's block, that of the text encoder by BASE.
    """

    unet: float = 1.0
    text_encoder: float = 1.0
    blocks: Optional[BlockWeights] = None

    @classmethod
    def from_value(cls, value: float | Strength) -> Strength:
        """Return `value` itself, or a number as the strength for both networks."""
        return value if isinstance(value, Strength) else cls(value, value)

    @classmethod
    def from_numbers(
        cls, numbers: Sequence[float], default: float = 1.0, blocks: Optional[BlockWeights] = None
    ) -> Strength:
        """Return the strength that 0 to 2 numbers after a LoRA's path stand for. One number is for both networks."""
        numbers = numbers or (default,)
        return cls(numbers[0], numbers[-1], blocks)

    def of_layer(self, name: str) -> float:
        """Return the strength for a layer or parameter, given its canonical name."""
        strength = self.text_encoder if component_of(name) == "text_encoder" else self.unet
        return strength if self.blocks is None else strength * self.blocks.of_block(block_of_parameter(name))

    def check(self, path: str) -> None:
        """Raise UserError for a strength that is not finite. `path` names the LoRA in the error."""
        for value in (self.unet, self.text_encoder):
            if not math.isfinite(value):
                raise UserError(f"the strength of {path} is {value}: it must be a finite number")

    def check_model(self, parameters: Iterable[str], path: str, model: str = "the model") -> None:
        """Raise UserError for block weights that do not suit a model, given the canonical names of its parameters."""
        if self.blocks is not None:
            found = {block_of_parameter(name) for name in parameters} - {None, BASE}
            self.blocks.check_model(in_order(block for block in found if block), model, f"{path}: block weights")

    def check_lora(self, lora: LoRA, path: str) -> None:
        """Raise UserError where block weights are numbers for Stable Diffusion, and a LoRA is for another model.

        This is told from its metadata or its layers, for sums of LoRAs without a model.
        """
        if self.blocks is None or self.blocks.count is None:
            return
        attention = {block_of_parameter(name) for name in lora.updates() if ".transformer_blocks." in name}
        if lora.metadata.get("architecture") == "nano" or attention - {*SD_ATTENTION_BLOCKS}:
            own = spans(block for name in lora.updates() if (block := block_of_parameter(name)))
            raise UserError(
                f'{path}: block weights "{plain(self.blocks.text, 60)}": {self.blocks.count} numbers are for the '
                f"blocks of Stable Diffusion, the LoRA is for another model and has {own}: name its blocks instead, "
                "such as MID=0.5,OUT*=0"
            )

    def warn_of_layers(self, lora: LoRA, path: str) -> None:
        """Say in the log which layers of a LoRA the block weights do not name or do not reach."""
        if self.blocks is None:
            return
        blocks = [block_of_parameter(name) for name in lora.updates()]
        own = in_order(block for block in blocks if block)
        if self.blocks.count:
            named = dict(self.blocks.factors)
            unnamed = [block for block in blocks if block and block not in named and not self.blocks.rest]
            if unnamed:
                logger.warning(
                    "%s: %d layers in %s are left out, because %d numbers do not name these blocks: give 26, or names",
                    plain(path),
                    len(unnamed),
                    spans(unnamed),
                    self.blocks.count,
                )
        else:
            unused = [name for name, found in self.blocks.names_of(own).items() if not found]
            if unused:
                logger.warning("%s has no layer in %s: its factor has no effect", plain(path), ", ".join(unused))
        if None in blocks:
            count = blocks.count(None)
            logger.warning("%s: %d layers outside of the blocks keep the UNet's strength", plain(path), count)

    def without_unet(self) -> Strength:
        """Return the strength that applies the text encoder's part alone."""
        return replace(self, unet=0.0)

    def __neg__(self) -> Strength:
        return replace(self, unet=-self.unet, text_encoder=-self.text_encoder)

    def __str__(self) -> str:
        unet = f"{self.unet:g}"
        text = unet if self.unet == self.text_encoder else f"{unet} (text encoder {self.text_encoder:g})"
        return text if self.blocks is None else f"{text}, blocks {self.blocks.text}"


def block_of_parameter(name: str) -> str | None:
    """Return the block of a layer or parameter, given its canonical name. BASE is the text encoder."""
    if component_of(name) == "text_encoder":
        return BASE
    return block_of(name[len(UNET_PREFIX) :]) if name.startswith(UNET_PREFIX) else None
