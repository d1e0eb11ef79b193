"""Measure time and memory of this project and of diffusers on this machine.

    python tools/benchmark/run.py                        # all workloads of the table
    python tools/benchmark/run.py unet_256 lora_nano     # some of them
    python tools/benchmark/run.py --list
    python tools/benchmark/run.py --memory_table         # LoRA and full fine-tuning at several sizes and batches

Both sides run the same shapes with random weights, each in its own process. They take turns: one call each, while the
other process is stopped. The table compares the medians, without the first call, which compiles. Memory is a process's
largest resident size (VmHWM). Results are written to OUTPUT.json and OUTPUT.md.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ldm.runtime.script import describe_progress, run_script, start_script  # noqa: E402

if __name__ == "__main__":
    start_script()

from tqdm import tqdm  # noqa: E402

from ldm.errors import UserError, plain  # noqa: E402
from ldm.files.atomic import atomic_path, temporary_folder  # noqa: E402
from ldm.files.documents import json_text  # noqa: E402
from ldm.files.inputs import is_file  # noqa: E402
from ldm.files.outputs import claim_file  # noqa: E402
from ldm.settings.declare import setting  # noqa: E402
from ldm.settings.read import read_settings  # noqa: E402
from tools.benchmark.report import markdown  # noqa: E402
from tools.benchmark.works import MEMORY_TABLE, TABLE, Work  # noqa: E402

SCRATCH = Path(tempfile.gettempdir()) / "benchmark"
WATCH_SECONDS = 0.1
PR_SET_PDEATHSIG = 1  # of prctl(2)


class OverLimit(Exception):
    """A worker exceeded the memory limit."""


class WorkerFailed(Exception):
    """A worker ended unexpectedly. The message is the last line that it wrote."""


@dataclass
class Side:
    """The measurements of a process: seconds of its first call and of the others, and its peak memory."""

    first: float
    seconds: list[float]
    cpu_seconds: list[float]
    memory_gb: float
    build_seconds: float
    versions: dict[str, str] = field(default_factory=dict)


class Worker:
    """A process that performs a call on request, and is stopped in between."""

    def __init__(self, command: list[str], cores: set[int], limit_gb: float):
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
        self.calls: list[dict] = []
        threading.Thread(target=self._watch, daemon=True).start()
        try:
            self.ready = self._answer()
        except BaseException:
            self.kill()
            raise
        self._signal(signal.SIGSTOP)

    def call(self) -> None:
        self._signal(signal.SIGCONT)
        self.process.stdin.write("call\n")
        self.process.stdin.flush()
        self.calls.append(self._answer())
        self._signal(signal.SIGSTOP)

    def end(self) -> Side:
        peak = self._status("VmHWM")
        self.kill()
        first, *steady = self.calls
        return Side(
            first["seconds"],
            [call["seconds"] for call in steady],
            [call["cpu_seconds"] for call in steady],
            peak,
            self.ready["build_seconds"],
            self.ready["versions"],
        )

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.process.wait()
        if self.over_limit:
            raise OverLimit
        self.log.seek(0)
        lines = [line for line in self.log.read().splitlines() if line.strip()]
        raise WorkerFailed(lines[-1] if lines else f"exit code {self.process.returncode}")

    def _signal(self, number: int) -> None:
        if self.process.poll() is None:
            os.kill(self.process.pid, number)

    def _status(self, key: str) -> float:
        """Returns a value of /proc/PID/status in GB."""
        with open(f"/proc/{self.process.pid}/status") as status:
            return next((int(line.split()[1]) / 2**20 for line in status if line.startswith(key)), 0.0)

    def _watch(self) -> None:
        while self.process.poll() is None:
            try:
                over = self._status("VmRSS") > self.limit_gb
            except OSError:
                return
            if over:
                self.over_limit = True
                self.process.kill()
            time.sleep(WATCH_SECONDS)


def environment(cores: set[int]) -> dict[str, str]:
    """Returns this process's environment with as many threads as cores."""
    return {**os.environ, "OMP_NUM_THREADS": str(len(cores)), "MKL_NUM_THREADS": str(len(cores))}


def confine(cores: set[int]) -> Callable[[], None]:
    """Returns a `preexec_fn` that restricts a process to `cores` and ends it with this process, even while stopped."""

    def prepare() -> None:
        os.sched_setaffinity(0, cores)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    return prepare


