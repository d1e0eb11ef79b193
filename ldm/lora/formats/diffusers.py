"""diffusers' LoRA files, `pytorch_lora_weights.safetensors`, in the four ways that it has named their keys.

| | a key of the UNet | a key of the text encoder |
| oldest | <attention>.processor.to_q_lora.down.weight | none |
| middle | unet.<attention>.processor.to_q_lora.down.weight | text_encoder.<layer>.lora_linear_layer.down.weight |
| newer | unet.<layer>.lora.down.weight | the same |
| today's | unet.<layer>.lora_A.weight (A is down, B is up) | text_encoder.<layer>.lora_A.weight |

Files mix them, so all are read at once. None of the first three has an alpha (`up` takes it over on writing); the last
has it in a text of the file, `lora_adapter_metadata`: the arguments of PEFT's LoraConfig as JSON, each behind `unet.`
or `text_encoder.`. A diffusers that does not know it takes alpha = rank: for that, write "diffusers-newer".
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from ldm.errors import UserError
from ldm.files.documents import parse_json
from ldm.lora.formats import pairs
from ldm.lora.formats.lora_config import Adapter, adapter_of
from ldm.lora.formats.modules import BaseModules, Module
from ldm.lora.lora import LoRA
from ldm.settings.model import model_metadata
from ldm.weights.checkpoint import Checkpoint

NAMES = ("diffusers", "diffusers-newer", "diffusers-middle", "diffusers-oldest")
METADATA = "lora_adapter_metadata"
# The beginnings of other formats' names.
OTHERS = ("base_model.model.", "lora_", "diffusion_model.", "text_encoders.", "model.diffusion_model.",
          "cond_stage_model.")  # fmt: skip
_PREFIX = re.compile(r"(unet|text_encoder)\.(.+)")
_KEY = re.compile(
    r"(.+)\.(?:"
    rf"{pairs.PEFT_HALF}"
    r"|lora(?:_linear_layer)?\.(down|up)\.weight"
    r"|(alpha))\Z"
)
_ATTENTION = re.compile(r"(.+?)(?:\.processor)?\.to_(q|k|v|out)_lora\.(down|up)\.weight\Z")


def detect(names: Iterable[str]) -> str | None:
    """The name of the form that these keys have, None for keys that are not diffusers'."""
    names = [name for name in names if not name.startswith(OTHERS)]
    halves = [name for name in names if _ATTENTION.match(name) or _KEY.match(name) and not name.endswith(".alpha")]
    if not halves:
        return None
    if any(".lora_A." in name or ".lora_B." in name for name in halves):
        return "diffusers"
    if any(_ATTENTION.match(name) for name in halves):
        return "diffusers-middle" if any(_PREFIX.match(name) for name in halves) else "diffusers-oldest"
    return "diffusers-newer"


def read(checkpoint: Checkpoint, base: BaseModules | None = None) -> LoRA:
    """Read an opened file, see pairs.read_pairs."""
    adapters = _adapters(checkpoint)

    def alpha(layer: str, rank: int) -> float:
        component = "text_encoder" if layer.startswith("encoder.") else "unet"
        return adapters[component].alpha(layer, rank) if component in adapters else rank

    layers = pairs.read_pairs(checkpoint, parse, table, base, alpha)
    return LoRA(layers, model_metadata(checkpoint.metadata))


def write(path, state: LoRA, base: BaseModules, dtype: str = "fp32", name: str = "diffusers") -> None:
    """Write a .safetensors in one of NAMES.

    Raises UserError for "diffusers-oldest" where there is more than the UNet's attention.
    """
    arrays, adapters = {}, {}
    for component, layers in pairs.by_component(state, base).items():
        for module, layer in layers.items():
            kept = layer if name == "diffusers" else pairs.folded(layer)
            down, up = _keys(component, module, name, str(path))
            arrays[down], arrays[up] = kept.down, kept.up
        adapters[component] = adapter_of(layers, base.of(component))
    texts = {"format": "pt", **pairs.base_texts(state)}
    if name == "diffusers":
        arguments = {
            f"{component}.{key}": value
            for component, adapter in adapters.items()
            for key, value in adapter.arguments().items()
        }
        texts[METADATA] = json.dumps(arguments, sort_keys=True)
    pairs.save(path, arrays, texts, dtype)


def parse(key: str) -> tuple[str, str] | None:
    """(name of the layer as in Module.path, role) of a key with or without `unet.`, `text_encoder.`, `text_model.`."""
    prefixed = _PREFIX.match(key)
    name = prefixed.group(2) if prefixed else key
    name = name[len("text_model.") :] if name.startswith("text_model.") else name
    found = _ATTENTION.match(name)
    if found:
        module, part, half = found.groups()
        if module.startswith("encoder."):
            return f"{module}.{part}_proj", half
        return f"{module}.to_{part}" + (".0" if part == "out" else ""), half
    found = _KEY.match(name)
    if found is None:
        return None
    module, letter, half, alpha = found.groups()
    module += ".0" if module.endswith(".to_out") else ""
    return module, pairs.HALF_OF_LETTER.get(letter) or half or alpha


def table(base: BaseModules) -> dict[str, Module]:
    """The modules of a base by the names that `parse` gives."""
    return {module.path: module for module in base.modules}


def _keys(component: str, module: str, name: str, path: str) -> tuple[str, str]:
    """The keys of down and up."""
    text = component == "text_encoder"
    layer = f"text_encoder.text_model.{module}" if text else f"unet.{module}"
    if name == "diffusers":
        return f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
    attention = re.match(r"(.+\.attn[12])\.to_(q|k|v|out)(?:\.0)?$", module)
    if name == "diffusers-oldest" and (text or not attention):
        raise UserError(
            f"{path}: diffusers-oldest holds the UNet's attention alone, not {layer}: write diffusers-middle"
        )
    if text:
        layer += ".lora_linear_layer"
    elif attention and name != "diffusers-newer":
        prefix = "" if name == "diffusers-oldest" else "unet."
        layer = f"{prefix}{attention.group(1)}.processor.to_{attention.group(2)}_lora"
    else:
        layer += ".lora"
    return f"{layer}.down.weight", f"{layer}.up.weight"


def _adapters(checkpoint: Checkpoint) -> dict[str, Adapter]:
    """What `lora_adapter_metadata` says, by component; without a component's name in front it is the UNet's."""
    text = checkpoint.metadata.get(METADATA)
    if not text:
        return {}
    where = f"{checkpoint.path}: {METADATA}"
    arguments = parse_json(text, where)
    if not isinstance(arguments, dict):
        raise UserError(f"{where} is no JSON object")
    parts: dict[str, dict] = {}
    for key, value in arguments.items():
        component, _, name = key.partition(".")
        if component not in ("unet", "text_encoder"):
            component, name = "unet", key
        parts.setdefault(component, {})[name] = value
    return {component: Adapter(part, where) for component, part in parts.items()}
