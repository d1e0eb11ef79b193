"""The rows of a training know their images, captions and what tells them from others."""

import numpy as np
import pytest
from PIL import Image

from ldm.data.content import content_key, file_hash
from ldm.data.dataset import read_image_text_csv
from ldm.data.preparation import data_of_rows
from ldm.settings.train import TrainSettings
from tests.data.prepared_data import RNG, training, write, write_shards
from tests.data.sources import layouts


@pytest.mark.parametrize("writer", [writer for writers in layouts.WRITERS.values() for writer in writers])
def test_every_layout_gives_the_same_images_captions_and_fingerprint(writer, tmp_path, monkeypatch):
    if writer in layouts.NEED_PYARROW:
        pytest.importorskip("pyarrow")
    monkeypatch.setitem(layouts.CAPTIONS, "cats/c d.png", "two, tags")
    expected = training(layouts.image_text_csv(tmp_path / "expected"))
    data = training(writer(tmp_path / "data"))
    assert data.contents == expected.contents and data.fingerprint() == expected.fingerprint()
    for row in range(4):
        np.testing.assert_array_equal(data.image(row), expected.image(row))
        assert data.caption(row, RNG, 0, 0, None) == expected.caption(row, RNG, 0, 0, None)


def test_the_fingerprint_is_that_of_earlier_versions(tmp_path):
    """A run of an earlier version is resumed by it."""
    folder = layouts.image_text_csv(tmp_path)
    parts = [part for name, caption in layouts.CAPTIONS.items() for part in (file_hash(folder / name), caption)]
    assert training(folder).fingerprint() == content_key("rows", *parts)
    rows, settings = read_image_text_csv(folder).rows, TrainSettings()
    assert data_of_rows(rows, 16, settings).fingerprint() == content_key("rows", *parts)


def test_the_lines_of_a_caption_are_one_text_in_a_csv_and_one_is_taken_in_a_caption_file(tmp_path):
    rows = [2]
    for writer, expected in ((layouts.image_text_csv, "two lines"), (layouts.caption_files, "two")):
        data = training(writer(tmp_path / writer.__name__))
        assert [data.caption(row, RNG, 0, 0, None) for row in rows] == [expected]


def test_repeats_change_the_fingerprint(tmp_path):
    prints = set()
    for number, folder in enumerate(("1_cat", "2_cat")):
        write(tmp_path / str(number) / folder, [(16, 16)] * 2)
        prints.add(training(tmp_path / str(number)).fingerprint())
    assert len(prints) == 2


def test_the_file_of_each_row_is_numbered_where_files_hold_several_images(tmp_path):
    write_shards(tmp_path / "shards", [(16, 16)] * 4)
    assert training(tmp_path / "shards").file_of_row().tolist() == [0, 1, 0, 1]
    assert training(write(tmp_path / "files", [(16, 16)] * 4)).file_of_row() is None


def test_what_is_said_of_an_image_is_said_once(tmp_path):
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "a.txt").write_text("a cat")
    data = training(tmp_path)
    for expected in (["1 image has several frames, of which the first is used: "], []):
        data.image(0)
        assert [line.partition(str(tmp_path))[0] for line in data.notes.lines(new=True)] == expected
