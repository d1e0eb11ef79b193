"""The processes of msrun meet before MindSpore connects them. Where one is missing or wrong, all get one line."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.runtime.strangers import send_slowly

PROGRAM = """
import os, sys
from ldm.errors import UserError
from ldm.runtime import roll_call
roll_call.BANNER_SECONDS, roll_call.REPORT_SECONDS = 1.0, 3.0
roll_call.has_several_hosts = lambda: True
roll_call.local_process_count = lambda: int(os.environ["LOCAL"])
try:
    roll_call.report(sys.argv[1]) if sys.argv[1:] else roll_call.call_roll()
    if "THEN" in os.environ:
        exec(os.environ["THEN"])
except UserError as error:
    sys.exit(f"{error}")
"""

OTHER_MSRUN = ["sh", "-c", '"$@"; exit $?', "msrun"]


@pytest.fixture
def start():
    """A call starts the scheduler (index None) or a process. All that still run are killed after the test."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free_port = probe.getsockname()[1]
    started = []

    def run(index=None, count=2, timeout=20, port=free_port, error=None, parent=(), local=2, then=None):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MS_")}
        environment.update(
            MS_ROLE="MS_SCHED" if index is None else "MS_WORKER", RANK_ID=str(index or 0), MS_SCHED_HOST="127.0.0.1",
            MS_SCHED_PORT=str(port), MS_WORKER_NUM=str(count), MS_TOPO_TIMEOUT=str(timeout), LOCAL=str(local),
        )  # fmt: skip
        if index is not None:
            environment["MS_NODE_ID"] = str(index)
        if then is not None:
            environment["THEN"] = then
        words = [sys.executable, "-c", PROGRAM, *([] if error is None else [error])]
        started.append(
            subprocess.Popen([*parent, *words], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        )
        return started[-1]

    run.port = free_port
    yield run
    for process in started:
        process.kill()


def wait_until_connected(port):
    """Wait until a process is connected to the scheduler at the port, which answers connections in their order."""
    deadline = time.monotonic() + 20
    established = f":{port:04X} "
    while time.monotonic() < deadline:
        # A line per connection: number, local address, remote address, state (01: established).
        connections = Path("/proc/net/tcp").read_text().splitlines()[1:]
        if any(
            f"{local} ".endswith(established) and state == "01"
            for _, local, _, state, *_ in map(str.split, connections)
        ):
            return
        time.sleep(0.05)
    raise TimeoutError(f"no process has reached the scheduler at port {port}")


def said(*processes):
    """Wait for the processes and return what each said."""
    return [process.communicate(timeout=30)[1].strip() for process in processes]


@pytest.mark.parametrize("seconds", [0, 2], ids=["at once", "late"])
def test_the_run_starts_when_all_are_there_and_the_port_is_free_again(start, seconds):
    scheduler, first = start(), start(0)
    time.sleep(seconds)
    assert seconds == 0 or (scheduler.poll() is None and first.poll() is None)
    assert said(scheduler, first, start(1)) == ["", "", ""]
    socket.create_server(("127.0.0.1", start.port), reuse_port=False).close()


def test_a_process_that_never_starts_is_named_when_the_time_is_over(start):
    began = time.monotonic()
    texts = said(start(count=4, timeout=3), start(0, count=4, timeout=3), start(2, count=4, timeout=3))
    assert len(set(texts)) == 1 and "2 of 4 processes have started within 3 s, processes 1, 3 not" in texts[0]
    assert "--node_rank" in texts[0] and time.monotonic() - began < 20


def test_a_scheduler_that_never_starts_is_named(start):
    (text,) = said(start(1, timeout=1))
    assert "process 1 on " in text and f"has not reached the scheduler at 127.0.0.1:{start.port}" in text


def test_a_port_that_another_program_uses_is_named_by_all(start):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        texts = said(start(port=port), start(0, port=port), start(1, port=port))
    assert all(f"another run or program uses port {port} of 127.0.0.1" in text for text in texts)


def test_a_stranger_that_sends_byte_after_byte_does_not_keep_the_run_waiting(start):
    scheduler = start()
    while True:
        try:
            stranger = socket.create_connection(("127.0.0.1", start.port))
            break
        except OSError:  # the scheduler has not started yet
            time.sleep(0.1)

    send_slowly(stranger)
    assert said(start(0), start(1), scheduler) == ["", "", ""]
    stranger.close()


def test_another_run_with_the_same_port_is_refused_and_this_one_starts(start):
    scheduler, first = start(), start(0)
    wait_until_connected(start.port)
    other_scheduler, other = (start(index, parent=OTHER_MSRUN) for index in (None, 1))
    assert all("another run or program uses port" in text for text in said(other_scheduler, other))
    assert said(start(1), scheduler, first) == ["", "", ""]


def test_another_msrun_of_this_host_may_start_the_second_half(start):
    assert said(start(local=1), start(0, local=1), start(1, local=1, parent=OTHER_MSRUN)) == ["", "", ""]


def test_a_number_that_is_there_already_is_refused(start):
    scheduler, first, other = start(local=1), start(1, local=1), start(1, local=1, parent=OTHER_MSRUN)
    deadline = time.monotonic() + 20
    while first.poll() is None and other.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert sorted(process.poll() is None for process in (first, other)) == [False, True]
    assert said(start(0, local=1), scheduler) == ["", ""]


def test_another_number_of_processes_is_named(start):
    texts = said(start(count=2), start(0, count=2), start(1, count=4))
    assert all(
        "process 1 on " in text and "a run of 4 processes, and the first host for one of 2" in text for text in texts
    )


@pytest.mark.parametrize("which", [None, 0, 1], ids=["the scheduler", "process 0", "process 1"])
def test_all_get_the_error_of_one_that_ends_before(start, which):
    others = [start(index) for index in (None, 0, 1) if index != which]
    ended = start(which, error="no such checkpoint")
    assert said(*others, ended) == ["no such checkpoint", "no such checkpoint", ""]


def test_all_are_told_of_one_that_is_killed_while_it_waits(start):
    scheduler, first, killed = start(count=3), start(0, count=3), start(2, count=3)
    time.sleep(2)
    killed.send_signal(signal.SIGKILL)
    texts = said(scheduler, first)
    assert all("process 2 on " in text and "has ended before all processes had started" in text for text in texts)


@pytest.mark.parametrize("parent", [(), OTHER_MSRUN], ids=["of its own host", "of another"])
def test_a_process_ends_the_scheduler_of_its_own_host(start, parent):
    scheduler = start(local=1, then="import time; time.sleep(4)")
    ends_it = "import time; time.sleep(1); roll_call.end_scheduler()"  # when process 0 has its answer too
    texts = said(start(0, local=1), start(1, local=1, parent=parent, then=ends_it), scheduler)
    assert texts == ["", "", ""] and scheduler.returncode == (0 if parent else -signal.SIGKILL)


def test_without_msrun_nothing_is_waited_for(monkeypatch):
    from ldm.runtime import roll_call

    for name in ("MS_ROLE", "MS_SCHED_HOST"):
        monkeypatch.delenv(name, raising=False)
    roll_call.call_roll()
    roll_call.report("an error")
