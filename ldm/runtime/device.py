"""MindSpore's context: device, mode, precision, ranks and seeds. Every choice that depends on the device is made here.

Import this module before MindSpore where a script starts: it quiets MindSpore's own warnings (GLOG_v), which is only
possible before its first import. An exported GLOG_v is respected.
"""

from __future__ import annotations

import ctypes
import glob
import logging
import os
import sys
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("GLOG_v", "3")

import mindspore as ms  # noqa: E402
import numpy as np  # noqa: E402

from ldm.errors import UserError, plain  # noqa: E402

logger = logging.getLogger(__name__)

GRAPH, PYNATIVE = 0, 1
DEVICES = ("Ascend", "CPU")
PRECISIONS = ("auto", "fp16", "fp32")
JIT_LEVELS = ("O0", "O1", "O2")

# How MindSpore says that memory is short: in pynative mode, in graph mode (host and device), and from C++ itself.
OUT_OF_MEMORY = ("allocate memory failed", "memory isn't enough", "memory not enough", "memory malloc failed",
                 "out of memory", "bad_alloc")  # fmt: skip


@dataclass(frozen=True)
class Runtime:
    """What was set up: device "Ascend" or "CPU", the networks' compute type, this process among how many, the mode."""

    device: str
    compute_dtype: Any  # ms.float16 or ms.float32
    rank: int
    rank_size: int
    mode: int

    @property
    def is_ascend(self) -> bool:
        return self.device == "Ascend"

    @property
    def fp16(self) -> bool:
        return self.compute_dtype == ms.float16


def setup_runtime(
    device_target: str | None = None,
    mode: int = GRAPH,
    jit_level: str | None = None,
    precision: str = "auto",
    seed: int = 42,
    use_parallel: bool = False,
) -> Runtime:
    """Prepare MindSpore; call it before the first network is built.

    device_target: "Ascend", "CPU" or None (Ascend where there is one). mode: 0 graph, 1 pynative. jit_level: how much
    Ascend's compiler optimises ("O0" to "O2"); the CPU has one level only. precision: "auto" is fp16 on Ascend and fp32
    on the CPU. seed: of the weights that are not loaded; what training draws depends on its own seed and step alone.
    use_parallel: data parallel over the processes that `msrun` started.

    On Ascend the INFNAN overflow mode is set, without which fp16 loss scaling sees saturated numbers, not infinities.

    Raises UserError for a device that is not there, and for use_parallel outside of msrun.
    """
    if device_target != "CPU":
        # read when the device is initialised, which the question whether it is there may do, so it comes first
        os.environ.setdefault("MS_ASCEND_CHECK_OVERFLOW_MODE", "INFNAN_MODE")
    device = device_target or ("Ascend" if _has_ascend() else "CPU")
    try:
        # MindSpore refuses a device, even the one it has, once it has computed something
        if ms.get_context("device_target") != device:
            ms.set_device(device)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(f"device_target {device} cannot be used here ({reason}); use --device_target CPU") from None
    ms.set_context(mode=mode)
    if jit_level is not None:
        if device == "Ascend":
            ms.set_context(jit_config={"jit_level": jit_level})
        else:
            logger.info("jit_level %s has no effect on the CPU", jit_level)

    rank, rank_size = (0, 1) if not use_parallel else _join_ranks()
    ms.set_seed(seed)
    np.random.seed(seed)
    fp16 = precision == "fp16" or (precision == "auto" and device == "Ascend")
    return Runtime(device, ms.float16 if fp16 else ms.float32, rank, rank_size, mode)


def check_flash_attention(enable: bool, runtime: Runtime) -> None:
    """Raise UserError if Ascend's fused attention is asked for where it does not exist."""
    if enable and not runtime.is_ascend:
        raise UserError("enable_flash_attention needs an Ascend device: leave it out on the CPU")
    if enable and not runtime.fp16:
        raise UserError("enable_flash_attention computes in fp16: use --precision fp16 (or auto)")


def give_back_memory() -> None:
    """Return to the system what this process has freed but holds for later; Linux's usual C library can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error, numpy's or MindSpore's, says that memory is short."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in OUT_OF_MEMORY)


def _has_ascend() -> bool:
    # The device files first: without a device, MindSpore's own question prints an error about its missing libraries.
    return bool(glob.glob("/dev/davinci[0-9]*")) and ms.hal.is_available("Ascend")


def _join_ranks() -> tuple[int, int]:
    from mindspore import communication

    if "MS_ROLE" not in os.environ and "RANK_TABLE_FILE" not in os.environ:
        raise UserError(
            "use_parallel wants one process a device: start it with "
            "msrun --worker_num=8 --local_worker_num=8 --join=True train_text_to_image.py ..."
        )
    try:
        communication.init()  # msrun's scheduler stays in here until the others have ended
    except RuntimeError as error:
        reason = plain(str(error).strip().partition("\n")[0])
        raise UserError(
            f"a process of this run did not come or has ended ({reason}): its own error is above, or in the launcher's "
            "log of that process"
        ) from None
    rank, rank_size = communication.get_rank(), communication.get_group_size()
    ms.set_auto_parallel_context(parallel_mode=ms.ParallelMode.DATA_PARALLEL, gradients_mean=True, device_num=rank_size)
    return rank, rank_size
