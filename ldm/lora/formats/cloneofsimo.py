"""cloneofsimo's lora: factors by number, in the order in which diffusers registers the layers of certain classes.

    unet:0:up, unet:0:down, unet:1:up, ..., text_encoder:0:up, ...

The metadata of a .safetensors lists the classes of each network as `unet` and `text_encoder`. Learned tokens lie beside
the factors as `<name>`. A .pt is a list of up and down in turn, for the UNet alone and without the classes. The text
encoder's list is in `<stem>.text_encoder.pt` beside it. There is no alpha: it is multiplied into `up`. A file has all
layers of its classes, so those without a LoRA are written as zeros.

diffusers first registered the feed-forward of a transformer block before its second attention, and now does so after
it. Published files have the first order, and it is the one that is written. Shapes tell which order a file has. They
tell the layers too where the classes are missing or unknown: transformers once renamed its attention, and other
programs may use other names.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ldm.errors import UserError, plain
from ldm.files.documents import parse_json
from ldm.files.inputs import is_there
from ldm.lora.formats.factors import (
    check_pair,
    fold_alpha,
    open_lora,
    read_factors,
    to_dtype,
    warn_of_left_out_tokens,
    without_extras,
    write_factors,
)
from ldm.lora.formats.modules import BaseModules, Module, known_bases
from ldm.lora.lora import LoRA, lora_metadata
from ldm.lora.updates import LoRALayer
from ldm.textual_inversion.formats import is_cloneofsimo_token, learned_tokens
from ldm.weights.checkpoint import Checkpoint
from ldm.weights.file_formats.torch_writer import write_torch
from ldm.weights.names import LABELS, same_up_to_1x1

COMPONENTS = ("unet", "text_encoder")
# Classes of diffusers and transformers, and what the names of the layers within them contain.
CLASSES = {
    "unet": {
        "CrossAttention": r"\.attn[12]\.",  # the first name in diffusers
        "Attention": r"\.attn[12]\.",
        "GEGLU": r"\.ff\.net\.0\.",
        "FeedForward": r"\.ff\.",
        "BasicTransformerBlock": r"\.transformer_blocks\.",
        "Transformer2DModel": r"\.attentions\.",
        "ResnetBlock2D": r"\.resnets\.",
        "Downsample2D": r"\.downsamplers\.",
        "Upsample2D": r"\.upsamplers\.",
        "TimestepEmbedding": r"time_embedding\.",
    },
    "text_encoder": {
        "CLIPAttention": r"\.self_attn\.",
        "CLIPSdpaAttention": r"\.self_attn\.",  # two other names in transformers of 2024
        "CLIPFlashAttention2": r"\.self_attn\.",
        "CLIPMLP": r"\.mlp\.",
        "CLIPEncoderLayer": r"\.layers\.",
    },
}
# Classes that a file that does not list them may have been made from. Writing uses the first choice that holds all.
CHOICES = {
    "unet": (
        ("CrossAttention", "Attention"),
        ("CrossAttention", "Attention", "GEGLU"),
        ("ResnetBlock2D", "CrossAttention", "Attention", "GEGLU"),
        ("CrossAttention", "Attention", "FeedForward"),
        ("ResnetBlock2D", "CrossAttention", "Attention", "FeedForward"),
        ("Transformer2DModel",),
        ("ResnetBlock2D", "Transformer2DModel"),
        ("ResnetBlock2D", "Transformer2DModel", "Downsample2D", "Upsample2D"),
        ("ResnetBlock2D", "Transformer2DModel", "Downsample2D", "Upsample2D", "TimestepEmbedding"),
    ),
    "text_encoder": (("CLIPAttention",), ("CLIPAttention", "CLIPMLP")),
}
_KEY = re.compile(r"(unet|text_encoder):(0|[1-9][0-9]{0,6}):(up|down)\Z")
_NUMBER = re.compile(r"(0|[1-9][0-9]{0,6})\Z")

log = logging.getLogger(__name__)

Rows = Mapping[str, Sequence[LoRALayer]]  # component -> layers in the file's order
Classes = tuple[str, ...]


def detect(keys: Iterable[str]) -> str | None:
    """Return "cloneofsimo", "cloneofsimo-pt" for keys that are numbers, as of a list, or None."""
    keys = list(keys)
    if any(_KEY.match(key) for key in keys):
        return "cloneofsimo"
    return "cloneofsimo-pt" if keys and all(_NUMBER.match(key) for key in keys) else None


def read(checkpoint: Checkpoint, base: BaseModules | None = None) -> LoRA:
    """Read an opened .safetensors.

    Raises:
        UserError: A number or half of a pair is missing, a key is unknown, or the factors are not those of the listed
            classes in any known base model, or in `base`. Where the classes are unknown or missing: the factors are in
            no known order, or in two of them.
    """
    path = checkpoint.path
    keys: dict[str, dict[int, dict[str, str]]] = {}
    others = []
    for key in checkpoint:
        match = _KEY.match(key)
        if match:
            component, index, factor = match.groups()
            keys.setdefault(component, {}).setdefault(int(index), {})[factor] = key
        elif not is_cloneofsimo_token(key):
            others.append(key)
    others = without_extras(others)
    if others:
        raise UserError(
            f"{path}: {plain(others[0])} belongs to nothing in a LoRA of cloneofsimo's: is the file damaged?"
        )
    rows = {component: _read_row(checkpoint, component, numbered) for component, numbered in keys.items()}
    listed = {component: _listed_classes(checkpoint, component) for component in rows}
    choices = {component: _choices(component, classes) for component, classes in listed.items()}
    bases = (base,) if base else known_bases()
    layers = _assign(path, rows, choices, bases)
    if layers is None:
        counts = ", ".join(f"{len(row)} layers of the {LABELS[component]}" for component, row in rows.items())
        names = ", ".join(name for classes in listed.values() for name in classes or ("classes that are not listed",))
        raise UserError(
            f"{path}: its {counts} ({plain(names)}) are not those of {_labels(bases)}: it was made for another model, "
            "or saved again by another program"
        )
    embeddings = {token: vector.reshape(1, -1) for token, vector in learned_tokens(checkpoint).items()}
    return LoRA(layers, lora_metadata(checkpoint.metadata), embeddings)


def read_list(checkpoint: Checkpoint, base: BaseModules | None = None) -> LoRA:
    """Read an opened .pt, and the text encoder's .pt beside it if there is one. Raises UserError as `read`."""
    path = Path(checkpoint.path)
    text_encoder = text_encoder_path(path)
    rows = {"text_encoder" if path.name.endswith(".text_encoder.pt") else "unet": _read_list_row(checkpoint)}
    if is_there(text_encoder):
        log.info("%s: its text encoder is %s", path, text_encoder.name)
        rows["text_encoder"] = _read_list_row(open_lora(text_encoder))
    choices = {component: _choices(component, None) for component in COMPONENTS}
    bases = (base,) if base else known_bases()
    layers = _assign(path, rows, choices, bases)
    if layers is None and len(rows) == 1:  # the file of a text encoder may have been renamed
        ((component, row),) = rows.items()
        layers = _assign(path, {other: row for other in COMPONENTS if other != component}, choices, bases)
    if layers is None:
        counts = " and ".join(f"{len(row)} pairs for the {LABELS[component]}" for component, row in rows.items())
        raise UserError(
            f"{path}: its {counts} are in no order of layers of {_labels(bases)} that cloneofsimo's lora knows"
        )
    return LoRA(layers, {})


