"""Checks of the settings, and what they say of the model, without MindSpore, whose import takes seconds."""

from __future__ import annotations

import logging

from ldm.data.upright import parse_color
from ldm.errors import UserError, plain
from ldm.files.documents import read_json, read_yaml
from ldm.files.inputs import check_file, is_folder, is_there
from ldm.files.paths import under_root
from ldm.settings.model import ModelConfig, load_model_config
from ldm.settings.train import TrainSettings
from ldm.textual_inversion.embedding import check_token, is_word
from ldm.training.report.tensorboard import check_tensorboard
from ldm.training.sample_prompts import check_sample_prompts
from ldm.weights.architecture import config_with_tokens, detect_model_config

logger = logging.getLogger(__name__)

_REQUIRED = {
    "data_path": "give the data set, such as a folder with images and img_txt.csv",
    "pretrained_model_path": "give a Stable Diffusion checkpoint (.safetensors, .ckpt or a diffusers folder)",
}


def check_settings(settings: TrainSettings) -> None:
    """Check a run's settings and the files that they name.

    Raises:
        UserError: A setting or a file is missing, the model YAML cannot be read, or the image size or the time steps
            do not fit it, or the loss does not go with what it predicts.
    """
    for name, way in _REQUIRED.items():
        path = getattr(settings, name)
        if path is None:
            raise UserError(f"--{name} is needed: {way}, on the command line or in the YAML file of --train_config")
        if not is_there(path, name):
            raise UserError(f"{name} {plain(path)} does not exist: {way}")
    for name in ("pretrained_model_path", "vae_ckpt_path", "lora_init_path"):
        path = getattr(settings, name)
        if path is not None and not is_folder(path, name):
            check_file(path, name)
    if isinstance(settings.resume, str) and not is_folder(settings.resume, "resume"):
        check_file(settings.resume, "resume", "give a training state (state-<step>.safetensors) or the folder of a run")
    if settings.lora_config is not None:
        check_file(under_root(settings.lora_config), "lora_config", "give the path of a JSON or YAML file")
    if settings.precision == "bf16" and trains_base_model(settings):
        raise UserError(
            "precision bf16 holds the base model's weights in bf16, and trainable_model in lora_config trains them: "
            "use auto or fp32, or leave trainable_model out"
        )
    if settings.pretrained_model_ema and settings.unet_initialize_random:
        raise UserError(
            "pretrained_model_ema does not go with unet_initialize_random: it selects weights of the UNet, which are "
            "not read from the checkpoint then"
        )
    if settings.placeholder_token is not None:
        check_token(settings.placeholder_token, "placeholder_token")
        if is_word(settings.placeholder_token):
            raise UserError(
                f"placeholder_token {plain(settings.placeholder_token, 60)} is a word of CLIP's vocabulary, which "
                f"would lose its meaning: choose another, such as <{plain(settings.placeholder_token, 60)}>"
            )
    check_sample_prompts(settings)
    parse_color("alpha_color", settings.alpha_color)
    check_tensorboard(settings.report_to)
    if settings.model_config is not None:
        config = load_model_config(under_root(settings.model_config))
        image_size(settings, config)
        trained_timesteps(settings, config)
        settings.check_prediction_type(config.prediction_type, plain(config.path))


def trains_base_model(settings: TrainSettings) -> bool:
    """Whether weights of the base model are trained. ldm.lora.spec checks lora_config's content, and needs MindSpore.

    Raises UserError if lora_config cannot be read.
    """
    if not (settings.use_lora or settings.trains_token_alone):
        return True
    if settings.lora_config is None:
        return False
    path = under_root(settings.lora_config)
    way = "give the path of a JSON or YAML file"
    content = read_json(path, way=way) if path.suffix == ".json" else read_yaml(path, way=way)
    return isinstance(content, dict) and bool(content.get("trainable_model"))


def keeps_text_encoder_in_fp32(settings: TrainSettings) -> bool:
    """Whether the text encoder stays fp32 although the precision is bf16.

    The step of gradient_checkpointing computes it twice. MindSpore copies weights in between, and has no copy of bf16.
    """
    return settings.gradient_checkpointing and settings.trains_text_encoder


def image_size(settings: TrainSettings, config: ModelConfig) -> int:
    """Return the width and height of the images in pixels. Raises UserError if the model does not take it."""
    size = settings.image_size or config.image_size
    if size % config.size_multiple:
        raise UserError(f"image_size {size} must be a multiple of {config.size_multiple} for {plain(config.path)}")
    return size


def trained_timesteps(settings: TrainSettings, config: ModelConfig) -> range:
    """Return the time steps to train on. Raises UserError if the model does not have them."""
    low, end = settings.min_timestep, config.timesteps if settings.max_timestep is None else settings.max_timestep
    if end > config.timesteps:
        raise UserError(f"max_timestep {end} is above the {config.timesteps} time steps of {plain(config.path)}")
    if low >= end:
        raise UserError(f"min_timestep {low} must be below max_timestep, which is {end}: no time step is left to train")
    return range(low, end)


def base_model(settings: TrainSettings) -> str:
    """Return pretrained_model_path, which check_settings has seen."""
    assert settings.pretrained_model_path is not None
    return settings.pretrained_model_path


def read_model_config(settings: TrainSettings) -> ModelConfig:
    """Return the configuration of the base model, of which only names and shapes are read.

    Raises:
        UserError: It is not a base model, it does not say which model it is, its tokens do not fit model_config, or it
            is an inpainting model, which cannot be trained.
    """
    path = base_model(settings)
    if settings.model_config is not None:
        config = config_with_tokens(load_model_config(under_root(settings.model_config)), path)
    else:
        config = detect_model_config(
            path, way_out="add --model_config, configs/v2-inference.yaml or configs/v2-vpred-inference.yaml for SD2.x"
        )
        logger.info("%s is a model of %s", path, config.path)
    if config.is_inpainting:
        raise UserError(
            f"{path} is an inpainting model ({config.unet['in_channels']} input channels), which text_to_image.py "
            "generates with but training does not support: train on the text-to-image model that it was made from"
        )
    return config
