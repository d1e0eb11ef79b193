"""Continuing a run of image generation that was killed: which run a folder of images is of, and which images it has.

{output_path}/samples/run.json    what decides the images of the run, written before the first image
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.errors import UserError, plain
from ldm.files.atomic import atomic_path
from ldm.files.documents import json_text, read_json
from ldm.files.inputs import is_file, is_folder, list_folder

RECORD = "run.json"
FILES = "prompts and files"  # the entry of run.json that holds a hash of all texts of all images
WAY = "give the same settings, or another --output_path"

_LEFT_BEHIND = re.compile(r"\..*\.[0-9]+-[0-9a-f]{8}\.partial(\.[a-z]+)?")  # see ldm.files.atomic.temporary_path


def run_record(settings: Mapping[str, Any], images: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what run.json holds.

    Args:
        settings: The settings that decide the images, by their names.
        images: The text fields of each image, which name its files by their hashes.
    """
    digest = hashlib.sha256()
    count = 0
    for fields in images:
        digest.update(f"{json_text(fields)}\n".encode())
        count += 1
    return {"images": count, **settings, FILES: digest.hexdigest()}


def precision_to_continue(samples: Path) -> str | None:
    """Return the precision on the CPU that run.json of a folder names, None if nothing says it.

    Raises:
        UserError: run.json cannot be read.
    """
    path = samples / RECORD
    content = read_json(path, "resume:", _anew(path)) if is_file(path) else None
    found = content.get("precision") if isinstance(content, dict) else None
    # Versions before bf16 wrote what was given: auto was fp32 on the CPU.
    return "fp32" if found == "auto" else found if found in ("fp32", "bf16") else None


def _anew(path: Path) -> str:
    return f"remove {plain(path.parent)} to begin anew"


def begin_or_continue(samples: Path, record: Mapping[str, Any]) -> None:
    """Write run.json into a folder that has no images yet, or check that the folder's is of this run.

    What a killed process left half-written is removed.

    Raises:
        UserError: The folder's images are of another run, or of one that wrote no run.json.
        OSError: The folder cannot be written.
    """
    path = samples / RECORD
    names = list_folder(samples) if is_folder(samples) else []
    for name in names:
        if _LEFT_BEHIND.fullmatch(name):
            (samples / name).unlink()
    if is_file(path):
        _check_same(path, record)
        return
    if any(name.endswith(".png") for name in names):
        raise UserError(
            f"resume: {plain(samples)} has images but no {RECORD}, so nothing says which run they are of: move them "
            "away, or leave out --resume, which keeps them under another name"
        )
    with atomic_path(path) as temporary:
        temporary.write_text(json_text(record, indent=1) + "\n", encoding="utf-8")


def _check_same(path: Path, record: Mapping[str, Any]) -> None:
    """Raise UserError, which names the first difference, if run.json is of another run."""
    earlier = read_json(path, "resume:", _anew(path))
    if not isinstance(earlier, dict):
        raise UserError(f"resume: {plain(path)} is not of a run: {_anew(path)}")
    if earlier.get("precision") == "auto":  # as versions before bf16 wrote it: fp16 on Ascend, fp32 on the CPU
        earlier["precision"] = "fp16" if record.get("precision") == "fp16" else "fp32"
    for name in [*record, *earlier]:
        if name == FILES:
            continue
        before, now = (json_text(content.get(name)) for content in (earlier, record))
        if before != now:
            raise UserError(f"resume: {plain(path)} is of a run with {plain(name, 60)} {plain(before)}, "
                            f"not {plain(now)}: {WAY}")  # fmt: skip
    if earlier.get(FILES) != record[FILES]:
        raise UserError(f"resume: {plain(path)} is of a run with other prompts or other files of weights: {WAY}")


def written_image(path: Path, texts: Mapping[str, str], size: tuple[int, int]) -> np.ndarray | None:
    """Return the pixels (H, W, C) of an image that is there. None where there is none or it is damaged.

    Args:
        path: A PNG.
        texts: Its text fields, if it is an image of this run.
        size: Its height and width.

    Raises:
        UserError: It is an image of something else.
    """
    if not is_file(path):
        return None
    try:
        with Image.open(path, formats=["PNG"]) as image:
            pixels = np.array(image)
            found, mode = dict(image.text), image.mode
    except Exception:  # Pillow's decoders raise errors of many types for damaged files
        return None
    other = next((key for key, text in texts.items() if found.get(key) != text), None)
    if mode not in ("RGB", "L") or pixels.shape[:2] != size:
        raise UserError(
            f"resume: {plain(path)} was changed: it has {pixels.shape[1]} x {pixels.shape[0]} pixels of mode {mode}, "
            f"not {size[1]} x {size[0]} of RGB or L: move it away"
        )
    if other is not None:
        raise UserError(
            f"resume: {plain(path)} is no image of this run, its text {plain(other, 60)} is another one: move it away"
        )
    return pixels if pixels.ndim == 3 else pixels[:, :, None]
