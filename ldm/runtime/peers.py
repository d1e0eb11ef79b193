"""Connections between the processes of a data-parallel run: all end when one dies, and arrays are gathered.

MindSpore's own collective operators wait without an end for a process that was killed, and on Ascend they give up after
a time limit, which a process that is still encoding images would exceed. So each process holds one TCP connection to
process 0. The system closes the connections of a process that ends, however it ends. Those of a host that is switched
off are given up after KEEP_ALIVE seconds. The system watches them, not Python: MindSpore may hold Python's lock for
minutes while it compiles.

A process that ends without saying that it is done ends all others: process 0 prints one line and exits. msrun then ends
the processes of its host. The others print the line themselves if they still run after some seconds, which is so on
other hosts.
"""

from __future__ import annotations

import atexit
import io
import logging
import os
import queue
import secrets
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from ldm.errors import LONGEST_MESSAGE, UserError, plain
from ldm.files.atomic import remove_temporaries
from ldm.files.documents import read_json
from ldm.runtime import roll_call
from ldm.runtime.launcher import LAUNCHER_SECONDS, local_index, process_name
from ldm.runtime.script import progress

# Seconds, but for the last one: 35 s until a dead host is noticed, also while data is on its way to it.
KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 5, "TCP_USER_TIMEOUT": 35_000}
CONNECT_SECONDS = 60.0  # to connect all processes, after MindSpore has connected them
HELLO_SECONDS = 5.0  # in which a new connection must have said who it is; the others wait meanwhile
LAST_LINE_SECONDS = 2.0  # how long printing the last line may take
EXIT_CODE = 1  # where another process has ended without a UserError
TOKEN_BYTES = 16
LONGEST_HOST = 64  # bytes

_DATA, _GO, _DONE, _FAILED = range(4)  # kinds of messages
_HEADER = struct.Struct("!BQ")  # kind, number of bytes
_HELLO = struct.Struct(f"!{TOKEN_BYTES}sI{LONGEST_HOST}s")  # token, process, host

_TABLE_WAY_OUT = "correct its server_id, or start the processes of all hosts with msrun, which needs no table"

_peers: Peers | None = None


class Peers:
    """The connections of one process.

    Args:
        index: Of this process.
        connections: Process -> its connection: of process 0 those to all others, of another process that to process 0.
        hosts: Process -> name of its host.
    """

    def __init__(self, index: int, connections: dict[int, socket.socket], hosts: dict[int, str]):
        self.index, self.connections, self.hosts = index, connections, hosts
        # What each process has sent, and None when it is done.
        self.inbox: dict[int, queue.Queue[bytes | None]] = {process: queue.Queue() for process in connections}
        self.failed, self.exit_code = False, EXIT_CODE  # whether this process ends with an error, and with which code
        self._ending = threading.Lock()
        self._terminal = os.dup(2)  # standard error may be redirected to a log file later
        for process in connections:
            threading.Thread(target=self._receive, args=(process,), daemon=True, name=f"process {process}").start()

    def gather(self, data: bytes) -> list[bytes]:
        """Wait for all processes, and return what each gave in process 0, nothing in the others.

        Raises:
            UserError: A process is done, and will not call this.
        """
        if self.index:
            self._send_to_all(_DATA, data)
            self._next(0)
            return []
        parts = [data, *(self._next(process) for process in sorted(self.connections))]
        self._send_to_all(_GO)
        return parts

    def share(self, data: bytes) -> bytes:
        """Return the data of process 0, in all processes. Raises UserError as `gather`."""
        if self.index:
            return self._next(0)
        self._send_to_all(_DATA, data)
        return data

    def fail(self, message: str, code: int, wait: bool) -> None:
        """Say that this process ends with an error. Process 0 reports it, and all end with this exit code.

        `wait`: whether msrun has the time to end this process before it reports the error too.
        """
        self.failed, self.exit_code = True, code
        self._send_failed(message, code)
        roll_call.end_scheduler()
        if self.index and wait:
            time.sleep(self._patience())

    def _send_failed(self, message: str, code: int) -> None:
        self._send_to_all(_FAILED, bytes([code]) + message.encode("utf-8", "replace"))

    def say_done(self) -> None:
        """Say that this process ends as it should."""
        self._send_to_all(_DONE)

    def _send_to_all(self, kind: int, data: bytes = b"") -> None:
        """Send a message to each connected process that has not ended. What follows from an end, _receive decides."""
        for connection in self.connections.values():
            try:
                _send(connection, kind, data)
            except OSError:
                continue

    def _next(self, process: int) -> bytes:
        while True:  # in short waits: the interrupt of ldm.runtime.script does not end a long one
            try:
                data = self.inbox[process].get(timeout=0.5)
            except queue.Empty:
                continue
            if data is None:
                self.inbox[process].put(None)  # for the next call
                name = process_name(process, self.hosts[process])
                raise UserError(
                    f"{name} has ended before this one, which still waits for it: start all processes with the same "
                    "command, settings and files; what it did last is in its log"
                )
            return data

    def _patience(self) -> float:
        """Return after how many seconds this process reports the end of another: one after the other on each host."""
        return LAUNCHER_SECONDS + local_index()

    def _receive(self, process: int) -> None:
        """Take the messages of a process until it is done. Ends this process if that one ends otherwise."""
        connection, text, code = self.connections[process], "", EXIT_CODE
        try:
            while True:
                kind, data = _receive_message(connection)
                if kind == _DONE:
                    self.inbox[process].put(None)
                    return
                if kind == _FAILED:
                    code, text = data[0], data[1:].decode("utf-8", "replace")
                    break
                self.inbox[process].put(data)
        except OSError:  # closed, or its host does not answer
            pass
        with self._ending:  # one thread reports; the others wait here until this process has ended
            if not self.failed:
                self._end(process, text, code)

    def _end(self, process: int, text: str, code: int) -> None:
        """Report that a process has ended, and end this one with the exit code.

        `text`: the report of process 0 or of that process, "" if it gave none.
        """
        line = text
        if not text:
            line = (
                f"{process_name(process, self.hosts[process])} has ended without an error message (killed, or its host "
                "is off or out of memory), so all processes end"
            )
        if self.index == 0 or not text:
            done = progress()
            line = f"{line}; {done}" if done else line
        if self.index == 0:
            self._send_failed(line, code)
        elif text or self.index > 1:  # process 1 reports in place of process 0, before msrun ends it
            time.sleep(self._patience())
        timer = threading.Timer(LAST_LINE_SECONDS, os._exit, [code])
        timer.daemon = True
        timer.start()
        try:
            line = plain(line, LONGEST_MESSAGE)
            for handler in logging.getLogger("ldm").handlers:
                if isinstance(handler, logging.FileHandler):
                    handler.handle(logging.LogRecord("ldm", logging.ERROR, __file__, 0, line, None, None))
            os.write(self._terminal, f"\nerror: {line}\n".encode("utf-8", "backslashreplace"))
            remove_temporaries()
            roll_call.end_scheduler()
        finally:
            os._exit(code)


