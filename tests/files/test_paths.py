"""Paths from settings: expansion, lookup below ROOT, and LoRA paths with strengths."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from ldm.errors import UserError
from ldm.files.paths import ROOT, check_free, expanded, path_and_strengths, under_root, writing


def test_a_path_is_looked_up_below_root_if_it_does_not_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert under_root("configs/nano.yaml") == ROOT / "configs/nano.yaml"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "nano.yaml").touch()
    assert under_root("configs/nano.yaml") == Path("configs/nano.yaml")
    assert under_root("nowhere.yaml") == Path("nowhere.yaml")


@pytest.mark.parametrize(
    "text, path",
    [
        ("~", "/home/somebody"),
        ("~/data", "/home/somebody/data"),
        ("$RUNS/a", "/runs/a"),
        ("${RUNS}/$RUNS", "/runs//runs"),
        ("a~b/~", "a~b/~"),
        ("$NOT_SET/a", "$NOT_SET/a"),
        ("~no-such-user/a", "~no-such-user/a"),
    ],
)
def test_a_path_is_expanded_as_a_shell_does(text, path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("RUNS", "/runs")
    monkeypatch.delenv("NOT_SET", raising=False)
    assert expanded(text) == path


def test_strengths_are_read_from_the_end_of_an_expanded_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a.ckpt", "b:0.5", "c", "c:1", "d:e"):
        (tmp_path / name).touch()
    assert path_and_strengths("~/a.ckpt", "lora") == (tmp_path / "a.ckpt", ())
    assert path_and_strengths("~/a.ckpt:0.7", "lora") == (tmp_path / "a.ckpt", (0.7,))
    assert path_and_strengths("~/a.ckpt:0.7:-1", "lora") == (tmp_path / "a.ckpt", (0.7, -1.0))
    assert path_and_strengths("~/b:0.5", "lora") == (tmp_path / "b:0.5", ())
    assert path_and_strengths("~/b:0.5:2", "lora") == (tmp_path / "b:0.5", (2.0,))
    assert path_and_strengths("~/c:1:2:3", "lora") == (tmp_path / "c:1", (2.0, 3.0))
    assert path_and_strengths("~/d:e:2", "lora") == (tmp_path / "d:e", (2.0,))
    for text in ("~/f", "~/f:0.7", "~/f:0.7:0.3"):
        with pytest.raises(UserError, match=r"lora .*/f does not exist"):
            path_and_strengths(text, "lora")
    for text in ("~/c:much", "~/c:nan", "~/c:inf"):
        with pytest.raises(UserError, match="lora"):
            path_and_strengths(text, "lora")


def test_a_missing_permission_for_a_folder_is_named(unprivileged):
    (unprivileged / "closed").mkdir()
    (unprivileged / "closed" / "a.ckpt").touch()
    (unprivileged / "closed").chmod(0)
    for text in ("a.ckpt", "a.ckpt:0.7"):
        with pytest.raises(UserError, match="Permission denied.*permission"):
            path_and_strengths(str(unprivileged / "closed" / text), "lora")


def test_existing_files_are_not_overwritten(tmp_path):
    check_free(tmp_path / "new")
    (tmp_path / "dead").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    check_free(tmp_path / "empty", empty_folder=True)
    for name in ("dead", "empty"):
        with pytest.raises(UserError, match="exists"):
            check_free(tmp_path / name)


def test_a_failed_write_names_the_path_and_the_way_out():
    with pytest.raises(UserError, match="out.npy cannot be written: No space left on device: free space"):
        with writing("out.npy"):
            raise OSError(errno.ENOSPC, "No space left on device")
