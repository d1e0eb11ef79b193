"""Loading a base model, and reading LoRA files for it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import mindspore as ms

from ldm.errors import UserError, plain
from ldm.lora.formats import read_lora
from ldm.lora.formats.modules import BaseModules
from ldm.lora.lora import LoRA
from ldm.lora.merge import check_compatible, match_shapes
from ldm.lora.updates import Full, LayerUpdate
from ldm.models.attention import set_attention
from ldm.models.layers import hold_frozen_weights, set_compute_dtype
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
    unet: str | Path | None = None,
    vae: str | Path | None = None,
    ema: bool = False,
    random_unet: bool = False,
    prepare: Callable[[StableDiffusion], None] | None = None,
) -> StableDiffusion:
    """Build the networks of a configuration and load a base checkpoint, a file or a diffusers folder, into them.

    With `random_unet`, the UNet is initialised at random. The other options are those of Pipeline.from_checkpoint. The
    base checkpoint may lack a VAE if `vae` is given, and a UNet if it is random. A model in pixel space with a random
    UNet takes the text encoder alone: then the checkpoint may be of another model with the same text encoder, and its
    metadata does not count. The networks compute in fp32, unless `prepare` says otherwise, which is called before the
    weights are loaded. They are loaded in the types that the parameters have then.

    Raises:
        UserError: A file does not fit the configuration, or its metadata names another model (see ldm.weights.load).
    """
    if config.in_pixel_space and vae is not None:
        raise UserError(f"{plain(config.path)} is a model in pixel space, which has no VAE: leave out vae_ckpt_path")
    text_encoder_alone = random_unet and config.in_pixel_space
    if not text_encoder_alone:
        check_metadata(open_base_model(checkpoint).metadata, config, checkpoint)
    model = build_model(config, random=random_unet)
    if prepare is not None:
        prepare(model)
    not_loaded = {"unet": random_unet, "vae": vae is not None or text_encoder_alone}
    components = [component for component in COMPONENTS if not not_loaded.get(component)]
    logger.info("%s: %s", checkpoint, load_base_model(model, checkpoint, components, ema=ema))
    for component, path in (("unet", unet), ("vae", vae)):
        if path is not None:
            logger.info("%s: %s", path, load_component(model, path, component, config))
    return model


def set_up_sampling(model: StableDiffusion, dtype: ms.Type, flash_attention: bool) -> None:
    """Set the precision and the attention of networks that sample, before or after their weights are loaded.

    UNet and text encoder hold their weights in `dtype`. MergedLoRAs reads the fp32 weights from the files. The VAE
    computes in fp32, as it overflows in fp16.

    Args:
        model: The networks, none of which is trained or has run yet.
        dtype: ms.float32, ms.float16, or ms.bfloat16 on the CPU (see ldm.models.layers.hold_frozen_weights).
        flash_attention: Whether the UNet uses Ascend's fused attention (ldm.runtime.device.decide_flash_attention).
    """
    for network in (model.model, model.cond_stage_model):
        set_compute_dtype(network, dtype)
        hold_frozen_weights(network, dtype)
    set_attention(model.model, flash_attention, bf16=dtype == ms.bfloat16)


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
    layers: dict[str, LayerUpdate] = {}
    biases: dict[str, Full] = {}
    for component, wanted in (("unet", unet), ("text_encoder", text_encoder)):
        part, label, flag = lora.only(component), LABELS[component], f"lora_ft_{component}"
        if wanted and not part.updates():
            raise UserError(f"{path} has no {label} part ({lora}): leave out {flag}, or choose another file")
        if wanted is False and part.updates():
            logger.warning("%s: its %s part, %d layers, is left out (%s False)", path, label, len(part.layers), flag)
        else:
            layers.update(part.layers)
            biases.update(part.biases)
    if not (layers or biases):
        raise UserError(f"{path}: no part of it would be applied ({lora}): leave out lora_ft_... False")
    selected = LoRA(layers, lora.metadata, lora.embeddings, biases)  # a prompt may name its tokens in any case
    match_shapes(BaseModules(config).shapes, selected).require(str(path))
    return selected
