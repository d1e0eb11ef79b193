"""train_text_to_image.py in two processes.

On two hosts (two groups of msrun on this one): weights, a killed process, resuming. With the optimizer's state divided.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ldm.data.shard_files import ENTRY
from ldm.training.own_files import find_states
from ldm.training.trainer import train
from ldm.training.training_state import load_state
from tests.training.micro import ROOT, SETTINGS, STEPS, command
from tests.two_hosts import two_hosts, worker_of

pytestmark = pytest.mark.processes

SETTINGS_OF_BOTH = dict(
    use_lora=True, caption_dropout=0.3, start_learning_rate=1e-3, clip_grad=True, ckpt_save_interval=2
)  # fmt: skip


def keys_of(cache, name):
    """Return what the index files of a process say of the keys of its arrays."""
    entries = [np.frombuffer(path.read_bytes(), ENTRY)[1:] for path in cache.glob(f"{name}-*.index")]
    return [int(prefix) for part in entries for prefix in part["prefix"]]


def test_two_hosts_end_when_one_dies_and_one_process_continues_as_if_it_had_begun(
    settings, micro_base_model, micro_data, tmp_path
):
    output = tmp_path / "run"
    paths = dict(pretrained_model_path=micro_base_model, data_path=micro_data, output_path=output)
    both = {**SETTINGS, **SETTINGS_OF_BOTH, **paths, "train_batch_size": 1, "max_steps": 100_000}
    arguments = [f"--{name}={value}" for name, value in both.items()]
    with two_hosts(tmp_path, ["train_text_to_image.py", *arguments]) as hosts:
        deadline = time.monotonic() + 400
        while not find_states(output / "ckpt"):
            assert all(host.poll() is None for host in hosts) and time.monotonic() < deadline
            time.sleep(0.1)
        killed = time.monotonic()
        os.kill(worker_of(hosts[1]), signal.SIGKILL)
        codes = [host.wait(60) for host in hosts]
        print(f"all ended {time.monotonic() - killed:.1f} s after one was killed")
    assert all(code != 0 for code in codes)
    said = (tmp_path / "host0.txt").read_text()
    lines = [line for line in said.splitlines() if line.startswith("error: process 1 on ")]
    assert len(lines) == 1 and "has ended without an error message" in lines[0], said[-3000:]
    assert "--resume True continues from" in lines[0] and lines[0][7:] in (output / "log.txt").read_text()

    saved = load_state(find_states(output / "ckpt")[0])
    # Each host encoded its share of the 10 images, and none twice.
    shares = [keys_of(output / "cache", f"latents-{process}") for process in (0, 1)]
    assert len(shares[0]) + len(shares[1]) == len({*shares[0], *shares[1]}) >= 4 and all(shares)
    alone = {**SETTINGS_OF_BOTH, "train_batch_size": 2, "max_steps": saved.step + 2}
    train(settings(output, **alone, resume=True))
    train(settings(tmp_path / "alone", **alone))
    continued, expected = (load_state(find_states(folder / "ckpt")[0]) for folder in (output, tmp_path / "alone"))
    assert continued.step == expected.step == saved.step + 2
    for name, array in expected.arrays.items():
        # Adam divides by the gradients' size, so that a rounded gradient near zero may move a weight by 1 % of a step.
        np.testing.assert_allclose(continued.arrays[name], array, rtol=1e-4, atol=1e-5, err_msg=name)


def test_two_processes_with_a_divided_optimizer_continue_what_one_began(
    full_run, saved_run, micro_base_model, micro_data
):
    (saved_run / "ckpt" / f"state-{STEPS:08d}.safetensors").unlink()
    binaries = Path(sys.executable).parent
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ["--use_parallel=True", "--shard_optimizer=True", "--train_batch_size=1", "--resume=True"]
    flags += ["--sample_prompts=an image --s 2", "--sample_every_n_steps=3"]  # the first process draws, the other waits
    done = subprocess.run(
        [
            str(binaries / "msrun"), "--worker_num=2", "--local_worker_num=2", "--join=True", f"--master_port={port}",
            f"--log_dir={saved_run / 'logs'}", *command(micro_base_model, micro_data, saved_run, *flags)[1:],
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=280,
        env={**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    drawn = sorted(path.name for path in (saved_run / "samples" / "prompt-01").iterdir())
    assert drawn == ["step-00000009.png", f"step-{STEPS:08d}.png"]
    continued, expected = (load_state(find_states(folder / "ckpt")[0]) for folder in (saved_run, full_run))
    assert continued.step == expected.step == STEPS and continued.arrays.keys() == expected.arrays.keys()
    for name, array in expected.arrays.items():
        np.testing.assert_allclose(continued.arrays[name], array, rtol=1e-3, atol=1e-4, err_msg=name)
