"""The Markdown table of a benchmark's result."""

from __future__ import annotations

from typing import Any

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


def markdown(result: dict[str, Any]) -> str:
    """Return a paragraph about the machine and the method, and the table."""
    machine, settings = result["machine"], result["settings"]
    versions: dict[str, str] = {}
    for line in result["works"]:
        for side in ("ours", "peer"):
            versions.update(line[side].get("versions", {}))
    order = "one process after the other" if settings["apart"] else "the two processes in turns, the other one stopped"
    head = (
        f"{machine['cpu']}, {len(machine['cores'])} cores and threads, {machine['memory_gb']} GB; load before the run "
        f"{machine['load']:.1f}. Python {machine['python']}, "
        f"{', '.join(f'{name} {version}' for name, version in sorted(versions.items()))}; fp32. Medians of "
        f"{settings['repeats']} x {settings['calls']} calls after the first, more for short workloads, {order}. "
        "Memory is the largest resident size of the process."
    )
    table = [COLUMNS, ("---",) * len(COLUMNS), *map(row, result["works"])]
    return head + "\n\n" + "".join("| " + " | ".join(cells) + " |\n" for cells in table)


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
