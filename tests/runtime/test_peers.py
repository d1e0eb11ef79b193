"""Connected processes end together: with one line that names the process, and with the exit code of its error."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PROGRAM = """
import atexit, socket, sys, time
from ldm.runtime.script import describe_progress, run_script, start_script
start_script()
from ldm.errors import UserError
from ldm.runtime import parallel, peers
from ldm.runtime.roll_call import ReportedError
parallel.FIRST_PROCESS_SECONDS = peers.LAUNCHER_SECONDS = 0.3
atexit.register(lambda: peers._peers.failed and time.sleep(60))  # as MindSpore's shutdown
atexit.register(peers._at_exit)
index, work = int(sys.argv[1]), sys.argv[3]

@parallel.first_process_prints()
def main():
    describe_progress(lambda: "after step 3 of 9")
    other = 1 - index
    peers._peers = peers.Peers(index, {other: socket.socket(fileno=int(sys.argv[2]))}, {other: f"host{other}"})
    print("ready", flush=True)
    exec(work)

run_script(main)
"""
WAIT = "time.sleep(60)"


@pytest.fixture
def two():
    """A call starts two connected processes, each with the code that it runs, and returns them."""
    started = []

    def run(*work):
        ends = socket.socketpair()
        for index, (end, code) in enumerate(zip(ends, work)):
            environment = {"MS_ROLE": "MS_WORKER", "RANK_ID": str(index)}
            started.append(
                subprocess.Popen(
                    [sys.executable, "-c", PROGRAM, str(index), str(end.fileno()), code],
                    pass_fds=[end.fileno()],
                    cwd=ROOT,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )  # fmt: skip
            )
        for end in ends:
            end.close()
        for process in started:
            assert process.stdout.readline() == "ready\n"
        return started

    yield run
    for process in started:
        process.kill()


def ends(process):
    """Wait for a process, and return its exit code and what it said."""
    said = process.communicate(timeout=20)[1].strip()
    return process.returncode, said


@pytest.mark.parametrize("killed", [0, 1], ids=["process 0", "process 1"])
def test_the_other_reports_a_killed_process_and_ends(two, killed):
    processes = two(WAIT, WAIT)
    processes[killed].send_signal(signal.SIGKILL)
    code, said = ends(processes[1 - killed])
    assert code == 1 and said.startswith(f"error: process {killed} on host{killed} has ended without an error message")
    assert said.endswith("; after step 3 of 9") and said.count("\n") == 0


def test_a_users_error_in_process_1_ends_both_with_code_2_and_one_line(two):
    processes = two(WAIT, "raise UserError('the latents of 4.png are not finite')")
    (code, said), (other_code, _) = map(ends, processes)
    host = socket.gethostname()
    assert said == f"error: process 1 on {host}: the latents of 4.png are not finite; after step 3 of 9"
    assert code == other_code == 2


def test_a_file_that_process_1_cannot_read_is_named(two):
    code, said = ends(two(WAIT, "open('/no/such/file')")[0])
    assert code == 2 and "process 1 on " in said and "/no/such/file cannot be used: No such file" in said


def test_a_fault_in_process_1_ends_both_with_code_1(two):
    (code, said), (other_code, _) = map(ends, two(WAIT, "raise ValueError('a fault')"))
    assert code == other_code == 1 and "process 1 on " in said and "ValueError('a fault')" in said


def test_a_users_error_in_process_0_ends_the_other_with_code_2(two):
    (code, said), (other_code, other_said) = map(ends, two("raise UserError('no space')", WAIT))
    assert (code, said, other_code) == (2, "error: no space", 2)
    assert other_said == f"error: process 0 on {socket.gethostname()}: no space"


def test_an_error_that_process_0_reports_for_another_keeps_its_name(two):
    error = "process 1 on host1: no such image"
    (code, said), (other_code, other_said) = map(ends, two(f"raise ReportedError('{error}')", WAIT))
    assert code == other_code == 2 and said == other_said == f"error: {error}"


@pytest.mark.parametrize("interrupted", [0, 1], ids=["process 0", "process 1"])
def test_the_other_says_which_process_was_interrupted(two, interrupted):
    processes = two(*["while True: time.sleep(0.1)"] * 2)
    processes[interrupted].terminate()
    assert ends(processes[interrupted]) == (143, "interrupted after step 3 of 9")
    code, said = ends(processes[1 - interrupted])
    assert code == 1 and f"error: process {interrupted} on {socket.gethostname()} was interrupted" in said


def test_processes_that_are_done_end_without_a_word(two):
    processes = two("time.sleep(0.5)", "pass")
    assert [ends(process) for process in processes] == [(0, ""), (0, "")]
