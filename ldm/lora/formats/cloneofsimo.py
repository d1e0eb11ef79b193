"""cloneofsimo's lora: factors by number, in the order in which diffusers registers the layers that it looks into.

A .safetensors has `unet:0:up`, `unet:0:down`, `unet:1:up`, ...; `text_encoder:...` likewise; the texts `unet` and
`text_encoder` list the classes of diffusers whose layers were taken. Learned tokens lie beside them as `<name>`. A .pt
is a list, up and down in turn, of the UNet alone; the text encoder's is in `<stem>.text_encoder.pt` beside it, and the
classes are not noted. There is no alpha: `up` takes it over. A class has all of its layers in the file: those without a
LoRA are written as zeros.

diffusers registered a transformer block's feed-forward before its second attention at first, and does after it now.
Published files have the first order, and so has what is written here; shapes tell which a file has. They tell the
layers too where the classes are missing or have names that are not known here: transformers gave its attention others
for a while, and any program may.
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
from ldm.lora.formats import pairs
from ldm.lora.formats.modules import BaseModules, Module, known_bases
from ldm.lora.lora import LoRA, LoRALayer
from ldm.settings.model import model_metadata
from ldm.weights.checkpoint import Checkpoint
from ldm.weights.file_formats.torch_writer import write_torch
from ldm.weights.names import LABELS, same_up_to_1x1

COMPONENTS = ("unet", "text_encoder")
# diffusers' and transformers' classes, and what the names of the layers within them contain.
CLASSES = {
    "unet": {
        "CrossAttention": r"\.attn[12]\.",  # what diffusers called it at first
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
        "CLIPSdpaAttention": r"\.self_attn\.",  # two names of the same, in transformers of 2024
        "CLIPFlashAttention2": r"\.self_attn\.",
        "CLIPMLP": r"\.mlp\.",
        "CLIPEncoderLayer": r"\.layers\.",
    },
}
# What a file without a note of its classes may have been made from, and what is written: the first that holds all.
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
WIDEST = 1 << 16  # channels of a learned token
_KEY = re.compile(r"(unet|text_encoder):(0|[1-9][0-9]{0,6}):(up|down)\Z")
_PLACE = re.compile(r"(0|[1-9][0-9]{0,6})\Z")

log = logging.getLogger(__name__)


def detect(names: Iterable[str]) -> str | None:
    """The name of the form that these keys have: numbers alone are the places in a list."""
    names = list(names)
    if any(_KEY.match(name) for name in names):
        return "cloneofsimo"
    return "cloneofsimo-pt" if names and all(_PLACE.match(name) for name in names) else None


def read(checkpoint: Checkpoint, base: BaseModules | None = None) -> LoRA:
    """Read an opened .safetensors.

    Raises UserError for gaps in the numbers, half a pair, other keys than learned tokens (which are left out with a
    warning), and factors that are not those of the noted classes in any known base, or in `base`. Where classes are
    not known or not noted: for factors that are in no known order, or in two of them.
    """
    path = checkpoint.path
    factors: dict[str, dict[int, dict[str, str]]] = {}
    tokens, others = [], []
    for key in checkpoint:
        found = _KEY.match(key)
        if found:
            component, index, half = found.groups()
            factors.setdefault(component, {}).setdefault(int(index), {})[half] = key
        elif _is_token(key):
            tokens.append(key)
        else:
            others.append(key)
    others = pairs.without_extras(path, others)
    if others:
        raise UserError(
            f"{path}: {plain(others[0])} belongs to nothing in a LoRA of cloneofsimo's: is the file damaged?"
        )
    if tokens:
        log.warning(
            "%s: %d learned token(s), %s, are textual inversion and no part of the LoRA: without them prompts that "
            "name them will not mean what they did", path, len(tokens), plain(", ".join(tokens)),
        )  # fmt: skip
    rows = {}
    for component, numbered in factors.items():
        if sorted(numbered) != list(range(len(numbered))):
            missing = next(i for i in range(max(numbered) + 1) if i not in numbered)
            raise UserError(f"{path}: {component}:{missing} is missing, its layers go by number: the file is damaged")
        for index, halves in numbered.items():
            for half in ("up", "down"):
                if half not in halves:
                    raise UserError(f"{path}: {component}:{index} lacks its {half}, half of a pair: it is damaged")
        rows[component] = [
            pairs.read_factors(checkpoint, f"{component}:{i}", numbered[i]["down"], numbered[i]["up"])
            for i in range(len(numbered))
        ]
    notes = {component: _noted(checkpoint, component) for component in rows}
    choices = {component: _choices(component, classes) for component, classes in notes.items()}
    bases = (base,) if base else known_bases()
    layers = _placed(path, rows, choices, bases)
    if layers is None:
        counts = ", ".join(f"{len(row)} layers of the {LABELS[component]}" for component, row in rows.items())
        said = ", ".join(name for classes in notes.values() for name in classes or ("classes that are not noted",))
        raise UserError(
            f"{path}: its {counts} ({plain(said)}) are not those of {_labels(bases)}: it was made for another model, "
            "or saved again by another program"
        )
    return LoRA(layers, model_metadata(checkpoint.metadata))


def read_list(checkpoint: Checkpoint, base: BaseModules | None = None) -> LoRA:
    """Read an opened .pt, and the text encoder's beside it where there is one. Raises UserError as `read`."""
    path = Path(checkpoint.path)
    beside = text_encoder_path(path)
    rows = {"text_encoder" if path.name.endswith(".text_encoder.pt") else "unet": _row(checkpoint)}
    if is_there(beside):
        log.info("%s: its text encoder is %s", path, beside.name)
        rows["text_encoder"] = _row(pairs.open_lora(beside))
    choices = {component: _choices(component, None) for component in COMPONENTS}
    bases = (base,) if base else known_bases()
    layers = _placed(path, rows, choices, bases)
    if layers is None and len(rows) == 1:  # a text encoder's file may have lost its name
        ((component, row),) = rows.items()
        layers = _placed(path, {other: row for other in COMPONENTS if other != component}, choices, bases)
    if layers is None:
        counts = " and ".join(f"{len(row)} pairs for the {LABELS[component]}" for component, row in rows.items())
        raise UserError(
            f"{path}: its {counts} are in no order of layers of {_labels(bases)} that cloneofsimo's lora knows"
        )
    return LoRA(layers, {})


