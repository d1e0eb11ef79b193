"""kohya's sd-scripts and A1111's web UI: `lora_unet_<diffusers' name, . as _>.lora_down.weight`, lora_up and alpha.

Convolutions have a k x k down and a 1x1 up. The texts of the file (`ss_...`) hold how it was trained; of them the
version of the base is read, and what describes the network is written. LyCORIS's LoCon files have these names too, and
sometimes a third factor `lora_mid`, which is multiplied into down.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable

import numpy as np

from ldm.config.model import model_metadata
from ldm.errors import UserError
from ldm.lora.formats import pairs
from ldm.lora.formats.modules import Base, Module
from ldm.lora.state import LoRAState
from ldm.weights.read import Checkpoint

PREFIX = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}
VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2"}  # ss_base_model_version; "_v" follows where velocity is predicted
# diffusers writes `lora_te1_` for a lone text encoder too; beside `lora_te2_` it is the first of SDXL's.
_KEY = re.compile(r"lora_(unet|te1?)_([^.]+)\.(?:lora_(down|up|mid)\.weight|(alpha))$")

log = logging.getLogger(__name__)


def detect(names: Iterable[str]) -> bool:
    """Whether these are the names of such a file."""
    return any(re.match(r"lora_(unet|te|te1|te2)_[^.]+\.(lora_down|lora_up)\.weight$", name) for name in names)


def read(checkpoint: Checkpoint, base: Base | None = None) -> LoRAState:
    """Read an opened file. Raises UserError for one of SDXL, and see pairs.read_pairs."""
    version = checkpoint.metadata.get("ss_base_model_version", "")
    if version.startswith("sdxl"):
        raise UserError(f"{checkpoint.path} is {pairs.SDXL}")
    layers = pairs.read_pairs(checkpoint, _parse, _table, base)
    metadata = {}
    for architecture, text in VERSIONS.items():
        if version in (text, f"{text}_v"):
            metadata["architecture"] = architecture
            if version.endswith("_v"):  # not the reverse: files of early 2023 lack the ending
                metadata["prediction_type"] = "v_prediction"
    return LoRAState(layers, {**metadata, **model_metadata(checkpoint.metadata)})


def write(path, state: LoRAState, base: Base, dtype: str = "fp32") -> None:
    """Write a .safetensors; an alpha above 0 is kept, layer by layer, with a warning where diffusers would misread it.
    """
    if len({layer.alpha for layer in state.layers.values()}) > 1:
        log.warning("%s: its layers' alphas differ, and diffusers takes the commonest for all attention layers of a "
                    "kohya file: for diffusers, write diffusers", path)
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
    found = _KEY.match(key)
    if found is None:
        return None
    network, layer, half, _ = found.groups()
    return f"lora_{'unet' if network == 'unet' else 'te'}_{layer}", half or "alpha"


def _table(base: Base) -> dict[str, Module]:
    return {PREFIX[module.component] + module.path.replace(".", "_"): module for module in base.modules}


def _texts(state: LoRAState) -> dict[str, str]:
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
