"""Runs of a small model: an image is made again, a killed run ends as one that was not killed, cells are compared."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ldm.errors import UserError
from ldm.generation.a1111_text import parse
from ldm.generation.pipeline import Pipeline
from tests.conftest import ROOT
from tests.training.micro import MICRO
from text_to_image import main

PROMPTS = "a cat\na dog\na fish\na bird\na cow\n"
KILLED = """
import os, signal, sys
from ldm.generation import image_files
write, written = image_files.write_png, []
def write_png(path, image, fields):
    if len(written) == 3:
        path.with_name(f".{path.stem}.{os.getpid()}-0123abcd.partial.png").write_bytes(b"half an image")
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(path)
    write(path, image, fields)
image_files.write_png = write_png
from text_to_image import main
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def model(micro_base_model):
    return [f"--config={MICRO}", f"--ckpt_path={micro_base_model}", "--device_target=CPU", "--sampling_steps=2"]


@pytest.fixture(scope="module")
def flags(model, tmp_path_factory):
    """The command of a run with the batches 0-1, 2-3 and 4."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text(PROMPTS)
    return [*model, f"--data_path={prompts}", "--negative_prompt=blurry, 猫", "--batch_size=2", "--scale=3", "--ddim",
            "--ddim_eta=0.5"]  # fmt: skip


@pytest.fixture(scope="module")
def run(flags, tmp_path_factory):
    """The folder of the run."""
    folder = tmp_path_factory.mktemp("run")
    main([*flags, f"--output_path={folder}"])
    return folder


def files_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_image_is_made_again_bit_for_bit(run, model, tmp_path, caplog):
    for number in (1, 4):
        image = run / "samples" / f"0000{number}.png"
        output = tmp_path / str(number)
        main([*model[:3], f"--from_image={image}", f"--output_path={output}"])
        assert (output / "samples" / "00000.png").read_bytes() == image.read_bytes()
    assert "all its settings and files are the same" in caplog.text


def test_what_is_given_beside_an_image_wins_and_is_listed(run, model, tmp_path, caplog):
    image = run / "samples" / "00001.png"
    main([*model, f"--from_image={image}", "--scale=5", "--prompt=a hat", f"--output_path={tmp_path}"])
    texts = Image.open(tmp_path / "samples" / "00000.png").text
    assert texts["prompt"] == "a hat" and '"scale": 5.0' in texts["settings"] and texts["index"] == "1"
    assert "other than in the image: scale 5.0 (the image: 3.0)" in caplog.text
    assert "other than in the image: prompt a hat (the image: a dog)" in caplog.text


def test_other_programs_find_the_settings_in_an_image(run):
    text = parse(Image.open(run / "samples" / "00003.png").text["parameters"])
    assert (text.prompt, text.negative_prompt) == ("a bird", "blurry, 猫")
    values = dict(text.values)
    assert len(values.pop("Model hash")) == 10
    assert values == {
        "Steps": "2", "Sampler": "DDIM", "CFG scale": "3", "Seed": "42", "Size": "16x16", "Model": "micro",
        "Eta": "0.5", "RNG": "CPU", "Index": "3",
    }  # fmt: skip


def test_a_killed_run_ends_as_one_that_was_not_killed(run, flags, tmp_path, monkeypatch, caplog):
    """It is killed with one image of the second batch, which is made again as a whole."""
    arguments = [*flags, f"--output_path={tmp_path}"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], cwd=ROOT, capture_output=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert sorted(path.name for path in (tmp_path / "samples").glob("[0-9]*.png")) == [f"0000{i}.png" for i in range(3)]
    assert not (tmp_path / "grid.png").exists()
    generated: list[int] = []
    one_batch = Pipeline._generate_batch
    monkeypatch.setattr(
        Pipeline, "_generate_batch", lambda self, batch, *more: generated.append(len(batch.requests)) or
        one_batch(self, batch, *more),
    )  # fmt: skip
    main([*arguments, "--resume"])
    assert generated == [2, 1]
    assert files_in(tmp_path) == files_in(run)
    main([*arguments, "--resume=True"])
    assert generated == [2, 1] and files_in(tmp_path) == files_in(run)
    assert "resume: 5 images are there, 0 of 3 batches are made" in caplog.text
    assert "nothing to do" not in caplog.text  # which is said of processes that get no batch

    damaged = tmp_path / "samples" / "00004.png"
    damaged.write_bytes(damaged.read_bytes()[:-60])
    main([*arguments, "--resume"])
    assert files_in(tmp_path) == files_in(run)
    with pytest.raises(UserError, match="run.json is of a run with scale 3.0, not 4.0"):
        main([*arguments, "--resume", "--scale=4"])
    assert files_in(tmp_path) == files_in(run)


def test_a_comparison_has_a_cell_for_each_pair_of_values(model, tmp_path):
    main([*model, "--prompt=a cat", "--grid_x=seed=1,2", "--grid_y=scale=2,3", f"--output_path={tmp_path}"])
    names = ["00000_seed=1_scale=2.png", "00001_seed=2_scale=2.png", "00002_seed=1_scale=3.png",
             "00003_seed=2_scale=3.png"]  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "samples").glob("*.png")) == names
    pixels = {name: np.asarray(Image.open(tmp_path / "samples" / name)) for name in names}
    assert Image.open(tmp_path / "samples" / names[1]).text["seed"] == "2"
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    for number, name in enumerate(names):
        enlarged = pixels[name].repeat(8, 0).repeat(8, 1)
        y, x = sheet.shape[0] - (2 - number // 2) * 134, sheet.shape[1] - (2 - number % 2) * 134
        np.testing.assert_array_equal(sheet[y : y + 128, x : x + 128], enlarged)

    alone = tmp_path / "alone"
    main([*model[:3], f"--from_image={tmp_path / 'samples' / names[3]}", f"--output_path={alone}"])
    np.testing.assert_array_equal(np.asarray(Image.open(alone / "samples" / "00000.png")), pixels[names[3]])


def test_a_comparison_of_how_prompts_are_read_shows_the_difference(model, tmp_path):
    main([*model, "--prompt=a (cat:1.9)", "--grid_x=prompt_syntax=plain,a1111", f"--output_path={tmp_path}"])
    plain, weighted = (Image.open(path) for path in sorted((tmp_path / "samples").glob("*.png")))
    assert "prompt_syntax" not in plain.text["settings"] and '"a1111"' in weighted.text["settings"]
    assert (np.asarray(plain) != np.asarray(weighted)).any()


def test_a_run_that_begins_with_resume_keeps_an_earlier_grid(model, tmp_path):
    (tmp_path / "grid.png").write_bytes(b"earlier")
    main([*model, "--prompt=a cat", "--resume", f"--output_path={tmp_path}"])
    assert (tmp_path / "grid.old1.png").read_bytes() == b"earlier"


def test_an_image_that_this_run_would_rename_is_no_source(run, model, tmp_path):
    for source in (run / "samples" / "00000.png", run / "grid.png"):
        with pytest.raises(UserError, match="init_image .* is of the last run .* another --output_path"):
            main([*model, "--prompt=a cat", f"--init_image={source}", f"--output_path={run}"])
    assert (run / "samples" / "00000.png").exists() and not (run / "samples.old1").exists()


BAD = {
    "a grid with starting latents": (
        ["--prompt=a", "--grid_x=scale=2,4", "--init_latents=l.npy"],
        "init_latents does not go with a comparison",
    ),
    "resume without images": (["--prompt=a", "--resume", "--skip_save"], "resume needs the PNGs"),
    "resume with latents": (["--prompt=a", "--resume", "--save_latents=l.npy"], "save_latents and --resume"),
    "a grid with latents": (["--prompt=a", "--grid_x=seed=1", "--save_latents=l.npy"], "save_latents and --grid_x"),
    "two images in a cell": (["--prompt=a", "--n_samples=2", "--grid_x=seed=1"], "one image in each place"),
    "one setting twice": (["--prompt=a", "--grid_x=seed=1", "--grid_y=seed=2"], "both are seed"),
    "a strength without a LoRA": (
        ["--prompt=a", "--grid_x=lora_scale=0,1"],
        "lora_scale is compared without lora_ckpt_path",
    ),
    "a strength without an image": (
        ["--prompt=a", "--grid_x=strength=0.5,1"],
        "strength is compared without init_image",
    ),
    "a text that is not there": (["--prompt=a", "--grid_x=prompt_sr=cat,dog"], "the prompt does not hold cat"),
    "a number of images": (["--prompt=a", "--grid_x=n_samples=1,2"], "n_samples cannot be compared"),
    "an output": (["--prompt=a", "--grid_y=output_path=a,b"], "output_path cannot be compared"),
    "many cells": (
        ["--prompt=a", f"--grid_x=seed={','.join(map(str, range(100)))}", f"--grid_y=scale={'1,' * 40}1"],
        "100 x 41 values, at most 1,000",
    ),
    "steps that do not fit": (
        ["--prompt=a", "--grid_x=sampling_steps=2,1000"],
        "comparison, sampling_steps=1000: .*steps",
    ),
    "no image": (["--from_image=nothing.png"], "from_image .*nothing.png does not exist"),
}


@pytest.mark.parametrize("case", BAD)
def test_settings_that_do_not_go_together(case, model, tmp_path):
    arguments, message = BAD[case]
    with pytest.raises(UserError, match=message):
        main([*model[:3], *arguments, f"--output_path={tmp_path / 'out'}"])
    assert not os.path.exists(tmp_path / "out")
