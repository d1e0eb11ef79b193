"""What a family's name table answers for one key: places in the canonical names, or why it has none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """A canonical name, taken from one of `parts` equal blocks of the array's rows."""

    name: str
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class Ignored:
    """A key that is known and has no use here."""

    reason: str


def split_rows(names: tuple[str, ...]) -> list[Place]:
    """Places for an array whose rows are those of `names`, one after another in equal blocks."""
    return [Place(name, part, len(names)) for part, name in enumerate(names)]


def rename(name: str, table: Mapping[str, str]) -> str | None:
    """`name` with its longest leading module path that is in `table` replaced; None if none is."""
    end = len(name)
    while end > 0:
        if name[:end] in table:
            return table[name[:end]] + name[end:]
        end = name.rfind(".", 0, end)
    return None


# OpenCLIP's text transformer and what mindone made of it: their layer names -> Hugging Face's.
TEXT_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "c_fc": "mlp.fc1",
    "c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
TEXT_PREFIX = "cond_stage_model.transformer.text_model."


def text_layer(index: str, module: str, kind: str) -> list[Place] | None:
    """Places of `module` ("ln_1", "c_fc", ..., "attn.in_proj") of text layer `index`; kind "weight" or "bias"."""
    layer = f"{TEXT_PREFIX}encoder.layers.{index}."
    if module == "attn.in_proj":
        return split_rows(tuple(f"{layer}self_attn.{part}_proj.{kind}" for part in "qkv"))
    return [Place(f"{layer}{TEXT_LAYER[module]}.{kind}")] if module in TEXT_LAYER else None
