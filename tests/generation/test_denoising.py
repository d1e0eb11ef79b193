"""When a LoRA acts in a sampling that begins from an image."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest

from ldm.diffusion.sampling import Sampling
from ldm.generation.denoising import SourceLatents, denoise_batch
from ldm.lora.merged import MergedLoRA, SamplingRange
from ldm.lora.strength import Strength


class Switches:
    """Stands for the merged LoRAs, and remembers what is switched on at each call of the network."""

    def __init__(self, *ranges):
        lora = SimpleNamespace(timesteps=None, zero_terminal_snr=False)
        self.loras = [MergedLoRA("", lora, Strength.from_value(1.0), SamplingRange(*ends)) for ends in ranges]
        self.calls = []

    def switch(self, active):
        self.calls.append(active)


def calls(tiny_config, sampler, first_step):
    """The LoRAs that act in each call of the network, of one in the first and one in the second half."""
    switches, shape = Switches((0.0, 0.5), (0.5, 1.0)), (1, 4, 4, 4)
    text = np.zeros((1, 77, tiny_config.context_dim), np.float32)
    source = SourceLatents(clean_latents=np.ones(shape, np.float32), first_step=first_step)
    denoise_batch(
        lambda latents, timesteps, embeddings: ms.Tensor(np.zeros(latents.shape, np.float32)),
        tiny_config, switches, text, None, np.ones(shape, np.float32),
        Sampling(sampler, num_inference_steps=10, guidance_scale=1.0), source=source,
    )  # fmt: skip
    assert switches.calls.pop() == [True, True]  # at the end, as before
    return switches.calls


FIRST, SECOND = [True, False], [False, True]


def test_its_share_is_that_of_the_steps_that_are_taken(tiny_config):
    assert calls(tiny_config, "dpm_solver_pp", 0) == [FIRST] * 5 + [SECOND] * 5
    assert calls(tiny_config, "dpm_solver_pp", 6) == [FIRST] * 2 + [SECOND] * 2


def test_steps_are_counted_and_not_calls_of_the_network(tiny_config):
    assert calls(tiny_config, "heun", 6) == [FIRST] * 4 + [SECOND] * 3  # the last step is Euler's


def test_an_inpainting_model_needs_the_channels_of_its_mask(tiny_config):
    inpainting = replace(tiny_config, unet={**tiny_config.unet, "in_channels": 9})
    latents, text = np.ones((1, 4, 4, 4), np.float32), np.zeros((1, 77, tiny_config.context_dim), np.float32)
    with pytest.raises(ValueError, match="extra_channels"):
        denoise_batch(None, inpainting, Switches(), text, None, latents, Sampling(guidance_scale=1.0))
