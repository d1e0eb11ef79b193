"""The loss compares with the noise or with the velocity, in graph mode."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from ldm.diffusion.loss import DiffusionLoss
from ldm.diffusion.schedule import NoiseSchedule


class Scaled(nn.Cell):
    """A stand-in for the UNet: one weight, and an output that depends on the time step and the text embeddings."""

    def __init__(self):
        super().__init__()
        self.weight = ms.Parameter(ms.Tensor(np.float32(0.5)), name="weight")

    def construct(self, latents, timesteps, text_embeddings):
        offset = ops.reshape(timesteps.astype(ms.float32) / 1000.0 + text_embeddings[:, 0, 0], (-1, 1, 1, 1))
        return self.weight * latents + ops.broadcast_to(offset, latents.shape)


pytestmark = pytest.mark.usefixtures("graph_mode")


@pytest.fixture
def sample():
    rng = np.random.default_rng(0)
    return {
        "latents": rng.standard_normal((3, 4, 5, 6)).astype(np.float32),
        "noise": rng.standard_normal((3, 4, 5, 6)).astype(np.float32),
        "timesteps": np.array([0, 500, 999], np.int32),
        "text_embeddings": rng.standard_normal((3, 7, 2)).astype(np.float32),
    }


def expected_loss(sample, prediction_type, weight=0.5, weights=1.0):
    abar = NoiseSchedule().alphas_cumprod[sample["timesteps"]].reshape(-1, 1, 1, 1)
    latents, noise = sample["latents"].astype(np.float64), sample["noise"].astype(np.float64)
    noisy_latents = np.sqrt(abar) * latents + np.sqrt(1 - abar) * noise
    offset = (sample["timesteps"] / 1000 + sample["text_embeddings"][:, 0, 0]).reshape(-1, 1, 1, 1)
    target = noise if prediction_type == "epsilon" else np.sqrt(abar) * noise - np.sqrt(1 - abar) * latents
    return np.mean(weights * (weight * noisy_latents + offset - target) ** 2)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_it_is_the_mean_squared_error_of_the_prediction(sample, prediction_type):
    loss = DiffusionLoss(Scaled(), NoiseSchedule(), prediction_type)
    value = loss(*(ms.Tensor(array) for array in sample.values()))
    assert value.dtype == ms.float32 and value.shape == ()
    assert float(value.asnumpy()) == pytest.approx(expected_loss(sample, prediction_type), rel=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_its_gradient_is_that_of_the_formula(sample, prediction_type):
    unet = Scaled()
    loss = DiffusionLoss(unet, NoiseSchedule(), prediction_type)
    _, gradient = ms.value_and_grad(loss, None, list(unet.trainable_params()))(
        *(ms.Tensor(array) for array in sample.values())
    )
    step = 1e-4
    slope = (
        expected_loss(sample, prediction_type, 0.5 + step) - expected_loss(sample, prediction_type, 0.5 - step)
    ) / (2 * step)
    assert float(gradient[0].asnumpy()) == pytest.approx(slope, rel=1e-4)


def loss_and_gradient(sample, weights=None, prediction_type="epsilon"):
    unet = Scaled()
    inputs = [ms.Tensor(array) for array in sample.values()]
    if weights is not None:
        inputs.append(ms.Tensor(weights))
    loss = DiffusionLoss(unet, NoiseSchedule(), prediction_type)
    value, (gradient,) = ms.value_and_grad(loss, None, list(unet.trainable_params()))(*inputs)
    return value.asnumpy(), gradient.asnumpy()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_weights_are_factors_of_the_squared_errors_and_their_mean_is_not_divided_out(sample, prediction_type):
    weights = np.random.default_rng(1).random((3, 1, 5, 6), dtype=np.float32)
    value, _ = loss_and_gradient(sample, weights, prediction_type)
    assert value.dtype == np.float32 and value.shape == ()
    assert float(value) == pytest.approx(expected_loss(sample, prediction_type, weights=weights), rel=1e-5)


def test_a_weight_of_a_row_is_a_factor_of_the_mean_of_its_sample(sample):
    factors = np.array([1.0, 0.25, 0.0], np.float32)
    weights = np.ones((3, 1, 5, 6), np.float32) * factors.reshape(-1, 1, 1, 1)
    value, _ = loss_and_gradient(sample, weights)
    rows = [expected_loss({name: array[i : i + 1] for name, array in sample.items()}, "epsilon") for i in range(3)]
    assert float(value) == pytest.approx(np.mean(factors * rows), rel=1e-5)


def test_weights_of_one_give_the_loss_and_the_gradient_of_no_weights_bit_for_bit(sample):
    expected = loss_and_gradient(sample)
    assert loss_and_gradient(sample, np.ones((3, 1, 5, 6), np.float32)) == expected


def test_weights_of_zero_give_no_gradient(sample):
    assert loss_and_gradient(sample, np.zeros((3, 1, 5, 6), np.float32)) == (0.0, 0.0)


def test_the_networks_parameter_names_stay_as_they_are():
    unet = Scaled()
    DiffusionLoss(unet, NoiseSchedule(), "epsilon")
    assert [parameter.name for parameter in unet.get_parameters()] == ["weight"]


def test_another_prediction_type_is_refused():
    with pytest.raises(ValueError, match="velocity"):
        DiffusionLoss(Scaled(), NoiseSchedule(), "velocity")
