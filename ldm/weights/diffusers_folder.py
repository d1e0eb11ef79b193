"""A diffusers folder: unet/, vae/, text_encoder/, each with a config.json and weights in one file or several."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ldm.errors import UserError
from ldm.weights.checkpoint import Arrays, Checkpoint
from ldm.weights.read import open_checkpoint

# Component -> the stems of its weights as .safetensors and as PyTorch's .bin.
STEMS = {
    "unet": ("diffusion_pytorch_model", "diffusion_pytorch_model"),
    "vae": ("diffusion_pytorch_model", "diffusion_pytorch_model"),
    "text_encoder": ("model", "pytorch_model"),
}
CLASSES = {"UNet2DConditionModel": "unet", "AutoencoderKL": "vae", "CLIPTextModel": "text_encoder"}
WHOLE = "a diffusers folder has unet/, vae/ and text_encoder/"


class DiffusersFolder(Arrays):
    """The weights of a folder's components as one mapping, under `component/name`; see Checkpoint.

    `files` holds the files that the weights come from; `metadata` the scheduler's prediction type where there is one.
    """

    format = "diffusers"

    def __init__(self, path: Path, places: dict[str, Path]):
        self.path = path
        self.places = places
        self.files: list[Path] = []
        self._arrays: dict[str, tuple[Checkpoint, str]] = {}
        for component, place in places.items():
            for checkpoint in self._open(component, place):
                self.files.append(checkpoint.path)
                self._arrays.update({f"{component}/{name}": (checkpoint, name) for name in checkpoint})
        prediction_type = self.read_json("scheduler/scheduler_config.json").get("prediction_type")
        self.metadata = {"prediction_type": prediction_type} if isinstance(prediction_type, str) else {}

    def _open(self, component: str, place: Path) -> list[Checkpoint]:
        safe, torch = STEMS[component]
        # Full precision first, then .safetensors before .bin.
        for variant in ("", ".fp16"):
            for stem, suffix in ((safe, ".safetensors"), (torch, ".bin")):
                if (place / f"{stem}{variant}{suffix}").exists():
                    return [open_checkpoint(place / f"{stem}{variant}{suffix}")]
                index = place / f"{stem}{suffix}.index{variant}.json"
                if index.exists():
                    return _open_shards(index)
        found = ", ".join(sorted(os.listdir(place))[:5]) or "nothing"
        raise UserError(f"{place} holds no weights ({safe}.safetensors or {torch}.bin), but {found}")

    def config(self, component: str) -> dict[str, Any]:
        """The component's config.json; empty where there is none."""
        return _read_json(self.places[component] / "config.json") if component in self.places else {}

    def read_json(self, name: str) -> dict[str, Any]:
        """A file of the folder, `scheduler/scheduler_config.json` for example; empty where there is none."""
        return _read_json(self.path / name)

    def spec(self, name: str) -> tuple[np.dtype, tuple[int, ...]]:
        checkpoint, inner = self._arrays[name]
        return checkpoint.spec(inner)

    def release(self, name: str) -> None:
        checkpoint, inner = self._arrays[name]
        checkpoint.release(inner)

    def __getitem__(self, name: str) -> np.ndarray:
        checkpoint, inner = self._arrays[name]
        return checkpoint[inner]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def open_folder(path: Path) -> DiffusersFolder:
    """Open a diffusers folder, or one component of it. Raises UserError for any other folder, and says what it is."""
    names = sorted(os.listdir(path))
    pipeline = str(_read_json(path / "model_index.json").get("_class_name", ""))
    if "transformer" in names:  # first: Stable Diffusion 3 and Flux have several text encoders as well
        raise UserError(f"{path} is the folder of a diffusion transformer ({pipeline or 'transformer/'}); only SD1.x "
                        "and SD2.x are supported")
    if "text_encoder_2" in names or "XL" in pipeline:
        raise UserError(f"{path} is an SDXL folder ({pipeline or 'text_encoder_2/'}); only SD1.x and SD2.x are "
                        "supported")
    if "Inpaint" in pipeline:
        raise UserError(f"{path} is an inpainting model's folder ({pipeline}), which is not supported; take a "
                        "text-to-image model's")
    places = {component: path / component for component in STEMS if (path / component).is_dir()}
    if places:
        return DiffusersFolder(path, places)
    config = _read_json(path / "config.json")
    listed = config.get("architectures")
    classes = [config.get("_class_name"), *(listed if isinstance(listed, list) else ())]
    own = [component for name, component in CLASSES.items() if name in classes]
    if own:
        return DiffusersFolder(path, {own[0]: path})
    if "adapter_config.json" in names or any("lora" in name and name.endswith(".safetensors") for name in names):
        raise UserError(f"{path} holds a LoRA, not a base model ({WHOLE}): give its file as --lora_ckpt_path")
    files = [name for name in names if name.endswith((".safetensors", ".ckpt", ".bin", ".pt"))]
    if files:
        raise UserError(f"{path} is a folder, but no diffusers folder ({WHOLE}): name the file, such as "
                        f"{path / files[0]}")
    raise UserError(f"{path} {'is an empty folder' if not names else 'holds no checkpoint'}: {WHOLE}")


def _open_shards(index: Path) -> list[Checkpoint]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map: fetch it again")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"{index} names {file!r}, which is no file beside it: fetch it again")
    shards = [open_checkpoint(index.parent / file) for file in sorted(set(weight_map.values()))]
    found = {name: shard.path.name for shard in shards for name in shard}
    if found != weight_map:
        wrong = sorted(name for name in found.keys() | weight_map.keys() if found.get(name) != weight_map.get(name))
        raise UserError(f"{index} and its files do not agree on {len(wrong)} arrays, such as {wrong[0]}: fetch them "
                        "again")
    return shards


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # of JSON, of UTF-8; a thousand brackets
        raise UserError(f"{path} is not JSON ({error}): fetch it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}, not settings: fetch it again")
    return content
