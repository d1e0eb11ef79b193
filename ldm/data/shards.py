"""A cache of arrays on disk that holds a million of them: shards, which only grow, and an index beside each.

    cache = ShardedCache(output_path / "cache", "latents", process_index)
    if key not in cache:
        cache.put(key, encode(image))
    array = cache.get(key)

A shard is two files. `<name>-<process>-<number>.shard` has the records, one behind the other:

    offset  bytes  content (little-endian)
         0      4  "LDM1"
         4      4  length of the record in bytes
         8     32  key
        40      4  bytes of a value (2: float16, 4: float32), number of dimensions, 2 zeros
        44     16  shape, 4 numbers
        60      4  CRC-32 of the 60 bytes before and of the values
        64         values in C order

`<name>-<process>-<number>.index` begins with INDEX_MAGIC and has 24 bytes for each record: the first 8 bytes of the key
(big-endian), offset and length of the record (4 bytes each), and a checksum (8 bytes). An index entry is written behind
its record. A process that is killed at any moment leaves whole records with entries, and perhaps a torn end, which has
no whole entry and is not read.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import re
import struct
import threading
import zlib
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ldm.errors import UserError, plain
from ldm.files.inputs import open_file
from ldm.runtime.logs import MAX_WARNINGS

logger = logging.getLogger(__name__)

SHARD_BYTES = 1 << 30  # a shard that has reached this size is full
MAX_VALUES = 1 << 30  # bytes of an array; with SHARD_BYTES, this keeps offset and length below 2**32
MEMORY_BYTES = 256 << 20  # of the arrays that are kept where the folder cannot be written
RECENT = 1 << 14  # entries of the index that are in a dict (250 bytes each) and not yet in its arrays (20 bytes each)
READ_ENTRIES = 1 << 16  # entries of an index file that are read at once
MERGED_ENTRIES = 1 << 17  # entries of index files that are sorted at once

HEADER = struct.Struct("<4sI32sBB2x4II")
MAGIC = b"LDM1"
MAX_DIMENSIONS = 4
DTYPES: dict[int, np.dtype[Any]] = {2: np.dtype("<f2"), 4: np.dtype("<f4")}  # the types that networks compute in

ENTRY = np.dtype([("prefix", ">u8"), ("offset", "<u4"), ("length", "<u4"), ("check", "<u8")])
INDEX_MAGIC = b"LDM cache index 1\n".ljust(ENTRY.itemsize, b"\0")
PLACE = np.dtype([("shard", "u4"), ("offset", "u4"), ("length", "u4")])
# Fractional parts of the square roots of 2, 3 and 5. They are odd, so that every change of one field changes the sum.
CHECK_FACTORS = (0x6A09E667F3BCC909, 0xBB67AE8584CAA73B, 0x3C6EF372FE94F82B)


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
        self._index = _Index()
        self._shards: list[_Shard] = []
        self._appending = threading.Lock()  # of the shard that is written
        self._memory_bytes = (math.inf if folder is None else MEMORY_BYTES) if memory_bytes is None else memory_bytes
        self._memory = _Memory(self._memory_bytes)
        self._writes = folder is not None
        self._writer: _Writer | None = None
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
                _check_array(held, shape, f"{self.name} in memory")
                return held.copy()
            if place is None or shard is None:
                return None
            return _read_record(shard.path, place.offset, place.length, bytes.fromhex(key), shape)
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
            record = _record(bytes.fromhex(key), array)
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
                shard = _Shard(self.folder / f"{self.name}-{process}-{number}.shard", order, len(self._shards))
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

    def _append(self, record: bytes) -> _Place:
        """Write a record and its index entry. Raises OSError."""
        writer = self._writer
        # A record that replaces a faulty one must be in a later shard.
        if writer is None or writer.size >= SHARD_BYTES or writer.shard.order <= self._last_faulty:
            self.close()
            writer = self._writer = self._begin_shard()
        return writer.append(record)

    def _begin_shard(self) -> _Writer:
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        number = max((shard.order[0] for shard in self._shards), default=0) + 1
        while True:
            path = self.folder / f"{self.name}-{self.process_index}-{number}.shard"
            shard = _Shard(path, (number, self.process_index), len(self._shards), complete=True)
            try:
                writer = _Writer(shard)
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

    def _read_index(self, shard: _Shard) -> None:
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

    def _add_entries(self, shard: _Shard, entries: np.ndarray) -> None:
        prefixes, offsets, lengths = (entries[name].astype(np.uint64) for name in ("prefix", "offset", "length"))
        valid = entries["check"] == _entry_check(prefixes, offsets, lengths)
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


class _Place(NamedTuple):
    """Where a record is: the place of its shard in the list of shards, and its bytes in the file."""

    shard: int
    offset: int
    length: int


class _Shard:
    """A pair of files: `path` with the records, and its index, of which `entries` have been read."""

    def __init__(self, path: Path, order: tuple[int, int], place: int, complete: bool = False):
        self.path, self.index_path = path, path.with_suffix(".index")
        self.order, self.place = order, place  # (number, process); place in the list of shards
        self.entries, self.complete = 0, complete


class _Writer:
    """The shard that this process writes. Raises FileExistsError if it exists, and OSError."""

    def __init__(self, shard: _Shard):
        self.shard, self.size, self._count = shard, 0, 0
        with ExitStack() as stack:  # closes the files if an error comes
            self._records = stack.enter_context(open(shard.path, "xb", buffering=0))
            self._index = stack.enter_context(open(shard.index_path, "xb", buffering=0))
            _write_at(self._index.fileno(), INDEX_MAGIC, 0)
            self._files = stack.pop_all()

    def append(self, record: bytes) -> _Place:
        _write_at(self._records.fileno(), record, self.size)
        place = _Place(self.shard.place, self.size, len(record))
        prefix = int.from_bytes(record[8:16], "big")  # the key is at byte 8
        entry = struct.pack("<8sIIQ", record[8:16], *place[1:], _entry_check(prefix, place.offset, place.length))
        _write_at(self._index.fileno(), entry, (1 + self._count) * ENTRY.itemsize)
        self.size += len(record)
        self._count += 1
        return place

    def flush(self) -> None:
        os.fsync(self._records.fileno())  # first, so that no entry is seen before its record
        os.fsync(self._index.fileno())

    def close(self) -> None:
        self._files.close()


class _Index:
    """The places of records by the first 64 bits of their keys.

    Most are in sorted arrays of 20 bytes for a record. Those that were added one by one are in a dict, which takes
    precedence and is merged into the arrays when it has RECENT entries (40 ms with a million in the arrays).
    """

    def __init__(self) -> None:
        self._prefixes = np.empty(0, np.uint64)
        self._places = np.empty(0, PLACE)
        self._recent: dict[int, _Place] = {}  # a removed one has the length 0
        self._unsorted: list[tuple[np.ndarray, np.ndarray]] = []  # prefixes and places, newer than all others

    def find(self, prefix: int) -> _Place | None:
        self._settle()
        place = self._recent.get(prefix)
        if place is None:
            row = int(self._prefixes.searchsorted(np.uint64(prefix)))
            if row == len(self._prefixes) or int(self._prefixes[row]) != prefix:
                return None
            place = _Place(*self._places[row].item())
        return place if place.length else None

    def add(self, prefix: int, place: _Place) -> None:
        self._settle()
        self._recent[prefix] = place
        if len(self._recent) >= RECENT:
            self._merge()

    def remove(self, prefix: int) -> None:
        self.add(prefix, _Place(0, 0, 0))

    def add_all(self, prefixes: np.ndarray, places: np.ndarray) -> None:
        """Add many. A later one replaces earlier ones of the same prefix."""
        self._unsorted.append((prefixes, places))
        # Not at every call: with 123 files of 8192 entries, a million take 0.4 s instead of 2.4 s.
        if sum(len(prefixes) for prefixes, _ in self._unsorted) >= MERGED_ENTRIES:
            self._merge()

    def _settle(self) -> None:
        """Put what `add_all` has left where it is found."""
        if not self._unsorted:
            return
        if len(self._recent) + sum(len(prefixes) for prefixes, _ in self._unsorted) >= RECENT:
            self._merge()
            return
        for prefixes, places in self._unsorted:
            self._recent.update(zip(prefixes.tolist(), map(_Place._make, places.tolist())))
        self._unsorted = []

    def _merge(self) -> None:
        """Move everything into the sorted arrays. What is not needed any more is freed early."""
        recent = np.fromiter(self._recent, np.uint64, len(self._recent))
        recent_places = np.array([tuple(place) for place in self._recent.values()], PLACE)
        prefixes = np.concatenate([self._prefixes, recent, *(prefixes for prefixes, _ in self._unsorted)])
        places = np.concatenate([self._places, recent_places, *(places for _, places in self._unsorted)])
        self._prefixes, self._places, self._recent, self._unsorted = prefixes, places, {}, []
        order = np.argsort(prefixes, kind="stable")
        prefixes = self._prefixes = prefixes[order]
        kept = np.append(prefixes[1:] != prefixes[:-1], True)  # the last of each
        self._prefixes, self._places = prefixes[kept], places[order[kept]]


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


def _record(key: bytes, array: np.ndarray) -> bytes:
    shape = array.shape + (0,) * (MAX_DIMENSIONS - array.ndim)
    header = HEADER.pack(MAGIC, HEADER.size + array.nbytes, key, array.itemsize, array.ndim, *shape, 0)[:-4]
    values = array.tobytes()
    return header + struct.pack("<I", zlib.crc32(values, zlib.crc32(header))) + values


def _read_record(path: Path, offset: int, length: int, key: bytes, shape: tuple[int, ...] | None) -> np.ndarray | None:
    """Return the array of a record, or None if it belongs to another key with the same first 64 bits.

    Raises:
        UserError: The file cannot be read, the record is damaged, or the array cannot be used.
    """
    subject = f"{plain(path)}, byte {offset}"
    with open_file(path, way="it was removed") as file:
        try:
            # The index may be damaged, and the shard truncated: nothing is allocated for what the file does not have.
            if not HEADER.size <= length <= min(os.fstat(file.fileno()).st_size - offset, HEADER.size + MAX_VALUES):
                raise UserError(f"{subject}: the file ends before the record of {length:,} bytes does")
            record = bytearray(length)
            _read_at(file.fileno(), record, offset)
        except OSError as error:
            raise UserError(f"{subject}: the record cannot be read ({error.strerror})") from None
    header = bytes(record[: HEADER.size])
    magic, stated_length, stored_key, item_size, dimensions, *sizes, checksum = HEADER.unpack(header)
    if magic != MAGIC:
        raise UserError(f"{subject}: the record is damaged, or of another version")
    if checksum != zlib.crc32(memoryview(record)[HEADER.size :], zlib.crc32(header[:-4])):
        raise UserError(f"{subject}: the record is damaged")
    # The checksum only shows that the record is unchanged. An index of another shard may lead to it.
    if stored_key != key:
        if stored_key[:8] == key[:8]:
            return None
        raise UserError(f"{subject}: the record has another key")
    dtype, stored_shape = DTYPES.get(item_size), tuple(sizes[:dimensions])
    if dtype is None or dimensions > MAX_DIMENSIONS or stated_length != length:
        raise UserError(f"{subject}: the record is damaged, or of another version")
    # NumPy bounds the product of the sizes even where one of them is 0.
    if math.prod(stored_shape) * item_size != len(record) - HEADER.size or math.prod(filter(None, sizes)) > MAX_VALUES:
        raise UserError(f"{subject}: the record's {length:,} bytes do not suit the shape {stored_shape}")
    array = np.frombuffer(record, dtype, offset=HEADER.size).reshape(stored_shape)
    _check_array(array, shape, subject)
    return array


def _check_array(array: np.ndarray, shape: tuple[int, ...] | None, subject: str) -> None:
    """Raise UserError if an array has another shape than expected, or is not finite."""
    if shape is not None and array.shape != tuple(shape):
        raise UserError(f"{subject}: the shape is {array.shape}, not {tuple(shape)}")
    if not np.isfinite(array).all():
        raise UserError(f"{subject}: the values are not finite")


def _read_at(handle: int, buffer: bytearray, offset: int) -> None:
    """Fill `buffer` with the bytes at `offset`. What the file does not have is left as it is. Raises OSError."""
    view = memoryview(buffer)
    while view:
        count = os.preadv(handle, [view], offset)
        if not count:
            return
        view, offset = view[count:], offset + count


def _write_at(handle: int, content: bytes, offset: int) -> None:
    """Write all of `content` at `offset`. Raises OSError."""
    view = memoryview(content)
    while view:
        count = os.pwrite(handle, view, offset)
        view, offset = view[count:], offset + count


def _entry_check(prefix: Any, offset: Any, length: Any) -> Any:
    """Return the checksum of an index entry, from integers, or of many, from arrays of uint64, which wrap around."""
    first, second, third = CHECK_FACTORS
    return ((prefix + 1) * first + offset * second + length * third) & 0xFFFFFFFFFFFFFFFF


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
