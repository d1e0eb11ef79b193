"""The files of generation: numbered PNGs with their prompts, a list, a grid and latents. Earlier files are kept."""

from __future__ import annotations

import json
import os
import pickle
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from ldm.errors import UserError
from ldm.generation.image_files import ImageWriter, LatentsWriter, read_latents, starting_latents_path, tile

PROMPTS = ["a cat, 猫", "a cat, 猫", "two\nlines", "two\nlines"]
NEGATIVE = ["", "", "blurry", "blurry"]


def images(count, value=0):
    return np.stack([np.full((6, 8, 3), 10 * i + value, np.uint8) for i in range(count)])


def write(folder, value=0, **more):
    writer = ImageWriter(folder, PROMPTS, NEGATIVE, 2, {"seed": "42", "settings": {"steps": 20}}, **more)
    writer.add([0, 1, 2], images(3, value))
    writer.add([3], images(1, value + 3))
    writer.finish()
    return writer


def test_pngs_are_numbered_in_the_order_of_the_prompts(tmp_path):
    write(tmp_path)
    names = sorted(path.name for path in (tmp_path / "samples").glob("*.png"))
    assert names == ["00000.png", "00001.png", "00002.png", "00003.png"]
    assert np.asarray(Image.open(tmp_path / "samples" / "00002.png"))[0, 0].tolist() == [20, 20, 20]


def test_names_sort_like_numbers(tmp_path):
    writer = ImageWriter(tmp_path, ["x"] * 100_001, [""] * 100_001, 1, {})
    assert writer.name(7) == "000007.png" and writer.name(100_000) == "100000.png"


def test_a_png_holds_its_prompt_its_settings_and_its_index(tmp_path):
    write(tmp_path)
    texts = Image.open(tmp_path / "samples" / "00000.png").text
    assert texts["prompt"] == "a cat, 猫" and texts["negative_prompt"] == "" and texts["index"] == "0"
    assert texts["seed"] == "42" and json.loads(texts["settings"]) == {"steps": 20}
    assert Image.open(tmp_path / "samples" / "00002.png").text["prompt"] == "two\nlines"


def test_names_that_are_not_utf_8_are_written_as_escapes(tmp_path):
    name = os.fsdecode(b"\xb7\xe7.ckpt")  # GBK
    writer = ImageWriter(tmp_path, ["a"], [""], 1, {"checkpoint": name, "lora": [{"file": name, "weight": 1}]})
    writer.add([0], images(1))
    texts = Image.open(tmp_path / "samples" / "00000.png").text
    assert texts["checkpoint"] == "\\udcb7\\udce7.ckpt" and json.loads(texts["lora"])[0]["file"] == name


def test_an_interrupted_run_names_the_images_that_are_kept(tmp_path):
    writer = ImageWriter(tmp_path, PROMPTS, NEGATIVE, 2, {})
    assert writer.progress() == "after 0 of 4 images: nothing is kept"
    writer.add([0, 1, 2], images(3))
    assert writer.progress() == f"after 3 of 4 images, which are in {tmp_path / 'samples'}"


def test_prompts_txt_has_a_line_for_each_png(tmp_path):
    write(tmp_path)
    lines = (tmp_path / "samples" / "prompts.txt").read_text(encoding="utf-8").splitlines()
    assert lines == ["a cat, 猫", "a cat, 猫", "two lines", "two lines"]


def test_the_grid_has_a_row_for_each_prompt(tmp_path):
    write(tmp_path)
    assert Image.open(tmp_path / "grid.png").size == (2 * 8 + 2, 2 * 6 + 2)


def test_the_grid_of_single_images_is_nearly_square_and_has_at_most_64(tmp_path):
    writer = ImageWriter(tmp_path, ["x"] * 70, [""] * 70, 1, {}, pngs=False)
    writer.add(range(70), np.zeros((70, 6, 8, 3), np.uint8))
    writer.finish()
    assert Image.open(tmp_path / "grid.png").size == (8 * 10 - 2, 8 * 8 - 2)
    assert not (tmp_path / "samples").exists()