def write(path: str | os.PathLike, lora: LoRA, base: BaseModules, dtype: str = "fp32") -> None:
    """Write a .safetensors.

    Raises:
        UserError: There are layers in no class (the UNet's first and last convolution), layers that are no pairs of
            factors, or learned tokens of several vectors.
    """
    arrays, metadata = _token_arrays(path, lora), dict(lora.metadata)
    for component, (classes, row) in _rows_to_write(path, lora, base).items():
        metadata[component] = json.dumps(classes)
        for i, layer in enumerate(row):
            arrays[f"{component}:{i}:up"], arrays[f"{component}:{i}:down"] = layer.up, layer.down
            metadata[f"{component}:{i}:rank"] = str(layer.rank)
    write_factors(path, arrays, metadata, dtype)


def text_encoder_path(path: Path) -> Path:
    """Return the path of the text encoder's .pt beside the UNet's."""
    return path.with_name(f"{path.stem}.text_encoder.pt")


def write_list(path: str | os.PathLike, lora: LoRA, base: BaseModules, dtype: str = "fp32") -> None:
    """Write a .pt for the UNet and `<stem>.text_encoder.pt` beside it, as far as the LoRA has layers of them.

    Raises:
        UserError: As for `write`, and if a text encoder's file is there already, which belongs to another LoRA.
    """
    path = Path(path)
    text_encoder = text_encoder_path(path)
    warn_of_left_out_tokens(path, lora, "cloneofsimo-pt")
    rows = _rows_to_write(path, lora, base)
    if os.path.lexists(text_encoder):
        raise UserError(
            f"{path}: {text_encoder.name} is beside it and would be read as its text encoder, or replaced: move it away"
        )
    for component, (_, row) in rows.items():
        arrays = [array for layer in row for array in (layer.up, layer.down)]
        write_torch(
            path if component == "unet" else text_encoder,
            [to_dtype(array, dtype, f"{path}: array {i}") for i, array in enumerate(arrays)],
        )
    if "text_encoder" in rows:
        log.info("%s: its text encoder is %s", path, text_encoder.name)


