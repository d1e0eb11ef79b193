"""What the name tables share: result types, prefixes of the components, and the layers of the text encoder.

Every table module has `map_key(key)` and `layout(...)`. `map_key` returns the canonical names whose arrays are the rows
of the key's array in equal blocks (one name for almost all keys), Ignored for a key that is not used, or None for an
unknown key. `layout` is the reverse: how each array of the family is made of canonical ones. diffusers has `key_mapper`
in place of `map_key`, since its names depend on the number of levels and layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# Component -> what its canonical names begin with.
COMPONENTS = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.",
}
UNET_PREFIX, VAE_PREFIX, _ = COMPONENTS.values()
TEXT_PREFIX = "cond_stage_model.transformer.text_model."
# Number of a level or a layer, at most 63. A key with a larger number is unknown.
NUMBER = r"([0-9]|[1-5][0-9]|6[0-3])"


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


def count_numbers(names: Iterable[str], pattern: str) -> int:
    """Return one more than the largest number that `pattern` matches at the beginning of a name, 0 without a match.

    Args:
        names: The names.
        pattern: A pattern with NUMBER as its only group.
    """
    return max((int(match[1]) for match in map(re.compile(pattern).match, names) if match), default=-1) + 1


# Layer names of OpenCLIP's text transformer, which mindone uses too -> those of Hugging Face.
TEXT_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "c_fc": "mlp.fc1",
    "c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_OPENCLIP_LAYER = {theirs: ours for ours, theirs in TEXT_LAYER.items()}
_PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_CANONICAL_LAYER = re.compile(re.escape(TEXT_PREFIX) + r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)$")
# Only mindone has `transformer_layer`, a second `attn.`, gamma and beta. Only OpenCLIP has `mlp.` and `in_proj_weight`.
_LAYER = re.compile(
    r"transformer(?:_layer)?\.resblocks\.([0-9]{1,9})\.(?:mlp\.|attn\.(?=attn\.))?(.+?)[._](weight|bias|gamma|beta)$"
)
# Kinds of parameters in MindSpore and PyTorch -> PyTorch's.
KINDS = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}


def split_layer(key: str) -> tuple[str, str, str] | None:
    """Split a key of a text transformer's layer, OpenCLIP's or mindone's, into the arguments of text_layer.

    Returns:
        (index, module, kind), or None for a key outside of the layers.
    """
    layer = _LAYER.match(key)
    return (layer[1], layer[2], KINDS[layer[3]]) if layer else None


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
