"""Training states on disk: everything that a killed run needs to go on, and which of them can be trusted.

`{folder}/state-{step:08d}.safetensors` holds the arrays of TrainStep.state() and, as text, the step, the loss scaler
and the run's fingerprint. Files are written beside and renamed; a checksum over the arrays tells a damaged one.
"""

from __future__ import annotations

import json
import logging
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ldm.errors import UserError
from ldm.weights.read import read_checkpoint, write_checkpoint

logger = logging.getLogger(__name__)

STATES_KEPT = 2  # the last, and one to fall back on: a state is three to four times the trained parameters
_STATE_NAME = re.compile(r"state-(\d{8,})\.safetensors")
_NUMBERED_NAME = re.compile(r"(?:state|lora|model)-(\d{8,})\.(?:safetensors|ckpt)")
_FORMAT = "1"


@dataclass
class TrainState:
    """`step` updates are done; `scaler` and `fingerprint` are plain JSON values."""

    step: int
    arrays: dict[str, np.ndarray]
    scaler: dict
    fingerprint: dict
    path: Path | None = None


def save_state(folder: Path, state: TrainState, keep: int = STATES_KEPT) -> Path:
    """Write a state, then remove all but the newest `keep`."""
    path = folder / f"state-{state.step:08d}.safetensors"
    metadata = {
        "format": _FORMAT,
        "step": str(state.step),
        "scaler": json.dumps(state.scaler),
        "fingerprint": json.dumps(state.fingerprint),
        "checksum": _checksum(state.arrays),
    }
    write_checkpoint(path, state.arrays, metadata)
    for old in find_states(folder)[keep:]:
        old.unlink()
    return path


def find_states(folder: Path) -> list[Path]:
    """The state files in a folder, the newest first."""
    names = [(int(match[1]), path) for path in folder.glob("state-*") if (match := _STATE_NAME.fullmatch(path.name))]
    return [path for _, path in sorted(names, reverse=True)]


def load_latest_state(folder: Path) -> TrainState | None:
    """The newest state that can be read, or None where there is no state at all; broken ones are named in a warning.

    Raises UserError if there are states and all are broken.
    """
    paths = find_states(folder)
    for path in paths:
        try:
            return load_state(path)
        except UserError as error:
            logger.warning("%s; going back to the state before it", error)
    if paths:
        raise UserError(f"{folder}: none of its {len(paths)} training states can be read; start again without --resume")
    return None


def load_state(path: Path) -> TrainState:
    """Read one state file. Raises UserError if it is missing, broken, or something else."""
    arrays, metadata = read_checkpoint(path)
    if metadata.get("format") != _FORMAT or "checksum" not in metadata:
        raise UserError(f"{path} is not a training state (those are named state-<step>.safetensors)")
    if _checksum(arrays) != metadata["checksum"]:
        raise UserError(f"the training state {path} is damaged (its checksum does not match)")
    return TrainState(
        int(metadata["step"]), arrays, json.loads(metadata["scaler"]), json.loads(metadata["fingerprint"]), path
    )


def remove_remains(folder: Path) -> None:
    """Take away what a killed process left half-written."""
    for path in folder.glob(".*.partial*"):
        path.unlink()


def set_aside_later(folder: Path, step: int) -> None:
    """Move the states and numbered checkpoints of more than `step` updates into `folder`/abandoned-after-<step>.

    For a run that goes on from `step` where another one got further: what that left would count as the newest, so
    each new file would be pruned as it is written, and the next resume would take up the abandoned run.
    """
    later = [
        path for path in folder.glob("*-*") if (match := _NUMBERED_NAME.fullmatch(path.name)) and int(match[1]) > step
    ]
    if not later:
        return
    aside = folder / f"abandoned-after-{step:08d}"
    aside.mkdir(exist_ok=True)
    for path in later:
        path.replace(aside / path.name)
    logger.warning(
        "%d files of a run that got beyond step %d were moved to %s; remove that folder if nothing in it is wanted",
        len(later), step, aside,
    )  # fmt: skip


def prune(folder: Path, pattern: str, keep: int) -> None:
    """Remove all but the newest `keep` files of `folder` that match `pattern`, by the step in their names."""
    def step(path: Path) -> int:
        return int(re.findall(r"\d+", path.stem)[-1])

    for old in sorted(folder.glob(pattern), key=step, reverse=True)[keep:]:
        old.unlink()


def compare_fingerprints(saved: dict, now: dict) -> dict[str, str]:
    """What differs between two runs: setting -> "name was a, is b". Settings that an older version of this project did
    not save are not compared."""
    return {
        name: f"{name} was {saved[name]}, is {now.get(name)}" for name in saved if saved[name] != now.get(name)
    }


def _checksum(arrays: dict[str, np.ndarray]) -> str:
    total = 0
    for name in sorted(arrays):
        total = zlib.crc32(name.encode(), total)
        total = zlib.crc32(np.ascontiguousarray(arrays[name]).data, total)
    return f"{total:08x}"
