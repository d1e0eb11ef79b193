"""Tar shards: what is a sample, and shards that are damaged in every place."""

from __future__ import annotations

import io
import json
import tarfile

import pytest

from ldm.data.sources import read, tar_files
from ldm.data.sources.rows import CLASS_TOKENS, NO_CAPTION, OTHER_FILES, FilePart, ReadOptions, read_image
from ldm.data.sources.tar_files import tar_members
from ldm.errors import UserError
from tests.data.sources import layouts
from tests.data.sources.layouts import CAPTIONS, IMAGES, add_member, image_bytes

IMAGE = image_bytes(0)


def shard(path, members, format=tarfile.PAX_FORMAT, **settings):
    with tarfile.open(path, "w", format=format, **settings) as tar:
        for name, content in members:
            add_member(tar, name, content if isinstance(content, bytes) else content.encode())
    return path


def pairs(count=20, **changed):
    """Members 00.png, 00.txt, ...; changed={"05.txt": b"..."} replaces one, None takes it away."""
    members = {}
    for number in range(count):
        members |= {f"{number:02d}.png": IMAGE, f"{number:02d}.txt": f"image {number}"}
    return [(name, content) for name, content in {**members, **changed}.items() if content is not None]


def refusal(path, **options):
    with pytest.raises(UserError) as caught:
        read(path, ReadOptions(**options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("suffix", [".txt", ".caption", ".json"])
def test_every_form_of_tar_and_caption_gives_the_same_rows(tmp_path, format, suffix):
    listing = read(layouts.tar_shards(tmp_path, suffix, format))
    assert [(row.image.name, row.caption) for row in listing.rows] == list(CAPTIONS.items())
    assert [read_image(row.image, 10_000) for row in listing.rows] == list(IMAGES.values())
    assert listing.where(listing.rows[0]) == f"{tmp_path}/00001.tar, byte {listing.rows[0].image.offset:,}"


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_longer_than_a_header_and_not_utf8(tmp_path, format):
    name = "深い/" * 60 + "x" * 150
    listing = read(shard(tmp_path / "a.tar", [(f"./{name}.png", IMAGE), (f"./{name}.txt", "long")], format))
    assert [(row.image.name, row.caption) for row in listing.rows] == [(f"{name}.png", "long")]


def test_members_are_those_of_tarfile(tmp_path):
    path = shard(tmp_path / "a.tar", pairs())
    with tarfile.open(path) as tar:
        expected = [(member.name, member.offset_data, member.size) for member in tar]
    assert [member[:3] for member in tar_members(str(path))] == expected


def test_a_large_member_is_not_read(tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        member = tarfile.TarInfo("a.png")
        member.size = 9 << 30  # a size that octal digits do not hold
        tar.addfile(member)
        tar.fileobj.seek(member.size - (tar.fileobj.tell() - 512) + 512, io.SEEK_SET)
    with open(tmp_path / "a.tar", "r+b") as file:
        file.seek((9 << 30) + 512)
        file.write(tarfile.TarInfo("a.txt").tobuf() + bytes(1024))
    read_bytes = []

    class CountingFile(io.FileIO):
        def readinto(self, buffer):
            read_bytes.append(super().readinto(buffer))
            return read_bytes[-1]

    monkeypatch.setattr(tar_files, "open_file", lambda path, **options: io.BufferedReader(CountingFile(path)))
    assert [(member.name, member.size) for member in tar_members(str(tmp_path / "a.tar"))] == [
        ("a.png", 9 << 30),
        ("a.txt", 0),
    ]
    assert 0 < sum(read_bytes) < 1_000_000


def test_folders_links_and_other_members_are_passed_over(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            member = tarfile.TarInfo("x.png")
            member.type, member.linkname = kind, "/etc/hostname"
            tar.addfile(member)
        add_member(tar, "a.png", IMAGE)
        add_member(tar, "a.cls", b"5")
        add_member(tar, "a.TXT", b"a cat")
        add_member(tar, "README", b"no suffix")
        add_member(tar, "folder/.hidden", b"")
    listing = read(path)
    assert [(row.image.name, row.caption) for row in listing.rows] == [("a.png", "a cat")]
    assert listing.counts == {OTHER_FILES: 3}


def test_of_several_captions_txt_is_used_and_json_gives_the_named_field(tmp_path):
    fields = json.dumps({"caption": "field", "title": "other"})
    path = shard(
        tmp_path / "a.tar",
        [("a.json", fields), ("a.png", IMAGE), ("a.txt", "text"), ("b.jpg", IMAGE), ("b.json", fields)],
    )
    assert [row.caption for row in read(path).rows] == ["text", "field"]
    assert [row.caption for row in read(path, ReadOptions(caption_column="title")).rows] == ["text", "other"]


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"05.txt": "a cat".encode("utf-16")}, "its .txt is UTF-16: save it as UTF-8"),
        (
            {"05.txt": "中国的猫".encode("gb18030")},
            "its .txt, line 1: not a UTF-8 text file: save it as UTF-8 (it may be GBK)",
        ),
        ({"05.txt": b"a\0"}, "zero byte"),
        ({"05.txt": b"x" * 600_000}, "its .txt has 600,000 bytes, at most 524,288"),
        ({"05.txt": b"x" * 140_000}, "its caption has 140,000 characters"),
        ({"05.png": b""}, "the image is an empty file"),
        ({"05.png": None}, "no image follows or precedes its caption"),
        ({"19.jpg": IMAGE}, "two images of this name: 19.png and 19.jpg"),
        ({"19.TXT": "again"}, "it has two .txt members"),
        ({"05.txt": None, "20.png": IMAGE, "20.json": "{"}, "its .json line 1 is not valid JSON"),
        ({"20.png": IMAGE, "20.json": "[]"}, "its .json is no object"),
        ({"20.png": IMAGE, "20.json": '{"text": 5}'}, "its caption is a int"),
        ({"20.png": IMAGE, "20.json": '{"text": "' + "x" * 2_000_000 + '"}'}, "its .json has 2,000,012 bytes"),
    ],
)
def test_an_unusable_sample_is_left_out_with_its_byte(tmp_path, changed, fault):
    listing = read(shard(tmp_path / "a.tar", pairs(**changed)))
    [(name, reason)] = listing.left_out
    assert name.split(".")[0] in ("05", "19", "20") and reason.startswith("a.tar, byte ") and fault in reason
    assert len(listing.rows) >= 19


