"""The networks, inputs and weights that golden and live comparisons share."""

from __future__ import annotations

import numpy as np
from mindspore import Tensor

from ldm.models.autoencoder import VAEDecode, VAEEncode
from ldm.models.stable_diffusion import StableDiffusion, build_model
from ldm.settings.model import ModelConfig
from tests.named_weights import named_input, named_weight

# The YAMLs beside the golden file, and how many text layers of the published network are left unused.
FORMS = {"small_sd1": 0, "small_sd2": 1}
NETWORKS = ("unet", "encode", "decode", "text")


def model_with_named_weights(config: ModelConfig) -> StableDiffusion:
    """The networks of `config`, every parameter a function of its name."""
    model = build_model(config)
    for name, parameter in model.parameters_dict().items():
        parameter.set_data(Tensor(named_weight(name, tuple(parameter.shape))))
    return model


def inputs_for(config: ModelConfig, batch: int = 2, height: int = 8, width: int = 12) -> dict[str, np.ndarray]:
    """Inputs by name: `batch` latents of height x width (not square: a swap of the two shows), unlike time steps."""
    channels, factor = config.latent_channels, config.vae_factor
    tokens = np.random.RandomState(5).randint(0, config.text.get("vocab_size", 49408), (batch, 77)).astype(np.int32)
    tokens[:, 0] = 49406
    tokens[:, 40:] = 49407
    return {
        "latents": named_input("latents", (batch, channels, height, width)),
        "timesteps": np.array([1, 999, 500, 17])[:batch].astype(np.int32),
        "context": named_input("context", (batch, 77, config.context_dim)),
        "images": np.tanh(named_input("images", (batch, 3, height * factor, width * factor))),
        "vae_latents": named_input("vae_latents", (batch, channels, height, width)),
        "tokens": tokens,
    }


def run_network(model: StableDiffusion, network: str, given: dict[str, np.ndarray]) -> np.ndarray:
    """The output of one of NETWORKS, each a graph of its own."""
    if network == "unet":
        unet = model.model.diffusion_model
        return unet(Tensor(given["latents"]), Tensor(given["timesteps"]), Tensor(given["context"])).asnumpy()
    if network == "text":
        return model.cond_stage_model(Tensor(given["tokens"])).asnumpy()
    if network == "encode":
        return VAEEncode(model.first_stage_model)(Tensor(given["images"])).asnumpy()
    return VAEDecode(model.first_stage_model)(Tensor(given["vae_latents"])).asnumpy()
