"""The sections of a model YAML of the published Stable Diffusion form, as declared settings.

`target` names are compared with the known ones and never imported. The `IGNORED` settings of published YAMLs have no
use here: they choose memory tricks, configure another training, or repeat the only choice.

Upper bounds are far above every published model: a larger value is a typing error, or a file made to exhaust memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Optional

from ldm.settings.declare import REQUIRED, setting

DIFFUSION_TARGET = "ldm.models.diffusion.ddpm.LatentDiffusion"
INPAINT_TARGET = "ldm.models.diffusion.ddpm.LatentInpaintDiffusion"
UNET_TARGETS = ("ldm.models.unet.UNetModel", "ldm.modules.diffusionmodules.openaimodel.UNetModel")
VAE_TARGET = "ldm.models.autoencoder.AutoencoderKL"
IDENTITY_TARGET = "ldm.models.autoencoder.IdentityFirstStage"  # the latents are the pixels
TEXT_TARGET = "ldm.models.text_encoder.CLIPTextEncoder"
OPENCLIP_TARGET = "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder"
VIT_L14 = dict(width=768, num_layers=12, num_heads=12, activation="quick_gelu")
VIT_H14 = dict(width=1024, num_layers=24, num_heads=16, activation="gelu")
# Text encoder -> the parameters that its name stands for.
TEXT_TARGETS = {"ldm.modules.encoders.modules.FrozenCLIPEmbedder": VIT_L14, OPENCLIP_TARGET: VIT_H14, TEXT_TARGET: {}}

ARCHITECTURES = ("sd1", "sd2", "nano", "custom")
PARAMETERIZATIONS = {"eps": "epsilon", "v": "v_prediction"}  # `parameterization` in a YAML -> prediction type
MAX_SIDE = 8192  # pixels
MAX_TIMESTEPS = 100_000
MIN_BETA = 1e-8  # the standard deviation of the first noise is its square root, 1e-4
MAX_SCALE_FACTOR = 1000
MAX_LEVELS = 10  # resolutions of a network


@dataclass
class UNetParams:
    """Arguments of UNetModel. -1 is the published way to leave one of num_heads and num_head_channels out."""

    in_channels: int = setting(REQUIRED, low=1, high=128)
    model_channels: int = setting(REQUIRED, low=1, high=8192)
    out_channels: int = setting(REQUIRED, low=1, high=128)
    num_res_blocks: int = setting(REQUIRED, low=1, high=16)
    attention_resolutions: list[int] = setting(REQUIRED, low=1, high=1024, length=(1, MAX_LEVELS))
    channel_mult: list[int] = setting(REQUIRED, low=1, high=64, length=(1, MAX_LEVELS))
    num_heads: int = setting(-1, low=-1, high=1024)
    num_head_channels: int = setting(-1, low=-1, high=8192)
    transformer_depth: int = setting(1, low=1, high=32)
    context_dim: int = setting(REQUIRED, low=1, high=16384)
    use_linear_in_transformer: bool = setting(False)
    num_groups: int = setting(32, low=1, high=8192)
    IGNORED: ClassVar[tuple[str, ...]] = (
        "image_size", "use_checkpoint", "legacy", "use_spatial_transformer", "use_fp16", "dropout", "conv_resample",
        "dims", "num_classes", "use_scale_shift_norm", "resblock_updown", "use_new_attention_order",
        "enable_flash_attention", "enable_fa_with_pad",
    )  # fmt: skip


@dataclass
class UNetSection:
    """The section unet_config."""

    target: str = setting(REQUIRED, choices=UNET_TARGETS)
    params: UNetParams = setting(REQUIRED)


@dataclass
class VAENetworkParams:
    """Arguments of the encoder and the decoder of AutoencoderKL."""

    double_z: bool = setting(True, choices=(True,))
    z_channels: int = setting(REQUIRED, low=1, high=512)
    in_channels: int = setting(REQUIRED, choices=(3,))
    out_ch: int = setting(REQUIRED, choices=(3,))
    ch: int = setting(REQUIRED, low=1, high=4096)
    ch_mult: list[int] = setting(REQUIRED, low=1, high=64, length=(1, MAX_LEVELS))
    num_res_blocks: int = setting(REQUIRED, low=1, high=16)
    num_groups: int = setting(32, low=1, high=8192)
    attn_resolutions: Optional[list[int]] = setting(None)
    IGNORED: ClassVar[tuple[str, ...]] = ("resolution", "dropout")


@dataclass
class VAEParams:
    """Arguments of AutoencoderKL."""

    embed_dim: int = setting(REQUIRED, low=1, high=128)
    ddconfig: VAENetworkParams = setting(REQUIRED)
    IGNORED: ClassVar[tuple[str, ...]] = ("lossconfig", "monitor", "ckpt_path")


@dataclass
class VAESection:
    """The section first_stage_config. Its params are read as VAEParams. IdentityFirstStage has none."""

    target: str = setting(REQUIRED, choices=(VAE_TARGET, IDENTITY_TARGET))
    params: Optional[dict] = setting(None)


@dataclass
class TextParams:
    """Arguments of CLIPTextEncoder."""

    width: int = setting(REQUIRED, low=1, high=16384)
    num_layers: int = setting(REQUIRED, low=1, high=128)
    num_heads: int = setting(REQUIRED, low=1, high=1024)
    activation: str = setting(REQUIRED, choices=("quick_gelu", "gelu"))
    vocab_size: int = setting(49408, low=1, high=1_000_000)
    length: int = setting(77, low=1, high=1024)
    IGNORED: ClassVar[tuple[str, ...]] = ("freeze", "layer", "device", "max_length", "version", "arch", "use_fp16")


@dataclass
class TextSection:
    """The section cond_stage_config. Its params are read as TextParams when those of the target are added."""

    target: str = setting(REQUIRED, choices=tuple(TEXT_TARGETS))
    params: Optional[dict] = setting(None)


@dataclass
class ModelParams:
    """The section model.params. Samplers leave the last time step out and need one before it."""

    linear_start: float = setting(REQUIRED, low=MIN_BETA, below=1)
    linear_end: float = setting(REQUIRED, low=MIN_BETA, below=1)
    timesteps: int = setting(REQUIRED, low=2, high=MAX_TIMESTEPS)
    image_size: int = setting(REQUIRED, low=1, high=MAX_SIDE)
    scale_factor: float = setting(REQUIRED, low=1 / MAX_SCALE_FACTOR, high=MAX_SCALE_FACTOR)
    parameterization: str = setting("eps", choices=tuple(PARAMETERIZATIONS))
    unet_config: UNetSection = setting(REQUIRED)
    first_stage_config: VAESection = setting(REQUIRED)
    cond_stage_config: TextSection = setting(REQUIRED)
    IGNORED: ClassVar[tuple[str, ...]] = (
        "num_timesteps_cond", "log_every_t", "first_stage_key", "cond_stage_key", "cond_stage_trainable", "channels",
        "conditioning_key", "monitor", "use_ema", "scheduler_config", "finetune_keys", "use_fp16", "ckpt_path",
        "ignore_keys", "load_only_unet", "clip_denoised",
    )  # fmt: skip


@dataclass
class ModelSection:
    """The section model. `architecture` and `pad_token` are this project's own and may be left out."""

    architecture: Optional[str] = setting(None, choices=ARCHITECTURES)
    target: str = setting(REQUIRED, choices=(DIFFUSION_TARGET, INPAINT_TARGET))
    pad_token: Optional[str] = setting(None, choices=("end", "zero"))
    params: ModelParams = setting(REQUIRED)
    IGNORED: ClassVar[tuple[str, ...]] = ("base_learning_rate",)


@dataclass
class ModelDocument:
    """A whole model YAML. Sections beside `model`, as training YAMLs of CompVis have, are ignored."""

    model: ModelSection = setting(REQUIRED)
