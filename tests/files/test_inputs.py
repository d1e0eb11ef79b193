"""Files that users name are opened and read, and errors name what is found instead of a file."""

from __future__ import annotations

import hashlib
import os
import socket

import pytest

from ldm.errors import UserError, plain
from ldm.files.inputs import (
    check_file,
    content_hash,
    file_status,
    is_file,
    is_folder,
    is_there,
    list_folder,
    open_file,
    read_bytes,
    read_small_text,
    read_text,
    text_lines,
)

READERS = (open_file, check_file, content_hash, read_bytes, read_text)


@pytest.fixture
def places(tmp_path):
    """A folder with every kind of file, and links to them."""
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "socket"))
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "dead").symlink_to(tmp_path / "nowhere")
    for name in ("file", "folder", "pipe", "socket"):
        (tmp_path / f"link-{name}").symlink_to(tmp_path / name)
    yield tmp_path
    server.close()


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    "name, words",
    [
        ("folder", "is a folder, not a file"),
        ("link-folder", "is a folder, not a file"),
        ("pipe", "is a pipe"),
        ("link-pipe", "is a pipe"),
        ("device", "is a device"),
        ("socket", "cannot be read|is a socket"),
        ("circle", "circle: choose another path"),
        ("dead", "does not exist: give a.png"),
        ("nowhere", "does not exist: give a.png"),
        ("file/inside", "does not exist: give a.png"),
        ("x" * 300, "File name too long: choose a shorter path"),
        ("a\0b", "is not a valid path"),
    ],
)
def test_anything_but_a_file_is_refused_by_name(read, name, words, places):
    with pytest.raises(UserError, match=words) as error:
        read(places / name if "\0" not in name else f"{places}/{name}", "data_path", "give a.png")
    assert str(error.value).startswith("data_path ") and len(str(error.value)) < 400


def test_a_file_is_read_through_a_link(places):
    for name in ("file", "link-file"):
        assert read_bytes(places / name) == b"content" and read_text(places / name) == "content"
        with open_file(places / name) as file:
            assert file.read() == b"content"


@pytest.mark.parametrize("read", READERS)
def test_a_missing_permission_is_named(read, unprivileged):
    (unprivileged / "closed").mkdir()
    for path in (unprivileged / "closed" / "a", unprivileged / "b"):
        path.touch()
    (unprivileged / "b").chmod(0)
    (unprivileged / "closed").chmod(0)
    for path in (unprivileged / "closed" / "a", unprivileged / "b"):
        with pytest.raises(UserError, match="Permission denied: give this user the permission"):
            read(path)


def test_the_status_distinguishes_files_and_folders(places):
    assert is_file(places / "link-file") and not is_folder(places / "link-file") and is_there(places / "link-file")
    assert is_folder(places / "link-folder") and not is_file(places / "link-folder")
    assert is_there(places / "pipe") and not is_file(places / "pipe") and not is_folder(places / "pipe")
    assert file_status(places / "file").st_size == 7
    for name in ("nowhere", "dead", "file/inside"):
        assert file_status(places / name) is None and not is_there(places / name)


def test_an_inaccessible_path_is_refused_by_name(places, unprivileged):
    (unprivileged / "closed").mkdir(0)
    for path in (unprivileged / "closed" / "a", "x" * 300, "a\0b"):
        for ask in (file_status, is_there, is_file, is_folder):
            with pytest.raises(UserError, match="data_path"):
                ask(path, "data_path")
    with pytest.raises(UserError, match="Permission denied"):
        list_folder(unprivileged / "closed")


def test_a_folder_is_listed_in_sorted_order(places):
    assert list_folder(places)[:3] == ["circle", "dead", "device"]
    for name in ("file", "nowhere"):
        with pytest.raises(UserError, match=f"{name} cannot be read"):
            list_folder(places / name)


def test_large_files_are_refused(places):
    assert read_bytes(places / "file", most=7) == b"content"
    with pytest.raises(UserError, match="has 7 bytes, at most 6 are read"):
        read_bytes(places / "file", most=6)
    with pytest.raises(UserError, match="at most 6"):
        read_text(places / "file", most=6)


