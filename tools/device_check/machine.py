"""Versions, the fit of CANN, memory and how the device is set up, asked by the process that computes on it."""

from __future__ import annotations

import os
import platform

import mindspore as ms
import numpy as np

from ldm.ops import bf16_unit
from ldm.runtime import ascend
from ldm.runtime.device import Runtime, describe_runtime
from tools.device_check.results import Machine


def describe(runtime: Runtime, flash_attention: bool) -> Machine:
    """Describe the machine for the report. The device must be open, so that its memory can be asked for."""
    versions = f"MindSpore {ms.__version__}, Python {platform.python_version()}, numpy {np.__version__}"
    machine = Machine(
        versions=f"{versions}, {platform.system()} {platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        device=describe_runtime(runtime, flash_attention, bf16_unit).removeprefix("device: "),
        ascend=runtime.is_ascend,
        flash_attention=flash_attention,
        known=runtime.is_first_910 or runtime.is_a2_or_later,
        is_first_910=runtime.is_first_910,
        saturates=runtime.saturates,
        dry_run=runtime.is_ascend and bool(os.environ.get("MS_SIMULATION_LEVEL")),
    )
    if runtime.is_ascend:
        version, accepted = ascend.cann_version(), ascend.accepted_cann_versions()
        machine.cann = (
            f"{version or 'of unknown version (ASCEND_HOME_PATH is not set, or has no compiler/version.info)'}, "
            f"accepted by this MindSpore: {', '.join(accepted) or 'unknown'}; "
            f"driver {ascend.driver_version() or 'of unknown version'}"
        )
        machine.cann_fault = ascend.cann_fault(version, accepted)
        try:
            properties = ms.hal.get_device_properties(ms.get_context("device_id"), "Ascend")
            machine.free, machine.total = properties.free_memory / 2**30, properties.total_memory / 2**30
        except (RuntimeError, ValueError):  # MindSpore's dry run has no device to ask
            pass
    else:
        page = os.sysconf("SC_PAGE_SIZE") / 2**30
        machine.free, machine.total = os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page
    return machine
