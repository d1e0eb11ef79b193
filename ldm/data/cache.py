"""Arrays that are worth computing once: the latents of images, the states of captions."""

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

from ldm.errors import UserError, plain, system_reason
from ldm.files.atomic import atomic_path
from ldm.files.inputs import is_there, open_file, read_bytes
from ldm.runtime.logs import warn_of_each

logger = logging.getLogger(__name__)

SEAL_BYTES = 32
STALE_SECONDS = 3600.0
FLOATS = (np.float16, np.float32)  # what networks compute in


def content_key(*parts: str | int | float | bytes | Path) -> str:
    """The sha256 (64 hex digits) of what an array is computed from: any change in it is another key.

    A Path stands for the file's content, not its name. Name the kind of array first, then the weights' hash and the
    settings: `content_key("latents", weights_hash, 512, path)`.

    Raises:
        UserError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            kind, part_digest = b"file", _file_digest(part)
        elif isinstance(part, bytes):
            kind, part_digest = b"bytes", hashlib.sha256(part).digest()
        else:
            kind, part_digest = b"value", hashlib.sha256(repr(part).encode()).digest()
        # Each part by its own digest, so that no two lists of parts run together into the same bytes.
        digest.update(kind + part_digest)
    return digest.hexdigest()


class StateCache:
    """Arrays by key, in memory and, given a folder, on disk, one file each.

    Files (.npy) are written beside and renamed, so a process killed in the middle leaves what it had finished; each
    ends in a checksum, and one that does not match, or holds another array than is asked for, is named in a warning and
    computed again. It is always safe to delete the folder.

    Args:
        folder: where the files go (made when the first is written); None keeps them in memory alone.
    """

    def __init__(self, folder: str | Path | None = None):
        self.folder = None if folder is None else Path(folder)
        self._arrays: dict[str, np.ndarray] = {}
        self._writes = self.folder is not None
        if self.folder is not None and os.path.isdir(self.folder):
            self._remove_remains(self.folder)

    def get_or_compute(
        self,
        keys: Sequence[str],
        compute_batch: Callable[[list[int]], Iterable[np.ndarray]],
        batch_size: int,
        desc: str,
        shape: tuple[int, ...] | None = None,
    ) -> list[np.ndarray]:
        """The array of every key, computed where neither memory nor disk has it.

        Args:
            keys: of `content_key`; equal ones share one array.
            compute_batch: takes the places in `keys` of exactly `batch_size` arrays to compute, gives them in that
                order. The last batch is filled up by repeating its last place, so that a graph is compiled for one
                shape only.
            batch_size: at least 1.
            desc: what is computed, for the progress bar and messages ("latents").
            shape: of every array; None for any.

        Raises:
            UserError: an array that was computed is not finite.
        """
        places = {key: place for place, key in reversed(list(enumerate(keys)))}
        wanted = [key for key in dict.fromkeys(keys) if key not in self._arrays]
        missing, faults = [], []
        for key in tqdm(wanted, desc=f"{desc}: reading the cache", delay=1, disable=self.folder is None):
            try:
                array = self._read(key, shape)
            except UserError as error:
                array = None
                faults.append(str(error))
            if array is None:
                missing.append(key)
            else:
                self._arrays[key] = array
        warn_of_each(logger, "the cache file %s; computing it again", faults)
        if missing:
            with tqdm(total=len(missing), desc=f"{desc}: computing", unit="row") as bar:
                for start in range(0, len(missing), batch_size):
                    batch = missing[start : start + batch_size]
                    asked = [places[key] for key in batch]
                    computed = list(compute_batch(asked + asked[-1:] * (batch_size - len(asked))))
                    if len(computed) != batch_size:
                        raise ValueError(f"{desc}: {len(computed)} arrays for a batch of {batch_size}")
                    for key, array in zip(batch, computed):
                        self._store(key, np.array(array), desc)
                    bar.update(len(batch))
        return [self._arrays[key] for key in keys]

    def _path(self, key: str) -> Path:
        # Two levels: some file systems slow down at a hundred thousand files in one folder.
        return self.folder / key[:2] / f"{key}.npy"

    def _read(self, key: str, shape: tuple[int, ...] | None) -> np.ndarray | None:
        """The array on disk, None where there is none. Raises UserError where its file cannot be used."""
        if self.folder is None:
            return None
        path = self._path(key)
        if not is_there(path):
            return None
        raw = read_bytes(path)
        body, seal = raw[:-SEAL_BYTES], raw[-SEAL_BYTES:]
        if seal != _seal(key, body):
            raise UserError(f"{plain(path)} is broken")
        # The seal says that the file is as it was written; an older or faulty version may have written it.
        try:
            array = np.lib.format.read_array(io.BytesIO(body), allow_pickle=False)
        except (ValueError, EOFError, SyntaxError, TypeError, MemoryError) as error:
            raise UserError(f"{plain(path)} is broken ({plain(error)})") from None
        if array.dtype not in FLOATS or (shape is not None and array.shape != shape):
            raise UserError(f"{plain(path)} holds {array.dtype} of the shape {array.shape}, not what is asked for")
        if not np.isfinite(array).all():
            raise UserError(f"{plain(path)} holds values that are not finite")
        return array

    def _store(self, key: str, array: np.ndarray, desc: str) -> None:
        if not np.isfinite(array).all():
            raise UserError(f"computing {desc} gave values that are not finite: try --precision fp32")
        self._arrays[key] = array
        if not self._writes:
            return
        try:
            buffer = io.BytesIO()
            np.save(buffer, array, allow_pickle=False)
            body = buffer.getvalue()
            with atomic_path(self._path(key), sync=False) as temporary:  # it carries its checksum
                temporary.write_bytes(body + _seal(key, body))
        except OSError as error:
            self._writes = False
            logger.warning("cannot write the cache %s (%s); going on in memory", self.folder, error.strerror or error)

    @staticmethod
    def _remove_remains(folder: Path) -> None:
        """Take away what killed processes left unfinished; younger files may be another rank's, at work."""
        for path in folder.glob("*/.*.partial.npy"):
            try:
                if time.time() - path.stat().st_mtime > STALE_SECONDS:
                    path.unlink()
            except OSError:
                continue  # another rank was first


def _seal(key: str, body: bytes) -> bytes:
    """Follows the array in its file, where numpy does not look: a damaged or renamed file does not match it."""
    return hashlib.sha256(key.encode() + body).digest()


def _file_digest(path: Path) -> bytes:
    digest = hashlib.sha256()
    with open_file(path, way="check data_path") as file:
        try:
            while block := file.read(1 << 20):
                digest.update(block)
        except OSError as error:
            raise UserError(f"{plain(path)} cannot be read: {system_reason(error)}") from None
    return digest.digest()
