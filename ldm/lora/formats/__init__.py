"""LoRA files: one module a format, each with detect(names), read(checkpoint, base) and write(path, state, base, dtype).

A file is told by its keys. Everything is read into ldm.lora.lora and written from there.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable, Optional, Union

import numpy as np

from ldm.errors import UserError, plain
from ldm.files.inputs import is_file, is_folder, is_there, list_folder
from ldm.lora.formats import cloneofsimo, diffusers, kohya, mindone, pairs, peft
from ldm.lora.formats.modules import BaseModules, fitting, known_bases
from ldm.lora.lora import LoRA
from ldm.settings.model import ModelConfig
from ldm.weights.checkpoint import Checkpoint
from ldm.weights.recognise import describe_non_lora, unsupported_lora

DTYPES = ("fp32", "fp16", "bf16")
DIFFUSERS_FILES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")

FP32_END = float(np.finfo(np.float32).max)

log = logging.getLogger(__name__)

Detect = Callable[[list[str]], Union[bool, str, None]]
Read = Callable[[Checkpoint, Optional[BaseModules]], LoRA]
Write = Callable[[Path, LoRA, BaseModules, str], None]


@dataclass(frozen=True)
class Format:
    """A kind of file. detect: whether these are the names of one. suffixes: of what is written, () for a folder."""

    about: str
    suffixes: tuple[str, ...]
    detect: Callable[[list[str]], bool]
    read: Read
    write: Write


def _form(detect: Detect, name: str) -> Callable[[list[str]], bool]:
    return lambda names: detect(names) == name


FORMATS: dict[str, Format] = {
    "mindone": Format("this project's own, and mindone's", (".ckpt", ".safetensors"), mindone.detect,
                      lambda checkpoint, base: mindone.read(checkpoint),
                      lambda path, state, base, dtype: mindone.write(path, state, dtype)),
    "kohya": Format("kohya's sd-scripts, A1111, ComfyUI", (".safetensors",), kohya.detect, kohya.read, kohya.write),
    **{
        name: Format(about, (".safetensors",), _form(diffusers.detect, name), diffusers.read,
                     partial(diffusers.write, name=name))
        for name, about in zip(
            diffusers.NAMES,
            ("diffusers today", "diffusers before PEFT", "diffusers, earlier", "diffusers, the UNet's attention"),
        )
    },
    "peft": Format("PEFT: a folder with adapter_config.json", (), peft.detect, peft.read, peft.write),
    "cloneofsimo": Format("cloneofsimo's lora", (".safetensors",), _form(cloneofsimo.detect, "cloneofsimo"),
                          cloneofsimo.read, cloneofsimo.write),
    "cloneofsimo-pt": Format("cloneofsimo's lora, first form", (".pt",), _form(cloneofsimo.detect, "cloneofsimo-pt"),
                             cloneofsimo.read_list, cloneofsimo.write_list),
}  # fmt: skip


def lora_files(path: str | os.PathLike) -> list[Path]:
    """The files with factors that `path` stands for: itself, or those in a folder of PEFT's or diffusers'.

    Raises UserError for a folder that is neither.
    """
    path = Path(path)
    if not is_folder(path, "the LoRA"):
        return [path]
    list_folder(path, "the LoRA")  # one that may not be read is told from one without a LoRA in it
    found = peft.files(path) or [path / name for name in DIFFUSERS_FILES if is_there(path / name)][:1]
    if not found:
        raise UserError(
            f"{path} is a folder without a LoRA in it: neither {peft.CONFIG} with {peft.WEIGHTS[0]} (also in unet/ and "
            f"text_encoder/) nor {DIFFUSERS_FILES[0]}; name the file"
        )
    return found


def detect_format(path: str | os.PathLike) -> str:
    """A key of FORMATS. Raises UserError if the file cannot be read or is something else, which it says."""
    return _opened(lora_files(path)[0])[0]


def read_lora(path: str | os.PathLike, config: ModelConfig | None = None) -> LoRA:
    """Read a LoRA of any known format, told by its keys; all-zero updates are warned of.

    Args:
        path: a file, or a folder of PEFT's (one network's, or with subfolders unet and text_encoder) or diffusers'.
        config: of the base that it is for; None for SD1.x, SD2.x or the embedded model, told by its shapes. A LoRA of
            other shapes than `config`'s is not refused here but by merge_lora.

    Raises:
        UserError: it cannot be read, is something else (which is said), does not fit, or holds values that are not
            finite.
    """
    base = BaseModules(config) if config else None
    state = LoRA({})
    for file in lora_files(path):
        name, checkpoint = _opened(file)
        part = FORMATS[name].read(checkpoint, base)
        twice = state.layers.keys() & part.layers.keys()
        if twice:
            raise UserError(f"{path}: {plain(min(twice))} is in two of its files: take one of them out")
        state.layers.update(part.layers)
        state.metadata.update(part.metadata)
    for name, layer in state.layers.items():
        if not (np.isfinite(layer.down).all() and np.isfinite(layer.up).all() and np.isfinite(layer.alpha)):
            raise UserError(f"{path}: {plain(name)} holds values that are not finite: its training went wrong")
        if not layer.largest() < FP32_END:
            raise UserError(
                f"{path}: the update of {plain(name)}, with alpha {layer.alpha:g}, goes beyond what fp32 holds: its "
                "training went wrong, or the file is damaged"
            )
    zeros = zero_layers(state)
    if len(zeros) == len(state.layers):
        log.warning("%s: the updates of all its %d layers are zero: it changes nothing", path, len(zeros))
    elif zeros:
        log.info("%s: the updates of %d of its %d layers are zero", path, len(zeros), len(state.layers))
    return state


def write_lora(
    path: str | os.PathLike,
    state: LoRA,
    format: str = "mindone",
    config: ModelConfig | None = None,
    dtype: str = "fp32",
) -> None:
    """Write one of FORMATS, by default this project's own.

    Args:
        config: of the base that it is for, which tells the layers' names; None for a known base, told by what the state
            says of itself and by its shapes. This project's own format needs none.
        dtype: of the factors, one of DTYPES.

    Raises:
        UserError: no layers, an unknown format or dtype, a suffix or folder that is not the format's, layers that are
            not the base's or have no place in the format, values that fp16 does not hold, or a disk that refuses.
    """
    if format not in FORMATS or dtype not in DTYPES:
        raise UserError(
            f"{path}: {format} in {dtype} is not written: choose of {', '.join(FORMATS)}; {', '.join(DTYPES)}"
        )
    path, kind = Path(path), FORMATS[format]
    if not state.layers:
        raise UserError(f"{path}: the LoRA has no layers, there is nothing to write")
    check_lora_name(path, format)
    if format == "mindone":
        kind.write(path, state, None, dtype)
        return
    base = base_of(state, config, str(path))
    layers = {name: pairs.conformed(layer, base.by_name[name].shape) for name, layer in state.layers.items()}
    kind.write(path, LoRA(layers, state.metadata), base, dtype)


def check_lora_name(path: str | os.PathLike, format: str) -> None:
    """Raise UserError for a suffix, or a file, that is not of the format."""
    path, kind = Path(path), FORMATS[format]
    if kind.suffixes and path.suffix not in kind.suffixes:
        raise UserError(f"{path}: {format} is written as {' or '.join(kind.suffixes)}: name it so")
    if not kind.suffixes and (is_file(path) or path.suffix in (".safetensors", ".ckpt", ".pt", ".bin")):
        raise UserError(f"{path}: {format} is written as a folder: give its name, without {path.suffix or 'that file'}")


def base_of(state: LoRA, config: ModelConfig | None = None, path: str = "the LoRA") -> BaseModules:
    """The base whose layers these are: that of `config`, or the first known one. Raises UserError if they are not."""
    bases = (BaseModules(config),) if config else known_bases()
    found = fitting(state, bases)
    if not found:
        reasons = "; ".join(f"{base.label}: {base.why_not(state)}" for base in bases)
        raise UserError(f"{path} does not fit {reasons}. Give the model YAML that it was made for")
    return found[0]


def zero_layers(state: LoRA) -> list[str]:
    """The layers whose update is nothing."""
    return [name for name, layer in state.layers.items() if not (layer.alpha and layer.up.any() and layer.down.any())]


def _opened(path: Path) -> tuple[str, Checkpoint]:
    checkpoint = pairs.open_lora(path)
    names = list(checkpoint)
    found = next((name for name, format in FORMATS.items() if format.detect(names)), None)
    if found is None:
        raise UserError(f"{path} is {describe_non_lora(checkpoint)}")
    unsupported = unsupported_lora(names, checkpoint.metadata)
    if unsupported is not None:
        raise UserError(f"{path} is {unsupported}")
    return found, checkpoint
