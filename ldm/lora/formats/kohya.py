"""kohya's sd-scripts, A1111's web UI and ComfyUI: a .safetensors with lora_down, lora_up and alpha for each layer.

    lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight

| Who names the layers         | UNet                            | Text encoder                           |
| ---------------------------- | ------------------------------- | -------------------------------------- |
| sd-scripts (this is written) | lora_unet_<diffusers' name>     | lora_te_text_model_<name>              |
| tools for single checkpoints | lora_unet_<checkpoint's name>   | lora_te_text_model_<name>              |
| ComfyUI                      | diffusion_model.<its own name>  | text_encoders.clip_l.transformer.<...> |

"." is "_" in the names after `lora_`. Files mix these names, so all are read at once. Convolutions have a k x k down
and a 1x1 up. The metadata (`ss_...`) tells how the LoRA was trained: the version of the base model is read, and what
describes the network is written. LyCORIS's files have these names too, and other arrays beside or in place of the
factors (ldm.lora.formats.parts). `sshs_...` are hashes of the file itself (ldm.weights.hashes).
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable

from ldm.lora.formats.factors import by_component, embedding_arrays, positive_alpha, to_dtype
from ldm.lora.formats.keyed import FACTOR_OF_LETTER, MAGNITUDE, PEFT_FACTOR, read_keyed
from ldm.lora.formats.modules import BaseModules, Module
from ldm.lora.formats.parts import PART, part_of
from ldm.lora.lora import LoRA, lora_metadata
from ldm.lora.products import LoHa, LoKr, Product
from ldm.lora.updates import IA3, OFT, DoRA, Full, LoRALayer, direction_of
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
    "lycoris_": "lora_unet_",  # LyCORIS without kohya's scripts
    "oft_unet_": "lora_unet_",
    "oft_te_": "lora_te_",
    "model.diffusion_model.": "diffusion_model.",
    "text_encoders.clip_l.transformer.": "text_encoder.",
    "text_encoders.clip_h.transformer.": "text_encoder.",
    "cond_stage_model.transformer.": "text_encoder.",
}
_FACTOR = re.compile(rf"(.+)\.(?:({PART})|{PEFT_FACTOR}|lora(?:_linear_layer)?\.(down|up)\.weight|{MAGNITUDE})\Z")
_IA3 = re.compile(r"((?:lora|lycoris)_[^.]+)\.(weight|on_input)\Z")
_TYPICAL = re.compile(r"(lora|oft)_(unet|te|te1|te2)_[^.]+\.|lycoris_[^.]+\.|(diffusion_model|text_encoders)\.")
_CHECKPOINT_NAMES = re.compile(r"(model\.diffusion_model|cond_stage_model)\..+\.lora_[AB]\.")

log = logging.getLogger(__name__)


def detect(keys: Iterable[str]) -> str | None:
    """Return "kohya" for the keys of such a file, otherwise None."""
    factors = (key for key in keys if not key.endswith(".alpha") and (_FACTOR.match(key) or _IA3.match(key)))
    return "kohya" if any(_TYPICAL.match(key) or _CHECKPOINT_NAMES.match(key) for key in factors) else None


def read(checkpoint: Checkpoint, base: BaseModules | None = None) -> LoRA:
    """Read an opened file. Raises UserError as `read_keyed`."""
    lora = read_keyed(checkpoint, _parse, _table, base)
    version = checkpoint.metadata.get("ss_base_model_version", "")
    metadata = {}
    for architecture, text in VERSIONS.items():
        if version in (text, f"{text}_v"):
            metadata["architecture"] = architecture
            if version.endswith("_v"):  # the reverse does not hold: files of early 2023 lack the ending
                metadata["prediction_type"] = "v_prediction"
    lora.metadata.update({**metadata, **lora_metadata(checkpoint.metadata)})
    return lora


def write(path: str | os.PathLike, lora: LoRA, base: BaseModules, dtype: str = "fp32") -> None:
    """Write a .safetensors, layers that are no pairs of low-rank factors in LyCORIS's names.

    A positive alpha is kept by layer, with a warning where diffusers would misread it.
    """
    if len({layer.alpha for layer in lora.layers.values() if isinstance(layer, LoRALayer)}) > 1:
        log.warning(
            "%s: its layers' alphas differ, and diffusers uses the commonest for all attention layers of a "
            "kohya file: for diffusers, write diffusers",
            path,
        )
    arrays = {}
    for component, layers in by_component(lora.layers, base).items():
        for path_in_network, layer in layers.items():
            name = PREFIX[component] + path_in_network.replace(".", "_")
            arrays.update({f"{name}.{part}": array for part, array in positive_alpha(layer).arrays().items()})
    for component, biases in by_component(lora.biases, base).items():
        for path_in_network, bias in biases.items():
            module = PREFIX[component] + path_in_network.replace(".", "_")
            part = "b_norm" if f"{module}.w_norm" in arrays else "diff_b"
            arrays[f"{module}.{part}"] = bias.difference
    arrays.update(embedding_arrays(lora))
    arrays = {key: to_dtype(array, dtype, f"{path}: {key}") for key, array in arrays.items()}
    metadata = _metadata(lora)
    write_checkpoint(path, arrays, {**metadata, **sshs_hashes(arrays, metadata)})


def _parse(key: str) -> tuple[str, str] | None:
    match = _FACTOR.match(key)
    if match is None:
        match = _IA3.match(key)
        return None if match is None else (match[1].replace("lycoris_", "lora_unet_"), match[2])
    layer, part, letter, diffusers_factor, magnitude = match.groups()
    for other, prefix in OTHER_PREFIXES.items():
        if layer.startswith(other):
            layer = prefix + layer[len(other) :]
    if layer.startswith("lora_"):  # diffusers leaves two dots in the names of magnitudes
        layer = layer.replace(".", "_")
    return layer, part_of(part) if part else FACTOR_OF_LETTER.get(letter) or diffusers_factor or magnitude


def _table(base: BaseModules) -> dict[str, Module]:
    """Return the modules of a base model by all of their names."""
    table = {}
    for module in (*base.modules, *base.norms):
        table[PREFIX[module.component] + module.path.replace(".", "_")] = module
        if module.component == "unet":
            name = module.name[len(UNET_PREFIX) :]
            table[PREFIX["unet"] + name.replace(".", "_")] = table[f"diffusion_model.{name}"] = module
        else:
            table[f"text_encoder.text_model.{module.path}"] = module
    return table


def _metadata(lora: LoRA) -> dict[str, str]:
    texts = network_metadata(lora)
    version = VERSIONS.get(lora.metadata.get("architecture", ""))
    if version:
        velocity = lora.metadata.get("prediction_type") == "v_prediction"
        texts["ss_base_model_version"] = version + ("_v" if velocity else "")
        texts["ss_v2"] = str(version == "sd_v2")
    if lora.zero_terminal_snr:
        texts["ss_zero_terminal_snr"] = "True"
    kept = {key: text for key, text in lora.file_metadata.items() if key != "modelspec.hash_sha256"}
    if kept.get("ss_network_module") == texts["ss_network_module"]:
        # The same network: its arguments as they were given say more than the arrays do.
        texts.update({key: text for key, text in kept.items() if key.startswith("ss_network_")})
    else:
        kept.pop("ss_network_args", None)  # of another kind of network, which this one was made from
    return {**lora.metadata, **kept, **texts}


def network_metadata(lora: LoRA) -> dict[str, str]:
    """Return what sd-scripts writes about the network: its module, ranks, alphas and further arguments."""
    with_alpha = [layer for layer in map(direction_of, lora.layers.values()) if isinstance(layer, (LoRALayer, Product))]
    alphas, ranks = {layer.alpha for layer in with_alpha}, lora.ranks()
    kinds = {type(direction_of(layer)) for layer in lora.layers.values()}
    arguments: dict[str, float | str] = {}
    if kinds != {LoRALayer} or lora.biases:
        algorithms = {LoHa: "loha", LoKr: "lokr", Full: "full", IA3: "ia3", OFT: "diag-oft"}
        arguments["algo"] = next((algorithms[kind] for kind in algorithms if kind in kinds), "lora")
    if any(isinstance(layer, DoRA) for layer in lora.layers.values()):
        arguments["dora_wd"] = "True"
    kernels = [layer for layer in with_alpha if len(layer.shape) == 4 and layer.shape[-1] > 1]
    if kernels and kernels[0].rank is not None:
        arguments.update(conv_dim=kernels[0].rank, conv_alpha=kernels[0].alpha)
    texts = {
        "ss_network_module": "lycoris.kohya" if {"algo", "dora_wd"} & arguments.keys() else "networks.lora",
        "ss_network_dim": str(ranks[0]) if len(ranks) == 1 else "Dynamic",  # kohya's word for ranks that differ
        "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic",
    }
    if arguments:
        texts["ss_network_args"] = json.dumps(arguments)
    return texts
