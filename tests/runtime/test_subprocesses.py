"""Programs that a script runs end with it, after they have reported their progress."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from ldm.runtime.subprocesses import TERMINATION_SECONDS, run
from tests.conftest import ROOT

SCRIPT = """
import sys
from ldm.runtime.script import describe_progress, run_script, start_script
start_script()
from ldm.runtime.subprocesses import run
def main():
    describe_progress(lambda: "in the script")
    raise SystemExit(run([sys.executable, "-c", sys.argv[1]]))
run_script(main)
"""
OF_THIS_PROJECT = """
from ldm.runtime.script import describe_progress, run_script, start_script
start_script()
def main():
    describe_progress(lambda: "in the program")
    print("ready", flush=True)
    while True: pass
run_script(main)
"""
OTHER = "import time; print('ready', flush=True); time.sleep(60)"


def script(program: str, **options) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", SCRIPT, program], cwd=ROOT, **pipes, text=True, **options)


@pytest.mark.parametrize("program, line", [(OF_THIS_PROJECT, "interrupted in the program\n"), (OTHER, "")])
def test_a_program_ends_with_its_script(program, line):
    process = script(program)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    # communicate returns when the pipe is closed, so the program has ended too.
    assert process.communicate(timeout=30) == ("", f"{line}interrupted in the script\n")
    assert process.returncode == 143 and time.monotonic() - begun < 2 * TERMINATION_SECONDS  # without SIGKILL


def test_ctrl_c_in_a_terminal_ends_both():
    process = script(OF_THIS_PROJECT, start_new_session=True)
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (out, process.returncode) == ("", 130)
    assert sorted(err.splitlines()) == ["interrupted in the program", "interrupted in the script"]


def test_a_program_ignores_the_signals_that_its_script_ignores():
    program = "import time; print('ready', flush=True); time.sleep(0.3)"
    process = script(program, start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "") and process.returncode == 0


def test_run_returns_the_exit_code_of_the_program():
    process = script("raise SystemExit(7)")
    process.communicate(timeout=30)
    assert process.returncode == 7


@pytest.mark.parametrize("program", ["", "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"])
def test_a_program_that_hangs_ends_at_its_time_limit(program, monkeypatch):
    """Even one that ignores SIGTERM."""
    monkeypatch.setattr("ldm.runtime.subprocesses.TERMINATION_SECONDS", 0.5)
    pids = []
    begun = time.monotonic()
    with pytest.raises(TimeoutError, match="did not end within 2 s"):
        run([sys.executable, "-c", program + "import time; time.sleep(60)"], pids.append, time_limit=2)
    assert time.monotonic() - begun < 30
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)
