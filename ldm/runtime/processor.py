"""What this machine's processor can do."""

from __future__ import annotations

from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
# Linux's names of the instructions that multiply bf16 numbers and add up fp32: the tiles of Intel's Xeons since 2023,
# and the vectors of AMD since Zen 4 and of Intel's Cooper Lake.
BF16_FLAGS = ("amx_bf16", "avx512_bf16")


def processor_flags() -> frozenset[str]:
    """Return Linux's names of the processor's instruction sets. There are none where Linux does not tell."""
    try:
        lines = CPUINFO.read_text(errors="replace").splitlines()
    except OSError:
        return frozenset()
    return next((frozenset(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), frozenset())


def has_bf16_products() -> bool:
    """Whether the processor has instructions for products of bf16 numbers, with sums in fp32."""
    return not processor_flags().isdisjoint(BF16_FLAGS)
