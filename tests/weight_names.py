"""Whole dictionaries of arrays under canonical names and diffusers', for tests."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ldm.errors import UserError
from ldm.settings.model import ModelConfig
from ldm.weights.names import map_keys, read_source
from ldm.weights.names.diffusers import layout


def to_canonical(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint under their canonical names; ignored keys are left out, unknown ones an error."""
    key_map = map_keys(arrays)
    if key_map.unknown:
        raise UserError(f"{len(key_map.unknown)} unknown names: {', '.join(key_map.unknown[:3])}")
    # diffusers has linear layers where the VAE's attention has 1x1 convolutions
    found = {name: read_source(arrays, source) for name, source in key_map.sources.items()}
    return {
        name: array.reshape(*array.shape, 1, 1) if ".attn_1." in name and array.ndim == 2 else array
        for name, array in found.items()
    }


def to_diffusers(
    weights: Mapping[str, np.ndarray], config: ModelConfig
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(unet, vae, text) state dictionaries of canonical `weights`, the text's with `text_model.` in front."""
    parts: dict[str, dict[str, np.ndarray]] = {"unet": {}, "vae": {}, "text_encoder": {}}
    for key, made in layout({name: array.shape for name, array in weights.items()}, config).items():
        component, _, name = key.partition("/")
        array = weights[made.names[0]]
        parts[component][name] = array if made.shape is None else array.reshape(made.shape)
    return parts["unet"], parts["vae"], parts["text_encoder"]


def from_diffusers(
    unet: Mapping[str, np.ndarray], vae: Mapping[str, np.ndarray], text: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The reverse; any of the three may be empty."""
    parts = {"unet": unet, "vae": vae, "text_encoder": text}
    return to_canonical({f"{part}/{name}": array for part, arrays in parts.items() for name, array in arrays.items()})
