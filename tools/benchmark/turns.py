"""A worker's side of the measurement: it does one call whenever it is asked to, and says how long that took.

The protocol is one line each way: the runner writes "call" or "end", the worker answers with JSON on its own standard
output. All else that a library prints there goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, Callable


class Turns:
    """Take it before the libraries are imported: it measures from there on."""

    def __init__(self) -> None:
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        sys.stdout.reconfigure(line_buffering=True)  # else what was printed would follow the last error, at the end
        self.begin = time.perf_counter()

    def serve(self, call: Callable[[], Any], versions: dict[str, str]) -> None:
        """Answer until "end". `call` returns when its work is done, not when it is queued."""
        self._say(build_seconds=time.perf_counter() - self.begin, versions=versions)
        for line in sys.stdin:
            if line.strip() == "end":
                break
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            self._say(seconds=time.perf_counter() - wall, cpu_seconds=time.process_time() - cpu)

    def _say(self, **answer: Any) -> None:
        self.answers.write(json.dumps(answer) + "\n")
        self.answers.flush()
