"""What precision "auto" stands for on the CPU, without MindSpore, whose import takes seconds."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable

from ldm.runtime.processor import cpuinfo, instruction_sets

BF16_FLAG = "avx512_bf16"  # Linux's name of the instructions that the kernels multiply bf16 with


def automatic_precision(multiplies_bf16: Callable[[], bool], keeps_fp32: bool = False) -> str:
    """Return what precision "auto" stands for on the CPU: "bf16" where the kernels multiply it, else "fp32".

    Args:
        multiplies_bf16: Whether the kernels multiply bf16 (ldm.ops.multiplies_bf16). It may have to compile them, and
            is asked only where it matters.
        keeps_fp32: Whether weights of the base model are trained. They are saved in fp32.
    """
    return "bf16" if not keeps_fp32 and multiplies_bf16() else "fp32"


def kernels_are_expected_to_multiply_bf16() -> bool:
    """Whether the kernels will multiply bf16 once they are compiled: by the processor's flags, and a compiler's name.

    Nothing is compiled or loaded, so this is for an estimate alone.
    """
    if sys.platform != "linux" or BF16_FLAG not in instruction_sets(cpuinfo()).split():
        return False
    try:
        compiler = shlex.split(os.environ.get("CXX") or "c++")
    except ValueError:
        return False
    return bool(compiler) and shutil.which(compiler[0]) is not None
