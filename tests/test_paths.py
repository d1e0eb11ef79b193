"""Where a setting's path is looked for, and what is said of one that cannot be written."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from ldm.errors import UserError
from ldm.paths import ROOT, check_folder, under_root, writing


def test_a_relative_path_is_found_under_the_project_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert under_root("configs/nano.yaml") == ROOT / "configs" / "nano.yaml"
    assert under_root("configs/nowhere.yaml") == Path("configs/nowhere.yaml")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "nano.yaml").touch()
    assert under_root("configs/nano.yaml") == Path("configs/nano.yaml")  # the nearer one


@pytest.mark.parametrize("folder", ["file", "file/below", "file/far/below"])
def test_a_file_in_the_place_of_a_folder_is_named(tmp_path, folder):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"output_path: .*{folder} cannot be a folder, as .*file is a file"):
        check_folder(tmp_path / folder, "output_path")


def test_a_folder_that_must_not_be_written_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.paths.os.access", lambda place, how: False)  # root may do anything
    with pytest.raises(UserError, match="output_path: .* no permission in "):
        check_folder(tmp_path / "new", "output_path")


def test_a_folder_that_is_or_can_be_made_is_taken(tmp_path, monkeypatch):
    check_folder(tmp_path, "output_path")
    check_folder(tmp_path / "a" / "b", "output_path")
    assert not (tmp_path / "a").exists()
    monkeypatch.chdir(tmp_path)
    check_folder(Path("output/train"), "output_path")


def test_a_full_disk_is_said_with_the_file():
    with pytest.raises(UserError, match="log.txt cannot be written .No space left"), writing(Path("log.txt")):
        raise OSError(errno.ENOSPC, "No space left on device")
