"""Medians and ratios of what was measured, for the JSON and the tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from tools.benchmark.peers import compared_with, is_ours
from tools.benchmark.worker import Measurement
from tools.benchmark.works import Work

Found = dict[str, "Measurement | str"]  # side -> its measurement, or the reason why there is none


def side_summary(found: Sequence[Measurement | str]) -> dict[str, Any]:
    """Return the medians of a side over all repeats, or {"problem": the reason} if one failed."""
    failed = [reason for reason in found if isinstance(reason, str)]
    if failed:
        return {"problem": failed[0]}
    runs = [run for run in found if isinstance(run, Measurement)]
    once = not runs[0].seconds  # an epoch or a first step has a single call
    cpu_seconds = [s for run in runs for s in ([run.first_cpu] if once else run.cpu_seconds) if s is not None]
    return {
        "seconds": statistics.median(s for run in runs for s in ([run.first] if once else run.seconds)),
        "cpu_seconds": statistics.median(cpu_seconds) if cpu_seconds else None,
        "first_seconds": statistics.median(run.first for run in runs),
        "build_seconds": statistics.median(run.build_seconds for run in runs),
        "memory_gb": statistics.median(run.memory_gb for run in runs),
        "calls_gb": statistics.median(run.calls_gb for run in runs),
        "own_gb": statistics.median(run.own_gb for run in runs),
        "all_seconds": [[run.first, *run.seconds] for run in runs],
        "versions": runs[0].versions,
    }


def ratios(ours: dict[str, Any], peer: dict[str, Any], memory: str = "memory_gb") -> dict[str, float]:
    """Return the first medians over the second: of time, of processor seconds and of the memory of that name."""
    if "problem" in ours or "problem" in peer:
        return {}
    found = {"time_ratio": ours["seconds"] / peer["seconds"]}
    if peer[memory]:
        found["memory_ratio"] = ours[memory] / peer[memory]
    if ours["cpu_seconds"] and peer["cpu_seconds"]:
        found["cpu_ratio"] = ours["cpu_seconds"] / peer["cpu_seconds"]
    return found


def _line(work: Work) -> dict[str, Any]:
    return {name: getattr(work, name) for name in ("name", "title", "time", "memory")}


def summarise(work: Work, repeats: Sequence[Found]) -> dict[str, Any]:
    """Return the medians and ratios of a workload of two sides over all repeats."""
    line = {**_line(work), "peer_is": work.peer}
    for name in ("ours", "peer"):
        found = [measured[name] for measured in repeats if name in measured]
        if found:
            line[name] = side_summary(found)
        else:
            line[name] = {"problem": "none" if work.peer == "none" else "not measured"}
    return {**line, **ratios(line["ours"], line["peer"])}


def summarise_columns(work: Work, repeats: Sequence[Sequence[Found]]) -> dict[str, Any]:
    """Return the medians and ratios of a workload of several sides.

    Ratios are those inside the groups of sides that took turns, so that what slowed the machine then slowed both.

    They are this project's over the peer's. Those of this project in bf16 are its own over fp32's.

    Args:
        work: The workload.
        repeats: For each repeat, what each group of sides gave.
    """
    line = {**_line(work), "memory_is": "own_gb" if work.kind == "load" else "calls_gb", "sides": {}}
    everything = [group for repeat in repeats for group in repeat]
    names = list(dict.fromkeys(name for group in everything for name in group))
    runs = {name: [group[name] for group in everything if name in group] for name in names}
    measured = [name for name in names if all(isinstance(run, Measurement) for run in runs[name])]
    for name in names:
        side = side_summary(runs[name])
        against = compared_with(name, measured)
        if against is not None:
            beside = [group[against] for group in everything if name in group and against in group]
            pair = (side_summary(beside or runs[against]), side)
            side.update(ratios(*(reversed(pair) if is_ours(name) else pair), line["memory_is"]), against=against)
        line["sides"][name] = side
    return line
