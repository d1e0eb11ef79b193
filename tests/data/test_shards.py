"""Arrays are kept in shards that only grow, are found by any later run, and are never wrong, whatever a file holds."""

import errno
import hashlib
import logging
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest

from ldm.data import shard_index, shards
from ldm.data.shard_files import ENTRY, HEADER, INDEX_MAGIC, entry_check, read_record
from ldm.data.shards import ShardedCache
from ldm.errors import UserError
from tests.growth import assert_linear

ROOT = Path(__file__).parents[2]


def key(number):
    return hashlib.sha256(str(number).encode()).hexdigest()


def array(number):
    return np.array([number, 1], np.float32)


def fill(folder, numbers, process=0):
    cache = ShardedCache(folder, "latents", process)
    for number in numbers:
        cache.put(key(number), array(number))
    cache.close()


def found(folder, numbers):
    """Return which arrays a new cache has. Fails if it gives a wrong one."""
    cache = ShardedCache(folder, "latents")
    present = []
    for number in numbers:
        got = cache.get(key(number))
        assert (got is None) or (got.dtype == np.float32 and got.tolist() == [number, 1]), number
        assert (got is None) or key(number) in cache
        if got is not None:
            present.append(number)
    return present


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def flipped(content, place):
    return content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :]


RECORD = HEADER.size + array(0).nbytes


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING)
    return caplog


# What is put in comes out.


@pytest.mark.parametrize("place", ["memory", "disk", "disk, by a later run"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (77, 8), (8, 4, 6), (1, 2, 3, 4)])
def test_an_array_comes_back_bit_for_bit(tmp_path, place, dtype, shape):
    written = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    cache = ShardedCache(None if place == "memory" else tmp_path, "latents")
    cache.put(key(0), written)
    if place == "disk, by a later run":
        cache = ShardedCache(tmp_path, "latents")
    for expected in (None, shape):
        read = cache.get(key(0), expected)
        assert (read.dtype, read.shape, read.tobytes()) == (written.dtype, written.shape, written.tobytes())


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_was_not_put_is_absent(tmp_path, on_disk):
    cache = ShardedCache(tmp_path if on_disk else None, "latents")
    cache.put(key(0), array(0))
    assert key(0) in cache and key(1) not in cache
    assert cache.get(key(1)) is None


def test_a_transposed_array_keeps_its_values(tmp_path):
    written = np.arange(6, dtype=np.float32).reshape(2, 3).T
    cache = ShardedCache(tmp_path, "latents")
    cache.put(key(0), written)
    assert cache.get(key(0)).tolist() == written.tolist()


@pytest.mark.parametrize("on_disk", [False, True])
def test_an_array_belongs_to_the_one_who_gets_it(tmp_path, on_disk):
    cache, batch = ShardedCache(tmp_path if on_disk else None, "latents"), np.ones((2, 2), np.float32)
    cache.put(key(0), batch[0])
    batch[:] = 2
    cache.get(key(0))[:] = 3
    assert cache.get(key(0)).tolist() == [1, 1]


def test_the_array_that_was_put_last_is_there(tmp_path):
    cache = ShardedCache(tmp_path, "latents")
    for number in range(3):
        cache.put(key(0), array(number))
        assert cache.get(key(0))[0] == number
    assert ShardedCache(tmp_path, "latents").get(key(0))[0] == 2


def test_caches_of_other_names_share_the_folder(tmp_path):
    for number, name in enumerate(["latents", "texts", "masks"]):
        ShardedCache(tmp_path, name).put(key(0), array(number))
    assert [ShardedCache(tmp_path, name).get(key(0))[0] for name in ("latents", "texts", "masks")] == [0, 1, 2]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(tmp_path, value):
    cache = ShardedCache(tmp_path, "latents")
    with pytest.raises(UserError, match="latents.*not finite.*precision"):
        cache.put(key(0), np.array([1, value], np.float32))
    assert key(0) not in cache and files(tmp_path) == {}


