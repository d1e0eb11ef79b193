"""What the name tables share: their result types and the names of text encoder layers.

Every table module has `map_key(key)` and `layout(...)`. `map_key` returns the canonical names whose arrays are the rows
of the key's array in equal blocks (one name for almost all keys), Ignored for a key that is not used, or None for an
unknown key. `layout` is the reverse: how each array of the family is made of canonical ones. diffusers has `key_mapper`
in place of `map_key`, since its names depend on the number of levels and layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Ignored:
    """A known key that is not used."""

    reason: str


@dataclass(frozen=True)
class Concatenation:
    """An array of another family: canonical arrays concatenated along their rows.

    Attributes:
        names: Canonical names in order.
        shape: Shape of the array, None for the shape that concatenation gives.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...] | None = None


def rename(name: str, table: Mapping[str, str]) -> str | None:
    """Replace the longest leading module path of `name` that is in `table`. Returns None if none is."""
    end = len(name)
    while end > 0:
        if name[:end] in table:
            return table[name[:end]] + name[end:]
        end = name.rfind(".", 0, end)
    return None


# Layer names of OpenCLIP's text transformer, which mindone uses too -> those of Hugging Face.
TEXT_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "c_fc": "mlp.fc1",
    "c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
TEXT_PREFIX = "cond_stage_model.transformer.text_model."
_OPENCLIP_LAYER = {theirs: ours for ours, theirs in TEXT_LAYER.items()}
_PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_CANONICAL_LAYER = re.compile(re.escape(TEXT_PREFIX) + r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)$")


def text_layer(index: str, module: str, kind: str, prefix: str = TEXT_PREFIX) -> tuple[str, ...] | None:
    """Return the canonical names of a parameter in a layer of an OpenCLIP text transformer.

    Args:
        index: Number of the layer.
        module: "attn.in_proj" (q, k and v in one array) or a key of TEXT_LAYER.
        kind: "weight" or "bias".
        prefix: What precedes `encoder.layers` in the canonical names.
    """
    layer = f"{prefix}encoder.layers.{index}."
    if module == "attn.in_proj":
        return tuple(f"{layer}{projection}.{kind}" for projection in _PROJECTIONS)
    return (f"{layer}{TEXT_LAYER[module]}.{kind}",) if module in TEXT_LAYER else None


def openclip_layer(name: str) -> tuple[str, str, str, tuple[str, ...]] | None:
    """Return (index, module, kind, canonical names in its array) of a canonical name. The reverse of text_layer.

    None for a name outside of the text encoder's layers.
    """
    layer = _CANONICAL_LAYER.match(name)
    if layer is None:
        return None
    index, module, kind = layer.groups()
    if module in _PROJECTIONS:
        return index, "attn.in_proj", kind, tuple(name.replace(module, projection) for projection in _PROJECTIONS)
    return (index, _OPENCLIP_LAYER[module], kind, (name,)) if module in _OPENCLIP_LAYER else None
