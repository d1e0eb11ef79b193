"""Training states on disk: everything that a run needs to continue after a kill.

`{folder}/state-{step:08d}.safetensors` holds the arrays of TrainStep.state() and, in its metadata, the step, the state
of the loss scaler, the fingerprint of the run and the best validation loss as JSON. A file is written under another
name and renamed, so it is always whole. A checksum over arrays and metadata detects later damage.
"""

from __future__ import annotations

import json
import logging
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldm.errors import UserError, plain
from ldm.files.documents import parse_json
from ldm.training.loss_scale import COUNTS
from ldm.training.own_files import Numbered, find_states
from ldm.weights.checkpoint import open_checkpoint, read_checkpoint, write_checkpoint

logger = logging.getLogger(__name__)

# Format 1 had a checksum over the names and values of the arrays alone.
_FORMATS = ("1", "2")
_LARGEST_COUNT = 10**12


@dataclass
class TrainingState:
    """What a run resumes from."""

    step: int  # number of steps that are done
    arrays: dict[str, np.ndarray]  # TrainStep.state()
    scaler: dict[str, Any]  # LossScaler.state()
    fingerprint: dict[str, Any]  # see ldm.training.resume
    path: Path | None = None  # file that it was read from
    validation: dict[str, Any] | None = None  # Validation.state(), None without a validation loss


def save_state(folder: Path, state: TrainingState) -> Path:
    """Write a training state into a folder and return its path. Raises UserError if it cannot be written."""
    path = folder / Numbered("state", state.step).name
    texts = {
        "format": _FORMATS[-1],
        "step": str(state.step),
        "scaler": json.dumps(state.scaler),
        "fingerprint": json.dumps(state.fingerprint),
    }
    if state.validation is not None:
        texts["validation"] = json.dumps(state.validation)
    write_checkpoint(path, state.arrays, {**texts, "checksum": _checksum(state.arrays, texts)})
    return path


def load_latest_state(folder: Path, misfit: Callable[[TrainingState], str] = lambda state: "") -> TrainingState | None:
    """Read the newest training state in a folder that is intact and fits the run, or return None if there is none.

    `misfit` returns what in a state does not fit the run, "" if it fits. States that are passed over are named in a
    warning. Raises UserError if there are training states, but none can be used.
    """
    paths = find_states(folder)
    for path in paths:
        try:
            state = load_state(path)
        except UserError as error:
            fault = str(error)
        else:
            fault = misfit(state)
            if not fault:
                return state
        logger.warning("%s; trying the training state before it", fault)
    if paths:
        raise UserError(
            f"{folder}: none of its {len(paths)} training states can be used; start again without --resume "
            "in another output_path"
        )
    return None


def load_state(path: Path) -> TrainingState:
    """Read a training state. Raises UserError if the file is missing, damaged or no training state."""
    arrays, metadata = read_checkpoint(path)
    checksum = metadata.pop("checksum", None)
    if metadata.get("format") not in _FORMATS or checksum is None:
        raise UserError(f"{path} is not a training state (those are named state-<step>.safetensors)")
    if checksum != _checksum(arrays, metadata):
        raise UserError(f"the training state {path} is damaged (its checksum does not match)")
    step = metadata.get("step", "")
    if not re.fullmatch("[0-9]{1,12}", step):
        raise UserError(f"the training state {path} is damaged (invalid step {plain(repr(step), 40)})")
    scaler = parse_json(metadata.get("scaler", ""), f"the loss scaler in the training state {path}")
    fingerprint = _fingerprint(path, metadata)
    validation = None
    if "validation" in metadata:
        validation = parse_json(metadata["validation"], f"the validation loss in the training state {path}")
        if not isinstance(validation, dict):
            raise UserError(f"the training state {path} is damaged (invalid validation loss)")
    if not _is_scaler(scaler):
        raise UserError(f"the training state {path} is damaged (invalid loss scaler)")
    for name, array in arrays.items():
        if array.dtype != np.float32:
            raise UserError(f"the training state {path} holds {plain(name, 80)} as {array.dtype}, not as float32")
    check_finite(arrays, f"the training state {path}")
    return TrainingState(int(step), arrays, scaler, fingerprint, path, validation)


def read_fingerprint(path: Path) -> dict[str, Any]:
    """Read what a training state says of its run, without its arrays. Raises UserError as load_state."""
    return _fingerprint(path, open_checkpoint(path).metadata)


def _fingerprint(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    fingerprint = parse_json(metadata.get("fingerprint", ""), f"the settings in the training state {path}")
    if not isinstance(fingerprint, dict) or not all(map(_is_setting, fingerprint.values())):
        raise UserError(f"the training state {path} is damaged (invalid settings)")
    return fingerprint


def check_finite(arrays: dict[str, np.ndarray], subject: str) -> None:
    """Raise UserError if an array holds a value that is not finite. `subject` begins the message."""
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise UserError(f"{subject} holds values that are not finite, the first in {plain(name, 80)}")


def _is_setting(value: object) -> bool:
    scalars = value if isinstance(value, list) else [value]
    return all(scalar is None or isinstance(scalar, (bool, int, float, str)) for scalar in scalars)


def _is_scaler(state: Any) -> bool:
    if not isinstance(state, dict) or not isinstance(state.get("dynamic"), bool):
        return False
    counts, scale = [state.get(name) for name in COUNTS], state.get("scale")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        return False
    are_counts = all(type(count) is int and 0 <= count <= _LARGEST_COUNT for count in counts)
    return are_counts and 0 < scale <= float(np.finfo(np.float32).max)


def _checksum(arrays: dict[str, np.ndarray], texts: dict[str, str]) -> str:
    total = 0
    covers_all = texts["format"] != "1"
    for name in sorted(texts) if covers_all else ():
        total = zlib.crc32(f"{name} {texts[name]}".encode(), total)
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        total = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode() if covers_all else name.encode(), total)
        total = zlib.crc32(array.data, total)
    return f"{total:08x}"