def test_an_image_that_is_too_large_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.data.sources.tar_shards.MAX_IMAGE_BYTES", len(IMAGE))
    path = shard(tmp_path / "a.tar", pairs(**{"05.png": IMAGE + b"x"}))
    assert "at most" in read(path).left_out[0][1]


@pytest.mark.parametrize("extension", ["tags", ".TAGS"])
def test_an_own_extension_may_be_given_without_its_dot(tmp_path, extension):
    path = shard(tmp_path / "a.tar", [("a.png", IMAGE), ("a.tags", "fur"), ("a.txt", "not this")])
    assert [row.caption for row in read(path, ReadOptions(caption_extension=extension)).rows] == ["fur"]


def test_a_field_that_is_set_and_missing_is_named(tmp_path):
    members = [*pairs(), ("20.png", IMAGE), ("20.json", '{"titel": "x"}')]
    [(_, reason)] = read(shard(tmp_path / "a.tar", members), ReadOptions(caption_column="title")).left_out
    assert "its .json has no 'title', only 'titel' (nearest: 'titel')" in reason


def test_missing_captions_are_counted_and_none_at_all_are_refused(tmp_path):
    assert read(shard(tmp_path / "a.tar", pairs(**{"05.txt": None}))).counts == {NO_CAPTION: 1}
    shard(tmp_path / "a.tar", [("a.png", IMAGE), ("b.png", IMAGE)])
    assert "2 images and no caption: put a .txt" in refusal(tmp_path)
    assert read(tmp_path, ReadOptions(class_tokens="dog")).counts == {CLASS_TOKENS: 2}


def test_names_that_lead_out_are_names_only(tmp_path):
    """Nothing is unpacked, so a member's name has no effect on any file."""
    listing = read(shard(tmp_path / "a.tar", [("../../etc/x.png", IMAGE), ("../../etc/x.txt", "x")]))
    assert listing.rows[0].image.name == "../../etc/x.png"


