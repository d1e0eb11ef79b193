"""What can be said of a run's settings without MindSpore, whose import takes seconds."""

from __future__ import annotations

from ldm.errors import UserError, plain
from ldm.files.inputs import check_file, is_folder, is_there
from ldm.files.paths import under_root
from ldm.settings.model import ModelConfig, load_model_config
from ldm.settings.train import TrainSettings


def check_settings(config: TrainSettings) -> None:
    """Raise UserError for a setting that is missing, a file that is not there, a model YAML that cannot be read and a
    size that is not the model's.
    """
    ways = {
        "data_path": "give the folder with the images and img_txt.csv",
        "pretrained_model_path": "give a Stable Diffusion checkpoint (.safetensors, .ckpt or a diffusers folder)",
    }
    for name, way in ways.items():
        path = getattr(config, name)
        if path is None:
            raise UserError(f"--{name} is needed: {way}, on the command line or in the YAML file of --train_config")
        if not is_there(path, name):
            raise UserError(f"{name} {plain(path)} does not exist: {way}")
    for name in ("pretrained_model_path", "vae_ckpt_path", "lora_init_path"):
        path = getattr(config, name)
        if path is not None and not is_folder(path, name):
            check_file(path, name)
    if isinstance(config.resume, str) and not is_folder(config.resume, "resume"):
        check_file(config.resume, "resume", "give a training state (state-<step>.safetensors) or the folder of a run")
    if config.lora_config is not None:
        check_file(under_root(config.lora_config), "lora_config", "give the path of a JSON or YAML file")
    if config.pretrained_model_ema and config.unet_initialize_random:
        raise UserError("pretrained_model_ema is of the UNet, which unet_initialize_random does not take from the file")
    if config.model_config is not None:
        image_size(config, load_model_config(under_root(config.model_config)))


def image_size(config: TrainSettings, model: ModelConfig) -> int:
    """Pixels of a side. Raises UserError for a size that the UNet cannot halve as often as it must."""
    size = config.image_size or model.image_size
    if size % model.size_multiple:
        raise UserError(f"image_size {size} must be a multiple of {model.size_multiple} for {plain(model.path)}")
    return size
