"""Processes that would start from different things end before they train. One line says which differs and in what."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ldm.training.agreement import Start, disagreement
from tests.training.micro import ROOT, STEPS, command

# Started twice by msrun. Each process gets a folder of its own, as on two hosts that do not share their folders.
SCRIPT = """
import os, runpy, sys
sys.path.insert(0, os.getcwd())
sys.argv[1:] = [*sys.argv[2:], f"--output_path={sys.argv[1]}/host" + os.environ.get("RANK_ID", "0")]
runpy.run_path("train_text_to_image.py", run_name="__main__")
"""


def start(number: int = 0, **others: object) -> Start:
    fingerprint = {"data": "1f", "precision": "bf16", "seed": 42}
    return Start(**{"process": f"process {number} on host{number}", "fingerprint": fingerprint, "step": 4, "weights": 7,
                    **others})  # fmt: skip


def test_processes_that_start_from_the_same_agree():
    assert disagreement([start(0)]) == disagreement([start(0), start(1), start(2)]) == ""


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (dict(step=0), "starts at step 0, process 0 at step 4: give all hosts the same output_path, or copy ckpt/"),
        (
            dict(fingerprint={"data": "2e", "precision": "bf16", "seed": 42}, step=0),
            "has data 2e, process 0 has 1f: give all hosts the same",
        ),
        (
            dict(fingerprint={"data": "1f", "precision": "bf16"}),
            "has seed None, process 0 has 42: give all hosts the same",
        ),
        (
            dict(fingerprint={"data": "1f", "precision": "fp32", "seed": 42}),
            "has precision fp32, process 0 has bf16: auto differs between their processors: give --precision fp32",
        ),
        # Process 0 resumes a run in bf16, and the other one resumes nothing: that is what is to be mended.
        (
            dict(fingerprint={"data": "1f", "precision": "fp32", "seed": 42}, step=0),
            "starts at step 0, process 0 at step 4: give all hosts the same output_path",
        ),
        (dict(weights=8), "starts from other weights than process 0: give all hosts the same lora_init_path"),
    ],
)
def test_the_first_process_that_differs_is_named_and_in_what(change, difference):
    assert disagreement([start(0), start(1), start(2, **change), start(3, step=9)]).startswith(
        f"process 2 on host2 {difference}"
    )


def test_two_hosts_of_which_one_has_no_training_state_do_not_resume(saved_run, micro_base_model, micro_data, tmp_path):
    saved_run.rename(tmp_path / "host0")
    (tmp_path / "script.py").write_text(SCRIPT)
    binaries = Path(sys.executable).parent
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ["--use_parallel=True", "--train_batch_size=1", "--resume=True"]
    arguments = [
        word for word in command(micro_base_model, micro_data, tmp_path, *flags)[2:] if "output_path" not in word
    ]
    msrun = subprocess.Popen(
        [
            "msrun", "--worker_num=2", "--local_worker_num=2", "--join=True", f"--master_port={port}",
            f"--log_dir={tmp_path / 'logs'}", str(tmp_path / "script.py"), str(tmp_path), *arguments,
        ],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"},
    )  # fmt: skip
    try:
        log, said, deadline = tmp_path / "logs" / "worker_0.log", "", time.monotonic() + 250
        while "error: " not in said:
            assert msrun.poll() is None and time.monotonic() < deadline, said
            time.sleep(0.2)
            said = log.read_text() if log.exists() else ""
    finally:  # MindSpore's scheduler would wait for 30 s
        for process in [*psutil.Process(msrun.pid).children(True), msrun] if msrun.poll() is None else []:
            process.kill()
        msrun.wait()
    name = f"process 1 on {socket.gethostname()}"
    assert f"error: {name} starts at step 0, process 0 at step {STEPS}: give all hosts the same output_path" in said
    assert not list((tmp_path / "host1" / "cache").glob("*.shard"))  # found before anything is encoded