def test_an_image_of_the_same_name_in_two_shards_or_apart_in_one_is_refused(tmp_path):
    shard(tmp_path / "a.tar", pairs(3))
    shard(tmp_path / "b.tar", pairs(1))
    message = refusal(tmp_path)
    assert "00.png is in" in message and f"{tmp_path}/a.tar, byte" in message and f"{tmp_path}/b.tar, byte" in message
    (tmp_path / "b.tar").unlink()
    shard(tmp_path / "a.tar", [*pairs(2), *pairs(1)])
    assert "00.png is in" in refusal(tmp_path)


def damaged(tmp_path, change):
    whole = bytearray(shard(tmp_path / "a.tar", pairs(), tarfile.USTAR_FORMAT).read_bytes())
    (tmp_path / "a.tar").write_bytes(change(whole))
    return tmp_path


HEADER = 10 * 1024  # of the eleventh member; each takes a block for its header and one for its content


def replaced(whole, offset, content):
    whole[offset : offset + len(content)] = content
    return whole


@pytest.mark.parametrize(
    ("change", "place", "reason"),
    [
        (lambda whole: replaced(whole, HEADER + 3, b"?"), HEADER, "a header is damaged"),
        (lambda whole: replaced(whole, HEADER + 124, b"9999"), HEADER, "a header is damaged"),
        (lambda whole: replaced(whole, HEADER + 148, b"zzzz"), HEADER, "a header is damaged"),
        (lambda whole: replaced(whole, HEADER, b"\xff" * 512), HEADER, "a header is damaged"),
        (lambda whole: whole[: HEADER + 100], HEADER, "a header is cut off"),
        (lambda whole: whole[: HEADER + 512 + 10], HEADER, "the file ends before that"),
        (lambda whole: whole[:HEADER] + whole[HEADER + 7 :], HEADER, "a header is damaged"),
        (lambda whole: replaced(whole, HEADER, bytes(512)) + bytes(2 << 20), HEADER, "bytes follow the end mark"),
    ],
)
def test_a_shard_that_is_broken_in_the_middle_is_refused_with_the_byte(tmp_path, change, place, reason):
    path = damaged(tmp_path, change) / "a.tar"
    message = refusal(tmp_path)
    assert message.startswith(f"{path} is broken at byte {place:,}: ") and reason in message


def test_a_shard_without_an_end_mark_is_read_with_a_warning(tmp_path, caplog):
    assert len(read(damaged(tmp_path, lambda whole: whole[: 40 * 1024])).rows) == 20
    assert "it may be cut off" in caplog.text


def test_random_damage_gives_rows_or_an_error_and_nothing_else(tmp_path):
    import random

    draw, ends = random.Random(0), set()
    whole = shard(tmp_path / "a.tar", pairs(4)).read_bytes()
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(draw.choice((1, 4, 64))):
            content[draw.randrange(len(content))] = draw.randrange(256)
        (tmp_path / "a.tar").write_bytes(content[: draw.choice((len(whole), draw.randrange(len(whole))))])
        try:
            read(tmp_path, ReadOptions(max_bad_fraction=1.0))
            ends.add("rows")
        except UserError:
            ends.add("error")
    assert ends == {"rows", "error"}


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "is an empty file"),
        (b"x" * 2000, "is no tar file"),
        (IMAGE, "is no tar file"),
        (
            b"\x1f\x8b\x08" + bytes(2000),
            "is compressed with gzip, in which no image can be found: decompress it (gunzip)",
        ),
        (b"\x28\xb5\x2f\xfd" + bytes(2000), "is compressed with zstd"),
        (bytes(10240), "has no rows"),
    ],
)
def test_a_file_that_is_no_tar_is_refused(tmp_path, content, fault):
    (tmp_path / "a.tar").write_bytes(content)
    assert fault in refusal(tmp_path)


def test_an_image_whose_file_has_changed_is_refused(tmp_path):
    path = shard(tmp_path / "a.tar", pairs(1))
    image = read(path).rows[0].image
    with pytest.raises(UserError, match="at most 10 are read"):
        read_image(image, 10)
    path.write_bytes(path.read_bytes()[: image.offset + 20])
    with pytest.raises(UserError, match="is cut off: the file has changed"):
        read_image(image, 10_000)
    path.unlink()
    with pytest.raises(UserError, match="does not exist"):
        read_image(image, 10_000)
    assert isinstance(image, FilePart)
