"""Whether all processes of a run train the same weights on the same data. Hosts need not share their folders."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
from mindspore import Parameter

from ldm.errors import plain
from ldm.runtime import peers
from ldm.runtime.launcher import process_name
from ldm.runtime.roll_call import ReportedError
from ldm.training.training_state import TrainingState


class Start(TypedDict):
    """What a process starts from."""

    process: str  # its name for messages
    fingerprint: dict[str, Any]  # settings, data and base model, see ldm.training.resume
    step: int
    weights: int  # checksum of what is trained


def check_same_start(fingerprint: dict[str, Any], state: TrainingState | None, trained: Sequence[Parameter]) -> None:
    """Check that all processes start from the same. Every process calls it. Without others, it does nothing.

    Args:
        fingerprint: What this process found, see ldm.training.resume.make_fingerprint.
        state: The training state that this process resumes from.
        trained: The parameters that are trained, whose values count where there is no state.

    Raises:
        UserError: In process 0: another process starts from something else. It names the first that does.
    """
    if not peers.are_connected():
        return
    step, weights = 0, 0
    arrays = ((parameter.name, parameter.asnumpy()) for parameter in trained)
    if state is not None:
        step, arrays = state.step, ((name, state.arrays[name]) for name in sorted(state.arrays))
    for name, array in arrays:
        weights = zlib.crc32(np.ascontiguousarray(array).data, zlib.crc32(name.encode(), weights))
    start = Start(process=process_name(), fingerprint=fingerprint, step=step, weights=weights)
    starts: list[Start] = [json.loads(data) for data in peers.gather(json.dumps(start).encode())]
    if fault := disagreement(starts):
        raise ReportedError(fault)
    peers.gather()  # the others do not encode anything before process 0 has compared


def disagreement(starts: Sequence[Start]) -> str:
    """Say which process differs from the first, in what, and what to do. Returns "" if none does."""
    for other in starts[1:]:
        first, process = starts[0], plain(other["process"])
        for name, value in first["fingerprint"].items():
            found = other["fingerprint"].get(name)
            if name == "precision" and other["step"] != first["step"]:
                continue  # auto is what a resumed run was begun in: that one process resumes nothing is said below
            if found != value:
                way = "give all hosts the same settings, data_path and base model"
                if name == "precision":
                    way = "auto differs between their processors: give --precision fp32"
                return f"{process} has {plain(name, 60)} {plain(found, 60)}, process 0 has {plain(value, 60)}: {way}"
        if other["step"] != first["step"]:
            return (
                f"{process} starts at step {other['step']}, process 0 at step {first['step']}: give all hosts the same "
                "output_path, or copy ckpt/ to each"
            )
        if other["weights"] != first["weights"]:
            return (
                f"{process} starts from other weights than process 0: give all hosts the same lora_init_path and "
                "output_path, or copy the files to each"
            )
    return ""
