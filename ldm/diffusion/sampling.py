"""How images are sampled, and the checks of that which need no network: no MindSpore here, for quick answers."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ldm.diffusion.samplers.steps import check_steps
from ldm.errors import UserError
from ldm.settings.model import ModelConfig


@dataclass(frozen=True)
class Sampling:
    """How images are sampled.

    sampler: a name in ldm.diffusion.samplers.SAMPLERS. steps: network calls an image. scale: guidance, 1 for none.
    eta: DDIM's share of fresh noise. height, width: pixels, None for the model's own. batch_size: images a call of
    the network (twice as many rows with guidance); it changes nothing but speed and memory.
    """

    sampler: str = "dpm_solver_pp"
    steps: int = 20
    scale: float = 7.5
    eta: float = 0.0
    height: int | None = None
    width: int | None = None
    batch_size: int = 4


def check_sampling(sampling: Sampling, config: ModelConfig) -> tuple[int, int, int]:
    """The shape (C, h, w) of the latents; UserError for a size or a number of steps that does not fit the model, and
    for an image (3 x H x W in fp32) that does not fit into this machine's memory.
    """
    shape = latent_shape(config, sampling.height, sampling.width)
    # Linux promises memory that it does not have and ends the process that uses it: no exception would come.
    image = 3 * 4 * shape[1] * shape[2] * config.vae_factor**2
    if image > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        raise out_of_memory(config, shape, sampling.batch_size)
    check_steps(sampling.steps, config.timesteps)
    return shape


def latent_shape(config: ModelConfig, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
    """(C, h, w) of the latents of images of height x width pixels, None for the model's own size.

    Raises UserError for a size that the networks cannot halve as often as they must.
    """
    multiple = config.size_multiple
    sizes = []
    for name, size in (("H", height), ("W", width)):
        size = config.image_size if size is None else size
        if size < multiple or size % multiple:
            near = max(multiple, round(size / multiple) * multiple)
            raise UserError(f"{name} is {size}: this model draws multiples of {multiple} pixels, {near} is nearest")
        sizes.append(size // config.vae_factor)
    return config.latent_channels, sizes[0], sizes[1]


def out_of_memory(config: ModelConfig, shape: tuple[int, int, int], batch_size: int) -> UserError:
    height, width = (size * config.vae_factor for size in shape[1:])
    return UserError(f"not enough memory for batch_size {batch_size}, H {height}, W {width}: lower one of them")