@dataclass
class Settings:
    """The command line."""

    works: list[str] = setting([], "names of workloads (see --list); none for the whole table", positional=True)
    list_works: bool = setting(False, "list the workloads and exit", key="list")
    memory_table: bool = setting(False, "run the workloads of the memory table")
    repeats: int = setting(2, "pairs of processes for each workload", low=1)
    calls: int = setting(5, "calls in a process after the first, more for short workloads", low=1)
    cores: list[int] = setting(
        sorted(os.sched_getaffinity(0)),
        "the cores to run on, with as many threads, such as 0,1",
        low=0,
        length=(1, 4096),
    )
    apart: bool = setting(False, "run one process after the other instead of in turns, if memory does not hold both")
    memory_limit: float = setting(20.0, "end a process that exceeds this many GB", low=0.1)
    reference_python: Path = setting(ROOT / ".venv-parity" / "bin" / "python", "a Python with diffusers", path=True)
    output: Path = setting(ROOT / "output" / "benchmark", "path of the results, without a suffix", path=True)


def commands(work: Work, args: Settings) -> dict[str, list[str]]:
    """Returns {side: the command of its worker}."""
    rest = [work.name, "--threads", str(len(args.cores))]
    ours = [sys.executable, "-m", "tools.benchmark.ours", *rest]
    if work.peer == "ours":
        return {"ours": ours, "peer": [*ours, "--kind", "generate"]}
    if work.peer == "reference" and args.reference_python:
        return {"ours": ours, "peer": [args.reference_python, "-m", "tools.benchmark.reference", *rest]}
    return {"ours": ours}


def measure(work: Work, args: Settings) -> dict[str, Side | str]:
    """Returns {side: its measurements, or why it has none}."""
    if work.kind == "script":
        return {"ours": measure_script(args)}
    if work.kind == "first_step_cached":
        return {"ours": measure_cached(work, args)}
    calls = 1 if work.kind in ("epoch", "first_step") else args.calls + work.calls + 1
    sides = commands(work, args)
    measured: dict[str, Side | str] = {}
    groups = [[name] for name in sides] if args.apart else [list(sides)]
    for group in groups:
        workers: dict[str, Worker] = {}
        try:
            for name in group:
                try:
                    workers[name] = Worker(sides[name], args.cores, args.memory_limit)
                except (OverLimit, WorkerFailed) as error:
                    measured[name] = reason(error, args)
            for _ in range(calls):
                for name, worker in list(workers.items()):
                    try:
                        worker.call()
                    except (OverLimit, WorkerFailed) as error:
                        measured[name] = reason(error, args)
                        del workers[name]
            measured.update({name: worker.end() for name, worker in workers.items()})
        finally:
            for worker in workers.values():
                worker.kill()
    return measured


def reason(error: Exception, args: Settings) -> str:
    return f"over {args.memory_limit:g} GB" if isinstance(error, OverLimit) else f"failed: {error}"


def measure_cached(work: Work, args: Settings) -> Side | str:
    """Measures the first call of a second process, after a first process has filled the cache."""
    with temporary_folder(SCRATCH) as folder:
        for _ in range(2):
            worker = None
            try:
                worker = Worker([*commands(work, args)["ours"], "--graphs", str(folder)], args.cores, args.memory_limit)
                worker.call()
                side = worker.end()
            except (OverLimit, WorkerFailed) as error:
                return reason(error, args)
            finally:
                if worker is not None:
                    worker.kill()
    return side


def measure_script(args: Settings) -> Side | str:
    """Measures text_to_image.py from the start of the process to its end. The PNG is written last."""
    command = [sys.executable, "text_to_image.py", "--version", "nano", "--prompt", "a cat", "--output_path"]
    seconds, cpu_seconds, peak = [], [], 0.0
    for _ in range(args.calls + 1):
        with temporary_folder(SCRATCH) as folder:
            begin = time.perf_counter()
            process = subprocess.Popen(
                [*command, str(folder)],
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment(args.cores),
                preexec_fn=confine(args.cores),
            )
            _, status, usage = os.wait4(process.pid, 0)
            seconds.append(time.perf_counter() - begin)
            if status or not list(folder.rglob("*.png")):
                return f"failed: text_to_image.py ended with {os.waitstatus_to_exitcode(status)} and wrote no PNG"
        cpu_seconds.append(usage.ru_utime + usage.ru_stime)
        peak = max(peak, usage.ru_maxrss / 2**20)
    return Side(seconds[0], seconds[1:], cpu_seconds[1:], peak, 0.0)


