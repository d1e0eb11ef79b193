"""Rows on disk: the same rows as in a list, at every place, in every order."""

import os

import numpy as np
import pytest

from ldm.data.sources import read
from ldm.data.sources.row_file import AT_ONCE, RowFile
from ldm.data.sources.rows import FilePart, ReadOptions, Row
from ldm.errors import UserError
from tests.data.sources import layouts
from tests.data.sources.test_tar_shards import IMAGE, pairs, shard

ON_DISK = ReadOptions(rows_on_disk=True)


def make(count):
    """Rows of three files, and a RowFile of them."""
    rows = [
        Row(
            FilePart(f"{3 * i // count}.tar", (1 << 40) + i, i % 7, f"cats/{i}.png"),
            f"a cat 猫 {i}" * (i % 3),
            i % 2,
            i,
        )
        for i in range(count)
    ]
    on_disk = RowFile()
    for row in rows:
        on_disk.append(row)
    return rows, on_disk


@pytest.mark.parametrize("count", [0, 1, 10, AT_ONCE, AT_ONCE + 3])
def test_rows_come_back_as_they_were(count):
    rows, on_disk = make(count)
    assert len(on_disk) == count and list(on_disk) == rows == list(on_disk)
    assert [on_disk[place] for place in range(0, count, 100)] == rows[::100]
    assert on_disk[2:5] == rows[2:5] and on_disk.file_numbers().tolist() == [int(row.image.file[0]) for row in rows]


def test_places_count_from_the_end_too_and_end():
    rows, on_disk = make(3)
    assert on_disk[-1] == rows[-1] and on_disk[np.int64(1)] == rows[1]
    for place in (3, -4):
        with pytest.raises(IndexError):
            on_disk[place]


@pytest.mark.parametrize("texts_at_once", [1, 8 << 20])
def test_rows_at_chosen_places_are_taken_in_their_order(texts_at_once, monkeypatch):
    monkeypatch.setattr("ldm.data.sources.row_file._TEXTS_AT_ONCE", texts_at_once)
    count = 20 * AT_ONCE
    rows, on_disk = make(count)
    rng = np.random.default_rng(0)
    for places in (rng.permutation(count)[:10], np.array([count - 1, 0]), np.arange(5, 50), np.arange(AT_ONCE + 1)):
        taken = on_disk.take(places)
        assert list(taken) == [rows[place] for place in places] == list(taken.take(np.arange(len(places))))
        assert taken[len(places) - 1] == rows[places[-1]]


def test_names_that_are_not_utf8_and_zero_captions():
    row = Row(FilePart("a.tar", 0, 1, os.fsdecode(b"\xff.png")), "", 0, 0)
    on_disk = RowFile()
    on_disk.append(row)
    assert on_disk[0] == row
    with pytest.raises(UserError, match="a.tar has a name of 70,004 bytes"):
        on_disk.append(Row(FilePart("a.tar", 0, 1, "x" * 70_000 + ".png"), "", 0, 0))


def test_a_full_disk_is_named(monkeypatch):
    on_disk = make(3)[1]
    on_disk._records = open("/dev/full", "wb", buffering=0)
    with pytest.raises(UserError, match="cannot be written in .*No space left.*TMPDIR"):
        list(on_disk)


def test_the_files_have_no_name_and_are_in_tmpdir(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    on_disk = make(3)[1]
    assert str(tmp_path) in os.readlink(f"/proc/self/fd/{on_disk._records.fileno()}") and not list(tmp_path.iterdir())


def test_tar_shards_have_the_same_rows_on_disk_in_the_order_of_the_shards(tmp_path):
    path = layouts.tar_shards(tmp_path)
    listing, in_memory = read(path, ON_DISK), read(path)
    assert isinstance(listing.rows, RowFile) and isinstance(in_memory.rows, list)
    assert [listing.name(row)[5] for row in listing.rows] == list("cäBa")
    assert sorted(listing.rows, key=listing.name) == in_memory.rows
    assert (listing.subsets, listing.left_out, listing.counts) == in_memory[2:]


def test_other_layouts_are_in_memory(tmp_path):
    assert isinstance(read(layouts.caption_files(tmp_path), ON_DISK).rows, list)


def test_what_is_left_out_and_refused_is_the_same(tmp_path):
    path = shard(tmp_path / "a.tar", pairs(**{"05.png": b""}))
    assert read(path, ON_DISK).left_out == read(path).left_out != []
    path.write_bytes(path.read_bytes()[: 10 * 1024 + 100])
    messages = set()
    for options in (ON_DISK, ReadOptions()):
        with pytest.raises(UserError, match="a.tar is broken at byte") as caught:
            read(path, options)
        messages.add(str(caught.value))
    shard(path, [*pairs(3), ("d.png", IMAGE)]), shard(tmp_path / "b.tar", pairs(1))
    for options in (ON_DISK, ReadOptions()):
        with pytest.raises(UserError, match="00.png is in .*a.tar, byte .* and in .*b.tar, byte") as caught:
            read(tmp_path, options)
        messages.add(str(caught.value))
    assert len(messages) == 2
