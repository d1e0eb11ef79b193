"""Measure time and memory of this project and of diffusers on this machine.

    python tools/benchmark/run.py                        # all workloads of the table
    python tools/benchmark/run.py unet_256 lora_nano     # some of them
    python tools/benchmark/run.py --list
    python tools/benchmark/run.py --memory_table         # LoRA and full fine-tuning at several sizes and batches
    python tools/benchmark/run.py --peers all            # bf16, torch.compile, OpenVINO and stable-diffusion.cpp too

Both sides run the same shapes with random weights, each in its own process. They take turns: one call each, while the
other process is stopped. The table compares the medians, without the first call, which compiles. Memory is a process's
largest resident size (VmHWM). Results are written to OUTPUT.json and OUTPUT.md.

--peers chooses other sides, a column each. They take turns in groups of --together, with this project in each, because
stopped processes keep their memory. OpenVINO and stable-diffusion.cpp need an environment of their own (make peers).
"""

from __future__ import annotations

import os
import subprocess
import sys
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
from tools.benchmark.columns import measure_columns  # noqa: E402
from tools.benchmark.peers import ALL, OURS, PEERS, Pythons  # noqa: E402
from tools.benchmark.processor import machine  # noqa: E402
from tools.benchmark.report import markdown, markdown_columns  # noqa: E402
from tools.benchmark.scripts import SCRATCH, measure_scripts  # noqa: E402
from tools.benchmark.summary import Found, summarise, summarise_columns  # noqa: E402
from tools.benchmark.worker import take_turns  # noqa: E402
from tools.benchmark.works import MEMORY_TABLE, PEERS_TABLE, TABLE, WORKS, Work  # noqa: E402

ONE_CALL = ("epoch", "first_step", "load")  # kinds


@dataclass
class Settings:
    """The command line."""

    works: list[str] = setting([], "names of workloads (see --list); none for the whole table", positional=True)
    list_works: bool = setting(False, "list the workloads and exit", key="list")
    memory_table: bool = setting(False, "run the workloads of the memory table")
    repeats: int = setting(2, "pairs of processes for each workload", low=1)
    calls: int = setting(
        5, "calls in a process after the first, more for short workloads; 0: the first call counts in the others", low=0
    )
    cores: list[int] = setting(
        sorted(os.sched_getaffinity(0)),
        "the cores to run on, with as many threads, such as 0,1",
        low=0,
        length=(1, 4096),
    )
    apart: bool = setting(False, "run one process after the other instead of in turns, if memory does not hold both")
    memory_limit: float = setting(20.0, "end a process that exceeds this many GB", low=0.1)
    reference_python: Path = setting(ROOT / ".venv-parity" / "bin" / "python", "a Python with diffusers", path=True)
    peers: list[str] = setting([], "the columns beside this project in fp32, or all of them", choices=(*PEERS, ALL))
    together: int = setting(3, "processes that take turns with --peers; those that wait keep their memory", low=2)
    peers_python: Path = setting(
        ROOT / ".venv-peers" / "bin" / "python", "a Python with OpenVINO and stable-diffusion.cpp", path=True
    )
    output: Path = setting(ROOT / "output" / "benchmark", "path of the results, without a suffix", path=True)


def commands(work: Work, args: Settings) -> dict[str, list[str]]:
    """Return {side: the command of its worker}."""
    ours = [sys.executable, "-m", "tools.benchmark.ours", work.name]
    if work.peer == "reference" and args.reference_python:
        return {"ours": ours, "peer": [str(args.reference_python), "-m", "tools.benchmark.reference", work.name]}
    if work.peer in ("reference", "none"):
        return {"ours": ours}
    return {"ours": ours, "peer": [*ours, "--kind", work.peer]}


