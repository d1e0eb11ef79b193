"""The training loop of the scripts in this folder: log, progress bar, save, resume.

`train_text_to_image.py` trains the UNet; what is here serves the autoencoder and CLIP, which are made once. A killed
run goes on from its last save and ends as an uninterrupted one would: every random draw is a function of the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from tqdm import tqdm

from ldm.errors import UserError
from ldm.runtime.script import progress
from ldm.weights.checkpoint import read_checkpoint, write_checkpoint

# The optimizer's table of learning rates follows from the arguments: a run may be resumed with fewer or more steps.
SCHEDULE = "optimizer.learning_rate.learning_rate"


class Step(nn.Cell):
    """One AdamW step on a loss cell that returns a tuple of scalars, the loss first."""

    def __init__(self, loss: nn.Cell, parameters: list[Parameter], rates: list[float], weight_decay: float):
        super().__init__(auto_prefix=False)
        self.loss = loss
        self.weights = ms.ParameterTuple(parameters)
        self.optimizer = nn.AdamWeightDecay(parameters, rates, beta2=0.99, weight_decay=weight_decay)
        self.value_and_grad = ops.value_and_grad(loss, None, self.weights, has_aux=True)

    def construct(self, *inputs):
        values, gradients = self.value_and_grad(*inputs)
        self.optimizer(ops.clip_by_global_norm(gradients, 1.0))
        return values


def learning_rates(peak: float, steps: int, warmup: int) -> list[float]:
    """Linear warm-up, then a cosine down to 1 % of the peak."""
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
    """Run `steps` steps, resuming from `folder`/state.safetensors where there is one.

    Args:
        batch: step number -> the inputs of the step's loss.
        names: what the step's loss returns, for the log.
        settings: what a resumed run must share with the one it goes on from.

    Raises:
        UserError: the state in `folder` is of another network or of other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state, first = folder / "state.safetensors", 0
    if state.exists():
        arrays, metadata = read_checkpoint(state)
        first = int(metadata["step"])
        if metadata.get("settings") != settings:
            raise UserError(
                f"{state} is of a run with {metadata.get('settings')}, this one has {settings}; "
                "use the same, or another --output_path"
            )
        for name, parameter in step.parameters_dict().items():
            if name == SCHEDULE:
                continue
            if name not in arrays or arrays[name].shape != parameter.shape:
                raise UserError(f"{state} is of another run: {name} does not fit; choose another --output_path")
            parameter.set_data(Tensor(arrays[name].astype(parameter.asnumpy().dtype)))
    step.set_train()
    done = kept = first
    progress(lambda: f"after step {done} of {steps}; step {kept} is kept: the same command goes on from there")
    bar = tqdm(range(first, steps), initial=first, total=steps, desc=folder.name, mininterval=5)
    for i in bar:
        values = step(*[Tensor(array) for array in batch(i)])
        if i % 20 == 0 or i == steps - 1:
            text = " ".join(f"{name} {float(value.asnumpy()):.4f}" for name, value in zip(names, values))
            bar.set_postfix_str(text)
            with open(folder / "log.txt", "a", encoding="utf-8") as log:
                log.write(f"step {i} {text}\n")
        if (i + 1) % save_every == 0 or i == steps - 1:
            write_checkpoint(
                state,
                {name: p.asnumpy() for name, p in step.parameters_dict().items()},
                {"step": str(i + 1), "settings": settings},
            )
            kept = i + 1
        done = i + 1
