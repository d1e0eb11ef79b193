"""MindSpore's context: device, execution mode, precision, seeds and the processes of a data-parallel run."""

from __future__ import annotations

import ctypes
import glob
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import mindspore as ms
import numpy as np

from ldm.errors import UserError, plain
from ldm.runtime import ascend, peers, roll_call
from ldm.runtime.launcher import killed_with_launcher
from ldm.runtime.versions import check_version
from ldm.settings.device import PYNATIVE_BF16_FAULT

logger = logging.getLogger(__name__)

GRAPH, PYNATIVE = 0, 1
COMPUTE_DTYPES = {"fp16": ms.float16, "fp32": ms.float32, "bf16": ms.bfloat16}

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
    compute_dtype: ms.Type  # in which the networks compute; ms.bfloat16 is for products of frozen weights alone
    process_index: int  # of this process in a data-parallel run, 0 otherwise
    process_count: int
    mode: int  # GRAPH or PYNATIVE
    soc: str = ""  # the Ascend device's name, such as "Ascend910B3"; "" on the CPU
    precision_mode: str = ""  # how Ascend's compiler treats fp32 operators; "" for MindSpore's default
    jit_level: str = ""  # "O0" to "O2" on Ascend, "" on the CPU

    @property
    def is_ascend(self) -> bool:
        return self.device == "Ascend"

    @property
    def saturates(self) -> bool:
        """Whether numbers saturate instead of overflowing to infinity (ldm.runtime.ascend.overflow_mode)."""
        return self.is_ascend and ascend.overflow_mode(self.soc) == "saturation"

    @property
    def is_first_910(self) -> bool:
        """Whether the device is one of the first generation of Ascend 910."""
        return ascend.is_first_910(self.soc)

    @property
    def is_a2_or_later(self) -> bool:
        """Whether the device is of the Atlas A2 or A3 series."""
        return ascend.is_a2_or_later(self.soc)

    @property
    def fp16(self) -> bool:
        return self.compute_dtype == ms.float16

    @property
    def bf16(self) -> bool:
        """Whether frozen weights are held in bf16 and multiplied in bf16. All else computes in fp32 then."""
        return self.compute_dtype == ms.bfloat16

    @property
    def precision(self) -> str:
        return next(name for name, dtype in COMPUTE_DTYPES.items() if dtype == self.compute_dtype)

    def with_compute_dtype(self, dtype: ms.Type) -> Runtime:
        """Return a copy with another `compute_dtype`. Raises UserError if the device does not have it."""
        check_compute_dtype(self.device, dtype, self.mode)
        return replace(self, compute_dtype=dtype)


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
    automatic: Callable[[], str] = lambda: "fp32",
) -> Runtime:
    """Set up MindSpore. Call this before the first network is built.

    On Ascend the overflow mode is INFNAN: without it the loss scaling of fp16 would see saturated numbers instead of
    infinities. The precision mode and the number of threads are set as ldm.runtime.ascend says, and a version of CANN
    that MindSpore does not accept is reported.

    Args:
        device_target: "Ascend", "CPU", or None for Ascend if this machine has one, else the CPU.
        mode: GRAPH or PYNATIVE.
        jit_level: How much Ascend's compiler optimises, "O0" to "O2", None for "O0". The CPU has one level only.
        precision: "fp16", "fp32", "bf16" (on the CPU), or "auto": "fp16" on Ascend, and on the CPU what `automatic`
            says, but "fp32" in pynative mode.
        seed: Of the weights that are initialised at random, None to leave the random state as it is. What training
            draws depends on its own seed and the step alone.
        use_parallel: Join the data-parallel run of the processes that `msrun` started.
        automatic: Returns "fp32" or "bf16". The scripts give ldm.runtime.precision.automatic_precision. It asks the
            kernels, which are above this package.

    Raises:
        UserError: The device is not there or not named rightly (DEVICE_ID, RANK_TABLE_FILE), it does not have the
            precision, or `use_parallel` is set outside of msrun.
    """
    global _current
    if device_target != "CPU":
        # MindSpore reads it when it initialises the device, which the check for an Ascend may do.
        os.environ.setdefault("MS_ASCEND_CHECK_OVERFLOW_MODE", "INFNAN_MODE")
    device = device_target or ("Ascend" if has_ascend() else "CPU")
    if precision == "auto":
        precision = "fp16" if device == "Ascend" else "fp32" if mode == PYNATIVE else automatic()
    compute_dtype = COMPUTE_DTYPES[precision]
    check_compute_dtype(device, compute_dtype, mode)
    number = ascend.device_id() if device == "Ascend" else None
    try:
        # MindSpore refuses to set a device, even the current one, once it has computed something.
        if ms.get_context("device_target") != device:
            ms.set_device(device, number)
        elif number is not None and ms.get_context("device_id") != number:
            ms.set_device(device, number)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(f"device_target {device} cannot be used here ({reason}); use --device_target CPU") from None
    ms.set_context(mode=mode)
    check_version(device)
    soc = precision_mode = ""
    if device == "Ascend":
        soc, precision_mode = _set_up_ascend(precision)
        jit_level = _set_jit_level(jit_level)
    elif jit_level is not None:
        logger.info("jit_level %s has no effect on the CPU", jit_level)
        jit_level = None

    process_index, process_count = (0, 1) if not use_parallel else _join_processes()
    if seed is not None:
        ms.set_seed(seed)
        np.random.seed(seed)
    _current = Runtime(device, compute_dtype, process_index, process_count, mode, soc, precision_mode, jit_level or "")
    return _current