@pytest.mark.parametrize(
    "wrong_key, wrong",
    [
        (key(0), np.zeros(2)),
        (key(0), np.zeros(2, np.int32)),
        (key(0), np.zeros((1,) * 5, np.float32)),
        (key(0), np.broadcast_to(np.float32(0), (1 + (1 << 28),))),  # over 1 GiB
        (key(0)[:32], np.zeros(2, np.float32)),
    ],
)
def test_other_arrays_and_keys_are_an_error_of_the_caller(wrong_key, wrong):
    with pytest.raises(ValueError, match="latents of .* shape .* key of"):
        ShardedCache(None, "latents").put(wrong_key, wrong)


def test_keys_with_the_same_first_half_are_not_mixed_up(tmp_path, warnings):
    cache, other = ShardedCache(tmp_path, "latents"), key(0)[:32] + key(1)[32:]
    cache.put(key(0), array(0))
    assert cache.get(other) is None
    cache.put(other, array(1))
    assert cache.get(key(0)) is None and cache.get(other)[0] == 1
    assert warnings.text == ""


# Files.


def test_nothing_is_written_before_the_first_array(tmp_path):
    cache = ShardedCache(tmp_path / "cache", "latents")
    cache.refresh()
    cache.flush()
    cache.close()
    assert files(tmp_path) == {}


def test_a_full_shard_is_followed_by_another(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 3 * RECORD)
    fill(tmp_path, range(8))
    sizes = [(tmp_path / f"latents-0-{number}.shard").stat().st_size for number in (1, 2, 3)]
    assert sizes == [3 * RECORD, 3 * RECORD, 2 * RECORD]
    assert found(tmp_path, range(8)) == list(range(8))


def test_a_later_run_never_writes_into_a_shard_of_an_earlier_one(tmp_path):
    fill(tmp_path, range(3))
    before = files(tmp_path)
    fill(tmp_path, range(3, 5))
    after = files(tmp_path)
    assert sorted(set(after) - set(before)) == ["latents-0-2.index", "latents-0-2.shard"]
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_run_of_another_number_of_processes_finds_everything(tmp_path, count):
    for process in range(3):
        fill(tmp_path, range(10 * process, 10 * process + 3), process)
    for process in range(count):
        cache = ShardedCache(tmp_path, "latents", process)
        assert all(cache.get(key(10 * process + i))[0] == 10 * process + i for process in range(3) for i in range(3))


def test_two_runs_at_once_which_should_not_be_write_to_their_own_files(tmp_path):
    caches = [ShardedCache(tmp_path, "latents") for _ in range(2)]
    for number in range(6):
        caches[number % 2].put(key(number), array(number))
    assert len(files(tmp_path)) == 4
    assert found(tmp_path, range(6)) == list(range(6))


def test_an_unknown_file_in_the_folder_is_left_alone(tmp_path, warnings):
    names = [
        "latents-0-1.txt",
        "latents-a-1.index",
        "latents-0-01.index",
        "latents-0-0.index",
        "texts-0-1.index",
        ".lock",
    ]
    for name in names:
        (tmp_path / name).write_text("something")
    fill(tmp_path, range(2))
    assert found(tmp_path, range(2)) == [0, 1]
    assert all((tmp_path / name).read_text() == "something" for name in names)
    assert warnings.text == ""


