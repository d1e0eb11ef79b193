"""The Markdown table of a benchmark's result."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from tools.benchmark.peers import SIDES

COLUMNS = (
    "work",
    "time, this project",
    "diffusers",
    "ratio",
    "CPU time's ratio",
    "must, aim",
    "memory, this project",
    "diffusers",
    "ratio",
    "must, aim",
    "first call, this project",
    "diffusers",
)
Versions = dict[str, dict[str, str]]  # side -> {package: its version in the side's environment}
LONGEST_PROBLEM = 80  # characters of a failure in a cell. The JSON has all of it


def markdown(result: dict[str, Any]) -> str:
    """Return a paragraph about the machine and the method, and the table."""
    settings = result["settings"]
    order = "one process after the other" if settings["apart"] else "the two processes in turns, the other one stopped"
    versions: Versions = {"ours": {}, "peer": {}}
    for line in result["works"]:
        for side, found in versions.items():
            found.update(line[side].get("versions", {}))
    head = (
        f"{where(result['machine'], versions)}; fp32. {how(settings)}, {order}. "
        "Memory is the largest resident size of the process."
    )
    return head + "\n\n" + grid([COLUMNS, *map(row, result["works"])])


def markdown_columns(result: dict[str, Any]) -> str:
    """Return the same for --peers: a column for each side, and a second table of the first calls."""
    settings, sides = result["settings"], result["sides"]
    turns = f"in turns of {settings['together']} processes at most, the others stopped"
    order = "one process after the other" if settings["apart"] else turns
    versions: Versions = {side: dict(result["versions"].get(side, {})) for side in sides}
    for line in result["works"]:
        for side, found in line["sides"].items():
            versions[side].update(found.get("versions", {}))
    head = (
        f"{where(result['machine'], versions)}. {how(settings)}, {order}.\n\n"
        "A cell holds the time and the largest resident size from the first call on (loading: the largest size of "
        "memory that is no mapped file). In brackets are the ratios of this project to it, in the same precision where "
        "that was measured: of the time, of the processor seconds, of the memory; of this project in bf16 to fp32."
    )
    titles = ("work", *(SIDES[side].title for side in sides))
    rows = [
        (line["title"], *(cell(line["sides"].get(side), line["memory_is"]) for side in sides))
        for line in result["works"]
    ]
    first = [
        (line["title"], *(seconds((line["sides"].get(side) or {}).get("first_seconds")) for side in sides))
        for line in result["works"]
    ]
    return f"{head}\n\n{grid([titles, *rows])}\nThe first call, compiling included:\n\n{grid([titles, *first])}"


def cell(side: dict[str, Any] | None, memory: str) -> str:
    """Return the cell of a side in a row, empty where it has no such work."""
    if side is None:
        return ""
    if "problem" in side:
        if side["problem"].startswith("not measured"):
            return "not measured"
        return textwrap.shorten(side["problem"].replace("|", "/"), LONGEST_PROBLEM, placeholder=" ...")
    time, size = (
        ", ".join(ratio(side[name]) for name in names if name in side)
        for names in (("time_ratio", "cpu_ratio"), ("memory_ratio",))
    )
    words = (seconds(side["seconds"]), f" ({time})" if time else "", ", ", gigabytes(side[memory]))
    return "".join([*words, f" ({size})" if size else ""])


def where(machine: dict[str, Any], versions: Versions) -> str:
    """Return the processor, which of the extensions it has that decide how fast bf16 is, and all versions."""
    extensions = machine.get("extensions", {})
    have = [title for title, has in extensions.items() if has]
    lack = [title for title, has in extensions.items() if not has]
    words = [f"with {', '.join(have)}"] * bool(have) + [f"without {', '.join(lack)}"] * bool(lack)
    numbers = f" ({machine['cpu_numbers']})" if "cpu_numbers" in machine else ""
    return (
        f"{' '.join([machine['cpu'] + numbers, *words])}, {len(machine['cores'])} cores and threads, "
        f"{machine['memory_gb']} GB; load before the run {machine['load']:.1f}. {named(versions)}"
    )


def named(versions: Versions) -> str:
    """Return all packages with their versions, and whose each is where environments have different ones."""
    texts = []
    for package in sorted({package for found in versions.values() for package in found}, key=str.lower):
        owners: dict[str, list[str]] = {}  # of each version; both precisions of a peer have one environment
        for side, found in versions.items():
            if package in found:
                owner, there = side.removesuffix("-bf16"), owners.setdefault(found[package], [])
                there.extend([owner] if owner not in there else [])
        several = len(owners) > 1
        words = (f"{version} ({', '.join(sides)})" if several else version for version, sides in owners.items())
        texts.append(f"{package} {' and '.join(words)}")
    return ", ".join(texts)


def how(settings: dict[str, Any]) -> str:
    """Return what was measured how often."""
    if not settings["calls"]:
        return f"First calls, {settings['repeats']} of each; medians of more calls for short workloads"
    return f"Medians of {settings['repeats']} x {settings['calls']} calls after the first, more for short workloads"


def grid(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, whose first row is the heading."""
    table = [rows[0], ("---",) * len(rows[0]), *rows[1:]]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in table)


def row(line: dict[str, Any]) -> tuple[str, ...]:
    """Return the cells of a workload's row."""
    ours, peer = line["ours"], line["peer"]
    return (
        line["title"],
        ours.get("problem") or seconds(ours["seconds"]),
        peer.get("problem") or seconds(peer["seconds"]),
        ratio(line.get("time_ratio")),
        ratio(line.get("cpu_ratio")),
        goals(line["time"], "" if line["peer_is"] != "none" else " s"),
        gigabytes(ours.get("memory_gb")),
        gigabytes(peer.get("memory_gb")),
        ratio(line.get("memory_ratio")),
        goals(line["memory"]),
        seconds(ours.get("first_seconds")),
        seconds(peer.get("first_seconds")),
    )


def seconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1f} s" if value >= 10 else f"{value:.2f} s" if value >= 1 else f"{1000 * value:.0f} ms"


def gigabytes(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} GB"


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def goals(values: tuple[float, float] | None, unit: str = "") -> str:
    return "" if values is None else ", ".join(f"{value:g}{unit}" for value in values)