@pytest.mark.parametrize(
    "raw, text", [(b"\xef\xbb\xbfa\n", "a\n"), (b"a\r\nb\rc", "a\nb\nc"), ("\u2028é".encode(), "\u2028é"), (b"", "")]
)
def test_texts_are_utf8_with_any_line_ends(raw, text, tmp_path):
    (tmp_path / "a.txt").write_bytes(raw)
    assert read_text(tmp_path / "a.txt") == text


@pytest.mark.parametrize(
    "raw, words",
    [
        ("红".encode("utf-16"), "UTF-16: save it as UTF-8"),
        (b"a\n" + "红".encode("gbk"), "line 2: not a UTF-8 text file: save it as UTF-8"),
        (b"a\nb\nc\0", "line 3: not a text file"),
    ],
)
def test_another_encoding_is_refused_with_its_line(raw, words, tmp_path):
    (tmp_path / "a.txt").write_bytes(raw)
    with pytest.raises(UserError, match=words):
        read_text(tmp_path / "a.txt")


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a red apple, 红苹果", "a red apple, 红苹果"),
        ("\x1b[31mred\x07\x7f\x9b", r"\x1b[31mred\x07\x7f\x9b"),
        ("two\nlines\tand\r\nmore\u2028x", "two lines and  more x"),
        ("\u202eright to left\u200b", r"\u202eright to left\u200b"),
        (os.fsdecode(b"\xba\xec.png"), r"\xba\xec.png"),
        ("\ud800", r"\ud800"),
    ],
)
def test_untrusted_text_is_escaped(text, shown):
    assert plain(text) == shown


def test_the_middle_of_a_long_text_is_left_out():
    shown = plain("begin" + "x" * 10**7 + "end")
    assert len(shown) == 200 and shown.startswith("beginx") and shown.endswith("xend") and " ... " in shown


def test_content_hash_is_the_sha256_of_the_bytes(tmp_path):
    content = bytes(range(256)) * 10_000
    (tmp_path / "x").write_bytes(content)
    assert content_hash(tmp_path / "x") == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    "content",
    [
        "", "\ufeff", "a", "a\n", "\n\n", "a\r\nb\r\n", "a\rb\r", "a\r\n\rb", "\ufeffa\nb",
        "ä\u2028猫\x0b\x1c\n😀", "a\n" * 1000,
    ],
)  # fmt: skip
def test_lines_and_small_texts_are_those_of_the_whole_text(tmp_path, content):
    (tmp_path / "text").write_bytes(content.encode())
    text = read_text(tmp_path / "text")
    lines = list(text_lines(tmp_path / "text"))
    assert "".join(lines).removesuffix("\n") == text.removesuffix("\n")
    assert all(line.count("\n") <= 1 for line in lines)
    assert read_small_text(str(tmp_path / "text")) == text


@pytest.mark.parametrize(
    "content",
    [
        "a\nb".encode("utf-16"), "a\nb\n中国".encode("gb18030"), b"a\nb\n\xff", b"a\n\0", b"\0", b"x" * 2000, "folder",
        "fifo", "/dev/zero", "nowhere",
    ],
)  # fmt: skip
def test_lines_and_small_texts_have_the_errors_of_the_whole_text(tmp_path, content):
    path = tmp_path / "text"
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    if isinstance(content, str):
        path.symlink_to(content)
    else:
        path.write_bytes(content)
    errors = set()
    for read in (read_text, lambda *args, **limits: list(text_lines(*args, **limits)), read_small_text):
        with pytest.raises(UserError) as caught:
            read(str(path), way="do this", most=1000)
        errors.add(str(caught.value))
    assert len(errors) == 1 and str(path) in errors.pop()


def test_a_small_text_is_read_whole_though_the_system_returns_it_in_parts(tmp_path, monkeypatch):
    (tmp_path / "text").write_text("a caption of a cat")
    read = os.read
    monkeypatch.setattr("ldm.files.inputs.os.read", lambda handle, count: read(handle, min(count, 5)))
    assert read_small_text(str(tmp_path / "text")) == "a caption of a cat"


def test_a_line_that_is_too_long_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.files.inputs.MAX_LINE", 10)
    (tmp_path / "text").write_text("short\n" + "x" * 11)
    with pytest.raises(UserError, match="line 2: more than 10 bytes"):
        list(text_lines(tmp_path / "text"))
