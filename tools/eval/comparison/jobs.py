"""Run the scripts of this project, and jobs in the environment with PyTorch and diffusers."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.files.paths import ROOT
from ldm.metrics.report import write_json
from ldm.runtime import subprocesses

WORKER = "tools/eval/comparison/diffusers_worker.py"
VENV = ROOT / ".venv-parity"
PACKAGES = ("torch", "diffusers", "transformers", "peft", "safetensors", "matplotlib", "PIL", "numpy", "ftfy", "tqdm")


def run_command(*command: str) -> dict[str, float | None]:
    """Print a command as a user would type it, and run it. Returns its "seconds" and its "peak_memory_mb"."""
    print("$ " + " ".join(shlex.quote(part) for part in command), flush=True)
    begin, peaks = time.perf_counter(), []
    # With os.environ as Python knows it: MindSpore sets OMP_NUM_THREADS=1 only in the C environment, which would leave
    # PyTorch with one thread.
    code = subprocesses.run(command, lambda process: peaks.append(_peak_memory(process)), env=dict(os.environ))
    if code:
        raise UserError(
            f"{command[1]} ended with exit code {code}; its message is above. Finished stages are kept: the same "
            "command continues from there"
        )
    return {"seconds": time.perf_counter() - begin, "peak_memory_mb": next(filter(None, reversed(peaks)), None)}


def _peak_memory(pid: int) -> float | None:
    """Return the peak memory of a process in MB (VmHWM), or None if the system does not report it.

    The resource usage of a child would include the memory of this process, from which it was forked.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    peaks = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return peaks[0] * 1024 / 1e6 if peaks else None


def script(name: str) -> str:
    """Return the path of a script of this project as a user would type it."""
    return os.path.relpath(ROOT / name)


class Worker:
    """Runs jobs of diffusers_worker.py, by the interpreter with PyTorch. A job is a JSON file, and so is its result."""

    def __init__(self, python: Path):
        self.python = python

    def run(self, command: str, folder: Path, job: Mapping[str, Any]) -> dict[str, Any]:
        """Run a job in a folder. Returns its result with its seconds and its peak memory."""
        write_json(folder / "job.json", {**job, "output": str(folder), "result": str(folder / "result.json")})
        usage = run_command(str(self.python), script(WORKER), command, str(folder / "job.json"))
        return {**json.loads((folder / "result.json").read_text(encoding="utf-8")), **usage}


def reference_python(path: str | None) -> Path:
    """Return the interpreter with PyTorch.

    Without a path, it is that of .venv-parity, which `make` builds if it is missing or outdated. Raises UserError if it
    cannot be built, does not run, or lacks a package.
    """
    if path is None:
        try:
            code = subprocesses.run(["make", "--silent", ".venv-parity/ready"], cwd=ROOT)
        except OSError:
            raise UserError(
                "make is not installed: build an environment from requirements-parity.txt and give its interpreter "
                "as --reference_python"
            ) from None
        if code:
            raise UserError(
                "make .venv-parity/ready failed, its message is above: diffusers needs its own environment; give the "
                "interpreter of another one as --reference_python"
            )
    python = VENV / "bin" / "python" if path is None else Path(path).absolute()
    if not os.access(python, os.X_OK) or python.is_dir():
        raise UserError(
            f"--reference_python {python} is not a program: give the interpreter of an environment with "
            "requirements-parity.txt in it"
        )
    test = "import sys, importlib.util as i; print(*(n for n in sys.argv[1:] if i.find_spec(n) is None))"
    done = subprocess.run([str(python), "-c", test, *PACKAGES], capture_output=True, text=True)
    if done.returncode:
        message = (done.stderr.strip() or "no message").splitlines()[-1]
        raise UserError(f"{python} is not a Python that works: {message}")
    if done.stdout.split():
        raise UserError(
            f"{python} has no {', '.join(done.stdout.split())}: install requirements-parity.txt there (without "
            "--reference_python, make does it)"
        )
    return python
