"""PEFT's adapters: a folder with adapter_config.json and adapter_model.safetensors, one folder a network.

Keys are `base_model.model.<layer>.lora_A.weight` (A is down, B up); alpha is in the configuration alone, so a file
without one is refused. A folder for both networks has subfolders `unet` and `text_encoder`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from ldm.errors import UserError
from ldm.files.atomic import atomic_path
from ldm.files.documents import read_json
from ldm.files.inputs import is_there
from ldm.files.paths import writing
from ldm.lora.formats import diffusers, pairs
from ldm.lora.formats.lora_config import Adapter, adapter_of
from ldm.lora.formats.modules import BaseModules
from ldm.lora.lora import LoRA
from ldm.settings.model import model_metadata
from ldm.weights.checkpoint import Checkpoint

CONFIG, WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
PARTS = ("unet", "text_encoder")


def detect(names: Iterable[str]) -> bool:
    """Whether these are the names of such a file."""
    return any(name.startswith(PREFIX) and (".lora_A." in name or ".lora_B." in name) for name in names)


def files(folder: Path) -> list[Path]:
    """The files with the factors in an adapter's folder, or in its subfolders for each network; may be none."""
    folders = [folder] if is_there(folder / CONFIG) else [folder / part for part in PARTS]
    found = [[path / name for name in WEIGHTS if is_there(path / name)][:1] for path in folders]
    return [path for paths in found for path in paths]


def read(checkpoint: Checkpoint, base: BaseModules | None = None) -> LoRA:
    """Read the opened file of one network, with the configuration beside it.

    Raises UserError if that is missing or says another rank than the factors have; see also pairs.read_pairs.
    """
    where = checkpoint.path.parent / CONFIG
    if not is_there(where):
        raise UserError(
            f"{checkpoint.path} is a PEFT adapter whose strength is in {CONFIG}, which is not beside it: fetch that too"
        )
    settings = read_json(where, way="fetch it again, with the factors beside it")
    if not isinstance(settings, dict):
        raise UserError(f"{where} is no JSON object")
    layers = pairs.read_pairs(checkpoint, _parse, diffusers.table, base, Adapter(settings, str(where)).alpha)
    return LoRA(layers, model_metadata(checkpoint.metadata))


def write(path, state: LoRA, base: BaseModules, dtype: str = "fp32") -> None:
    """Write the folder `path`: of one network itself, of two with a subfolder each. alpha is kept, layer by layer.

    Raises UserError where an adapter of one network lies in the way of two, or of two in the way of one.
    """
    parts = pairs.by_component(state, base)
    folders = {component: Path(path) / component if len(parts) > 1 else Path(path) for component in parts}
    for file in files(Path(path)):
        if file.parent not in folders.values():
            raise UserError(
                f"{path}: {file.parent} holds another adapter, which would be read in its place: give a new folder, or "
                "move it away"
            )
    for component, layers in parts.items():
        folder = folders[component]
        inner = "text_model." if component == "text_encoder" else ""
        arrays = {}
        for module, layer in layers.items():
            arrays[f"{PREFIX}{inner}{module}.lora_A.weight"] = layer.down
            arrays[f"{PREFIX}{inner}{module}.lora_B.weight"] = layer.up
        settings = {
            "peft_type": "LORA", "base_model_name_or_path": None, "inference_mode": True, "task_type": None,
            **adapter_of(layers, base.of(component)).arguments(),
        }  # fmt: skip
        pairs.save(folder / WEIGHTS[0], arrays, {"format": "pt", **pairs.base_texts(state)}, dtype)
        with writing(folder / CONFIG), atomic_path(folder / CONFIG) as temporary:
            temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _parse(key: str) -> tuple[str, str] | None:
    return diffusers.parse(key[len(PREFIX) :]) if key.startswith(PREFIX) else None