def in_order(modules: Sequence[Module], classes: Iterable[str], component: str, early: bool = True) -> list[Module]:
    """Return the modules of a component within some classes, in the order of cloneofsimo's lora.

    `modules` are all of the component's in diffusers' present order. `early` returns them in diffusers' first order,
    with the feed-forward between the two attentions.
    """
    patterns = [CLASSES[component][name] for name in classes]
    chosen = [module for module in modules if any(re.search(pattern, module.path) for pattern in patterns)]
    if not early:
        return chosen
    order_in_block = {"attn1": 0, "ff": 1, "attn2": 2}
    block_start: dict[str, int] = {}

    def position(item: tuple[int, Module]) -> tuple[int, int]:
        index, module = item
        match = re.match(r"(.+\.transformer_blocks\.\d+)\.(\w+)\.", module.path)
        if match is None:
            return index, 0
        return block_start.setdefault(match.group(1), index), order_in_block[match.group(2)]

    return [module for _, module in sorted(enumerate(chosen), key=position)]


def _token_arrays(path: str | os.PathLike, lora: LoRA) -> dict[str, np.ndarray]:
    """Return the learned tokens as `<name>` -> vector (channels,), which is all that this format holds."""
    arrays = {}
    for name, vectors in lora.embeddings.items():
        if len(vectors) > 1:
            raise UserError(
                f"{path}: the learned token {plain(name)} has {len(vectors)} vectors, cloneofsimo's have one: write "
                "kohya"
            )
        arrays[name if is_cloneofsimo_token(name) else f"<{name}>"] = vectors[0]
    return arrays


def _read_row(checkpoint: Checkpoint, component: str, keys: Mapping[int, Mapping[str, str]]) -> list[LoRALayer]:
    """Read a component's layers by number."""
    path = checkpoint.path
    missing = next((i for i in range(max(keys) + 1) if i not in keys), None)
    if missing is not None:
        raise UserError(f"{path}: {component}:{missing} is missing, its layers go by number: the file is damaged")
    for index, factors in keys.items():
        check_pair(path, f"{component}:{index}", factors, ("up", "down"))
    return [read_factors(checkpoint, f"{component}:{i}", keys[i]["down"], keys[i]["up"]) for i in range(len(keys))]


def _read_list_row(checkpoint: Checkpoint) -> list[LoRALayer]:
    """Read the layers of a list: up and down in turn."""
    count = len(checkpoint)
    if count % 2:
        raise UserError(f"{checkpoint.path}: a list of {count} tensors, up and down in turn: half of a pair is missing")
    missing = next((i for i in range(count) if str(i) not in checkpoint), None)
    if missing is not None:
        raise UserError(f"{checkpoint.path}: its arrays go by number, and {missing} is missing: the file is damaged")
    return [read_factors(checkpoint, f"pair {i // 2}", down=str(i + 1), up=str(i)) for i in range(0, count, 2)]


def _listed_classes(checkpoint: Checkpoint, component: str) -> list[str] | None:
    """Return the classes that the metadata lists for a component, or None if it lists none."""
    text = checkpoint.metadata.get(component)
    if text is None:
        return None
    classes = parse_json(text, f"{checkpoint.path}: its text {component}")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UserError(f"{checkpoint.path}: its text {component} is {plain(text, 60)!r}, no list of classes")
    return classes


