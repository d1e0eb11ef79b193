"""tools/data/inspect_data.py: what it says is what training sees, and it draws the images as they are trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data.batches import BatchOrder
from ldm.data.checked_images import image_content
from ldm.data.preparation import prepare_data, read_listing
from ldm.data.sources.rows import FilePart
from ldm.errors import UserError
from ldm.settings.model import load_model_config
from ldm.settings.train import TrainSettings
from tests.conftest import ROOT
from tests.data.sources.layouts import CAPTIONS, NEED_PYARROW, WRITERS, image_bytes
from tools.data.contact_sheet import GAP, HEADER, SIDE, as_image, choose_rows, draw_page
from tools.data.duplicates import find_duplicates
from tools.data.images import content_numbers
from tools.data.inspect_data import main

NANO = ("--model_config", str(ROOT / "configs" / "nano.yaml"))
# A tag is a word and one or two digits, a token each: 40 tags and 39 commas have 149 tokens.
LONG = ", ".join(f"tag{number}" for number in range(40))


def write(folder: Path, captions: dict[str, str], sizes: dict[str, tuple[int, int]] | None = None) -> Path:
    """Write a data set of images with caption files. Images are 80 x 80 or have the size in `sizes`."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, caption) in enumerate(captions.items()):
        width, height = (sizes or {}).get(name, (80, 80))
        noise = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / name)
        (folder / name).with_suffix(".txt").write_text(caption, encoding="utf-8")
    return folder


def report(capsys, tmp_path: Path, *flags: object) -> tuple[dict, str]:
    """Run the tool with the nano model and return its JSON and what it prints."""
    output = tmp_path / "report"
    main([*NANO, "--output_path", str(output), *map(str, flags)])
    return json.loads((output / "inspect_data.json").read_text(encoding="utf-8")), capsys.readouterr().out


CASES = [(layout, writer) for layout, writers in WRITERS.items() for writer in writers]


@pytest.mark.parametrize(("layout", "writer"), CASES, ids=[f"{name}-{writer.__name__}" for name, writer in CASES])
def test_every_layout_gives_the_same_report(tmp_path, capsys, layout, writer):
    if writer in NEED_PYARROW:
        pytest.importorskip("pyarrow")
    found, text = report(capsys, tmp_path, "--data_path", writer(tmp_path / "data"), "--train_batch_size", 2)
    assert found["data_set"]["layout"] == layout and f"read as         {layout}: " in text
    assert found["rows"]["found"] == found["rows"]["trained"] == len(CAPTIONS) and found["rows"]["left_out"] == 0
    # "two\nlines" is one text in img_txt.csv, as it always was. Elsewhere the first line counts.
    lines = "two lines" if layout == "image_text_csv" else "two"
    assert [cell["caption"] for cell in found["sheet"]] == [
        lines if caption == "two\nlines" else caption for caption in CAPTIONS.values()
    ]
    assert found["images"]["median"] == [8, 8] and found["images"]["enlarged"] == 4
    assert found["training"]["batches"] == 2 and found["buckets"]["graphs"] == 1
    assert (tmp_path / "report" / "contact_sheet_1.png").is_file()


@pytest.fixture
def small(tmp_path):
    """A data set whose figures are known: 8 images that are trained."""
    captions = {
        "a.png": "Cat, red",
        "b.png": "cat, blue",
        "c.png": "cat, blue",
        "d.png": LONG,
        "e.png": "",
        "f.png": "dog,  RED , cat",
        "g.png": "a wide one, red",
    }
    folder = write(tmp_path / "data", captions, {"g.png": (160, 40), "f.png": (40, 40)})
    (folder / "A (1).png").write_bytes((folder / "a.png").read_bytes())  # the same image with another caption
    (folder / "A (1).txt").write_text("another, cat")
    for name in ("h", "i", "j", "k"):  # so that one broken image is not too many
        (folder / f"{name}.png").write_bytes(image_bytes(ord(name)))
        (folder / f"{name}.txt").write_text(f"image {name}")
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "broken.txt").write_text("x")
    (folder / "k.txt").unlink()
    return folder


