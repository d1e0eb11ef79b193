"""The settings of text_to_image.py."""

# ruff: noqa: UP007, UP045 (the annotations are read when it runs, on Python 3.9 too)
from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from ldm.errors import UserError, plain
from ldm.files.paths import MOST_STRENGTH
from ldm.settings.declare import MOST_BATCH, MOST_RANK, setting
from ldm.settings.model_yaml import MOST_SIDE, MOST_TIMESTEPS
from ldm.settings.read import check_values
from ldm.settings.versions import VERSIONS

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
MOST_IMAGES = 1_000_000
MOST_GUIDANCE = 1000


@dataclass
class GenerateSettings:
    """Names as in mindone's published text_to_image.py, with this project's own beside them."""

    generate_config: Optional[str] = setting(
        None,
        "YAML file with any of these settings; flags win over it",
        group="file of settings",
        path=True,
        project=True,
    )

    # A text, not Optional: "none" may be a prompt.
    prompt: str = setting("", "the text to draw", group="what to draw")
    data_path: Optional[str] = setting(
        None,
        "a text file of prompts instead, one a line (UTF-8); an empty line is an empty prompt, but empty lines at "
        "the end do not count (a line with a space does)",
        group="what to draw",
        path=True,
        project=True,
    )
    negative_prompt: str = setting("", "what to keep away from, for all prompts", group="what to draw")
    negative_data_path: Optional[str] = setting(
        None,
        "a text file of negative prompts, read as data_path is: as many as prompts, or one for all",
        group="what to draw",
        path=True,
        project=True,
    )
    n_iter: int = setting(
        1, "rounds a prompt; a prompt gets n_iter x n_samples images", group="what to draw", low=1, high=MOST_IMAGES
    )
    n_samples: int = setting(1, "images a prompt and round", group="what to draw", low=1, high=MOST_IMAGES)
    H: Optional[int] = setting(
        None, "height in pixels; None for the model's own", group="what to draw", low=1, high=MOST_SIDE
    )
    W: Optional[int] = setting(
        None, "width in pixels; None for the model's own", group="what to draw", low=1, high=MOST_SIDE
    )
    seed: int = setting(
        42,
        "image i comes from (seed, i) alone, whatever the batch size; counted over all prompts",
        group="what to draw",
        low=0,
        high=2**32 - 1,
    )
    init_latents: Optional[str] = setting(
        None,
        "start from these latents (.npy, float, images x channels x height x width) instead of the seed's",
        group="what to draw",
        path=True,
    )

    version: Optional[str] = setting(
        None,
        "which model; nano where neither this nor a checkpoint is given, read from the checkpoint where that says it",
        group="model",
        choices=tuple(VERSIONS),
    )
    config: Optional[str] = setting(
        None, "the model's YAML; None for the version's", group="model", path=True, project=True
    )
    ckpt_path: Optional[str] = setting(
        None,
        "the base checkpoint: a .safetensors, a .ckpt (MindSpore's or PyTorch's) or a diffusers folder; None for the "
        "version's, under models/",
        group="model",
        path=True,
        project=True,
    )
    ckpt_ema: bool = setting(
        False, "take the moving averages of the UNet (EMA) that the checkpoint holds beside its weights", group="model"
    )
    unet_ckpt_path: Optional[str] = setting(
        None,
        "a UNet to put in the place of the checkpoint's, as training without LoRA saves it",
        group="model",
        path=True,
        project=True,
    )

    vae_ckpt_path: Optional[str] = setting(
        None,
        "a VAE to put in the place of the checkpoint's, or where that has none: a file or folder with a VAE alone, or "
        "any base model",
        group="model",
        path=True,
        project=True,
    )

    use_lora: Optional[bool] = setting(None, "apply a LoRA; None: yes where lora_ckpt_path is given", group="LoRA")
    lora_ckpt_path: Optional[list[str]] = setting(
        None,
        "LoRA file or files, each with a weight where wanted, or with a second one for the text encoder: a.ckpt "
        "b.ckpt:0.7 c.ckpt:0.7:0.3",
        group="LoRA",
        path=True,
    )
    lora_scale: float = setting(
        1.0,
        "multiplies the weight of every LoRA; 0 is the base, bit for bit",
        group="LoRA",
        low=-MOST_STRENGTH,
        high=MOST_STRENGTH,
        needs="lora_ckpt_path",
    )
    lora_ft_unet: Optional[bool] = setting(
        None,
        "None: as the file has it; False: leave its UNet part out; True: it must have one",
        group="LoRA",
        needs="lora_ckpt_path",
    )
    lora_ft_text_encoder: Optional[bool] = setting(
        None,
        "None: as the file has it; False: leave its text encoder part out; True: it must have one",
        group="LoRA",
        needs="lora_ckpt_path",
    )
    lora_rank: Optional[int] = setting(
        None,
        "the rank is read from the file; given here, it is compared with it",
        group="LoRA",
        low=1,
        high=MOST_RANK,
        needs="lora_ckpt_path",
    )

    sampling_steps: int = setting(20, "network calls an image", group="sampling", low=1, high=MOST_TIMESTEPS)
    scale: Optional[float] = setting(
        None,
        "guidance; 1 for none; None for 9.0 (SD2.x), 7.5 (SD1.5), 4.0 (nano)",
        group="sampling",
        low=0,
        high=MOST_GUIDANCE,
    )
    dpm_solver: bool = setting(False, "sample with DPM-Solver instead of DPM-Solver++", group="sampling")
    ddim: bool = setting(False, "sample with DDIM instead of DPM-Solver++", group="sampling")
    ddim_eta: float = setting(0.0, "DDIM's share of fresh noise", group="sampling", low=0, high=1)

    output_path: str = setting(
        "output",
        "folder for samples/ and grid.png; an earlier run's are kept as samples.old1 ...",
        group="output",
        path=True,
    )
    skip_save: bool = setting(False, "write no PNGs", group="output")
    skip_grid: bool = setting(False, "write no grid", group="output")
    save_latents: Optional[str] = setting(
        None,
        "write the final latents to this .npy and the starting ones to the same name with .init.npy",
        group="output",
        path=True,
    )
    log_level: str = setting("INFO", "DEBUG, INFO, WARNING or ERROR", group="output")

    device_target: Optional[str] = setting(
        None, "None: Ascend where there is one, else CPU", group="runtime", choices=("Ascend", "CPU")
    )
    mode: int = setting(0, "0 graph, 1 pynative", group="runtime", choices=(0, 1))
    ms_mode: Optional[int] = setting(None, "another name of mode", group="runtime", choices=(0, 1))
    jit_level: Optional[str] = setting(None, "Ascend's compiler level", group="runtime", choices=("O0", "O1", "O2"))
    precision: str = setting(
        "auto",
        "of UNet and text encoder: auto is fp16 on Ascend, fp32 on CPU; the VAE is always fp32",
        group="runtime",
        choices=("auto", "fp16", "fp32"),
    )
    enable_flash_attention: bool = setting(False, "fused attention, on Ascend only", group="runtime")
    batch_size: Optional[int] = setting(
        None,
        "images a network call; None: n_samples, 16 where they are small, at most 8 of 512 x 512 pixels. The images "
        "are the same",
        group="runtime",
        low=1,
        high=MOST_BATCH,
    )

    def __post_init__(self) -> None:
        """Check each setting, and the settings against each other. Raises UserError."""
        check_values(self)
        if not self.prompt and self.data_path is None:
            raise UserError('nothing to draw: give --prompt "a text" or --data_path with a file of prompts')
        if self.prompt and self.data_path is not None:
            raise UserError("--prompt and --data_path are both given: leave one of them out")
        if self.negative_prompt and self.negative_data_path is not None:
            raise UserError("--negative_prompt and --negative_data_path are both given: leave one of them out")
        if self.dpm_solver and self.ddim:
            raise UserError("--dpm_solver and --ddim are both given: leave one of them out")
        if self.ddim_eta and not self.ddim:
            raise UserError(f"--ddim_eta {self.ddim_eta} has a meaning for DDIM only: add --ddim, or leave it out")
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
