"""tools/demo.py runs from any folder with the right commands."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ldm.errors import UserError
from ldm.files.outputs import claim_folder
from tests.conftest import ROOT
from tools import demo


def test_it_starts_as_a_script_in_any_folder(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "demo.py"), "-h"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and "--output_path" in done.stdout


def test_the_scripts_find_their_paths_from_any_folder(tmp_path, monkeypatch):
    commands, grids = [], []
    monkeypatch.setattr(demo, "call", lambda *command: commands.append(command))
    monkeypatch.setattr(demo, "draw_grid", lambda prompts, columns, path, **_: grids.append((prompts, path)))
    monkeypatch.setattr(sys, "argv", ["demo.py", "--output_path", "here", "--prompts", "1"])
    monkeypatch.chdir(tmp_path)
    demo.main()
    (prompts, grid), (train, base, lora) = grids[0], commands
    assert (ROOT / grid).resolve() == tmp_path / "here" / "grid.png" and len(prompts) == 1
    assert (tmp_path / "here" / "prompts.txt").read_text(encoding="utf-8") == f"{prompts[0]}\n"
    for command, flag, place in (
        (train, "--output_path", "lora"), (base, "--data_path", "prompts.txt"), (base, "--output_path", "base"),
        (lora, "--output_path", "with_lora"), (lora, "--lora_ckpt_path", "lora/ckpt/lora.ckpt"),
    ):  # fmt: skip
        given = command[command.index(flag) + 1]
        assert (ROOT / given).resolve() == tmp_path / "here" / place  # the scripts run in ROOT
    assert (ROOT / train[train.index("--data_path") + 1] / "img_txt.csv").is_file()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--prompts", "0"], "--prompts: 0 is not allowed: at least 1"),
        (["--output_path", "file"], "cannot be a folder, as .*file is a file"),
        (["--output_path", "used"], "--output_path .*used is the path of two outputs"),
        (["--output_path", "kept"], "--output_path .*kept/grid.png is a folder"),
    ],
)
def test_an_unusable_output_is_refused_before_the_work(tmp_path, monkeypatch, flags, words):
    monkeypatch.setattr(demo, "demonstrate", lambda *arguments: pytest.fail("it began"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "kept" / "grid.png").mkdir(parents=True)
    with claim_folder(tmp_path / "used", "another"), pytest.raises(UserError, match=words):
        demo.main(flags)
