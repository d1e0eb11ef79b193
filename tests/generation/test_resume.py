"""Continuing a killed run: the record names a difference, images that are there are found, damaged ones are not."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.errors import UserError
from ldm.generation.image_files import write_png
from ldm.generation.resume import begin_or_continue, run_record, written_image

FIELDS = [{"prompt": "a cat", "index": "0"}, {"prompt": "a dog", "index": "1"}]
RECORD = run_record({"scale": 7.5, "seed": 42, "sampler": "ddim"}, FIELDS)


def test_a_run_begins_in_a_new_folder_and_continues_in_it(tmp_path):
    begin_or_continue(tmp_path / "samples", RECORD)
    before = (tmp_path / "samples" / "run.json").read_bytes()
    begin_or_continue(tmp_path / "samples", RECORD)
    assert (tmp_path / "samples" / "run.json").read_bytes() == before


@pytest.mark.parametrize(
    ("settings", "fields", "message"),
    [
        ({"scale": 8.0, "seed": 42, "sampler": "ddim"}, FIELDS, "scale 7.5, not 8.0"),
        ({"scale": 7.5, "seed": 42, "sampler": "plms"}, FIELDS, 'sampler "ddim", not "plms"'),
        ({"scale": 7.5, "seed": 42, "sampler": "ddim", "new": 1}, FIELDS, "new null, not 1"),
        ({"scale": 7.5, "seed": 42}, FIELDS, 'sampler "ddim", not null'),
        ({"scale": 7.5, "seed": 42, "sampler": "ddim"}, FIELDS[:1], "images 2, not 1"),
        ({"scale": 7.5, "seed": 42, "sampler": "ddim"}, FIELDS[::-1], "other prompts or other files"),
    ],
)
def test_a_difference_is_named(tmp_path, settings, fields, message):
    begin_or_continue(tmp_path, RECORD)
    with pytest.raises(UserError, match=f"run.json is of a run with {message}.*give the same settings"):
        begin_or_continue(tmp_path, run_record(settings, fields))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"images": 1}', "null", '"x"', "1e999", "[" * 9999])
def test_a_bad_record_is_named(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError, match="resume: .*run.json"):
        begin_or_continue(tmp_path, RECORD)


def test_images_of_a_run_without_a_record_are_left_alone(tmp_path):
    (tmp_path / "00000.png").write_bytes(b"")
    with pytest.raises(UserError, match="has images but no run.json.*move them away"):
        begin_or_continue(tmp_path, RECORD)
    assert [path.name for path in tmp_path.iterdir()] == ["00000.png"]


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    begin_or_continue(tmp_path, RECORD)
    (tmp_path / ".00001.812-0123abcd.partial.png").write_bytes(b"x")
    (tmp_path / ".mine.partial.png").write_bytes(b"x")
    begin_or_continue(tmp_path, RECORD)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.partial.png", "run.json"]


def test_an_image_is_there_if_it_can_be_read(tmp_path):
    path = tmp_path / "00000.png"
    assert written_image(path, FIELDS[0], (32, 32)) is None
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    write_png(path, pixels, {**FIELDS[0], "settings": {"steps": 1}})
    np.testing.assert_array_equal(written_image(path, FIELDS[0], (32, 32)), pixels)
    content = path.read_bytes()
    for damaged in (b"", content[:-500], content[:700] + b"\0" * 40 + content[740:], b"text"):
        path.write_bytes(damaged)
        assert written_image(path, FIELDS[0], (32, 32)) is None


def test_an_image_of_something_else_is_not_replaced(tmp_path):
    write_png(tmp_path / "00000.png", np.zeros((4, 4, 3), np.uint8), FIELDS[1])
    with pytest.raises(UserError, match="00000.png is no image of this run, its text prompt"):
        written_image(tmp_path / "00000.png", FIELDS[0], (4, 4))


@pytest.mark.parametrize("shape, mode", [((4, 5, 3), "RGB"), ((4, 4, 3), "P")])
def test_an_image_of_another_size_or_mode_was_changed(tmp_path, shape, mode):
    path = tmp_path / "00000.png"
    write_png(path, np.zeros(shape, np.uint8), FIELDS[0])
    if mode != "RGB":
        with Image.open(path) as image:
            texts = PngInfo()
            for key, text in image.text.items():
                texts.add_itxt(key, text)
            image.convert(mode).save(path, pnginfo=texts)
    with pytest.raises(UserError, match="00000.png was changed"):
        written_image(path, FIELDS[0], (4, 4))


@pytest.mark.parametrize(("before", "now"), [("auto", "fp32"), ("auto", "fp16"), ("bf16", "bf16"), (None, None)])
def test_a_run_continues_in_its_precision(tmp_path, before, now):
    """Earlier versions recorded `auto`, which was fp32 on the CPU and fp16 on Ascend."""
    begin_or_continue(tmp_path, {**RECORD, "precision": before})
    written = (tmp_path / "run.json").read_bytes()
    begin_or_continue(tmp_path, {**RECORD, "precision": now})
    assert (tmp_path / "run.json").read_bytes() == written


@pytest.mark.parametrize(("before", "now"), [("auto", "bf16"), ("fp32", "bf16"), ("bf16", "fp32")])
def test_another_precision_is_named(tmp_path, before, now):
    begin_or_continue(tmp_path, {**RECORD, "precision": before})
    with pytest.raises(UserError, match=f'precision "{before.replace("auto", "fp32")}", not "{now}": give the same'):
        begin_or_continue(tmp_path, {**RECORD, "precision": now})


def test_the_record_can_be_read_by_others(tmp_path):
    begin_or_continue(tmp_path, RECORD)
    content = json.loads((tmp_path / "run.json").read_text())
    assert content["images"] == 2 and content["scale"] == 7.5 and len(content["prompts and files"]) == 64
