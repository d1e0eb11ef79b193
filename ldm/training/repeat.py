"""Repeat the last steps of a training from a training state that it has kept."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from ldm.errors import UserError, plain
from ldm.files.inputs import is_folder
from ldm.lora.lora import LoRA
from ldm.settings.model import ModelConfig
from ldm.settings.train import TrainSettings
from ldm.training.own_files import find_states
from ldm.training.setup import begin, set_up
from ldm.training.status import Status
from ldm.training.trainer import train_steps
from ldm.training.training_state import load_state


def find_state(place: Path, step: int, steps: int) -> tuple[Path, int]:
    """Return a training state from which a run reaches a step, and the state's own step.

    Args:
        place: A training state, or the folder of a run or of its states. There, the state that is `steps` steps before
            `step` is taken, or else the oldest one before `step`.

    Raises:
        UserError: There is none.
    """
    folder = is_folder(place, "--state")
    if folder and is_folder(place / "ckpt"):
        place = place / "ckpt"
    paths = find_states(place) if folder else [place]
    found = {load_state(path).step: path for path in paths}
    before = sorted(number for number in found if number < step)
    if not before:
        raise UserError(
            f"--state {plain(place)} has no training state before step {step}, which is that of the file: a run keeps "
            "its newest two"
        )
    start = step - steps if step - steps in found else before[0]
    return found[start], start


def repeat_steps(settings: TrainSettings, state: Path, step: int) -> tuple[LoRA, ModelConfig]:
    """Train again from a training state up to a step, and return the LoRA and the configuration of its base model.

    Args:
        settings: Those of the run, with its data and base model.
        state: The training state.
        step: The step.

    Raises:
        UserError: The state belongs to another run, or as `ldm.training.trainer.train`.
    """
    with tempfile.TemporaryDirectory(prefix="repeat-") as folder:
        settings = replace(
            settings, output_path=folder, resume=str(state), save_model_as="ckpt", report_to=[], sample_prompts=None,
            sample_every_n_steps=None, sample_every_n_epochs=None, validate_every_n_steps=None,
            validate_every_n_epochs=0, max_validation_steps=None, keep_best=False, advise=False, cache_only=False,
            estimate=False, log_level="WARNING", ckpt_save_interval=1, step_mode=True,  # no step is begun ahead
        )  # fmt: skip
        run = set_up(settings, begin(settings), Status(Path(folder) / "ckpt", resumes=True))
        if step > run.plan.steps:
            raise UserError(
                f"the run of --train_config has {run.plan.steps} steps and the file is of step {step}: give the "
                "settings that it was trained with (train_args.yaml in its output_path)"
            )
        for metrics in train_steps(run):
            if metrics.step == step:
                break
        return run.checkpoints.lora(run.step.state()), run.model.config
