"""Folders that save_to_disk of Hugging Face's datasets writes."""

from __future__ import annotations

import json
import os
import shutil
import struct

import pytest

pyarrow = pytest.importorskip("pyarrow")

from ldm.data.sources import read  # noqa: E402
from ldm.data.sources.rows import EMPTY_CAPTION, NO_CAPTION, ReadOptions, read_image  # noqa: E402
from ldm.errors import UserError  # noqa: E402
from tests.data.sources import layouts  # noqa: E402
from tests.data.sources.layouts import CAPTIONS, IMAGES, image_bytes  # noqa: E402

IMAGE = image_bytes(0)
STRUCT = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def save(folder, rows, kind=STRUCT, columns=("image", "text"), options=None, file_format=False, text=None):
    """Write (image, caption) rows as the only Arrow file of a saved data set."""
    folder.mkdir(exist_ok=True)
    images, captions = zip(*rows)
    arrays = [pyarrow.array(images, kind), pyarrow.array(captions, text)]
    table = pyarrow.table(arrays, names=list(columns))
    new = pyarrow.ipc.new_file if file_format else pyarrow.ipc.new_stream
    with pyarrow.OSFile(str(folder / "data.arrow"), "wb") as file, new(file, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=7)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def sound(count=20):
    return [({"bytes": IMAGE + bytes([n]), "path": f"{n:02d}.png"}, f"image {n}") for n in range(count)]


def refusal(path, **options):
    with pytest.raises(UserError) as caught:
        read(path, ReadOptions(**options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("images", ["struct", "path"])
def test_images_may_be_bytes_or_paths(tmp_path, images):
    listing = read(layouts.saved_dataset(tmp_path / "data", images))
    assert [read_image(row.image, 10_000) for row in listing.rows] == list(IMAGES.values())
    assert [row.caption for row in listing.rows] == list(CAPTIONS.values())
    assert listing.where(listing.rows[0]).endswith(", row 2")


@pytest.mark.parametrize("kind", [pyarrow.binary(), pyarrow.large_binary()])
@pytest.mark.parametrize("file_format", [False, True])
def test_images_without_names_keep_the_order_of_the_file(tmp_path, kind, file_format):
    rows = [(image["bytes"], text) for image, text in sound()]
    listing = read(save(tmp_path, rows, kind, file_format=file_format, text=pyarrow.large_string()))
    assert [read_image(row.image, 10_000) for row in listing.rows] == [image for image, _ in rows]
    assert [listing.name(row) for row in listing.rows[:2]] == ["000000000", "000000001"]
    assert [row.caption for row in listing.rows] == [text for _, text in rows]


def test_other_names_of_columns(tmp_path):
    save(tmp_path, sound(), columns=("picture", "caption"))
    assert "has no column 'image', only 'picture', 'caption': set image_column" in refusal(tmp_path)
    assert "has no column 'text', only 'picture', 'caption': set caption_column" in refusal(
        tmp_path, image_column="picture"
    )
    assert len(read(tmp_path, ReadOptions(image_column="picture", caption_column="caption")).rows) == 20


def test_absolute_paths_in_the_folder_are_found_and_others_refused(tmp_path):
    (tmp_path / "x.png").write_bytes(IMAGE)
    listing = read(save(tmp_path, [(str(tmp_path / "x.png"), "x")], pyarrow.string()))
    assert listing.rows[0].image == f"{tmp_path}/x.png"
    for name in ("/etc/hostname", "../x.png"):
        assert f"row 1: {name} is outside the folder" in refusal(save(tmp_path, [(name, "x")], pyarrow.string()))


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ((None, "x"), "it has no image"),
        (({"bytes": None, "path": None}, "x"), "it has no image"),
        (({"bytes": b"", "path": "x.png"}, "x"), "the image is empty"),
        (({"bytes": None, "path": "gone.png"}, "x"), "the image does not exist"),
        (({"bytes": IMAGE, "path": "x.png"}, "x" * 200_000), "its caption has 200,000 characters"),
        (({"bytes": IMAGE, "path": "x.png"}, "x\0"), "zero byte"),
    ],
)
def test_an_unusable_row_is_left_out_with_its_number(tmp_path, row, fault):
    rows = sound()
    rows[5] = row
    listing = read(save(tmp_path, rows))
    [(_, reason)] = listing.left_out
    assert reason == f"row 6: {fault}" or (reason.startswith("row 6: ") and fault in reason)
    expected = [image["bytes"] for number, (image, _) in enumerate(rows) if number != 5]
    assert [read_image(row.image, 10_000) for row in listing.rows] == expected


