"""Open diffusers folders: unet/, vae/ and text_encoder/, each with a config.json and its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldm.errors import UserError, plain
from ldm.files.documents import read_json
from ldm.files.inputs import is_file, is_folder, is_there, list_folder, read_text
from ldm.weights.added_tokens import read_tokenizer_tokens, tokens_metadata
from ldm.weights.arrays import Checkpoint, CheckpointView
from ldm.weights.checkpoint import open_checkpoint
from ldm.weights.recognise import unsupported_folder

_DIFFUSERS_STEMS = ("diffusion_pytorch_model", "diffusion_pytorch_model")
# Component -> stems of its weights as .safetensors and as PyTorch's .bin.
STEMS = {"unet": _DIFFUSERS_STEMS, "vae": _DIFFUSERS_STEMS, "text_encoder": ("model", "pytorch_model")}
# What follows the stem in names of files, in the order of preference: full precision first. Published files without a
# variant and those in half precision hold moving averages. The weights that were averaged (non_ema) come last.
VARIANTS = ("", ".fp32", ".ema", ".fp16", ".bf16", ".non_ema")
CLASSES = {"UNet2DConditionModel": "unet", "AutoencoderKL": "vae", "CLIPTextModel": "text_encoder"}
WHOLE = "a diffusers folder has unet/, vae/ and text_encoder/"


class DiffusersFolder(CheckpointView):
    """The weights of a folder under the names `component/name`.

    Attributes:
        folders: Component -> its folder.
        files: Files that the weights come from.
        variants: Component -> variant of its files.
        notes: What a user should know about the choice of the files.
        has_averages: Whether the weights of the UNet are known to be moving averages.
        metadata: The prediction type of the scheduler and the tokens that the tokenizer adds, if there are any.
    """

    format = "diffusers"

    def __init__(self, path: Path, folders: dict[str, Path]):
        self.path = path
        self.folders = folders
        self.files: list[Path] = []
        self.variants: dict[str, str] = {}
        self.notes: list[str] = []
        self.has_averages = False
        self.sources = {}
        for component, folder in folders.items():
            for checkpoint in self._open(component, folder):
                self.files.append(checkpoint.path)
                self.sources.update({f"{component}/{name}": (checkpoint, name) for name in checkpoint})
        prediction_type = self.read_json("scheduler/scheduler_config.json").get("prediction_type")
        self.metadata = {"prediction_type": prediction_type} if isinstance(prediction_type, str) else {}
        if "text_encoder" in folders and path not in folders.values():
            self.metadata.update(tokens_metadata(read_tokenizer_tokens(self.read_json, path)))

    def _open(self, component: str, folder: Path) -> list[Checkpoint]:
        """Open the preferred weights of a component, one file or the shards of an index."""
        names = list_folder(folder)
        listed = [
            (variant, name)
            for variant in VARIANTS
            for stem, suffix in zip(STEMS[component], (".safetensors", ".bin"))
            for name in (
                f"{stem}{variant}{suffix}",
                f"{stem}{suffix}.index{variant}.json",
                f"{stem}{variant}{suffix}.index.json",
            )
            if name in names
        ]
        present = [(variant, name) for variant, name in listed if is_there(folder / name)]
        if not present:
            if listed:
                raise UserError(
                    f"{folder / listed[0][1]} is a link to a missing file: did a download stop? Fetch it again"
                )
            safetensors, torch = STEMS[component]
            shown = ", ".join(plain(name, 60) for name in names[:5]) or "nothing"
            raise UserError(f"{folder} holds no weights ({safetensors}.safetensors or {torch}.bin), but {shown}")
        variant, name = present[0]
        self.variants[component] = variant[1:]
        non_ema = next((other for other_variant, other in present if other_variant == ".non_ema"), None)
        if variant != ".non_ema" and non_ema is not None:
            self.has_averages = self.has_averages or component == "unet"
            self.notes.append(f"{component}/{name} is used, the moving averages (EMA), and not {non_ema} beside it")
        elif variant:
            self.notes.append(f"{component}/{name} is used, the variant {variant[1:]}, as there is no file without one")
        return _open_shards(folder / name) if name.endswith(".json") else [open_checkpoint(folder / name)]

    def config(self, component: str) -> dict[str, Any]:
        """Read the config.json of a component. Empty if there is none."""
        return _read_json(self.folders[component] / "config.json") if component in self.folders else {}

    def read_json(self, name: str) -> dict[str, Any]:
        """Read a file of the folder, such as `scheduler/scheduler_config.json`. Empty if it is missing."""
        return _read_json(self.path / name)


def open_diffusers_folder(path: Path) -> DiffusersFolder:
    """Open a diffusers folder, a folder of one component, or the folder of a model in the Hugging Face hub's cache.

    Raises:
        UserError: It is another folder, or its weights are missing or damaged.
    """
    path = _snapshot(path)
    names = list_folder(path)
    pipeline = plain(_read_json(path / "model_index.json").get("_class_name", ""), 60)
    unsupported = unsupported_folder(names, pipeline)
    if unsupported is not None:
        raise UserError(f"{path} is {unsupported}")
    folders = {component: path / component for component in STEMS if is_folder(path / component)}
    if folders:
        return DiffusersFolder(path, folders)
    config = _read_json(path / "config.json")
    architectures = config.get("architectures")
    classes = [config.get("_class_name"), *(architectures if isinstance(architectures, list) else ())]
    components = [component for name, component in CLASSES.items() if name in classes]
    if components:
        return DiffusersFolder(path, {components[0]: path})
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
    """Return the snapshot in a model's folder of the hub's cache: that of refs/main, or the only one.

    Any other folder is returned as it is. Raises UserError if no snapshot can be chosen, and for the whole cache.
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
    main = path / "refs" / "main"
    revision = read_text(main, most=1000).strip() if is_file(main) else ""
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
    """Open the files that an index names. Raises UserError if the index and the files contradict each other."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map: fetch it again")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"{index} names {plain(repr(file))}, which is no file beside it: fetch it again")
    shards = [open_checkpoint(index.parent / file) for file in sorted(set(weight_map.values()))]
    contained = {name: shard.path.name for shard in shards for name in shard}
    if contained != weight_map:
        names = contained.keys() | weight_map.keys()
        wrong = sorted(name for name in names if contained.get(name) != weight_map.get(name))
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
