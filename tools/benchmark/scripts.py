"""Measure scripts from the start of the process to its end. The PNG is written last."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from ldm.files.atomic import temporary_folder
from tools.benchmark.worker import Measurement, confine, environment
from tools.benchmark.works import ROOT

SCRATCH = Path(tempfile.gettempdir()) / "benchmark"


def measure_scripts(
    commands: Mapping[str, Callable[[Path], list[str]]], calls: int, cores: Collection[int]
) -> dict[str, Measurement | str]:
    """Run scripts in turn, one process at a time.

    Args:
        commands: {name: a function that returns the command, given the folder to write the PNG to}.
        calls: Runs of each script after the first.
        cores: The cores to run on.

    Returns:
        {name: the measurement, or the reason why there is none}.
    """
    runs: dict[str, list[tuple[float, float, float]]] = {name: [] for name in commands}
    failed: dict[str, Measurement | str] = {}
    for _ in range(calls + 1):
        for name, command in commands.items():
            if name not in failed:
                found = _run(command, cores)
                if isinstance(found, str):
                    failed[name] = found
                else:
                    runs[name].append(found)
    measured: dict[str, Measurement | str] = {}
    for name, found in runs.items():
        if name in failed:
            measured[name] = failed[name]
            continue
        seconds, cpu_seconds, peaks = ([run[i] for run in found] for i in range(3))
        measured[name] = Measurement(
            seconds[0], seconds[1:], cpu_seconds[1:], max(peaks), calls_gb=max(peaks), first_cpu=cpu_seconds[0]
        )
    return measured


def _run(command: Callable[[Path], list[str]], cores: Collection[int]) -> tuple[float, float, float] | str:
    """Return the seconds, the processor's seconds and the peak memory in GB of a run, or why it failed."""
    with temporary_folder(SCRATCH) as folder, tempfile.TemporaryFile("w+") as log:
        words = command(folder)
        begin = time.perf_counter()
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=log,
            env=environment(cores),
            preexec_fn=confine(cores),
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)  # Popen need not wait for it any more
        if status or not list(folder.rglob("*.png")):
            log.seek(0)
            lines = [line for line in log.read().splitlines() if line.strip()]
            name = words[words.index("-m") + 1] if "-m" in words else words[1]
            last = f": {lines[-1]}" if status and lines else ""
            return f"failed: {name} ended with {process.returncode} and wrote no PNG{last}"
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20
