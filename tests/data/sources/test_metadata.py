"""Metadata files that name the images: imagefolder's JSONL, CSV and Parquet, and kohya's JSON."""

from __future__ import annotations

import json
import os
import sys

import pytest

from ldm.data.sources import read
from ldm.data.sources.rows import EMPTY_CAPTION, NO_CAPTION, NOT_LISTED, OTHER_SPLIT, SIMILAR_NAME, ReadOptions
from ldm.errors import UserError
from tests.data.sources.layouts import image_bytes

IMAGE = image_bytes(0)


@pytest.fixture
def folder(tmp_path):
    """A folder with twenty images 00.png to 19.png; outside.png lies beside it."""
    inside = tmp_path / "data"
    inside.mkdir()
    for number in range(20):
        (inside / f"{number:02d}.png").write_bytes(IMAGE)
    (tmp_path / "outside.png").write_bytes(IMAGE)
    return inside


def entries(**changed):
    """The entry of each image; n05={...} replaces that of 05.png, and None takes it away."""
    rows = {f"n{number:02d}": {"file_name": f"{number:02d}.png", "text": f"image {number}"} for number in range(20)}
    return [row for row in {**rows, **changed}.values() if row is not None]


def write(folder, rows, name="metadata.jsonl"):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_json(folder, content, name="meta_cap.json"):
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


def refusal(path, **options):
    with pytest.raises(UserError) as caught:
        read(path, ReadOptions(**options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("row", "caption", "counted"),
    [
        ({"file_name": "05.png", "text": " x \n"}, "x", None),
        ({"file_name": "./05.png", "text": "two\nlines", "bbox": [1, 2]}, "two\nlines", None),
        ({"text": "x", "file_name": "below/../05.png"}, "x", None),
        ({"file_name": "05.PNG", "text": "x"}, "x", SIMILAR_NAME),
        ({"file_name": "05.png", "text": ""}, "", EMPTY_CAPTION),
        ({"file_name": "05.png", "text": None}, "", NO_CAPTION),
        ({"file_name": "05.png"}, "", NO_CAPTION),
    ],
)
def test_rows_of_metadata(folder, caplog, row, caption, counted):
    listing = read(write(folder, [*entries(n05=row), "", "  "]))
    assert listing.rows[5] == (f"{folder}/05.png", caption, 0, 6) and len(listing.rows) == 20
    assert listing.counts == ({counted: 1} if counted else {})
    assert (counted is None) == all(record.levelname == "INFO" for record in caplog.records)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"text": "x"}, "it names no image"),
        ({"file_name": None, "text": "x"}, "it names no image"),
        ({"file_name": "", "text": "x"}, "it names no image"),
        ({"file_name": 5, "text": "x"}, "its image is a int, not a file name"),
        ({"file_name": ["05.png"], "text": "x"}, "its image is a list, not a file name"),
        ({"file_name": "gone.png", "text": "x"}, "the image does not exist"),
        ({"file_name": "05.png/05.png", "text": "x"}, "the image does not exist"),
        ({"file_name": "x" * 5000, "text": "x"}, "the image does not exist"),
        ({"file_name": "0\0.png", "text": "x"}, "zero byte"),
        ({"file_name": "C:\\data\\05.png", "text": "x"}, "the image does not exist"),
        ({"file_name": "05.png", "text": 5}, "its caption is a int, not a text"),
        ({"file_name": "05.png", "text": ["a", "b"]}, "its caption is a list, not a text"),
        ({"file_name": "05.png", "text": {"en": "x"}}, "its caption is a dict"),
        ({"file_name": "05.png", "text": "x\0"}, "zero byte"),
        ({"file_name": "05.png", "text": "\ud800"}, "surrogate"),
        ({"file_name": "05.png", "text": "x" * 200_000}, "its caption has 200,000 characters, at most 131,072"),
        ({}, "it names no image"),
    ],
)
def test_an_unusable_row_is_left_out_with_its_line(folder, caplog, row, fault):
    listing = read(write(folder, entries(n05=row)))
    assert len(listing.rows) == 19
    [(_, reason)] = listing.left_out
    assert reason.startswith("line 6: ") and fault in reason and "1 of 20 rows left out" in caplog.text


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ("{", "line 6 is not valid JSON"),
        ("05.png,a cat", "line 6 is not valid JSON"),
        ('{"file_name": "05.png"} {}', "line 6 is not valid JSON"),
        ('{"file_name": "05.png", "file_name": "06.png"}', 'line 6 is not valid JSON: "file_name" is given twice'),
        ('["05.png", "x"]', "line 6 is no JSON object: write one JSON object on each line"),
        ('"05.png"', "line 6 is no JSON object"),
        ("[" * 100_000, "line 6 is not valid JSON: it is nested too deeply"),
        ('{"file_name": "05.png", "n": ' + "1" * 5000 + "}", "line 6 is not valid JSON: a number of 5,000 digits"),
    ],
)
def test_a_line_that_is_no_json_object_is_refused(folder, row, fault):
    message = refusal(write(folder, entries(n05=row)))
    assert message.startswith(f"{folder}/metadata.jsonl") and fault in message


