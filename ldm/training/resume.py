"""Resuming a run: what must be the same, and which training state is taken."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ldm.data.content import content_key
from ldm.data.training_data import TrainingData
from ldm.errors import UserError, plain
from ldm.files.inputs import is_file, is_folder
from ldm.lora.spec import LoRASpec
from ldm.runtime.device import PYNATIVE, Runtime
from ldm.settings.declare import names_of
from ldm.settings.model import ModelConfig
from ldm.settings.train import TrainSettings
from ldm.training.checks import image_size
from ldm.training.own_files import find_states
from ldm.training.plan import RunPlan
from ldm.training.step import differing_shapes
from ldm.training.training_state import TrainingState, load_latest_state, load_state, read_fingerprint
from ldm.weights.base_model import base_model_hash

logger = logging.getLogger(__name__)

# A run is not resumed where one of these differs: its weights would not be those of an uninterrupted run.
FIXED_ON_RESUME = ("data", "model", "base", "global_batch", *names_of(TrainSettings, resume="fixed"))
# These may differ. A warning names the change, and the new value is used.
FOLLOWED_ON_RESUME = ("updates", *names_of(TrainSettings, resume="followed"))


def make_fingerprint(
    settings: TrainSettings,
    runtime: Runtime,
    config: ModelConfig,
    data: TrainingData,
    plan: RunPlan,
    lora_spec: LoRASpec,
) -> dict[str, Any]:
    """Collect what a training state is compared by: settings, and hashes of the data and the base model.

    "updates" is the number of steps, "global_batch" the images of a micro-batch in all processes.
    """
    layers = lora_spec.modules, lora_spec.trainable_model
    values = asdict(settings)
    values.update(
        data=data.fingerprint()[:16],
        model=content_key("model", repr(config.content()))[:16],
        base=_base_model_identity(settings),
        global_batch=settings.train_batch_size * runtime.process_count,
        precision=runtime.precision,
        image_size=image_size(settings, config),
        updates=plan.steps,
        **settings.resolved(),
        lora_config=content_key("lora_config", repr(layers))[:16] if settings.lora_config else None,
    )
    return {name: values[name] for name in FIXED_ON_RESUME + FOLLOWED_ON_RESUME}


def _base_model_identity(settings: TrainSettings) -> str:
    assert settings.pretrained_model_path is not None
    vae = "" if settings.vae_ckpt_path is None else f"-vae-{base_model_hash(settings.vae_ckpt_path)[:16]}"
    return base_model_hash(settings.pretrained_model_path)[:16] + "-ema" * settings.pretrained_model_ema + vae


def check_no_earlier_run(settings: TrainSettings) -> None:
    """Raise UserError if output_path holds training states and the run does not resume: they would be overwritten."""
    folder = Path(settings.output_path) / "ckpt"
    if not settings.resume and find_states(folder):
        raise UserError(
            f"{folder} holds the training states of an earlier run: continue it with --resume True, or choose another "
            "--output_path (or remove the folder)"
        )


def precision_to_resume(settings: TrainSettings) -> str | None:
    """Return the precision of the run that `resume` names, by its newest readable state. None if nothing says it.

    It is asked before MindSpore is set up. find_state_to_resume checks the state. Raises UserError as is_folder.
    """
    if not settings.resume:
        return None
    where = _place_to_resume(settings)
    return _precision_of([where] if is_file(where, "resume") else find_states(where))


def precision_of_run(output: Path) -> str | None:
    """Return the precision of the run in an output folder, by its newest readable state. None if there is none."""
    return _precision_of(find_states(output / "ckpt"))


def _precision_of(states: Sequence[Path]) -> str | None:
    for path in states:
        try:
            return read_fingerprint(path).get("precision")
        except UserError:  # the next one is taken, which find_state_to_resume says
            continue
    return None


def _place_to_resume(settings: TrainSettings) -> Path:
    """Return the training state, or the folder of them, that `resume` names."""
    where = Path(settings.resume) if isinstance(settings.resume, str) else Path(settings.output_path) / "ckpt"
    return where / "ckpt" if is_folder(where, "resume") and is_folder(where / "ckpt", "resume") else where


def find_state_to_resume(
    settings: TrainSettings, fingerprint: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> TrainingState | None:
    """Read the training state that `resume` names: the newest one of a folder that can be used, or a file.

    `shapes` are the names and shapes of the arrays that the state must have.

    Returns:
        The state, or None if the run does not resume, or if it resumes its own output_path and nothing was saved yet.

    Raises:
        UserError: There is no training state, it cannot be used, or it belongs to another run.
    """
    if not settings.resume:
        return None
    where = _place_to_resume(settings)

    def misfit(state: TrainingState) -> str:
        differences = compare_fingerprints(state.fingerprint, fingerprint)
        fixed = [text for name, text in differences.items() if name in FIXED_ON_RESUME]
        if fixed:
            hint = ""
            if "global_batch" in differences:
                processes = fingerprint["global_batch"] // settings.train_batch_size
                hint = _how_to_keep_the_batch(with_global_batch(state.fingerprint)["global_batch"], processes)
            if "precision" in differences:
                begun_in = state.fingerprint["precision"]
                is_refused = begun_in == "bf16" and (fingerprint["precision"] == "fp16" or settings.mode == PYNATIVE)
                way = "bf16 is for graph mode on the CPU" if is_refused else f"give --precision {plain(begun_in, 60)}"
                hint += f" ({way})"
            raise UserError(
                f"{state.path} belongs to another run: {'; '.join(fixed)}{hint}. Use the same settings and data, or "
                "start again without --resume in another output_path"
            )
        difference = differing_shapes(shapes, state.arrays)
        return f"{state.path} does not fit this run ({difference})" if difference else ""

    state: TrainingState | None
    if is_file(where, "resume"):
        state = load_state(where)
        if fault := misfit(state):
            raise UserError(fault)
    else:
        state = load_latest_state(where, misfit)
    if state is None:
        if settings.resume is True:
            logger.info("resume: %s holds no training state yet, so this run starts from the beginning", where)
            return None
        raise UserError(f"resume: {plain(where)} holds no training state (state-<step>.safetensors)")
    for name, difference in compare_fingerprints(state.fingerprint, fingerprint).items():
        if name not in FIXED_ON_RESUME:
            logger.warning("resume: %s; the new value is used", difference)
    if state.fingerprint.get("rank_size", 1) != 1:
        logger.warning(
            "%s is of an earlier version, in which each process drew its own random numbers: from here on they are "
            "those of one process with all images of a batch",
            state.path,
        )
    return state


def _how_to_keep_the_batch(saved: Any, processes: int) -> str:
    """Say which train_batch_size gives the saved number of images in a micro-batch of all processes."""
    rule = " (global_batch is train_batch_size x processes: "
    if not isinstance(saved, int) or saved % processes:
        return f"{rule}start a number of processes that divides it)"
    return f"{rule}with {processes} process{'es' * (processes > 1)}, use --train_batch_size {saved // processes})"


def with_global_batch(fingerprint: dict[str, Any]) -> dict[str, Any]:
    """Return a fingerprint with "global_batch" in place of what earlier versions saved, "rank_size" and the batch size.

    A "train_batch_size" or "rank_size" that is no number is left for the comparison to refuse.
    """
    values = dict(fingerprint)
    if "global_batch" not in values and isinstance(values.get("train_batch_size"), int):
        if isinstance(values.get("rank_size", 1), int):
            values["global_batch"] = values.pop("train_batch_size") * values.pop("rank_size", 1)
    return values


def compare_fingerprints(saved: dict[str, Any], current: dict[str, Any]) -> dict[str, str]:
    """Return what differs between two runs as name -> "name was a, is b".

    Only what was saved is compared: an older version of this project may not have saved all of it.
    """
    saved = with_global_batch(saved)
    return {
        name: f"{plain(name, 60)} was {plain(saved[name], 60)}, is {plain(current.get(name), 60)}"
        for name in saved
        if saved[name] != current.get(name)
    }