def connect(index: int, count: int, add_up: Callable[[np.ndarray], np.ndarray]) -> None:
    """Connect this process with the others. Every process calls it.

    Args:
        index: Of this process.
        count: Number of processes.
        add_up: Returns the sum of the arrays (n,) float32 that all processes call it with, by MindSpore.

    Raises:
        UserError: A process cannot be reached.
    """
    global _peers
    if count < 2 or os.environ.get("MS_SIMULATION_LEVEL"):
        return
    greeting = np.zeros(4 + 2 + TOKEN_BYTES, np.float32)  # address, port, token in bytes, which float32 holds exactly
    if index == 0:
        with _listen() as server:
            address, port = server.getsockname()[:2]
            token = secrets.token_bytes(TOKEN_BYTES)
            greeting[:] = list(socket.inet_aton(address) + struct.pack("!H", port) + token)
            add_up(greeting)
            connections, hosts = _accept(server, count, token)
    else:
        raw = bytes(add_up(greeting).astype(np.uint8))
        address, port = socket.inet_ntoa(raw[:4]), struct.unpack("!H", raw[4:6])[0]
        connections, hosts = {0: _reach(address, port, raw[6:], index)}, {0: address}
    for connection in connections.values():
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEP_ALIVE.items():
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    _peers = Peers(index, connections, hosts)
    atexit.register(_at_exit)


def gather(data: bytes = b"") -> list[bytes]:
    """Wait until all processes have called this.

    Returns the data of each process in process 0, in their order, and nothing in the others. Without other processes,
    returns this process's data.
    """
    return [data] if _peers is None else _peers.gather(data)


def share(data: bytes = b"") -> bytes:
    """Return the data of process 0, in all processes, each of which calls this."""
    return data if _peers is None else _peers.share(data)


