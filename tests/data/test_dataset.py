"""Data folders and CSVs that are read, and the errors for those that cannot be."""

import csv
import io
import logging
import os
import unicodedata

import numpy as np
import pytest
from PIL import Image

from ldm.data.dataset import read_image_text_csv
from ldm.data.decoding import BrokenImage
from ldm.errors import UserError
from ldm.runtime.logs import PlainFormatter


def image_bytes(suffix="PNG"):
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, suffix)
    return buffer.getvalue()


IMAGE = image_bytes()


@pytest.fixture(params=[131_072, 10_000_000], ids=["csv's limit", "MindSpore's limit"])
def csv_limit(request):
    """MindSpore changes csv's limit for the whole process. The result must not depend on it."""
    before = csv.field_size_limit(request.param)
    yield
    csv.field_size_limit(before)


@pytest.fixture
def folder(tmp_path):
    """A data folder with twenty images 0.png to 19.png and no CSV yet; something.png lies outside of it."""
    inside = tmp_path / "data"
    inside.mkdir()
    for index in range(20):
        (inside / f"{index}.png").write_bytes(IMAGE)
    (tmp_path / "outside.png").write_bytes(IMAGE)
    return inside


def write(folder, text, encoding="utf-8"):
    (folder / "img_txt.csv").write_bytes(text.encode(encoding) if isinstance(text, str) else text)


def lines(count=20, **changed):
    """A CSV of `count` rows, where line3="..." puts something else on line 3 (the header is line 1)."""
    rows = ["dir,text"] + [f"{index}.png,image {index}" for index in range(count)]
    for line, content in changed.items():
        rows[int(line[len("line") :]) - 1] = content
    return "\n".join(rows) + "\n"


def captions(folder):
    return [row.caption for row in read_image_text_csv(folder).rows]


def images_and_captions(found):
    return [(row.path, row.caption) for row in found.rows]


def refusal(folder, **settings):
    with pytest.raises(UserError) as caught:
        read_image_text_csv(folder, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_rows_come_in_the_order_of_the_csv(folder):
    write(folder, "dir,text\n3.png,three\n1.png,one\n2.png,two\n")
    found = read_image_text_csv(folder)
    assert images_and_captions(found) == [
        (folder / "3.png", "three"),
        (folder / "1.png", "one"),
        (folder / "2.png", "two"),
    ]
    assert found.left_out == []


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("dir,text\n1.png,a cat\n", ["a cat"]),
        ("\ufeffdir,text\n1.png,a cat\n", ["a cat"]),
        ("dir,text\r\n1.png,a cat\r\n", ["a cat"]),
        ("dir,text\r1.png,a cat\r", ["a cat"]),
        ("dir,text\n1.png,a cat", ["a cat"]),
        ('dir,text\n1.png,"red, white and blue"\n', ["red, white and blue"]),
        ('dir,text\n1.png,"a ""free"" button"\n', ['a "free" button']),
        ('dir,text\n1.png,a "free" button\n', ['a "free" button']),
        ('dir,text\n1.png,"two\nlines"\n2.png,b\n', ["two\nlines", "b"]),
        ('"dir","text"\n"1.png","a cat"\n', ["a cat"]),
        ("text,dir\na cat,1.png\n", ["a cat"]),
        ("id,dir,source,text,note\n7,1.png,web,a cat,nice\n", ["a cat"]),
        (" dir , text \n 1.png , a cat \n", ["a cat"]),
        ("\n\ndir,text\n\n1.png,a cat\n,\n2.png,a dog\n\n", ["a cat", "a dog"]),
        ("dir,text\n1.png,猫 und Käse 😀\n", ["猫 und Käse 😀"]),
        ("dir,text\n1.png,a\n1.png,b\n", ["a", "b"]),
        ("dir,text\n./1.png,a\n", ["a"]),
        ("dir,text\nsub/../1.png,a\n", ["a"]),
    ],
)
@pytest.mark.usefixtures("csv_limit")
def test_ways_to_write_a_csv(folder, content, expected):
    (folder / "sub").mkdir()
    write(folder, content)
    assert captions(folder) == expected


