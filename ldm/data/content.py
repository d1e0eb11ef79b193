"""Hashes of what is computed from: files, and the keys of arrays in `ldm.data.shards`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Union

from ldm.files.inputs import content_hash


class FileHash(str):
    """The sha256 of a file's content, 64 hex digits."""


def file_hash(path: Path) -> FileHash:
    """Return the hash of a file of the data set. Raises UserError if the file cannot be read."""
    return FileHash(content_hash(path, way="check data_path"))


Part = Union[str, int, float, bytes, Path, FileHash]


def content_key(*parts: Part) -> str:
    """Return the key of an array: the sha256 (64 hex digits) of everything that the array is computed from.

    Give the kind of array first, then the hash of the weights and the settings, for example
    `content_key("latents", weights_hash, 512, path)`.

    Args:
        *parts: What the array is computed from. A Path stands for the content of its file, as does its FileHash.

    Raises:
        UserError: A file cannot be read.
    """
    return content_key_of(parts)


def content_key_of(parts: Iterable[Part]) -> str:
    """Return `content_key(*parts)`, holding one part at a time in memory."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            part = file_hash(part)
        if isinstance(part, FileHash):
            kind, part_digest = b"file", bytes.fromhex(part)
        elif isinstance(part, bytes):
            kind, part_digest = b"bytes", hashlib.sha256(part).digest()
        else:
            kind, part_digest = b"value", hashlib.sha256(repr(part).encode()).digest()
        # Each part has its own digest, so that no two lists of parts give the same bytes.
        digest.update(kind + part_digest)
    return digest.hexdigest()