def measure(work: Work, args: Settings) -> Found:
    """Return {side: its measurement, or the reason why there is none}."""

    def turns(sides: dict[str, list[str]], calls: int) -> Found:
        return take_turns(sides, calls, args.cores, args.memory_limit)

    if work.kind == "script":
        return measure_scripts({"ours": script}, args.calls, args.cores)
    sides = commands(work, args)
    if work.kind == "first_step_cached":  # the first process fills the cache, the second one is measured
        with temporary_folder(SCRATCH) as folder:
            sides["ours"] += ["--folder", str(folder)]
            filled = turns(sides, 1)
            return filled if isinstance(filled["ours"], str) else turns(sides, 1)
    calls = calls_of(work, args) + 1
    if not args.apart:
        return turns(sides, calls)
    return {name: turns({name: command}, calls)[name] for name, command in sides.items()}


def script(folder: Path) -> list[str]:
    """Return the command that makes an image with the nano model."""
    nano = ["--version", "nano", "--prompt", "a cat", "--precision", "fp32"]
    return [sys.executable, "text_to_image.py", *nano, "--output_path", str(folder)]


def calls_of(work: Work, args: Settings) -> int:
    """Return the number of calls after the first."""
    return 0 if work.kind in ONE_CALL else args.calls + work.calls


def measure_sides(work: Work, args: Settings, pythons: Pythons) -> list[Found]:
    """Return {side: its measurement, or the reason why there is none} for each group of --peers that took turns."""
    if work.kind == "first_step_cached":  # this project's alone
        return [{OURS: measure(work, args)["ours"]}]
    calls = args.calls if work.kind == "script" else calls_of(work, args)
    together = 1 if args.apart else args.together
    return measure_columns(work, args.peers, pythons, calls, args.cores, args.memory_limit, together)


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
        if name in PEERS_TABLE and name not in TABLE and not args.peers:
            raise UserError(f"{name} is a workload of several columns: add --peers, such as --peers all")
        if name == "script_nano" and args.peers:
            raise UserError("script_nano is of this project alone, whose nano model no peer reads: leave out --peers")
    table = MEMORY_TABLE if args.memory_table else PEERS_TABLE if args.peers else TABLE
    return [WORKS[name] for name in args.works] or list(table.values())


def parse(argv: list[str] | None = None) -> Settings:
    """Read the command line. Raises UserError for an output without a name, and for cores that cannot be used."""
    args = read_settings(Settings, argv, description=__doc__)
    if not args.output.name:
        raise UserError(f"--output {args.output} is a folder: give the name of a file in it")
    if args.peers:
        chosen = PEERS if ALL in args.peers else args.peers
        args.peers = [OURS, *(name for name in PEERS if name in chosen)]
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
    result: dict[str, Any] = {
        "machine": machine(args.cores),
        "settings": {"repeats": args.repeats, "calls": args.calls, "apart": args.apart},
        "works": [],
    }
    if args.peers:
        paths = {"reference_python": args.reference_python, "peers_python": args.peers_python}
        pythons = Pythons({**paths, None: Path(sys.executable)})
        result["sides"] = args.peers
        result["settings"]["together"] = args.together
        result["versions"] = {}
        for side in args.peers:
            if reason := pythons.missing(side):
                print(f"{side}: {reason}", file=sys.stderr)
            else:
                result["versions"][side] = pythons.packages(side)
    else:
        args.reference_python = reference_python(args.reference_python)
    text = markdown_columns if args.peers else markdown
    describe_progress(lambda: f"after {len(result['works'])} of {len(works)} workloads, whose results are in {table}")
    with tqdm(works, unit="workload") as bar:
        for work in bar:
            bar.set_postfix_str(work.name)
            if args.peers:
                line = summarise_columns(work, [measure_sides(work, args, pythons) for _ in range(args.repeats)])
            else:
                line = summarise(work, [measure(work, args) for _ in range(args.repeats)])
            result["works"].append(line)
            with atomic_path(numbers) as path:
                path.write_text(json_text(result, indent=1) + "\n", encoding="utf-8")
            with atomic_path(table) as path:
                path.write_text(text(result), encoding="utf-8")
    print(text(result))


if __name__ == "__main__":
    run_script(main)
