"""Caption files beside images, in plain folders and in kohya's numbered ones."""

from __future__ import annotations

import logging
import os

import pytest

from ldm.data.sources import read
from ldm.data.sources.rows import (
    CLASS_TOKENS,
    EMPTY_CAPTION,
    LEFT_FOLDERS,
    NO_CAPTION,
    NO_IMAGE,
    SAME_STEM,
    TWO_CAPTIONS,
    ReadOptions,
)
from ldm.errors import UserError
from tests.data.sources.layouts import image_bytes

IMAGE = image_bytes(0)


@pytest.fixture
def folder(tmp_path):
    """Twenty images 00.png to 19.png with captions "image 0" to "image 19"."""
    for number in range(20):
        (tmp_path / f"{number:02d}.png").write_bytes(IMAGE)
        (tmp_path / f"{number:02d}.txt").write_text(f"image {number}\n")
    return tmp_path


def captions(path, **options):
    return [row.caption for row in read(path, ReadOptions(**options)).rows]


def refusal(path, **options):
    with pytest.raises(UserError) as caught:
        read(path, ReadOptions(**options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def numbered(tmp_path, *names):
    """Folders of these names with an image b.png that has a caption file, and an image a.png that has none."""
    for name in names:
        (tmp_path / name).mkdir()
        for image in ("a.png", "b.png"):
            (tmp_path / name / image).write_bytes(IMAGE)
        (tmp_path / name / "b.txt").write_text("its own")
    return tmp_path


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a cat", "a cat"),
        ("\ufeffa cat", "a cat"),
        ("  a cat \r\n\r\n", "a cat"),
        ("one\r\ntwo\rthree\n", "one\ntwo\nthree"),
        ("1girl, solo, {red|blue} hair", "1girl, solo, {red|blue} hair"),
        ("猫 😀\u2028ü", "猫 😀\u2028ü"),
        ("", ""),
        ("\n \n", ""),
    ],
)
def test_a_caption_is_the_text_of_its_file_without_white_space_around_it(folder, content, expected):
    (folder / "00.txt").write_bytes(content.encode())
    assert captions(folder) == [expected, *(f"image {number}" for number in range(1, 20))]


def test_txt_comes_before_caption_and_an_own_extension_before_both(folder, caplog):
    (folder / "00.caption").write_text("not this")
    (folder / "00.tags").write_text("tags")
    os.rename(folder / "01.txt", folder / "01.caption")
    listing = read(folder)
    assert [row.caption for row in listing.rows[:2]] == ["image 0", "image 1"]
    assert listing.counts[TWO_CAPTIONS] == 1 and "two caption files, of which .txt is used: 00.png" in caplog.text
    assert captions(folder, caption_extension=".tags")[:2] == ["tags", ""]


def test_an_own_extension_may_be_given_without_its_dot_or_have_another_beginning(folder):
    (folder / "00.tags").write_text("tags")
    assert captions(folder, caption_extension="TAGS")[:2] == ["tags", ""]
    (folder / "00_tags.txt").write_text("more tags")
    assert captions(folder, caption_extension="_tags.txt")[:2] == ["more tags", ""]


def test_suffixes_may_be_upper_case_and_names_may_hold_dots(tmp_path):
    for image, caption in (("A.PNG", "A.TXT"), ("b.v1.2.JPeG", "b.v1.2.txt"), ("c.webp", "c.Caption")):
        (tmp_path / image).write_bytes(IMAGE)
        (tmp_path / caption).write_text(caption)
    assert captions(tmp_path) == ["A.TXT", "b.v1.2.txt", "c.Caption"]


def test_folders_below_and_links_are_read_once_and_hidden_files_are_not(folder):
    (folder / "below").mkdir()
    (folder / "below" / "z.png").symlink_to(folder / "00.png")
    (folder / "below" / "z.txt").write_text("below")
    (folder / "below" / "circle").symlink_to(folder)
    for name in (".DS_Store", "._00.png", ".hidden.png", "__MACOSX"):
        (folder / name).mkdir() if name == "__MACOSX" else (folder / name).write_bytes(b"x")
    (folder / "__MACOSX" / "y.png").write_bytes(b"x")
    assert captions(folder)[-1] == "below" and len(captions(folder)) == 21
    listing = read(folder, ReadOptions(recursive=False))
    assert len(listing.rows) == 20 and listing.counts == {LEFT_FOLDERS: 1}


