"""tools/commands.py runs the project's scripts and prints their commands."""

from __future__ import annotations

import shlex

import pytest

from ldm.errors import UserError
from tests.conftest import ROOT
from tools.commands import call, from_root


def test_it_prints_what_it_runs_in_the_projects_folder_whatever_the_working_directory(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "an image.png"
    with pytest.raises(UserError, match=r"convert_lora.py failed with exit code 2: see its message above"):
        call("tools/lora/convert_lora.py", "--source", str(source))
    output, errors = capfd.readouterr()
    assert shlex.split(output.partition("\n$ ")[2]) == [
        "python", "tools/lora/convert_lora.py", "--source", str(source)
    ]  # fmt: skip
    assert str(source) in errors


def test_a_script_that_succeeds_raises_nothing(capfd):
    call("tools/lora/convert_lora.py", "-h")
    assert "--source" in capfd.readouterr().out


def test_a_path_of_the_working_directory_is_given_as_a_script_in_the_projects_folder_finds_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (ROOT / from_root("images")).resolve() == tmp_path / "images"
    assert from_root(ROOT / "configs" / "nano.yaml") == "configs/nano.yaml"