def test_arrays_of_an_earlier_version_are_mentioned_once(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    (tmp_path / "ab").mkdir()
    (tmp_path / "ab" / f"ab{key(0)[2:]}.npy").write_bytes(b"")
    for name in ("latents", "texts"):
        for process in range(2):
            ShardedCache(tmp_path, name, process)
    assert caplog.text.count("can be deleted") == 1


# Several processes.


def test_what_another_process_adds_is_found_by_a_refresh(tmp_path):
    first, second = (ShardedCache(tmp_path, "latents", process) for process in range(2))
    for number in range(4):
        second.put(key(number), array(number))
        assert key(number) not in first
        first.refresh()
        assert first.get(key(number))[0] == number
        first.put(key(100 + number), array(100 + number))
    second.refresh()
    assert all(second.get(key(100 + number))[0] == 100 + number for number in range(4))


def test_a_refresh_reads_only_what_was_added_since(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 10 * RECORD)
    fill(tmp_path, range(5))
    first, second = (ShardedCache(tmp_path, "latents", process) for process in range(2))
    for number in range(10, 35):
        second.put(key(number), array(number))
    first.refresh()
    read, opened = [], []
    add_entries, open_file = ShardedCache._add_entries, shards.open_file
    monkeypatch.setattr(
        ShardedCache,
        "_add_entries",
        lambda cache, shard, entries: read.append(len(entries)) or add_entries(cache, shard, entries),
    )
    monkeypatch.setattr(
        shards, "open_file", lambda path, **options: opened.append(path.name) or open_file(path, **options)
    )
    for number in range(35, 38):
        second.put(key(number), array(number))
    first.refresh()
    # The own shards and the full ones of the other process are complete. Its last one was found with 5 entries.
    assert sum(read) == 3
    assert [name for name in opened if name.startswith("latents-1")] == ["latents-1-4.index"]
    assert first.get(key(37))[0] == 37


def test_two_processes_that_write_at_once_read_each_other(tmp_path):
    script = f"""
import sys, time
from ldm.data.shards import ShardedCache
from tests.data.test_shards import array, key
process = int(sys.argv[1])
cache = ShardedCache({str(tmp_path)!r}, "latents", process)
for number in range(process, 400, 2):
    cache.put(key(number), array(number))
cache.flush()
end = time.monotonic() + 60
while not all(key(number) in cache for number in range(400)):
    assert time.monotonic() < end
    cache.refresh()
assert all(cache.get(key(number)).tolist() == [number, 1] for number in range(400))
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(process)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for process in range(2)
    ]
    for process in processes:
        assert process.communicate()[1] == ""
        assert process.returncode == 0
    assert found(tmp_path, range(400)) == list(range(400))


def test_flushed_records_are_on_the_disk_before_their_entries(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}")))
    cache = ShardedCache(tmp_path, "latents")
    cache.put(key(0), array(0))
    cache.flush()
    assert [Path(path).name for path in synced] == ["latents-0-1.shard", "latents-0-1.index"]


# Killed processes.


def test_a_killed_process_leaves_what_it_had_put(tmp_path, warnings):
    script = f"""
import numpy as np
from ldm.data.shards import ShardedCache
from tests.data.test_shards import key
cache = ShardedCache({str(tmp_path)!r}, "latents")
for number in range(100_000):
    cache.put(key(number), np.full(200_000, number, np.float32))
    print(number, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        while process.stdout.readline().strip() != b"20":
            assert process.poll() is None
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    cache = ShardedCache(tmp_path, "latents")
    present = [number for number in range(1000) if key(number) in cache]
    assert present == list(range(len(present))) and len(present) > 20
    assert all((cache.get(key(number), (200_000,)) == number).all() for number in present)
    cache.put(key(5000), array(5000))
    assert found(tmp_path, [5000]) == [5000]
    assert warnings.text == ""


def test_a_shard_that_ends_anywhere_behind_its_last_entry_is_used_quietly(tmp_path, warnings):
    fill(tmp_path, range(4))
    index = tmp_path / "latents-0-1.index"
    shard = index.with_suffix(".shard")
    whole_index, whole_shard = index.read_bytes(), shard.read_bytes()
    for length in range(3 * RECORD, 4 * RECORD):  # the last record is being written
        shard.write_bytes(whole_shard[:length])
        index.write_bytes(whole_index[: -ENTRY.itemsize])
        assert found(tmp_path, range(4)) == [0, 1, 2]
    shard.write_bytes(whole_shard)
    for length in range(len(whole_index)):  # an entry or the beginning is being written
        index.write_bytes(whole_index[:length])
        assert found(tmp_path, range(4)) == list(range(max(0, length // ENTRY.itemsize - 1)))
    assert warnings.text == ""


def test_a_process_that_is_killed_while_it_begins_a_shard_leaves_empty_files_that_nobody_minds(tmp_path, warnings):
    (tmp_path / "latents-0-1.shard").write_bytes(b"")
    (tmp_path / "latents-0-2.shard").write_bytes(b"")
    (tmp_path / "latents-0-2.index").write_bytes(b"")
    fill(tmp_path, range(2))
    assert found(tmp_path, range(2)) == [0, 1]
    assert (tmp_path / "latents-0-3.shard").stat().st_size == 2 * RECORD
    assert warnings.text == ""


def test_a_torn_end_is_read_when_it_has_been_completed(tmp_path, warnings):
    fill(tmp_path, range(4), process=1)
    index = tmp_path / "latents-1-1.index"
    whole = index.read_bytes()
    index.write_bytes(b"")
    cache = ShardedCache(tmp_path, "latents")
    for length in range(len(whole) + 1):
        index.write_bytes(whole[:length])
        cache.refresh()
        assert [number for number in range(4) if key(number) in cache] == list(range(length // ENTRY.itemsize - 1))
    assert warnings.text == ""


def test_zeros_that_a_power_cut_leaves_at_the_end_of_an_index_are_ignored(tmp_path, warnings):
    fill(tmp_path, range(4))
    index = tmp_path / "latents-0-1.index"
    index.write_bytes(index.read_bytes()[: -ENTRY.itemsize] + bytes(10 * ENTRY.itemsize))
    assert found(tmp_path, range(4)) == [0, 1, 2]
    assert warnings.text == ""


# Damage.


def test_a_flipped_byte_of_a_record_makes_that_record_absent(tmp_path, warnings):
    fill(tmp_path, range(3))
    shard = tmp_path / "latents-0-1.shard"
    whole = shard.read_bytes()
    for place in range(RECORD, 2 * RECORD):
        shard.write_bytes(flipped(whole, place))
        warnings.clear()
        assert found(tmp_path, range(3)) == [0, 2], place
        [warning] = warnings.messages
        assert f"{shard}, byte {RECORD}: " in warning and "computing it again" in warning


def test_a_flipped_byte_of_an_index_makes_at_most_one_record_absent(tmp_path, warnings):
    fill(tmp_path, range(3))
    index = tmp_path / "latents-0-1.index"
    whole = index.read_bytes()
    for place in range(ENTRY.itemsize, len(whole)):
        index.write_bytes(flipped(whole, place))
        warnings.clear()
        number = place // ENTRY.itemsize - 1
        assert found(tmp_path, range(3)) == [other for other in range(3) if other != number], place
        [warning] = warnings.messages
        assert f"{index}, byte {(number + 1) * ENTRY.itemsize}: " in warning


def test_a_flipped_byte_at_the_beginning_of_an_index_makes_its_shard_absent(tmp_path, warnings):
    fill(tmp_path, range(3))
    index = tmp_path / "latents-0-1.index"
    whole = index.read_bytes()
    for place in range(ENTRY.itemsize):
        index.write_bytes(flipped(whole, place))
        warnings.clear()
        assert found(tmp_path, range(3)) == []
        assert f"{index} is damaged at byte 0, or of another version" in warnings.text


def test_a_truncated_shard_keeps_its_whole_records(tmp_path, warnings):
    fill(tmp_path, range(3))
    shard = tmp_path / "latents-0-1.shard"
    whole = shard.read_bytes()
    for length in range(len(whole)):
        shard.write_bytes(whole[:length])
        warnings.clear()
        assert found(tmp_path, range(3)) == list(range(length // RECORD))
        assert f"{shard}, byte {length // RECORD * RECORD}: the file ends" in warnings.text


def test_a_lost_or_foreign_stretch_of_a_file_gives_no_wrong_array(tmp_path):
    fill(tmp_path, range(12))
    whole, rng = files(tmp_path), random.Random(0)
    for name, content in whole.items():
        for _ in range(50):
            start, end = sorted(rng.randrange(len(content)) for _ in range(2))
            for middle in (b"", bytes(end - start), rng.randbytes(end - start), content[: end - start]):
                (tmp_path / name).write_bytes(content[:start] + middle + content[end:])
                found(tmp_path, range(12))
        (tmp_path / name).write_bytes(content)
    assert found(tmp_path, range(12)) == list(range(12))


def rewritten(record, **fields):
    """Return a record with changed fields of its header and a right checksum."""
    names = ["magic", "length", "key", "item_size", "dimensions", "size", "size_1", "size_2", "size_3", "checksum"]
    header = dict(zip(names, HEADER.unpack(record[: HEADER.size])), **fields)
    beginning = HEADER.pack(*header.values())[:-4]
    values = record[HEADER.size :]
    return beginning + zlib.crc32(beginning + values).to_bytes(4, "little") + values


@pytest.mark.parametrize(
    "change, fault",
    [
        (lambda record: rewritten(record, magic=b"LDM2"), "of another version"),
        (lambda record: rewritten(record, item_size=8, size=1), "of another version"),
        (lambda record: rewritten(record, item_size=0), "of another version"),
        (lambda record: rewritten(record, dimensions=5), "of another version"),
        (lambda record: rewritten(record, length=1 << 30), "of another version"),
        (lambda record: rewritten(record, size=1 << 31), "do not suit the shape"),
        (lambda record: rewritten(record, dimensions=0), "do not suit the shape"),
        (lambda record: rewritten(record, dimensions=3, size_1=1 << 31, size_2=1 << 31), "do not suit the shape"),
        (lambda record: rewritten(record, key=bytes(32)), "has another key"),
        (lambda record: rewritten(record[:-4] + np.float32(np.inf).tobytes()), "not finite"),
        (lambda record: rewritten(record, dimensions=2, size_1=1), r"the shape is \(2, 1\), not \(2,\)"),
    ],
)
def test_an_unusable_record_with_a_right_checksum_is_absent(tmp_path, warnings, change, fault):
    cache = ShardedCache(tmp_path, "latents")
    cache.put(key(0), array(0))
    shard = tmp_path / "latents-0-1.shard"
    shard.write_bytes(change(shard.read_bytes()))
    assert cache.get(key(0), (2,)) is None
    assert re.search(f"{shard}, byte 0: .*{fault}.*; computing it again", warnings.text)


def test_an_empty_array_of_enormous_other_sizes_is_absent(tmp_path, warnings):
    cache = ShardedCache(tmp_path, "latents")
    cache.put(key(0), np.zeros((0, 1, 1), np.float32))
    shard = tmp_path / "latents-0-1.shard"
    shard.write_bytes(rewritten(shard.read_bytes(), dimensions=4, size_1=2**32 - 1, size_2=2**32 - 1, size_3=2**32 - 1))
    assert cache.get(key(0)) is None
    assert "do not suit the shape" in warnings.text


def test_a_stated_length_allocates_no_more_than_the_file_has(tmp_path, warnings):
    fill(tmp_path, range(1))
    index = tmp_path / "latents-0-1.index"
    for offset, length in [(0, 2**32 - 1), (2**32 - 1, 2**32 - 1), (2**32 - 1, RECORD), (0, 1 << 30), (0, 3)]:
        prefix = int(key(0)[:16], 16)
        entry = np.array([(prefix, offset, length, entry_check(prefix, offset, length))], ENTRY)
        index.write_bytes(INDEX_MAGIC + entry.tobytes())
        tracemalloc.start()
        assert found(tmp_path, [0]) == []
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 << 20  # the read of an index takes 1.6 MB
    assert warnings.text.count("the file ends before") == 5


def test_exchanged_shards_give_no_wrong_array(tmp_path, warnings):
    fill(tmp_path, range(2))
    fill(tmp_path, range(2, 4))
    first, second = tmp_path / "latents-0-1.shard", tmp_path / "latents-0-2.shard"
    first.rename(tmp_path / "other")
    second.rename(first)
    (tmp_path / "other").rename(second)
    assert found(tmp_path, range(4)) == []
    assert warnings.text.count("has another key") == 4


def test_a_shard_that_is_created_while_the_folder_is_listed_is_read(tmp_path, warnings, monkeypatch):
    """The list may have one of its two files only."""
    fill(tmp_path, range(2), process=1)
    list_shards = ShardedCache._list_shards
    monkeypatch.setattr(ShardedCache, "_list_shards", lambda cache: dict.fromkeys(list_shards(cache), False))
    assert found(tmp_path, range(2)) == [0, 1]
    assert warnings.text == ""


def test_a_shard_without_its_index_or_records_is_named(tmp_path, warnings):
    for _ in range(3):
        fill(tmp_path, range(2))
    fill(tmp_path, range(2, 4))
    (tmp_path / "latents-0-1.index").unlink()
    (tmp_path / "latents-0-4.shard").unlink()
    cache = ShardedCache(tmp_path, "latents")
    for _ in range(3):
        cache.refresh()
    assert cache.get(key(0))[0] == 0 and cache.get(key(2)) is None
    first, second = warnings.messages
    assert "latents-0-1.shard has no index" in first
    assert "latents-0-4.shard does not exist" in second


def test_an_index_that_lost_an_entry_in_the_middle_keeps_the_others(tmp_path):
    fill(tmp_path, range(4))
    index = tmp_path / "latents-0-1.index"
    content = index.read_bytes()
    index.write_bytes(content[: 2 * ENTRY.itemsize] + content[3 * ENTRY.itemsize :])
    assert found(tmp_path, range(4)) == [0, 2, 3]


@pytest.mark.parametrize("suffix", ["shard", "index"])
@pytest.mark.parametrize("kind", ["fifo", "folder", "link"])
def test_what_is_no_file_is_neither_waited_for_nor_replaced(tmp_path, warnings, suffix, kind):
    fill(tmp_path, range(1))
    path = tmp_path / f"latents-0-1.{suffix}"
    path.unlink()
    os.mkfifo(tmp_path / "elsewhere")
    {"fifo": os.mkfifo, "link": lambda place: place.symlink_to(tmp_path / "elsewhere"), "folder": os.mkdir}[kind](path)
    assert found(tmp_path, range(1)) == []
    assert f"{path} is a" in warnings.text
    fill(tmp_path, range(1))
    assert found(tmp_path, range(1)) == [0]
    assert (tmp_path / "elsewhere").is_fifo() and not path.is_file()


def test_what_is_put_in_place_of_a_damaged_record_wins(tmp_path, warnings):
    fill(tmp_path, range(3))
    shard = tmp_path / "latents-0-1.shard"
    shard.write_bytes(flipped(shard.read_bytes(), RECORD + 70))
    cache = ShardedCache(tmp_path, "latents")
    for _ in range(3):
        assert cache.get(key(1)) is None and key(1) not in cache
    assert len(warnings.messages) == 1  # named once
    cache.put(key(1), array(1))
    assert cache.get(key(1))[0] == 1
    warnings.clear()
    assert found(tmp_path, range(3)) == [0, 1, 2]
    assert warnings.text == ""


def test_it_wins_even_where_the_damaged_one_is_in_a_later_shard(tmp_path, warnings):
    cache = ShardedCache(tmp_path, "latents", 1)
    cache.put(key(0), array(0))
    fill(tmp_path, range(1, 3), process=4)
    shard = tmp_path / "latents-4-2.shard"
    shard.write_bytes(flipped(shard.read_bytes(), 70))
    cache.refresh()
    assert cache.get(key(1)) is None
    for number in (1, 7, 8):
        cache.put(key(number), array(number))
    assert sorted(path.name for path in tmp_path.glob("*.shard")) == [
        "latents-1-1.shard", "latents-1-3.shard", "latents-4-2.shard",
    ]  # fmt: skip
    warnings.clear()
    assert found(tmp_path, [0, 1, 2, 7, 8]) == [0, 1, 2, 7, 8]
    assert warnings.text == ""


def test_an_array_of_another_shape_is_absent_and_replaced(tmp_path, warnings):
    for folder in (tmp_path, None):
        cache = ShardedCache(folder, "latents")
        cache.put(key(0), np.zeros(3, np.float32))
        warnings.clear()
        assert cache.get(key(0), (2,)) is None and key(0) not in cache
        assert "the shape is (3,), not (2,)" in warnings.text
        cache.put(key(0), array(0))
        assert cache.get(key(0), (2,))[0] == 0
    assert found(tmp_path, [0]) == [0]


def test_of_many_damaged_records_the_first_are_named(tmp_path, warnings):
    fill(tmp_path, range(50))
    (tmp_path / "latents-0-1.shard").write_bytes(b"")
    assert found(tmp_path, range(50)) == []
    assert len(warnings.messages) == 21 and "more faults of latents" in warnings.messages[-1]


def test_a_folder_that_is_deleted_during_the_run_is_begun_again(tmp_path, warnings):
    folder = tmp_path / "cache"
    cache = ShardedCache(folder, "latents")
    cache.put(key(0), array(0))
    shutil.rmtree(folder)
    assert cache.get(key(0)) is None
    cache.put(key(0), array(0))
    assert cache.get(key(0))[0] == 0
    assert found(folder, [0]) == [0]
    assert "does not exist" in warnings.text


# A folder that cannot be written or read.


def full_disk(monkeypatch, room):
    """Let only `room` more bytes be written. The last write stops in the middle, as on a full disk."""
    write, left = os.pwrite, [room]

    def pwrite(handle, content, offset):
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = write(handle, content[: left[0]], offset)
        left[0] -= count
        return count

    monkeypatch.setattr(os, "pwrite", pwrite)


def test_on_a_full_disk_new_arrays_stay_in_memory_with_one_warning(tmp_path, warnings):
    for room in range(0, 3 * (RECORD + ENTRY.itemsize), 7):
        with pytest.MonkeyPatch.context() as patch:
            full_disk(patch, room)
            folder = tmp_path / str(room)
            cache = ShardedCache(folder, "latents")
            for number in range(5):
                cache.put(key(number), array(number))
            warnings.clear()
            assert all(cache.get(key(number))[0] == number for number in range(5))
            cache.flush()
        written = max(0, room - ENTRY.itemsize) // (RECORD + ENTRY.itemsize)
        assert found(folder, range(5)) == list(range(written))
        fill(folder, range(5))
        assert found(folder, range(5)) == list(range(5))
        assert warnings.text == ""  # the one warning came before


def test_the_warning_of_a_full_disk_names_it_once(tmp_path, warnings, monkeypatch):
    full_disk(monkeypatch, 200)
    cache = ShardedCache(tmp_path, "latents")
    for number in range(5):
        cache.put(key(number), array(number))
    [warning] = warnings.messages
    assert f"cannot write the cache {tmp_path} (No space left on device)" in warning and "256 MB" in warning


def test_a_failing_flush_counts_as_a_full_disk(tmp_path, warnings, monkeypatch):
    def fsync(handle):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "fsync", fsync)
    cache = ShardedCache(tmp_path, "latents")
    cache.put(key(0), array(0))
    cache.flush()
    cache.put(key(1), array(1))
    assert cache.get(key(0))[0] == 0 and cache.get(key(1))[0] == 1
    assert warnings.text.count("cannot write the cache") == 1
    assert found(tmp_path, range(2)) == [0]


@pytest.mark.parametrize("method", ["flush", "close"])
def test_a_failing_close_counts_as_a_full_disk(tmp_path, warnings, monkeypatch, method):
    """A failing flush closes the files too, and both may fail."""

    def fail(writer):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(shards.ShardWriter, "flush", fail)
    monkeypatch.setattr(shards.ShardWriter, "close", fail)
    cache = ShardedCache(tmp_path, "latents")
    cache.put(key(0), array(0))
    getattr(cache, method)()
    cache.put(key(1), array(1))
    assert cache.get(key(0))[0] == 0 and cache.get(key(1))[0] == 1
    assert warnings.text.count("cannot write the cache") == 1


def test_a_limit_of_the_system_on_the_size_of_files_counts_as_a_full_disk(tmp_path):
    script = f"""
import resource
import numpy as np
from ldm.data.shards import ShardedCache
from tests.data.test_shards import key
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
cache = ShardedCache({str(tmp_path)!r}, "latents")
for number in range(30):
    cache.put(key(number), np.full(1000, number, np.float32))
assert all((cache.get(key(number)) == number).all() for number in range(30))
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("cannot write the cache") == 1 and "File too large" in run.stderr
    cache = ShardedCache(tmp_path, "latents")
    assert [number for number in range(30) if cache.get(key(number)) is not None] == list(range(24))


def test_the_arrays_in_memory_are_bounded_where_the_disk_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MEMORY_BYTES", 4 * array(0).nbytes)
    (tmp_path / "file").write_text("in the way")
    cache = ShardedCache(tmp_path / "file" / "cache", "latents")
    for number in [*range(8), 5]:
        cache.put(key(number), array(number))
    assert [number for number in range(8) if key(number) in cache] == [4, 5, 6, 7]
    cache.put(key(9), array(9))
    cache.put(key(10), np.zeros(100, np.float32))
    assert [number for number in range(11) if cache.get(key(number)) is not None] == [10]


def test_without_a_folder_everything_is_kept(monkeypatch):
    monkeypatch.setattr(shards, "MEMORY_BYTES", 8)
    cache = ShardedCache(None, "latents")
    for number in range(20):
        cache.put(key(number), array(number))
    assert all(cache.get(key(number))[0] == number for number in range(20))


@pytest.mark.parametrize("closed", ["folder", "folder without x", "shard", "index"])
def test_a_cache_that_another_user_closed_is_computed_again(unprivileged, warnings, closed):
    folder = unprivileged / "cache"
    fill(folder, range(3))
    path = folder if "folder" in closed else folder / f"latents-0-1.{closed}"
    path.chmod(0o600 if closed == "folder without x" else 0)
    cache = ShardedCache(folder, "latents")
    for number in range(3):
        cache.refresh()
        assert cache.get(key(number)) is None
        cache.put(key(number), array(number))
    assert all(cache.get(key(number))[0] == number for number in range(3))
    assert "Permission denied" in warnings.text
    path.chmod(0o700)
    assert len(warnings.messages) <= 4


# Size and threads.


def test_a_hundred_thousand_arrays_are_found_at_once_in_little_memory(tmp_path):
    """A million arrays take 12 s to put, 0.5 s to find and 33 MB."""
    keys = [key(number) for number in range(100_000)]
    fill(tmp_path / "100000", range(100_000))
    fill(tmp_path / "25000", range(25_000))
    tracemalloc.start()
    cache = ShardedCache(tmp_path / "100000", "latents")
    assert keys[0] in cache
    used, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used < 3_000_000 and peak < 12_000_000
    assert all(cache.get(keys[number])[0] == number for number in range(0, 100_000, 997))
    assert all(one in cache for one in keys) and key(-1) not in cache

    def find(folder):
        assert keys[0] in ShardedCache(folder, "latents")

    assert_linear(find, lambda count: tmp_path / str(count), 100_000)


def test_reading_arrays_does_not_fill_the_memory(tmp_path):
    cache = ShardedCache(tmp_path, "latents")
    for number in range(20):
        cache.put(key(number), np.full(100_000, number, np.float32))
    tracemalloc.start()
    for number in range(20):
        assert cache.get(key(number))[0] == number
    used, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used < 100_000 and peak < 1_000_000


def test_one_thread_gets_while_another_one_puts(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_index, "RECENT", 16)
    monkeypatch.setattr(shards, "SHARD_BYTES", 50 * RECORD)
    cache, other = ShardedCache(tmp_path, "latents"), ShardedCache(tmp_path, "latents", 1)
    done, faults, count = threading.Event(), [], [0]

    def get():
        rng = random.Random(0)
        while not done.is_set():
            last = count[0]
            for number in (last, rng.randrange(last + 1)):
                got = cache.get(key(number)) if last else array(number)
                if got is None or got[0] != number:
                    faults.append(number)

    thread = threading.Thread(target=get)
    cache.put(key(0), array(0))
    thread.start()
    for number in range(1, 1500):
        cache.put(key(number), array(number))
        other.put(key(-number), array(-number))
        if number % 10 == 0:
            cache.refresh()
        count[0] = number
    done.set()
    thread.join()
    assert faults == []
    assert all(cache.get(key(-number))[0] == -number for number in range(1, 1490))


def test_what_is_put_while_a_damaged_record_is_read_stays(tmp_path, monkeypatch):
    fill(tmp_path, range(1))
    shard = tmp_path / "latents-0-1.shard"
    shard.write_bytes(flipped(shard.read_bytes(), 70))
    cache = ShardedCache(tmp_path, "latents")

    def read_while_the_other_thread_puts(*arguments):
        cache.put(key(0), array(0))
        return read_record(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "read_record", read_while_the_other_thread_puts)
        assert cache.get(key(0)) is None
    assert cache.get(key(0))[0] == 0


def test_files_are_not_left_open(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", RECORD)
    cache = ShardedCache(tmp_path, "latents")
    before = len(os.listdir("/proc/self/fd"))
    for number in range(30):
        cache.put(key(number), array(number))
        cache.get(key(0))
    assert len(os.listdir("/proc/self/fd")) == before + 2
    cache.close()
    assert len(os.listdir("/proc/self/fd")) == before
    cache.put(key(31), array(31))
    assert cache.get(key(31))[0] == 31
