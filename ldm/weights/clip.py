"""Read the weights of CLIP, both towers, from files with the names of Hugging Face, OpenAI, OpenCLIP or mindone."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Tensor

from ldm.errors import UserError, plain
from ldm.files.documents import read_yaml
from ldm.files.inputs import is_file, is_folder
from ldm.models.clip import CLIP_MODELS, CLIPModel
from ldm.models.initial_values import no_init_weights
from ldm.tokenizer import CONTEXT_LENGTH, VOCABULARY_SIZE
from ldm.weights.arrays import Checkpoint, require_arrays
from ldm.weights.checkpoint import open_checkpoint
from ldm.weights.names.clip import TEXT, TRANSPOSED, VISION, map_key

_HUGGING_FACE = {
    "openai/clip-vit-base-patch32": "ViT-B/32", "openai/clip-vit-base-patch16": "ViT-B/16",
    "openai/clip-vit-large-patch14": "ViT-L/14", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": "ViT-H/14",
}  # fmt: skip
MODEL_NAMES = (*(name for name in CLIP_MODELS if name != "nano"), *_HUGGING_FACE)


@dataclass(frozen=True)
class ClipWeights:
    """The weights of a CLIP.

    Attributes:
        arrays: Name (Hugging Face's) -> array.
        arguments: Arguments of CLIPModel that the arrays fit.
        name: Name of the model, for reports.
        path: File that the arrays come from.
    """

    arrays: dict[str, np.ndarray]
    arguments: dict[str, Any]
    name: str
    path: Path


def read_clip(
    path: str | os.PathLike, config_path: str | os.PathLike | None = None, model_name: str | None = None
) -> ClipWeights:
    """Read a CLIP with both towers.

    The arrays show its sizes. Its number of heads and its activation are those of the first of: `config_path`, a
    config.json beside the weights, `model_name`, the published model with the same sizes.

    Args:
        path: A Hugging Face folder or a file.
        config_path: A Hugging Face config.json or mindone's YAML.
        model_name: One of MODEL_NAMES.

    Raises:
        UserError: The file is not a whole CLIP, or its heads and activation are not known.
    """
    path = Path(path)
    file = _weights_of_folder(path) if is_folder(path) else path
    if config_path is None and is_file(file.parent / "config.json"):
        config_path = file.parent / "config.json"
    arrays = _read_arrays(open_checkpoint(file))
    sizes = _sizes(file, arrays)
    known = next((name for name, arguments in CLIP_MODELS.items() if _same_sizes(arguments, sizes)), None)
    if model_name is not None:
        if model_name not in MODEL_NAMES:
            raise UserError(f"model_name {model_name} is unknown: choose from {', '.join(MODEL_NAMES)}")
        wanted = _HUGGING_FACE.get(model_name, model_name)
        if not _same_sizes(CLIP_MODELS[wanted], sizes):
            raise UserError(f"{file} is not {model_name}: it has the sizes of {known or 'another model'}")
    if config_path is not None:
        arguments = _configured(Path(config_path), sizes)
    elif known:
        arguments = CLIP_MODELS[known]
    else:
        raise UserError(
            f"{file}: its sizes are not those of a known model, so its heads and activation are not known: give "
            "--config with its config.json"
        )
    for tower in ("text", "vision"):
        sizes[tower].update(num_heads=arguments[tower]["num_heads"], activation=arguments[tower]["activation"])
    activation = sizes["vision"]["activation"]
    return ClipWeights(arrays, sizes, f"CLIP {known or 'of other sizes'} ({activation})", file)


def build_clip(weights: ClipWeights) -> CLIPModel:
    """Build the network for scoring. Raises UserError unless the arrays are exactly its parameters."""
    with no_init_weights():
        clip = CLIPModel(**weights.arguments)
    parameters = clip.parameters_dict()
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    for name, array in require_arrays(weights.arrays, shapes, weights.path, "a whole CLIP").items():
        parameters[name].set_data(Tensor(array.astype(np.float32)))
    clip.set_train(False)
    return clip


def _weights_of_folder(folder: Path) -> Path:
    stems = ("model.safetensors", "pytorch_model.bin")
    names = (*stems, "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
    for name in names:
        if is_file(folder / name):
            return folder / name
    raise UserError(f"{folder} holds no CLIP weights: it should hold one of {', '.join(names)}")


def _read_arrays(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Read all arrays under Hugging Face's names. Raises UserError for names of anything else."""
    arrays: dict[str, np.ndarray] = {}
    unknown = []
    if any(key.startswith((TEXT, VISION)) for key in checkpoint):
        arrays = {key: checkpoint[key] for key in checkpoint if not key.endswith("position_ids")}
        known = (TEXT, VISION, "visual_projection.", "text_projection.", "logit_scale")
        unknown = [key for key in arrays if not key.startswith(known)]
    else:
        for key in checkpoint:
            names = map_key(key)
            if names is None:
                unknown.append(key)
            elif isinstance(names, tuple):
                array = checkpoint[key].T if key in TRANSPOSED else checkpoint[key]
                # Rows that cannot be divided are left whole, so that the check of the shapes names them.
                is_divisible = array.ndim and array.shape[0] % len(names) == 0
                blocks = np.split(array, len(names)) if is_divisible else [array] * len(names)
                arrays.update(zip(names, blocks))
    if unknown:
        raise UserError(
            f"{checkpoint.path} is not a CLIP: {len(unknown)} of {len(checkpoint)} names are unknown "
            f"({plain(unknown[0])}, ...)"
        )
    return arrays


def _sizes(file: Path, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the arguments of CLIPModel that the arrays show."""

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        if name not in arrays or len(arrays[name].shape) != dimensions or not all(arrays[name].shape):
            what = "has no" if name not in arrays else "has a wrong"
            raise UserError(
                f"{file} {what} {name}: a CLIP score needs the whole CLIP, image tower, text tower and projections"
            )
        return arrays[name].shape

    def layers(tower: str) -> int:
        matches = (re.match(rf"{tower}encoder\.layers\.(\d{{1,9}})\.", name) for name in arrays)
        numbers = {int(match.group(1)) for match in matches if match}
        if numbers != set(range(len(numbers))):
            raise UserError(
                f"{file} has {len(numbers)} layers in {tower[:-1]}, but a layer has the number {max(numbers)}: "
                "the file is damaged"
            )
        return len(numbers)

    length = shape(f"{TEXT}embeddings.position_embedding.weight", 2)[0]
    if length != CONTEXT_LENGTH:
        raise UserError(f"{file} reads texts of {length} tokens; CLIP's tokenizer makes {CONTEXT_LENGTH}")
    patch = shape(f"{VISION}embeddings.patch_embedding.weight", 4)
    if patch[1:] != (3, patch[-1], patch[-1]):
        raise UserError(f"{file}: the kernel of the image tower's patches is {patch}, wanted (width, 3, size, size)")
    positions = shape(f"{VISION}embeddings.position_embedding.weight", 2)[0]
    side = math.isqrt(max(positions - 1, 0))
    if side < 1 or side**2 + 1 != positions:
        raise UserError(
            f"{file} has {positions} positions in its image tower, wanted a square number of patches and one more"
        )
    vocabulary, width = shape(f"{TEXT}embeddings.token_embedding.weight", 2)
    if vocabulary < VOCABULARY_SIZE:
        raise UserError(f"{file} knows {vocabulary:,} tokens; CLIP's tokenizer makes {VOCABULARY_SIZE:,}")
    return {
        "text": {"width": width, "num_layers": layers(TEXT), "vocab_size": vocabulary},
        "vision": {
            "width": patch[0],
            "num_layers": layers(VISION),
            "patch_size": patch[-1],
            "image_size": side * patch[-1],
        },
        "projection_dim": shape("visual_projection.weight", 2)[0],
    }


def _same_sizes(arguments: dict[str, Any], sizes: dict[str, Any]) -> bool:
    shown = ("width", "num_layers", "patch_size", "image_size")
    return arguments["projection_dim"] == sizes["projection_dim"] and all(
        arguments[tower][key] == sizes[tower][key]
        for tower in ("text", "vision")
        for key in shown
        if key in arguments[tower]
    )


def _configured(path: Path, sizes: dict[str, Any]) -> dict[str, Any]:
    """Read the heads and the activation of both towers from a configuration. Defaults are those of Hugging Face."""
    content = read_yaml(path, way="give the model's config.json, or leave --config out")
    towers = {}
    for tower, heads in (("text", 8), ("vision", 12)):
        section = content.get(f"{tower}_config") if isinstance(content, dict) else None
        if not isinstance(section, dict):
            raise UserError(f"{path} has no {tower}_config: it is not the configuration of a CLIP")
        heads, activation = section.get("num_attention_heads", heads), section.get("hidden_act", "quick_gelu")
        for key, size in (("hidden_size", "width"), ("num_hidden_layers", "num_layers")):
            if section.get(key, sizes[tower][size]) != sizes[tower][size]:
                raise UserError(
                    f"{path}: {tower}_config.{key} is {plain(section[key], 60)}, but that of the weights is "
                    f"{sizes[tower][size]}: they do not belong together, or the weights are cut off"
                )
        if type(heads) is not int or heads < 1 or sizes[tower]["width"] % heads:
            raise UserError(
                f"{path}: {tower}_config.num_attention_heads is {plain(repr(heads), 60)}, which does not "
                f"divide the width {sizes[tower]['width']}"
            )
        if activation not in ("quick_gelu", "gelu"):
            raise UserError(
                f"{path}: {tower}_config.hidden_act is {plain(repr(activation), 60)}; CLIP has quick_gelu or gelu"
            )
        towers[tower] = {"num_heads": heads, "activation": activation}
    return towers
