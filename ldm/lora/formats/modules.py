"""The layers of a base model that a LoRA can act on: canonical names, other projects' names, and shapes.

Every format but this project's own goes by diffusers' names: as they are, with "_" for "." (kohya), or counted in the
order in which diffusers registers them (cloneofsimo). The list is complete, so a name is looked up and never guessed.
The canonical names come from ldm.weights.names.diffusers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from ldm.files.paths import ROOT
from ldm.lora.lora import LoRA
from ldm.lora.merge import match_shapes
from ldm.settings.model import ModelConfig, load_model_config
from ldm.weights.names.diffusers import unet_modules
from ldm.weights.names.tables import TEXT_PREFIX, UNET_PREFIX, rename

LABELS_OF_ARCHITECTURE = {"sd1": "SD1.x", "sd2": "SD2.x", "nano": "the nano model"}
KNOWN = ("configs/v1-inference.yaml", "configs/v2-inference.yaml", "configs/nano.yaml")


# The normalisation before a layer, by the ends of diffusers' names. It has the layer's number of inputs.
NORM_BEFORE = {
    "proj_in": "norm",
    "attn1.to_q": "norm1",
    "attn2.to_q": "norm2",
    "ff.net.0.proj": "norm3",
    "conv1": "norm1",
    "conv2": "norm2",
    "conv_out": "conv_norm_out",
    "self_attn.q_proj": "layer_norm1",
    "mlp.fc1": "layer_norm2",
}
WITHOUT_BIAS = (".to_q", ".to_k", ".to_v")


@dataclass(frozen=True)
class Module:
    """A linear layer, a convolution or a normalisation of a base model.

    Attributes:
        name: Canonical name.
        component: "unet" or "text_encoder".
        path: diffusers' name within its network, for a text encoder without `text_model.`, as in transformers 5.
        shape: Shape of the weight, (out, in) or (out, in, k, k), or (channels,) of a normalisation.
    """

    name: str
    component: str
    path: str
    shape: tuple[int, ...]


class BaseModules:
    """The modules of one architecture in diffusers' order, the UNet's first.

    Attributes:
        modules: Linear layers and convolutions.
        norms: Normalisations.
        by_name: Canonical name -> module, of both.
        shapes: Canonical name of a parameter -> shape.
    """

    def __init__(self, config: ModelConfig):
        self.config = config
        self.label = LABELS_OF_ARCHITECTURE.get(config.architecture, f"the model of {config.path}")
        table = unet_modules(config.unet)
        self.modules = [_module("unet", path, shape, table) for path, shape in _unet(config.unet)] + [
            _module("text_encoder", path, shape, table) for path, shape in _text_encoder(config.text)
        ]
        self.norms = [
            _module(module.component, f"{module.path[: -len(layer)]}{norm}", module.shape[1:2], table)
            for module in self.modules
            for layer, norm in NORM_BEFORE.items()
            if f".{module.path}".endswith(f".{layer}")
        ] + [_module("text_encoder", "final_layer_norm", (config.text["width"],), table)]
        self.by_name = {module.name: module for module in (*self.modules, *self.norms)}
        self.shapes = {f"{module.name}.weight": module.shape for module in self.by_name.values()}
        self.shapes.update({
            f"{module.name}.bias": module.shape[:1]
            for module in self.by_name.values()
            if not module.path.endswith(WITHOUT_BIAS)
        })  # fmt: skip

    def of_component(self, component: str) -> list[Module]:
        return [module for module in self.modules if module.component == component]

    def mismatch(self, lora: LoRA) -> str:
        """Say in a few words why a LoRA does not fit, or "" if it does."""
        match = match_shapes(self.shapes, lora)
        for name, (shape, wanted) in match.wrong_shape.items():
            return f"{self.by_name[name].path} is {shape}, there it is {wanted}"
        if match.unmatched:
            return f"{len(match.unmatched)} layers are not there, such as {match.unmatched[0]}"
        return ""


def _module(component: str, path: str, shape: tuple[int, ...], table: dict[str, str]) -> Module:
    """Return the module of a diffusers' name. `table` renames those of the UNet."""
    name = f"{TEXT_PREFIX}{path}" if component == "text_encoder" else f"{UNET_PREFIX}{rename(path, table)}"
    return Module(name, component, path, shape)


@lru_cache(maxsize=1)
def known_bases() -> tuple[BaseModules, ...]:
    """Return the modules of SD1.x, SD2.x and the nano model."""
    return tuple(BaseModules(load_model_config(ROOT / path)) for path in KNOWN)


def fitting_bases(lora: LoRA, bases: tuple[BaseModules, ...]) -> list[BaseModules]:
    """Return the base models with every layer of a LoRA in its shape, only those of its architecture if it has one."""
    fitting = [base for base in bases if not base.mismatch(lora)]
    return [base for base in fitting if base.config.architecture == lora.metadata.get("architecture")] or fitting


def _unet(unet: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield (name, shape) of each layer of diffusers' UNet2DConditionModel, in the order of its `named_modules()`.

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
    """Yield (name, shape) of each layer of transformers' CLIPTextModel, in the order of its `named_modules()`."""
    width = text["width"]
    for layer in range(text["num_layers"]):
        for part in ("k", "v", "q", "out"):
            yield f"encoder.layers.{layer}.self_attn.{part}_proj", (width, width)
        yield f"encoder.layers.{layer}.mlp.fc1", (4 * width, width)
        yield f"encoder.layers.{layer}.mlp.fc2", (width, 4 * width)
