"""What is known of msrun: where its processes meet, whether there are other hosts, and how they end with it."""

from __future__ import annotations

import signal
import subprocess
import sys

import psutil
import pytest

from ldm.runtime.launcher import Cluster, cluster, has_several_hosts, local_process_count
from tests.conftest import ROOT

# A stand-in for msrun: it starts one process, which prints what it knows, and waits.
MSRUN = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[-1]])
print(child.pid, flush=True)
child.wait()
"""


@pytest.fixture
def msrun(tmp_path):
    """A call starts the stand-in with msrun's flags and a process that runs code. Returns the stand-in."""
    (tmp_path / "msrun").write_text(MSRUN)
    started = []

    def run(code, *flags):
        command = [sys.executable, str(tmp_path / "msrun"), *flags, "train.py", code]
        started.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield run
    for process in started:
        process.kill()


@pytest.mark.parametrize(
    ("flags", "ends"),
    [(["--join=True"], True), (["--log_dir", "a", "--join", "True"], True), ([], False), (["--join=False"], False)],
)
def test_a_process_ends_with_msrun_if_msrun_waits_for_it(msrun, flags, ends):
    code = "import time; from ldm.runtime.launcher import end_with_launcher as end; end(); print(1, flush=True); " + (
        "time.sleep(60)"
    )
    launcher = msrun(code, *flags)
    child = psutil.Process(int(launcher.stdout.readline()))
    assert launcher.stdout.readline() == "1\n"
    launcher.send_signal(signal.SIGTERM)
    launcher.wait(10)
    try:
        child.wait(10 if ends else 1)
        assert ends
    except psutil.TimeoutExpired:
        assert not ends
        child.kill()


@pytest.mark.parametrize(
    ("flags", "several"),
    [
        (["--worker_num=4", "--local_worker_num=2"], True),
        (["--worker_num", "2", "--local_worker_num", "2"], False),
        (["--local_worker_num=4"], True),  # of 8, msrun's default
        ([], False),
    ],
)
def test_several_hosts_are_known_by_the_numbers_of_processes(msrun, flags, several):
    launcher = msrun("from ldm.runtime.launcher import has_several_hosts as f; print(f())", *flags)
    assert launcher.communicate(timeout=20)[0].splitlines()[1] == str(several)


def test_without_msrun_there_may_be_other_hosts():
    assert has_several_hosts() and local_process_count() is None


def test_the_processes_meet_where_msrun_says(monkeypatch):
    variables = dict(MS_ROLE="MS_WORKER", MS_SCHED_HOST="10.0.0.1", MS_SCHED_PORT="8118", MS_WORKER_NUM="16")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MS_TOPO_TIMEOUT", raising=False)
    monkeypatch.delenv("MS_SIMULATION_LEVEL", raising=False)
    assert cluster() == Cluster("10.0.0.1", 8118, 16, 600.0)
    monkeypatch.setenv("MS_TOPO_TIMEOUT", "30")
    assert cluster() == Cluster("10.0.0.1", 8118, 16, 30.0)
    monkeypatch.setenv("MS_TOPO_TIMEOUT", "-1")
    assert cluster() == Cluster("10.0.0.1", 8118, 16, float("inf"))
    monkeypatch.setenv("MS_SCHED_PORT", "")
    assert cluster() is None