@pytest.mark.parametrize("name", ["../outside.png", "/etc/hostname", "below/../../outside.png", ".."])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "json"])
def test_a_name_that_leads_out_of_the_folder_is_refused(folder, name, kind):
    if kind == "jsonl":
        write(folder, entries(n05={"file_name": name, "text": "x"}))
    elif kind == "csv":
        write(folder, ["file_name,text", *["00.png,x"] * 4, f"{name},x"], "metadata.csv")
    else:
        write_json(folder, {**{f"{number:02d}": {"caption": "x"} for number in range(5)}, name: {"caption": "x"}})
    message = refusal(folder)
    assert "6: " in message and f"{name} is outside the folder" in message


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "has nothing in it"),
        (b"\n\n", "has nothing in it"),
        (b"\xef\xbb\xbf", "has nothing in it"),
        ('{"file_name": "00.png", "text": "x"}\n'.encode("utf-16"), "is UTF-16: save it as UTF-8"),
        ('{"file_name": "00.png", "text": "x"}\n{"text": "中国的猫"}'.encode("gb18030"), "line 2: not a UTF-8 text"),
        (b'{"file_name": "00.png", "caption": "x"}\n', "has no 'text' in any line, only 'file_name', 'caption'"),
        (b'{"file_nam": "00.png", "text": "x"}\n', "has no 'file_name' in any line, only 'file_nam', 'text' (nearest"),
        (b"{}\n", "has no 'file_name' in any line"),
        (b"\x1f\x8b\x08\0", "not a UTF-8 text file"),
    ],
)
def test_a_metadata_file_that_is_none_is_refused(folder, content, fault):
    (folder / "metadata.jsonl").write_bytes(content)
    message = refusal(folder)
    assert f"{folder}/metadata.jsonl" in message and fault in message


def test_other_names_of_columns(folder):
    write(folder, [{"image": "00.png", "caption": "x"}])
    assert read(folder, ReadOptions(image_column="image", caption_column="caption")).rows[0].caption == "x"


def test_an_image_may_have_several_captions_and_others_none(folder, caplog):
    caplog.set_level("INFO")
    listing = read(write(folder, entries(more={"file_name": "03.png", "text": "again"}, n07=None)))
    assert [row.caption for row in listing.rows[3:5]] == ["image 3", "again"]
    assert listing.counts == {NOT_LISTED: 1} and "not named by the metadata and are not used: 07.png" in caplog.text


def test_metadata_may_lie_in_folders_below_but_not_name_an_image_twice(folder):
    for name in ("b", "a"):
        (folder / name).mkdir()
        (folder / name / "x.png").write_bytes(IMAGE)
        write(folder / name, [{"file_name": "x.png", "text": name}])
    listing = read(folder)
    assert [(listing.name(row), row.caption, row.subset) for row in listing.rows] == [
        ("x.png", "a", 0),
        ("x.png", "b", 1),
    ]
    assert listing.where(listing.rows[1]) == f"{folder}/b/metadata.jsonl, line 1"
    write(folder, [{"file_name": "a/x.png", "text": "c"}])
    assert f"{folder}/a/x.png is named by" in refusal(folder)


def test_two_metadata_files_in_a_folder_are_refused(folder):
    write(folder, ["file_name,text", "00.png,x"], "metadata.csv")
    assert "metadata.jsonl and metadata.csv: keep one" in refusal(write(folder, entries()))


def test_of_split_folders_train_is_read(folder, caplog):
    for split in ("train", "test", "validation"):
        (folder / split).mkdir()
        os.rename(folder / "00.png", folder / split / "00.png")
        (folder / "00.png").write_bytes(IMAGE)
        write(folder / split, [{"file_name": "00.png", "text": split}])
    assert [row.caption for row in read(folder).rows] == ["train"]
    assert "train is used, and not test, validation" in caplog.text


def test_of_one_metadata_file_with_splits_the_rows_of_train_are_read(folder, caplog):
    for split in ("train", "test"):
        (folder / split).mkdir()
        (folder / split / "x.png").write_bytes(IMAGE)
    listing = read(write(folder, [{"file_name": f"{split}/x.png", "text": split} for split in ("test", "train")]))
    assert [row.caption for row in listing.rows] == ["train"] and listing.counts[OTHER_SPLIT] == 1


def test_a_csv_has_the_errors_of_img_txt_csv(folder):
    write(folder, ["dir,text", "00.png,x"], "metadata.csv")
    assert "metadata.csv has no column 'file_name', only 'dir', 'text'" in refusal(folder)
    write(folder, ["file_name,text", "00.png,x", '01.png,"x'], "metadata.csv")
    assert "metadata.csv, line 3: " in refusal(folder)


