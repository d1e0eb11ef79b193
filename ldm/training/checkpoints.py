"""Training states on disk: everything that a killed run needs to go on, and which of them can be trusted.

`{folder}/state-{step:08d}.safetensors` holds the arrays of TrainStep.state() and, as text, the step, the loss scaler
and the run's fingerprint. Files are written beside and renamed; a checksum over all of it tells a damaged one.
"""

from __future__ import annotations

import json
import logging
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ldm.errors import UserError, plain
from ldm.files.documents import parse_json
from ldm.training.own_files import Numbered, find_states
from ldm.weights.checkpoint import read_checkpoint, write_checkpoint

logger = logging.getLogger(__name__)

STATES_KEPT = 2  # the last, and one to fall back on: a state is three to four times the trained parameters
# The checksum of the first format was over the arrays' names and values alone.
_FORMATS = ("1", "2")
_MOST = 10**12  # steps and other counts
_COUNTS = ("good_steps", "overflows_in_a_row", "overflows", "updates")  # of LossScaler
_REMAINS = re.compile(r"\.(?:(?:lora|model|state)(?:-[0-9]+)?|files|metrics|train_args)\.[0-9]+\.partial(?:\.\w+)?")


@dataclass
class TrainingState:
    """`step` updates are done; `scaler` and `fingerprint` are plain JSON values."""

    step: int
    arrays: dict[str, np.ndarray]
    scaler: dict
    fingerprint: dict
    path: Path | None = None


def save_state(folder: Path, state: TrainingState) -> Path:
    """Write a state. Raises UserError where the disk refuses."""
    path = folder / Numbered("state", state.step).name
    texts = {
        "format": _FORMATS[-1],
        "step": str(state.step),
        "scaler": json.dumps(state.scaler),
        "fingerprint": json.dumps(state.fingerprint),
    }
    write_checkpoint(path, state.arrays, {**texts, "checksum": _checksum(state.arrays, texts)})
    return path


def load_latest_state(folder: Path, misfit: Callable[[TrainingState], str] = lambda state: "") -> TrainingState | None:
    """The newest state that can be read and fits, or None where there is no state at all; those passed over are named.

    Args:
        misfit: what is wrong with a state for this run, "" for nothing.

    Raises:
        UserError: there are states and none can be taken.
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
        logger.warning("%s; going back to the state before it", fault)
    if paths:
        raise UserError(
            f"{folder}: none of its {len(paths)} training states can be read; start again without --resume "
            "in another output_path"
        )
    return None


def load_state(path: Path) -> TrainingState:
    """Read one state file. Raises UserError if it is missing, broken, or something else."""
    arrays, metadata = read_checkpoint(path)
    checksum = metadata.pop("checksum", None)
    if metadata.get("format") not in _FORMATS or checksum is None:
        raise UserError(f"{path} is not a training state (those are named state-<step>.safetensors)")
    if checksum != _checksum(arrays, metadata):
        raise UserError(f"the training state {path} is damaged (its checksum does not match)")
    step, scaler, fingerprint = (metadata.get(name, "") for name in ("step", "scaler", "fingerprint"))
    if not re.fullmatch("[0-9]{1,12}", step):
        raise UserError(f"the training state {path} is damaged (its step is {plain(repr(step), 40)})")
    scaler = parse_json(scaler, f"the loss scaler in the training state {path}")
    fingerprint = parse_json(fingerprint, f"the settings in the training state {path}")
    if not isinstance(fingerprint, dict) or not all(map(_is_setting, fingerprint.values())):
        raise UserError(f"the training state {path} is damaged (its settings are none)")
    if not _is_scaler(scaler):
        raise UserError(f"the training state {path} is damaged (its loss scaler is none)")
    for name, array in arrays.items():
        if array.dtype != np.float32:
            raise UserError(f"the training state {path} holds {plain(name, 80)} as {array.dtype}, not as float32")
    check_finite(arrays, f"the training state {path}")
    return TrainingState(int(step), arrays, scaler, fingerprint, path)


def check_finite(arrays: dict[str, np.ndarray], subject: str) -> None:
    """Raise UserError where an array holds a value that is not finite."""
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise UserError(f"{subject} holds values that are not finite, the first in {plain(name, 80)}")


def _is_setting(value: object) -> bool:
    if isinstance(value, list):
        return all(entry is None or isinstance(entry, (bool, int, float, str)) for entry in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _is_scaler(state: object) -> bool:
    """Whether it can be the state of a LossScaler."""
    if not isinstance(state, dict) or not isinstance(state.get("dynamic"), bool):
        return False
    counts, scale = [state.get(name) for name in _COUNTS], state.get("scale")
    sound = all(type(count) is int and 0 <= count <= _MOST for count in counts)
    return sound and type(scale) in (int, float) and 0 < scale <= np.finfo(np.float32).max


def remove_remains(folder: Path) -> None:
    """Take away what a killed process left half-written; the folder must be claimed."""
    for path in folder.glob(".*.partial*"):
        if _REMAINS.fullmatch(path.name):
            try:
                path.unlink()
            except OSError as error:
                logger.warning("%s, left by a killed run, cannot be removed (%s)", path, error.strerror)


def compare_fingerprints(saved: dict, now: dict) -> dict[str, str]:
    """What differs between two runs: setting -> "name was a, is b". Settings that an older version of this project did
    not save are not compared.
    """
    return {
        name: f"{plain(name, 60)} was {plain(saved[name], 60)}, is {plain(now.get(name), 60)}"
        for name in saved
        if saved[name] != now.get(name)
    }


def _checksum(arrays: dict[str, np.ndarray], texts: dict[str, str]) -> str:
    total = 0
    seals_all = texts["format"] != "1"
    for name in sorted(texts) if seals_all else ():
        total = zlib.crc32(f"{name} {texts[name]}".encode(), total)
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        total = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode() if seals_all else name.encode(), total)
        total = zlib.crc32(array.data, total)
    return f"{total:08x}"
