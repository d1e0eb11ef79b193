"""The processes of a run report to msrun's scheduler before MindSpore connects them.

MindSpore waits for a process that does not start until --cluster_time_out has passed, 600 s by default, and then names
none. It also lets the processes of a run join the scheduler of another run that uses the same port. So the scheduler
first listens at that port itself. Each process connects and says who it is, or which error it ends with. When all are
there, the scheduler answers, closes the port, and MindSpore's own connection follows. Where one ends with an error, or
is missing when the time is over, all get one line that says so.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import select
import signal
import socket
import time
from pathlib import Path
from typing import Any

from ldm.errors import LONGEST_MESSAGE, UserError, plain
from ldm.runtime.launcher import (
    Cluster,
    cluster,
    has_several_hosts,
    is_scheduler,
    local_process_count,
    process_index,
    process_name,
)

logger = logging.getLogger(__name__)

BANNER = "stable diffusion for MindSpore: roll call 1"
BANNER_SECONDS = 10.0  # in which the scheduler answers a new connection; another program may never do so
RETRY_SECONDS = 0.2
WAIT_SECONDS = 0.5  # the interrupt of ldm.runtime.script does not end a long wait
NOTICE_SECONDS = 10.0  # after which the first process says that it waits
REPORT_SECONDS = 30.0  # for which an error is reported to processes that start later than the one that has it
LATE_SECONDS = 10.0  # that the scheduler's answer may take longer than the time it waits
LONGEST_LINE = 8192  # bytes

_answered = False  # whether all processes of this run were there
_scheduler: int | None = None  # its process id, where it is one of this host


class ReportedError(UserError):
    """An error of another process, which the message names. It is not reported with the name of this process."""


def call_roll() -> None:
    """Wait until all processes of this run have started. Without msrun, this does nothing.

    Raises:
        UserError: The port is in use, a process is missing when --cluster_time_out is over, or one has ended.
    """
    global _answered
    place = cluster()
    if place is None or _answered:
        return
    if is_scheduler():
        fault = _call(place)
    else:
        fault = _report_to(place, "", time.monotonic() + place.timeout)
    if fault:
        raise ReportedError(fault)
    _answered = True


def report(error: str) -> None:
    """Tell the processes of other hosts that this one has ended with an error before all have started."""
    place = cluster()
    if place is None or _answered or not has_several_hosts():
        return  # msrun ends the processes of its host
    text = plain(error, LONGEST_MESSAGE)
    try:
        if is_scheduler():
            with _listen(place) as server:
                _refuse(server, place.count, text)
        else:
            _report_to(place, text, time.monotonic() + REPORT_SECONDS)
    except UserError:  # this process has an error to report already
        return


def end_scheduler() -> None:
    """End the scheduler, if it is of this host, because the run ends with an error.

    It would wait 30 s for the processes, and msrun for it.
    """
    if _scheduler is None:
        return
    try:
        if b"MS_ROLE=MS_SCHED" in Path(f"/proc/{_scheduler}/environ").read_bytes().split(b"\0"):
            os.kill(_scheduler, signal.SIGKILL)  # MindSpore holds Python's lock there: no other signal is handled
    except OSError:  # it has ended
        return


def _call(place: Cluster) -> str:
    """Wait for all processes, as the scheduler, and answer them. Returns the error that they got, "" if they start."""
    deadline, fault = time.monotonic() + place.timeout, ""
    processes: list[_Process] = []
    with _listen(place) as server:
        while len(processes) < place.count and not fault:
            wait = min(deadline - time.monotonic(), WAIT_SECONDS)
            if wait <= 0:
                fault = _missing(place, processes)
                break
            ready = select.select([server, *(process.connection for process in processes)], [], [], wait)[0]
            ended = [process for process in processes if process.connection in ready]
            if ended:
                processes.remove(ended[0])
                fault = f"{ended[0].name} has ended before all processes had started"
            elif server in ready:
                process = _greet(server)
                if process is None:
                    continue
                if process.is_of_another_run(processes):
                    process.answer(_in_use(place))
                    process.connection.close()
                    continue
                fault = process.fault or process.misfit(place)
                processes.append(process)
        for process in processes:
            process.answer(fault)
        # The others close their connections first, so that the system does not keep this port busy after them.
        for process in processes:
            process.wait_until_closed()
        if fault and has_several_hosts():
            _refuse(server, place.count - len(processes), fault)
    return fault


def _refuse(server: socket.socket, count: int, fault: str) -> None:
    """Answer `count` processes, which start later, that the run has ended with an error."""
    deadline = time.monotonic() + REPORT_SECONDS
    while count > 0 and time.monotonic() < deadline:
        if not select.select([server], [], [], WAIT_SECONDS)[0]:
            continue
        process = _greet(server)
        if process is not None:
            process.answer(fault)
            process.wait_until_closed()
            count -= 1


class _Process:
    """A process that has reported to the scheduler."""

    def __init__(self, connection: socket.socket, words: dict[str, Any]):
        self.connection = connection
        index, count, launcher = words.get("index"), words.get("count"), words.get("launcher")
        self.index = index if isinstance(index, int) else None
        self.count = count if isinstance(count, int) else 0
        self.launcher = launcher if isinstance(launcher, int) else 0
        self.host, self.fault = plain(words.get("host", ""), 64), plain(words.get("fault", ""), LONGEST_MESSAGE)

    @property
    def name(self) -> str:
        return f"a process on {self.host}" if self.index is None else process_name(self.index, self.host)

    def is_of_another_run(self, processes: list[_Process]) -> bool:
        """Whether it has the number of a process that another msrun started, or that is there already."""
        if self.index is None:
            return False
        if self.index < (local_process_count() or 0) and (self.host, self.launcher) != _launcher():
            return True
        return any(process.index == self.index for process in processes)

    def misfit(self, place: Cluster) -> str:
        """Return why the run cannot start with this process, "" if it can."""
        if self.count == place.count and 0 <= (self.index or 0) < place.count:
            return ""
        return (
            f"{self.name} was started for a run of {self.count} processes, and the first host for one of "
            f"{place.count}: give msrun the same --worker_num on all hosts, the number of processes of all together, "
            "and --node_rank from 0 on"
        )

    def answer(self, fault: str) -> None:
        try:
            _send_line(self.connection, {"fault": fault, "scheduler": os.getpid(), "launcher": _launcher()})
        except OSError:  # it has ended meanwhile
            return

    def wait_until_closed(self) -> None:
        try:
            self.connection.settimeout(5.0)
            self.connection.recv(1)
        except OSError:
            pass
        self.connection.close()


def _listen(place: Cluster) -> socket.socket:
    try:
        return socket.create_server((place.address, place.port), backlog=place.count + 8)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(_in_use(place)) from None
        raise UserError(
            f"the scheduler cannot listen at {place.address}:{place.port} ({plain(error.strerror)}): --master_addr "
            "must be an address of the first host"
        ) from None


def _greet(server: socket.socket) -> _Process | None:
    """Accept a connection and read who it is. Returns None for a stranger."""
    try:
        connection, _ = server.accept()
    except OSError:  # it is closed again
        return None
    try:
        connection.settimeout(BANNER_SECONDS / 2)
        _send_line(connection, {"banner": BANNER})
        return _Process(connection, _receive_line(connection, time.monotonic() + BANNER_SECONDS / 2))
    except (OSError, ValueError):
        connection.close()
        return None


def _missing(place: Cluster, processes: list[_Process]) -> str:
    there = f"{len(processes)} of {place.count} processes have started within {place.timeout:.0f} s"
    indices = [process.index for process in processes]
    if None not in indices:
        missing = [index for index in range(place.count) if index not in indices]
        names = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        there += f", {'process' if len(missing) == 1 else 'processes'} {names} not"
    return (
        f"{there}: start msrun on each host with its --node_rank and with the same --worker_num, --master_addr and "
        f"--master_port (here {place.address}:{place.port}), or give a longer --cluster_time_out"
    )


def _report_to(place: Cluster, fault: str, deadline: float) -> str:
    """Say who this process is, or which error it ends with, and return the scheduler's answer ("" to start)."""
    began, said = time.monotonic(), bool(fault) or process_index() > 0
    node = os.environ.get("MS_NODE_ID", "")
    words = {
        "index": int(node) if node.isdecimal() else None,  # msrun does not give it without --node_rank
        "count": place.count,
        "host": _launcher()[0],
        "launcher": _launcher()[1],
        "fault": fault,
    }
    reached = False
    while time.monotonic() < deadline + LATE_SECONDS * reached:
        try:
            with socket.create_connection((place.address, place.port), timeout=BANNER_SECONDS) as connection:
                _check_banner(connection, place)
                _send_line(connection, words)
                reached = True
                while True:
                    if select.select([connection], [], [], WAIT_SECONDS)[0]:
                        return _take_answer(_receive_line(connection))
                    if time.monotonic() > deadline + LATE_SECONDS:
                        break
                    said = said or _say_waiting(place, began)
        except (OSError, ValueError):  # the scheduler has not started yet
            time.sleep(RETRY_SECONDS)
        said = said or _say_waiting(place, began)
    waited = time.monotonic() - began
    if reached:
        return f"the scheduler at {place.address}:{place.port} does not answer: see scheduler.log of the first host"
    return (
        f"{process_name()} has not reached the scheduler at {place.address}:{place.port} within {waited:.0f} s: "
        "start msrun with --node_rank 0 on the host with this --master_addr, with the same --master_port, and let the "
        "hosts connect to it; its own error is in scheduler.log there"
    )