def test_missing_and_empty_captions_are_counted(tmp_path):
    rows = sound()
    rows[3], rows[4] = (rows[3][0], None), (rows[4][0], "")
    assert read(save(tmp_path, rows)).counts == {NO_CAPTION: 1, EMPTY_CAPTION: 1}


@pytest.mark.parametrize(
    ("kind", "image", "text", "fault"),
    [
        (pyarrow.int64(), 5, "x", "the column 'image' is of the type int64, and images are bytes, paths, or both"),
        (pyarrow.list_(pyarrow.uint8()), [1], "x", "the column 'image' is of the type list"),
        (pyarrow.string(), "x.png", 5, "the column 'text' is of the type int64, and captions are texts"),
        (pyarrow.string(), "x.png", ["x"], "the column 'text' is of the type list"),
    ],
)
def test_a_column_of_another_type_is_refused(tmp_path, kind, image, text, fault):
    assert fault in refusal(save(tmp_path, [(image, text)], kind))


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("state.json", "{", "state.json line 1 is not valid JSON"),
        ("state.json", "[]", "state.json names no data files"),
        ("state.json", "{}", "state.json names no data files"),
        ("state.json", '{"_data_files": []}', "names no data files"),
        (
            "state.json",
            '{"_data_files": [{"filename": "../data.arrow"}]}',
            "../data.arrow is no file name in this folder",
        ),
        ("state.json", '{"_data_files": [{"filename": "/etc/hostname"}]}', "is no file name in this folder"),
        ("state.json", '{"_data_files": [{"filename": 5}]}', "5 is no file name"),
        ("state.json", '{"_data_files": [{"filename": "gone.arrow"}]}', "gone.arrow does not exist"),
        (
            "state.json",
            '{"_data_files": [{"filename": "data.arrow"}], "_indices_data_files": [{}]}',
            "flatten_indices()",
        ),
        ("data.arrow", "", "data.arrow is no readable Arrow file"),
        ("data.arrow", "x" * 1000, "data.arrow is no readable Arrow file"),
        ("data.arrow", "ARROW1" + "x" * 1000, "data.arrow is no readable Arrow file"),
    ],
)
def test_a_damaged_data_set_is_refused(tmp_path, name, content, fault):
    (save(tmp_path, sound()) / name).write_text(content)
    assert fault in refusal(tmp_path)


def test_an_arrow_file_that_is_cut_off_is_refused(tmp_path):
    whole = (save(tmp_path, sound()) / "data.arrow").read_bytes()
    for size in (100, len(whole) // 2, len(whole) - 300):
        (tmp_path / "data.arrow").write_bytes(whole[:size])
        assert "data.arrow is no readable Arrow file" in refusal(tmp_path)


def test_compressed_arrow_files_are_refused(tmp_path):
    options = pyarrow.ipc.IpcWriteOptions(compression="lz4")
    assert "is compressed, in which no image can be found" in refusal(save(tmp_path, sound(), options=options))


def test_of_several_splits_train_is_read(tmp_path, caplog):
    for split in ("train", "test"):
        layouts.saved_dataset(tmp_path / split)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert len(read(tmp_path).rows) == 4 and "the split train is used, and not test" in caplog.text
    shutil.move(tmp_path / "train", tmp_path / "validation")
    assert "has no folder train, which dataset_dict.json names" in refusal(tmp_path)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["validation", "test"]}')
    assert "has the splits validation, test and no train: give the folder of one" in refusal(tmp_path)
    for content in ("{}", '{"splits": []}', '{"splits": [5]}', "[]"):
        (tmp_path / "dataset_dict.json").write_text(content)
        assert "has no list of splits" in refusal(tmp_path)


def test_a_link_instead_of_the_arrow_file_may_lead_anywhere_but_to_no_device(tmp_path):
    save(tmp_path / "data", sound())
    os.rename(tmp_path / "data" / "data.arrow", tmp_path / "elsewhere")
    (tmp_path / "data" / "data.arrow").symlink_to(tmp_path / "elsewhere")
    assert len(read(tmp_path / "data").rows) == 20
    (tmp_path / "data" / "data.arrow").unlink()
    (tmp_path / "data" / "data.arrow").symlink_to("/dev/zero")
    assert "is a device" in refusal(tmp_path / "data")


@pytest.mark.parametrize("end", [-1, 2**31 - 1, 5])
def test_offsets_that_lead_out_of_the_file_are_refused(tmp_path, end):
    size = len(IMAGE) + 1
    whole = bytearray((save(tmp_path, sound()) / "data.arrow").read_bytes())
    at = whole.index(struct.pack("<3i", 0, size, 2 * size))
    whole[at + 8 : at + 12] = struct.pack("<i", end)
    (tmp_path / "data.arrow").write_bytes(whole)
    assert "data.arrow is no readable Arrow file" in refusal(tmp_path)