def test_the_figures_are_those_of_the_data_set(small, tmp_path, capsys):
    found, text = report(capsys, tmp_path, "--data_path", small, "--train_batch_size", 5)
    assert found["rows"]["found"] == 13 and found["rows"]["trained"] == 12
    [[name, reason]] = found["rows"]["left_out_rows"]
    assert name == "broken.png" and "is no image in a known format" in reason
    assert f"broken.png: {reason}" in text

    captions = found["captions"]
    assert (captions["missing"], captions["empty_in_files"], captions["empty"]) == (1, 1, 2)
    assert captions["repeated_captions"] == {"cat, blue": 2}
    assert captions["cut"] == 1 and captions["cut_captions"][0]["name"] == "d.png"
    assert captions["cut_captions"][0]["lost"].replace(" ", "").endswith("tag38,tag39")
    assert captions["shortest"] == 0 and captions["longest"] == 149

    tags = found["tags"]["captions_with"]
    assert tags["cat"] == 5 and tags["red"] == 3 and tags["blue"] == 2 and tags["dog"] == 1

    duplicates = found["duplicates"]
    assert duplicates["same_content_names"] == [["A (1).png", "a.png"]]
    assert duplicates["different_captions_of"] == {"A (1).png": ["another, cat", "Cat, red"]}
    assert duplicates["similar_names_of"] == [["A (1).png", "a.png"]]

    assert found["images"]["smallest"] == [8, 8] and found["images"]["largest"] == [160, 40]
    assert found["images"]["enlarged"] == 6 and found["images"]["most_enlarged"] == 8.0
    assert "enlarged        6 of 12, at most 8.0 times (h.png)" in text

    assert found["buckets"]["graphs"] == 1
    [bucket] = found["buckets"]["buckets"]
    assert bucket["worst_image"] == "g.png" and bucket["worst_crop"] == pytest.approx(0.75)
    training = found["training"]
    assert (training["samples"], training["batches"], training["left_out"]) == (12, 2, 2)
    assert (training["steps_per_epoch"], training["steps"]) == (2, 20)


def test_words_are_counted_where_captions_have_no_tags(tmp_path, capsys):
    data = write(tmp_path / "data", {"a.png": "a red cat", "b.png": "A cat's red hat", "c.png": "one, two"})
    found, text = report(capsys, tmp_path, "--data_path", data, "--train_batch_size", 1)
    assert found["words"]["captions_with"] == {
        "a": 2, "red": 2, "cat": 1, "cat's": 1, "hat": 1, "one": 1, "two": 1
    }  # fmt: skip
    assert "tags" not in found and "\nwords\n" in text


def test_buckets_repeats_and_subsets_are_those_of_a_training(tmp_path, capsys):
    data = tmp_path / "data"
    write(data / "2_cat", {"a.png": "a", "b.png": "b", "c.png": "c"}, {"a.png": (96, 64), "b.png": (64, 96)})
    write(data / "1_dog", {"d.png": "d"}, {"d.png": (128, 60)})
    buckets = ("--enable_bucket", "--min_bucket_reso", 32, "--bucket_reso_steps", 16, "--train_batch_size", 2)
    found, text = report(capsys, tmp_path, "--data_path", data, *buckets)

    settings = TrainSettings(
        data_path=str(data), enable_bucket=True, min_bucket_reso=32, bucket_reso_steps=16, train_batch_size=2
    )
    trained, _ = prepare_data(read_listing(settings), settings, load_model_config(ROOT / "configs" / "nano.yaml"))
    order = BatchOrder(
        len(trained), 2, settings.seed, of_row=trained.buckets.of_row, repeats=trained.buckets.repeats, fill=True
    )
    assert found["training"]["batches"] == order.steps_per_epoch == 4
    assert found["training"]["samples"] == 7 and found["training"]["filled"] == 1
    assert [(bucket["width"], bucket["height"]) for bucket in found["buckets"]["buckets"]] == trained.buckets.sizes
    for line in trained.buckets.report(lambda row: "1_dog/d.png"):  # which is the worst
        assert line.strip() in text
    assert [(subset["images"], subset["repeats"]) for subset in found["data_set"]["subsets"]] == [(1, 1), (3, 2)]
    # (mean, log variance) of 4 latent channels, or how many nano has, of each image in fp32, with 88 bytes of a record
    config = load_model_config(ROOT / "configs" / "nano.yaml")
    pixels = sum(width * height for width, height in map(trained.buckets.size, range(4)))
    values = config.moment_channels * pixels // config.vae_factor**2
    assert found["cache_on_disk"]["latents_bytes"] == values * 4 + 4 * 88
    assert found["cache_on_disk"]["texts_bytes"] == 5 * (77 * config.context_dim * 4 + 88)


