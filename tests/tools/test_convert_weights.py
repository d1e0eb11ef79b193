"""tools/model_conversion/convert_weights.py as a user runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ldm.weights.read import open_checkpoint

ROOT = Path(__file__).parents[2]
NANO = "models/nano/nano.safetensors"


def run(*arguments, folder=ROOT):
    script = ROOT / "tools" / "model_conversion" / "convert_weights.py"
    return subprocess.run([sys.executable, str(script), *map(str, arguments)], cwd=folder, capture_output=True,
                          text=True)


def test_it_converts_and_says_what_of_the_source_was_taken(tmp_path):
    # from another folder than the project's: the script finds it by itself
    result = run("--source", ROOT / NANO, "--target", "nano.ckpt", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "UNet: " in result.stdout and "matched" in result.stdout and "written: nano.ckpt" in result.stdout
    assert open_checkpoint(tmp_path / "nano.ckpt").format == "ckpt"


def test_mistakes_end_in_one_line_and_code_2(tmp_path):
    result = run("--source", tmp_path, "--target", tmp_path / "x.ckpt")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "is an empty folder" in result.stderr


def test_help_explains_each_flag():
    explained = run("-h").stdout
    for flag in ("--source", "--target", "--format", "--dtype", "--ema", "--model_config", "--prediction_type"):
        assert f"  {flag}" in explained