def summarise(work: Work, repeats: list[dict[str, Side | str]]) -> dict:
    """Returns the medians and ratios of a workload over all repeats, for the JSON and the table."""
    line: dict = {
        "name": work.name,
        "title": work.title,
        "time": work.time,
        "memory": work.memory,
        "peer_is": work.peer,
    }
    for name in ("ours", "peer"):
        sides = [measured[name] for measured in repeats if name in measured]
        failed = [side for side in sides if isinstance(side, str)]
        if failed or not sides:
            line[name] = {"problem": failed[0] if failed else "none" if work.peer == "none" else "not measured"}
            continue
        once = not sides[0].seconds  # an epoch or a first step has a single call
        line[name] = {
            "seconds": statistics.median(s for side in sides for s in ([side.first] if once else side.seconds)),
            "first_seconds": statistics.median(side.first for side in sides),
            "cpu_seconds": None if once else statistics.median(s for side in sides for s in side.cpu_seconds),
            "build_seconds": statistics.median(side.build_seconds for side in sides),
            "memory_gb": statistics.median(side.memory_gb for side in sides),
            "all_seconds": [[side.first, *side.seconds] for side in sides],
            "versions": sides[0].versions,
        }
    ours, peer = line["ours"], line["peer"]
    if "problem" not in ours and "problem" not in peer:
        line["time_ratio"] = ours["seconds"] / peer["seconds"]
        line["memory_ratio"] = ours["memory_gb"] / peer["memory_gb"]
        if ours["cpu_seconds"] and peer["cpu_seconds"]:
            line["cpu_ratio"] = ours["cpu_seconds"] / peer["cpu_seconds"]
    return line


def machine(args: Settings) -> dict:
    with open("/proc/cpuinfo") as file:
        model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "unknown")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return {
        "cpu": model,
        "cores": sorted(args.cores),
        "memory_gb": round(memory),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }


def reference_python(path: Path) -> str | None:
    """Returns the interpreter if it has the packages of diffusers' side. Otherwise prints a hint and returns None."""
    if is_file(path, "--reference_python"):
        command = [str(path), "-c", "import torch, diffusers, transformers"]
        if subprocess.run(command, capture_output=True).returncode == 0:
            return str(path)
    print(
        f"{path} has no torch, diffusers and transformers: only this project is measured (`make test-parity` creates "
        ".venv-parity, or give --reference_python)",
        file=sys.stderr,
    )
    return None


def chosen_works(args: Settings) -> list[Work]:
    known = {**TABLE, **MEMORY_TABLE}
    for name in args.works:
        if name not in known:
            raise UserError(f"there is no workload '{plain(name)}': --list names them")
    return [known[name] for name in args.works] or list((MEMORY_TABLE if args.memory_table else TABLE).values())


def parse(argv: list[str] | None = None) -> Settings:
    args = read_settings(Settings, argv, description=__doc__)
    if not args.output.name:
        raise UserError(f"--output {args.output} is a folder: give the name of a file in it")
    args.cores = sorted(set(args.cores))
    if not set(args.cores) <= os.sched_getaffinity(0):
        raise UserError(f"--cores {args.cores}: give some of {sorted(os.sched_getaffinity(0))}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.list_works:
        for work in {**TABLE, **MEMORY_TABLE}.values():
            print(f"{work.name:16s} {work.title}")
        return
    works = chosen_works(args)
    results = [args.output.with_suffix(suffix) for suffix in (".json", ".md")]
    with claim_file(results[0], "--output"), claim_file(results[1], "--output"):
        measure_all(works, args, *results)


def measure_all(works: list[Work], args: Settings, numbers: Path, table: Path) -> None:
    """Measures the workloads in turn, and writes the results after each."""
    args.reference_python = reference_python(args.reference_python)
    result = {
        "machine": machine(args),
        "settings": {"repeats": args.repeats, "calls": args.calls, "apart": args.apart},
        "works": [],
    }
    describe_progress(lambda: f"after {len(result['works'])} of {len(works)} workloads, whose results are in {table}")
    with tqdm(works, unit="workload") as bar:
        for work in bar:
            bar.set_postfix_str(work.name)
            result["works"].append(summarise(work, [measure(work, args) for _ in range(args.repeats)]))
            with atomic_path(numbers) as path:
                path.write_text(json_text(result, indent=1) + "\n", encoding="utf-8")
            with atomic_path(table) as path:
                path.write_text(markdown(result), encoding="utf-8")
    print(markdown(result))


if __name__ == "__main__":
    run_script(main)