def check_compute_dtype(device: str, dtype: ms.Type, mode: int) -> None:
    """Raise UserError if a device does not have what networks are to compute in, or not in this mode."""
    if device == "Ascend" and dtype == ms.bfloat16:
        raise UserError("precision bf16 is for the CPU: on Ascend use --precision fp16 (or auto), or fp32")
    if mode == PYNATIVE and dtype == ms.bfloat16:  # MindSpore copies weights in it, and cannot copy bf16 on the CPU
        raise UserError(PYNATIVE_BF16_FAULT)


def describe_runtime(runtime: Runtime, flash_attention: bool, bf16_unit: Callable[[], str | None]) -> str:
    """Return one line for the log: device, precision and what else depends on the device.

    `bf16_unit` is ldm.ops.bf16_unit, and is asked in bf16 alone.
    """
    if not runtime.is_ascend:
        note = ""
        if runtime.bf16:
            unit = bf16_unit()
            note = f" by {unit}" if unit else ", which this machine's kernels do not multiply (docs/precision.md)"
        return f"device: {runtime.device}, {runtime.precision}{note}"
    return (
        f"device: Ascend {ms.get_context('device_id')}, {runtime.soc or 'of unknown name'}, {runtime.precision}, "
        f"precision mode {runtime.precision_mode or 'not set by this project'}, jit_level {runtime.jit_level}, "
        f"flash attention {'on' if flash_attention else 'off'}, overflow mode {ascend.overflow_mode(runtime.soc)}, "
        f"CANN {ascend.cann_version() or 'of unknown version'}"
    )


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
    if enable and runtime.is_first_910:
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


def _set_up_ascend(precision: str) -> tuple[str, str]:
    """Set what depends on the generation of the Ascend device, and return its name and the precision mode."""
    soc = ascend.device_name()
    if not (ascend.is_first_910(soc) or ascend.is_a2_or_later(soc)):
        logger.warning(
            "%s: flash attention is off unless it is asked for, MindSpore's own precision mode holds, and an overflow "
            "in fp16 is taken to become %s. Source CANN's set_env.sh if that was not done, and check the values with "
            "python tools/check_device.py",
            f"this project does not know the device {plain(soc)}" if soc else "CANN does not tell the device's name",
            "the largest number" if ascend.overflow_mode(soc) == "saturation" else "infinity",
        )
    ascend.give_enough_threads()
    precision_mode = ascend.set_precision_mode(soc)
    fault = ascend.cann_fault(ascend.cann_version(), ascend.accepted_cann_versions())
    if fault:
        logger.warning("%s", fault)
    if ascend.is_first_910(soc) and precision == "fp32":
        logger.warning(
            "precision fp32: this %s has matrix products and convolutions in fp16 alone, so these compute in fp16 all "
            "the same; the rest computes in fp32",
            soc,
        )
    return soc, precision_mode


def _set_jit_level(given: str | None) -> str:
    """Set the level of Ascend's graph compiler, and return the level that it compiles with."""
    level = ascend.jit_level_in_force(given)
    ms.set_context(jit_config={"jit_level": level})
    warning = ascend.warning_of_jit_level(level)
    if warning:
        logger.warning("%s", warning)
    return level


def has_ascend() -> bool:
    """Whether this machine has an Ascend that MindSpore can use."""
    # The device files are checked first: without a device, is_available prints an error about missing libraries.
    return bool(glob.glob("/dev/davinci[0-9]*")) and ms.hal.is_available("Ascend")


class _Sum(ms.nn.Cell):
    """Adds up the arrays of all processes."""

    def __init__(self) -> None:
        super().__init__()
        self.all_reduce = ms.ops.AllReduce()

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        return self.all_reduce(x)


def _join_processes() -> tuple[int, int]:
    from mindspore import communication

    # MindSpore's dry run simulates one process of many, which no launcher starts.
    if not {"MS_ROLE", "RANK_TABLE_FILE", "MS_SIMULATION_LEVEL"} & os.environ.keys():
        raise UserError(f"use_parallel needs one process for each device: start it with {ascend.msrun_command()}")
    roll_call.call_roll()
    try:
        with killed_with_launcher():
            communication.init()  # in msrun's scheduler it returns when the other processes have ended
    except RuntimeError as error:
        reason = plain(str(error).strip().partition("\n")[0])
        raise UserError(
            f"a process of this run has ended ({reason}): its own error is above, or in its log in msrun's --log_dir"
        ) from None
    process_index, process_count = communication.get_rank(), communication.get_group_size()
    peers.connect(process_index, process_count, lambda array: _Sum()(ms.Tensor(array)).asnumpy())
    ms.set_auto_parallel_context(
        parallel_mode=ms.ParallelMode.DATA_PARALLEL, gradients_mean=True, device_num=process_count
    )
    return process_index, process_count