def test_tiles_lie_in_rows_on_white():
    sheet = tile(list(images(3)), columns=2)
    assert sheet.shape == (14, 18, 3)
    assert sheet[0, 0, 0] == 0 and sheet[0, 10, 0] == 10 and sheet[8, 0, 0] == 20 and sheet[8, 10, 0] == 255


def test_one_channel_is_a_grey_image_in_files_and_grid(tmp_path):
    writer = ImageWriter(tmp_path, PROMPTS[:2], NEGATIVE[:2], 1, {})
    writer.add([0, 1], images(2, 7)[..., :1])
    writer.finish()
    image, grid = Image.open(tmp_path / "samples" / "00001.png"), Image.open(tmp_path / "grid.png")
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("L", (8, 6), 17)
    assert (grid.mode, grid.size, grid.getpixel((8, 0))) == ("L", (18, 6), 255)


def test_a_second_run_renames_the_files_of_the_first(tmp_path):
    for value in (0, 100, 200):
        write(tmp_path, value)
    firsts = {
        name: np.asarray(Image.open(tmp_path / name / "00000.png"))[0, 0, 0]
        for name in ("samples", "samples.old1", "samples.old2")
    }
    assert firsts == {"samples": 200, "samples.old1": 0, "samples.old2": 100}
    assert (tmp_path / "samples.old1" / "prompts.txt").exists()
    assert {path.name for path in tmp_path.glob("*.png")} == {"grid.png", "grid.old1.png", "grid.old2.png"}


def test_an_earlier_grid_is_renamed_where_none_is_written(tmp_path):
    write(tmp_path)
    write(tmp_path, grid=False)
    assert not (tmp_path / "grid.png").exists() and (tmp_path / "grid.old1.png").exists()


def test_nothing_is_renamed_before_the_first_image(tmp_path):
    write(tmp_path)
    ImageWriter(tmp_path, PROMPTS, NEGATIVE, 2, {}).finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.png", "samples"]


def test_nothing_is_written_where_neither_pngs_nor_a_grid_are_wanted(tmp_path):
    write(tmp_path / "out", pngs=False, grid=False)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "out").write_text("a file where a folder should be")
    with pytest.raises(UserError, match="out cannot be written: .*: check the path"):
        write(tmp_path / "out")


def test_latents_are_written_with_the_starting_ones_and_read_again(tmp_path):
    rng = np.random.default_rng(0)
    start, final = rng.standard_normal((2, 3, 4, 5, 6)).astype(np.float32)
    path = tmp_path / "sub" / "out.npy"
    with LatentsWriter(path, 3) as writer:
        writer.add(np.array([2, 0]), start[[2, 0]], final[[2, 0]])
        writer.add([1], start[1:2], final[1:2])
        assert not path.exists()
    np.testing.assert_array_equal(read_latents(path, (3, 4, 5, 6)), final)
    initial = starting_latents_path(path)
    assert initial.name == "out.init.npy"
    np.testing.assert_array_equal(read_latents(initial, (3, 4, 5, 6)), start)
    np.save(tmp_path / "numpy.npy", final)
    assert path.read_bytes() == (tmp_path / "numpy.npy").read_bytes()
    assert sorted(file.name for file in path.parent.iterdir()) == ["out.init.npy", "out.npy"]


def test_latents_of_a_run_that_fails_are_not_kept(tmp_path):
    np.save(tmp_path / "out.npy", np.ones(1))
    with pytest.raises(RuntimeError), LatentsWriter(tmp_path / "out.npy", 2) as writer:
        writer.add([0], np.ones((1, 4, 2, 2)), np.ones((1, 4, 2, 2)))
        raise RuntimeError("no memory")
    assert [file.name for file in tmp_path.iterdir()] == ["out.npy"] and np.load(tmp_path / "out.npy").shape == (1,)


def test_latents_of_other_precisions_become_fp32(tmp_path):
    for dtype in (np.float16, np.float64):
        np.save(tmp_path / "x.npy", np.ones((1, 4, 2, 2), dtype))
        assert read_latents(tmp_path / "x.npy", (1, 4, 2, 2)).dtype == np.float32


class RunsCode:
    def __reduce__(self):
        return (os.mkdir, ("ran",))


