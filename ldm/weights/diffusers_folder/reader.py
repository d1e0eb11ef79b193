"""A diffusers folder: unet/, vae/, text_encoder/, each with a config.json and weights in one file or several."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ldm.errors import UserError, plain
from ldm.files.documents import read_json
from ldm.files.inputs import is_file, is_folder, is_there, list_folder, read_text
from ldm.weights.added_tokens import read_tokenizer_tokens, tokens_metadata
from ldm.weights.arrays import Checkpoint
from ldm.weights.checkpoint import open_checkpoint
from ldm.weights.recognise import unsupported_folder

# Component -> the stems of its weights as .safetensors and as PyTorch's .bin.
STEMS = {
    "unet": ("diffusion_pytorch_model", "diffusion_pytorch_model"),
    "vae": ("diffusion_pytorch_model", "diffusion_pytorch_model"),
    "text_encoder": ("model", "pytorch_model"),
}
# What stands in the names of files beside the stem: full precision first. Published files without a variant and in half
# precision are the moving averages; the weights that they are of come last.
VARIANTS = ("", ".fp32", ".ema", ".fp16", ".bf16", ".non_ema")
CLASSES = {"UNet2DConditionModel": "unet", "AutoencoderKL": "vae", "CLIPTextModel": "text_encoder"}
WHOLE = "a diffusers folder has unet/, vae/ and text_encoder/"


class DiffusersFolder(Checkpoint):
    """The weights of a folder's components as one mapping, under `component/name`; see Checkpoint.

    `files` holds the files that the weights come from, `variants` what is in their names for each component, `notes`
    what a user should know of the choice; `metadata` the scheduler's prediction type and the tokens that the tokenizer
    adds, where there are any.
    """

    format = "diffusers"

    def __init__(self, path: Path, places: dict[str, Path]):
        self.path = path
        self.places = places
        self.files: list[Path] = []
        self.variants: dict[str, str] = {}
        self.notes: list[str] = []
        self.has_averages = False  # whether the UNet's weights are known to be moving averages
        self._arrays: dict[str, tuple[Checkpoint, str]] = {}
        for component, place in places.items():
            for checkpoint in self._open(component, place):
                self.files.append(checkpoint.path)
                self._arrays.update({f"{component}/{name}": (checkpoint, name) for name in checkpoint})
        prediction_type = self.read_json("scheduler/scheduler_config.json").get("prediction_type")
        self.metadata = {"prediction_type": prediction_type} if isinstance(prediction_type, str) else {}
        if "text_encoder" in places and path not in places.values():
            self.metadata.update(tokens_metadata(read_tokenizer_tokens(self.read_json, path)))

    def _open(self, component: str, place: Path) -> list[Checkpoint]:
        names = list_folder(place)
        found = [
            (variant, name)
            for variant in VARIANTS
            # .safetensors before .bin
            for stem, suffix in zip(STEMS[component], (".safetensors", ".bin"))
            for name in (
                f"{stem}{variant}{suffix}",
                f"{stem}{suffix}.index{variant}.json",
                f"{stem}{variant}{suffix}.index.json",
            )
            if name in names
        ]
        there = [(variant, name) for variant, name in found if is_there(place / name)]
        if not there:
            if found:
                raise UserError(
                    f"{place / found[0][1]} is a link to a file that is not there: a download that "
                    "stopped? Fetch it again"
                )
            safe, torch = STEMS[component]
            shown = ", ".join(plain(name, 60) for name in names[:5]) or "nothing"
            raise UserError(f"{place} holds no weights ({safe}.safetensors or {torch}.bin), but {shown}")
        variant, name = there[0]
        self.variants[component] = variant[1:]
        non_ema = next((other for other_variant, other in there if other_variant == ".non_ema"), None)
        if variant != ".non_ema" and non_ema is not None:
            self.has_averages = self.has_averages or component == "unet"
            self.notes.append(f"{component}/{name} is taken, the moving averages (EMA), and not {non_ema} beside it")
        elif variant:
            self.notes.append(f"{component}/{name} is taken, the variant {variant[1:]}, as there is none without")
        return _open_shards(place / name) if name.endswith(".json") else [open_checkpoint(place / name)]

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


def open_diffusers_folder(path: Path) -> DiffusersFolder:
    """Open a diffusers folder, one component of it, or a model's folder in the Hugging Face hub's cache.

    Raises UserError for any other folder, and says what it is.
    """
    path = _snapshot(path)
    names = list_folder(path)
    pipeline = plain(_read_json(path / "model_index.json").get("_class_name", ""), 60)
    unsupported = unsupported_folder(names, pipeline)
    if unsupported is not None:
        raise UserError(f"{path} is {unsupported}")
    places = {component: path / component for component in STEMS if is_folder(path / component)}
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
        raise UserError(
            f"{path} is a folder, but no diffusers folder ({WHOLE}): name the file, such as {path / plain(files[0])}"
        )
    shown = ", ".join(plain(name, 60) for name in names[:3])
    raise UserError(f"{path} {f'holds no checkpoint, but {shown}' if names else 'is an empty folder'}: {WHOLE}")


def _snapshot(path: Path) -> Path:
    """The folder itself; of a model's folder in the hub's cache the snapshot that refs/main names, else the only one.

    Raises UserError where there are several or none, and for the whole cache.
    """
    names = list_folder(path)
    models = [name for name in names if name.startswith("models--")]
    if models and not any(component in names for component in STEMS):
        raise UserError(
            f"{path} is the cache of the Hugging Face hub: name one of its models, such as {path / plain(models[0])}"
        )
    if "snapshots" not in names or not ("refs" in names or "blobs" in names):
        return path
    snapshots = [name for name in list_folder(path / "snapshots") if is_folder(path / "snapshots" / name)]
    reference = path / "refs" / "main"
    revision = read_text(reference, most=1000).strip() if is_file(reference) else ""
    if revision in snapshots:
        return path / "snapshots" / revision
    if len(snapshots) == 1:
        return path / "snapshots" / snapshots[0]
    if not snapshots:
        raise UserError(f"{path} is a model's folder in the hub's cache with an empty snapshots/: download it again")
    shown = ", ".join(plain(name, 60) for name in snapshots[:3])
    raise UserError(
        f"{path} is a model's folder in the hub's cache with {len(snapshots)} snapshots, and refs/main "
        f"names none of them: give one of those in {path / 'snapshots'}, {shown}"
    )


def _open_shards(index: Path) -> list[Checkpoint]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map: fetch it again")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"{index} names {plain(repr(file))}, which is no file beside it: fetch it again")
    shards = [open_checkpoint(index.parent / file) for file in sorted(set(weight_map.values()))]
    found = {name: shard.path.name for shard in shards for name in shard}
    if found != weight_map:
        wrong = sorted(name for name in found.keys() | weight_map.keys() if found.get(name) != weight_map.get(name))
        raise UserError(
            f"{index} and its files do not agree on {len(wrong)} arrays, such as {plain(wrong[0])}: fetch them again"
        )
    return shards


def _read_json(path: Path) -> dict[str, Any]:
    if not is_there(path):
        return {}
    content = read_json(path, way="fetch it again")
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}, not settings: fetch it again")
    return content