def test_images_may_lie_in_folders_below(folder):
    (folder / "cats").mkdir()
    (folder / "cats" / "größe 1.png").write_bytes(IMAGE)
    write(folder, "dir,text\ncats/größe 1.png,a cat\n")
    assert read_image_text_csv(folder).rows[0].path == folder / "cats" / "größe 1.png"


def test_a_folder_that_is_a_link_is_the_folder_it_leads_to(folder, tmp_path):
    write(folder, lines())
    (tmp_path / "link").symlink_to(folder)
    assert len(read_image_text_csv(tmp_path / "link").rows) == 20


def test_other_names_for_columns(folder):
    write(folder, "file_name,caption\n1.png,a cat\n")
    found = read_image_text_csv(str(folder), image_column="file_name", caption_column="caption")
    assert images_and_captions(found) == [(folder / "1.png", "a cat")]


def test_empty_captions_are_kept_and_counted(folder, caplog):
    write(folder, lines(line2="0.png,", line3='1.png,"  "'))
    with caplog.at_level(logging.WARNING):
        assert captions(folder)[:3] == ["", "", "image 2"]
    assert "2 captions are empty and train as such" in caplog.text


def test_a_sound_data_set_gives_no_warning(folder, caplog):
    write(folder, lines())
    assert captions(folder) == [f"image {index}" for index in range(20)]
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("", "has nothing in it"),
        ("\n\n \n", "has nothing in it"),
        ("\ufeff", "has nothing in it"),
        ("dir,text\n", "header but no rows"),
        ("dir,text\n\n\n", "header but no rows"),
        ("1.png,a cat\n2.png,a dog\n", "has no header: make dir,text its first line"),
        ("cats/1.JPG,a cat\n", "has no header: make dir,text its first line"),
        ("dir\n1.png\n", "no column 'text', only 'dir'"),
        ("dir,caption\n1.png,a cat\n", "no column 'text', only 'dir', 'caption'"),
        ("dir,txt\n1.png,a cat\n", "no column 'text', only 'dir', 'txt' .nearest: 'txt'"),
        ("dir,Text\n1.png,a cat\n", "no column 'text', only 'dir', 'Text' .nearest: 'Text'"),
        ("DIR,text\n1.png,a cat\n", "no column 'dir'.*nearest: 'DIR'"),
        ("file,text\n1.png,a cat\n", "no column 'dir', only 'file', 'text'"),
        ("a,b,c\n1,2,3\n", "no column 'dir', only 'a', 'b', 'c': its first line must name dir,text"),
        ("dir;text\n1.png;a cat\n", "not separated by commas"),
        ("dir\ttext\n1.png\ta cat\n", "not separated by commas"),
        ("dir,text,text\n1.png,a,b\n", "column 'text' twice"),
        ("dir,dir,text\n1.png,1.png,b\n", "column 'dir' twice"),
        ('dir,text\n1.png,"never closed\n2.png,a dog\n', "line 3.*double quotes"),
        ('dir,text\n1.png,a\n2.png,"a dog" called Rex\n', "line 3.*double quotes"),
        ("dir,text\n1.png," + "x" * 200_000 + "\n", "line 2.*field"),
        ("dir,text\n1.png,a\0cat\n", "line 2: not a text file, it holds a zero byte"),
        ("dir,text\n1.png,a\n2.png,caf\xe9\n".encode("latin-1"), "line 3: not a UTF-8 text.*save it.*Windows-1252"),
        ("dir,text\n1.png,中国\n".encode("gb18030"), "line 2: not a UTF-8 text file: save it as UTF-8.*GBK"),
        ("dir,text\n1.png,a\n".encode("utf-16"), "is UTF-16: save it as UTF-8"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "not a UTF-8 text file"),
        (b"PK\x03\x04\0\0 an .xlsx", "zero byte"),
    ],
)
@pytest.mark.usefixtures("csv_limit")
def test_a_malformed_csv_is_refused(folder, content, fault):
    write(folder, content)
    message = refusal(folder)
    assert str(folder / "img_txt.csv") in message
    with pytest.raises(UserError, match=fault):
        read_image_text_csv(folder)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.png",
        "../../outside.png",
        "sub/../../outside.png",
        "/etc/hostname",
        "{folder}/1.png",
        "..",
        "../data2/1.png",
    ],
)
def test_an_image_outside_the_folder_is_refused(folder, tmp_path, name):
    (tmp_path / "data2").mkdir()
    (tmp_path / "data2" / "1.png").write_bytes(IMAGE)
    name = name.format(folder=folder)
    write(folder, lines(line5=f"{name},a cat"))
    message = refusal(folder)
    assert "line 5" in message and name in message and "outside the folder" in message