def gather_batches(batches: Iterable[Sequence[np.ndarray]], rounds: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield the batches of all processes in process 0, one of each process in turn, and nothing in the others.

    Every process calls this and iterates to the end. Process 0 never holds more than one batch of each process.

    Args:
        batches: The arrays of each batch of this process.
        rounds: The largest number of batches of a process, the same number in every process.
    """
    own = iter(batches)
    for _ in range(rounds):
        buffer = io.BytesIO()
        for array in next(own, ()):
            np.save(buffer, array, allow_pickle=False)
        for data in gather(buffer.getvalue()):
            if data:
                yield tuple(_arrays(data))


def _arrays(data: bytes) -> Iterator[np.ndarray]:
    buffer = io.BytesIO(data)
    while buffer.tell() < len(data):
        yield np.lib.format.read_array(buffer, allow_pickle=False)


def are_connected() -> bool:
    """Whether this process is connected with the others."""
    return _peers is not None


def fail(message: str, code: int = EXIT_CODE, wait: bool = True) -> None:
    """Tell the others that this process ends with an error. Without other processes, this does nothing.

    Args:
        message: Names this process and its error. Process 0 reports it.
        code: With which exit code the other processes end.
        wait: Whether to leave msrun the time to end this process.
    """
    if _peers is not None:
        _peers.fail(message, code, wait)


def _at_exit() -> None:
    """Say that this process is done, or end it if it has failed.

    MindSpore's own shutdown, which would follow, waits 20 s for a scheduler that has ended.
    """
    if _peers is None:
        return
    if _peers.failed:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_peers.exit_code)
    # Python sets last_value where an exception that nobody caught ends a program.
    if getattr(sys, "last_value", None) is None:
        _peers.say_done()


def _listen() -> socket.socket:
    """Return a socket that listens on the address of process 0's host by which the other hosts reach it."""
    scheduler = os.environ.get("MS_SCHED_HOST")
    target = scheduler or _other_server()
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((target or "127.0.0.1", 1))  # of a datagram socket: it sends nothing, and chooses the address
            address = probe.getsockname()[0]
        if target and not scheduler and address.startswith("127."):
            raise OSError("this is an address of the same host")
        return socket.create_server((address, 0))
    except OSError as error:
        way_out = "" if scheduler else f": {_TABLE_WAY_OUT}"
        raise UserError(
            f"process 0 cannot listen on the network of {plain(target)} ({plain(error)}){way_out}"
        ) from None


def _other_server() -> str:
    """Return the address of a host other than that of process 0 by RANK_TABLE_FILE, "" if there is one host only."""
    table = os.environ.get("RANK_TABLE_FILE", "")
    if not table:
        return ""
    try:
        for server in read_json(table)["server_list"]:
            if all(int(device["rank_id"]) for device in server["device"]):
                return str(server["server_id"])
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{plain(table)} (RANK_TABLE_FILE) does not name its hosts (server_id): {_TABLE_WAY_OUT}"
        ) from None
    return ""


def _accept(server: socket.socket, count: int, token: bytes) -> tuple[dict[int, socket.socket], dict[int, str]]:
    """Return the connections to the processes 1 to `count` - 1 and the names of their hosts."""
    connections: dict[int, socket.socket] = {}
    hosts: dict[int, str] = {}
    deadline = time.monotonic() + CONNECT_SECONDS
    while len(connections) < count - 1:
        seconds = deadline - time.monotonic()
        if seconds <= 0:
            for connection in connections.values():
                connection.close()
            missing = ", ".join(str(i) for i in range(1, count) if i not in connections)
            raise UserError(f"processes {missing} have not connected to process 0: see their logs")
        server.settimeout(seconds)
        try:
            connection, _ = server.accept()
        except OSError:  # the time is over, or the connection is closed again
            continue
        try:
            hello = _receive_bytes(connection, _HELLO.size, time.monotonic() + min(seconds, HELLO_SECONDS))
        except OSError:  # a stranger, who says nothing
            connection.close()
            continue
        given, process, host = _HELLO.unpack(hello)
        if not secrets.compare_digest(given, token) or not 0 < process < count or process in connections:
            connection.close()
            continue
        connections[process], hosts[process] = connection, host.rstrip(b"\0").decode("utf-8", "replace")
    return connections, hosts


def _reach(address: str, port: int, token: bytes, index: int) -> socket.socket:
    try:
        connection = socket.create_connection((address, port), timeout=CONNECT_SECONDS)
        connection.sendall(_HELLO.pack(token, index, socket.gethostname().encode()[:LONGEST_HOST]))
        return connection
    except OSError as error:
        raise UserError(
            f"process {index} cannot reach process 0 at {address}:{port} ({plain(error)}): the hosts of a run need TCP "
            "connections to each other on all ports"
        ) from None


def _send(connection: socket.socket, kind: int, data: bytes = b"") -> None:
    connection.sendall(_HEADER.pack(kind, len(data)) + data)


def _receive_message(connection: socket.socket) -> tuple[int, bytes]:
    kind, size = _HEADER.unpack(_receive_bytes(connection, _HEADER.size))
    return kind, _receive_bytes(connection, size)


def _receive_bytes(connection: socket.socket, size: int, deadline: float | None = None) -> bytes:
    """Return the next `size` bytes. Raises OSError if the connection ends before, or not all are there in time.

    `deadline`: as time.monotonic() counts, None for no limit.
    """
    received = bytearray()
    while len(received) < size:
        if deadline is not None:
            seconds = deadline - time.monotonic()
            if seconds <= 0:
                raise TimeoutError("the time is over")
            connection.settimeout(seconds)
        part = connection.recv(min(size - len(received), 1 << 20))
        if not part:
            raise ConnectionResetError("the connection was closed")
        received += part
    return bytes(received)
