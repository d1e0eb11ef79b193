"""The evaluation commands with two processes of msrun: their JSON is that of one process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT
from tools.eval import eval_clip_score, eval_fid

pytestmark = pytest.mark.processes


def images(folder: Path, count: int, broken: tuple[int, ...] = ()) -> Path:
    rng = np.random.default_rng(count)
    folder.mkdir()
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (40, 30 + i, 3), np.uint8)).save(folder / f"{i}.png")
    for i in broken:
        (folder / f"{i}.png").write_bytes(b"broken")
    return folder


def run_two_processes(script: str, folder: Path, *arguments: str) -> str:
    """Run a script with two processes, and return what they print."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    completed = subprocess.run(
        [
            "msrun", "--worker_num=2", "--local_worker_num=2", "--join=True", f"--master_port={port}",
            f"--log_dir={folder / 'logs'}", f"tools/eval/{script}.py", *arguments, "--use_parallel=True",
        ],
        cwd=ROOT, env={**os.environ, "PATH": path}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=300,
    )  # fmt: skip
    assert completed.returncode == 0, completed.stdout[-3000:]
    return completed.stdout


def test_fid_with_broken_images_in_each_share(tmp_path):
    """Of the blocks 0-1, 2-3, 4-5 and 6, the second process has the second, whose images are broken, and the last."""
    real, made = images(tmp_path / "real", 7, (1, 2, 3)), images(tmp_path / "made", 5, (3, 4))
    arguments = [f"--real_dir={real}", f"--gen_dir={made}", "--batch_size=2", "--device_target=CPU"]
    outputs = {
        name: [f"--output={tmp_path / name}.json", f"--save_stats={tmp_path / name}.npz"] for name in ("one", "two")
    }
    eval_fid.main([*arguments, *outputs["one"]])
    said = run_two_processes("eval_fid", tmp_path, *arguments, *outputs["two"])
    for suffix in (".json", ".npz"):
        assert (tmp_path / f"two{suffix}").read_bytes() == (tmp_path / f"one{suffix}").read_bytes()
    assert said.count("left out: ") == 5 and "real images: 3 left out" in said and said.count("FID: ") == 1


def test_clip_score_of_fewer_images_than_processes(tmp_path):
    made = images(tmp_path / "made", 1)
    arguments = [f"--image_path_or_dir={made}", "--prompt_or_path=a cat", "--device_target=CPU"]
    eval_clip_score.main([*arguments, f"--output={tmp_path / 'one.json'}"])
    said = run_two_processes("eval_clip_score", tmp_path, *arguments, f"--output={tmp_path / 'two.json'}")
    assert (tmp_path / "two.json").read_bytes() == (tmp_path / "one.json").read_bytes()
    assert "2 processes, but only 1 batch of 1 images" in said and said.count("CLIP score: ") == 1
