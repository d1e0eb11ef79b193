"""A cache of arrays on disk that holds a million of them: shards, which only grow, and an index beside each.

    cache = ShardedCache(output_path / "cache", "latents", process_index)
    if key not in cache:
        cache.put(key, encode(image))
    array = cache.get(key)

A shard is two files (`ldm.data.shard_files`): records, and an index. An index entry is written behind its record. A
process that is killed at any moment leaves whole records with entries, and perhaps a torn end, which has no whole entry
and is not read.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import re
import threading
from pathlib import Path

import numpy as np

from ldm.data.shard_files import (
    DTYPES,
    ENTRY,
    INDEX_MAGIC,
    MAX_DIMENSIONS,
    MAX_VALUES,
    Shard,
    ShardWriter,
    check_array,
    entry_check,
    make_record,
    read_record,
)
from ldm.data.shard_index import PLACE, Place, PlaceIndex
from ldm.errors import UserError, plain
from ldm.files.inputs import open_file
from ldm.runtime.logs import MAX_WARNINGS

logger = logging.getLogger(__name__)

SHARD_BYTES = 1 << 30  # a shard that has reached this size is full
MEMORY_BYTES = 256 << 20  # of the arrays that are kept where the folder cannot be written
READ_ENTRIES = 1 << 16  # entries of an index file that are read at once


class ShardedCache:
    """Arrays by key on disk. Memory holds 20 bytes for each of them.

    Every instance begins a new shard with its first `put`, under a name that no file has, and never appends to a shard
    of another one. So each file has one writer, in runs of any number of processes, after each other or at once. Shards
    of all processes and of earlier runs are read. (`claim_folder` prevents two runs at once in one folder. Where there
    are no locks, a run may miss what the other one adds.)

    Of two records with one key, that in the shard with the higher number is taken. The number of a new shard is higher
    than all that its process knows.

    A record that is damaged is named in a warning and is absent from then on: the caller computes the array again and
    puts a new record. If the folder cannot be written, a warning says so once, and the newest arrays, at most
    MEMORY_BYTES of them, are kept in memory. The folder can be deleted between runs.

    The index has the first 64 bits of a key, and `get` compares the whole key. Of two keys that share these bits (a
    chance of 1 : 37,000,000 among a million keys), only the one that was put last is there.

    Other threads may call `get`, `in` and `put` while one thread calls all methods.

    Args:
        folder: Where the shards are, created with the first one. None keeps arrays in memory only.
        name: What the arrays are, such as "latents". It begins the names of the files.
        process_index: Of this process in a data-parallel run.
        memory_bytes: How many bytes of the newest arrays are kept in memory, where there is no folder or it cannot be
            written. None: without a folder all, else MEMORY_BYTES.
    """

    def __init__(self, folder: str | Path | None, name: str, process_index: int = 0, memory_bytes: int | None = None):
        self.folder = None if folder is None else Path(folder)
        self.name, self.process_index = name, process_index
        self._lock = threading.Lock()  # of the index, the list of shards and the memory
        self._index = PlaceIndex()
        self._shards: list[Shard] = []
        self._appending = threading.Lock()  # of the shard that is written
        self._memory_bytes = (math.inf if folder is None else MEMORY_BYTES) if memory_bytes is None else memory_bytes
        self._memory = _Memory(self._memory_bytes)
        self._writes = folder is not None
        self._writer: ShardWriter | None = None
        self._faults = 0
        self._last_faulty = (0, 0)  # the last shard in the order of shards in which a fault was found
        self._unreadable = False
        if self.folder is not None:
            if process_index == 0:
                _mention_earlier_cache(self.folder)
            self.refresh()

    @property
    def keeps_all(self) -> bool:
        """Whether an array that is put stays: on the disk, or in a memory without a limit."""
        return self._writes or math.isinf(self._memory_bytes)

    def __contains__(self, key: str) -> bool:
        with self._lock:
            return key in self._memory.arrays or self._index.find(_prefix(key)) is not None

    def get(self, key: str, shape: tuple[int, ...] | None = None) -> np.ndarray | None:
        """Return the array of a key in memory of its own, or None if it is absent.

        An array that is damaged or has another shape than `shape` is named in a warning and is absent from then on.
        """
        with self._lock:
            held = self._memory.arrays.get(key)
            place = self._index.find(_prefix(key)) if held is None else None
            shard = None if place is None else self._shards[place.shard]
        try:
            if held is not None:
                check_array(held, shape, f"{self.name} in memory")
                return held.copy()
            if place is None or shard is None:
                return None
            return read_record(shard.path, place.offset, place.length, bytes.fromhex(key), shape)
        except UserError as error:
            with self._lock:
                self._memory.remove(key)
                if shard is not None:
                    self._last_faulty = max(self._last_faulty, shard.order)
                    if self._index.find(_prefix(key)) == place:  # no other thread has put a newer record
                        self._index.remove(_prefix(key))
            self._warn(str(error))
            return None

    def put(self, key: str, array: np.ndarray) -> None:
        """Add the array of a key, float16 or float32, with at most 4 dimensions.

        Raises:
            UserError: The array is not finite.
        """
        array = np.asarray(array)
        if (
            array.dtype not in DTYPES.values()
            or array.ndim > MAX_DIMENSIONS
            or array.nbytes > MAX_VALUES
            or len(key) != 64
        ):
            raise ValueError(f"{self.name} of {array.dtype}, shape {array.shape}, with a key of {len(key)} digits")
        if not np.isfinite(array).all():
            raise UserError(f"computing {self.name} gave values that are not finite: try --precision fp32")
        if self._writes:
            record = make_record(bytes.fromhex(key), array)
            try:
                with self._appending:
                    place = self._append(record)
            except OSError as error:
                self._stop_writing(error)
            else:
                with self._lock:
                    self._index.add(_prefix(key), place)
                return
        with self._lock:
            self._memory.add(key, np.array(array))  # a copy, which does not hold the batch that it is part of

    def refresh(self) -> None:
        """Find the records that other processes have added since the last look.

        On a network file system, the others must have called `flush` before.
        """
        if self.folder is None:
            return
        found = self._list_shards()
        newest = {process: number for number, process in sorted(found)}
        known = {shard.order: shard for shard in self._shards}
        for order in sorted(found):
            number, process = order
            shard = known.get(order)
            if shard is None:
                shard = Shard(self.folder / f"{self.name}-{process}-{number}.shard", order, len(self._shards))
                if not found[order]:  # its index is missing
                    if not _size(shard.path):
                        continue  # another process is creating the files, or was killed then
                    if not _size(shard.index_path):  # no, it was not there when the folder was listed
                        self._warn(f"{plain(shard.path)} has no index and is not read")
                        shard.complete = True
                with self._lock:
                    self._shards.append(shard)
            if not shard.complete:
                # A process writes to its newest shard only. Older ones are complete after this look at them.
                complete = newest[process] != number
                self._read_index(shard)
                shard.complete |= complete

    def flush(self) -> None:
        """Wait until what was put is on the disk, and on a network file system visible to other hosts."""
        if self._writer is not None:
            try:
                self._writer.flush()
            except OSError as error:
                self._stop_writing(error)

    def close(self) -> None:
        """Close the shard that is written. A later `put` begins a new one."""
        writer, self._writer = self._writer, None
        if writer is not None:
            try:
                writer.close()
            except OSError as error:  # a network file system may write only now
                self._stop_writing(error)

    def _append(self, record: bytes) -> Place:
        """Write a record and its index entry. Raises OSError."""
        writer = self._writer
        # A record that replaces a faulty one must be in a later shard.
        if writer is None or writer.size >= SHARD_BYTES or writer.shard.order <= self._last_faulty:
            self.close()
            writer = self._writer = self._begin_shard()
        return writer.append(record)

    def _begin_shard(self) -> ShardWriter:
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        number = max((shard.order[0] for shard in self._shards), default=0) + 1
        while True:
            path = self.folder / f"{self.name}-{self.process_index}-{number}.shard"
            shard = Shard(path, (number, self.process_index), len(self._shards), complete=True)
            try:
                writer = ShardWriter(shard)
            except FileExistsError:  # of a process that began at the same time, which should not be
                number += 1
                continue
            with self._lock:
                self._shards.append(shard)
            return writer

    def _list_shards(self) -> dict[tuple[int, int], bool]:
        """Return (number, process) of the shards in the folder, and whether each has an index."""
        assert self.folder is not None
        pattern = re.compile(rf"{re.escape(self.name)}-(0|[1-9]\d{{0,8}})-([1-9]\d{{0,8}})\.(shard|index)")
        found: dict[tuple[int, int], bool] = {}
        try:
            with os.scandir(self.folder) as entries:
                for entry in entries:
                    match = pattern.fullmatch(entry.name)
                    if match:
                        order = int(match[2]), int(match[1])
                        found[order] = found.get(order, False) or match[3] == "index"
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            if not self._unreadable:
                self._unreadable = True
                logger.warning("cannot read the cache %s (%s): computing it again", plain(self.folder), error.strerror)
        return found

    def _read_index(self, shard: Shard) -> None:
        """Add the entries that an index file has got since it was read last."""
        path = shard.index_path
        try:
            with open_file(path, way="it was removed") as file:
                magic = file.read(ENTRY.itemsize)
                if len(magic) == ENTRY.itemsize and magic != INDEX_MAGIC:
                    raise UserError(f"{plain(path)} is damaged at byte 0, or of another version")
                file.seek((1 + shard.entries) * ENTRY.itemsize)
                while True:
                    raw = file.read(READ_ENTRIES * ENTRY.itemsize)
                    entries = np.frombuffer(raw, ENTRY, len(raw) // ENTRY.itemsize)
                    # What a power cut leaves may end in zeros.
                    count = int(np.max(np.flatnonzero(entries["check"]), initial=-1)) + 1
                    self._add_entries(shard, entries[:count])
                    if count < READ_ENTRIES:
                        return
        except OSError as error:
            self._warn(f"{plain(path)} cannot be read ({error.strerror})")
        except UserError as error:
            self._warn(str(error))
        shard.complete = True  # named once, not at each look

    def _add_entries(self, shard: Shard, entries: np.ndarray) -> None:
        prefixes, offsets, lengths = (entries[name].astype(np.uint64) for name in ("prefix", "offset", "length"))
        valid = entries["check"] == entry_check(prefixes, offsets, lengths)
        for number in np.flatnonzero(~valid):
            byte = (1 + shard.entries + int(number)) * ENTRY.itemsize
            self._warn(f"{plain(shard.index_path)}, byte {byte}: the entry is damaged")
        shard.entries += len(entries)
        places = np.empty(np.count_nonzero(valid), PLACE)
        places["shard"], places["offset"], places["length"] = shard.place, offsets[valid], lengths[valid]
        with self._lock:
            self._index.add_all(prefixes[valid], places)

    def _stop_writing(self, error: OSError) -> None:
        if self._writes:
            logger.warning(
                "cannot write the cache %s (%s): from now on, at most %d MB of new %s are kept in memory",
                plain(self.folder), error.strerror or error, round(self._memory_bytes) >> 20, self.name,
            )  # fmt: skip
        self._writes = False
        self.close()

    def _warn(self, fault: str) -> None:
        """Name one of the first MAX_WARNINGS faults. The others are logged at DEBUG."""
        self._faults += 1
        level = logging.WARNING if self._faults <= MAX_WARNINGS else logging.DEBUG
        logger.log(level, "the cache: %s; computing it again", fault)
        if self._faults == MAX_WARNINGS + 1:
            logger.warning("the cache: more faults of %s (log_level DEBUG names all)", self.name)


class _Memory:
    """The newest arrays, of at most `limit` bytes, but at least one."""

    def __init__(self, limit: float):
        self.arrays: dict[str, np.ndarray] = {}  # the oldest first
        self._limit, self._bytes = limit, 0

    def add(self, key: str, array: np.ndarray) -> None:
        self.remove(key)
        while self.arrays and self._bytes + array.nbytes > self._limit:
            self.remove(next(iter(self.arrays)))
        self.arrays[key] = array
        self._bytes += array.nbytes

    def remove(self, key: str) -> None:
        array = self.arrays.pop(key, None)
        if array is not None:
            self._bytes -= array.nbytes


def _size(path: Path) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return 0


def _prefix(key: str) -> int:
    return int(key[:16], 16)


@functools.cache
def _mention_earlier_cache(folder: Path) -> None:
    """Say once that the folder has arrays of versions that had one file for each: `ab/<key>.npy`."""
    for path in folder.glob("[0-9a-f][0-9a-f]/*.npy"):
        if re.fullmatch("[0-9a-f]{64}", path.stem):
            logger.info(
                "%s/00 to ff have arrays of an earlier version, which are not read: these folders can be deleted",
                plain(folder),
            )
            return
