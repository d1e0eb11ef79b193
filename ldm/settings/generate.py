"""The settings of text_to_image.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from ldm.errors import UserError, plain
from ldm.files.paths import MAX_STRENGTH
from ldm.settings.block_weights import block_weights_setting
from ldm.settings.declare import MAX_BATCH, MAX_RANK, MAX_SEED, input_path, setting
from ldm.settings.device import flash_attention_setting, jit_level_setting
from ldm.settings.model_yaml import MAX_SIDE, MAX_TIMESTEPS
from ldm.settings.read import check_values
from ldm.settings.versions import VERSIONS

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
MAX_IMAGES = 1_000_000
MAX_GUIDANCE = 1000


@dataclass
class GenerateSettings:
    """The settings of text_to_image.py: those of mindone's published script, and this project's own."""

    generate_config: Optional[str] = input_path(
        "YAML file with any of these settings; flags win over it", group="images"
    )
    # Not Optional, because "none" may be a prompt.
    prompt: str = setting("", "the prompt")
    data_path: Optional[str] = input_path(
        "text file (UTF-8) with one prompt per line, instead of prompt; an empty line is an empty prompt, but empty "
        "lines at the end do not count (a line with a space does)"
    )
    negative_prompt: str = setting("", "what the images should not show, for all prompts")
    negative_data_path: Optional[str] = input_path(
        "text file with one negative prompt per line, as many as prompts, or one for all"
    )
    n_iter: int = setting(1, "rounds; each prompt gets n_iter x n_samples images", low=1, high=MAX_IMAGES)
    n_samples: int = setting(1, "images of each prompt in a round", low=1, high=MAX_IMAGES)
    H: Optional[int] = setting(None, "height in pixels; None for the model's own", low=1, high=MAX_SIDE)
    W: Optional[int] = setting(None, "width in pixels; None for the model's own", low=1, high=MAX_SIDE)
    seed: int = setting(
        42,
        "image i depends on (seed, i) only, not on the batch size; i counts the images of all prompts",
        low=0,
        high=MAX_SEED,
    )
    init_latents: Optional[str] = setting(
        None, "starting latents instead of the seed's: an .npy of floats, (images, channels, height, width)", path=True
    )

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

    use_lora: Optional[bool] = setting(None, "apply a LoRA; None: if lora_ckpt_path is given", group="LoRA")
    lora_ckpt_path: Optional[list[str]] = setting(
        None,
        "LoRA files, each with a strength if wanted, and a second one for the text encoder: a.ckpt b.ckpt:0.7 "
        "c.ckpt:0.7:0.3",
        path=True,
    )
    lora_scale: float = setting(
        1.0,
        "multiplies the strength of every LoRA; 0 gives the base model, bit for bit",
        low=-MAX_STRENGTH,
        high=MAX_STRENGTH,
        needs="lora_ckpt_path",
    )
    lora_block_weights: list[str] = block_weights_setting(needs="lora_ckpt_path")
    lora_start: Optional[list[float]] = setting(
        None,
        "share of the sampling steps after which a LoRA is applied to the UNet: one number for all LoRAs, or one for "
        "each. 0.3 keeps the layout that the base model chooses. None: at the time steps that its file says it was "
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

    sampling_steps: int = setting(20, "steps of the sampler", group="sampling", low=1, high=MAX_TIMESTEPS)
    scale: Optional[float] = setting(
        None, "guidance scale, 1 for none; None: 9.0 (SD2.x), 7.5 (SD1.5), 4.0 (nano)", low=0, high=MAX_GUIDANCE
    )
    guidance_rescale: Optional[float] = setting(
        None,
        "share of the guided output that gets the contrast of the prompt's own, so that images are not overexposed; "
        "None: 0.7 with a LoRA trained with zero_terminal_snr, else 0",
        low=0,
        high=1,
    )
    dpm_solver: bool = setting(False, "sample with DPM-Solver instead of DPM-Solver++")
    ddim: bool = setting(False, "sample with DDIM instead of DPM-Solver++")
    ddim_eta: float = setting(0.0, "share of fresh noise in DDIM", low=0, high=1)

    output_path: str = setting(
        "output",
        "folder for samples/ and grid.png; those of an earlier run are kept as samples.old1 and so on",
        group="output",
        path=True,
    )
    skip_save: bool = setting(False, "write no PNGs")
    skip_grid: bool = setting(False, "write no grid")
    save_latents: Optional[str] = setting(
        None,
        "write the final latents to this .npy, and the starting latents to the same name with .init.npy",
        path=True,
    )
    log_level: str = setting("INFO", "DEBUG, INFO, WARNING or ERROR")

    device_target: Optional[str] = setting(
        None, "device; None: Ascend where there is one, else CPU", group="device", choices=("Ascend", "CPU")
    )
    mode: int = setting(0, "0: graph, 1: pynative", choices=(0, 1))
    ms_mode: Optional[int] = setting(None, "another name of mode", choices=(0, 1))
    jit_level: Optional[str] = jit_level_setting()
    precision: str = setting(
        "auto",
        "type of the UNet and the text encoder; auto: fp16 on Ascend, fp32 on CPU. The VAE computes in fp32",
        choices=("auto", "fp16", "fp32"),
    )
    enable_flash_attention: Optional[bool] = flash_attention_setting()
    use_parallel: bool = setting(
        False, "divide the batches between the processes that msrun started; the first one writes the files"
    )
    batch_size: Optional[int] = setting(
        None,
        "images in a call of the network, which does not change them; None: n_samples, at least 16 up to 128 x 128 "
        "pixels, and at most as many as 8 of 512 x 512 pixels",
        low=1,
        high=MAX_BATCH,
    )

    def __post_init__(self) -> None:
        """Check each setting, and the settings against each other. Raises UserError."""
        check_values(self)
        if not self.prompt and self.data_path is None:
            raise UserError('nothing to generate: give --prompt "a text" or --data_path with a file of prompts')
        exclusive = ("prompt", "data_path"), ("negative_prompt", "negative_data_path"), ("dpm_solver", "ddim")
        for name, other in exclusive:
            if getattr(self, name) and getattr(self, other):
                raise UserError(f"--{name} and --{other} are both given: leave one of them out")
        if self.ddim_eta and not self.ddim:
            raise UserError(f"--ddim_eta {self.ddim_eta} needs DDIM: add --ddim, or leave it out")
        if self.use_lora and not self.lora_ckpt_path:
            raise UserError("--use_lora is given without a file: add --lora_ckpt_path")
        if self.ms_mode is not None:
            self.mode = self.ms_mode
        self.log_level = self.log_level.rpartition(".")[2].upper()  # "logging.INFO", as published, is INFO
        if self.log_level not in LOG_LEVELS:
            raise UserError(f'log_level "{plain(self.log_level)}" is unknown: one of {", ".join(LOG_LEVELS)}')

    @property
    def sampler(self) -> str:
        """The name in ldm.diffusion.samplers.SAMPLERS."""
        return "ddim" if self.ddim else "dpm_solver" if self.dpm_solver else "dpm_solver_pp"
