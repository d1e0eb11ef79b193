"""What a family's name table answers for one key: places in the canonical names, or why it has none."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A canonical name, taken from one of `parts` equal blocks of the array's rows."""

    name: str
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class Concatenation:
    """An array of another family, made of canonical ones: their rows one after another, then given a shape (None: the
    one they have).
    """

    names: tuple[str, ...]
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Ignored:
    """A key that is known and has no use here."""

    reason: str


def split_rows(names: tuple[str, ...]) -> list[Target]:
    """Places for an array whose rows are those of `names`, one after another in equal blocks."""
    return [Target(name, part, len(names)) for part, name in enumerate(names)]


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


def text_layer(index: str, module: str, kind: str) -> list[Target] | None:
    """Places of `module` ("ln_1", "c_fc", ..., "attn.in_proj") of text layer `index`; kind "weight" or "bias"."""
    layer = f"{TEXT_PREFIX}encoder.layers.{index}."
    if module == "attn.in_proj":
        return split_rows(tuple(f"{layer}self_attn.{part}_proj.{kind}" for part in "qkv"))
    return [Target(f"{layer}{TEXT_LAYER[module]}.{kind}")] if module in TEXT_LAYER else None


_CANONICAL_LAYER = re.compile(re.escape(TEXT_PREFIX) + r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)$")
_FUSED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def fused_text_layer(name: str) -> tuple[str, str, str, tuple[str, ...]] | None:
    """The reverse of text_layer: (index, module, kind, the canonical names whose rows it holds) of a canonical name;
    None for one outside of the layers.
    """
    layer = _CANONICAL_LAYER.match(name)
    if layer is None:
        return None
    index, module, kind = layer.groups()
    if module in _FUSED:
        return index, "attn.in_proj", kind, tuple(name.replace(module, part) for part in _FUSED)
    theirs = {ours: theirs for theirs, ours in TEXT_LAYER.items()}
    return (index, theirs[module], kind, (name,)) if module in theirs else None
