"""Lesson 6 reads kohya's folder, trains, and writes a file that draws the same images."""

from __future__ import annotations

import csv
import shutil

import pytest
import yaml

from examples import kohya_to_a1111
from ldm.errors import UserError
from ldm.files.outputs import claim_file
from ldm.lora import read_lora
from ldm.lora.formats import detect_format
from ldm.weights.checkpoint import open_checkpoint
from tests.conftest import ROOT
from tests.examples.lessons import images, run_lesson

pytestmark = pytest.mark.processes


@pytest.fixture
def kohya(small, tmp_path):
    """A folder in kohya's layout: captions in .txt, in .caption and none, and a folder without repeats."""
    for name, files in (("2_blue things", ["0.png", "1.png"]), ("1_red things", ["2.png"]), ("notes", ["3.png"])):
        (tmp_path / "kohya" / name).mkdir(parents=True)
        for file in files:
            shutil.copy(small.data / file, tmp_path / "kohya" / name)
    (tmp_path / "kohya/2_blue things/0.txt").write_text("\ufeffa blue ball, round\nanother line\n", encoding="utf-8")
    (tmp_path / "kohya/2_blue things/0.caption").write_text("not this one")
    (tmp_path / "kohya/1_red things/2.caption").write_text("a red ball\n")
    return tmp_path / "kohya"


def test_the_csv_has_a_row_for_each_image_and_repeat_with_its_caption_or_the_class_tokens(kohya, capsys):
    kohya_to_a1111.write_csv(kohya)
    with open(kohya / "img_txt.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["dir", "text"],
        ["1_red things/2.png", "a red ball"],
        *2 * [["2_blue things/0.png", "a blue ball, round"]],
        *2 * [["2_blue things/1.png", "blue things"]],
    ]
    printed = capsys.readouterr().out
    assert "notes: left out" in printed and "2_blue things: 2 images x 2 repeats = 4 rows" in printed


def test_a_folder_without_images_is_an_error_that_shows_the_layout(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match="holds no image in a folder such as '10_emoji line art'"):
        kohya_to_a1111.write_csv(tmp_path)
    assert not (tmp_path / "img_txt.csv").exists()


def test_a_folder_with_0_repeats_is_left_out_and_named_in_plain_text(kohya, capsys):
    (kohya / "1_red things").rename(kohya / "0_red\x1bthings")
    kohya_to_a1111.write_csv(kohya)
    assert "2.png" not in (kohya / "img_txt.csv").read_text(encoding="utf-8")
    assert "0_red\\x1bthings: left out" in capsys.readouterr().out


def test_too_many_repeats_and_too_many_rows_are_errors_that_name_the_folder(kohya, monkeypatch):
    (kohya / "1_red things").rename(kohya / "10001_red things")
    with pytest.raises(UserError, match="10001_red things: 10,001 repeats, at most 10,000"):
        kohya_to_a1111.write_csv(kohya)
    (kohya / "10001_red things").rename(kohya / "3_red things")
    monkeypatch.setattr(kohya_to_a1111, "MAX_ROWS", 6)
    with pytest.raises(UserError, match="more than 6 rows, with 1 images x 3 repeats in 3_red things"):
        kohya_to_a1111.write_csv(kohya)
    assert not (kohya / "img_txt.csv").exists()
    monkeypatch.setattr(kohya_to_a1111, "MAX_ROWS", 7)
    kohya_to_a1111.write_csv(kohya)
    assert len((kohya / "img_txt.csv").read_text(encoding="utf-8").splitlines()) == 1 + 7


@pytest.mark.parametrize("name", ["../../x", "/x", "folder/x", "x/", ".", ""])
def test_a_name_with_folders_is_an_error_before_anything_is_written(tmp_path, name):
    with pytest.raises(UserError, match="--name .* is not the name of a file"):
        kohya_to_a1111.main(["--output_path", str(tmp_path / "out"), "--name", name])
    assert not list(tmp_path.iterdir())


def test_a_csv_that_another_run_writes_is_an_error_before_the_training(kohya, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # restored at the end: the lesson changes to the project's folder
    with claim_file(kohya / "img_txt.csv", "--output"), pytest.raises(UserError, match="--kohya_path .*img_txt.csv"):
        kohya_to_a1111.main(["--output_path", "out", "--kohya_path", "kohya"])
    assert not (kohya / "img_txt.csv").exists()


def test_the_bundled_images_become_a_folder_of_kohyas_with_captions(tmp_path):
    kohya_to_a1111.make_kohya_folder(tmp_path / "kohya")
    folder = tmp_path / "kohya" / "10_emoji line art"
    files = sorted(folder.glob("*.png"))
    assert len(files) == kohya_to_a1111.IMAGES and images(*files).any()
    assert all(file.with_suffix(".txt").read_text(encoding="utf-8").strip() for file in files)


def test_the_files_for_a1111_hold_the_lora_and_draw_its_images(small, kohya):
    """With the nano model, because kohya's names belong to known architectures."""
    output, recipe = kohya.parent / "out", kohya.parent / "recipe.yaml"
    settings = yaml.safe_load(small.train_config.read_text(encoding="utf-8"))
    settings.update(model_config="configs/nano.yaml", lora_targets=["to_v"], start_learning_rate=0.01)
    recipe.write_text(yaml.safe_dump(settings), encoding="utf-8")
    nano = small._replace(base_model=ROOT / "models/nano/nano.safetensors", train_config=recipe)
    printed = run_lesson("kohya_to_a1111", nano, output, "--kohya_path", str(kohya), "--prompts", "a red ball")
    full, half = output / "emoji_line_art_fp32.safetensors", output / "emoji_line_art.safetensors"
    assert detect_format(full) == detect_format(half) == "kohya"
    own, converted = (read_lora(path).layers for path in (output / "lora/ckpt/lora.ckpt", full))
    assert own.keys() == converted.keys()
    for name, layer in own.items():
        assert (layer.down == converted[name].down).all() and (layer.up == converted[name].up).all()
    differences = {
        line.split(":")[0].rpartition("/")[2]: int(line.split()[-3])
        for line in printed.splitlines() if "largest difference" in line
    }  # fmt: skip
    base, own_file = (images(output / "images" / f"{name}-0.png") for name in ("base model", "own file"))
    assert (base != own_file).any()  # otherwise, all differences are 0
    assert differences[full.name] == 0 and differences[half.name] <= 2
    checkpoint = open_checkpoint(half)
    assert "  ss_network_dim: 2\n" in printed
    shown = [line.split()[0] for line in printed.splitlines() if line.startswith("  lora_unet_")]
    assert len(shown) == 3 and set(shown) <= set(checkpoint)
