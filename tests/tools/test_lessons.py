"""What the lessons share: prompts of one line, images that are the same, and files that tools write anew."""

from __future__ import annotations

import pytest
from PIL import Image

from ldm.errors import UserError
from ldm.files.prompts import read_prompts
from tools.lessons import PROMPTS, check_prompts, replaced, same_pixels, save_images, write_prompts


@pytest.mark.parametrize("prompt", ["", "a fox\na koala", "a fox\r", "a fox\u2028"])
def test_a_prompt_that_is_not_one_line_is_an_error_that_names_it(prompt):
    with pytest.raises(UserError, match=r"--prompts, number 2 .*one line of text"):
        check_prompts(["a koala", prompt])


def test_prompts_are_read_as_they_are_written(tmp_path):
    prompts = [*PROMPTS, "una raposa", "狐狸"]
    check_prompts(prompts)
    write_prompts(prompts, tmp_path / "new" / "prompts.txt")
    assert read_prompts(tmp_path / "new" / "prompts.txt", "data_path") == prompts


@pytest.fixture
def files(tmp_path):
    """Two images and their copies with other texts."""
    images = [Image.new("RGB", (4, 6), (i, 20, 30)) for i in range(2)]
    files, copies = ([tmp_path / name / f"{i}.png" for i in range(2)] for name in ("files", "copies"))
    save_images(images, files)
    save_images(images, copies)
    return files, copies


def test_equal_images_are_the_same(files):
    assert same_pixels(*files)


def test_a_differing_pixel_mode_or_size_is_seen(files):
    files, copies = files
    changed = Image.open(files[1])
    changed.putpixel((3, 5), (1, 20, 31))
    grey, alpha = (Image.open(files[1]).convert(mode) for mode in ("L", "RGBA"))
    turned = Image.new("RGB", (6, 4), (1, 20, 30))
    assert turned.tobytes() == Image.open(files[1]).tobytes()
    for image in (changed, grey, alpha, turned):
        save_images([image], copies[1:])
        assert not same_pixels(files, copies)
    palette = Image.new("P", (4, 6), 7)
    palette.putpalette([255 - i // 3 for i in range(768)])
    save_images([Image.new("L", (4, 6), 7), palette], [files[0], copies[0]])
    assert Image.open(files[0]).tobytes() == Image.open(copies[0]).tobytes()
    assert not same_pixels(files[:1], copies[:1])


def test_missing_images_are_not_the_same(files):
    files, copies = files
    assert not same_pixels(files, copies[:1]) and not same_pixels(files[:1], copies) and not same_pixels([], [])
    copies[1].unlink()
    assert not same_pixels(files, copies)


def test_a_tool_replaces_a_file_only_if_it_succeeds(tmp_path):
    path = tmp_path / "both.ckpt"
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / path.name).write_text("left by a run that was killed")
    path.write_text("earlier")
    with pytest.raises(UserError), replaced(path) as new:
        assert new.name == path.name and not new.exists()
        new.write_text("half of it")
        raise UserError("the tool failed")
    assert path.read_text() == "earlier"
    with replaced(path) as new:
        new.write_text("later")
    assert path.read_text() == "later" and list(tmp_path.iterdir()) == [path]
