"""kohya's sd-scripts, A1111's web UI and ComfyUI: `<layer>.lora_down.weight`, lora_up and alpha.

| what names a layer | the UNet | the text encoder |
| sd-scripts, which is written | lora_unet_<diffusers' name, . as _> | lora_te_text_model_<name, . as _> |
| tools for published checkpoints | lora_unet_<the checkpoint's name, . as _> | the same |
| ComfyUI's own | diffusion_model.<the checkpoint's name> | text_encoders.clip_l.transformer.text_model.<name> |

Files mix them, so all are read at once; SDXL's names are the same, and its shapes are others. Convolutions have a k x k
down and a 1x1 up. The texts of the file (`ss_...`) hold how it was trained; of them the version of the base is read,
and what describes the network is written. LyCORIS's LoCon files have these names too, and sometimes a third factor
`lora_mid`, which is multiplied into down.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable

import numpy as np

from ldm.lora.formats import pairs
from ldm.lora.formats.modules import BaseModules, Module
from ldm.lora.lora import LoRA
from ldm.settings.model import model_metadata
from ldm.weights.checkpoint import Checkpoint
from ldm.weights.names.diffusers import UNET_PREFIX

PREFIX = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}
VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2"}  # ss_base_model_version; "_v" follows where velocity is predicted
# Other beginnings of names -> those in the table. diffusers writes `lora_te1_` for a lone text encoder too; beside
# `lora_te2_` it is the first of SDXL's. `clip_l` is ComfyUI's word for SD1.x's text encoder, `clip_h` for SD2.x's.
OTHER_PREFIXES = {
    "lora_te1_": "lora_te_",
    "model.diffusion_model.": "diffusion_model.",
    "text_encoders.clip_l.transformer.": "text_encoder.",
    "text_encoders.clip_h.transformer.": "text_encoder.",
    "cond_stage_model.transformer.": "text_encoder.",
}
_FACTOR = re.compile(
    rf"(.+)\.(?:lora_(down|up|mid)\.weight|{pairs.PEFT_HALF}|lora(?:_linear_layer)?\.(down|up)\.weight|(alpha))\Z"
)
_TYPICAL = re.compile(r"lora_(unet|te|te1|te2)_[^.]+\.|(diffusion_model|text_encoders)\.")
_CHECKPOINTS = re.compile(r"(model\.diffusion_model|cond_stage_model)\..+\.lora_[AB]\.")

log = logging.getLogger(__name__)


def detect(names: Iterable[str]) -> bool:
    """Whether these are the names of such a file."""
    factors = (name for name in names if not name.endswith(".alpha") and _FACTOR.match(name))
    return any(_TYPICAL.match(name) or _CHECKPOINTS.match(name) for name in factors)


def read(checkpoint: Checkpoint, base: BaseModules | None = None) -> LoRA:
    """Read an opened file. Raises UserError as pairs.read_pairs."""
    version = checkpoint.metadata.get("ss_base_model_version", "")
    layers = pairs.read_pairs(checkpoint, _parse, _table, base)
    metadata = {}
    for architecture, text in VERSIONS.items():
        if version in (text, f"{text}_v"):
            metadata["architecture"] = architecture
            if version.endswith("_v"):  # not the reverse: files of early 2023 lack the ending
                metadata["prediction_type"] = "v_prediction"
    return LoRA(layers, {**metadata, **model_metadata(checkpoint.metadata)})


def write(path, state: LoRA, base: BaseModules, dtype: str = "fp32") -> None:
    """Write a .safetensors. An alpha above 0 is kept per layer, with a warning where diffusers would misread it."""
    if len({layer.alpha for layer in state.layers.values()}) > 1:
        log.warning(
            "%s: its layers' alphas differ, and diffusers takes the commonest for all attention layers of a "
            "kohya file: for diffusers, write diffusers",
            path,
        )
    arrays = {}
    for component, layers in pairs.by_component(state, base).items():
        for module, layer in layers.items():
            layer = layer if layer.alpha > 0 else pairs.folded(layer)  # an alpha of 0 means the rank to sd-scripts
            name = PREFIX[component] + module.replace(".", "_")
            arrays[f"{name}.lora_down.weight"] = layer.down
            arrays[f"{name}.lora_up.weight"] = layer.up
            arrays[f"{name}.alpha"] = np.array(layer.alpha)
    pairs.save(path, arrays, _texts(state), dtype)


def _parse(key: str) -> tuple[str, str] | None:
    found = _FACTOR.match(key)
    if found is None:
        return None
    layer, half, letter, middle, alpha = found.groups()
    for other, prefix in OTHER_PREFIXES.items():
        if layer.startswith(other):
            layer = prefix + layer[len(other) :]
    return layer, half or pairs.HALF_OF_LETTER.get(letter) or middle or alpha


def _table(base: BaseModules) -> dict[str, Module]:
    """The modules of a base by all of their names."""
    table = {}
    for module in base.modules:
        table[PREFIX[module.component] + module.path.replace(".", "_")] = module
        if module.component == "unet":
            name = module.name[len(UNET_PREFIX) :]
            table[PREFIX["unet"] + name.replace(".", "_")] = table[f"diffusion_model.{name}"] = module
        else:
            table[f"text_encoder.text_model.{module.path}"] = module
    return table


def _texts(state: LoRA) -> dict[str, str]:
    alphas = {layer.alpha for layer in state.layers.values()}
    ranks = state.ranks()
    texts = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks[0]) if len(ranks) == 1 else "Dynamic",  # kohya's word for ranks that differ
        "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic",
    }
    kernels = [layer for layer in state.layers.values() if layer.down.ndim == 4 and layer.down.shape[-1] > 1]
    if kernels:
        texts["ss_network_args"] = json.dumps({"conv_dim": kernels[0].rank, "conv_alpha": kernels[0].alpha})
    version = VERSIONS.get(state.metadata.get("architecture", ""))
    if version:
        velocity = state.metadata.get("prediction_type") == "v_prediction"
        texts["ss_base_model_version"] = version + ("_v" if velocity else "")
        texts["ss_v2"] = str(version == "sd_v2")
    return {**pairs.base_texts(state), **texts}
