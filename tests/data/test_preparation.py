"""The data of a run is read, checked and divided as its settings and data sets say."""

import logging

import numpy as np
import pytest

from ldm.data.preparation import prepare_data, read_listing
from ldm.data.sources.row_file import RowFile
from ldm.errors import UserError
from ldm.settings.train import TrainSettings
from ldm.tokenizer import Tokenizer
from tests.data.prepared_data import BUCKETS, MICRO, RNG, names, training, write, write_shards


@pytest.mark.parametrize(
    ("folders", "repeated"),
    [({"1_cat": 2}, [1, 1]), ({"1_cat": 2, "3_dog": 1}, [1, 1, 3])],
)
def test_kohyas_folders_are_repeated(tmp_path, folders, repeated):
    for name, count in folders.items():
        write(tmp_path / name, [(16, 16)] * count)
    data = training(tmp_path)
    assert data.buckets.repeats.tolist() == repeated and data.fills_batches == (max(repeated) > 1)


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


def test_images_keep_their_shape_with_buckets_and_the_log_says_what_is_cropped(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    data = training(write(tmp_path, [(40, 40), (90, 30), (30, 90), (91, 30)]), **BUCKETS)
    assert [data.image(row).shape[1:] for row in range(4)] == [(16, 16), (8, 24), (24, 8), (8, 24)]
    assert "4 images in 3 buckets: 3 graphs are compiled" in caplog.text and "cropped away" in caplog.text


def test_without_buckets_nothing_is_said_of_them(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    data = training(write(tmp_path, [(40, 40), (60, 30)]))
    assert len(data.buckets.sizes) == 1 and "compiled" not in caplog.text


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
