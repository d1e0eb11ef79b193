"""The settings of the files that make up the model: the base model, its LoRAs and its learned tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from ldm.files.paths import MAX_STRENGTH
from ldm.settings.block_weights import block_weights_setting
from ldm.settings.declare import MAX_RANK, input_path, setting
from ldm.settings.versions import VERSIONS


@dataclass
class ModelFileSettings:
    """The base model, the LoRAs that are applied to it, and the tokens that it learns."""

    version: Optional[str] = setting(
        None,
        "version of the model; None: what the checkpoint is, and nano without a checkpoint",
        group="model",
        choices=tuple(VERSIONS),
    )
    config: Optional[str] = input_path("YAML of the model; None for that of the version")
    ckpt_path: Optional[str] = input_path(
        "base checkpoint: a .safetensors, a .ckpt (MindSpore's or PyTorch's) or a diffusers folder; None for that of "
        "the version, under models/"
    )
    ckpt_ema: bool = setting(
        False, "take the moving averages (EMA) of the UNet that the checkpoint holds beside its weights"
    )
    unet_ckpt_path: Optional[str] = input_path(
        "checkpoint with a UNet that replaces the base checkpoint's, as training without LoRA saves it"
    )
    vae_ckpt_path: Optional[str] = input_path(
        "checkpoint with a VAE that replaces the base checkpoint's, or is used where that has none: a VAE alone, or "
        "any base model, as a file or a folder"
    )

    use_lora: Optional[bool] = setting(
        None, "apply a LoRA; None: if lora_ckpt_path is given, or prompts name one", group="LoRA"
    )
    lora_ckpt_path: Optional[list[str]] = setting(
        None,
        "LoRA files, each with a strength if wanted, and a second one for the text encoder: a.ckpt b.ckpt:0.7 "
        "c.ckpt:0.7:0.3",
        path=True,
    )
    lora_dir: Optional[str] = input_path(
        "folder of LoRA files that prompts may name, as in <lora:name:0.8>, beside those of lora_ckpt_path; it needs "
        "prompt_syntax a1111"
    )
    lora_scale: float = setting(
        1.0,
        "multiplies the strength of every LoRA of lora_ckpt_path; 0 gives the base model, bit for bit",
        low=-MAX_STRENGTH,
        high=MAX_STRENGTH,
        needs="lora_ckpt_path",
    )
    lora_block_weights: list[str] = block_weights_setting(needs="lora_ckpt_path")
    lora_start: Optional[list[float]] = setting(
        None,
        "share of the steps that are taken after which a LoRA is applied to the UNet: one number for all LoRAs, or one "
        "for each. 0.3 keeps the layout that the base model chooses. None: at the time steps that its file says it was "
        "trained on (min_timestep, max_timestep), else at all",
        low=0,
        below=1,
        needs="lora_ckpt_path",
    )
    lora_end: Optional[list[float]] = setting(
        None,
        "share of the sampling steps up to which a LoRA is applied to the UNet, as lora_start",
        above=0,
        high=1,
        needs="lora_ckpt_path",
    )
    lora_ft_unet: Optional[bool] = setting(
        None,
        "None: apply the UNet part if there is one; False: leave it out; True: it must be there",
        needs="lora_ckpt_path",
    )
    lora_ft_text_encoder: Optional[bool] = setting(
        None,
        "None: apply the text encoder part if there is one; False: leave it out; True: it must be there",
        needs="lora_ckpt_path",
    )
    lora_rank: Optional[int] = setting(
        None,
        "rank, which is read from the file; a value given here is compared with it",
        low=1,
        high=MAX_RANK,
        needs="lora_ckpt_path",
    )

    ti_ckpt_path: Optional[list[str]] = setting(
        None,
        "files of learned tokens (textual inversion) for prompts and negative prompts, of diffusers, A1111, kohya or "
        "cloneofsimo, each with a name if wanted: a.safetensors b.pt:<name>. None: the token in the file, or else the "
        "file's name",
        group="textual inversion",
        path=True,
    )
