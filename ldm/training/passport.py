"""What a LoRA was trained from, as digests in the metadata of its file: tools/lora/verify.py compares them.

| key | what |
| --- | --- |
| passport.version | VERSION |
| passport.base | sha256 of the base model's file, or one over all weights of a folder |
| passport.vae | the same of vae_ckpt_path, if that is given |
| passport.data | images with captions, masks and repeats, in any order; absent if not all images were read |
| passport.settings | name -> digest of its value, of the settings that decide the weights |
| passport.code | version or commit of this project, and a digest of its sources |
| passport.libraries | versions of MindSpore, NumPy, Pillow and Python |
| passport.device | device, precision and number of processes |

Neither paths nor captions nor values of settings are in it. Dictionaries are compact JSON.
"""

from __future__ import annotations

import hashlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from ldm.files.inputs import content_hash
from ldm.files.paths import ROOT, under_root
from ldm.lora.formats import lora_files
from ldm.runtime.versions import package_version
from ldm.settings.declare import names_of
from ldm.settings.train import TrainSettings
from ldm.weights.base_model import base_model_hash

PREFIX = "passport."
VERSION = "1"
LIBRARIES = {"MindSpore": "mindspore", "NumPy": "numpy", "Pillow": "pillow"}  # name -> distribution
SOURCES = (".py", ".h", ".cc", ".gz")  # suffixes of the files in ldm/ that results depend on
# Settings beside those that a resumed run compares: length and batch, and which weights of the base model are used.
_MORE = ("train_batch_size", "max_steps", "epochs", "pretrained_model_ema", "unet_initialize_random")
_CONTENT_OF_FILES = ("lora_config", "lora_init_path")
_IN_DATA = ("conditioning_data_dir",)  # a path; the masks in it are part of the data's digest
SETTING_DIGITS = 12


def settings_digests(settings: TrainSettings) -> dict[str, str]:
    """Return name -> digest of the settings that decide the weights of a run, as they are given.

    Of lora_config and lora_init_path, the content of the file counts. Raises UserError if it cannot be read.
    """
    names = (*names_of(TrainSettings, resume="fixed"), *names_of(TrainSettings, resume="followed"), *_MORE)
    values: dict[str, Any] = {name: getattr(settings, name) for name in names}
    values.update(settings.resolved())
    if settings.max_steps is not None:
        values["epochs"] = None  # max_steps wins
    for name in _CONTENT_OF_FILES:
        path = getattr(settings, name)
        if path is not None:
            files = lora_files(path) if name == "lora_init_path" else [under_root(path)]
            values[name] = [content_hash(file, name) for file in files]
    return {
        name: hashlib.sha256(repr(value).encode("utf-8", "backslashreplace")).hexdigest()[:SETTING_DIGITS]
        for name, value in sorted(values.items())
        if name not in _IN_DATA
    }


def base_digests(settings: TrainSettings) -> dict[str, str]:
    """Return the digests of the base model and of the VAE that replaces its own."""
    assert settings.pretrained_model_path is not None
    digests = {"base": base_model_hash(settings.pretrained_model_path)}
    if settings.vae_ckpt_path is not None:
        digests["vae"] = base_model_hash(settings.vae_ckpt_path)
    return digests


def code_digest() -> dict[str, str]:
    """Return what tells this version of the project from others: its commit or version, and a digest of its sources."""
    folder, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix in SOURCES and path.is_file() and not name.startswith("bundled/"):  # of an installation alone
            digest.update(f"{name} {content_hash(path)}\n".encode())
    return {**_version(), "sources": digest.hexdigest()}


def _version() -> dict[str, str]:
    if (ROOT / ".git").exists():
        command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
            return {"commit": done.stdout.strip()}
        except (OSError, subprocess.SubprocessError):
            pass
    version = package_version()
    return {} if version is None else {"version": version}


def library_versions() -> dict[str, str]:
    """Return the versions of what computes with this project."""
    versions = {"Python": platform.python_version()}
    for name, distribution in LIBRARIES.items():
        try:
            versions[name] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions
