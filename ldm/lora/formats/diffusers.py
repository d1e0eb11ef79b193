"""diffusers' LoRA files, `pytorch_lora_weights.safetensors`, with the four kinds of keys that it has written.

| Format           | UNet                                           | Text encoder                                |
| ---------------- | ---------------------------------------------- | ------------------------------------------- |
| diffusers        | unet.<layer>.lora_A.weight, lora_B.weight      | text_encoder.<layer>.lora_A.weight          |
| diffusers-newer  | unet.<layer>.lora.down.weight                  | text_encoder.<layer>.lora_linear_layer.down |
| diffusers-middle | unet.<attention>.processor.to_q_lora.down      | as diffusers-newer                          |
| diffusers-oldest | <attention>.processor.to_q_lora.down           | none                                        |

lora_A is down and lora_B is up. Files mix them, so all are read at once. The first has alpha in its metadata,
`lora_adapter_metadata`: the arguments of PEFT's LoraConfig as JSON, each with the prefix `unet.` or `text_encoder.`. A
diffusers version that does not know it uses alpha = rank: for that, write "diffusers-newer". The other three have no
alpha. It is multiplied into `up`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from ldm.errors import UserError
from ldm.files.documents import parse_json
from ldm.lora.formats.factors import (
    by_component,
    fold_alpha,
    pairs_and_magnitudes,
    warn_of_left_out_tokens,
    write_factors,
)
from ldm.lora.formats.keyed import FACTOR_OF_LETTER, MAGNITUDE, PEFT_FACTOR, read_keyed
from ldm.lora.formats.lora_config import LoraConfig, settings_of
from ldm.lora.formats.modules import BaseModules, Module
from ldm.lora.lora import LoRA, lora_metadata
from ldm.weights.checkpoint import Checkpoint

# The formats, and who writes or wrote them.
VERSIONS = {
    "diffusers": "diffusers today",
    "diffusers-newer": "diffusers before PEFT",
    "diffusers-middle": "diffusers, earlier",
    "diffusers-oldest": "diffusers, the UNet's attention",
}
METADATA = "lora_adapter_metadata"
OTHER_FORMATS = (
    "base_model.model.",
    "lora_",
    "diffusion_model.",
    "text_encoders.",
    "model.diffusion_model.",
    "cond_stage_model.",
)
_PREFIX = re.compile(r"(unet|text_encoder)\.(.+)")
_FACTOR = re.compile(rf"(.+)\.(?:{PEFT_FACTOR}|lora(?:_linear_layer)?\.(down|up)\.weight|(alpha)|{MAGNITUDE})\Z")
_BESIDE_FACTORS = re.compile(r"\.(alpha|lora_magnitude_vector(\.\w+)*)\Z")
_ATTENTION = re.compile(r"(.+?)(?:\.processor)?\.to_(q|k|v|out)_lora\.(down|up)\.weight\Z")


def detect(keys: Iterable[str]) -> str | None:
    """Return which of VERSIONS has such keys, None for keys that are not diffusers'."""
    keys = [key for key in keys if not key.startswith(OTHER_FORMATS)]
    factors = [key for key in keys if _ATTENTION.match(key) or _FACTOR.match(key) and not _BESIDE_FACTORS.search(key)]
    if not factors:
        return None
    if any(".lora_A." in key or ".lora_B." in key for key in factors):
        return "diffusers"
    if any(_ATTENTION.match(key) for key in factors):
        return "diffusers-middle" if any(_PREFIX.match(key) for key in factors) else "diffusers-oldest"
    return "diffusers-newer"


def read(checkpoint: Checkpoint, base: BaseModules | None = None) -> LoRA:
    """Read an opened file. Raises UserError as `read_keyed`."""
    configs = _lora_configs(checkpoint)

    def alpha(layer: str, rank: int | None) -> float | None:
        component = "text_encoder" if layer.startswith("encoder.") else "unet"
        return configs[component].alpha(layer, rank) if component in configs and rank is not None else rank

    lora = read_keyed(checkpoint, parse, table, base, alpha)
    lora.metadata.update(lora_metadata(checkpoint.metadata))
    return lora


