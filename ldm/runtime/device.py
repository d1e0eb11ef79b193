"""MindSpore's context: device, execution mode, precision, seeds and the processes of a data-parallel run."""

from __future__ import annotations

import ctypes
import glob
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import mindspore as ms
import numpy as np

from ldm.errors import UserError, plain
from ldm.runtime.ascend import device_name, is_a2_or_later, is_first_910

logger = logging.getLogger(__name__)

GRAPH, PYNATIVE = 0, 1

# Parts of the messages of a failed allocation: pynative mode, graph mode (host and device), and C++.
OUT_OF_MEMORY = (
    "allocate memory failed",
    "memory isn't enough",
    "memory not enough",
    "memory malloc failed",
    "out of memory",
    "bad_alloc",
)


@dataclass(frozen=True)
class Runtime:
    """How MindSpore was set up."""

    device: str  # "Ascend" or "CPU"
    compute_dtype: ms.Type  # in which the networks compute, ms.float16 or ms.float32
    process_index: int  # of this process in a data-parallel run, 0 otherwise
    process_count: int
    mode: int  # GRAPH or PYNATIVE
    soc: str = ""  # the Ascend device's name, such as "Ascend910B3"; "" on the CPU

    @property
    def is_ascend(self) -> bool:
        return self.device == "Ascend"

    @property
    def saturates(self) -> bool:
        """Whether numbers saturate instead of overflowing to infinity, which the first Ascend 910 does in any mode."""
        return is_first_910(self.soc)

    @property
    def is_a2_or_later(self) -> bool:
        """Whether the device is of the Atlas A2 or A3 series."""
        return is_a2_or_later(self.soc)

    @property
    def fp16(self) -> bool:
        return self.compute_dtype == ms.float16

    @property
    def precision(self) -> str:
        return "fp16" if self.fp16 else "fp32"


_current: Runtime | None = None


def current_runtime() -> Runtime | None:
    """Return what the last call of setup_runtime returned, None before the first."""
    return _current


def setup_runtime(
    device_target: str | None = None,
    mode: int = GRAPH,
    jit_level: str | None = None,
    precision: str = "auto",
    seed: int | None = 42,
    use_parallel: bool = False,
) -> Runtime:
    """Set up MindSpore. Call this before the first network is built.

    On Ascend the overflow mode is INFNAN: without it the loss scaling of fp16 would see saturated numbers instead of
    infinities.

    Args:
        device_target: "Ascend", "CPU", or None for Ascend if this machine has one, else the CPU.
        mode: GRAPH or PYNATIVE.
        jit_level: How much Ascend's compiler optimises, "O0" to "O2". The CPU has one level only.
        precision: "fp16", "fp32", or "auto" for fp16 on Ascend and fp32 on the CPU.
        seed: Of the weights that are initialised at random, None to leave the random state as it is. What training
            draws depends on its own seed and the step alone.
        use_parallel: Join the data-parallel run of the processes that `msrun` started.

    Raises:
        UserError: The device is not there, or `use_parallel` is set outside of msrun.
    """
    global _current
    if device_target != "CPU":
        # MindSpore reads it when it initialises the device, which the check for an Ascend may do.
        os.environ.setdefault("MS_ASCEND_CHECK_OVERFLOW_MODE", "INFNAN_MODE")
    device = device_target or ("Ascend" if _has_ascend() else "CPU")
    try:
        # MindSpore refuses to set a device, even the current one, once it has computed something.
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

    process_index, process_count = (0, 1) if not use_parallel else _join_processes()
    if seed is not None:
        ms.set_seed(seed)
        np.random.seed(seed)
    fp16 = precision == "fp16" or (precision == "auto" and device == "Ascend")
    soc = device_name() if device == "Ascend" else ""
    _current = Runtime(device, ms.float16 if fp16 else ms.float32, process_index, process_count, mode, soc)
    return _current


def decide_flash_attention(enable: bool | None, runtime: Runtime) -> bool:
    """Return whether the UNet uses Ascend's fused attention.

    Args:
        enable: None for yes where it exists: in fp16 on the Atlas A2 series and later.
        runtime: What setup_runtime returned.

    Raises:
        UserError: `enable` is True where fused attention does not exist.
    """
    if enable is None:
        return runtime.is_a2_or_later and runtime.fp16
    if enable and not runtime.is_ascend:
        raise UserError("enable_flash_attention needs an Ascend device: leave it out on the CPU")
    if enable and runtime.saturates:
        raise UserError(
            f"enable_flash_attention needs an Atlas A2 or later, and this device is an {runtime.soc}, "
            "a first Ascend 910: leave it out"
        )
    if enable and not runtime.fp16:
        raise UserError("enable_flash_attention computes in fp16: use --precision fp16 (or auto)")
    return enable


def give_back_memory() -> None:
    """Return freed memory, which this process keeps for later allocations, to the system (glibc only)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


@contextmanager
def failed_allocations_as(message: str) -> Iterator[None]:
    """Raise a UserError with `message` in place of an error of numpy or MindSpore that reports a failed allocation."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(message) from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of numpy or MindSpore reports a failed allocation."""
    return isinstance(error, MemoryError) or any(part in str(error).lower() for part in OUT_OF_MEMORY)


def _has_ascend() -> bool:
    # The device files are checked first: without a device, is_available prints an error about missing libraries.
    return bool(glob.glob("/dev/davinci[0-9]*")) and ms.hal.is_available("Ascend")


def _join_processes() -> tuple[int, int]:
    from mindspore import communication

    if "MS_ROLE" not in os.environ and "RANK_TABLE_FILE" not in os.environ:
        raise UserError(
            "use_parallel needs one process for each device: start it with "
            "msrun --worker_num=8 --local_worker_num=8 --join=True train_text_to_image.py ..."
        )
    try:
        communication.init()  # in msrun's scheduler it returns when the other processes have ended
    except RuntimeError as error:
        reason = plain(str(error).strip().partition("\n")[0])
        raise UserError(
            f"a process of this run did not start or has ended ({reason}): its own error is above, or in the "
            "launcher's log of that process"
        ) from None
    process_index, process_count = communication.get_rank(), communication.get_group_size()
    ms.set_auto_parallel_context(
        parallel_mode=ms.ParallelMode.DATA_PARALLEL, gradients_mean=True, device_num=process_count
    )
    return process_index, process_count