def _take_answer(answer: dict[str, Any]) -> str:
    """Keep the scheduler's process id, and return the error of the run, "" if it starts."""
    global _scheduler
    if answer.get("launcher") == list(_launcher()) and isinstance(answer.get("scheduler"), int):
        _scheduler = answer["scheduler"]
    return plain(answer.get("fault", ""), LONGEST_MESSAGE)


def _check_banner(connection: socket.socket, place: Cluster) -> None:
    """Raise UserError if another program answers, or none does."""
    try:
        if _receive_line(connection).get("banner") == BANNER:
            return
    except ConnectionError:
        raise  # the scheduler has ended, or has not started
    except (OSError, ValueError):
        pass
    raise UserError(_in_use(place))


def _in_use(place: Cluster) -> str:
    return (
        f"another run or program uses port {place.port} of {place.address}: end it, or give this run another "
        "--master_port, on all hosts (and each host its own --node_rank)"
    )


def _launcher() -> tuple[str, int]:
    """Return this host's name and the process id of msrun."""
    return plain(socket.gethostname(), 64), os.getppid()


def _say_waiting(place: Cluster, began: float) -> bool:
    if time.monotonic() - began < NOTICE_SECONDS:
        return False
    logger.warning(
        "waiting for all %d processes of this run to start, at %s:%d, for up to %.0f s",
        place.count, place.address, place.port, place.timeout,
    )  # fmt: skip
    return True


def _send_line(connection: socket.socket, words: dict[str, Any]) -> None:
    connection.sendall(json.dumps(words).encode("ascii") + b"\n")


def _receive_line(connection: socket.socket, deadline: float = float("inf")) -> dict[str, Any]:
    """Return the next line. Raises OSError if the connection ends before, ValueError if it is none of ours.

    `deadline`: until when the whole line must be there, as time.monotonic() counts.
    """
    line = bytearray()
    while not line.endswith(b"\n"):
        if time.monotonic() > deadline:
            raise TimeoutError("the time is over")
        part = connection.recv(1)  # one byte at a time: what follows the line is left
        if not part:
            raise ConnectionResetError("the connection was closed")
        line += part
        if len(line) > LONGEST_LINE:
            raise ValueError("the line is too long")
    words = json.loads(line)
    if not isinstance(words, dict):
        raise ValueError("the line holds no object")
    return words
