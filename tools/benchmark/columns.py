"""Measure this project beside several peers, for run.py --peers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path

from ldm.files.atomic import temporary_folder
from tools.benchmark.peers import SIDES, Pythons, groups, is_ours
from tools.benchmark.scripts import SCRATCH, measure_scripts
from tools.benchmark.summary import Found
from tools.benchmark.worker import environment, take_turns
from tools.benchmark.works import ROOT, Work


def measure_columns(
    work: Work,
    sides: Sequence[str],
    pythons: Pythons,
    calls: int,
    cores: Collection[int],
    memory_limit: float,
    together: int,
) -> list[Found]:
    """Measure the sides that have this kind of work, in groups that take turns.

    Args:
        work: The workload.
        sides: This project and its peers, names of SIDES.
        pythons: The interpreters of the sides.
        calls: Calls after the first.
        cores: The cores to run on.
        memory_limit: A process that exceeds this many GB is ended.
        together: Processes in a group. Those that wait keep their memory.

    Returns:
        {side: its measurement, or the reason why there is none}: first of those that cannot start, then of each group.
    """
    reasons = {side: pythons.missing(side) for side in sides if is_ours(side) or work.kind in SIDES[side].kinds}
    there = [side for side, reason in reasons.items() if reason is None]
    absent: Found = {side: reason for side, reason in reasons.items() if reason is not None}
    # What torch.compile has compiled is kept there, between the runs of a script too.
    with temporary_folder(SCRATCH) as folder:
        if work.kind in ("script", "load"):
            failed = prepare(work, there, pythons, folder, cores)
            there = [side for side in there if side not in failed]
            absent.update(failed)
        if work.kind == "script":
            scripts = {side: partial(pythons.script, side, work, folder) for side in there}
            return [absent, measure_scripts(scripts, calls, cores)]
        found = [absent]
        for group in groups(there, together):
            commands = {side: pythons.worker(side, work, "--folder", str(folder)) for side in group}
            found.append(take_turns(commands, calls + 1, cores, memory_limit))
        return found


def prepare(work: Work, sides: Sequence[str], pythons: Pythons, folder: Path, cores: Collection[int]) -> dict[str, str]:
    """Write the model to `folder`, and in the form that OpenVINO reads. Returns {side: why it has none}."""
    model = [str(pythons.paths[None]), "-m", "tools.benchmark.model_folder", work.name, str(folder / "model")]
    reason = _run(model, cores)
    if reason is not None:
        return dict.fromkeys(sides, reason)
    converted = [side for side in sides if SIDES[side].module.endswith("openvino_worker")]
    if not converted:
        return {}
    reason = _run(pythons.worker(converted[0], work, "--folder", str(folder), "--convert"), cores)
    return {} if reason is None else dict.fromkeys(converted, reason)


def _run(command: list[str], cores: Collection[int]) -> str | None:
    """Run a command, and return why it failed, or None."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(cores))
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    print(done.stderr[-4000:], file=sys.stderr)
    return f"failed: {lines[-1] if lines else f'exit code {done.returncode}'}"
