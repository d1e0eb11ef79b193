"""A cache of arrays that are computed once: the latents of images and the text embeddings of captions."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Callable

import numpy as np
from tqdm import tqdm

from ldm.errors import UserError, plain
from ldm.files.atomic import atomic_path
from ldm.files.inputs import content_hash, is_there, read_bytes
from ldm.runtime import peers
from ldm.runtime.logs import warn_each

logger = logging.getLogger(__name__)

CHECKSUM_BYTES = 32
STALE_SECONDS = 3600.0
DTYPES = (np.float16, np.float32)  # the types that networks compute in


class FileHash(str):
    """The sha256 of a file's content, 64 hex digits."""


def file_hash(path: Path) -> FileHash:
    """Return the hash of a file of the data set. Raises UserError if the file cannot be read."""
    return FileHash(content_hash(path, way="check data_path"))


def content_key(*parts: str | int | float | bytes | Path | FileHash) -> str:
    """Return the key of an array: the sha256 (64 hex digits) of everything that the array is computed from.

    Give the kind of array first, then the hash of the weights and the settings, for example
    `content_key("latents", weights_hash, 512, path)`.

    Args:
        *parts: What the array is computed from. A Path stands for the content of its file, as does its FileHash.

    Raises:
        UserError: A file cannot be read.
    """
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


