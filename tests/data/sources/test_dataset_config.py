"""kohya's dataset_config: which level wins, where folders are looked for, and TOMLs that are wrong."""

from __future__ import annotations

import logging
import os

import pytest

from ldm.data.sources import read
from ldm.data.sources.rows import LEFT_FOLDERS, ReadOptions
from ldm.errors import UserError
from tests.data.sources import layouts
from tests.data.sources.layouts import image_bytes


@pytest.fixture
def folder(tmp_path):
    """Folders dogs (a.png with a caption, b.png without), class, and masks beside config.toml."""
    for name in ("dogs/a.png", "dogs/b.png", "class/c.png", "masks/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(image_bytes(0))
    (tmp_path / "dogs/a.txt").write_text("a dog")
    return tmp_path


def write(folder, text):
    (folder / "config.toml").write_text(text, encoding="utf-8")
    return folder / "config.toml"


def subset(lines="", dataset="", general="", image_dir="dogs"):
    image = f"image_dir = '{image_dir}'" if image_dir else ""
    return f"{general}\n[[datasets]]\n{dataset}\n[[datasets.subsets]]\n{image}\nclass_tokens = 'dog'\n{lines}\n"


def refusal(path, **options):
    with pytest.raises(UserError) as caught:
        read(path, ReadOptions(**options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


WHOLE = """
[general]
shuffle_caption = true
keep_tokens = 1
caption_extension = '.txt'
resolution = 512
flip_aug = false

[[datasets]]
resolution = [768, 512]
batch_size = 2
enable_bucket = true
keep_tokens = 2
validation_split = 0.1

  [[datasets.subsets]]
  image_dir = 'dogs'
  num_repeats = 10
  class_tokens = 'sks dog'
  keep_tokens = 3
  caption_dropout_rate = 0.05
  conditioning_data_dir = 'masks'

  [[datasets.subsets]]
  image_dir = 'class'
  is_reg = true
  class_tokens = 'dog'
  token_warmup_step = 1

[[datasets]]
batch_size = 4

  [[datasets.subsets]]
  image_dir = 'dogs'
  class_tokens = 'dog'
"""


def test_the_innermost_level_wins(folder, caplog):
    with caplog.at_level(logging.INFO, "ldm"):
        listing = read(write(folder, WHOLE))
    common = {"shuffle_caption": True, "random_flip": False}
    first = {**common, "resolution": [768, 512], "batch_size": 2, "enable_bucket": True, "validation_split": 0.1}
    assert [subset.settings for subset in listing.subsets] == [
        {**first, "keep_tokens": 3, "caption_dropout": 0.05, "conditioning_data_dir": f"{folder}/masks"},
        {**first, "keep_tokens": 2, "token_warmup_step": 1.0},
        {**common, "resolution": [512, 512], "keep_tokens": 1, "batch_size": 4},
    ]
    assert [(one.dataset, one.num_repeats, one.is_reg, one.class_tokens) for one in listing.subsets] == [
        (0, 10, False, "sks dog"), (0, 1, True, "dog"), (1, 1, False, "dog"),
    ]  # fmt: skip
    assert [(row.subset, listing.name(row), row.caption) for row in listing.rows] == [
        (0, "a.png", "a dog"), (0, "b.png", "sks dog"), (1, "c.png", "dog"), (2, "a.png", "a dog"), (2, "b.png", "dog"),
    ]  # fmt: skip

    assert f"{folder}/dogs: 2 images, repeated 10 times" in caplog.text
    assert f"{folder}/class: 1 images, repeated 1 times, class images" in caplog.text


def test_what_no_level_gives_is_that_of_the_training(folder):
    path = write(folder, subset())
    [one] = read(path, ReadOptions(num_repeats=3, caption_extension=".caption")).subsets
    assert one.num_repeats == 3 and one.settings == {}
    assert {row.caption for row in read(path, ReadOptions(caption_extension=".caption")).rows} == {"dog"}


def test_folders_are_relative_to_the_current_one_or_else_to_the_toml(folder, tmp_path_factory, monkeypatch):
    path = write(folder, subset())
    assert read(path).subsets[0].folder == f"{folder}/dogs"
    other = tmp_path_factory.mktemp("other")
    monkeypatch.chdir(other)
    assert read(path).subsets[0].folder == f"{folder}/dogs"
    layouts.write_images(other, {"dogs/x.png": ""})
    listing = read(path)
    assert [row.image for row in listing.rows] == ["dogs/x.png"]
    monkeypatch.setenv("DATA", str(folder))
    assert read(write(folder, subset(image_dir="$DATA/dogs"))).subsets[0].folder == f"{folder}/dogs"


def test_folders_below_an_image_dir_are_not_read_as_by_kohya(folder):
    os.rename(folder / "class", folder / "dogs" / "class")
    listing = read(write(folder, subset()))
    assert len(listing.rows) == 2 and listing.counts[LEFT_FOLDERS] == 1


def test_an_image_dir_that_holds_its_own_masks_is_refused(folder):
    message = refusal(write(folder, subset("conditioning_data_dir = 'dogs'")))
    assert "datasets[0].subsets[0].image_dir" in message and "is the folder of the masks" in message


@pytest.mark.parametrize("writer", [layouts.image_text_csv, layouts.jsonl, layouts.tar_shards])
def test_an_image_dir_may_have_another_layout(folder, caplog, writer):
    writer(folder / "more")
    for name in ("c", "d"):
        (folder / "more" / f"{name}.png").write_bytes(image_bytes(0))
        (folder / "more" / f"{name}.txt").write_text("ignored")
    listing = read(write(folder, subset("num_repeats = 2\nflip_aug = true", image_dir="more")))
    assert [row.caption for row in listing.rows] == list(layouts.CAPTIONS.values())
    assert listing.subsets[0].num_repeats == 2 and listing.subsets[0].settings == {"random_flip": True}
    assert "the caption files beside its images are ignored" in caplog.text


@pytest.mark.parametrize("name", ["meta_cap.json", "metadata.jsonl", "metadata.csv"])
def test_a_metadata_file_names_images_below_image_dir_or_beside_it(folder, name):
    writer = {
        "meta_cap.json": layouts.kohya_json,
        "metadata.jsonl": layouts.jsonl,
        "metadata.csv": layouts.imagefolder_csv,
    }
    os.rename(writer[name](folder / "more") / name, folder / name)
    lines = f"metadata_file = '{name}'\nimage_dir = 'more'\n"
    listing = read(write(folder, subset(lines, image_dir="")))
    assert [row.caption for row in listing.rows] == list(layouts.CAPTIONS.values())
    os.rename(folder / name, folder / "more" / name)
    listing = read(write(folder, subset(f"metadata_file = 'more/{name}'", image_dir="")))
    assert [row.caption for row in listing.rows] == list(layouts.CAPTIONS.values())


def test_tags_are_joined_by_the_separator(folder):
    (folder / "m.json").write_text('{"a": {"caption": "x", "tags": "y"}}')
    listing = read(write(folder, subset("metadata_file = 'm.json'\ncaption_separator = ';'")))
    assert listing.rows[0].caption == "x; y" and listing.subsets[0].settings == {"caption_separator": ";"}


@pytest.mark.parametrize("line", ["color_aug = false", "cache_info = true", "network_multiplier = 1.0"])
def test_settings_of_kohyas_that_ask_for_nothing_are_ignored_in_the_log(folder, caplog, line):
    with caplog.at_level(logging.INFO, "ldm"):
        assert read(write(folder, subset(general=f"[general]\n{line}"))).subsets[0].settings == {}
    assert f"general.{line.split()[0]} has no effect" in caplog.text


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "has no [[datasets]]: add one"),
        ("[general]\nnum_repeats = 2\n", "has no [[datasets]]: add one"),
        ("[[datasets]]\nresolution = 512\n", "datasets[0] has no [[datasets.subsets]]: add one"),
        ("[[datasets]]\nsubsets = []\n", "datasets[0] has no [[datasets.subsets]]: add one"),
        ("datasets = 5\n", "datasets must be tables: begin each with a line [[datasets]]"),
        ("[datasets]\nresolution = 512\n", "datasets must be tables"),
        ("[[datasets]]\nsubsets = ['dogs']\n", "datasets[0].subsets must be tables"),
        ("general = 5\n" + subset(), "general must be a table: begin it with a line [general]"),
        ("[[datasets]]\n[[datasets.subsets]]\nnum_repeats = 2", "subsets[0] has no image_dir: give the folder"),
        ("a = 1\n", 'unknown setting "a": did you mean "'),
        ("[[dataset]]\n", 'unknown setting "dataset": did you mean "datasets"?'),
        (subset("num_repeat = 2"), 'unknown setting "datasets[0].subsets[0].num_repeat": did you mean "num_repeats"?'),
        ("[[datasets]]\n[[datasets.subset]]\nimage_dir='dogs'",
         'unknown setting "datasets[0].subset": did you mean "subsets"?'),
        (subset(dataset="resolutoin = 5"), 'unknown setting "datasets[0].resolutoin": did you mean "resolution"?'),
        (subset(general="[general]\nshufle_caption = true"), 'unknown setting "general.shufle_caption": did you mean'),
        (subset("resolution = 512"), "subsets[0].resolution belongs to [[datasets]] or [general]: move it there"),
        (subset(dataset="image_dir = 'x'"), "datasets[0].image_dir belongs to [[datasets.subsets]]: move it there"),
        (subset(general="[general]\nis_reg = true"), "general.is_reg belongs to [[datasets.subsets]]"),
        (subset("color_aug = true"), "subsets[0].color_aug is not supported: remove it"),
        (subset("face_crop_aug_range = [1.0, 2.0]"), "face_crop_aug_range is not supported"),
        (subset("num_repeats = '2'"), 'subsets[0].num_repeats: "2" is a text, not a whole number'),
        (subset("num_repeats = 2.5"), "num_repeats: 2.5 is not a whole number"),
        (subset("num_repeats = true"), "num_repeats: True is not a whole number"),
        (subset("num_repeats = 0"), "num_repeats: 0 is not allowed: at least 1"),
        (subset("num_repeats = 2024-01-01"), "num_repeats: 2024-01-01 is not a whole number"),
        (subset("flip_aug = 1"), "flip_aug: 1 is not True or False"),
        (subset("flip_aug = 'true'"), 'flip_aug: "true" is a text, not True or False'),
        (subset("caption_dropout_rate = 1.5"), "caption_dropout_rate: 1.5 is not allowed: at least 0, at most 1"),
        (subset("caption_dropout_rate = nan"), "caption_dropout_rate: nan is not"),
        (subset("caption_prefix = 5"), "caption_prefix: 5 is read as a int; put the text in quotes"),
        (subset("caption_prefix = ['x']"), "caption_prefix: ['x'] is not a text"),
        (subset("keep_tokens = -1"), "keep_tokens: -1 is not allowed"),
        (subset("conditioning_data_dir = ''"), "conditioning_data_dir"),
        (subset(dataset="resolution = '512,512'"), "resolution: \"512,512\" is not"),
        (subset(dataset="resolution = [512]"), "resolution: 1 values given, wanted 2"),
        (subset(dataset="resolution = [512, 512, 512]"), "resolution: 3 values given, wanted 2"),
        (subset(dataset="resolution = [512, 'x']"), "resolution: \"x\" is not a whole number"),
        (subset(dataset="resolution = 4"), "resolution: 4 is not allowed"),
        (subset(dataset="batch_size = 0"), "batch_size: 0 is not allowed"),
        (subset(dataset="min_bucket_reso = 512\nmax_bucket_reso = 256"),
         "min_bucket_reso 512 is above max_bucket_reso 256"),
        (subset("num_repeats = 1\nnum_repeats = 2"), "is not valid TOML"),
        (subset("num_repeats = "), "is not valid TOML"),
        ("[[datasets]\n", "is not valid TOML"),
        ("x = " + "[" * 5000, "is not valid TOML"),
        ("x = " + "1" * 5000, "is not valid TOML"),
        (subset(image_dir="gone"), "image_dir gone does not exist"),
        (subset(image_dir="config.toml"), "image_dir"),
        (subset("metadata_file = 'gone.json'"), "metadata_file gone.json does not exist"),
        (subset("metadata_file = 'dogs/a.txt'"), "a.txt is no .json, .jsonl, .csv, .parquet file"),
        (subset("conditioning_data_dir = 'gone'"), "conditioning_data_dir gone does not exist"),
        (subset("conditioning_data_dir = 'dogs/a.txt'"), "is a file: give the folder with the masks"),
    ],
)  # fmt: skip
def test_a_toml_that_is_wrong_is_refused_with_the_place(folder, text, fault):
    message = refusal(write(folder, text))
    assert message.startswith(f"{folder}/config.toml") and fault in message


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (subset("class_tokens_ = 'ä'").encode("latin-1"), "not a UTF-8 text file"),
        (subset().encode("utf-16"), "is UTF-16"),
        (b"#" * 2_000_000, "at most 1,048,576 are read"),
    ],
)
def test_a_file_that_is_no_text_is_refused(folder, content, fault):
    (folder / "config.toml").write_bytes(content)
    assert fault in refusal(folder / "config.toml")


def test_a_subset_without_captions_is_refused(folder):
    text = "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'class'\n"
    assert "1 images and no caption" in refusal(write(folder, text))
    assert read(write(folder, text), ReadOptions(class_tokens="dog")).rows[0].caption == "dog"
