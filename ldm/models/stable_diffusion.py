"""UNet, autoencoder and text encoder, put together from a model configuration, with the published names."""

from __future__ import annotations

from contextlib import nullcontext

from mindspore import Tensor, nn

from ldm.models.autoencoder import AutoencoderKL
from ldm.models.initial_values import no_init_weights
from ldm.models.text_encoder import CLIPTextEncoder
from ldm.models.unet import UNetModel
from ldm.settings.model import ModelConfig


class DiffusionWrapper(nn.Cell):
    """Holds `diffusion_model`, as the published names have it."""

    def __init__(self, unet: UNetModel):
        super().__init__()
        self.diffusion_model = unet

    def construct(self, latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        return self.diffusion_model(latents, timesteps, context)


class StableDiffusion(nn.Cell):
    """The three networks: `model.diffusion_model`, `first_stage_model`, `cond_stage_model`.

    A container: each network runs as a graph of its own. `parameters_dict()` has the names of the published single-file
    checkpoints.

    Attributes:
        config: The configuration that the networks are built from.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = DiffusionWrapper(UNetModel(**config.unet))
        self.first_stage_model = AutoencoderKL(**config.vae)
        self.cond_stage_model = CLIPTextEncoder(**config.text)


def build_model(config: ModelConfig, random: bool = True) -> StableDiffusion:
    """Random weights (numpy's global state), fp32, frozen; load a checkpoint over them with `ldm.weights.load`.

    random: False for zeros, which cost no time and no memory, where a checkpoint is loaded next.
    """
    with nullcontext() if random else no_init_weights():
        model = StableDiffusion(config)
    model.set_train(False)
    for parameter in model.get_parameters():
        parameter.requires_grad = False
        parameter.init_data()  # zeros that are not made yet, as in data-parallel mode, would be made at the first run
    return model
