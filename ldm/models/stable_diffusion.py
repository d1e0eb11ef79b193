"""Stable Diffusion: UNet, autoencoder and text encoder, built from a model configuration."""

from __future__ import annotations

from contextlib import nullcontext

from mindspore import Tensor, nn

from ldm.models.autoencoder import AutoencoderKL, IdentityFirstStage
from ldm.models.initial_values import no_init_weights
from ldm.models.text_encoder import CLIPTextEncoder
from ldm.models.unet import UNetModel
from ldm.settings.model import ModelConfig


class DiffusionWrapper(nn.Cell):
    """Holds the UNet under its published name, `diffusion_model`."""

    def __init__(self, unet: UNetModel):
        super().__init__()
        self.diffusion_model = unet

    def construct(self, latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        return self.diffusion_model(latents, timesteps, context)


class StableDiffusion(nn.Cell):
    """Holds the three networks `model.diffusion_model`, `first_stage_model` and `cond_stage_model`.

    It has no graph of its own: each network is called by itself. The parameters have the names of the published
    single-file checkpoints. In pixel space `first_stage_model` is the identity, without parameters.

    Attributes:
        config: The configuration that the networks are built from.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = DiffusionWrapper(UNetModel(**config.unet))
        self.first_stage_model = IdentityFirstStage() if config.in_pixel_space else AutoencoderKL(**config.vae)
        self.cond_stage_model = CLIPTextEncoder(**config.text)


def build_model(config: ModelConfig, random: bool = True) -> StableDiffusion:
    """Build the networks with random weights in fp32, all frozen.

    Args:
        config: The configuration.
        random: Draw the weights from numpy's global random state. False gives zeros, which cost no time and no memory,
            for a checkpoint that `ldm.weights.load` loads next.
    """
    with nullcontext() if random else no_init_weights():
        model = StableDiffusion(config)
    model.set_train(False)
    for parameter in model.get_parameters():
        parameter.requires_grad = False
        parameter.init_data()  # In data-parallel mode, zeros would otherwise be allocated at the first run.
    return model
