"""The key of an array covers everything that it is computed from."""

import hashlib
import os

import pytest

from ldm.data.content import content_key, file_hash
from ldm.errors import UserError


def test_a_key_is_64_hex_digits_of_all_parts(tmp_path):
    assert len(content_key("latents", "abc", 512)) == 64
    assert content_key("latents", "abc", 512) == content_key("latents", "abc", 512)


def test_the_key_depends_on_every_part_its_type_and_its_place():
    lists = [
        ("a",),
        ("a", "b"),
        ("ab",),
        ("b", "a"),
        ("a", ""),
        ("", "a"),
        (1,),
        ("1",),
        (1.0,),
        (b"1",),
        (b"'1'",),
        (),
    ]
    assert len({content_key(*parts) for parts in lists}) == len(lists)


def test_a_file_is_identified_by_its_content_not_its_name(tmp_path):
    for name, content in (("a.png", b"one"), ("b.png", b"one"), ("c.png", b"two")):
        (tmp_path / name).write_bytes(content)
    assert content_key(tmp_path / "a.png") == content_key(tmp_path / "b.png") != content_key(tmp_path / "c.png")
    before = content_key(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(b"changed")
    assert content_key(tmp_path / "a.png") != before


def test_a_file_that_is_gone_is_named(tmp_path):
    with pytest.raises(UserError, match="gone.png"):
        content_key(tmp_path / "gone.png")


@pytest.mark.parametrize("target", ["fifo", "/dev/zero", "folder"])
def test_only_a_regular_file_has_a_key(tmp_path, target):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.png").symlink_to(target)
    with pytest.raises(UserError, match="a.png is a (pipe|device|folder).*not a file: check data_path"):
        content_key(tmp_path / "a.png")


def test_the_key_of_a_file_is_that_of_its_bytes(tmp_path):
    """Caches of earlier versions stay valid."""
    content = bytes(range(256)) * 10_000
    (tmp_path / "a").write_bytes(content)
    assert content_key(file_hash(tmp_path / "a")) == content_key(tmp_path / "a")
    expected = hashlib.sha256(b"file" + hashlib.sha256(content).digest()).hexdigest()
    assert content_key(tmp_path / "a") == expected