def test_parquet_has_its_own_errors(folder):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = folder / "metadata.parquet"
    for content in (b"", b"PAR1", b"x" * 100, b"PAR1" + b"\xff" * 100 + b"PAR1"):
        path.write_bytes(content)
        assert "metadata.parquet is no readable Parquet file" in refusal(folder)
    parquet.write_table(pyarrow.table({"file_name": ["00.png"], "caption": ["x"]}), path)
    assert "has no column 'text', only 'file_name', 'caption'" in refusal(folder)
    parquet.write_table(
        pyarrow.table({"file_name": pyarrow.array([], "string"), "text": pyarrow.array([], "string")}), path
    )
    assert "has no rows" in refusal(folder)
    names = [f"{number:02d}.png" for number in range(20)]
    parquet.write_table(pyarrow.table({"file_name": [*names, "gone.png"], "text": ["x"] * 19 + [None, "x"]}), path)
    listing = read(folder)
    assert listing.left_out == [("gone.png", "row 21: the image does not exist")] and listing.counts == {NO_CAPTION: 1}
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "is no readable Parquet file" in refusal(folder)


def test_without_pyarrow_the_error_says_what_to_install(folder, monkeypatch):
    (folder / "metadata.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "metadata.parquet needs pyarrow, which is not installed: pip install 'pyarrow" in refusal(folder)


@pytest.mark.parametrize(
    ("key", "entry", "caption"),
    [
        ("05", {"caption": "a cat"}, "a cat"),
        ("05.png", {"caption": "a cat"}, "a cat"),
        ("{folder}/05.png", {"caption": "a cat"}, "a cat"),
        ("{folder}/05", {"caption": "a cat"}, "a cat"),
        ("05", {"caption": "a cat", "tags": "fur, paws"}, "a cat, fur, paws"),
        ("05", {"caption": "one\ntwo", "tags": "fur"}, "one, fur\ntwo, fur"),
        ("05", {"tags": "fur, paws"}, "fur, paws"),
        ("05", {"caption": "a cat", "tags": ""}, "a cat"),
        ("05", {"caption": "a cat", "tags": None, "train_resolution": [512, 448]}, "a cat"),
        ("05", {"caption": ""}, ""),
        ("05", {}, ""),
        ("v1.5", {"caption": "a name with a dot"}, "a name with a dot"),
        ("odd", {"caption": "a suffix in mixed case"}, "a suffix in mixed case"),
        ("UP", {"caption": "a suffix in upper case"}, "a suffix in upper case"),
    ],
)
def test_entries_of_kohyas_json(folder, key, entry, caption):
    for name in ("v1.5.png", "odd.Jpg", "UP.JPG"):
        (folder / name).write_bytes(IMAGE)
    keys = {f"{number:02d}": {"caption": "x"} for number in range(20) if number != 5}
    listing = read(write_json(folder, {**keys, key.format(folder=folder): entry}))
    assert [row.caption for row in listing.rows if row.caption != "x"] == [caption]
    assert len(listing.rows) == 20 and listing.left_out == []


@pytest.mark.parametrize(
    ("entry", "fault"),
    [
        ({"05": "a cat"}, "its entry is no object"),
        ({"05": ["a cat"]}, "its entry is no object"),
        ({"05": {"caption": 5}}, "its caption is a int"),
        ({"05": {"caption": "x", "tags": ["a", "b"]}}, "its caption or its tags are no text"),
        ({"05": {"tags": ["a", "b"]}}, "its caption is a list"),
        ({"gone": {"caption": "x"}}, "the image does not exist"),
        ({"": {"caption": "x"}}, "it names no image"),
        ({"twin": {"caption": "x"}}, "two images have this name: twin.jpg and twin.png"),
    ],
)
def test_an_unusable_entry_is_left_out_with_its_number(folder, entry, fault):
    for suffix in ("png", "jpg"):
        (folder / f"twin.{suffix}").write_bytes(IMAGE)
    keys = {f"{number:02d}": {"caption": "x"} for number in range(20) if number != 5}
    [(_, reason)] = read(write_json(folder, {**keys, **entry})).left_out
    assert reason.startswith("entry 20: ") and fault in reason


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("", "line 1 is not valid JSON"),
        ("{", "is not valid JSON"),
        ("[]", "has no entries of images"),
        ("{}", "has no entries of images"),
        ('{"00": "a cat"}', "has no entries of images"),
        ('"x"', "has no entries of images"),
        ('{"00": {"caption": "x"}, "00": {"caption": "y"}}', '"00" is given twice'),
        ('{"00": {"caption": "x", "caption": "y"}}', '"caption" is given twice'),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_json_that_is_no_metadata_is_refused(folder, content, fault):
    message = refusal(write_json(folder, content))
    assert f"{folder}/meta_cap.json" in message and fault in message


def test_several_kohya_files_are_ambiguous_and_one_may_be_given(folder):
    for name in ("meta_cap.json", "meta_lat.json"):
        write_json(folder, {"00": {"caption": name}}, name)
    assert "has 2 metadata files (meta_cap.json, meta_lat.json): give the path of one" in refusal(folder)
    assert read(folder / "meta_lat.json").rows[0].caption == "meta_lat.json"
