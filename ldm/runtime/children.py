"""Processes that a script starts, and that end with it."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

from ldm.runtime.script import EXIT_CODES, ignored

TURN = 0.1  # seconds
PATIENCE = 2.0  # seconds that a child has after either signal; both are less than ldm.runtime.script.GRACE


def hear_signals() -> None:
    """For `preexec_fn` of programs that are not this project's: ldm.runtime.script blocks the signals in its own
    threads, a child inherits that, and could be ended by nothing but SIGKILL. What was ignored before stays so.
    """
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, EXIT_CODES)


def call(command: Sequence[str], watch: Callable[[int], None] | None = None, **options: Any) -> int:
    """Run a program and return its exit code; the options are those of subprocess.Popen.

    watch: called with the process's id every TURN seconds. Where this process is interrupted, the child is told to end,
    and waited for: what it had in hand is not lost.
    """
    with subprocess.Popen(command, preexec_fn=hear_signals, **options) as child:
        try:
            while True:
                try:  # in short turns: ldm.runtime.script's interrupt is no signal that would end a long wait
                    return child.wait(TURN)
                except subprocess.TimeoutExpired:
                    if watch is not None:
                        watch(child.pid)
        except KeyboardInterrupt:
            end(child)
            raise


def end(child: subprocess.Popen) -> None:
    """Let a child end itself: by a first signal, and by a second one, which means at once. Kill it otherwise."""
    for _ in range(2):
        child.terminate()
        try:
            child.wait(PATIENCE)
            return
        except subprocess.TimeoutExpired:
            continue
    child.kill()
