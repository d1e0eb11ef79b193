"""Connected processes end together: with one line that names the process, and with the exit code of its error."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time

import pytest

from ldm.errors import UserError
from ldm.runtime import peers
from tests.conftest import ROOT
from tests.runtime.strangers import send_slowly

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


@pytest.mark.parametrize("done", [0, 1], ids=["process 0", "process 1"])
def test_who_waits_for_a_process_that_is_done_says_so_and_ends(two, done):
    work = ["peers.gather()", "peers.gather()"]
    work[done] = "pass"
    processes = two(*work)
    code, said = ends(processes[1 - done])
    assert code == 2 and f"process {done} on host{done} has ended before this one" in said and said.count("\n") == 0
    assert ends(processes[done]) == (0, "")


def test_what_a_process_sent_before_it_was_done_is_taken(two):
    process_0, process_1 = two("time.sleep(0.5); assert peers.gather(b'a') == [b'a', b'b']", "peers.gather(b'b')")
    assert ends(process_0) == ends(process_1) == (0, "")


class TestStrangers:
    """Other programs may connect to the port on which process 0 waits for the processes of its run."""

    TOKEN = b"t" * peers.TOKEN_BYTES

    @pytest.fixture
    def server(self):
        with socket.create_server(("127.0.0.1", 0)) as server:
            yield server

    def greet(self, server, process, token=TOKEN):
        connection = socket.create_connection(server.getsockname())
        connection.sendall(peers._HELLO.pack(token, process, b"host1"))
        return connection

    def test_one_that_sends_byte_after_byte_does_not_keep_the_others_waiting(self, server, monkeypatch):
        monkeypatch.setattr(peers, "HELLO_SECONDS", 0.5)
        slow = socket.create_connection(server.getsockname())

        send_slowly(slow)
        began = time.monotonic()
        with self.greet(server, 1):
            connections, hosts = peers._accept(server, 2, self.TOKEN)
        assert hosts == {1: "host1"} and time.monotonic() - began < 5
        connections[1].close()
        slow.close()

    @pytest.mark.parametrize(
        ("process", "token"), [(1, b"?" * peers.TOKEN_BYTES), (0, TOKEN), (3, TOKEN), (2, TOKEN)],
        ids=["another run's", "process 0", "a number too large", "a number that is there"],
    )  # fmt: skip
    def test_one_with_a_wrong_number_or_token_is_turned_away(self, server, process, token):
        with self.greet(server, 2), self.greet(server, process, token) as wrong, self.greet(server, 1):
            connections, hosts = peers._accept(server, 3, self.TOKEN)
            assert hosts == {1: "host1", 2: "host1"}
            wrong.settimeout(5)
            assert wrong.recv(1) == b""
        for connection in connections.values():
            connection.close()

    def test_a_process_that_does_not_connect_is_named_though_strangers_go_on(self, server, monkeypatch):
        monkeypatch.setattr(peers, "CONNECT_SECONDS", 0.3)
        with self.greet(server, 1), pytest.raises(UserError, match="processes 2 have not connected"):
            peers._accept(server, 3, self.TOKEN)


class TestRankTable:
    """Without msrun, a rank table names the hosts."""

    @pytest.fixture
    def table(self, tmp_path, monkeypatch):
        def write(*addresses):
            servers = [
                {"server_id": address, "device": [{"device_id": "0", "rank_id": str(i)}]}
                for i, address in enumerate(addresses)
            ]
            (tmp_path / "table.json").write_text(json.dumps({"server_list": servers}))
            monkeypatch.setenv("RANK_TABLE_FILE", str(tmp_path / "table.json"))
            monkeypatch.delenv("MS_SCHED_HOST", raising=False)

        return write

    def test_process_0_listens_on_the_network_of_another_host(self, table):
        table("192.0.2.1", "192.0.2.2")
        assert peers._other_server() == "192.0.2.2"

    def test_with_one_host_it_listens_on_that_host_alone(self, table):
        table("192.0.2.1")
        with peers._listen() as server:
            assert server.getsockname()[0] == "127.0.0.1"

    def test_an_address_of_the_same_host_is_an_error(self, table):
        table("192.0.2.1", "127.0.1.1")
        with pytest.raises(UserError, match=r"cannot listen on the network of 127\.0\.1\.1 .*msrun"):
            peers._listen()

    def test_a_table_without_addresses_is_an_error(self, table):
        table("192.0.2.1", "192.0.2.2")
        path = peers.os.environ["RANK_TABLE_FILE"]
        with open(path, "w") as file:
            json.dump({"server_list": [{"device": [{"rank_id": "1"}]}]}, file)
        with pytest.raises(UserError, match="does not name its hosts .*msrun"):
            peers._listen()
