"""An image that is known to decode is not read again until it changes."""

from __future__ import annotations

import json
import os
import time

import numpy as np
import pytest
from PIL import Image

from ldm.data import checked_images as module
from ldm.data.checked_images import CheckedImages, image_content
from ldm.data.content import file_hash
from ldm.data.dataset import read_image_text_csv
from ldm.data.decoding import BrokenImage
from ldm.data.sources.rows import FilePart

LONG_AGO = time.time_ns() - 3_600_000_000_000
COUNT = 5


def write_image(path, seed):
    noise = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, format="BMP")  # of one size in bytes whatever the pixels


@pytest.fixture
def paths(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    paths = [folder / f"{i}.bmp" for i in range(COUNT)]
    for i, path in enumerate(paths):
        write_image(path, i)
    (folder / "img_txt.csv").write_text("dir,text\n" + "".join(f"{path.name},image {path.stem}\n" for path in paths))
    return paths


@pytest.fixture
def clock(monkeypatch):
    """The time is an hour later, so the dates of the files are trusted."""
    now = time.time_ns
    monkeypatch.setattr(module.time, "time_ns", lambda: now() + 3_600_000_000_000)


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Checks images as a run does at its start, and returns (hashes, names decoded, names hashed)."""

    def start(paths):
        decoded, hashed = [], []

        def counted(function, names):
            def call(path):
                names.append(path.name)
                return function(path)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(module, "open_rgb", counted(module.open_rgb, decoded))
            patch.setattr(module, "file_hash", counted(module.file_hash, hashed))
            checked = CheckedImages(tmp_path / "cache" / "images.json")
            hashes = [checked.check(path).content for path in paths]
            checked.save()
        return hashes, decoded, hashed

    return start


ALL = [f"{i}.bmp" for i in range(COUNT)]


def test_the_first_start_decodes_every_image_and_the_second_reads_none(paths, start, clock):
    expected = [file_hash(path) for path in paths]
    assert start(paths) == (expected, ALL, ALL)
    assert start(paths) == (expected, [], [])


def test_without_a_record_every_image_is_decoded(paths, monkeypatch):
    decoded, open_rgb = [], module.open_rgb
    monkeypatch.setattr(module, "open_rgb", lambda path: decoded.append(path.name) or open_rgb(path))
    for _ in range(2):
        checked = CheckedImages()
        assert [checked.check(path) for path in paths] == [(file_hash(path), (16, 16)) for path in paths]
        checked.save()
    assert decoded == ALL * 2


def test_an_image_with_another_date_is_hashed_and_not_decoded(paths, start, clock):
    start(paths)
    os.utime(paths[2], ns=(LONG_AGO, LONG_AGO))
    assert start(paths)[1:] == ([], ["2.bmp"])
    assert start(paths)[1:] == ([], [])


def test_a_changed_image_is_decoded_and_has_another_hash(paths, start, clock):
    before, _, _ = start(paths)
    write_image(paths[2], 100)
    after, decoded, _ = start(paths)
    assert decoded == ["2.bmp"] and after[2] == file_hash(paths[2]) != before[2]
    assert start(paths) == (after, [], [])


def test_a_changed_image_is_noticed_though_its_size_and_date_were_set_back(paths, start, clock):
    for path in paths:
        os.utime(path, ns=(LONG_AGO, LONG_AGO))
    start(paths)
    write_image(paths[2], 100)
    os.utime(paths[2], ns=(LONG_AGO, LONG_AGO))
    assert start(paths)[1] == ["2.bmp"]


def test_the_date_of_an_image_that_changed_a_moment_ago_is_not_trusted(paths, start):
    """It could change again without another date."""
    start(paths)
    assert start(paths)[1:] == ([], ALL)


@pytest.mark.parametrize("content", [b"", b"no image", b"\0" * 822])
def test_an_image_that_is_broken_since_is_refused_at_every_start(paths, start, clock, content):
    start(paths)
    assert paths[2].stat().st_size == 822
    paths[2].write_bytes(content)
    for _ in range(2):
        with pytest.raises(BrokenImage):
            start(paths)


@pytest.mark.parametrize("change", ["remove", "folder", "fifo"])
def test_an_image_that_is_gone_since_is_refused(paths, start, clock, change):
    start(paths)
    paths[2].unlink()
    {"remove": lambda path: None, "folder": os.mkdir, "fifo": os.mkfifo}[change](paths[2])
    with pytest.raises(BrokenImage, match="2.bmp"):
        start(paths)


def damaged_number(text):
    content = json.loads(text)
    next(iter(content["images"].values()))[1] += 1
    return json.dumps(content)


def other_form(images):
    content = {"version": module.VERSION, "checksum": module._checksum(images), "images": images}
    return lambda text: json.dumps(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: '{"version": "' + module.VERSION + '"}',
        lambda text: "\udcff",
        lambda text: "[" * 100_000,
        damaged_number,
        other_form(None),
        other_form({"a": 1}),
        other_form({"a": ["0" * 64, 1]}),
        other_form({"a": ["no hash", 1, []]}),
        other_form({"a": ["0" * 64, "1", []]}),
        other_form({"a": [1, 1, [1, 2, 3]]}),
    ],
)
def test_a_damaged_record_is_named_and_written_anew(paths, start, clock, tmp_path, caplog, damage):
    hashes, _, _ = start(paths)
    record = tmp_path / "cache" / "images.json"
    record.write_bytes(damage(record.read_text()).encode("utf-8", "surrogateescape"))
    assert start(paths) == (hashes, ALL, ALL)
    [warning] = caplog.records
    assert str(record) in warning.getMessage() and "checking all images again" in warning.getMessage()
    caplog.clear()
    assert start(paths) == (hashes, [], []) and not caplog.records


def test_a_record_that_is_no_file_is_not_waited_for(paths, start, clock, tmp_path, caplog):
    (tmp_path / "cache").mkdir()
    os.mkfifo(tmp_path / "cache" / "images.json")
    assert start(paths)[1] == ALL
    assert "is a pipe" in caplog.text and "cannot write" in caplog.text


def test_another_decoder_checks_all_images_again(paths, start, clock, monkeypatch, caplog):
    start(paths)
    monkeypatch.setattr(module, "VERSION", "1, Pillow 0")
    assert start(paths)[1] == ALL and not caplog.records


def test_the_record_is_not_written_if_nothing_changed(paths, start, clock, tmp_path):
    start(paths)
    record = tmp_path / "cache" / "images.json"
    before = record.stat()
    start(paths)
    assert record.stat() == before


def test_a_record_that_is_too_large_to_be_read_is_not_written(paths, start, clock, tmp_path, monkeypatch, caplog):
    start(paths[:2])
    record = tmp_path / "cache" / "images.json"
    before = record.read_bytes()
    monkeypatch.setattr(module, "MAX_BYTES", len(before))
    start(paths)
    assert "images.json is not written" in caplog.text and record.read_bytes() == before
    start(paths[:2])
    assert start(paths[:2])[1:] == ([], [])


def test_names_that_are_not_utf_8_are_remembered(paths, start, clock):
    path = paths[0].rename(paths[0].with_name(os.fsdecode(b"\xb9\xb7.bmp")))
    start([path])
    assert start([path])[1:] == ([], [])


def test_a_data_set_gives_the_same_rows_with_and_without_a_record(paths, tmp_path, clock):
    paths[3].write_bytes(b"")
    settings = {"max_bad_fraction": 0.5}
    expected = read_image_text_csv(paths[0].parent, **settings)
    for _ in range(2):
        assert read_image_text_csv(paths[0].parent, **settings, record=tmp_path / "images.json") == expected
    assert [row.content for row in expected.rows] == [file_hash(row.path) for row in expected.rows]
    assert expected.left_out == [("3.bmp", "line 5: the image is an empty file")]


def test_an_image_that_is_gone_since_it_was_decoded_is_named_once(tmp_path):
    for image, name in [
        (tmp_path / "cat.png", f"{tmp_path}/cat.png"),
        (FilePart(f"{tmp_path}/a.tar", 0, 9, "cat.png"), f"cat.png in {tmp_path}/a.tar"),
    ]:
        with pytest.raises(BrokenImage, match="does not exist") as caught:
            image_content(image)
        assert str(caught.value).startswith(f"the image {name} ") and str(caught.value).count("cat.png") == 1