@pytest.mark.parametrize("name", ["again.png", "link.png", "linked/outside.png"])
def test_a_link_in_the_folder_may_lead_anywhere(folder, tmp_path, name, caplog):
    (folder / "again.png").symlink_to("1.png")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "linked").symlink_to(tmp_path)
    write(folder, f"dir,text\n{name},a cat\n")
    assert captions(folder) == ["a cat"] and "differ" not in caplog.text


def test_no_name_leads_out_of_the_folder_through_a_link(folder, tmp_path):
    (tmp_path / "deep").mkdir()
    (folder / "linked").symlink_to(tmp_path / "deep")
    write(folder, lines(line5="linked/../outside.png,a cat"))
    assert "does not exist" in read_image_text_csv(folder).left_out[0][1]


@pytest.mark.parametrize(
    ("on_disk", "name"),
    [
        ("cat.PNG", "cat.png"),
        ("Cats/Cat.png", "cats/cat.PNG"),
        ("cats/cat.png", "cats\\cat.png"),
        ("cats/cat.png", ".\\cats\\CAT.png"),
        (unicodedata.normalize("NFD", "größe 1.png"), unicodedata.normalize("NFC", "größe 1.png")),
        (unicodedata.normalize("NFC", "größe/é.png"), unicodedata.normalize("NFD", "größe/é.png")),
        (os.fsdecode("猫.png".encode("gbk")), "猫.png"),
        (os.fsdecode("猫/狗.png".encode("gbk")), "猫\\狗.png"),
    ],
)
def test_the_only_file_with_a_similar_name_is_used_with_one_warning(folder, on_disk, name, caplog):
    (folder / on_disk).parent.mkdir(exist_ok=True)
    (folder / on_disk).write_bytes(IMAGE)
    write(folder, lines(line5=f"{name},a cat", line6=f"{name},a dog"))
    found = read_image_text_csv(folder)
    assert [row.path for row in found.rows[3:5]] == [folder / on_disk] * 2 and found.left_out == []
    [record] = [record for record in caplog.records if "differ" in record.getMessage()]
    assert "2 image names differ" in record.getMessage() and name.split("/")[-1] in record.getMessage()
    PlainFormatter("%(message)s").format(record).encode("utf-8")  # a log and a terminal take it


def test_an_exact_name_wins_and_of_several_similar_ones_none_is_used(folder):
    for name in ("CAT.png", "cat.png", "Dog.png", "DOG.png"):
        (folder / name).write_bytes(IMAGE)
    write(folder, lines(line5="cat.png,a cat", line6="dog.png,a dog"))
    found = read_image_text_csv(folder)
    assert found.rows[3].path == folder / "cat.png"
    assert found.left_out == [("dog.png", "line 6: the image does not exist, only DOG.png and Dog.png")]


@pytest.mark.parametrize("name", ["..\\outside.png", "sub\\..\\..\\outside.png", "C:\\images\\1.png", "C:\\1.png"])
def test_a_similar_name_does_not_lead_out_of_the_folder_either(folder, name):
    write(folder, lines(line5=f"{name},a cat"))
    assert "does not exist" in read_image_text_csv(folder).left_out[0][1]