def test_a_folder_of_masks_within_the_data_set_is_left_out_and_named(folder, caplog):
    masks = folder / "more" / "masks"
    masks.mkdir(parents=True)
    (masks / "below").mkdir()
    for name in ("00.png", "below/01.png"):
        (masks / name).write_bytes(IMAGE)
    assert len(read(folder).rows) == 22
    (folder / "link").symlink_to(masks)
    listing = read(folder, ReadOptions(leave_out=(os.path.realpath(masks),)))
    assert len(listing.rows) == 20 and listing.counts == {LEFT_FOLDERS: 2}
    assert "2 folders are not used: link, masks" in caplog.text


def test_a_data_set_that_is_a_folder_of_masks_is_refused(folder):
    message = refusal(folder, leave_out=(os.path.realpath(folder),))
    assert message.startswith(f"data_path {folder} is the folder of the masks (conditioning_data_dir)")


def test_missing_empty_and_surplus_captions_are_counted_and_named(folder, caplog):
    (folder / "07.txt").unlink()
    (folder / "08.txt").write_text("")
    (folder / "notes.txt").write_text("no image")
    (folder / "09.jpg").write_bytes(IMAGE)
    listing = read(folder)
    assert listing.counts == {NO_CAPTION: 1, EMPTY_CAPTION: 1, NO_IMAGE: 1, SAME_STEM: 1} and listing.left_out == []
    assert [row.caption for row in listing.rows[7:11]] == ["", "", "image 9", "image 9"]
    for name in ("07.png", "08.png", "notes.txt"):
        assert name in caplog.text


def test_many_missing_captions_are_one_line(folder, caplog):
    for number in range(10):
        (folder / f"{number:02d}.txt").unlink()
    read(folder)
    (warning,) = [line.message for line in caplog.records if "no caption" in line.message]
    assert warning.startswith(f"{folder}: 10 {NO_CAPTION}") and warning.endswith(", ...")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("a cat".encode("utf-16"), "is UTF-16: save it as UTF-8"),
        ("a cat".encode("utf-16-le"), "zero byte"),
        ("中国的猫".encode("gb18030"), "line 1: not a UTF-8 text file: save it as UTF-8 (it may be GBK)"),
        (b"one\ncaf\xe9\n", "line 2: not a UTF-8 text file"),
        (b"a\0cat", "not a text file, it holds a zero byte"),
        (IMAGE, "not a UTF-8 text file"),
        (b"x" * 600_000, "has 600,000 bytes, at most 524,288 are read"),
        (b"x" * 140_000, "has 140,000 characters, at most 131,072 are read"),
        ("folder", "is a folder"),
        ("fifo", "is a pipe"),
        ("/dev/zero", "is a device"),
        ("nowhere", "does not exist"),
    ],
)
def test_an_image_whose_caption_file_is_no_text_is_left_out_and_named(folder, caplog, content, fault):
    (folder / "00.txt").unlink()
    if content == "folder":
        (folder / "empty").mkdir()
        (folder / "00.txt").symlink_to("empty")
        assert captions(folder)[0] == ""  # a folder of this name, which is no caption file
        return
    if isinstance(content, str):
        os.mkfifo(folder / "fifo")
        (folder / "00.txt").symlink_to(content)
    else:
        (folder / "00.txt").write_bytes(content)
    listing = read(folder)
    assert len(listing.rows) == 19
    [(name, reason)] = listing.left_out
    assert name == f"{folder}/00.png" and f"{folder}/00.txt" in reason and fault in reason
    assert "left out: " in caplog.text and "1 of 20 rows left out" in caplog.text


def test_a_caption_that_may_not_be_read_is_named(unprivileged):
    for number in range(20):
        (unprivileged / f"{number}.png").write_bytes(IMAGE)
        (unprivileged / f"{number}.txt").write_text("x")
    (unprivileged / "5.txt").chmod(0)
    [(name, reason)] = read(unprivileged).left_out
    assert name.endswith("5.png") and "Permission denied" in reason


