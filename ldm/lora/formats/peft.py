"""PEFT's adapters: a folder with adapter_config.json and adapter_model.safetensors, one folder for each network.

    base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight

lora_A is down and lora_B is up. DoRA has `lora_magnitude_vector` beside them. Only the configuration holds alpha, so a
file without one is refused. A folder for both networks has subfolders `unet` and `text_encoder`. LoHa and LoKr are
read too. They have LyCORIS's names, and their scale is alpha / r even where both factors of a LoKr are whole.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from ldm.errors import UserError
from ldm.files.atomic import atomic_path
from ldm.files.documents import read_json
from ldm.files.inputs import is_there
from ldm.files.paths import writing
from ldm.lora.formats import diffusers
from ldm.lora.formats.factors import by_component, pairs_and_magnitudes, warn_of_left_out_tokens, write_factors
from ldm.lora.formats.keyed import read_keyed
from ldm.lora.formats.lora_config import LoraConfig, settings_of
from ldm.lora.formats.modules import BaseModules
from ldm.lora.lora import LoRA, lora_metadata
from ldm.lora.products import LoKr
from ldm.lora.updates import LayerUpdate
from ldm.weights.checkpoint import Checkpoint

CONFIG, WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
COMPONENTS = ("unet", "text_encoder")
_FACTOR = re.compile(r"\.(lora_[AB]\.|hada_|lokr_)")
_PRODUCT = re.compile(r"(.+)\.((?:hada|lokr)_\w+)\Z")


def detect(keys: Iterable[str]) -> str | None:
    """Return "peft" for the keys of such a file, otherwise None."""
    return "peft" if any(key.startswith(PREFIX) and _FACTOR.search(key) for key in keys) else None


def files(folder: Path) -> list[Path]:
    """Return the files with factors in an adapter's folder or its subfolders. There may be none."""
    folders = [folder] if is_there(folder / CONFIG) else [folder / component for component in COMPONENTS]
    files = ([path / name for name in WEIGHTS if is_there(path / name)][:1] for path in folders)
    return [file for first in files for file in first]


def read(checkpoint: Checkpoint, base: BaseModules | None = None) -> LoRA:
    """Read the opened file of one network, with the configuration beside it.

    Raises:
        UserError: The configuration is missing or has another rank than the factors. Also as `read_keyed`.
    """
    where = checkpoint.path.parent / CONFIG
    if not is_there(where):
        raise UserError(
            f"{checkpoint.path} is a PEFT adapter whose alpha is in {CONFIG}, which is not beside it: fetch that too"
        )
    settings = read_json(where, way="fetch it again, with the factors beside it")
    if not isinstance(settings, dict):
        raise UserError(f"{where} is no JSON object")
    lora = read_keyed(checkpoint, _parse, diffusers.table, base, LoraConfig(settings, str(where)).alpha)
    layers = {name: _scaled(layer) for name, layer in lora.layers.items()}
    return replace(lora, layers=layers, metadata=lora_metadata(checkpoint.metadata))


def write(path: str | os.PathLike, lora: LoRA, base: BaseModules, dtype: str = "fp32") -> None:
    """Write the folder `path`, with a subfolder for each network if there are two. alpha is kept by layer.

    Raises:
        UserError: Another adapter in the folder would be read in place of this one.
    """
    warn_of_left_out_tokens(path, lora, "peft")
    pairs, magnitudes = pairs_and_magnitudes(lora, base, str(path))
    components = by_component(pairs, base)
    folders = {component: Path(path) / component if len(components) > 1 else Path(path) for component in components}
    for file in files(Path(path)):
        if file.parent not in folders.values():
            raise UserError(
                f"{path}: {file.parent} holds another adapter, which would be read in its place: give a new folder, or "
                "move it away"
            )
    for component, layers in components.items():
        folder = folders[component]
        prefix = PREFIX + ("text_model." if component == "text_encoder" else "")
        arrays = {}
        for module, layer in layers.items():
            arrays[f"{prefix}{module}.lora_A.weight"] = layer.down
            arrays[f"{prefix}{module}.lora_B.weight"] = layer.up
            if module in magnitudes:
                arrays[f"{prefix}{module}.lora_magnitude_vector"] = magnitudes[module]
        settings = {
            "peft_type": "LORA",
            "base_model_name_or_path": None,
            "inference_mode": True,
            "task_type": None,
            **settings_of(
                layers, base.of_component(component), use_dora=any(module in magnitudes for module in layers)
            ),
        }
        write_factors(folder / WEIGHTS[0], arrays, {"format": "pt", **lora.metadata}, dtype)
        with writing(folder / CONFIG), atomic_path(folder / CONFIG) as temporary:
            temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _parse(key: str) -> tuple[str, str] | None:
    if not key.startswith(PREFIX):
        return None
    product = _PRODUCT.match(key[len(PREFIX) :])
    if product is None:
        return diffusers.parse(key[len(PREFIX) :])
    return product[1].removeprefix("text_model."), product[2]


def _scaled(layer: LayerUpdate) -> LayerUpdate:
    """Multiply the scale into a LoKr of two whole factors, for which other formats have none (see LoraConfig.alpha)."""
    if not isinstance(layer, LoKr) or layer.rank is not None:
        return layer
    factors = {**layer.factors, "lokr_w1": layer.factors["lokr_w1"] * np.float32(layer.alpha)}
    return replace(layer, factors=factors, alpha=1.0)