def test_an_image_whose_name_is_not_utf8_is_named_where_it_is_broken(folder, caplog):
    name = os.fsdecode("狗.png".encode("gbk"))
    (folder / name).write_bytes(b"")
    write(folder, lines(line5="狗.png,a dog"))
    assert read_image_text_csv(folder).left_out == [(name, "line 5: the image is an empty file")]
    assert "left out: \\xb9\\xb7.png" in PlainFormatter("%(message)s").format(caplog.records[-2])
    assert "\\xb9\\xb7.png is an empty file" in str(BrokenImage(folder / name, "is an empty file"))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("dir,text,note\n1.png,a cat\n2.png,a dog,nice\n", ["a cat", "a dog"]),
        ("dir,text,note\n1.png\n2.png,a dog\n", ["", "a dog"]),
        ("dir,text\n1.png,a cat,,\n2.png,a dog, , \n", ["a cat", "a dog"]),
        ("dir,text,,\n1.png,a cat,,\n2.png,a dog\n", ["a cat", "a dog"]),
    ],
)
def test_empty_columns_at_the_end_may_be_there_or_not(folder, content, expected):
    write(folder, content)
    found = read_image_text_csv(folder)
    assert [row.caption for row in found.rows] == expected and found.left_out == []


def test_a_row_that_ends_before_its_image_is_left_out(folder):
    write(folder, "text,dir\n" + "".join(f"image {index},{index}.png\n" for index in range(19)) + "a cat\n")
    assert read_image_text_csv(folder).left_out == [("", "line 21: it names no image")]


def test_no_folder(tmp_path):
    assert "does not exist: check data_path" in refusal(tmp_path / "nowhere")


def test_a_file_instead_of_a_folder(folder):
    write(folder, lines())
    assert "is not a folder" in refusal(folder / "img_txt.csv")


@pytest.mark.parametrize("place", ["fifo", "/dev/zero", "/dev/stdin", "folder"])
def test_a_csv_that_is_not_a_regular_file_is_refused_at_once(folder, place):
    os.mkfifo(folder / "fifo")
    (folder / "folder").mkdir()
    (folder / "img_txt.csv").symlink_to(place)
    if place == "/dev/stdin":
        reader, writer = os.pipe()
        (folder / "img_txt.csv").unlink()
        (folder / "img_txt.csv").symlink_to(f"/dev/fd/{reader}")
    message = refusal(folder)
    assert "img_txt.csv is a" in message and "not a file" in message
    if place == "/dev/stdin":
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize("closed", [".", "img_txt.csv", "sub", "1.png"])
def test_a_folder_or_file_without_permission_is_named(unprivileged, closed):
    (unprivileged / "sub").mkdir()
    for index in range(20):
        (unprivileged / f"{index}.png").write_bytes(IMAGE)
    (unprivileged / "sub" / "a.png").write_bytes(IMAGE)
    write(unprivileged, lines(line5="sub/a.png,a cat"))
    (unprivileged / closed).chmod(0)
    if closed in ("sub", "1.png"):
        [(name, reason)] = read_image_text_csv(unprivileged).left_out
        assert name == ("1.png" if closed == "1.png" else "sub/a.png")
    else:
        reason = refusal(unprivileged)
        assert str(unprivileged) in reason
    assert "Permission denied: give this user the permission" in reason


def test_no_csv(folder):
    message = refusal(folder)
    assert str(folder) in message and "has no img_txt.csv" in message and "dir,text" in message


def test_no_csv_here_but_in_a_folder_below(folder):
    write(folder, lines())
    assert str(folder) in refusal(folder.parent)


