"""What Linux says of the processor in /proc/cpuinfo."""

from __future__ import annotations

from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def cpuinfo() -> dict[str, str]:
    """Return name -> value of /proc/cpuinfo as `parse_cpuinfo`. Nothing where there is no such file."""
    try:
        return parse_cpuinfo(CPUINFO.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return {}


def parse_cpuinfo(text: str) -> dict[str, str]:
    """Return name -> value of the text of /proc/cpuinfo. Of several processors, the first one's values."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    return found


def instruction_sets(info: dict[str, str]) -> str:
    """Return Linux's names of the instruction sets, between spaces. x86 and ARM name the field differently."""
    return info.get("flags") or info.get("Features", "")
