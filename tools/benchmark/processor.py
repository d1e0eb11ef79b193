"""The machine that a table was measured on."""

from __future__ import annotations

import os
import platform
from collections.abc import Collection
from typing import Any

from ldm.runtime.processor import CPUINFO, parse_cpuinfo

# Flags of /proc/cpuinfo -> what they are called in the table. They decide how fast bf16 is.
EXTENSIONS = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX-BF16"}


def machine(cores: Collection[int]) -> dict[str, Any]:
    """Return the description of the machine for the JSON and the table."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return {
        **processor(CPUINFO.read_text()),
        "cores": sorted(cores),
        "memory_gb": round(memory),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }


def processor(cpuinfo: str) -> dict[str, Any]:
    """Return the name of the processor, and which extensions it has, from the text of /proc/cpuinfo."""
    found = parse_cpuinfo(cpuinfo)
    flags = found.get("flags", "").split()
    # Virtual machines hide the model's name: its numbers tell the generation.
    numbers = f"family {found.get('cpu family', '?')}, model {found.get('model', '?')}"
    return {
        "cpu": found.get("model name", "unknown"),
        "cpu_numbers": numbers,
        "extensions": {title: flag in flags for flag, title in EXTENSIONS.items()},
    }