def write(path, state: LoRA, base: BaseModules, dtype: str = "fp32") -> None:
    """Write a .safetensors. Raises UserError for layers that no class holds (the UNet's first and last convolution)."""
    arrays, texts = {}, {}
    for component, (classes, row) in _rows(path, state, base).items():
        texts[component] = json.dumps(classes)
        for i, layer in enumerate(row):
            arrays[f"{component}:{i}:up"], arrays[f"{component}:{i}:down"] = layer.up, layer.down
            texts[f"{component}:{i}:rank"] = str(layer.rank)
    pairs.save(path, arrays, {**pairs.base_texts(state), **texts}, dtype)


def text_encoder_path(path: Path) -> Path:
    """Where the text encoder's part lies beside a .pt of the UNet's."""
    return path.with_name(f"{path.stem}.text_encoder.pt")


def write_list(path, state: LoRA, base: BaseModules, dtype: str = "fp32") -> None:
    """Write a .pt for the UNet and `<stem>.text_encoder.pt` beside it, of what there is.

    Raises UserError as `write` does, and where a second lies there already: it is another LoRA's.
    """
    path = Path(path)
    beside = text_encoder_path(path)
    rows = _rows(path, state, base)
    if os.path.lexists(beside):
        raise UserError(
            f"{path}: {beside.name} lies beside it and would be taken for its text encoder, or replaced: move it away"
        )
    for component, (_, row) in rows.items():
        flat = [array for layer in row for array in (layer.up, layer.down)]
        write_torch(
            path if component == "unet" else beside,
            [pairs.as_dtype(array, dtype, f"{path}: array {i}") for i, array in enumerate(flat)],
        )
    if "text_encoder" in rows:
        log.info("%s: its text encoder is %s", path, beside.name)


