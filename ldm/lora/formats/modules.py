"""The layers of a base that a LoRA can act on: their canonical names, the names that other projects use, their shapes.

Every format but this project's own goes by diffusers' names: dotted, with `.` turned into `_` (kohya), or counted in
the order in which diffusers registers them (cloneofsimo). The list is complete, so a name is looked up and never
guessed; the canonical names come from ldm.weights.names.diffusers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from ldm.files.paths import ROOT
from ldm.lora.lora import LoRA
from ldm.lora.merge import match_shapes
from ldm.settings.model import ModelConfig, load_model_config
from ldm.weights.names import LABELS
from ldm.weights.names.diffusers import UNET_PREFIX, unet_modules
from ldm.weights.names.tables import TEXT_PREFIX, rename

LABEL_OF = {"sd1": "SD1.x", "sd2": "SD2.x", "nano": "the nano model"}
KNOWN = ("configs/v1-inference.yaml", "configs/v2-inference.yaml", "configs/nano.yaml")


@dataclass(frozen=True)
class Module:
    """A dense layer or a convolution.

    name: canonical. component: "unet" or "text_encoder". path: diffusers' name in its network; a text encoder's without
    `text_model.`, as transformers 5 has it. shape: of its weight, (out, in) or (out, in, k, k).
    """

    name: str
    component: str
    path: str
    shape: tuple[int, ...]


class BaseModules:
    """The modules of one architecture, in diffusers' order, UNet first."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self.label = LABEL_OF.get(config.architecture, f"the model of {config.path}")
        table = unet_modules(config.unet)
        self.modules = [
            Module(f"{UNET_PREFIX}{rename(path, table)}", "unet", path, shape) for path, shape in _unet(config.unet)
        ] + [Module(f"{TEXT_PREFIX}{path}", "text_encoder", path, shape) for path, shape in _text_encoder(config.text)]
        self.by_name = {module.name: module for module in self.modules}
        self.shapes = {f"{module.name}.weight": module.shape for module in self.modules}

    def of(self, component: str) -> list[Module]:
        return [module for module in self.modules if module.component == component]

    def why_not(self, state: LoRA) -> str:
        """What of `state` is not this base's, in a few words; "" where all of it fits."""
        match = match_shapes(self.shapes, state)
        for wrong in match.wrong_shape.values():
            name, found, wanted = wrong[0]
            return f"{self.path_of(name)} is {found}, there it is {wanted}"
        for component, names in match.unmatched.items():
            return f"{len(names)} layers of the {LABELS[component]} are not there, such as {names[0]}"
        return ""

    def path_of(self, name: str) -> str:
        return self.by_name[name].path if name in self.by_name else name


@lru_cache(maxsize=1)
def known_bases() -> tuple[BaseModules, ...]:
    """SD1.x, SD2.x and the embedded model."""
    return tuple(BaseModules(load_model_config(ROOT / path)) for path in KNOWN)


def fitting(state: LoRA, bases: tuple[BaseModules, ...]) -> list[BaseModules]:
    """The bases that have every layer of `state` in its shape, those that say so themselves before all others."""
    said = state.metadata.get("architecture")
    fits = [base for base in bases if not base.why_not(state)]
    return [base for base in fits if base.config.architecture == said] or fits


def _unet(unet: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of each layer of diffusers' UNet2DConditionModel, in the order of its `named_modules()`.

    Down blocks come before up blocks and these before the middle one, attentions before resnets.
    """
    channels = [unet["model_channels"] * mult for mult in unet["channel_mult"]]
    attends = [2**level in unet["attention_resolutions"] for level in range(len(channels))]
    first, embedding, depth = unet["model_channels"], 4 * unet["model_channels"], unet["num_res_blocks"]

    def resnet(path: str, incoming: int, outgoing: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{path}.conv1", (outgoing, incoming, 3, 3)
        yield f"{path}.time_emb_proj", (outgoing, embedding)
        yield f"{path}.conv2", (outgoing, outgoing, 3, 3)
        if incoming != outgoing:
            yield f"{path}.conv_shortcut", (outgoing, incoming, 1, 1)

    def transformer(path: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        outer = (width, width) if unet.get("use_linear_in_transformer") else (width, width, 1, 1)
        yield f"{path}.proj_in", outer
        for block in range(unet.get("transformer_depth", 1)):
            inner = f"{path}.transformer_blocks.{block}"
            for attention, context in (("attn1", width), ("attn2", unet["context_dim"])):
                yield f"{inner}.{attention}.to_q", (width, width)
                yield f"{inner}.{attention}.to_k", (width, context)
                yield f"{inner}.{attention}.to_v", (width, context)
                yield f"{inner}.{attention}.to_out.0", (width, width)
            yield f"{inner}.ff.net.0.proj", (8 * width, width)
            yield f"{inner}.ff.net.2", (width, 4 * width)
        yield f"{path}.proj_out", outer

    yield "conv_in", (first, unet["in_channels"], 3, 3)
    yield "time_embedding.linear_1", (embedding, unet["model_channels"])
    yield "time_embedding.linear_2", (embedding, embedding)
    width, skips = first, [first]
    for level, outgoing in enumerate(channels):
        block = f"down_blocks.{level}"
        for layer in range(depth if attends[level] else 0):
            yield from transformer(f"{block}.attentions.{layer}", outgoing)
        for layer in range(depth):
            yield from resnet(f"{block}.resnets.{layer}", width, outgoing)
            width = outgoing
            skips.append(width)
        if level < len(channels) - 1:
            yield f"{block}.downsamplers.0.conv", (width, width, 3, 3)
            skips.append(width)
    for up, level in enumerate(reversed(range(len(channels)))):
        block, outgoing = f"up_blocks.{up}", channels[level]
        for layer in range(depth + 1 if attends[level] else 0):
            yield from transformer(f"{block}.attentions.{layer}", outgoing)
        for layer in range(depth + 1):
            yield from resnet(f"{block}.resnets.{layer}", width + skips.pop(), outgoing)
            width = outgoing
        if level:
            yield f"{block}.upsamplers.0.conv", (width, width, 3, 3)
    yield from transformer("mid_block.attentions.0", channels[-1])
    for layer in range(2):
        yield from resnet(f"mid_block.resnets.{layer}", channels[-1], channels[-1])
    yield "conv_out", (unet["out_channels"], first, 3, 3)


def _text_encoder(text: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of each layer of transformers' CLIPTextModel, in the order of its `named_modules()`."""
    width = text["width"]
    for layer in range(text["num_layers"]):
        for part in ("k", "v", "q", "out"):
            yield f"encoder.layers.{layer}.self_attn.{part}_proj", (width, width)
        yield f"encoder.layers.{layer}.mlp.fc1", (4 * width, width)
        yield f"encoder.layers.{layer}.mlp.fc2", (width, 4 * width)
