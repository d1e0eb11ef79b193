"""The settings of text_to_image.py, and what they amount to: prompts, model, checkpoint, LoRAs."""

# ruff: noqa: UP007, UP045 (the annotations are read when it runs, on Python 3.9 too)
from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Optional

from ldm.diffusion.sampling import Sampling, check_sampling
from ldm.errors import UserError, plain
from ldm.files.inputs import check_file, is_folder, is_there
from ldm.files.paths import MOST_STRENGTH, ROOT, under_root, weighted_path
from ldm.files.prompts import MOST_CHARACTERS, read_prompts
from ldm.settings.model import MOST_SIDE, MOST_TIMESTEPS, ModelConfig, load_model_config
from ldm.settings.read import MOST_BATCH, MOST_RANK, setting

logger = logging.getLogger(__name__)

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
MOST_IMAGES = 1_000_000
MOST_GUIDANCE = 1000


class Version(NamedTuple):
    """A published model: its default checkpoint, under models/ and by the published file name, and its model YAML."""

    checkpoint: str
    config: str


# File names as published by mindone's Stable Diffusion example.
VERSIONS = {
    "1.5": Version("models/sd_v1.5-d0ab7146.ckpt", "configs/v1-inference.yaml"),
    "2.0": Version("models/sd_v2_base-57526ee4.ckpt", "configs/v2-inference.yaml"),
    "2.0-v": Version("models/sd_v2_768_v-e12e3a9b.ckpt", "configs/v2-vpred-inference.yaml"),
    "2.1": Version("models/sd_v2-1_base-7c8d09ce.ckpt", "configs/v2-inference.yaml"),
    "2.1-v": Version("models/sd_v2-1_768_v-061732d1.ckpt", "configs/v2-vpred-inference.yaml"),
    "nano": Version("models/nano/nano.safetensors", "configs/nano.yaml"),
}

# Guidance where none is given: mindone's published defaults; nano's is this project's own.
DEFAULT_SCALES = {"sd2": 9.0, "nano": 4.0}
DEFAULT_SCALE = 7.5


