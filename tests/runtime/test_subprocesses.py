"""Processes that a script starts end with it, and may say first what they have done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from ldm.runtime.subprocesses import TERMINATION_SECONDS
from tests.conftest import ROOT

PARENT = """
import sys
from ldm.runtime.script import describe_progress, run_script, start_script
start_script()
from ldm.runtime.subprocesses import run
def main():
    describe_progress(lambda: "as the parent")
    raise SystemExit(run([sys.executable, "-c", sys.argv[1]]))
run_script(main)
"""
OURS = """
from ldm.runtime.script import describe_progress, run_script, start_script
start_script()
def main():
    describe_progress(lambda: "as the child")
    print("ready", flush=True)
    while True: pass
run_script(main)
"""
FOREIGN = "import time; print('ready', flush=True); time.sleep(60)"


def parent(child: str, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", PARENT, child],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.parametrize("child, said", [(OURS, "interrupted as the child\n"), (FOREIGN, "")])
def test_a_child_ends_with_its_parent(child, said):
    process = parent(child)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    # Both ends of the pipe are closed: nobody is left who could write.
    assert process.communicate(timeout=30) == ("", f"{said}interrupted as the parent\n")
    assert process.returncode == 143 and time.monotonic() - begun < 2 * TERMINATION_SECONDS  # it was not killed


def test_ctrl_c_in_a_terminal_reaches_both():
    process = parent(OURS, start_new_session=True)
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (out, process.returncode) == ("", 130)
    assert sorted(err.splitlines()) == ["interrupted as the child", "interrupted as the parent"]


def test_what_the_parent_ignores_its_children_ignore():
    child = "import time; print('ready', flush=True); time.sleep(0.3)"
    process = parent(child, start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "") and process.returncode == 0


def test_the_exit_code_is_the_childs():
    process = parent("raise SystemExit(7)")
    process.communicate(timeout=30)
    assert process.returncode == 7
