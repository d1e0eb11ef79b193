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

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from tools.benchmark.worker import Measurement, confine, environment, take_turns  # noqa: E402
from tools.benchmark.works import MEMORY_TABLE, TABLE, WORKS, Work  # noqa: E402

SCRATCH = Path(tempfile.gettempdir()) / "benchmark"


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
    """Return {side: the command of its worker}."""
    ours = [sys.executable, "-m", "tools.benchmark.ours", work.name]
    if work.peer == "reference" and args.reference_python:
        return {"ours": ours, "peer": [str(args.reference_python), "-m", "tools.benchmark.reference", work.name]}
    if work.peer in ("reference", "none"):
        return {"ours": ours}
    return {"ours": ours, "peer": [*ours, "--kind", work.peer]}


def measure(work: Work, args: Settings) -> dict[str, Measurement | str]:
    """Return {side: its measurement, or the reason why there is none}."""

    def turns(sides: dict[str, list[str]], calls: int) -> dict[str, Measurement | str]:
        return take_turns(sides, calls, args.cores, args.memory_limit)

    if work.kind == "script":
        return {"ours": measure_script(args)}
    sides = commands(work, args)
    if work.kind == "first_step_cached":  # the first process fills the cache, the second one is measured
        with temporary_folder(SCRATCH) as folder:
            sides["ours"] += ["--graphs", str(folder)]
            filled = turns(sides, 1)
            return filled if isinstance(filled["ours"], str) else turns(sides, 1)
    calls = 1 if work.kind in ("epoch", "first_step") else args.calls + work.calls + 1
    if not args.apart:
        return turns(sides, calls)
    return {name: turns({name: command}, calls)[name] for name, command in sides.items()}


def measure_script(args: Settings) -> Measurement | str:
    """Measure text_to_image.py from the start of the process to its end. The PNG is written last."""
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
    return Measurement(seconds[0], seconds[1:], cpu_seconds[1:], peak)


def summarise(work: Work, repeats: list[dict[str, Measurement | str]]) -> dict[str, Any]:
    """Return the medians and ratios of a workload over all repeats, for the JSON and the table."""
    line: dict[str, Any] = {name: getattr(work, name) for name in ("name", "title", "time", "memory")}
    line["peer_is"] = work.peer
    for name in ("ours", "peer"):
        found = [measured[name] for measured in repeats if name in measured]
        failed = [reason for reason in found if isinstance(reason, str)]
        if failed or not found:
            line[name] = {"problem": failed[0] if failed else "none" if work.peer == "none" else "not measured"}
            continue
        runs = [run for run in found if isinstance(run, Measurement)]
        once = not runs[0].seconds  # an epoch or a first step has a single call
        line[name] = {
            "seconds": statistics.median(s for run in runs for s in ([run.first] if once else run.seconds)),
            "cpu_seconds": None if once else statistics.median(s for run in runs for s in run.cpu_seconds),
            "first_seconds": statistics.median(run.first for run in runs),
            "build_seconds": statistics.median(run.build_seconds for run in runs),
            "memory_gb": statistics.median(run.memory_gb for run in runs),
            "all_seconds": [[run.first, *run.seconds] for run in runs],
            "versions": runs[0].versions,
        }
    ours, peer = line["ours"], line["peer"]
    if "problem" not in ours and "problem" not in peer:
        line["time_ratio"] = ours["seconds"] / peer["seconds"]
        line["memory_ratio"] = ours["memory_gb"] / peer["memory_gb"]
        if ours["cpu_seconds"] and peer["cpu_seconds"]:
            line["cpu_ratio"] = ours["cpu_seconds"] / peer["cpu_seconds"]
    return line


def machine(args: Settings) -> dict[str, Any]:
    """Return the description of the machine for the JSON and the table."""
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


def reference_python(path: Path) -> Path | None:
    """Return the interpreter if it has the packages of diffusers' side. Otherwise print a hint and return None."""
    if is_file(path, "--reference_python"):
        command = [str(path), "-c", "import torch, diffusers, transformers"]
        if subprocess.run(command, capture_output=True).returncode == 0:
            return path
    print(
        f"{path} has no torch, diffusers and transformers: only this project is measured (`make test-parity` creates "
        ".venv-parity, or give --reference_python)",
        file=sys.stderr,
    )
    return None


def chosen_works(args: Settings) -> list[Work]:
    """Return the named workloads, or all of a table. Raises UserError for an unknown name."""
    for name in args.works:
        if name not in WORKS:
            raise UserError(f"there is no workload '{plain(name)}': --list names them")
    return [WORKS[name] for name in args.works] or list((MEMORY_TABLE if args.memory_table else TABLE).values())


def parse(argv: list[str] | None = None) -> Settings:
    """Read the command line. Raises UserError for an output without a name, and for cores that cannot be used."""
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
        for work in WORKS.values():
            print(f"{work.name:16s} {work.title}")
        return
    works = chosen_works(args)
    results = [args.output.with_suffix(suffix) for suffix in (".json", ".md")]
    with claim_file(results[0], "--output"), claim_file(results[1], "--output"):
        measure_all(works, args, *results)


def measure_all(works: list[Work], args: Settings, numbers: Path, table: Path) -> None:
    """Measure the workloads in turn, and write the results after each."""
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