BROKEN = {
    "missing": (None, "does not exist"),
    "empty": (b"", "is an empty file"),
    "text": (b"no image, for all its name\n", "is no image"),
    "truncated": (IMAGE[: len(IMAGE) // 2], "is broken"),
    "cut at the end": (IMAGE[:-100], "is broken"),
    "header alone": (IMAGE[:33], "is no image"),
    "truncated jpeg": (image_bytes("JPEG")[:-150], "is broken"),
    "html": (b"<!DOCTYPE html><title>404</title>", "is no image"),
    "zeros": (b"\0" * 500, "is no image"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_image_is_named_counted_and_left_out(folder, caplog, kind):
    content, fault = BROKEN[kind]
    (folder / "7.png").unlink()
    if content is not None:
        (folder / "7.png").write_bytes(content)
    write(folder, lines())
    with caplog.at_level(logging.WARNING):
        found = read_image_text_csv(folder)
    assert [row.caption for row in found.rows] == [f"image {index}" for index in range(20) if index != 7]
    [(name, reason)] = found.left_out
    assert name == "7.png" and reason.startswith("line 9: ") and fault in reason
    assert "7.png" in caplog.text and fault in caplog.text and "1 of 20 rows left out" in caplog.text


@pytest.mark.parametrize(
    ("line", "name", "fault"),
    [
        ("7.png,red, white and blue", "7.png", "3 fields where the header has 2: put captions that hold commas in"),
        (",a cat", "", "it names no image"),
        (" ,a cat", "", "it names no image"),
        (".,a cat", ".", "does not exist"),
        ("x" * 300 + ".png,a cat", "x" * 300 + ".png", "does not exist"),
        ("x/" * 2500 + "x.png,a cat", "x/" * 2500 + "x.png", "does not exist"),
        ("7.png/7.png,a cat", "7.png/7.png", "does not exist"),
        ("7\\.png,a cat", "7\\.png", "does not exist"),
    ],
)
def test_a_malformed_row_is_left_out(folder, line, name, fault):
    write(folder, lines(line9=line))
    found = read_image_text_csv(folder)
    assert len(found.rows) == 19
    assert (
        found.left_out[0][0] == name and found.left_out[0][1].startswith("line 9: ") and fault in found.left_out[0][1]
    )


def test_a_line_number_is_where_the_row_starts(folder):
    write(folder, lines(line2='0.png,"one\ntwo\nthree"', line5='gone.png,"a\ncat"'))
    assert read_image_text_csv(folder).left_out[0][1].startswith("line 7: ")


@pytest.mark.parametrize(("broken", "refused"), [(1, False), (2, False), (3, True), (20, True)])
def test_more_than_a_tenth_broken_is_refused(folder, broken, refused):
    for index in range(broken):
        (folder / f"{index}.png").write_bytes(b"")
    write(folder, lines())
    if not refused:
        found = read_image_text_csv(folder)
        assert len(found.left_out) == broken and len(found.rows) == 20 - broken
    else:
        message = refusal(folder)
        assert f"{broken} of 20 rows are unusable, more than 10%" in message
        assert "0.png (line 2: the image is an empty file)" in message


def test_the_bound_can_be_set(folder):
    (folder / "0.png").unlink()
    write(folder, lines())
    assert "more than 0%" in refusal(folder, max_bad_fraction=0.0)


def test_all_unusable_rows_are_logged_even_if_the_data_set_is_refused(folder, caplog):
    for index in range(20):
        (folder / f"{index}.png").unlink()
    write(folder, lines())
    with caplog.at_level(logging.WARNING):
        refusal(folder)
    assert all(f"left out: {index}.png" in caplog.text for index in range(20))


def test_of_many_unusable_rows_the_first_are_logged_and_all_are_counted(folder, caplog):
    (folder / "img_txt.csv").write_text("dir,text\n" + "".join(f"gone{index}.png,a\n" for index in range(1_000)))
    with caplog.at_level(logging.WARNING):
        message = refusal(folder)
    assert len(caplog.records) == 21 and "left out: 980 more" in caplog.text and len(message) < 1_000
    assert "1000 of 1000 rows are unusable" in message


def test_a_csv_of_too_many_rows_is_refused(folder, monkeypatch):
    monkeypatch.setattr("ldm.data.sources.image_text_csv.MAX_ROWS", 19)
    write(folder, lines())
    assert "has more than 19 rows: split it" in refusal(folder)
    monkeypatch.setattr("ldm.data.sources.image_text_csv.MAX_BYTES", 50)
    assert "at most 50 are read: write it as a UTF-8 CSV, a large one in parts" in refusal(folder)
