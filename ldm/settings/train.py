"""The settings of train_text_to_image.py, under the names of the published recipes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Optional, Union

from ldm.errors import UserError
from ldm.settings.advice import AdviceSettings
from ldm.settings.data import BucketSettings, CaptionSettings, ImageSettings, MaskSettings, PriorSettings
from ldm.settings.declare import MAX_BATCH, MAX_COUNT, default_of, input_path, setting
from ldm.settings.device import PRECISIONS, PYNATIVE_BF16_FAULT, flash_attention_setting, jit_level_setting
from ldm.settings.lora import LoRASettings, graph_setting
from ldm.settings.loss import LossSettings
from ldm.settings.model_yaml import MAX_TIMESTEPS
from ldm.settings.optimizer import OptimizerSettings, followed_setting
from ldm.settings.report import ReportSettings
from ldm.settings.samples import SampleSettings
from ldm.settings.saving import SavingSettings
from ldm.settings.textual_inversion import TextualInversionSettings
from ldm.settings.validation import ValidationSettings


@dataclass
class ModelSettings:
    """Which files a run reads and writes, and what it trains."""

    train_config: Optional[str] = input_path(
        "YAML file with any of these settings; flags win over it", group="files", set_by_comparison=True
    )
    data_path: Optional[str] = input_path(
        "data set: a folder of images with img_txt.csv, with caption files, in kohya's folders, with metadata.jsonl, "
        "with tar shards, or a dataset_config (docs/data.md)",
        set_by_comparison=True,
        aliases=("instance_data_dir", "train_data_dir", "dataset_config"),
    )
    output_path: str = setting(
        "output/train", "folder for checkpoints, logs and the cache", path=True, set_by_comparison=True
    )
    pretrained_model_path: Optional[str] = input_path(
        "base checkpoint that training starts from: a .safetensors, a .ckpt (MindSpore's or PyTorch's) or a "
        "diffusers folder",
        set_by_comparison=True,
    )
    pretrained_model_ema: bool = setting(
        False,
        "start from the moving averages (EMA) of the UNet that the checkpoint holds beside its weights",
        not_in_diffusers="convert the base model with --ema first",
    )
    vae_ckpt_path: Optional[str] = input_path(
        "checkpoint with a VAE that replaces the base checkpoint's, or is used where that has none: a VAE alone, "
        "or any base model, as a file or a folder",
        not_in_diffusers="give a diffusers folder with that VAE in it as --base",
    )
    model_config: Optional[str] = input_path(
        "YAML of the model; None: what the metadata and the shapes of the checkpoint show"
    )
    resume: Union[bool, str] = setting(
        False,
        "True: continue from the last training state in output_path; a path: from that training state or folder",
        path=True,
        set_by_comparison=True,
    )

    unet_initialize_random: bool = setting(
        False,
        "start from a random UNet, and take only the VAE and the text encoder from the checkpoint",
        group="network",
    )


@dataclass
class TrainSettings(
    SavingSettings,
    ReportSettings,
    OptimizerSettings,
    AdviceSettings,
    SampleSettings,
    LossSettings,
    ValidationSettings,
    PriorSettings,
    MaskSettings,
    BucketSettings,
    CaptionSettings,
    ImageSettings,
    LoRASettings,
    TextualInversionSettings,
    ModelSettings,
):
    """The settings of train_text_to_image.py: those of mindone's published recipes, and this project's own.

    Their order in `-h` is that of the bases, from the last to the first, and then those declared here.
    """

    min_timestep: int = setting(
        0,
        "train on time steps from this one on: 0 is a clean image, the model's last one is noise. A LoRA's file says "
        "on which time steps it was trained, and generation applies it there",
        low=0,
        high=MAX_TIMESTEPS,
        resume="fixed",
        not_in_diffusers="diffusers' script trains on all time steps",
    )
    max_timestep: Optional[int] = setting(
        None,
        "train on time steps below this one; None: up to the model's last one",
        low=1,
        high=MAX_TIMESTEPS,
        resume="fixed",
        not_in_diffusers="diffusers' script trains on all time steps",
    )

    epochs: int = setting(10, "passes over the data, unless max_steps is given", group="length", low=1, high=MAX_COUNT)
    max_steps: Optional[int] = setting(None, "optimizer steps in all; wins over epochs", low=1, high=MAX_COUNT)
    # A resumed run may divide the same images among another number of processes: ldm.training.resume compares those.
    train_batch_size: int = setting(4, "images per batch and device", low=1, high=MAX_BATCH, graph_key=True)
    gradient_accumulation_steps: int = graph_setting(
        1, "batches whose gradients one optimizer step averages", low=1, high=MAX_BATCH
    )

    gradient_checkpointing: bool = setting(
        False,
        "keep only the inputs of the UNet's blocks, and compute each block, and a trained text encoder, again for the "
        "gradients: less memory, more time (docs/performance.md). The results are the same up to rounding",
        graph_key=True,
        resume="followed",
        not_in_diffusers="it would save memory on this side alone",
    )

    clip_grad: bool = followed_setting(
        False, "scale gradients down to max_grad_norm", group="gradients and loss scale", graph_key=True
    )
    max_grad_norm: float = followed_setting(1.0, "largest global norm of the gradients", above=0, high=1e30)
    loss_scaler_type: str = setting(
        "auto",
        "auto: dynamic in fp16, none in fp32",
        choices=("auto", "dynamic", "static", "none"),
        resume="followed",
        set_by_comparison=True,
    )
    init_loss_scale: float = setting(65536.0, "first loss scale; with static, the only one", above=0, high=2**32)
    loss_scale_factor: float = setting(
        2.0,
        "dynamic: the scale is divided by it at an overflow and multiplied by it after scale_window steps",
        above=1,
        high=65536,
        resume="followed",
    )
    scale_window: int = setting(
        1000, "dynamic: steps without overflow before the scale grows", low=1, high=MAX_COUNT, resume="followed"
    )
    drop_overflow_update: bool = setting(
        True, "skip the optimizer step when the gradients overflow", resume="followed", graph_key=True
    )

    use_ema: bool = graph_setting(
        False,
        "keep a moving average (EMA) of the trained parameters, and save it in the checkpoints",
        group="saving",
        not_in_diffusers="diffusers' script keeps no moving average of a LoRA",
    )
    ema_decay: float = setting(0.9999, "decay of the moving average in each step", low=0, below=1, resume="followed")
    ckpt_save_interval: int = setting(1, "epochs between checkpoints (steps with step_mode)", low=1, high=MAX_COUNT)
    step_mode: bool = setting(False, "count ckpt_save_interval in steps, not epochs")
    ckpt_max_keep: int = setting(10, "number of checkpoints to keep, the newest ones", low=1, high=MAX_COUNT)
    log_level: str = setting(
        "INFO",
        "the least level of messages in log.txt and on the screen",
        choices=("DEBUG", "INFO", "WARNING", "ERROR"),
    )

    device_target: Optional[str] = setting(
        None, "device; None: Ascend where there is one, else CPU", group="device", choices=("Ascend", "CPU")
    )
    mode: int = setting(0, "0: graph, 1: pynative (slow, for debugging)", choices=(0, 1), graph_key=True)
    jit_level: Optional[str] = jit_level_setting(graph_key=True)
    precision: str = setting(
        "auto",
        "auto: what a resumed run was begun in; fp16 on Ascend; on the CPU bf16 in graph mode where the compiled "
        "kernels multiply it and the base model is frozen, else fp32. A first Ascend 910 has products and convolutions "
        "in fp16 alone. bf16, on the CPU: the frozen weights of UNet and text encoder take half the memory and are "
        "multiplied in bf16, all else is fp32 (docs/precision.md)",
        choices=PRECISIONS,
        resume="fixed",
        set_by_comparison=True,
    )
    seed: int = setting(
        42,
        "seed of all random draws",
        low=0,
        below=2**32,
        resume="fixed",
        shared_with_diffusers=True,
        set_by_comparison=True,
    )
    compile_cache: bool = setting(
        False, "keep the compiled training step under output_path/cache, so that resuming starts sooner"
    )
    use_parallel: bool = setting(False, "data parallel over the processes that msrun started", set_by_comparison=True)
    shard_optimizer: bool = setting(
        False,
        "whole-UNet training: divide the optimizer's moments and the moving average among the processes",
        graph_key=True,
        needs="use_parallel",
        not_in_diffusers="the comparison trains in one process",
    )
    enable_flash_attention: Optional[bool] = flash_attention_setting(graph_key=True)
    dataset_sink_mode: bool = setting(False, "feed batches through Ascend's data queue while a step runs (Ascend only)")

    def __post_init__(self) -> None:
        """Check each setting, and the settings against each other. Raises UserError."""
        CaptionSettings.__post_init__(self)  # which checks all values
        self.check_loss()
        self.check_optimizer()
        self.check_validation()
        self.check_samples()
        self.check_saving()
        self.check_textual_inversion()
        if self.use_lora and not (self.lora_ft_unet or self.lora_ft_text_encoder):
            raise UserError("lora_ft_unet and lora_ft_text_encoder are both False: use_lora has nothing to train")
        if self.placeholder_token is not None and self.unet_initialize_random:
            raise UserError("unet_initialize_random does not go with placeholder_token: a token is learned for a UNet")
        if self.use_lora and self.unet_initialize_random:
            raise UserError("unet_initialize_random trains a UNet from nothing; that is not for use_lora")
        if self.lora_config is not None and self.lora_targets != ["attention"]:
            raise UserError("lora_config and lora_targets both say which layers: leave one of them out")
        if self.shard_optimizer and not self.use_parallel:
            raise UserError("shard_optimizer needs use_parallel: it divides the optimizer's state among processes")
        if self.shard_optimizer and self.use_lora:
            raise UserError("shard_optimizer is for training the whole UNet: leave it out, a LoRA's state is small")
        if self.shard_optimizer and self.placeholder_token is not None:
            raise UserError("shard_optimizer is for training the whole UNet: leave it out, a token's state is small")
        if self.shard_optimizer and self.optim not in ("adamw", "lion"):
            raise UserError(f"shard_optimizer does not divide the state of {self.optim}: use adamw or lion")
        if self.precision == "bf16" and not (self.use_lora or self.trains_token_alone):
            raise UserError(
                "precision bf16 holds the UNet's weights in bf16, and a training of the whole UNet trains and saves "
                "them in fp32: use auto or fp32, or train a LoRA (use_lora)"
            )
        if self.precision == "bf16" and self.mode == 1:
            raise UserError(PYNATIVE_BF16_FAULT)
        if self.text_encoder_lr is not None and not self.lora_ft_text_encoder:
            raise UserError("text_encoder_lr needs lora_ft_text_encoder: give that too, or leave it out")
        if self.unet_lr is not None and self.use_lora and not self.lora_ft_unet:
            raise UserError("unet_lr has no effect with lora_ft_unet False: leave it out, or train the UNet too")
        if self.unet_lr is not None and self.trains_token_alone:
            raise UserError("unet_lr has no effect where the token is trained alone: give ti_lr, or use_lora too")
        if self.use_ema and self.optim == "adamwschedulefree":
            raise UserError("use_ema does not go with adamwschedulefree, which averages the parameters: leave it out")
        if self.scale_weight_norms is not None and (self.use_ema or self.optim == "adamwschedulefree"):
            raise UserError("scale_weight_norms does not go with averages (use_ema, adamwschedulefree): leave one out")
        if self.scale_weight_norms is not None and self.algo in ("loha", "lokr"):
            raise UserError(f"scale_weight_norms is for pairs of factors, not for algo {self.algo}: leave one out")
        if self.scale_weight_norms is not None and self.use_tucker:
            raise UserError("scale_weight_norms does not go with the third factor of use_tucker: leave one out")
        for field in fields(self):
            name = field.name
            if field.metadata["needs"] == "use_lora" and not self.use_lora:
                if getattr(self, name) and getattr(self, name) != default_of(field):
                    raise UserError(
                        f"{name} needs use_lora: without it the UNet is trained as a whole, and nothing else"
                    )
        self.check_lora()
        if self.conditioning_data_dir is not None and not self.masked_loss:
            raise UserError("conditioning_data_dir has no effect without masked_loss: give that too, or leave it out")
        if self.cache_only and not (self.cache_latents or self.cache_text):
            raise UserError("cache_only needs cache_latents or cache_text: there is nothing else to encode")
        if self.with_prior_preservation and not self.class_prompt:
            raise UserError('with_prior_preservation needs class_prompt, such as "a photo of a dog"')

    @property
    def trains_text_encoder(self) -> bool:
        """Whether the training step encodes the captions itself, because something in the text encoder is trained."""
        return self.lora_ft_text_encoder or self.placeholder_token is not None

    @property
    def trains_token_alone(self) -> bool:
        """Whether a token is learned and nothing else."""
        return self.placeholder_token is not None and not self.use_lora
