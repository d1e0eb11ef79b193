"""kohya's sd-scripts, A1111's web UI and ComfyUI: a .safetensors with lora_down, lora_up and alpha for each layer.

    lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight

| Who names the layers         | UNet                            | Text encoder                           |
| ---------------------------- | ------------------------------- | -------------------------------------- |
| sd-scripts (this is written) | lora_unet_<diffusers' name>     | lora_te_text_model_<name>              |
| tools for single checkpoints | lora_unet_<checkpoint's name>   | lora_te_text_model_<name>              |
| ComfyUI                      | diffusion_model.<its own name>  | text_encoders.clip_l.transformer.<...> |

"." is "_" in the names after `lora_`. Files mix these names, so all are read at once. Convolutions have a k x k down
and a 1x1 up. The metadata (`ss_...`) tells how the LoRA was trained: the version of the base model is read, and what
describes the network is written. LyCORIS's LoCon files have these names too, and sometimes a third factor `lora_mid`
that is multiplied into down. `sshs_...` are hashes of the file itself (ldm.weights.hashes).
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable

import numpy as np

from ldm.lora.formats.factors import by_component, fold_alpha, to_dtype
from ldm.lora.formats.keyed import FACTOR_OF_LETTER, PEFT_FACTOR, read_keyed
from ldm.lora.formats.modules import BaseModules, Module
from ldm.lora.lora import LoRA, lora_metadata
from ldm.weights.checkpoint import Checkpoint, write_checkpoint
from ldm.weights.hashes import sshs_hashes
from ldm.weights.names.tables import UNET_PREFIX

PREFIX = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}
# Values of ss_base_model_version. "_v" follows for a model that predicts the velocity.
VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2"}
# Other prefixes of names -> those in the table. diffusers writes `lora_te1_` for a lone text encoder too. Beside
# `lora_te2_` it is the first one of SDXL. ComfyUI calls SD1.x's text encoder `clip_l`, and SD2.x's `clip_h`.
OTHER_PREFIXES = {
    "lora_te1_": "lora_te_",
    "model.diffusion_model.": "diffusion_model.",
    "text_encoders.clip_l.transformer.": "text_encoder.",
    "text_encoders.clip_h.transformer.": "text_encoder.",
    "cond_stage_model.transformer.": "text_encoder.",
}
_FACTOR = re.compile(
    rf"(.+)\.(?:lora_(down|up|mid)\.weight|{PEFT_FACTOR}|lora(?:_linear_layer)?\.(down|up)\.weight|(alpha))\Z"
)
_TYPICAL = re.compile(r"lora_(unet|te|te1|te2)_[^.]+\.|(diffusion_model|text_encoders)\.")
_CHECKPOINT_NAMES = re.compile(r"(model\.diffusion_model|cond_stage_model)\..+\.lora_[AB]\.")

log = logging.getLogger(__name__)


def detect(keys: Iterable[str]) -> str | None:
    """Return "kohya" for the keys of such a file, otherwise None."""
    factors = (key for key in keys if not key.endswith(".alpha") and _FACTOR.match(key))
    return "kohya" if any(_TYPICAL.match(key) or _CHECKPOINT_NAMES.match(key) for key in factors) else None


def read(checkpoint: Checkpoint, base: BaseModules | None = None) -> LoRA:
    """Read an opened file. Raises UserError as `read_keyed`."""
    layers = read_keyed(checkpoint, _parse, _table, base)
    version = checkpoint.metadata.get("ss_base_model_version", "")
    metadata = {}
    for architecture, text in VERSIONS.items():
        if version in (text, f"{text}_v"):
            metadata["architecture"] = architecture
            if version.endswith("_v"):  # the reverse does not hold: files of early 2023 lack the ending
                metadata["prediction_type"] = "v_prediction"
    return LoRA(layers, {**metadata, **lora_metadata(checkpoint.metadata)})


def write(path: str | os.PathLike, lora: LoRA, base: BaseModules, dtype: str = "fp32") -> None:
    """Write a .safetensors. A positive alpha is kept by layer, with a warning where diffusers would misread it."""
    if len({layer.alpha for layer in lora.layers.values()}) > 1:
        log.warning(
            "%s: its layers' alphas differ, and diffusers uses the commonest for all attention layers of a "
            "kohya file: for diffusers, write diffusers",
            path,
        )
    arrays = {}
    for component, layers in by_component(lora, base).items():
        for path_in_network, layer in layers.items():
            layer = layer if layer.alpha > 0 else fold_alpha(layer)  # sd-scripts takes an alpha of 0 for the rank
            name = PREFIX[component] + path_in_network.replace(".", "_")
            arrays[f"{name}.lora_down.weight"] = layer.down
            arrays[f"{name}.lora_up.weight"] = layer.up
            arrays[f"{name}.alpha"] = np.array(layer.alpha)
    arrays = {key: to_dtype(array, dtype, f"{path}: {key}") for key, array in arrays.items()}
    metadata = _metadata(lora)
    write_checkpoint(path, arrays, {**metadata, **sshs_hashes(arrays, metadata)})


def _parse(key: str) -> tuple[str, str] | None:
    match = _FACTOR.match(key)
    if match is None:
        return None
    layer, factor, letter, diffusers_factor, alpha = match.groups()
    for other, prefix in OTHER_PREFIXES.items():
        if layer.startswith(other):
            layer = prefix + layer[len(other) :]
    return layer, factor or FACTOR_OF_LETTER.get(letter) or diffusers_factor or alpha


def _table(base: BaseModules) -> dict[str, Module]:
    """Return the modules of a base model by all of their names."""
    table = {}
    for module in base.modules:
        table[PREFIX[module.component] + module.path.replace(".", "_")] = module
        if module.component == "unet":
            name = module.name[len(UNET_PREFIX) :]
            table[PREFIX["unet"] + name.replace(".", "_")] = table[f"diffusion_model.{name}"] = module
        else:
            table[f"text_encoder.text_model.{module.path}"] = module
    return table


def _metadata(lora: LoRA) -> dict[str, str]:
    alphas = {layer.alpha for layer in lora.layers.values()}
    ranks = lora.ranks()
    texts = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks[0]) if len(ranks) == 1 else "Dynamic",  # kohya's word for ranks that differ
        "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic",
    }
    kernels = [layer for layer in lora.layers.values() if layer.down.ndim == 4 and layer.down.shape[-1] > 1]
    if kernels:
        texts["ss_network_args"] = json.dumps({"conv_dim": kernels[0].rank, "conv_alpha": kernels[0].alpha})
    version = VERSIONS.get(lora.metadata.get("architecture", ""))
    if version:
        velocity = lora.metadata.get("prediction_type") == "v_prediction"
        texts["ss_base_model_version"] = version + ("_v" if velocity else "")
        texts["ss_v2"] = str(version == "sd_v2")
    if lora.zero_terminal_snr:
        texts["ss_zero_terminal_snr"] = "True"
    return {**lora.metadata, **lora.file_metadata, **texts}
