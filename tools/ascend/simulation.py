"""Run a program on MindSpore's Ascend back end without a device, and count the kernels that it selects.

The program is a process of its own, because MindSpore reads the environment variables when it is imported. Its log is
read from a pipe, line by line: a whole log of a full-size graph takes gigabytes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ldm.runtime.subprocesses import terminate, unblock_signals
from tools.ascend.stub_cann import DEFAULT_SOC, stub_environment

# What MindSpore's log calls the kinds of kernels, and what they are.
KINDS = {
    "opapi_kernel": "aclnn",  # CANN's operators with two C functions each
    "acl_kernel": "aclop",  # CANN's older operators, which cost several times as much to launch
    "rt_kernel": "view",  # no launch where the result is the same memory, such as Reshape
    "hccl_kernel": "hccl",  # communication
}
KERNEL = re.compile(r"GenerateKernelMod\] kernel opname:(\w+), kernel type:(\w+)")
FROM_CACHE = "Use the compilation cache and execute the backend actions only"
MINDSPORE_LOG = re.compile(r"\[(?:DEBUG|INFO|WARNING|ERROR|CRITICAL)\] [A-Z_]+\(\d+")
MARK = "@dry run: "  # begins the lines by which the program says where a graph begins and ends
LAST_LINES = 200  # lines of the program that are kept for an error

Kernels = Counter  # {(operator, kind): how many}


@dataclass
class Graph:
    """A compiled graph."""

    name: str
    kernels: Kernels  # {(operator, kind): how many}
    peak_bytes: int  # of the memory plan, with weights and inputs, without CANN's workspaces
    seconds: float  # to compile it

    def total(self, kind: str) -> int:
        """Return the number of kernels of a kind, such as "aclnn"."""
        return sum(count for (_, found), count in self.kernels.items() if found == kind)

    def totals(self) -> str:
        """Return the number of kernels of each kind in words."""
        return ", ".join(f"{self.total(kind)} {kind}" for kind in sorted({kind for _, kind in self.kernels}))

    def table(self) -> dict[str, Any]:
        """Return the counts and the memory for a JSON file: {kind: {operator: count}}."""
        kinds = sorted({kind for _, kind in self.kernels})
        by_kind = {
            kind: {operator: n for (operator, found), n in sorted(self.kernels.items()) if found == kind}
            for kind in kinds
        }
        return {"kernels": by_kind, "peak_bytes": self.peak_bytes}


@dataclass
class Simulated:
    """What a program did on the simulated device."""

    exit_code: int
    kernels: Kernels  # of the whole program
    graphs_from_cache: int = 0  # graphs that the compile cache spared the front end
    graphs: list[Graph] = field(default_factory=list)  # those that `begin_graph` and `end_graph` enclose
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=LAST_LINES))  # what it printed, without the log

    @property
    def text(self) -> str:
        """The last lines that the program printed."""
        return "\n".join(self.lines)


def begin_graph() -> None:
    """Say that what is compiled from here on belongs to a graph. The program calls it."""
    print(f"{MARK}{{}}", file=sys.stderr, flush=True)


def end_graph(name: str, peak_bytes: int, seconds: float) -> None:
    """Say that a graph is compiled. The program calls it."""
    values = {"name": name, "peak_bytes": peak_bytes, "seconds": seconds}
    print(f"{MARK}{json.dumps(values)}", file=sys.stderr, flush=True)


def simulate(
    command: Sequence[str],
    soc: str = DEFAULT_SOC,
    process_count: int = 1,
    environment: Mapping[str, str] | None = None,
    log_modules: str = "{DEVICE:1,PIPELINE:2}",
) -> Simulated:
    """Run Python with the arguments `command` on the simulated device, in a temporary folder.

    Args:
        command: The arguments of Python, such as ["-m", "tools.ascend.graphs"].
        soc: The name of the device.
        process_count: Processes of a data-parallel run. Only the first one is run.
        environment: Further environment variables.
        log_modules: Parts of MindSpore whose log is read, {name: least level}. All others log their errors only.
    """
    variables = {**os.environ, **stub_environment(soc), "GLOG_v": "3", "MS_SUBMODULE_LOG_v": log_modules}
    if process_count > 1:
        variables.update(RANK_SIZE=str(process_count), RANK_ID="0")
    variables.update(environment or {})
    result = Simulated(0, Counter())
    # MindSpore writes files into the working directory.
    with tempfile.TemporaryDirectory(prefix="dry-run-") as folder, subprocess.Popen(
        [sys.executable, *command], cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", preexec_fn=unblock_signals,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            _read(process.stdout, result)
            result.exit_code = process.wait()
        except BaseException:
            terminate(process)
            raise
    return result


def _read(lines: Any, result: Simulated) -> None:
    """Add the lines that a program prints to its result."""
    graph: Kernels = Counter()
    for line in lines:
        kernel = KERNEL.search(line)
        if kernel is not None:
            key = kernel[1], KINDS.get(kernel[2], kernel[2])
            result.kernels[key] += 1
            graph[key] += 1
        elif line.startswith(MARK):
            values = json.loads(line[len(MARK) :])
            if values:
                result.graphs.append(Graph(kernels=graph, **values))
            graph = Counter()
        elif FROM_CACHE in line:
            result.graphs_from_cache += 1
        elif not MINDSPORE_LOG.match(line):
            result.lines.append(line.rstrip("\n"))