def header(shape, descr="<f4"):
    """An .npy with a header and no data."""
    text = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY\x01\0" + len(text).to_bytes(2, "little") + text


BAD_LATENTS = {
    "fifo": (lambda path: os.mkfifo(path), "is a pipe"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a device"),
    "folder behind a link": (lambda path: path.symlink_to(path.parent), "is a folder, not a file"),
    "promises": (lambda path: path.write_bytes(header((10**12,))), "is truncated"),
    "zero of many": (lambda path: path.write_bytes(header((0, 2**62, 2**62))), "exceeds what can be read"),
    "50 axes": (lambda path: path.write_bytes(header((1,) * 50) + b"1234"), "exceeds what can be read"),
    "negative": (lambda path: path.write_bytes(header((-1,))), r"its shape is \(-1,\)"),
    "shape of text": (lambda path: path.write_bytes(header("xx")), "its shape is xx"),
    "fields": (lambda path: path.write_bytes(header((1,), [("a", "<f4")]) + b"1234"), "not plain numbers"),
    "long type": (lambda path: path.write_bytes(header((1,), "<V99999")), "not plain numbers"),
    "long header": (lambda path: path.write_bytes(b"\x93NUMPY\2\0\0\0\0\x80" + b"(" * 9999), "at most 1,024"),
    "nested header": (lambda path: path.write_bytes(b"\x93NUMPY\1\0\0\4" + b"-" * 1024), "truncated or damaged"),
    "header of a list": (lambda path: path.write_bytes(b"\x93NUMPY\1\0\2\0[]"), "its header is damaged"),
    "missing": (lambda path: None, "does not exist"),
    "empty": (lambda path: path.write_bytes(b""), "not a .npy file"),
    "text": (lambda path: path.write_text("hello"), "not a .npy file of numbers .it begins with .*hello"),
    "folder": (lambda path: path.mkdir(), "is a folder, not a file"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps(RunsCode())), "not a .npy file"),
    "pickled objects": (lambda path: np.save(path, np.array([RunsCode()], object)), "not a .npy file"),
    "cut off": (lambda path: path.write_bytes(npy(np.ones((2, 4, 3, 3)))[:-9]), "not a .npy file"),
    "npz": (lambda path: path.write_bytes(npz(np.ones((2, 4, 3, 3)))), "npz archive"),
    "integers": (lambda path: np.save(path, np.ones((2, 4, 3, 3), int)), "holds int64"),
    "complex": (lambda path: np.save(path, np.ones((2, 4, 3, 3), complex)), "holds complex"),
    "other shape": (lambda path: np.save(path, np.ones((2, 4, 3, 5))), "is 2 x 4 x 3 x 5, expected 2 x 4 x 3 x 3"),
    "other count": (lambda path: np.save(path, np.ones((1, 4, 3, 3))), "expected 2 x 4 x 3 x 3"),
    "no axes": (lambda path: np.save(path, np.float32(1)), "expected 2 x 4 x 3 x 3"),
    "nan": (lambda path: np.save(path, np.full((2, 4, 3, 3), np.nan)), "not finite"),
    "infinite": (lambda path: np.save(path, np.full((2, 4, 3, 3), np.inf)), "not finite"),
}


def npy(array):
    file = BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz(array):
    file = BytesIO()
    np.savez(file, latents=array)
    return file.getvalue()


@pytest.mark.parametrize("kind", list(BAD_LATENTS))
def test_what_are_no_latents_is_named(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, words = BAD_LATENTS[kind]
    path = tmp_path / "in.npy"
    make(path)
    with pytest.raises(UserError, match=words) as error:
        read_latents(path, (2, 4, 3, 3))
    assert str(path) in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_a_header_that_promises_more_than_memory_is_refused(tmp_path):
    data = npy(np.ones((2, 4, 3, 3), np.float32))
    path = tmp_path / "in.npy"
    path.write_bytes(data.replace(b"(2, 4, 3, 3), ", b"(9" + b"9" * 9 + b",), "[:14]))
    with pytest.raises(UserError, match="in.npy"):
        read_latents(path, (2, 4, 3, 3))
