"""The hashes by which other projects know a file with weights.

| hash | of what | who |
| --- | --- | --- |
| sshs_model_hash | sha256 of all that follows the header of a .safetensors | sd-scripts, A1111 |
| sshs_legacy_hash | sha256 of LEGACY_BYTES at LEGACY_OFFSET of the file, its first 8 digits | sd-scripts, older A1111 |
| sd_model_hash | the same of a base model's file | sd-scripts, older A1111 |
| new_sd_model_hash | sha256 of the file | sd-scripts, A1111 |

The hashes that a file holds of itself are those of a file with `ss_` keys alone in its metadata, so that a title that
is changed later leaves them as they are.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping

import numpy as np

from ldm.errors import UserError
from ldm.files.inputs import open_file
from ldm.weights.arrays import ArraysInMemory
from ldm.weights.file_formats.safetensors_file import MAX_HEADER, safetensors_parts

LEGACY_OFFSET, LEGACY_BYTES, LEGACY_DIGITS = 0x100000, 0x10000, 8
KOHYA_PREFIX = "ss_"
MODEL_HASH, LEGACY_HASH = "sshs_model_hash", "sshs_legacy_hash"


def sshs_hashes(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> dict[str, str]:
    """Return MODEL_HASH and LEGACY_HASH of a .safetensors with these arrays and the `ss_` keys of the metadata."""
    kept = {key: text for key, text in metadata.items() if key.startswith(KOHYA_PREFIX)}
    model, legacy, place = hashlib.sha256(), hashlib.sha256(), 0
    for number, part in enumerate(safetensors_parts(ArraysInMemory(dict(arrays)), kept)):
        if number:  # the first is the header
            model.update(part)
        first, last = (min(max(end - place, 0), len(part)) for end in (LEGACY_OFFSET, LEGACY_OFFSET + LEGACY_BYTES))
        legacy.update(part[first:last])
        place += len(part)
    return {MODEL_HASH: model.hexdigest(), LEGACY_HASH: legacy.hexdigest()[:LEGACY_DIGITS]}


def data_hash(path: str | os.PathLike) -> str:
    """Return the sha256 of all that follows the header of a .safetensors. Raises UserError as `open_file`."""
    digest = hashlib.sha256()
    with open_file(path) as file:
        size = int.from_bytes(file.read(8), "little")
        if size > MAX_HEADER:
            raise UserError(f"{path} is no .safetensors: its header would have {size:,} bytes")
        file.seek(8 + size)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def legacy_hash(path: str | os.PathLike) -> str:
    """Return the hash of a base model's file by which older versions of A1111 know it. Raises as `open_file`."""
    with open_file(path) as file:
        file.seek(LEGACY_OFFSET)
        return hashlib.sha256(file.read(LEGACY_BYTES)).hexdigest()[:LEGACY_DIGITS]
