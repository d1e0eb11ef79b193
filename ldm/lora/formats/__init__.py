"""LoRA files of every known format. One module reads and writes each format, through a LoRA in memory.

A format's module has `detect(keys)`, which names the format that has such keys, `read(checkpoint, base)` and
`write(path, lora, base, dtype)`. `base` holds the layers of the base model under diffusers' names.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable, Optional

import numpy as np

from ldm.errors import UserError, plain
from ldm.files.inputs import is_file, is_folder, is_there, list_folder
from ldm.lora.formats import cloneofsimo, diffusers, kohya, mindone, peft
from ldm.lora.formats.factors import open_lora, reshape_layer
from ldm.lora.formats.modules import BaseModules, fitting_bases, known_bases
from ldm.lora.lora import LoRA, shared_metadata
from ldm.settings.model import ModelConfig
from ldm.weights.checkpoint import Checkpoint
from ldm.weights.recognise import describe_non_lora, unsupported_lora

DTYPES = ("fp32", "fp16", "bf16")
DIFFUSERS_FILES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
LARGEST_FP32 = float(np.finfo(np.float32).max)

log = logging.getLogger(__name__)

Read = Callable[[Checkpoint, Optional[BaseModules]], LoRA]
Write = Callable[[Path, LoRA, BaseModules, str], None]


@dataclass(frozen=True)
class Format:
    """A format of LoRA files: whose it is, the suffixes of its files (() for a folder), and its functions."""

    about: str
    suffixes: tuple[str, ...]
    read: Read
    write: Write


DETECTORS = (mindone.detect, kohya.detect, diffusers.detect, peft.detect, cloneofsimo.detect)
FORMATS: dict[str, Format] = {
    "mindone": Format("this project's own, and mindone's", (".ckpt", ".safetensors"), mindone.read, mindone.write),
    "kohya": Format("kohya's sd-scripts, A1111, ComfyUI", (".safetensors",), kohya.read, kohya.write),
    **{
        name: Format(about, (".safetensors",), diffusers.read, partial(diffusers.write, name=name))
        for name, about in diffusers.VERSIONS.items()
    },
    "peft": Format("PEFT: a folder with adapter_config.json", (), peft.read, peft.write),
    "cloneofsimo": Format("cloneofsimo's lora", (".safetensors",), cloneofsimo.read, cloneofsimo.write),
    "cloneofsimo-pt": Format("cloneofsimo's lora, first form", (".pt",), cloneofsimo.read_list, cloneofsimo.write_list),
}


def lora_files(path: str | os.PathLike) -> list[Path]:
    """Return the files with factors at `path`: the file itself, or those in a folder of PEFT's or diffusers'.

    Raises:
        UserError: The folder is neither.
    """
    path = Path(path)
    if not is_folder(path, "the LoRA"):
        return [path]
    list_folder(path, "the LoRA")  # tells a folder that may not be read from one without a LoRA
    files = peft.files(path) or [path / name for name in DIFFUSERS_FILES if is_there(path / name)][:1]
    if not files:
        raise UserError(
            f"{path} is a folder without a LoRA in it: neither {peft.CONFIG} with {peft.WEIGHTS[0]} (also in unet/ and "
            f"text_encoder/) nor {DIFFUSERS_FILES[0]}; name the file"
        )
    return files


def detect_format(path: str | os.PathLike) -> str:
    """Return the format of a file or folder, a key of FORMATS.

    Raises:
        UserError: It cannot be read, or is no LoRA that is supported. The error says what it is.
    """
    return _open(lora_files(path)[0])[0]


def read_lora(path: str | os.PathLike, config: ModelConfig | None = None) -> LoRA:
    """Read a LoRA of any known format, which its keys tell. Warns if all updates are zero.

    Args:
        path: A file, or a folder of PEFT's (of one network, or with subfolders unet and text_encoder) or diffusers'.
        config: Configuration of the base model that the LoRA is for. None for SD1.x, SD2.x or the nano model, which the
            shapes tell. Shapes that are not `config`'s are left to merge_lora.

    Raises:
        UserError: It cannot be read, is something else, fits no base model, or holds values that are not finite.
    """
    base = BaseModules(config) if config else None
    lora = LoRA({})
    for file in lora_files(path):
        name, checkpoint = _open(file)
        part = FORMATS[name].read(checkpoint, base)
        duplicates = lora.updates().keys() & part.updates().keys()
        if duplicates:
            raise UserError(f"{path}: {plain(min(duplicates))} is in two of its files: take one of them out")
        lora = LoRA(
            {**lora.layers, **part.layers},
            {**lora.metadata, **part.metadata},
            {**lora.embeddings, **part.embeddings},
            {**lora.biases, **part.biases},
            {**lora.file_metadata, **shared_metadata(checkpoint.metadata)},
        )
    for name, update in lora.updates().items():
        name = name.removesuffix(".weight")
        if not update.is_finite():
            raise UserError(f"{path}: {plain(name)} holds values that are not finite: its training went wrong")
        if not update.largest() < LARGEST_FP32:
            raise UserError(
                f"{path}: the update of {plain(name)} is outside the range of fp32: its training went wrong, or the "
                "file is damaged"
            )
    zeros = lora.zero_layers()
    if all(update.is_zero() for update in lora.updates().values()):
        log.warning("%s: the updates of all its %d layers are zero: it changes nothing", path, len(zeros))
    elif zeros:
        log.info("%s: the updates of %d of its %d layers are zero", path, len(zeros), len(lora.layers))
    return lora


def write_lora(
    path: str | os.PathLike,
    lora: LoRA,
    format: str = "mindone",
    config: ModelConfig | None = None,
    dtype: str = "fp32",
) -> None:
    """Write a LoRA in one of FORMATS.

    Args:
        path: The file to write, or the folder for PEFT.
        lora: The LoRA.
        format: A key of FORMATS.
        config: Configuration of the base model, which tells the layers' names in other formats. None for a known base
            model, which the LoRA's metadata and shapes tell. This project's own format needs none.
        dtype: Type of the factors, one of DTYPES.

    Raises:
        UserError: The LoRA has no layers, the format or dtype is unknown, `path` has not the format's suffix, a layer
            is not the base model's or has no place in the format, fp16 does not hold the values, or the disk refuses.
    """
    if format not in FORMATS or dtype not in DTYPES:
        raise UserError(
            f"{path}: {format} in {dtype} cannot be written: choose one of {', '.join(FORMATS)}, and one of "
            f"{', '.join(DTYPES)}"
        )
    path = Path(path)
    if not lora.updates():
        raise UserError(f"{path}: the LoRA has no layers, there is nothing to write")
    check_lora_name(path, format)
    if format == "mindone":
        mindone.write(path, lora, dtype=dtype)
        return
    base = base_of(lora, config, str(path))
    layers = {name: reshape_layer(layer, base.by_name[name].shape) for name, layer in lora.layers.items()}
    whole = LoRA(layers, lora.metadata, lora.embeddings, lora.biases, lora.file_metadata)
    FORMATS[format].write(path, whole, base, dtype)


def check_lora_name(path: str | os.PathLike, format: str) -> None:
    """Raise UserError if a path has not the suffix of a format, or is a file where the format is a folder."""
    path, suffixes = Path(path), FORMATS[format].suffixes
    if suffixes and path.suffix not in suffixes:
        raise UserError(f"{path}: {format} is written as {' or '.join(suffixes)}: name it so")
    if not suffixes and (is_file(path) or path.suffix in (".safetensors", ".ckpt", ".pt", ".bin")):
        raise UserError(f"{path}: {format} is written as a folder: give its name, without {path.suffix or 'that file'}")


def base_of(lora: LoRA, config: ModelConfig | None = None, path: str = "the LoRA") -> BaseModules:
    """Return the base model that has all layers of a LoRA: that of `config`, or the first known one.

    Raises:
        UserError: There is none.
    """
    bases = (BaseModules(config),) if config else known_bases()
    fitting = fitting_bases(lora, bases)
    if not fitting:
        reasons = "; ".join(f"{base.label}: {base.mismatch(lora)}" for base in bases)
        raise UserError(f"{path} does not fit {reasons}. Give the model YAML that it was made for")
    return fitting[0]


def _open(path: Path) -> tuple[str, Checkpoint]:
    """Open a file. Returns its format and content."""
    checkpoint = open_lora(path)
    keys = list(checkpoint)
    name = next((name for detect in DETECTORS if (name := detect(keys))), None)
    if name is None:
        raise UserError(f"{path} is {describe_non_lora(checkpoint)}")
    unsupported = unsupported_lora(keys, checkpoint.metadata)
    if unsupported is not None:
        raise UserError(f"{path} is {unsupported}")
    return name, checkpoint
