"""Programs that a script runs, and that end with it."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from ldm.runtime.script import EXIT_CODES, ignored_signals

POLL_SECONDS = 0.1
# How long a program has to end after each of two signals. Together with KILL_SECONDS they are less than
# ldm.runtime.script.GRACE_SECONDS.
TERMINATION_SECONDS = 2.0
KILL_SECONDS = 0.5  # after SIGKILL, which ends a program at once unless it hangs in a driver


def run(
    command: Sequence[str],
    watch: Callable[[int], None] | None = None,
    time_limit: float | None = None,
    **options: Any,
) -> int:
    """Run a program and return its exit code.

    If this process is interrupted, the program is told to end, and it has time to save its work.

    Args:
        command: The program and its arguments.
        watch: Called with the process id every POLL_SECONDS.
        time_limit: Seconds after which the program is ended, None for no limit.
        **options: Passed to subprocess.Popen.

    Raises:
        TimeoutError: The program did not end within its time.
    """
    # Without `with`, which would wait for a program that hangs in a driver: not even SIGKILL ends that one.
    process = subprocess.Popen(command, preexec_fn=unblock_signals, **options)
    latest = None if time_limit is None else time.monotonic() + time_limit
    try:
        while True:
            try:  # in short waits: the interrupt that ldm.runtime.script raises does not end a long one
                return process.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                if watch is not None:
                    watch(process.pid)
            if latest is not None and time.monotonic() > latest:
                raise TimeoutError(f"{command[0]} did not end within {time_limit:g} s")
    except BaseException:
        terminate(process)
        raise


def unblock_signals() -> None:
    """Unblock the signals that ldm.runtime.script blocks, as `preexec_fn` of a program that is to be run.

    A program inherits the blocked signals, and only SIGKILL could end it. Signals that were ignored before stay so.
    """
    for number in ignored_signals:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, EXIT_CODES)


def terminate(process: subprocess.Popen) -> None:
    """End a process with SIGTERM, with a second SIGTERM (which scripts of this project obey at once), or SIGKILL."""
    for _ in range(2):
        process.terminate()
        try:
            process.wait(TERMINATION_SECONDS)
            return
        except subprocess.TimeoutExpired:
            continue
    process.kill()
    with suppress(subprocess.TimeoutExpired):
        process.wait(KILL_SECONDS)
