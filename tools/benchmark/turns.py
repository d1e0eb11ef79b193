"""A worker's side of the measurement: it performs a call on request and returns its duration.

The runner writes lines, "call" or "end", to the worker's standard input. The worker answers each with a line of JSON on
its standard output. Whatever libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any


class Turns:
    """The protocol of a worker. Create it before importing libraries, because build_seconds is measured from there."""

    def __init__(self) -> None:
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        sys.stdout.reconfigure(line_buffering=True)  # keeps the order of prints and errors
        self.begin = time.perf_counter()

    def serve(self, call: Callable[[], Any], versions: dict[str, str]) -> None:
        """Answers until "end". `call` must return when its work is done, not when it is queued."""
        self._answer(build_seconds=time.perf_counter() - self.begin, versions=versions)
        for line in sys.stdin:
            if line.strip() == "end":
                break
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            self._answer(seconds=time.perf_counter() - wall, cpu_seconds=time.process_time() - cpu)

    def _answer(self, **answer: Any) -> None:
        self.answers.write(json.dumps(answer) + "\n")
        self.answers.flush()