class ArrayCache:
    """Arrays by key, kept in memory and, if there is a folder, in one file (.npy) each.

    Files are written under a temporary name and renamed, so a killed process leaves complete files. Each file ends in a
    checksum. A file that is damaged or holds another array than requested is named in a warning and computed again.
    The folder can be deleted at any time.

    The processes of a data-parallel run divide what is to be computed: each computes its share and reads the rest from
    the folder. What it does not find there, because another host has its own folder, it computes itself.

    Args:
        folder: The folder of the files, created with the first one. None keeps the arrays in memory only.
        process_index: Of this process in a data-parallel run.
        process_count: Number of processes, which all ask for the same keys.
    """

    def __init__(self, folder: str | Path | None = None, process_index: int = 0, process_count: int = 1):
        self.folder = None if folder is None else Path(folder)
        self.process_index, self.process_count = process_index, process_count
        self._arrays: dict[str, np.ndarray] = {}
        self._writes = True
        if self.folder is not None and os.path.isdir(self.folder):
            self._remove_unfinished(self.folder)

    def get_or_compute(
        self,
        keys: Sequence[str],
        compute_batch: Callable[[list[int]], Iterable[np.ndarray]],
        batch_size: int,
        desc: str,
        shape: tuple[int, ...] | None = None,
    ) -> list[np.ndarray]:
        """Return the array of every key. Arrays that are neither in memory nor on disk are computed.

        Args:
            keys: Keys from `content_key`. Equal keys share an array.
            compute_batch: Takes the places in `keys` of at most `batch_size` arrays and returns these arrays in the
                same order.
            batch_size: At least 1.
            desc: What is computed, for the progress bar and messages ("latents").
            shape: Expected shape of every array. None accepts any.

        Raises:
            UserError: A computed array is not finite.
        """
        places = {key: place for place, key in reversed(list(enumerate(keys)))}

        def compute(batch: list[str]) -> Iterable[np.ndarray]:
            return compute_batch([places[key] for key in batch])

        unread = [key for key in dict.fromkeys(keys) if key not in self._arrays]
        if self.process_count > 1:
            self._read_or_compute(unread[self.process_index :: self.process_count], compute, batch_size, desc, shape)
            peers.gather()  # waits until the others have written theirs
            unread = [key for key in unread if key not in self._arrays]
        missing = self._read_or_compute(unread, compute, batch_size, desc, shape)
        if self.process_count > 1 and missing:
            logger.warning(
                "%s: %d arrays of other processes were not under %s and were computed again: let all hosts share "
                "output_path",
                desc, missing, self.folder,
            )  # fmt: skip
        return [self._arrays[key] for key in keys]

    def _read_or_compute(
        self,
        unread: list[str],
        compute: Callable[[list[str]], Iterable[np.ndarray]],
        batch_size: int,
        desc: str,
        shape: tuple[int, ...] | None,
    ) -> int:
        """Read arrays into memory, compute those that are not on disk, and return how many these are."""
        missing: list[str] = []
        faults: list[str] = []
        for key in unread if self.folder is None else tqdm(unread, desc=f"{desc}: reading the cache", delay=1):
            try:
                array = self._read(key, shape)
            except UserError as error:
                array = None
                faults.append(str(error))
            if array is None:
                missing.append(key)
            else:
                self._arrays[key] = array
        warn_each(logger, "the cache file %s; computing it again", faults)
        if missing:
            with tqdm(total=len(missing), desc=f"{desc}: computing", unit="row") as bar:
                for start in range(0, len(missing), batch_size):
                    batch = missing[start : start + batch_size]
                    computed = list(compute(batch))
                    if len(computed) != len(batch):
                        raise ValueError(f"{desc}: {len(computed)} arrays for a batch of {len(batch)}")
                    for key, array in zip(batch, computed):
                        self._store(key, np.array(array), desc)
                    bar.update(len(batch))
        return len(missing)

    def _read(self, key: str, shape: tuple[int, ...] | None) -> np.ndarray | None:
        """Return the array on disk, or None if there is none. Raises UserError if its file cannot be used."""
        if self.folder is None:
            return None
        path = _array_path(self.folder, key)
        if not is_there(path):
            return None
        raw = read_bytes(path)
        body, checksum = raw[:-CHECKSUM_BYTES], raw[-CHECKSUM_BYTES:]
        if checksum != _checksum(key, body):
            raise UserError(f"{plain(path)} is broken")
        # The checksum only shows that the file is unchanged. An older or faulty version may have written it.
        try:
            array = np.lib.format.read_array(io.BytesIO(body), allow_pickle=False)
        except (ValueError, EOFError, SyntaxError, TypeError, MemoryError) as error:
            raise UserError(f"{plain(path)} is broken ({plain(error)})") from None
        if array.dtype not in DTYPES or (shape is not None and array.shape != shape):
            raise UserError(f"{plain(path)} holds {array.dtype} of the shape {array.shape}, not the expected array")
        if not np.isfinite(array).all():
            raise UserError(f"{plain(path)} holds values that are not finite")
        return array

    def _store(self, key: str, array: np.ndarray, desc: str) -> None:
        if not np.isfinite(array).all():
            raise UserError(f"computing {desc} gave values that are not finite: try --precision fp32")
        self._arrays[key] = array
        if self.folder is None or not self._writes:
            return
        try:
            buffer = io.BytesIO()
            np.save(buffer, array, allow_pickle=False)
            body = buffer.getvalue()
            with atomic_path(_array_path(self.folder, key), sync=False) as temporary:  # the checksum replaces the sync
                temporary.write_bytes(body + _checksum(key, body))
        except OSError as error:
            self._writes = False
            logger.warning("cannot write the cache %s (%s); continuing in memory", self.folder, error.strerror or error)

    @staticmethod
    def _remove_unfinished(folder: Path) -> None:
        """Remove unfinished files of killed processes. Recent ones may belong to another process that is running."""
        for path in folder.rglob(".*.partial.*"):
            try:
                if time.time() - path.stat().st_mtime > STALE_SECONDS:
                    path.unlink()
            except OSError:
                continue  # another process has removed it


def _array_path(folder: Path, key: str) -> Path:
    # Two levels, because some file systems slow down with a hundred thousand files in one folder.
    return folder / key[:2] / f"{key}.npy"


def _checksum(key: str, body: bytes) -> bytes:
    """Return the checksum behind the array in its file, where NumPy ignores it. A renamed file does not match."""
    return hashlib.sha256(key.encode() + body).digest()