def test_more_than_a_tenth_of_captions_that_are_no_text_is_refused(folder):
    for number in range(3):
        (folder / f"{number:02d}.txt").write_bytes("中国的猫".encode("gb18030"))
    message = refusal(folder)
    assert "3 of 20 rows are unusable, more than 10%" in message and "00.txt" in message and "GBK" in message
    assert len(captions(folder, max_bad_fraction=0.2)) == 17


def test_images_without_any_caption_are_refused_with_the_ways_to_give_them(folder):
    for number in range(20):
        (folder / f"{number:02d}.txt").unlink()
    message = refusal(folder)
    for way in ("20 images and no caption", "cat.txt", ".caption", "img_txt.csv", "metadata.jsonl", "class_tokens"):
        assert way in message
    listing = read(folder, ReadOptions(class_tokens="sks dog"))
    assert {row.caption for row in listing.rows} == {"sks dog"} and listing.counts == {CLASS_TOKENS: 20}


def test_a_numbered_folder_without_captions_names_the_folder_above(tmp_path):
    numbered(tmp_path, "10_sks dog")
    (tmp_path / "10_sks dog" / "b.txt").unlink()
    assert f"give the one above, {tmp_path}" in refusal(tmp_path / "10_sks dog")


def test_repeats_and_class_tokens_are_those_of_the_folders_name(tmp_path):
    listing = read(numbered(tmp_path, "10_sks dog", "3_a_b", "007_x"))
    subsets = [(os.path.basename(one.folder), one.num_repeats, one.class_tokens) for one in listing.subsets]
    assert subsets == [
        ("007_x", 7, "x"), ("10_sks dog", 10, "sks dog"), ("3_a_b", 3, "a_b"),
    ]  # fmt: skip
    assert [(row.subset, row.caption) for row in listing.rows] == [
        (0, "x"), (0, "its own"), (1, "sks dog"), (1, "its own"), (2, "a_b"), (2, "its own"),
    ]  # fmt: skip
    assert listing.counts == {CLASS_TOKENS: 3} and listing.layout == "kohya_folders"


def test_folders_without_a_number_and_those_below_are_left_out_and_named(tmp_path, caplog):
    numbered(tmp_path, "2_dog", "0_zero", "logs", "-1_x", "x_2", "2_dog/3_below", "٣_x")
    (tmp_path / "top.png").write_bytes(IMAGE)
    listing = read(tmp_path)
    assert len(listing.rows) == 2 and listing.counts[LEFT_FOLDERS] == 6
    assert "folders are not used: -1_x, 0_zero, logs, ..." in caplog.text and "top.png" in caplog.text


def test_class_tokens_are_needed_only_where_captions_are_missing(tmp_path):
    numbered(tmp_path, "2_")
    assert [row.caption for row in read(tmp_path).rows] == ["", "its own"]
    assert captions(tmp_path, class_tokens="dog") == ["dog", "its own"]
    (tmp_path / "2_" / "b.txt").unlink()
    assert "2 images and no caption" in refusal(tmp_path)


def test_a_numbered_folder_of_masks_is_left_out(tmp_path):
    numbered(tmp_path, "2_cat", "2_masks")
    listing = read(tmp_path, ReadOptions(leave_out=(os.path.realpath(tmp_path / "2_masks"),)))
    assert [subset.class_tokens for subset in listing.subsets] == ["cat"]
    assert len(listing.rows) == 2 and listing.counts[LEFT_FOLDERS] == 1


def test_a_number_that_is_a_typing_error_is_refused(tmp_path):
    assert "above 1,000,000" in refusal(numbered(tmp_path, "9999999999999999_x"))


def test_captions_beside_numbered_folders_are_ambiguous(folder):
    message = refusal(numbered(folder, "5_dog"))
    assert "images with captions and folders named with a number" in message and "1_dog" in message


def test_empty_numbered_folders_are_refused(tmp_path):
    (tmp_path / "5_dog").mkdir()
    assert "has no images" in refusal(tmp_path)


def test_class_images_are_marked(tmp_path):
    assert all(subset.is_reg for subset in read(numbered(tmp_path, "1_dog"), ReadOptions(is_reg=True)).subsets)
    assert read(tmp_path / "1_dog", ReadOptions(is_reg=True, num_repeats=5)).subsets[0].num_repeats == 5


def test_warnings_do_not_come_for_a_sound_folder(folder, caplog):
    with caplog.at_level(logging.WARNING, "ldm"):
        read(folder)
    assert caplog.text == ""
