"""How micro-batches reach the device: as they are asked for, or through Ascend's data queue."""

from __future__ import annotations

from collections.abc import Callable

import mindspore as ms
from mindspore import Tensor, dataset

from ldm.errors import UserError
from ldm.runtime.device import Runtime
from ldm.settings.train import TrainSettings
from ldm.training.inputs import Batch, Inputs

TensorBatch = tuple[Tensor, ...]  # the fields of ldm.training.inputs.Batch
Feed = Callable[[], TensorBatch]


def check_sink(settings: TrainSettings, runtime: Runtime) -> None:
    """Raise UserError if dataset_sink_mode is set and cannot be used.

    It needs Ascend, and inputs that are cached: the thread of the queue cannot run the networks that encode them.
    """
    if not settings.dataset_sink_mode:
        return
    if not runtime.is_ascend:
        raise UserError("dataset_sink_mode needs an Ascend device: leave it out on the CPU")
    augments = settings.random_crop or settings.random_flip
    if augments or not settings.cache_latents or not (settings.cache_text or settings.lora_ft_text_encoder):
        raise UserError(
            "dataset_sink_mode needs cached latents and text embeddings: set cache_latents and cache_text, and neither "
            "random_crop nor random_flip"
        )


def make_feed(inputs: Inputs, start: int, end: int, sink: bool) -> Feed:
    """Return a function that returns the next of the micro-batches from `start` to before `end`.

    With `sink`, they go through Ascend's data queue, which is filled while the device computes.
    """
    if not sink:
        numbers = iter(range(start, end))
        return lambda: tuple(Tensor(array) for array in inputs.batch(next(numbers)))

    return ms.data_sink(lambda *tensors: tensors, make_queue(inputs, start, end), sink_size=1)


class _MicroBatches:
    """The micro-batches from `start` to before `end` as a sequence."""

    def __init__(self, inputs: Inputs, start: int, end: int):
        self.inputs, self.start, self.end = inputs, start, end

    def __len__(self) -> int:
        return self.end - self.start

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.inputs.batch(self.start + int(index))


def make_queue(inputs: Inputs, start: int, end: int) -> dataset.GeneratorDataset:
    """Return the micro-batches from `start` to before `end` as MindSpore's dataset.

    data_sink asks for the dataset's length. The source is a sequence because MindSpore finds the length of a generator
    by making every batch of the run.
    """
    return dataset.GeneratorDataset(
        _MicroBatches(inputs, start, end), column_names=list(Batch._fields), shuffle=False, num_parallel_workers=1,
        python_multiprocessing=False,
    )  # fmt: skip
