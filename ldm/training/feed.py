"""How batches reach the device: made on the host as they are asked for, or through Ascend's data queue."""

from __future__ import annotations

from typing import Callable

import mindspore as ms
from mindspore import Tensor, dataset

from ldm.errors import UserError
from ldm.runtime.device import Runtime
from ldm.settings.train import TrainSettings
from ldm.training.inputs import Batch, Inputs

# A call gives the next micro-step's (latents, noise, timesteps, condition) as tensors.
Feed = Callable[[], "tuple[Tensor, ...]"]


def check_sink(config: TrainSettings, runtime: Runtime) -> None:
    """Raise UserError where dataset_sink_mode is asked for and cannot be: off Ascend, and where a network has to run
    for a batch, which the queue's thread cannot do.
    """
    if not config.dataset_sink_mode:
        return
    if not runtime.is_ascend:
        raise UserError("dataset_sink_mode needs an Ascend device: leave it out on the CPU")
    augments = config.random_crop or config.random_flip
    if augments or not config.cache_latents or not (config.cache_text or config.lora_ft_text_encoder):
        raise UserError(
            "dataset_sink_mode needs cached latents and texts: set cache_latents and cache_text, and neither "
            "random_crop nor random_flip"
        )


def make_feed(inputs: Inputs, first: int, end: int, sink: bool) -> Feed:
    """The batches of the micro-steps from `first` to before `end`; sink: through the data queue, which fills up while
    the device computes (Ascend only).
    """
    if not sink:
        steps = iter(range(first, end))
        return lambda: tuple(Tensor(array) for array in inputs.batch(next(steps)))

    return ms.data_sink(lambda *tensors: tensors, make_queue(inputs, first, end), sink_size=1)


class _MicroSteps:
    """The micro-steps from `first` to before `end` by index."""

    def __init__(self, inputs: Inputs, first: int, end: int):
        self.inputs, self.first, self.end = inputs, first, end

    def __len__(self) -> int:
        return self.end - self.first

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):  # ends a `for` over it
            raise IndexError(index)
        return self.inputs.batch(self.first + int(index))


def make_queue(inputs: Inputs, first: int, end: int) -> dataset.GeneratorDataset:
    """The batches of the micro-steps as MindSpore's dataset. Its source has a length: data_sink asks for it, and of a
    generator MindSpore learns it by making every batch of the run once.
    """
    return dataset.GeneratorDataset(
        _MicroSteps(inputs, first, end), column_names=list(Batch._fields), shuffle=False, num_parallel_workers=1,
        python_multiprocessing=False,
    )  # fmt: skip
