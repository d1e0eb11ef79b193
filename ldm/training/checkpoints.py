"""The checkpoints of a run: `{output_path}/ckpt` with the trained weights and the training states.

Beside each lora-<step>.ckpt lies the same LoRA as a .safetensors for others (ldm.training.sharing).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ldm.lora.formats import mindone
from ldm.lora.inject import get_lora
from ldm.lora.lora import ZERO_TERMINAL_SNR, LoRA, timesteps_metadata
from ldm.models.stable_diffusion import StableDiffusion
from ldm.settings.train import TrainSettings
from ldm.textual_inversion.formats import write_embeddings
from ldm.textual_inversion.inject import get_embeddings
from ldm.training.best_checkpoint import BestCheckpoint
from ldm.training.checks import trained_timesteps
from ldm.training.optimizers import make_optimizer
from ldm.training.own_files import SUFFIXES, Numbered, OwnFiles, link, shared_name
from ldm.training.sharing import SharedFile
from ldm.training.training_state import TrainingState, check_finite, save_state
from ldm.weights.added_tokens import tokens_metadata
from ldm.weights.checkpoint import write_checkpoint

logger = logging.getLogger(__name__)

_OF_SHARED = r".+-step[0-9]{8,12}\.[0-9]+-[0-9a-f]{8}\.partial\.safetensors"
# The newest state, and one in case that is damaged. A state takes three to four times the trained parameters' memory.
STATES_KEPT = 2
_WRITTEN = (
    r"(?:lora|model|ti|state|class|best|step|prompt)(?:-[0-9]+)?|files|metrics|validation|train_args|prompts|report|run"
)
_LEFTOVER = re.compile(
    rf"\.(?:(?:{_WRITTEN})\.[0-9]+(?:-[0-9a-f]{{8}})?\.partial(?:\.\w+)?|{_OF_SHARED})"  # see temporary_path
)


class Checkpoints:
    """Writes `lora-<step>.ckpt` or `model-<step>.ckpt` with a training state beside it, and removes old ones.

    A learned token is in `ti-<step>.safetensors`, beside a LoRA or alone. `lora.ckpt`, `model.ckpt` and
    `ti.safetensors` always name the newest.

    Args:
        settings: Settings of the run.
        model: The model that is trained.
        saves_base_model: Whether the base model is saved, because it is trained, alone or beside a LoRA.
        resumed_here: Whether the run resumes one in the same folder, whose files are then its own.
        start: Number of steps that are done before this run.
        shared: Writes the LoRA for others, None if it does not.
    """

    def __init__(
        self,
        settings: TrainSettings,
        model: StableDiffusion,
        *,
        saves_base_model: bool,
        resumed_here: bool,
        start: int,
        shared: SharedFile | None = None,
    ):
        self.settings, self.model, self.shared = settings, model, shared
        self.folder = Path(settings.output_path) / "ckpt"
        self.keep = settings.ckpt_max_keep
        self.sampled = make_optimizer(settings).sampled
        self.writers: dict[str, Callable[[Path, TrainingState], None]] = {}
        if settings.use_lora:
            self.writers["lora"] = self._write_lora
        if saves_base_model:
            self.writers["model"] = self._write_model
        if settings.placeholder_token is not None:
            self.writers["ti"] = self._write_token
        self.kind = next(iter(self.writers))  # what a checkpoint mainly is
        self.newest = self.folder / f"{self.kind}{SUFFIXES[self.kind]}"
        self.newest_shared = None if shared is None else self.folder / shared_name(shared.name)
        self._own_files = OwnFiles(self.folder, resumed_here)
        self._start: int | None = start  # None after the first file was written
        self._best = BestCheckpoint(self.folder, self._own_files, start, STATES_KEPT)
        self.restore_best: Callable[[BestCheckpoint], None] | None = None  # called before the first file is written

    def save(self, state: TrainingState) -> Path:
        """Write the weights, then the training state, so that every state on disk has its weights beside it.

        Returns the path of the training state. Raises UserError if a value is not finite or a file cannot be written.
        """
        check_finite(state.arrays, f"nothing is saved at step {state.step}: the trained state")
        self._begin()
        links = {Numbered(kind, state.step).name: f"{kind}{SUFFIXES[kind]}" for kind in self.writers}
        writers = dict(zip(links, self.writers.values()))
        if self.shared is not None:
            name = Numbered("share", state.step, self.shared.name).name
            links[name], writers[name] = shared_name(self.shared.name), self._write_shared
        self._own_files.begin([*links, Numbered("state", state.step).name, *links.values()])
        for name, write in writers.items():
            write(self.folder / name, state)
            link(self.folder / name, self.folder / links[name])
        path = save_state(self.folder, state)
        for kind in self.writers:
            self._own_files.prune(kind, self.keep, beside="share" if kind == "lora" else None)
        self._own_files.prune("state", STATES_KEPT)
        self._best.after_save()
        logger.debug("saved step %d in %s", state.step, self.folder)
        return path

    def save_best(self, step: int, loss: float, arrays: dict[str, np.ndarray] | None) -> None:
        """Record the step with the lowest validation loss so far, and write its weights if there are `arrays`.

        Args:
            step: The step.
            loss: Its validation loss.
            arrays: TrainStep.state() of this step.

        Raises:
            UserError: A file cannot be written.
        """
        self._begin()
        if arrays is None:
            self._best.write(step, loss)
            return
        write = self.writers[self.kind]
        state = TrainingState(step, arrays, {}, {})
        self._best.write(step, loss, lambda path: write(path, state))

    def kept(self, step: int) -> Path | None:
        """Return the file with the weights of a step, None if they are not kept."""
        for kind in ("best", self.kind):
            if step in self._own_files.steps(kind) and (self.folder / Numbered(kind, step).name).exists():
                return self.folder / ("best.ckpt" if kind == "best" else Numbered(kind, step).name)
        return None

    def _begin(self) -> None:
        """Make the folder fit the step that this run starts from, before its first file is written."""
        if self._start is None:
            return
        self._own_files.set_aside_later(self._start)
        self._start = None
        if self.restore_best is not None:
            self.restore_best(self._best)

    def _write_lora(self, path: Path, state: TrainingState) -> None:
        mindone.write(path, self.lora(state.arrays))

    def _write_shared(self, path: Path, state: TrainingState) -> None:
        assert self.shared is not None
        self.shared.write(path, self.lora(state.arrays), state)

    def lora(self, arrays: dict[str, np.ndarray]) -> LoRA:
        """Return the LoRA that a checkpoint holds: its parameters, or their averages if there are any.

        `arrays` are those of TrainStep.state().
        """
        sampled = self.sampled(arrays)
        lora = get_lora(self.model, self.model.config, sampled)
        lora.embeddings.update((learned.token, learned.vectors) for learned in get_embeddings(self.model, sampled))
        timesteps = trained_timesteps(self.settings, self.model.config)
        if timesteps != range(self.model.config.timesteps):
            lora.metadata.update(timesteps_metadata(timesteps))
        if self.settings.zero_terminal_snr:
            lora.metadata[ZERO_TERMINAL_SNR] = "True"
        return lora

    def _write_token(self, path: Path, state: TrainingState) -> None:
        """Write the learned token in diffusers' form, for text_to_image.py's --ti_ckpt_path."""
        metadata = {"architecture": self.model.config.architecture, "step": str(state.step)}
        write_embeddings(path, get_embeddings(self.model, self.sampled(state.arrays)), metadata=metadata)

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


def remove_leftovers(folder: Path, share_name: str | None = None) -> None:
    """Remove the half-written files of a killed process. The folder must be claimed.

    `share_name` is that of the newest file to share, without its suffix.
    """
    newest = re.compile(rf"\.{re.escape(share_name or '')}\.[0-9]+-[0-9a-f]{{8}}\.partial\.safetensors")
    for path in folder.glob(".*.partial*"):
        if _LEFTOVER.fullmatch(path.name) or (share_name and newest.fullmatch(path.name)):
            try:
                path.unlink()
            except OSError as error:
                logger.warning("%s, left by a killed run, cannot be removed (%s)", path, error.strerror)
