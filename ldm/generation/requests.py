"""The images that a run is to generate, and how they are divided into batches."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

from ldm.diffusion.sampling import Sampling
from ldm.lora.merged import MergedLoRA


@dataclass(frozen=True)
class ImageRequest:
    """One image to generate.

    Attributes:
        index: Its place among the images of the run.
        prompt: What the image shows.
        negative_prompt: What it should not show. It is not used at guidance scale 1.
        seed: Its noise depends on (seed, noise_index) alone.
        noise_index: See seed.
        sampling: How it is sampled. Its batch size is a limit.
        loras: The LoRAs that it is made with, None for those that are merged when generation begins.
    """

    index: int
    prompt: str
    negative_prompt: str
    seed: int
    noise_index: int
    sampling: Sampling
    loras: tuple[MergedLoRA, ...] | None = None


@dataclass(frozen=True)
class RequestBatch:
    """Images that are generated together, because all but their prompts and their noise is the same.

    Attributes:
        requests: At most `batch_size` of them.
        batch_size: Rows in a call of the network. A batch of fewer requests is filled up, because the networks would
            be compiled again for another batch size.
    """

    requests: tuple[ImageRequest, ...]
    batch_size: int

    @property
    def sampling(self) -> Sampling:
        """How the images are sampled."""
        return replace(self.requests[0].sampling, batch_size=self.batch_size)

    @property
    def loras(self) -> tuple[MergedLoRA, ...] | None:
        """The LoRAs that the images are made with, None for those that are merged when generation begins."""
        return self.requests[0].loras

    @property
    def texts(self) -> list[str]:
        """The prompts, followed by the negative prompts where they are used."""
        negative_prompts = [request.negative_prompt for request in self.requests] if self.sampling.is_guided else []
        return [*(request.prompt for request in self.requests), *negative_prompts]


def in_batches(
    requests: Sequence[ImageRequest], key: Callable[[ImageRequest], Hashable] = lambda request: None
) -> list[RequestBatch]:
    """Divide requests into batches.

    Requests are generated together if their sampling, their LoRAs and their `key` are equal. The batches of one kind
    follow one another, the kinds in the order of their first request, so that LoRAs are exchanged as rarely as
    possible. Requests of one kind keep their order.
    """
    kinds: dict[Hashable, list[ImageRequest]] = {}
    for request in requests:
        loras = None if request.loras is None else tuple(map(id, request.loras))
        kinds.setdefault((request.sampling, loras, key(request)), []).append(request)
    batches = []
    for of_kind in kinds.values():
        batch_size = max(1, min(of_kind[0].sampling.batch_size, len(of_kind)))
        for start in range(0, len(of_kind), batch_size):
            batches.append(RequestBatch(tuple(of_kind[start : start + batch_size]), batch_size))
    return batches
