"""PEFT's adapters: a folder with adapter_config.json and adapter_model.safetensors, one folder for each network.

    base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight

lora_A is down and lora_B is up. Only the configuration holds alpha, so a file without one is refused. A folder for both
networks has subfolders `unet` and `text_encoder`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from ldm.errors import UserError
from ldm.files.atomic import atomic_path
from ldm.files.documents import read_json
from ldm.files.inputs import is_there
from ldm.files.paths import writing
from ldm.lora.formats import diffusers
from ldm.lora.formats.factors import by_component, write_factors
from ldm.lora.formats.keyed import read_keyed
from ldm.lora.formats.lora_config import LoraConfig, settings_of
from ldm.lora.formats.modules import BaseModules
from ldm.lora.lora import LoRA, lora_metadata
from ldm.weights.checkpoint import Checkpoint

CONFIG, WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
COMPONENTS = ("unet", "text_encoder")


def detect(keys: Iterable[str]) -> str | None:
    """Return "peft" for the keys of such a file, otherwise None."""
    found = any(key.startswith(PREFIX) and (".lora_A." in key or ".lora_B." in key) for key in keys)
    return "peft" if found else None


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
    layers = read_keyed(checkpoint, _parse, diffusers.table, base, LoraConfig(settings, str(where)).alpha)
    return LoRA(layers, lora_metadata(checkpoint.metadata))


def write(path: str | os.PathLike, lora: LoRA, base: BaseModules, dtype: str = "fp32") -> None:
    """Write the folder `path`, with a subfolder for each network if there are two. alpha is kept by layer.

    Raises:
        UserError: Another adapter in the folder would be read in place of this one.
    """
    components = by_component(lora, base)
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
        settings = {
            "peft_type": "LORA",
            "base_model_name_or_path": None,
            "inference_mode": True,
            "task_type": None,
            **settings_of(layers, base.of_component(component)),
        }
        write_factors(folder / WEIGHTS[0], arrays, {"format": "pt", **lora.metadata}, dtype)
        with writing(folder / CONFIG), atomic_path(folder / CONFIG) as temporary:
            temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _parse(key: str) -> tuple[str, str] | None:
    return diffusers.parse(key[len(PREFIX) :]) if key.startswith(PREFIX) else None