def learned_tokens(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Textual inversion's vectors that lie beside a LoRA, fp32: token -> (channels,), in order of name.

    Raises UserError for one that is no vector of finite numbers.
    """
    tokens = {}
    for token in sorted(filter(_is_token, checkpoint)):
        dtype, shape = checkpoint.spec(token)
        if len(shape) == 1 and shape[0] <= WIDEST and dtype.kind == "f":
            tokens[token] = np.asarray(checkpoint[token], np.float32)
        if token not in tokens or not np.isfinite(tokens[token]).all():
            raise UserError(
                f"{checkpoint.path}: the learned token {plain(token)} is no vector of finite numbers: it "
                "is damaged, or its training went wrong"
            )
    return tokens


def write_embedding(path: Path, vectors: np.ndarray) -> None:
    """Write learned tokens (tokens, channels) fp32 as the original does for A1111's web UI: one embedding of as many
    vectors, in a .pt. Raises UserError where the disk refuses.
    """
    token_of_star = np.array(265, np.int64)
    write_torch(path, {"string_to_token": {"*": token_of_star}, "string_to_param": {"*": vectors}, "name": ""})


def in_order(modules: Sequence[Module], classes: Iterable[str], component: str, early: bool = True) -> list[Module]:
    """The modules of a component within some classes, as cloneofsimo's lora walks them.

    early: diffusers' first order, with the feed-forward between the two attentions.
    """
    within = [CLASSES[component][name] for name in classes]
    chosen = [module for module in modules if any(re.search(part, module.path) for part in within)]
    if not early:
        return chosen
    within_block = {"attn1": 0, "ff": 1, "attn2": 2}
    first: dict[str, int] = {}

    def place(item: tuple[int, Module]) -> tuple[int, int]:
        index, module = item
        block = re.match(r"(.+\.transformer_blocks\.\d+)\.(\w+)\.", module.path)
        return (first.setdefault(block.group(1), index), within_block[block.group(2)]) if block else (index, 0)

    return [module for _, module in sorted(enumerate(chosen), key=place)]


def _is_token(key: str) -> bool:
    return key.startswith("<") and key.endswith(">")


def _row(checkpoint: Checkpoint) -> list[LoRALayer]:
    count = len(checkpoint)
    if count % 2:
        raise UserError(f"{checkpoint.path}: a list of {count} tensors, up and down in turn: half of a pair is missing")
    missing = next((i for i in range(count) if str(i) not in checkpoint), None)
    if missing is not None:
        raise UserError(f"{checkpoint.path}: its arrays go by number, and {missing} is missing: the file is damaged")
    return [pairs.read_factors(checkpoint, f"pair {i // 2}", down=str(i + 1), up=str(i)) for i in range(0, count, 2)]


def _noted(checkpoint: Checkpoint, component: str) -> list[str] | None:
    """The classes that the file says a component was made from; None where it does not say."""
    text = checkpoint.metadata.get(component)
    if text is None:
        return None
    classes = parse_json(text, f"{checkpoint.path}: its text {component}")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UserError(f"{checkpoint.path}: its text {component} is {plain(text, 60)!r}, no list of classes")
    return classes


def _choices(component: str, noted: list[str] | None) -> tuple[tuple[str, ...], ...]:
    """The classes that a component may have been made from: those noted, or where not all of them are known, every
    usual choice and every class alone.
    """
    if noted is not None and set(noted) <= CLASSES[component].keys():
        return (tuple(noted),)
    return CHOICES[component] + tuple((name,) for name in CLASSES[component])


def _placed(
    path,
    rows: Mapping[str, list[LoRALayer]],
    choices: Mapping[str, Iterable[tuple[str, ...]]],
    bases: Iterable[BaseModules],
) -> dict[str, LoRALayer] | None:
    """The layers of all components, in the first base that has a place for all; None if none has."""
    for base in bases:
        parts = [_place(path, row, component, choices[component], base) for component, row in rows.items()]
        if all(part is not None for part in parts):
            return {name: layer for part in parts for name, layer in part.items()}
    return None


def _place(
    path, row: list[LoRALayer], component: str, choices: Iterable[tuple[str, ...]], base: BaseModules
) -> dict[str, LoRALayer] | None:
    """Layers by canonical name, in the classes and the order whose shapes are those of `row`; None if none has them.

    Raises UserError where two have them that give the layers otherwise.
    """
    axes = {layer.down.ndim for layer in row}
    found: dict[tuple[Module, ...], tuple[str, ...]] = {}
    for classes in choices:
        for early in (True, False):
            ordered = in_order(base.of(component), classes, component, early)
            # Without convolutions in the file, those of the classes were passed over, and the other way round.
            modules = tuple(module for module in ordered if len(module.shape) in axes)
            if len(modules) == len(row) and all(_fits(layer, module) for layer, module in zip(row, modules)):
                found.setdefault(modules, classes)
    if len(found) > 1:
        one, two = (" and ".join(classes) for classes in list(found.values())[:2])
        raise UserError(
            f"{path}: its {len(row)} layers of the {LABELS[component]} may be those of {one} or of {two}, and nothing "
            "in it says which: take a file that notes its classes, or a LoRA in another format"
        )
    for modules in found:
        return {module.name: pairs.conformed(layer, module.shape) for layer, module in zip(row, modules)}
    return None


def _labels(bases: Iterable[BaseModules]) -> str:
    return " or ".join(base.label for base in bases)


def _fits(layer: LoRALayer, module: Module) -> bool:
    return same_up_to_1x1((layer.up.shape[0], *layer.down.shape[1:]), module.shape)


def _rows(path, state: LoRA, base: BaseModules) -> dict[str, tuple[list[str], list[LoRALayer]]]:
    """Component -> (classes, layers in order, zeros for those that are not in `state`)."""
    rows = {}
    for component in COMPONENTS:
        there = [module for module in base.of(component) if module.name in state.layers]
        if not there:
            continue
        choices = {classes: in_order(base.of(component), classes, component) for classes in CHOICES[component]}
        held = [classes for classes, modules in choices.items() if set(there) <= set(modules)]
        if not held:
            lone = next(m for m in there if m not in list(choices.values())[-1])
            raise UserError(f"{path}: cloneofsimo's lora has no place for {lone.path}: write another format")
        axes = {len(module.shape) for module in there}
        modules = [module for module in choices[held[0]] if len(module.shape) in axes]
        rank = max(state.only(component).ranks())
        if len(modules) > len(there):
            log.info(
                "%s: %d layers of the %s without a LoRA are written as zeros",
                path,
                len(modules) - len(there),
                LABELS[component],
            )
        rows[component] = (
            list(held[0]),
            [
                pairs.folded(state.layers[module.name]) if module.name in state.layers else _zero(module, rank)
                for module in modules
            ],
        )
    return rows


def _zero(module: Module, rank: int) -> LoRALayer:
    ones = (1,) * (len(module.shape) - 2)
    rank = min(rank, module.shape[0])
    return LoRALayer(
        np.zeros((rank, *module.shape[1:]), np.float32),
        np.zeros((module.shape[0], rank, *ones), np.float32),
        float(rank),
    )