def test_validation_is_counted_and_images_that_are_in_both_are_found(tmp_path, capsys):
    data = write(tmp_path / "data", {f"{number}.png": str(number) for number in range(8)})
    found, text = report(capsys, tmp_path, "--data_path", data, "--validation_split", 0.25, "--train_batch_size", 1)
    assert found["rows"]["validation"] == 2 and found["rows"]["trained"] == 6
    assert found["duplicates"]["trained_and_validated"] == 0 and "2 are held out" in text
    found, text = report(capsys, tmp_path, "--data_path", data, "--validation_data_path", data)
    assert found["rows"]["trained"] == found["rows"]["validation"] == 8
    assert found["duplicates"]["trained_and_validated"] == 8


def test_class_images_are_counted_with_those_that_will_be_drawn(tmp_path, capsys):
    data = write(tmp_path / "data", {"a.png": "x", "b.png": "y"})
    write(tmp_path / "class", {f"{number}.png": "" for number in range(3)})
    flags = (
        "--data_path", data, "--with_prior_preservation", "--instance_prompt", "a sks cat", "--class_prompt", "a cat",
        "--class_data_dir", tmp_path / "class", "--train_batch_size", 1,
    )  # fmt: skip
    before = sorted((tmp_path / "class").iterdir())
    found, text = report(capsys, tmp_path, *flags, "--num_class_images", 3)
    assert found["rows"]["class_images"] == 2 and found["rows"]["class_images_not_used"] == 1
    assert "an epoch has 2 samples of 2 instance images and 2 of 2 class images" in text
    assert "1 of 3 class images are not used in any epoch, from 2.png on" in text
    assert found["captions"]["repeated_captions"] == {"a sks cat": 2}
    found, text = report(capsys, tmp_path, *flags, "--num_class_images", 10, "--num_repeats", 4)
    assert found["rows"]["class_images_missing"] == 7
    assert "an epoch has 8 samples of 2 instance images and 8 of 8 class images" in text
    assert found["training"]["samples"] == found["training"]["batches"] == 16
    assert "16 an epoch, 10 images with their repeats, with the missing class images" in text
    assert sorted((tmp_path / "class").iterdir()) == before


def test_without_decoding_images_broken_ones_and_duplicates_are_found_all_the_same(small, tmp_path, capsys):
    found, text = report(capsys, tmp_path, "--data_path", small, "--check_images", False)
    assert found["images"]["decoded"] is False and found["rows"]["trained"] == 13
    assert found["images"]["broken"] == 1 and "broken.png: the image is no image in a known format" in text
    assert found["duplicates"]["same_content_names"] == [["A (1).png", "a.png"]]
    assert [cell["name"] for cell in found["sheet"]][-8:].count("broken.png") == 1


def test_notes_of_images_are_those_of_training(tmp_path, capsys):
    data = write(tmp_path / "data", {"a.png": "a"})
    frames = [Image.new("L", (16, 16), color) for color in (0, 255)]
    frames[0].save(data / "b.gif", save_all=True, append_images=frames[1:])
    (data / "b.txt").write_text("b")
    found, text = report(capsys, tmp_path, "--data_path", data, "--train_batch_size", 1)
    [note] = found["images"]["notes"]
    assert note.startswith("1 image has several frames, of which the first is used") and note in text


