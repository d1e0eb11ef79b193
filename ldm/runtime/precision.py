"""What precision "auto" stands for, without MindSpore, whose import takes seconds."""

from __future__ import annotations

from pathlib import Path

AUTOMATIC_BF16 = False  # whether "auto" is bf16 on processors that multiply it
CPUINFO = Path("/proc/cpuinfo")
# Linux's names of the instructions that multiply bf16 numbers and add up fp32: the tiles of Intel's Xeons since 2023,
# and the vectors of AMD since Zen 4 and of Intel since Cooper Lake.
BF16_FLAGS = ("amx_bf16", "avx512_bf16")


def automatic_precision(device: str, keeps_fp32: bool = False) -> str:
    """Return what precision "auto" stands for on a device: "fp16" on Ascend, "fp32" on the CPU.

    With AUTOMATIC_BF16 it is "bf16" on a CPU that multiplies bf16, unless `keeps_fp32`: where weights of the base model
    are trained, and in pynative mode.
    """
    if device == "Ascend":
        return "fp16"
    return "bf16" if AUTOMATIC_BF16 and processor_multiplies_bf16() and not keeps_fp32 else "fp32"


def processor_multiplies_bf16() -> bool:
    """Whether the processor has instructions for products of bf16 numbers, with sums in fp32."""
    return not processor_flags().isdisjoint(BF16_FLAGS)


def processor_flags() -> frozenset[str]:
    """Return Linux's names of the processor's instruction sets. There are none where Linux does not tell."""
    try:
        lines = CPUINFO.read_text(errors="replace").splitlines()
    except OSError:
        return frozenset()
    return next((frozenset(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), frozenset())
