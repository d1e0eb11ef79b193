"""Measure calls in processes that take turns: `Worker` is the runner's side, `Turns` that of the process.

The runner writes a line to the worker's standard input for each call. The worker answers with a line of JSON on its
standard output. Whatever libraries print goes to standard error. The workers of other projects run this file too, so it
imports the standard library only.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from tools.benchmark.works import ROOT

WATCH_SECONDS = 0.1
PR_SET_PDEATHSIG = 1  # of prctl(2)
FORGET_PEAK = "5"  # proc(5): written to clear_refs, it sets VmHWM to the present size


@dataclass
class Measurement:
    """The measurements of a process: seconds of its first call and of the others, and its peak memory.

    Attributes:
        memory_gb: Largest resident size.
        calls_gb: The same from the end of building on, without what building alone held, such as weights before they
            were rounded to bf16 or converted to another library's form.
        own_gb: Largest size of memory that is no mapped file, from the end of building on, of samples.
        first_cpu: Processor seconds of the first call.
    """

    first: float
    seconds: list[float]
    cpu_seconds: list[float]
    memory_gb: float
    build_seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    calls_gb: float = 0.0
    own_gb: float = 0.0
    first_cpu: float | None = None


class WorkerFailed(Exception):
    """A worker ended unexpectedly. The message is the reason, such as the last line that it wrote."""


def take_turns(
    commands: Mapping[str, list[str]], calls: int, cores: Collection[int], limit_gb: float
) -> dict[str, Measurement | str]:
    """Measure processes that perform one call each in turn, while the others are stopped.

    Args:
        commands: {name: the command of its worker}.
        calls: Calls of each process.
        cores: The cores to run on.
        limit_gb: A process that exceeds this memory is ended.

    Returns:
        {name: the measurement, or the reason why there is none}.
    """
    measured: dict[str, Measurement | str] = {}
    workers: dict[str, Worker] = {}
    try:
        for name, command in commands.items():
            try:
                workers[name] = Worker(command, cores, limit_gb)
            except WorkerFailed as error:
                measured[name] = str(error)
        for _ in range(calls):
            for name, worker in list(workers.items()):
                try:
                    worker.call()
                except WorkerFailed as error:
                    measured[name] = str(error)
                    del workers[name]
        measured.update({name: worker.end() for name, worker in workers.items()})
    finally:
        for worker in workers.values():
            worker.kill()
    return measured


class Worker:
    """A process that performs a call on request, and is stopped in between."""

    def __init__(self, command: list[str], cores: Collection[int], limit_gb: float):
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=environment(cores),
            preexec_fn=confine(cores),
        )
        self.over_limit, self.limit_gb = False, limit_gb
        self.own_gb = 0.0
        self.calls: list[dict[str, float]] = []
        threading.Thread(target=self._watch, daemon=True).start()
        try:
            self.ready = self._answer()
        except BaseException:
            self.kill()
            raise
        self.build_gb, self.own_gb = self._status("VmHWM"), 0.0
        try:
            with open(f"/proc/{self.process.pid}/clear_refs", "w") as file:
                file.write(FORGET_PEAK)
        except OSError as error:  # the process has ended, or the system forbids it
            self.kill()
            raise WorkerFailed(f"the peak of its memory cannot be reset: {error.strerror}") from None
        self._signal(signal.SIGSTOP)

    def call(self) -> None:
        self._signal(signal.SIGCONT)
        assert self.process.stdin is not None
        self.process.stdin.write("call\n")
        self.process.stdin.flush()
        self.calls.append(self._answer())
        self._signal(signal.SIGSTOP)

    def end(self) -> Measurement:
        calls_gb, own_gb = self._status("VmHWM"), max(self.own_gb, self._status("RssAnon"))
        self.kill()
        seconds, cpu_seconds = ([call[name] for call in self.calls] for name in ("seconds", "cpu_seconds"))
        peak = max(self.build_gb, calls_gb)
        return Measurement(
            seconds[0], seconds[1:], cpu_seconds[1:], peak, calls_gb=calls_gb, own_gb=own_gb, first_cpu=cpu_seconds[0],
            **self.ready,
        )  # fmt: skip

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.process.wait()
        if self.over_limit:
            raise WorkerFailed(f"over {self.limit_gb:g} GB")
        self.log.seek(0)
        lines = [line for line in self.log.read().splitlines() if line.strip()]
        raise WorkerFailed(f"failed: {lines[-1] if lines else f'exit code {self.process.returncode}'}")

    def _signal(self, number: int) -> None:
        if self.process.poll() is None:
            os.kill(self.process.pid, number)

    def _status(self, key: str) -> float:
        """Return a value of /proc/PID/status in GB."""
        with open(f"/proc/{self.process.pid}/status") as status:
            return next((int(line.split()[1]) / 2**20 for line in status if line.startswith(key)), 0.0)

    def _watch(self) -> None:
        while self.process.poll() is None:
            try:
                self.over_limit = self._status("VmRSS") > self.limit_gb
                self.own_gb = max(self.own_gb, self._status("RssAnon"))
            except OSError:
                return
            if self.over_limit:
                self.process.kill()
                return
            time.sleep(WATCH_SECONDS)


def environment(cores: Collection[int]) -> dict[str, str]:
    """Return this process's environment with as many threads as cores."""
    return {**os.environ, "OMP_NUM_THREADS": str(len(cores)), "MKL_NUM_THREADS": str(len(cores))}


def confine(cores: Collection[int]) -> Callable[[], None]:
    """Return a `preexec_fn` that restricts a process to `cores` and ends it with this process, even while stopped."""

    def prepare() -> None:
        os.sched_setaffinity(0, cores)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    return prepare


class Turns:
    """The side of the process. Create it before importing libraries, because build_seconds is measured from there."""

    def __init__(self) -> None:
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        sys.stdout.reconfigure(line_buffering=True)  # keeps the order of prints and errors
        self.begin = time.perf_counter()

    def serve(self, call: Callable[[], Any], versions: dict[str, str]) -> None:
        """Perform the requested calls. `call` must return when its work is done, not when it is queued."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # gives back to the system what building has freed
        versions = {"Python": platform.python_version(), **versions}
        self._answer(build_seconds=time.perf_counter() - self.begin, versions=versions)
        for _ in sys.stdin:
            wall, cpu = time.perf_counter(), _cpu_seconds()
            call()
            self._answer(seconds=time.perf_counter() - wall, cpu_seconds=_cpu_seconds() - cpu)

    def _answer(self, **answer: Any) -> None:
        self.answers.write(json.dumps(answer) + "\n")
        self.answers.flush()


def _cpu_seconds() -> float:
    """Return the CPU seconds of this process and of its finished children."""
    return time.process_time() + sum(os.times()[2:4])
