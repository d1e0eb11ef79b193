"""What msrun tells the processes that it starts, and how these end with it.

msrun passes the addresses and numbers in environment variables. The rest is read from its command line, which is the
parent's of each process.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ldm.errors import plain

LAUNCHER_VARIABLES = ("MS_ROLE", "RANK_TABLE_FILE", "OMPI_COMM_WORLD_RANK")  # every launcher sets one of them
DEFAULT_TIMEOUT = 600.0  # seconds, of msrun's --cluster_time_out
LAUNCHER_SECONDS = 3.0  # in which msrun ends the other processes of a host when one has ended (it looks every second)
_SIGNAL_WHEN_THE_PARENT_ENDS = 1  # PR_SET_PDEATHSIG of Linux


@dataclass(frozen=True)
class Cluster:
    """The processes of a run that msrun started, and where they meet."""

    address: str  # of the scheduler
    port: int
    count: int  # of the processes that work, which the scheduler does not
    timeout: float  # seconds, in which all processes must have started


def process_index() -> int:
    """Return this process's index among those of the launcher, 0 without one. It is known before they connect."""
    if not any(name in os.environ for name in LAUNCHER_VARIABLES):
        return 0
    index = os.environ.get("RANK_ID") or os.environ.get("OMPI_COMM_WORLD_RANK") or "0"
    return int(index) if index.isdecimal() else 0


def local_index() -> int:
    """Return this process's index among those of its host, which msrun gives."""
    index = os.environ.get("DEVICE_ID", "")
    return int(index) if index.isdecimal() else process_index()


def process_name(index: int | None = None, host: str | None = None) -> str:
    """Return the name of a process for messages, of this one unless it is given: "process 3 on host1"."""
    return f"process {process_index() if index is None else index} on {plain(host or socket.gethostname())}"


def is_scheduler() -> bool:
    """Whether this is msrun's scheduler, a process that connects the others and does not train."""
    return os.environ.get("MS_ROLE") == "MS_SCHED"


def cluster() -> Cluster | None:
    """Return where the processes of this run meet, None if msrun did not start this process."""
    values = [os.environ.get(name, "") for name in ("MS_SCHED_HOST", "MS_SCHED_PORT", "MS_WORKER_NUM")]
    if os.environ.get("MS_ROLE") not in ("MS_SCHED", "MS_WORKER") or os.environ.get("MS_SIMULATION_LEVEL"):
        return None
    if not values[0] or not all(value.isdecimal() for value in values[1:]):
        return None
    timeout = os.environ.get("MS_TOPO_TIMEOUT", "")
    seconds = float(timeout) if timeout.isdecimal() else float("inf") if timeout.startswith("-") else DEFAULT_TIMEOUT
    return Cluster(values[0], int(values[1]), int(values[2]), seconds)


def has_several_hosts() -> bool:
    """Whether other hosts start a part of the processes, which may be so too if not msrun started this one."""
    count = _count("--worker_num")
    return count is None or count != local_process_count()


def local_process_count() -> int | None:
    """Return how many processes msrun starts on this host, None if that is not known."""
    return _count("--local_worker_num")


def _count(flag: str) -> int | None:
    arguments = _msrun_arguments()
    value = "" if arguments is None else arguments.get(flag, "8")  # msrun's default
    return int(value) if value.isdecimal() else None


def end_with_launcher(number: int = signal.SIGTERM) -> None:
    """Let Linux send this process a signal when msrun ends first, if msrun waits for its processes (--join).

    msrun ends its processes on Ctrl-C, but not when it gets SIGTERM or SIGKILL itself.
    """
    if (_msrun_arguments() or {}).get("--join") == "True" and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SIGNAL_WHEN_THE_PARENT_ENDS, int(number))


@contextmanager
def killed_with_launcher() -> Iterator[None]:
    """In the block, msrun's end kills this process: MindSpore holds Python's lock, and no signal would be handled."""
    end_with_launcher(signal.SIGKILL)
    try:
        yield
    finally:
        end_with_launcher()


def _msrun_arguments() -> dict[str, str] | None:
    """Return msrun's flags and their values, None if the parent process is not msrun."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
    except OSError:  # not Linux, or the parent has ended
        return None
    start = next((i for i, word in enumerate(words) if os.path.basename(word) == "msrun"), None)
    if start is None:
        return None
    arguments: dict[str, str] = {}
    flags = iter(words[start + 1 :])
    for flag in flags:
        if not flag.startswith("--"):
            break  # the script, whose own flags follow
        name, equals, value = flag.partition("=")
        arguments[name] = value if equals else next(flags, "")
    return arguments