@dataclass
class GenerateSettings:
    """Names as in mindone's published text_to_image.py, with this project's own beside them."""

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
    )
    lora_ft_unet: Optional[bool] = setting(
        None, "None: as the file has it; False: leave its UNet part out; True: it must have one", group="LoRA"
    )
    lora_ft_text_encoder: Optional[bool] = setting(
        None, "None: as the file has it; False: leave its text encoder part out; True: it must have one", group="LoRA"
    )
    lora_rank: Optional[int] = setting(
        None, "the rank is read from the file; given here, it is compared with it", group="LoRA", low=1, high=MOST_RANK
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


class LoRAFile(NamedTuple):
    """A LoRA to apply, and how much of it (the file's own weight times lora_scale); text_weight: of its text encoder's
    part, None for the same.
    """

    path: Path
    weight: float
    text_weight: Optional[float] = None


@dataclass
class Plan:
    """What the settings amount to, checked as far as that goes without opening a network.

    prompts, negative_prompts: one an image, all images of the first prompt first.
    """

    prompts: list[str]
    negative_prompts: list[str]
    images_per_prompt: int
    model: ModelConfig
    version: Optional[str]
    checkpoint: Path
    unet_checkpoint: Optional[Path]
    vae_checkpoint: Optional[Path]
    loras: list[LoRAFile]
    scale: float


def plan(config: GenerateSettings) -> Plan:
    """Find the prompts, the model and the files.

    Raises UserError for a file that is missing or cannot be read, for prompts that are not UTF-8, for prompts and
    negative prompts that do not pair, for a model that is not known or not the checkpoint's, for a size or a number of
    steps that is not the model's, and for a save_latents that is no name for latents. ldm.files.outputs tries the
    outputs.
    """
    for name in ("prompt", "negative_prompt"):
        _check_text(getattr(config, name), name)
    prompts = read_prompts(config.data_path, "data_path") if config.data_path is not None else [config.prompt]
    if config.negative_data_path is not None:
        negative = read_prompts(config.negative_data_path, "negative_data_path")
        if len(negative) == 1 < len(prompts):
            logger.info("negative_data_path %s: its only line is for all %d prompts",
                        plain(config.negative_data_path), len(prompts))  # fmt: skip
            negative = negative * len(prompts)
        if len(negative) != len(prompts):
            raise UserError(
                f"negative_data_path {plain(config.negative_data_path)} has {len(negative)} negative prompts for "
                f"{len(prompts)} prompts: give as many, or one for all (empty lines at the end do not count, a line "
                "with a space does)"
            )
    else:
        negative = [config.negative_prompt] * len(prompts)
    images_per_prompt = config.n_iter * config.n_samples
    if len(prompts) * images_per_prompt > MOST_IMAGES:
        raise UserError(
            f"{len(prompts)} prompts x n_iter {config.n_iter} x n_samples {config.n_samples} are more than "
            f"{MOST_IMAGES} images: lower them"
        )

    version, checkpoint, detected = _checkpoint(config)
    unet_checkpoint = vae_checkpoint = None
    if config.unet_ckpt_path is not None:
        unet_checkpoint = _existing(config.unet_ckpt_path, "unet_ckpt_path")
    if config.vae_ckpt_path is not None:
        vae_checkpoint = _existing(config.vae_ckpt_path, "vae_ckpt_path")
    model = detected or _model_config(config, version)
    loras = _lora_files(config)
    size = Sampling(steps=config.sampling_steps, height=config.H, width=config.W, batch_size=config.batch_size or 1)
    check_sampling(size, model)
    _check_outputs(config)
    if config.init_latents is not None:
        check_file(config.init_latents, "init_latents", "give a .npy file of numbers")

    def spread(texts: list[str]) -> list[str]:
        return [text for text in texts for _ in range(images_per_prompt)]

    scale = config.scale
    if scale is None:
        scale = DEFAULT_SCALES.get(model.architecture, DEFAULT_SCALE)
    if scale == 1 and any(negative):
        logger.warning("scale 1 is without guidance: the negative prompts are not used")
    if config.skip_save and config.skip_grid and config.save_latents is None:
        logger.warning("skip_save and skip_grid without save_latents: nothing of this run is kept")
    return Plan(
        prompts=spread(prompts),
        negative_prompts=spread(negative),
        images_per_prompt=images_per_prompt,
        model=model,
        version=version,
        checkpoint=checkpoint,
        unet_checkpoint=unet_checkpoint,
        vae_checkpoint=vae_checkpoint,
        loras=loras,
        scale=scale,
    )


def parse_lora_path(text: str) -> LoRAFile:
    """`path`, `path:weight` or `path:weight:weight of the text encoder`; a file whose whole name is `text` wins.

    Raises UserError for a file that is not there and for a weight that is no number.
    """
    path, weights = weighted_path(text, "lora_ckpt_path")
    return LoRAFile(path, *(weights or (1.0,)))


def _check_text(text: str, name: str) -> None:
    """Raise UserError for a prompt that is too long, or not UTF-8: its bytes come as surrogates then."""
    if len(text) > MOST_CHARACTERS:
        raise UserError(
            f"--{name} has {len(text):,} characters, at most {MOST_CHARACTERS:,} are read: shorten it, or give several "
            "prompts in the file of --data_path"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"--{name} is not UTF-8 text (character {error.start + 1}, {text[error.start]!a}): type it anew, or set "
            "the terminal to UTF-8"
        ) from None


def _existing(path: str | Path, name: str) -> Path:
    """The path of a file or folder. Raises UserError where it is neither, or is a file that may not be read."""
    if not is_folder(path, name):
        check_file(path, name)
    return Path(path)


def _checkpoint(config: GenerateSettings) -> tuple[Optional[str], Path, Optional[ModelConfig]]:
    """(version, base checkpoint, its model where nothing but the checkpoint says which it is); the version is None
    where a model YAML, or the checkpoint itself, stands in for it.
    """
    if config.ckpt_path is not None:
        path = _existing(config.ckpt_path, "ckpt_path")
        if config.version is None and config.config is None:
            return _detected(path)
        return config.version, path, None
    version = config.version or "nano"
    published = VERSIONS[version].checkpoint
    path = under_root(published)
    if not is_there(path):
        if version == "nano":
            way = "it comes with the repository (git checkout models/nano); tools/nano rebuilds it"
        else:
            way = (
                f"give --ckpt_path with any Stable Diffusion {version} checkpoint (.safetensors, .ckpt or a diffusers "
                "folder), or make the file from one: python tools/model_conversion/convert_weights.py --source "
                f"<checkpoint> --target {published}"
            )
        raise UserError(f"{published}, the checkpoint of version {version}, does not exist: {way}")
    return version, path, None


def _detected(path: Path) -> tuple[Optional[str], Path, Optional[ModelConfig]]:
    """What a checkpoint is that comes without a version: by its published name, or by what it says and its shapes."""
    for version, published in VERSIONS.items():
        if path.name == Path(published.checkpoint).name:
            return version, path, None
    from ldm.weights.architecture import detect_model

    model = detect_model(path, way_out=f"add --version (one of {', '.join(VERSIONS)}) or --config")
    for version, published in VERSIONS.items():
        if Path(model.path) == ROOT / published.config:
            logger.info("%s is taken for version %s, by what it says and its shapes", path, version)
            return version, path, model
    logger.info("%s is a model of its own, described by %s", path, model.path)
    return None, path, model


def _model_config(config: GenerateSettings, version: Optional[str]) -> ModelConfig:
    if config.config is None:
        return load_model_config(ROOT / VERSIONS[version].config)
    model = load_model_config(under_root(config.config))
    if version is not None and model.architecture != "custom":
        expected = load_model_config(ROOT / VERSIONS[version].config)
        for what in ("architecture", "prediction_type"):
            ours, theirs = getattr(model, what), getattr(expected, what)
            if ours != theirs:
                raise UserError(
                    f"--config {plain(config.config)} has {what} {ours}, version {version} has {theirs}: "
                    f"use {VERSIONS[version].config}, or the version (or checkpoint) that belongs to your YAML"
                )
    return model


def _lora_files(config: GenerateSettings) -> list[LoRAFile]:
    if not config.lora_ckpt_path:
        settings = ("lora_scale", "lora_ft_unet", "lora_ft_text_encoder", "lora_rank")
        given = [name for name in settings if getattr(config, name) != getattr(GenerateSettings, name)]
        if given and config.use_lora is None:
            logger.warning("no lora_ckpt_path is given: %s has no effect", ", ".join(given))
        return []
    if config.use_lora is False:
        logger.warning("use_lora is False: lora_ckpt_path is not applied")
        return []
    files = []
    for text in config.lora_ckpt_path:
        path, *weights = parse_lora_path(text)
        _existing(path, "lora_ckpt_path")
        files.append(LoRAFile(path, *(None if weight is None else weight * config.lora_scale for weight in weights)))
    return files


def _check_outputs(config: GenerateSettings) -> None:
    if config.save_latents is not None:
        target = Path(config.save_latents)
        if target.suffix != ".npy":
            raise UserError(f"save_latents {plain(target)} must end in .npy")
        if is_folder(target, "save_latents"):
            raise UserError(f"save_latents {plain(target)} is a folder: give the path of a .npy file")
        if config.init_latents is not None and os.path.realpath(target) == os.path.realpath(config.init_latents):
            raise UserError(f"save_latents would overwrite init_latents {plain(target)}: give another name")
