"""The same images and captions give the same list in every layout, and which layout a folder has."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from ldm.data.sources import LAYOUTS, detect, read
from ldm.data.sources.rows import ReadOptions, read_image
from ldm.errors import UserError
from tests.data.sources import layouts
from tests.data.sources.layouts import CAPTIONS, IMAGES, NEED_PYARROW, WRITERS


def content(listing):
    """Return what training sees: the images' bytes and the captions, in the order of the rows."""
    return [(read_image(row.image, 1 << 20), row.caption) for row in listing.rows]


EXPECTED = [(IMAGES[name], caption) for name, caption in CAPTIONS.items()]

CASES = [(layout, writer) for layout, writers in WRITERS.items() for writer in writers]


@pytest.mark.parametrize(("layout", "writer"), CASES, ids=[f"{name}-{writer.__name__}" for name, writer in CASES])
def test_the_same_images_and_captions_give_the_same_list_in_every_layout(tmp_path, caplog, layout, writer):
    if writer in NEED_PYARROW:
        pytest.importorskip("pyarrow")
    path = writer(tmp_path / "data")
    with caplog.at_level(logging.INFO, "ldm"):
        listing = read(path)
    assert content(listing) == EXPECTED
    assert [os.path.basename(listing.name(row)) for row in listing.rows] == [
        os.path.basename(name) for name in CAPTIONS
    ]
    assert listing.layout == layout == detect(path).layout and listing.left_out == []
    assert f"{path}: 4 images; {LAYOUTS[layout].ABOUT}" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_every_layout_is_tested():
    assert set(WRITERS) == set(LAYOUTS)


def test_a_path_with_a_slash_at_its_end_or_relative_is_the_same(tmp_path, monkeypatch):
    expected = read(layouts.jsonl(tmp_path / "data"))
    assert read(f"{tmp_path}/data/") == expected
    monkeypatch.chdir(tmp_path)
    assert content(read("data")) == EXPECTED and content(read(Path("data"))) == EXPECTED
    monkeypatch.chdir(tmp_path / "data")
    assert content(read(".")) == EXPECTED


def test_the_file_that_describes_a_folder_may_be_given_itself(tmp_path):
    folder = layouts.jsonl(tmp_path / "data")
    layouts.kohya_json(folder)
    layouts.tar_shards(tmp_path / "tar")
    assert content(read(folder / "metadata.jsonl")) == EXPECTED
    assert content(read(folder / "meta_cap.json")) == EXPECTED
    assert content(read(tmp_path / "tar" / "00001.tar")) == EXPECTED[:2]
    os.rename(folder / "meta_cap.json", tmp_path / "any.json")
    assert content(read(tmp_path / "any.json", ReadOptions(image_dir=str(folder)))) == EXPECTED


@pytest.mark.parametrize(
    ("writers", "layout", "ignored"),
    [
        ((layouts.image_text_csv, layouts.jsonl), "image_text_csv", ("imagefolder",)),
        ((layouts.jsonl, layouts.kohya_json), "imagefolder", ("kohya_json",)),
        ((layouts.kohya_json, layouts.tar_shards), "kohya_json", ("tar_shards",)),
        ((layouts.tar_shards, layouts.kohya_folders), "tar_shards", ("kohya_folders",)),
    ],
    ids=["csv", "jsonl", "json", "tar"],
)
def test_of_two_layouts_the_one_that_describes_more_is_read_and_the_log_names_the_other(
    tmp_path, caplog, writers, layout, ignored
):
    for writer in writers:
        writer(tmp_path)
    assert detect(tmp_path) == (layout, ignored)
    with caplog.at_level(logging.WARNING, "ldm"):
        assert content(read(tmp_path)) == EXPECTED
    assert f"is read as {LAYOUTS[layout].ABOUT}" in caplog.text and LAYOUTS[ignored[0]].ABOUT in caplog.text


def test_captions_beside_images_that_a_csv_describes_are_named_as_ignored(tmp_path, caplog):
    folder = layouts.image_text_csv(tmp_path)
    (folder / "B.png").write_bytes(IMAGES["cats/B.png"])
    (folder / "B.txt").write_text("another caption")
    with caplog.at_level(logging.WARNING, "ldm"):
        assert content(read(folder)) == EXPECTED
    assert LAYOUTS["caption_files"].ABOUT in caplog.text


@pytest.mark.parametrize(
    ("names", "fault"),
    [
        ((), "is no data set: it has no images and none of img_txt.csv"),
        (("notes.txt", "a.safetensors"), "has no images"),
        (("images.zip",), "holds archives (images.zip): unpack them"),
        (("shard.tar.gz",), "holds archives"),
        (("train-00000-of-00001.parquet",), "save_to_disk"),
        (("data/train-00000-of-00001.parquet",), "save_to_disk"),
        (("below/img_txt.csv",), "below below it has img_txt.csv"),
    ],
)
def test_a_folder_that_is_no_data_set_is_refused_with_the_way_out(tmp_path, names, fault):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError) as caught:
        read(tmp_path)
    assert str(tmp_path) in str(caught.value) and fault in str(caught.value)


@pytest.mark.parametrize(
    ("name", "fault"), [("nowhere", "does not exist"), ("file.xyz", "is no data set"), ("fifo", "is a pipe")]
)
def test_a_path_that_is_no_folder_or_known_file_is_refused(tmp_path, name, fault):
    (tmp_path / "file.xyz").write_text("x")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UserError, match=fault):
        read(tmp_path / name)


def test_a_folder_that_may_not_be_read_is_named(unprivileged):
    layouts.caption_files(unprivileged)
    (unprivileged / "cats").chmod(0)
    with pytest.raises(UserError, match="cats cannot be read: Permission denied"):
        read(unprivileged)
