"""What a training sees of a data set: the same rows in every layout, with the rules of their subsets."""

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data.content import content_key, file_hash
from ldm.data.dataset import read_image_text_csv
from ldm.data.sources.row_file import RowFile
from ldm.data.training_data import data_of_rows, prepare_data, read_listing
from ldm.errors import UserError
from ldm.settings.model import load_model_config
from ldm.settings.train import TrainSettings
from ldm.tokenizer import Tokenizer
from tests.data.sources import layouts
from tests.data.sources.test_tar_shards import shard

MICRO = load_model_config(Path(__file__).parents[1] / "training" / "micro.yaml")
RNG = np.random.default_rng(0)


def write(folder, sizes, captions=None):
    """Write images of different content, with caption files."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, size in enumerate(sizes):
        noise = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(captions[number] if captions else f"image {number}")
    return folder


def prepared(path, **others):
    """The data of training and of validation."""
    settings = TrainSettings(data_path=str(path), image_size=16, **others)
    return prepare_data(read_listing(settings), settings, MICRO)


def training(path, **others):
    return prepared(path, **others)[0]


def names(data):
    return [data.name(row) for row in range(len(data))]


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


@pytest.mark.parametrize(
    ("folders", "repeated"),
    [({"1_cat": 2}, [1, 1]), ({"1_cat": 2, "3_dog": 1}, [1, 1, 3])],
)
def test_kohyas_folders_are_repeated(tmp_path, folders, repeated):
    for name, count in folders.items():
        write(tmp_path / name, [(16, 16)] * count)
    data = training(tmp_path)
    assert data.buckets.repeats.tolist() == repeated and data.fills_batches == (max(repeated) > 1)


def test_repeats_change_the_fingerprint(tmp_path):
    prints = set()
    for number, folder in enumerate(("1_cat", "2_cat")):
        write(tmp_path / str(number) / folder, [(16, 16)] * 2)
        prints.add(training(tmp_path / str(number)).fingerprint())
    assert len(prints) == 2


def test_the_settings_of_a_subset_win_over_those_of_the_run(tmp_path):
    write(tmp_path / "a", [(16, 16)]), write(tmp_path / "b", [(16, 16)])
    (tmp_path / "config.toml").write_text(
        "[general]\ncaption_prefix = 'all'\n[[datasets]]\n"
        "[[datasets.subsets]]\nimage_dir = 'a'\nnum_repeats = 2\nflip_aug = true\ncaption_dropout_rate = 0.5\n"
        "[[datasets.subsets]]\nimage_dir = 'b'\ncaption_prefix = 'own'\n"
    )
    data = training(tmp_path / "config.toml", caption_suffix="end", caption_dropout=0.1)
    assert [data.caption(row, RNG, 0, 0, None) for row in (0, 1)] == ["all image 0 end", "own image 0 end"]
    assert [rules.random_flip for rules in data.rules] == [True, False] and data.augments
    assert data.dropout.tolist() == [0.5, 0.1] and data.buckets.repeats.tolist() == [2, 1]


def test_two_data_sets_have_their_own_resolutions(tmp_path):
    write(tmp_path / "a", [(30, 30)]), write(tmp_path / "b", [(40, 20), (20, 40)])
    (tmp_path / "config.toml").write_text(
        "[[datasets]]\nresolution = 8\n[[datasets.subsets]]\nimage_dir = 'a'\n"
        "[[datasets]]\nresolution = [32, 16]\n[[datasets.subsets]]\nimage_dir = 'b'\n"
    )
    data = training(tmp_path / "config.toml")
    assert [data.image(row).shape for row in range(3)] == [(3, 8, 8), (3, 16, 32), (3, 16, 32)]


def test_a_batch_size_of_the_data_set_must_be_that_of_the_run(tmp_path):
    write(tmp_path / "a", [(16, 16)])
    (tmp_path / "config.toml").write_text("[[datasets]]\nbatch_size = 3\n[[datasets.subsets]]\nimage_dir = 'a'\n")
    with pytest.raises(UserError, match="batch_size is 3, and train_batch_size 4.*give --train_batch_size 3"):
        training(tmp_path / "config.toml")
    assert len(training(tmp_path / "config.toml", train_batch_size=3)) == 1


BUCKETS = dict(enable_bucket=True, min_bucket_reso=8, max_bucket_reso=32, bucket_reso_steps=8)


def test_images_keep_their_shape_with_buckets_and_the_log_says_what_is_cropped(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    data = training(write(tmp_path, [(40, 40), (90, 30), (30, 90), (91, 30)]), **BUCKETS)
    assert [data.image(row).shape[1:] for row in range(4)] == [(16, 16), (8, 24), (24, 8), (8, 24)]
    assert "4 images in 3 buckets: 3 graphs are compiled" in caplog.text and "cropped away" in caplog.text


def test_without_buckets_nothing_is_said_of_them(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    data = training(write(tmp_path, [(40, 40), (60, 30)]))
    assert len(data.buckets.sizes) == 1 and "compiled" not in caplog.text


def test_images_that_are_not_decoded_before_are_known_by_name_size_and_date(tmp_path):
    write(tmp_path, [(16, 16)] * 3)
    checked, unchecked = training(tmp_path), training(tmp_path, check_images=False)
    assert unchecked.contents is None and checked.contents is not None
    assert len({unchecked.content(row) for row in range(3)}) == 3
    before = unchecked.content(0)
    Image.new("RGB", (16, 16)).save(tmp_path / "00.png")
    assert unchecked.content(0) != before and unchecked.content(1) == training(tmp_path, check_images=False).content(1)


def test_small_images_are_left_out_and_broken_ones_named(tmp_path, caplog):
    write(tmp_path, [(16, 16)] * 11 + [(7, 30)])
    (tmp_path / "03.png").write_bytes(b"no image")
    data = training(tmp_path, image_filter_size=8)
    assert "03.png" not in names(data) and "11.png" not in names(data) and len(data) == 10
    assert "left out: 03.png (the image" in caplog.text


@pytest.mark.parametrize("check_images", [True, False])
def test_too_many_broken_images_are_refused(tmp_path, check_images):
    write(tmp_path, [(16, 16)] * 4)
    (tmp_path / "03.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="1 of 4 rows are unusable"):
        training(tmp_path, check_images=check_images, **BUCKETS)


# Images held out for validation


def test_a_share_of_the_images_is_held_out_and_the_seed_says_which(tmp_path):
    write(tmp_path, [(16, 16)] * 20)
    kept, out = prepared(tmp_path, validation_split=0.25)
    assert (len(kept), len(out)) == (15, 5)
    assert sorted(names(kept) + names(out)) == [f"{number:02}.png" for number in range(20)]
    assert names(prepared(tmp_path, validation_split=0.25)[1]) == names(out)
    assert names(prepared(tmp_path, validation_split=0.25, validation_seed=7)[1]) != names(out)
    assert names(prepared(tmp_path, validation_split=0.25, seed=5)[1]) != names(out)


def test_one_image_is_left_to_train_on_unless_all_are_held_out(tmp_path):
    write(tmp_path, [(16, 16)] * 2)
    assert [len(data) for data in prepared(tmp_path, validation_split=0.99)] == [1, 1]
    with pytest.raises(UserError, match="no usable images to train on"):
        prepared(tmp_path, validation_split=1.0)


def test_rows_of_one_image_are_held_out_together(tmp_path):
    folder = write(tmp_path, [(16, 16)] * 4)
    lines = [f"{number % 4:02}.png,caption {number}" for number in range(12)]
    (folder / "img_txt.csv").write_text("\n".join(["dir,text", *lines]))
    kept, out = prepared(folder, validation_split=0.5)
    assert not set(names(kept)) & set(names(out)) and len(kept) == len(out) == 6


def test_validation_has_a_folder_of_its_own(tmp_path):
    write(tmp_path / "train", [(16, 16)] * 3)
    write(tmp_path / "other", [(16, 16)] * 2)
    kept, out = prepared(tmp_path / "train", validation_data_path=str(tmp_path / "other"))
    assert (len(kept), len(out)) == (3, 2) and "other" in out.source(0)


def test_broken_images_for_validation_are_left_out_and_named(tmp_path, caplog):
    write(tmp_path / "train", [(16, 16)] * 3)
    write(tmp_path / "other", [(16, 16)] * 12)
    (tmp_path / "other" / "03.png").write_bytes(b"no image")
    _, out = prepared(tmp_path / "train", validation_data_path=str(tmp_path / "other"))
    assert len(out) == 11 and out.contents is not None and "left out: 03.png (the image" in caplog.text
    for number in range(4, 9):
        (tmp_path / "other" / f"{number:02}.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=f"{tmp_path / 'other'}: 6 of 12 rows are unusable"):
        prepared(tmp_path / "train", validation_data_path=str(tmp_path / "other"))


def test_images_that_are_trained_and_validated_are_counted(tmp_path, caplog):
    write(tmp_path, [(16, 16)] * 3)
    prepared(tmp_path, validation_data_path=str(tmp_path))
    assert "3 of 3 images for validation are trained as well" in caplog.text


def test_a_split_that_holds_no_image_out_is_said(tmp_path, caplog):
    assert prepared(write(tmp_path, [(16, 16)] * 3), validation_split=0.1)[1] is None
    assert "validation_split 0.1 of 3 images is none" in caplog.text


def test_without_a_split_nothing_is_held_out(tmp_path):
    assert prepared(write(tmp_path, [(16, 16)] * 3))[1] is None


def test_class_images_are_neither_held_out_nor_trained_with_weight_zero(tmp_path):
    write(tmp_path / "a", [(16, 16)] * 4), write(tmp_path / "b", [(16, 16)] * 9)
    (tmp_path / "config.toml").write_text(
        "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\n[[datasets.subsets]]\nimage_dir = 'b'\nis_reg = true\n"
    )
    kept, out = prepared(tmp_path / "config.toml", validation_split=0.5, prior_loss_weight=0.5)
    assert len(out) == 2 and all("/a/" in out.source(row) for row in range(2))
    assert kept.weights.tolist() == [1, 1, 0.5, 0.5]  # as many class images as instance images
    alone = training(tmp_path / "config.toml", prior_loss_weight=0)
    assert len(alone) == 4 and alone.weights is None


# Rows on disk, with shuffle_buffer_size


def write_shards(folder, sizes):
    """Write the images of `write` into two tar shards, the first of which has the odd numbers."""
    images = write(folder / "images", sizes)
    for first in (0, 1):
        names = [f"{number:02}.{suffix}" for number in range(first, len(sizes), 2) for suffix in ("png", "txt")]
        shard(folder / f"{1 - first}.tar", [(name, (images / name).read_bytes()) for name in names])
    for path in [*images.iterdir(), images]:
        path.rmdir() if path.is_dir() else path.unlink()
    return folder


@pytest.mark.parametrize("check_images", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"image_filter_size": 20},
        {"validation_split": 0.4},
        BUCKETS,
        {"num_repeats": 2},
        {"instance_prompt": "a dog"},
    ],
)
def test_rows_on_disk_are_the_same_in_the_order_of_the_shards(tmp_path, options, check_images):
    folder = write_shards(tmp_path, [(24, 24), (16, 24), (40, 20)] * 4)
    settings = {"data_path": str(folder), "image_size": 16, "check_images": check_images, **options}
    data, (on_disk, out) = (
        prepare_data(read_listing(run), run, MICRO)
        for run in (TrainSettings(**settings), TrainSettings(**settings, shuffle_buffer_size=3))
    )
    assert isinstance(on_disk.rows, RowFile) and isinstance(data[0].rows, list)
    in_turn = sorted(names(on_disk), key=lambda name: (int(name[:2]) % 2 == 0, name))
    assert names(on_disk) == in_turn and np.unique(on_disk.file_of_row()).tolist() == [0, 1]
    if out is None:
        assert sorted(names(on_disk)) == names(data[0])
    else:
        assert sorted(names(on_disk) + names(out)) == [f"{number:02}.png" for number in range(12)] and len(out) == 5
    of_name = {data[0].name(row): row for row in range(len(data[0]))}
    for row in range(len(on_disk)):
        if (other := of_name.get(on_disk.name(row))) is not None:
            np.testing.assert_array_equal(on_disk.image(row), data[0].image(other))
            assert on_disk.text(row) == data[0].text(other) and on_disk.content(row) == data[0].content(other)


def test_rows_on_disk_are_never_all_in_memory_where_no_image_is_opened(tmp_path, monkeypatch):
    folder = write_shards(tmp_path, [(16, 16)] * 30)
    settings = TrainSettings(data_path=str(folder), image_size=16, check_images=False, shuffle_buffer_size=3)
    monkeypatch.setattr("ldm.data.sources.row_file.AT_ONCE", 4)
    alive = []

    class Counted(str):
        def __init__(self, *_):
            alive.append(1)

        def __del__(self):
            alive.pop()

    most = []
    decode = bytes.decode

    def counted(content):
        most.append(len(alive))
        return Counted(decode(content, "utf-8"))

    monkeypatch.setattr("ldm.data.sources.row_file._decode", counted)
    data, _ = prepare_data(read_listing(settings), settings, MICRO)
    data.fingerprint(), data.cut_report(Tokenizer()), data.file_of_row()
    assert len(most) >= 2 * 2 * 30 and max(most) < 6


def test_the_file_of_each_row_is_numbered_where_files_hold_several_images(tmp_path):
    write_shards(tmp_path / "shards", [(16, 16)] * 4)
    assert training(tmp_path / "shards").file_of_row().tolist() == [0, 1, 0, 1]
    assert training(write(tmp_path / "files", [(16, 16)] * 4)).file_of_row() is None


# What a resumed run compares


@pytest.mark.parametrize(
    "change",
    [
        "flip_aug = true", "random_crop = true", "shuffle_caption = true", "caption_dropout_rate = 0.9",
        "caption_prefix = 'x'", "num_repeats = 2", "keep_tokens = 1",
    ],
)  # fmt: skip
def test_a_change_of_a_dataset_config_is_another_run(tmp_path, change):
    write(tmp_path / "a", [(16, 16), (40, 20)])
    prints = set()
    for name, line in (("before", ""), ("after", change), ("resolution", ""), ("buckets", "")):
        dataset = {"resolution": "resolution = 32", "buckets": "enable_bucket = true\nbucket_no_upscale = true"}.get(
            name, ""
        )
        config = tmp_path / f"{name}.toml"
        config.write_text(f"[[datasets]]\n{dataset}\n[[datasets.subsets]]\nimage_dir = 'a'\n{line}\n")
        prints.add(training(config, bucket_reso_steps=8, min_bucket_reso=8).fingerprint())
    assert len(prints) == 4


@pytest.mark.parametrize(
    ("others", "warning"),
    [
        (dict(max_buckets=3), "max_buckets has no effect without enable_bucket"),
        (dict(unmasked_weight=0.5), "unmasked_weight has no effect without masks"),
        (dict(prior_loss_weight=0.5), "prior_loss_weight has no effect without class images"),
        (dict(class_prompt="a dog"), "class_prompt has no effect without class images"),
        (dict(keep_tokens=1), "keep_tokens has no effect: give shuffle_caption"),
    ],
)
def test_a_setting_without_effect_is_named(tmp_path, caplog, others, warning):
    training(write(tmp_path, [(16, 16)] * 2), **others)
    assert warning in caplog.text


def test_a_setting_that_a_subset_gives_an_effect_is_not_named(tmp_path, caplog):
    write(tmp_path / "a", [(16, 16)])
    (tmp_path / "config.toml").write_text(
        "[general]\nshuffle_caption = true\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'"
    )
    training(tmp_path / "config.toml", keep_tokens=1)
    assert "no effect" not in caplog.text


def test_a_folder_name_cannot_ask_for_more_samples_than_fit(tmp_path):
    write(tmp_path / "1000000_cat", [(8, 8)] * 101)
    with pytest.raises(UserError, match="101,000,000 samples, at most 100,000,000 .*1000000_cat is repeated 1,000,000"):
        training(tmp_path)


def test_what_is_said_of_an_image_is_said_once(tmp_path):
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "a.txt").write_text("a cat")
    data = training(tmp_path)
    for expected in (["1 image has several frames, of which the first is used: "], []):
        data.image(0)
        assert [line.partition(str(tmp_path))[0] for line in data.notes.lines(new=True)] == expected