def test_images_that_are_too_small_are_left_out_with_the_reason(tmp_path, capsys):
    data = write(tmp_path / "data", {"a.png": "a", "b.png": "b"}, {"b.png": (90, 70)})
    flags = ("--data_path", data, "--image_filter_size", 75, "--train_batch_size", 1)
    for more in ((), ("--check_images", False)):
        found, text = report(capsys, tmp_path, *flags, *more)
        assert found["rows"]["left_out_rows"] == [["b.png", "a side is shorter than image_filter_size 75"]]
        assert found["rows"]["trained"] == 1


def test_masks_are_counted_and_tinted(tmp_path, capsys):
    data = write(tmp_path / "data", {"a.png": "a", "b.png": "b"})
    (tmp_path / "masks").mkdir()
    mask = np.zeros((80, 80), np.uint8)
    mask[:, :40] = 255
    Image.fromarray(mask).save(tmp_path / "masks" / "a.png")
    found, text = report(
        capsys, tmp_path, "--data_path", data, "--masked_loss", "--conditioning_data_dir", tmp_path / "masks",
        "--train_batch_size", 1,
    )  # fmt: skip
    assert found["masks"] == {"read": 2, "found": 1, "mean_cover": 0.5}
    side = 64 // load_model_config(ROOT / "configs" / "nano.yaml").vae_factor
    assert found["cache_on_disk"]["masks_bytes"] == side * side * 4 + 88
    assert "masks: 1 of 2 images have one, which show 50.0% of them on average" in text
    pixels = np.ones((3, 2, 2), np.float32)
    tinted = np.asarray(as_image(pixels, np.array([[1.0, 0.0], [1.0, 0.0]])))
    assert (tinted[:, 0] == 255).all() and (tinted[:, 1, 0] > tinted[:, 1, 1] + 50).all()
    sheet = np.asarray(Image.open(tmp_path / "report" / "contact_sheet_1.png")).astype(float)
    cell = sheet[HEADER : HEADER + SIDE, GAP : GAP + SIDE]
    red = cell[..., 0] - cell[..., 1]
    assert abs(red[:, : SIDE // 2].mean()) < 5 and red[:, SIDE // 2 :].mean() > 50


def test_the_sheet_shows_the_images_as_they_are_trained(tmp_path, capsys):
    data = write(tmp_path / "data", {"a.png": "a", "b.png": "b"}, {"a.png": (96, 64), "b.png": (64, 64)})
    report(capsys, tmp_path, "--data_path", data, "--train_batch_size", 1)
    settings = TrainSettings(data_path=str(data), train_batch_size=1)
    trained, _ = prepare_data(read_listing(settings), settings, load_model_config(ROOT / "configs" / "nano.yaml"))
    sheet = np.asarray(Image.open(tmp_path / "report" / "contact_sheet_1.png"))
    for row in (0, 1):
        left = GAP + row * (SIDE + GAP)
        cell = sheet[HEADER : HEADER + SIDE, left : left + SIDE]
        expected = np.rint((trained.image(row).transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8)
        assert (cell[::4, ::4] == expected).all()  # 64 pixels are shown as 256


def test_the_worst_crops_and_the_cut_captions_come_first():
    cropped = np.zeros(100)
    cropped[[7, 30, 50, 60]] = (0.2, 0.5, 0.05, 0.3)
    choices = choose_rows(cropped, [2, 7, 90], 12)
    assert [choice.row for choice in choices[:3]] == [30, 60, 7]
    assert {choice.why for choice in choices[:3]} == {"worst crop"}
    assert [choice.row for choice in choices[3:5]] == [2, 90] and choices[3].why == "cut caption"
    rest = [choice.row for choice in choices[5:]]
    assert len(rest) == 7 and rest == sorted(rest) and rest[0] == 0 and rest[-1] == 99
    assert len({choice.row for choice in choices}) == 12
    assert [choice.row for choice in choose_rows(np.zeros(3), [], 12)] == [0, 1, 2]
    assert choose_rows(np.ones(3), [1], 0) == []


def test_pages_of_an_earlier_report_are_replaced(tmp_path, capsys):
    data = write(tmp_path / "data", {f"{number:02}.png": str(number) for number in range(26)})
    pages = [tmp_path / "report" / f"contact_sheet_{number}.png" for number in (1, 2)]
    report(capsys, tmp_path, "--data_path", data)
    assert [page.is_file() for page in pages] == [True, True]
    found, text = report(capsys, tmp_path, "--data_path", data, "--sheet_images", 1)
    assert [page.is_file() for page in pages] == [True, False] and len(found["sheet"]) == 1
    found, text = report(capsys, tmp_path, "--data_path", data, "--sheet_images", 0)
    assert [page.is_file() for page in pages] == [False, False] and found["sheet"] == []


def test_any_caption_and_name_can_be_drawn(tmp_path):
    from tools.data.contact_sheet import Cell

    image = np.zeros((1, 8, 300), np.float32)  # grey, and wider than its place
    texts = ["猫が好き" * 60, "кот 😀 \n\t\x07", "\ud800\udcff", "x" * 3000, "", "مرحبا بالعالم", "a\u0300" * 40]
    cells = [Cell(image, text, text, text, [text]) for text in texts] + [Cell(None, "a", "b", "c", ["d"])]
    draw_page(cells, texts[0], tmp_path / "page.png")
    assert Image.open(tmp_path / "page.png").width == GAP + 6 * (SIDE + GAP)


def test_equal_files_are_found_by_their_bytes(tmp_path):
    contents = [b"a" * 9000, b"b" + b"a" * 8999, b"a" * 9000, b"a" * 8999 + b"b", b"c", b"a" * 9000]
    paths = [str(tmp_path / str(number)) for number in range(len(contents))]
    for path, content in zip(paths[:-1], contents):
        Path(path).write_bytes(content)
    os.link(paths[0], paths[-1])
    (tmp_path / "shard").write_bytes(b"xyz" + contents[0] + contents[1])
    parts = [FilePart(str(tmp_path / "shard"), 3, 9000, "p"), FilePart(str(tmp_path / "shard"), 9003, 9000, "q")]
    assert content_numbers([*paths, *parts]).tolist() == [0, 1, 0, 2, 3, 0, 0, 1]
    assert content_numbers(paths, [image_content(path) for path in paths]).tolist() == [0, 1, 0, 2, 3, 0]
    assert content_numbers([*paths, str(tmp_path / "gone")]).tolist() == [0, 1, 0, 2, 3, 0, 4]


def test_names_that_differ_in_case_gaps_suffix_or_a_copys_number_are_similar():
    names = [
        "cat.png", "Cat.jpg", "cat (1).png", "cat copy 2.png", "cat - Copy (3).png", "cat_1.png", "cat_2.png",
        "b/cat.png", "big  dog.png", "big_dog.png", "copy.png", "cat1.png",
    ]  # fmt: skip
    found = find_duplicates(names, np.arange(len(names)), [""] * len(names))
    assert found.similar_names == [names[:5], ["big  dog.png", "big_dog.png"]]
    assert found.same_content == [] and found.other_captions == []


def test_the_yaml_of_a_training_is_taken_and_its_output_path_is_left_alone(tmp_path, capsys):
    data = write(tmp_path / "data", {"a.png": "a", "b.png": "b", "c.png": "c"})
    recipe = (ROOT / "configs" / "train" / "train_config_lora_nano.yaml").read_text()
    (tmp_path / "train.yaml").write_text(f"{recipe}\noutput_path: {tmp_path}/run\ndata_path: {data}\n")
    flags = ("--train_config", tmp_path / "train.yaml", "--train_batch_size", 2, "--lora_rank", 2)
    found, text = report(capsys, tmp_path, *flags)
    assert found["rows"]["trained"] == 3 and found["training"]["steps"] == 500
    assert not (tmp_path / "run").exists()


def test_names_that_are_no_text_and_names_in_several_folders(tmp_path, capsys):
    data = tmp_path / "data"
    for folder in ("1_a", "1_b"):
        write(data / folder, {"1.png": "x"})
    (data / "1_b" / os.fsdecode(b"\xb7.png")).write_bytes((data / "1_b" / "1.png").read_bytes())
    found, text = report(capsys, tmp_path, "--data_path", data, "--train_batch_size", 1)
    assert sorted(found["duplicates"]["same_content_names"][0])[:2] == ["1_a/1.png", "1_b/1.png"]
    assert "1_a/1.png, 1_b/1.png, 1_b/\\xb7.png" in text


def test_a_training_that_would_not_begin_is_reported_with_the_reason(tmp_path, capsys):
    data = write(tmp_path / "data", {"a.png": "a"})
    found, text = report(capsys, tmp_path, "--data_path", data, "--train_batch_size", 4)
    assert found["training"]["batches"] == 0
    assert "none: the data set has 1 usable rows, too few for one batch of 4" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--data_path is missing"),
        (("--data_path", "nowhere"), "nowhere does not exist"),
        (("--data_path", "empty"), "is no data set"),
        (("--data_path", "data", "--output_path", "data/report"), "is in data_path: the contact sheet would become"),
        (("--data_path", "data", "--image_size", "65"), "image_size 65 must be a multiple of"),
        (("--data_path", "data", "--sheet_image", "3"), "unknown setting --sheet_image"),
        (("--data_path", "data", "--sheet_images", "-1"), "sheet_images: -1 is not allowed"),
        (("--data_path", "data", "--enable_bucket", "--bucket_reso_steps", "24"), "bucket_reso_steps is 24"),
        (("--data_path", "data", "--alpha_color", "nothing"), '"nothing" is no colour'),
        (("--data_path", "data", "--train_config", "none.yaml"), "none.yaml"),
        (("--data_path", "data", "--masked_loss", "--conditioning_data_dir", "gone"), "gone"),
        (("--data_path", "data", "--with_prior_preservation"), "with_prior_preservation needs class_prompt"),
        (
            (
                "--data_path",
                "data",
                "--with_prior_preservation",
                "--class_prompt",
                "a",
                "--class_data_dir",
                "data/class",
            ),
            "give a class_data_dir outside of data_path",
        ),
    ],
)
def test_mistakes_are_errors_that_name_the_setting(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data", {"a.png": "a", "b.png": "b"})
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        main([*NANO, *flags])
    assert message in str(caught.value)
    assert not list(tmp_path.rglob("inspect_data.json")) and not list(tmp_path.rglob("contact_sheet*"))
    assert not (tmp_path / "data" / "report").exists()


def test_as_a_script_from_anywhere_without_mindspore(tmp_path):
    write(tmp_path / "data", {"a.png": "a", "b.png": "b"})
    # A finder that refuses MindSpore, before the script runs.
    code = (
        "import sys, runpy; sys.modules['mindspore'] = None; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    script = str(ROOT / "tools" / "data" / "inspect_data.py")

    def run(*flags: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-c", code, script, *flags], cwd=tmp_path, capture_output=True, text=True, timeout=300
        )

    done = run("--data_path", "data")
    assert done.returncode == 0, done.stderr
    assert "configs/v1-inference.yaml, as neither model_config nor a base model is given" in done.stdout
    assert done.stdout.endswith("written to output/inspect_data: contact_sheet_1.png, inspect_data.json\n")
    done = run("--data_path", "nowhere")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: data_path nowhere")
    done = run("-h")
    assert done.returncode == 0 and "--sheet_images" in done.stdout and "--caption_prefix" in done.stdout
    assert "--lora_rank" not in done.stdout
