"""The checkpoints of a run: `{output_path}/ckpt` with the trained weights and the training states."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from ldm.files.atomic import atomic_path
from ldm.files.paths import writing
from ldm.lora.formats import mindone
from ldm.lora.inject import get_lora
from ldm.lora.lora import ZERO_TERMINAL_SNR, timesteps_metadata
from ldm.models.stable_diffusion import StableDiffusion
from ldm.settings.train import TrainSettings
from ldm.training.checks import trained_timesteps
from ldm.training.optimizers import make_optimizer
from ldm.training.own_files import Numbered, OwnFiles
from ldm.training.training_state import TrainingState, check_finite, save_state
from ldm.weights.added_tokens import tokens_metadata
from ldm.weights.checkpoint import write_checkpoint

logger = logging.getLogger(__name__)

# The newest state, and one in case that is damaged. A state takes three to four times the trained parameters' memory.
STATES_KEPT = 2
_WRITTEN = r"(?:lora|model|state|class)(?:-[0-9]+)?|files|metrics|train_args|report|run"
_LEFTOVER = re.compile(rf"\.(?:{_WRITTEN})\.[0-9]+(?:-[0-9a-f]{{8}})?\.partial(?:\.\w+)?")  # see temporary_path


class Checkpoints:
    """Writes `lora-<step>.ckpt` or `model-<step>.ckpt` with a training state beside it, and removes old ones.

    `lora.ckpt` and `model.ckpt` always name the newest.

    Args:
        settings: Settings of the run.
        model: The model that is trained.
        saves_base_model: Whether the base model is saved, because it is trained, alone or beside a LoRA.
        resumed_here: Whether the run resumes one in the same folder, whose files are then its own.
        start: Number of steps that are done before this run.
    """

    def __init__(
        self,
        settings: TrainSettings,
        model: StableDiffusion,
        *,
        saves_base_model: bool,
        resumed_here: bool,
        start: int,
    ):
        self.settings, self.model = settings, model
        self.folder = Path(settings.output_path) / "ckpt"
        self.keep = settings.ckpt_max_keep
        self.sampled = make_optimizer(settings).sampled
        self.writers: dict[str, Callable[[Path, TrainingState], None]] = {}
        if settings.use_lora:
            self.writers["lora"] = self._write_lora
        if saves_base_model:
            self.writers["model"] = self._write_model
        self.newest = self.folder / ("lora.ckpt" if settings.use_lora else "model.ckpt")
        self._own_files = OwnFiles(self.folder, resumed_here)
        self._start: int | None = start  # None after the first save

    def save(self, state: TrainingState) -> Path:
        """Write the weights, then the training state, so that every state on disk has its weights beside it.

        Returns the path of the training state. Raises UserError if a value is not finite or a file cannot be written.
        """
        check_finite(state.arrays, f"nothing is saved at step {state.step}: the trained state")
        if self._start is not None:
            self._own_files.set_aside_later(self._start)
            self._start = None
        names = [Numbered(kind, state.step).name for kind in (*self.writers, "state")]
        self._own_files.begin([*names, *(f"{kind}.ckpt" for kind in self.writers)])
        for (kind, write), name in zip(self.writers.items(), names):
            write(self.folder / name, state)
            _link(self.folder / name, self.folder / f"{kind}.ckpt")
        path = save_state(self.folder, state)
        for kind in self.writers:
            self._own_files.prune(kind, self.keep)
        self._own_files.prune("state", STATES_KEPT)
        logger.debug("saved step %d in %s", state.step, self.folder)
        return path

    def _write_lora(self, path: Path, state: TrainingState) -> None:
        """Write the LoRA: its parameters, or their moving averages if there are any."""
        lora = get_lora(self.model, self.model.config, self.sampled(state.arrays))
        timesteps = trained_timesteps(self.settings, self.model.config)
        if timesteps != range(self.model.config.timesteps):
            lora.metadata.update(timesteps_metadata(timesteps))
        if self.settings.zero_terminal_snr:
            lora.metadata[ZERO_TERMINAL_SNR] = "True"
        mindone.write(path, lora)

    def _write_model(self, path: Path, state: TrainingState) -> None:
        """Write the whole model without LoRA, with the moving averages, for text_to_image.py's --ckpt_path."""
        arrays = {name: parameter.asnumpy() for name, parameter in self.model.parameters_dict().items()}
        arrays.update(self.sampled(state.arrays))
        arrays = {name: array for name, array in arrays.items() if "lora_" not in name}
        config = self.model.config
        metadata = {
            "architecture": config.architecture,
            "prediction_type": config.prediction_type,
            "step": str(state.step),
            **tokens_metadata(config.added_tokens),
        }
        write_checkpoint(path, arrays, metadata)


def remove_leftovers(folder: Path) -> None:
    """Remove the half-written files of a killed process. The folder must be claimed."""
    for path in folder.glob(".*.partial*"):
        if _LEFTOVER.fullmatch(path.name):
            try:
                path.unlink()
            except OSError as error:
                logger.warning("%s, left by a killed run, cannot be removed (%s)", path, error.strerror)


def _link(path: Path, link: Path) -> None:
    """Give `path` the second name `link`: as a hard link, or as a copy if the file system has no hard links."""
    with writing(link), atomic_path(link) as temporary:
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)
