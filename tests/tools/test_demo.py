"""tools/demo.py: that it starts from anywhere, and which commands it runs."""

from __future__ import annotations

import subprocess
import sys

from tests.conftest import ROOT
from tools import demo


def test_it_starts_as_a_script_in_any_folder(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "demo.py"), "-h"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and "--output_path" in done.stdout


def test_from_another_folder_its_scripts_find_the_paths(tmp_path, monkeypatch):
    commands, grids = [], []
    monkeypatch.setattr(demo, "call", lambda *command: commands.append(command))
    monkeypatch.setattr(demo, "draw_grid", lambda prompts, columns, path: grids.append((prompts, path)))
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
