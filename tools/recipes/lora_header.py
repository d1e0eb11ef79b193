"""The recipe in the header of a LoRA that kohya's sd-scripts trained: its metadata with the prefix `ss_`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ldm.errors import UserError
from tools.recipes import kohya
from tools.recipes.recipe import NO_COUNTERPART, NOT_NEEDED, Recipe, Written, fit_layers

PREFIX = "ss_"
# Names after the prefix that are not those of the settings.
NAMES = {
    "optimizer": "optimizer_type",
    "batch_size_per_device": "train_batch_size",
    "sd_model_name": "pretrained_model_name_or_path",
    "vae_name": "vae",
    "debiased_estimation": "debiased_estimation_loss",
    "max_validation_steps": "max_validation_steps",
}
# What the metadata says of the finished training, and no setting is.
STATISTICS = {
    "it is a result of that training":
        "session_id training_started_at training_finished_at num_train_images num_val_images num_validation_images "
        "num_reg_images num_batches_per_epoch num_epochs epoch steps sd_model_hash new_sd_model_hash vae_hash "
        "new_vae_hash sd_scripts_commit_hash total_batch_size bucket_info steps_per_epoch num_train_samples",
    "the data set is given by data_path":
        "dataset_dirs reg_dataset_dirs datasets tag_frequency user_config",
    "max_train_steps is known": "max_train_epochs",
    "model_config says so": "base_model_version",
}  # fmt: skip
# The UNet's layers beside its blocks -> their names in the file. Only some versions of LyCORIS train them.
OTHERS = {"time_embed.0": "time_embedding_linear_1", "time_embed.2": "time_embedding_linear_2",
          "input_blocks.0.0": "conv_in", "out.2": "conv_out"}  # fmt: skip
# Without these, the file was written with no_metadata and says nothing of the training.
OF_TRAINING = ("learning_rate", "max_train_steps", "optimizer")
OTHER_MODELS = ("sdxl", "sd3", "flux", "lumina", "hunyuan", "chroma", "anima", "qwen", "wan")


def read(metadata: Mapping[str, str], tensors: Iterable[str]) -> Recipe:
    """Return the recipe of a LoRA's metadata.

    Args:
        metadata: The texts of the header.
        tensors: The names of its tensors, which show the trained networks.

    Raises:
        UserError: The metadata is not sd-scripts', or of another model.
    """
    given = {name[len(PREFIX) :]: text for name, text in metadata.items() if name.startswith(PREFIX)}
    if not given:
        raise UserError(
            "the file has no ss_ metadata, which kohya's sd-scripts writes: its recipe is not in it. "
            "tools/lora/convert_lora.py shows its ranks"
        )
    version = given.get("base_model_version", "").lower()
    if version.startswith(OTHER_MODELS):
        raise UserError(
            f"the LoRA was trained for {version[:40]}, and this project trains Stable Diffusion 1.x and 2.x"
        )
    values = {NAMES.get(name, name): _value(name, text) for name, text in given.items()}
    complete = any(name in given for name in OF_TRAINING)
    recipe = Recipe("sd-scripts", values, complete)
    _options_of_optimizer(recipe)
    if not complete:
        reason = "the file was written with no_metadata: it tells of the network, and nothing of the training"
        recipe.name(NO_COUNTERPART, "ss_learning_rate", "missing", reason)
    names = list(tensors)
    if names and not any(name.startswith("lora_te") for name in names):
        recipe.add("network_train_unet_only", True)
    if names and not any(name.startswith("lora_unet") for name in names):
        recipe.add("network_train_text_encoder_only", True)
    recipe.take_named(NOT_NEEDED, STATISTICS)
    kohya.convert(recipe)
    if names:
        _of_tensors(recipe, names)
    fit_layers(recipe)
    if "v2" not in given:  # as in the files of this project for other architectures
        recipe.settings.pop("model_config", None)
    recipe.finish()
    back = {**{new: old for old, new in NAMES.items() if old in given}, "optimizer_args": "optimizer"}
    recipe.named = [entry._replace(theirs=_full(entry.theirs, back)) for entry in recipe.named]
    recipe.settings = {
        name: entry._replace(theirs=_full(entry.theirs, back)) for name, entry in recipe.settings.items()
    }
    for name, text in metadata.items():
        if not name.startswith(PREFIX):
            recipe.given.add(name)
            recipe.name(NOT_NEEDED, name, text, "it describes the file")
    return recipe


def _of_tensors(recipe: Recipe, names: list[str]) -> None:
    """Write which networks, and which layers beside the UNet's blocks, the file has."""
    trained = recipe.settings.get("use_lora", Written(False)).value
    for setting, prefix in (("lora_ft_unet", "lora_unet"), ("lora_ft_text_encoder", "lora_te")):
        if trained and setting not in recipe.settings:
            value = any(name.startswith(prefix) for name in names)
            recipe.settings[setting] = Written(value, "", "the tensors of the file show it")
    entry = recipe.settings.get("lora_targets")
    if entry is not None:
        absent = {
            ours for ours, name in OTHERS.items() if not any(full.startswith(f"lora_unet_{name}.") for full in names)
        }
        kept = [name for name in entry.value if name not in absent]
        recipe.settings["lora_targets"] = entry._replace(value=kept)


def _full(name: str, back: Mapping[str, str]) -> str:
    """Return the name in the metadata."""
    return name if not name or name.startswith(PREFIX) else PREFIX + back.get(name, name)


def _value(name: str, text: str) -> Any:
    """Return a text of the metadata as the value that sd-scripts had."""
    if text == "None":
        return None
    if text in ("True", "False"):
        return text == "True"
    if name == "network_args":
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text
    return text


def _options_of_optimizer(recipe: Recipe) -> None:
    """Divide `torch.optim.adamw.AdamW(weight_decay=0.1,betas=(0.9, 0.99))` into the optimizer and its options."""
    match = re.fullmatch(r"([\w.]+)\((.{0,1000})\)", str(recipe.left.get("optimizer_type", "")))
    if match:
        recipe.left["optimizer_type"] = match.group(1)
        recipe.add("optimizer_args", re.findall(r"\w+=(?:\([^)]*\)|\[[^\]]*\]|[^,]*)", match.group(2)))
