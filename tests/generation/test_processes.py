"""text_to_image.py with a process on each of two hosts: the files are those of one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ldm.models.stable_diffusion import build_model
from ldm.runtime import peers
from ldm.settings.model import load_model_config
from ldm.weights.checkpoint import write_checkpoint
from tests.conftest import ROOT
from tests.two_hosts import two_hosts

pytestmark = pytest.mark.processes

TINY = ROOT / "tests" / "tiny.yaml"


def files_in(folder: Path) -> dict[str, bytes]:
    """Return the content of each file but the log of the second process."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    files.pop("log-1.txt", None)
    return files


def test_two_processes_write_the_files_of_one(tmp_path):
    """Of the batches 0-1, 2-3 and 4, the first process has two and the second one."""
    np.random.seed(0)
    model = build_model(load_model_config(TINY))
    base = tmp_path / "base.ckpt"
    write_checkpoint(base, {parameter.name: parameter.asnumpy() for parameter in model.get_parameters()})
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\na longer text of a fish\n\na bird\n")
    arguments = [
        "text_to_image.py", "--version=2.0", f"--config={TINY}", f"--ckpt_path={base}", f"--data_path={prompts}",
        "--H=32", "--W=32", "--batch_size=2", "--sampling_steps=2", "--ddim", "--ddim_eta=0.5", "--device_target=CPU",
    ]  # fmt: skip
    arguments += [f"--output_path={tmp_path / 'one'}", f"--save_latents={tmp_path / 'one' / 'latents.npy'}"]
    alone = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert alone.returncode == 0, alone.stdout[-3000:] + alone.stderr[-3000:]
    with two_hosts(
        tmp_path, [word.replace(str(tmp_path / "one"), str(tmp_path / "two")) for word in arguments]
    ) as hosts:
        assert [host.wait(300) for host in hosts] == [0, 0], (tmp_path / "host0.txt").read_text()[-3000:]
    one, two = files_in(tmp_path / "one"), files_in(tmp_path / "two")
    assert sorted(one) == ["grid.png", "latents.init.npy", "latents.npy", *sorted(n for n in one if "samples" in n)]
    assert sum(name.endswith(".png") for name in one) == 6
    assert two == one

    # A killed run: the second batch lacks an image, and the third one is not begun. Both processes continue it.
    for name in ("samples/00003.png", "samples/00004.png", "grid.png"):
        (tmp_path / "two" / name).unlink()
    resumed = [word.replace(str(tmp_path / "one"), str(tmp_path / "two")) for word in arguments[:-1]]
    again = tmp_path / "again"
    again.mkdir()
    with two_hosts(again, [*resumed, "--resume=True"]) as hosts:
        assert [host.wait(300) for host in hosts] == [0, 0], (again / "host0.txt").read_text()[-3000:]
    assert files_in(tmp_path / "two") == one


def given(batches):
    return [(np.array(batch), np.full((len(batch), 2), 0.5, np.float32)) for batch in batches]


def test_without_other_processes_the_batches_are_this_processs():
    gathered = list(peers.gather_batches(given([[0, 1], [2]]), 2))
    assert [indices.tolist() for indices, _ in gathered] == [[0, 1], [2]]
    assert all(values.dtype == np.float32 and values.shape == (len(indices), 2) for indices, values in gathered)


@pytest.mark.parametrize("other", [[[2, 3]], [[2, 3], [6]]])
def test_the_batches_of_the_processes_come_in_turn(other, monkeypatch):
    sent: list[bytes] = []
    with monkeypatch.context() as patched:
        patched.setattr(peers, "gather", lambda data: sent.append(data) or [])
        assert not list(peers.gather_batches(given(other), 2))
    assert len(sent) == 2  # an empty message for a batch that it has not
    monkeypatch.setattr(peers, "gather", lambda data: [data, sent.pop(0)])
    gathered = list(peers.gather_batches(given([[0, 1], [4, 5]]), 2))
    assert [indices.tolist() for indices, _ in gathered] == [[0, 1], [2, 3], [4, 5], [6]][: 2 + len(other)]
