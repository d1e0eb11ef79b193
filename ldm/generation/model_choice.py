"""Which base model a checkpoint is, and by which configuration it is read. Nothing here imports MindSpore."""

from __future__ import annotations

import logging
from pathlib import Path

from ldm.errors import UserError, plain
from ldm.files.inputs import check_file, is_folder, is_there
from ldm.files.paths import ROOT, under_root
from ldm.settings.model import ModelConfig, load_model_config
from ldm.settings.versions import VERSIONS
from ldm.weights.architecture import detect_model_config

logger = logging.getLogger(__name__)


def find_model(
    checkpoint: str | Path | None = None, version: str | None = None, config: str | Path | None = None
) -> tuple[str | None, Path, ModelConfig]:
    """Find a base checkpoint and its model configuration.

    Args:
        checkpoint: A file or a diffusers folder, None for the version's published file under models/.
        version: A key of VERSIONS. None for the model that the checkpoint is detected to be, nano without a checkpoint.
        config: Path of a model YAML, None for the version's.

    Returns:
        The version (None where a model YAML or the checkpoint itself describes the model), the path of the checkpoint
        and the configuration.

    Raises:
        UserError: A file is missing, the checkpoint does not say which model it is, or the YAML is not the version's.
    """
    if checkpoint is None:
        version = version or "nano"
        path = _published_checkpoint(version)
    else:
        path = existing_path(checkpoint, "ckpt_path")
        if version is None and config is None:
            return _detect(path)
    return version, path, _model_config(version, config)


def existing_path(path: str | Path, name: str) -> Path:
    """Return the path of a file or folder; raises UserError where it does not exist or may not be read."""
    if not is_folder(path, name):
        check_file(path, name)
    return Path(path)


def _published_checkpoint(version: str) -> Path:
    published = VERSIONS[version].checkpoint
    path = under_root(published)
    if is_there(path):
        return path
    if version == "nano":
        way_out = "it comes with the repository (git checkout models/nano); tools/nano rebuilds it"
    else:
        way_out = (
            f"give --ckpt_path with any Stable Diffusion {version} checkpoint (.safetensors, .ckpt or a diffusers "
            "folder), or make the file from one: python tools/model_conversion/convert_weights.py --source "
            f"<checkpoint> --target {published}"
        )
    raise UserError(f"{published}, the checkpoint of version {version}, does not exist: {way_out}")


def _detect(path: Path) -> tuple[str | None, Path, ModelConfig]:
    """Find the version of a checkpoint by its published file name, or by its metadata and shapes."""
    for version, published in VERSIONS.items():
        if path.name == Path(published.checkpoint).name:
            return version, path, _model_config(version, None)
    config = detect_model_config(path, way_out=f"add --version (one of {', '.join(VERSIONS)}) or --config")
    for version, published in VERSIONS.items():
        if Path(config.path) == ROOT / published.config:
            logger.info("%s is taken for version %s, by its metadata and its shapes", path, version)
            return version, path, config
    logger.info("%s is a model of its own, described by %s", path, config.path)
    return None, path, config


def _model_config(version: str | None, path: str | Path | None) -> ModelConfig:
    """Read a model YAML, or the version's; raises UserError where they describe different models."""
    if path is None:
        if version is None:
            raise ValueError("neither a version nor a model YAML is given")
        return load_model_config(ROOT / VERSIONS[version].config)
    config = load_model_config(under_root(path))
    if version is not None and config.architecture != "custom":
        published = load_model_config(ROOT / VERSIONS[version].config)
        for name in ("architecture", "prediction_type"):
            given, expected = getattr(config, name), getattr(published, name)
            if given != expected:
                raise UserError(
                    f"--config {plain(path)} has {name} {given}, version {version} has {expected}: "
                    f"use {VERSIONS[version].config}, or the version (or checkpoint) that belongs to your YAML"
                )
    return config
