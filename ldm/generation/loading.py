"""Loading a base model, and reading LoRA files for it."""

from __future__ import annotations

import logging
from pathlib import Path

import mindspore as ms

from ldm.errors import UserError
from ldm.lora.formats import read_lora
from ldm.lora.formats.modules import BaseModules
from ldm.lora.lora import LoRA
from ldm.lora.merge import check_compatible, match_shapes
from ldm.models.attention import use_flash_attention
from ldm.models.layers import set_compute_dtype
from ldm.models.stable_diffusion import StableDiffusion, build_model
from ldm.settings.model import ModelConfig
from ldm.weights.base_model import open_base_model
from ldm.weights.load import check_metadata, load_base_model, load_component
from ldm.weights.names import COMPONENTS, LABELS

logger = logging.getLogger(__name__)


def load_model(
    config: ModelConfig,
    checkpoint: str | Path,
    *,
    dtype: ms.Type = ms.float32,
    unet: str | Path | None = None,
    vae: str | Path | None = None,
    ema: bool = False,
    flash_attention: bool = False,
    random_unet: bool = False,
) -> StableDiffusion:
    """Build the networks of a configuration and load a base checkpoint, a file or a diffusers folder, into them.

    `dtype` is that in which UNet and text encoder compute. The VAE computes in fp32, as it overflows in fp16. With
    `random_unet`, the UNet is initialised at random. The other options are those of Pipeline.from_checkpoint. The base
    checkpoint may lack a VAE if `vae` is given, and a UNet if it is random.

    Raises:
        UserError: A file does not fit the configuration, or its metadata names another model (see ldm.weights.load).
    """
    check_metadata(open_base_model(checkpoint).metadata, config, checkpoint)
    model = build_model(config, random=random_unet)
    not_loaded = {"unet": random_unet, "vae": vae is not None}
    components = [component for component in COMPONENTS if not not_loaded.get(component)]
    logger.info("%s: %s", checkpoint, load_base_model(model, checkpoint, components, ema=ema))
    for component, path in (("unet", unet), ("vae", vae)):
        if path is not None:
            logger.info("%s: %s", path, load_component(model, path, component, config))
    set_compute_dtype(model.model, dtype)
    set_compute_dtype(model.cond_stage_model, dtype)
    if flash_attention:
        use_flash_attention(model.model, True)
    return model


def select_lora(
    config: ModelConfig, path: str | Path, unet: bool | None = None, text_encoder: bool | None = None
) -> LoRA:
    """Read the parts of a LoRA file that are to be applied, and check that they fit the model.

    See Pipeline.load_lora for the arguments.

    Raises:
        UserError: The file is not a LoRA or was made for another model, a required part is missing, or no part remains.
    """
    lora = read_lora(path, config)
    check_compatible(lora, config, str(path))
    layers = {}
    for component, wanted in (("unet", unet), ("text_encoder", text_encoder)):
        part, label, flag = lora.only(component).layers, LABELS[component], f"lora_ft_{component}"
        if wanted and not part:
            raise UserError(f"{path} has no {label} part ({lora}): leave out {flag}, or choose another file")
        if wanted is False and part:
            logger.warning("%s: its %s part, %d layers, is left out (%s False)", path, label, len(part), flag)
        else:
            layers.update(part)
    if not layers:
        raise UserError(f"{path}: no part of it would be applied ({lora}): leave out lora_ft_... False")
    selected = LoRA(layers, lora.metadata)
    match_shapes(BaseModules(config).shapes, selected).require(str(path))
    return selected
