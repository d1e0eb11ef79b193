"""Data parallel over two processes: the same as one process with both batches."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ldm.runtime.device import setup_runtime
from ldm.training.step import TrainStep
from tests.training.toy import Linear, batch, numbers, scalars

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    """The folder in which both processes have written what they trained."""
    folder = tmp_path_factory.mktemp("processes")
    binaries = Path(sys.executable).parent
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = subprocess.run(
        [
            str(binaries / "msrun"), "--worker_num=2", "--local_worker_num=2", "--join=True",
            f"--master_port={port}", f"--log_dir={folder / 'logs'}",
            str(Path(__file__).with_name("two_processes.py")), str(folder),
        ],
        cwd=folder, capture_output=True, text=True, timeout=280,
        env={**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


def test_two_processes_equal_one_process_with_both_batches(outputs, graph_mode):
    setup_runtime("CPU")
    loss = Linear()
    step = TrainStep(loss, [loss.w], clip=True)
    latents, noise = numbers(rows=8)
    for t in (1, 2):
        result = step([batch(latents, noise)], scalars(t)).read()
    processes = [np.load(outputs / f"process{process}.npz") for process in (0, 1)]
    for name, array in step.state().items():
        np.testing.assert_array_equal(processes[0][name], processes[1][name], err_msg=name)
        np.testing.assert_allclose(processes[0][name], array, rtol=1e-4, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(processes[0]["norm"], result.gradient_norm, rtol=1e-4)


def assert_same(path: Path, expected: Path) -> None:
    arrays, others = np.load(path), np.load(expected)
    assert arrays.files == others.files
    for name in set(arrays.files) - {"moments"}:
        np.testing.assert_array_equal(arrays[name], others[name], err_msg=name)


@pytest.mark.parametrize("process", [0, 1])
def test_a_divided_optimizer_trains_the_same_weights_bit_for_bit(outputs, process):
    assert_same(outputs / f"sharded1to3-process{process}.npz", outputs / f"whole1to3-process{process}.npz")


def test_a_divided_optimizer_holds_each_moment_in_one_process(outputs):
    whole, *shares = (
        int(np.load(outputs / name)["moments"])
        for name in ("whole1to3-process0.npz", "sharded1to3-process0.npz", "sharded1to3-process1.npz")
    )
    assert sum(shares) == whole and max(shares) < 0.6 * whole


def test_the_training_state_of_a_divided_optimizer_is_that_of_a_whole_one(outputs):
    assert_same(outputs / "sharded1to3-state.npz", outputs / "whole1to3-state.npz")


def test_fp16_copies_train_the_same_where_the_optimizer_is_divided(outputs):
    assert_same(outputs / "sharded-fp161to3-state.npz", outputs / "whole-fp161to3-state.npz")
    copies, values = (np.load(outputs / f"{name}-fp161to3-process1.npz") for name in ("sharded", "whole"))
    assert [copies[f"p{i}"].dtype for i in range(5)] == [np.float32, np.float16, *[np.float32] * 3]
    for i in range(5):
        np.testing.assert_array_equal(copies[f"p{i}"], values[f"p{i}"].astype(copies[f"p{i}"].dtype))


@pytest.mark.parametrize("resumed", ["sharded", "whole"], ids=["with what was whole", "with what was divided"])
def test_a_run_continues_bit_for_bit_where_the_optimizer_is_divided_or_no_longer(outputs, resumed):
    assert_same(outputs / f"{resumed}2to3-state.npz", outputs / "whole1to3-state.npz")
    assert_same(outputs / f"{resumed}2to3-process1.npz", outputs / "whole1to3-process1.npz")