def _choices(component: str, listed: list[str] | None) -> tuple[Classes, ...]:
    """Return the classes that a component may have been made from.

    Those that are listed, or if not all of them are known, every usual choice and every single class.
    """
    if listed is not None and set(listed) <= CLASSES[component].keys():
        return (tuple(listed),)
    return CHOICES[component] + tuple((name,) for name in CLASSES[component])


def _assign(
    path: Path, rows: Rows, choices: Mapping[str, Iterable[Classes]], bases: Iterable[BaseModules]
) -> dict[str, LoRALayer] | None:
    """Return the layers of all components by canonical name, in the first base model that has all. None if none has."""
    for base in bases:
        layers: dict[str, LoRALayer] = {}
        for component, row in rows.items():
            part = _assign_component(path, row, component, choices[component], base)
            if part is None:
                break
            layers.update(part)
        else:
            return layers
    return None


def _assign_component(
    path: Path, row: Sequence[LoRALayer], component: str, choices: Iterable[Classes], base: BaseModules
) -> dict[str, LoRALayer] | None:
    """Return layers by canonical name, in the classes and the order whose shapes are those of `row`. None if none are.

    Raises:
        UserError: Two choices have the shapes and give the layers different names.
    """
    axes = {layer.down.ndim for layer in row}
    found: dict[tuple[Module, ...], Classes] = {}
    for classes in choices:
        for early in (True, False):
            ordered = in_order(base.of_component(component), classes, component, early)
            # A file without convolutions leaves out those of its classes, and a file without linear layers likewise.
            modules = tuple(module for module in ordered if len(module.shape) in axes)
            if len(modules) == len(row) and all(same_up_to_1x1(a.shape, b.shape) for a, b in zip(row, modules)):
                found.setdefault(modules, classes)
    if len(found) > 1:
        first, second = (" and ".join(classes) for classes in list(found.values())[:2])
        raise UserError(
            f"{path}: its {len(row)} layers of the {LABELS[component]} may be those of {first} or of {second}, and "
            "nothing in it tells which: take a file that lists its classes, or a LoRA in another format"
        )
    for modules in found:
        return {module.name: layer.reshaped(module.shape) for layer, module in zip(row, modules)}
    return None


def _labels(bases: Iterable[BaseModules]) -> str:
    return " or ".join(base.label for base in bases)


def _rows_to_write(
    path: str | os.PathLike, lora: LoRA, base: BaseModules
) -> dict[str, tuple[Classes, list[LoRALayer]]]:
    """Return component -> (classes, layers in order), with zeros for the layers that are not in `lora`."""
    pairs = lora.pairs(str(path))
    rows: dict[str, tuple[Classes, list[LoRALayer]]] = {}
    for component in COMPONENTS:
        all_modules = base.of_component(component)
        present = {module for module in all_modules if module.name in pairs}
        if not present:
            continue
        choices = {classes: in_order(all_modules, classes, component) for classes in CHOICES[component]}
        classes = next((classes for classes, modules in choices.items() if present <= set(modules)), None)
        if classes is None:
            largest = list(choices.values())[-1]
            outside = next(module for module in all_modules if module in present and module not in largest)
            raise UserError(f"{path}: cloneofsimo's lora has no place for {outside.path}: write another format")
        axes = {len(module.shape) for module in present}
        modules = [module for module in choices[classes] if len(module.shape) in axes]
        zeros = len(modules) - len(present)
        if zeros:
            log.info("%s: %d layers of the %s without a LoRA are written as zeros", path, zeros, LABELS[component])
        rank = max(lora.only(component).ranks())
        rows[component] = (classes, [
            fold_alpha(pairs[module.name]) if module in present else _zero_layer(module, rank)
            for module in modules
        ])  # fmt: skip
    return rows


def _zero_layer(module: Module, rank: int) -> LoRALayer:
    rank = min(rank, module.shape[0])
    down, up = (rank, *module.shape[1:]), (module.shape[0], rank, *(1,) * (len(module.shape) - 2))
    return LoRALayer(np.zeros(down, np.float32), np.zeros(up, np.float32), float(rank))
