"""Files and folders are written under a temporary name and renamed."""

from __future__ import annotations

import os

import pytest

from ldm.files.atomic import atomic_folder, atomic_path, temporary_path


@pytest.mark.parametrize("sync", [True, False])
def test_a_file_gets_its_name_when_it_is_complete(sync, tmp_path):
    target = tmp_path / "new" / "a.png"
    with atomic_path(target, sync) as temporary:
        temporary.write_bytes(b"new")
        assert not target.exists() and temporary.parent == target.parent and temporary.suffix == ".png"
    assert target.read_bytes() == b"new" and os.listdir(target.parent) == ["a.png"]


def test_an_error_leaves_only_the_old_file(tmp_path):
    (tmp_path / "a.png").write_bytes(b"old")
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "a.png") as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert (tmp_path / "a.png").read_bytes() == b"old" and os.listdir(tmp_path) == ["a.png"]


def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    for name in ("old", "new"):
        (tmp_path / f"link-{name}").symlink_to(tmp_path / "disk" / name)
    (tmp_path / "disk" / "old").write_bytes(b"old")
    for name in ("old", "new"):
        with atomic_path(tmp_path / f"link-{name}") as temporary:
            temporary.write_bytes(b"written")
        assert (tmp_path / f"link-{name}").is_symlink()
        assert (tmp_path / "disk" / name).read_bytes() == b"written"


@pytest.mark.parametrize(
    "name", ["a" * 255, "a" * 251 + ".png", "红" * 83 + ".ckpt", "a." + "b" * 253, os.fsdecode(b"\xba" * 250 + b".png")]
)
def test_every_possible_file_name_can_be_written(name, tmp_path):
    with atomic_path(tmp_path / name) as temporary:
        temporary.write_bytes(b"x")
    assert os.listdir(tmp_path) == [name]
    assert temporary_path(tmp_path / "a.ckpt").suffix == ".ckpt"


def test_two_processes_with_the_same_id_write_under_different_names(tmp_path):
    """As on two hosts that share a folder."""
    assert temporary_path(tmp_path / "a.png") != temporary_path(tmp_path / "a.png")


def test_a_folder_gets_its_name_when_it_is_complete(tmp_path):
    with atomic_folder(tmp_path / "new" / "model") as temporary:
        (temporary / "inside").touch()
    assert os.listdir(tmp_path / "new" / "model") == ["inside"] and os.listdir(tmp_path / "new") == ["model"]
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "other"):
        raise RuntimeError
    with pytest.raises(OSError), atomic_folder(tmp_path / "new"):
        pass
    assert sorted(os.listdir(tmp_path)) == ["new"] and os.listdir(tmp_path / "new") == ["model"]


@pytest.mark.parametrize("name", ["pipe", "link"])
def test_a_special_file_is_never_replaced(tmp_path, name):
    """Root would replace the device that a link leads to."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    with pytest.raises(OSError, match="not a regular file"), atomic_path(tmp_path / name):
        pytest.fail("nothing is written")
    assert (tmp_path / "pipe").is_fifo() and sorted(os.listdir(tmp_path)) == ["link", "pipe"]
