"""The training loop of the nano autoencoder and CLIP, with a log and resuming.

The UNet is trained by train_text_to_image.py. A run that was killed resumes from its last save and ends with the same
weights as an uninterrupted one, because every random draw depends on the step alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from tqdm import tqdm

from ldm.errors import UserError
from ldm.files.atomic import atomic_path
from ldm.runtime.script import describe_progress
from ldm.weights.checkpoint import read_checkpoint, write_checkpoint

# The optimizer's learning rates. They are not restored, so that a run can be resumed with another number of steps.
SCHEDULE = "optimizer.learning_rate.learning_rate"


class Step(nn.Cell):
    """An AdamW step on a loss cell that returns a tuple of scalars, the loss first."""

    def __init__(self, loss: nn.Cell, parameters: list[Parameter], rates: list[float], weight_decay: float):
        super().__init__(auto_prefix=False)
        self.loss = loss
        self.weights = ms.ParameterTuple(parameters)
        self.optimizer = nn.AdamWeightDecay(parameters, rates, beta2=0.99, weight_decay=weight_decay)
        self.value_and_grad = ops.value_and_grad(loss, None, self.weights, has_aux=True)

    def construct(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        values, gradients = self.value_and_grad(*inputs)
        self.optimizer(ops.clip_by_global_norm(gradients, 1.0))
        return values


def learning_rates(peak: float, steps: int, warmup: int) -> list[float]:
    """Return the rates of a linear warm-up and a cosine decay to 1 % of the peak."""
    return [
        peak * min(1.0, (i + 1) / warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * i / steps)))
        for i in range(steps)
    ]


def train(
    step: Step,
    batch: Callable[[int], tuple[np.ndarray, ...]],
    steps: int,
    folder: Path,
    names: tuple[str, ...],
    settings: str = "",
    save_every: int = 200,
) -> None:
    """Run `steps` steps, and resume from `folder`/state.safetensors if it exists.

    Args:
        step: The training step.
        batch: Returns the inputs of the loss for a step number.
        steps: The number of steps, including those of the run that is resumed.
        folder: The folder of the training state and the log.
        names: Names of the values that the loss returns, for the log.
        settings: A description of the settings that a resumed run must share.
        save_every: Steps between saves.

    Raises:
        UserError: The training state in `folder` belongs to another network or to other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state_path, first = folder / "state.safetensors", 0
    if state_path.exists():
        arrays, metadata = read_checkpoint(state_path)
        first = int(metadata["step"])
        if metadata.get("settings") != settings:
            raise UserError(
                f"{state_path} is from a run with {metadata.get('settings')}, this run has {settings}: use the same "
                "settings, or another --output_path"
            )
        restored = {name: p for name, p in step.parameters_dict().items() if name != SCHEDULE}
        for name, parameter in restored.items():
            if name not in arrays or arrays[name].shape != parameter.shape:
                raise UserError(f"{state_path} is from another run, {name} does not fit: choose another --output_path")
            parameter.set_data(Tensor(arrays[name].astype(parameter.asnumpy().dtype)))
    step.set_train()
    done = saved = first
    describe_progress(lambda: f"after step {done} of {steps}; step {saved} is saved: the same command resumes there")
    bar = tqdm(range(first, steps), initial=first, total=steps, desc=folder.name, mininterval=5)
    for i in bar:
        last = i == steps - 1
        values = step(*[Tensor(array) for array in batch(i)])
        if i % 20 == 0 or last:
            text = " ".join(f"{name} {float(value.asnumpy()):.4f}" for name, value in zip(names, values))
            bar.set_postfix_str(text)
            with open(folder / "log.txt", "a", encoding="utf-8") as log:
                log.write(f"step {i} {text}\n")
        if (i + 1) % save_every == 0 or last:
            state = {name: p.asnumpy() for name, p in step.parameters_dict().items()}
            write_checkpoint(state_path, state, {"step": str(i + 1), "settings": settings})
            saved = i + 1
        done = i + 1


def load_parameters(parameters: Mapping[str, Parameter], path: Path, prefix: str = "") -> None:
    """Set parameters to the arrays of a checkpoint, whose names begin with `prefix`."""
    arrays, _ = read_checkpoint(path)
    for name, parameter in parameters.items():
        parameter.set_data(Tensor(arrays[prefix + name]))


def write_results(path: Path, parameters: Mapping[str, Parameter], report: str, prefix: str = "") -> None:
    """Print the report, write it to report.txt, and write the parameters to `path` beside it."""
    print(report)
    with atomic_path(path.with_name("report.txt")) as temporary:
        temporary.write_text(report + "\n", encoding="utf-8")
    write_checkpoint(path, {prefix + name: parameter.asnumpy() for name, parameter in parameters.items()})
