"""The networks against diffusers' and transformers', live, at sizes that the golden files do not have."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest

from ldm.models.stable_diffusion import build_model
from ldm.settings.model import ModelConfig, load_model_config
from tests.named_weights import relative_error
from tests.network_cases import NETWORKS, inputs_for, model_with_named_weights, run_network
from tests.parity.reference import Reference, reference_text_encoder, reference_unet, reference_vae
from tests.weight_names import from_diffusers

ROOT = Path(__file__).parents[2]
BOUND = 5e-5


def narrow(path: str, **changes) -> ModelConfig:
    """A published configuration, all of its levels and layers, with fewer channels."""
    config = load_model_config(ROOT / path)
    parts = {part: {**getattr(config, part), **changes.get(part, {})} for part in ("unet", "vae", "text")}
    return dataclasses.replace(config, context_dim=parts["unet"]["context_dim"], **parts)


def sd1_narrow() -> ModelConfig:
    return narrow(
        "configs/v1-inference.yaml",
        unet=dict(model_channels=32, context_dim=96),
        vae=dict(ch=32),
        text=dict(width=96, num_heads=6),
    )


def sd2_narrow() -> ModelConfig:
    return narrow(
        "configs/v2-inference.yaml",
        unet=dict(model_channels=64, context_dim=128, transformer_depth=2),
        vae=dict(ch=32),
        text=dict(width=128, num_heads=2),
    )


def nano() -> ModelConfig:
    return load_model_config(ROOT / "configs/nano.yaml")


def mnist() -> ModelConfig:
    return load_model_config(ROOT / "configs/mnist.yaml")


# diffusers has no autoencoder of nano's form: its first level is wider than its first convolution.
CASES = {
    "sd1": (sd1_narrow, 0, NETWORKS, dict(batch=1, height=16, width=8)),
    "sd2": (sd2_narrow, 1, NETWORKS, dict(batch=3, height=8, width=16)),
    "nano": (nano, 0, ("unet", "text"), dict(batch=2, height=16, width=16)),
    "mnist": (mnist, 0, ("unet",), dict(batch=2, height=32, width=16)),
}


@functools.cache
def case(name: str):
    ms.set_context(mode=ms.GRAPH_MODE)
    make, unused, networks, size = CASES[name]
    config = make()
    model = model_with_named_weights(config)
    weights = {
        name: parameter.asnumpy()
        for name, parameter in model.parameters_dict().items()
        if "decode" in networks or not name.startswith("first_stage_model.")
    }
    return model, Reference(config, weights, unused), inputs_for(config, **size)


@pytest.mark.parametrize("name, network", [(name, network) for name, case in CASES.items() for network in case[2]])
def test_network_equals_the_reference(name, network):
    model, reference, given = case(name)
    assert relative_error(run_network(model, network, given), reference.run(network, given)) < BOUND


@pytest.mark.parametrize("name", CASES)
def test_time_steps_may_be_fractional(name):
    model, reference, given = case(name)
    given = {**given, "timesteps": given["timesteps"].astype(np.float32) + 0.25}
    assert relative_error(run_network(model, "unet", given), reference.run("unet", given)) < BOUND


@pytest.mark.parametrize("make", [sd1_narrow, sd2_narrow])
def test_reference_names_become_exactly_ours(make):
    config = make()
    theirs = [
        network.state_dict()
        for network in (reference_unet(config), reference_vae(config), reference_text_encoder(config))
    ]
    canonical = from_diffusers(*({name: value.numpy() for name, value in state.items()} for state in theirs))
    ours = build_model(config).parameters_dict()
    assert {name: array.shape for name, array in canonical.items()} == {name: p.shape for name, p in ours.items()}