def write(path: str | os.PathLike, lora: LoRA, base: BaseModules, dtype: str = "fp32", name: str = "diffusers") -> None:
    """Write a .safetensors in one of VERSIONS. "diffusers" holds DoRA as well, by output.

    Raises:
        UserError: There are layers of other kinds, or the format is "diffusers-oldest" and there are layers other than
            the UNet's attention.
    """
    arrays: dict[str, np.ndarray] = {}
    configs: dict[str, Any] = {}
    warn_of_left_out_tokens(path, lora, name)
    pairs, magnitudes = (
        pairs_and_magnitudes(lora, base, str(path)) if name == "diffusers" else (lora.pairs(str(path)), {})
    )
    for component, layers in by_component(pairs, base).items():
        for module, layer in layers.items():
            written = layer if name == "diffusers" else fold_alpha(layer)
            down, up = _keys(component, module, name, path)
            arrays[down], arrays[up] = written.down, written.up
            if module in magnitudes:
                key = down.removesuffix("lora_A.weight") + "lora_magnitude_vector"
                arrays[key] = magnitudes[module]
        settings = settings_of(
            layers, base.of_component(component), use_dora=any(module in magnitudes for module in layers)
        )
        configs.update({f"{component}.{key}": value for key, value in settings.items()})
    metadata = {"format": "pt", **lora.metadata}
    if name == "diffusers":
        metadata[METADATA] = json.dumps(configs, sort_keys=True)
    write_factors(path, arrays, metadata, dtype)


def parse(key: str) -> tuple[str, str] | None:
    """Return (Module.path, factor) of a key with or without `unet.`, `text_encoder.` and `text_model.`, or None."""
    prefixed = _PREFIX.match(key)
    name = prefixed.group(2) if prefixed else key
    name = name[len("text_model.") :] if name.startswith("text_model.") else name
    match = _ATTENTION.match(name)
    if match:
        module, part, factor = match.groups()
        if module.startswith("encoder."):
            return f"{module}.{part}_proj", factor
        return f"{module}.to_{part}" + (".0" if part == "out" else ""), factor
    match = _FACTOR.match(name)
    if match is None:
        return None
    module, letter, factor, alpha, magnitude = match.groups()
    module += ".0" if module.endswith(".to_out") else ""
    return module, FACTOR_OF_LETTER.get(letter) or factor or alpha or magnitude


def table(base: BaseModules) -> dict[str, Module]:
    """Return the modules of a base model by the names that `parse` returns."""
    return {module.path: module for module in (*base.modules, *base.norms)}


def _keys(component: str, module: str, name: str, path: str | os.PathLike) -> tuple[str, str]:
    """Return the keys of down and up."""
    in_text_encoder = component == "text_encoder"
    layer = f"text_encoder.text_model.{module}" if in_text_encoder else f"unet.{module}"
    if name == "diffusers":
        return f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
    attention = re.match(r"(.+\.attn[12])\.to_(q|k|v|out)(?:\.0)?$", module)
    if name == "diffusers-oldest" and (in_text_encoder or not attention):
        raise UserError(
            f"{path}: diffusers-oldest holds only the UNet's attention, not {layer}: write diffusers-middle"
        )
    if in_text_encoder:
        layer += ".lora_linear_layer"
    elif attention and name != "diffusers-newer":
        prefix = "" if name == "diffusers-oldest" else "unet."
        layer = f"{prefix}{attention.group(1)}.processor.to_{attention.group(2)}_lora"
    else:
        layer += ".lora"
    return f"{layer}.down.weight", f"{layer}.up.weight"


def _lora_configs(checkpoint: Checkpoint) -> dict[str, LoraConfig]:
    """Return the LoraConfig in the metadata, by component. Arguments without a prefix are the UNet's."""
    text = checkpoint.metadata.get(METADATA)
    if not text:
        return {}
    where = f"{checkpoint.path}: {METADATA}"
    arguments = parse_json(text, where)
    if not isinstance(arguments, dict):
        raise UserError(f"{where} is no JSON object")
    components: dict[str, dict[str, Any]] = {}
    for key, value in arguments.items():
        component, _, name = key.partition(".")
        if component not in ("unet", "text_encoder"):
            component, name = "unet", key
        components.setdefault(component, {})[name] = value
    return {component: LoraConfig(settings, where) for component, settings in components.items()}
