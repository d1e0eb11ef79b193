"""tools/model_conversion/convert_weights.py as a user runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ldm.errors import UserError
from ldm.files.outputs import claim_new
from ldm.weights.checkpoint import open_checkpoint
from tools.model_conversion.convert_weights import main

ROOT = Path(__file__).parents[2]
NANO = "models/nano/nano.safetensors"


def run(*arguments, folder=ROOT):
    script = ROOT / "tools" / "model_conversion" / "convert_weights.py"
    return subprocess.run(
        [sys.executable, str(script), *map(str, arguments)], cwd=folder, capture_output=True, text=True
    )


def test_it_converts_and_says_what_of_the_source_was_taken(tmp_path):
    # from another folder than the project's: the script finds it by itself
    result = run("--source", ROOT / NANO, "--target", "nano.ckpt", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "UNet: " in result.stdout and "matched" in result.stdout and "written: nano.ckpt" in result.stdout
    assert open_checkpoint(tmp_path / "nano.ckpt").format == "ckpt"


def test_mistakes_end_in_one_line_and_code_2(tmp_path):
    (tmp_path / "empty").mkdir()
    result = run("--source", tmp_path / "empty", "--target", tmp_path / "x.ckpt")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "is an empty folder" in result.stderr


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--target", "x.ckpt"], "--source is missing"),
        (["--source", "nowhere", "--target", "x.bin"], "x.bin: .bin is not written"),
        (["--source", "nowhere", "--target", "x.ckpt", "--format", "ldm"], "x.ckpt is no name for the format ldm"),
        (["--source", "nowhere", "--target", "dead/x.ckpt"], "dead is a link to nowhere/else, which does not exist"),
        (["--source", "nowhere", "--target", "y.ckpt"], "--target y.yaml is a folder"),
        (["--source", "nowhere", "--target", "used"], "--target used is the path of two outputs"),
        (["--source", "nowhere", "--target", "n" * 256], "File name too long"),
        (["--source", "nowhere", "--target", "~/a/b"], "nowhere does not exist|nowhere cannot be"),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_any_input_is_read(tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("dead").symlink_to("nowhere/else")
    Path("y.yaml").mkdir()
    with claim_new("used", "another"), pytest.raises(UserError, match=words):
        main(flags)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dead", "y.yaml"]


def test_help_explains_each_flag():
    explained = run("-h").stdout
    for flag in ("--source", "--target", "--format", "--dtype", "--ema", "--model_config", "--prediction_type"):
        assert f"  {flag}" in explained
