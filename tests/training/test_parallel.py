"""Data parallel over two processes: the same as one process with both batches."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

from ldm.runtime.device import setup_runtime
from ldm.training.step import TrainStep
from tests.training.toy import Linear, batch, numbers, scalars


def test_two_processes_equal_one_process_with_both_batches(tmp_path, graph_mode):
    binaries = Path(sys.executable).parent
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = subprocess.run(
        [
            str(binaries / "msrun"), "--worker_num=2", "--local_worker_num=2", "--join=True",
            f"--master_port={port}", f"--log_dir={tmp_path / 'logs'}",
            str(Path(__file__).with_name("two_processes.py")), str(tmp_path),
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=280,
        env={**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    setup_runtime("CPU")
    loss = Linear()
    step = TrainStep(loss, [loss.w], clip=True)
    latents, noise = numbers(rows=8)
    for t in (1, 2):
        result = step([batch(latents, noise)], scalars(t))
    processes = [np.load(tmp_path / f"process{process}.npz") for process in (0, 1)]
    for name, array in step.state().items():
        np.testing.assert_array_equal(processes[0][name], processes[1][name], err_msg=name)
        np.testing.assert_allclose(processes[0][name], array, rtol=1e-4, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(processes[0]["norm"], result.gradient_norm, rtol=1e-4)
