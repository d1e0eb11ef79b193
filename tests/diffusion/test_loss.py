"""The loss compares with the noise or with the velocity, in graph mode."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from ldm.diffusion.loss import DiffusionLoss
from ldm.diffusion.schedule import NoiseSchedule
from ldm.settings.loss import LossSettings


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


def loss_and_gradient(sample, weights=None, prediction_type="epsilon", settings=None):
    unet = Scaled()
    inputs = [ms.Tensor(array) for array in sample.values()]
    if weights is not None:
        inputs.append(ms.Tensor(weights))
    schedule = NoiseSchedule(zero_terminal_snr=settings is not None and settings.zero_terminal_snr)
    loss = DiffusionLoss(unet, schedule, prediction_type, settings)
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


def numpy_loss(sample, prediction_type, settings, weight=0.5, weights=1.0):
    """The loss of sd-scripts in float64, in its order."""
    is_velocity, huber_c = prediction_type == "v_prediction", settings.huber_c
    timesteps = sample["timesteps"]
    abar = NoiseSchedule(zero_terminal_snr=settings.zero_terminal_snr).alphas_cumprod[timesteps]
    snr = abar / (1 - abar)
    alpha, sigma = np.sqrt(abar).reshape(-1, 1, 1, 1), np.sqrt(1 - abar).reshape(-1, 1, 1, 1)
    latents = sample["latents"].astype(np.float64)
    noise, input_noise = sample["noise"].astype(np.float64)[:, :4], sample["noise"].astype(np.float64)[:, -4:]
    offset = (timesteps / 1000 + sample["text_embeddings"][:, 0, 0]).reshape(-1, 1, 1, 1)
    d = weight * (alpha * latents + sigma * input_noise) + offset
    d = d - (alpha * noise - sigma * latents if is_velocity else noise)
    if settings.huber_schedule == "snr":
        with np.errstate(divide="ignore"):
            c = (1 - huber_c) / (1 + 1 / np.sqrt(snr)) ** 2 + huber_c
    elif settings.huber_schedule == "exponential":
        c = np.exp(np.log(huber_c) * timesteps / 1000) * settings.huber_scale
    else:
        c = np.full(len(timesteps), huber_c * settings.huber_scale)
    c = c.reshape(-1, 1, 1, 1)
    errors = {
        "l2": d**2, "l1": np.abs(d), "huber": 2 * c * (np.sqrt(d**2 + c**2) - c),
        "smooth_l1": 2 * (np.sqrt(d**2 + c**2) - c),
    }[settings.loss_type]  # fmt: skip
    rows, s = (errors * weights).mean((1, 2, 3)), np.minimum(snr, 1000.0)
    if settings.min_snr_gamma:
        rows = rows * np.minimum(snr, settings.min_snr_gamma) / (snr + 1 if is_velocity else snr)
    if settings.scale_v_pred_loss_like_noise_pred:
        rows = rows * s / (s + 1)
    if settings.v_pred_like_loss:
        rows = rows + rows / (s / (s + 1)) * settings.v_pred_like_loss
    if settings.debiased_estimation_loss:
        rows = rows / (s + 1) if is_velocity else rows / np.sqrt(s)
    return rows.mean()


LOSSES = [
    ("epsilon", {}),
    ("epsilon", dict(loss_type="l1")),
    ("epsilon", dict(loss_type="huber")),
    ("v_prediction", dict(loss_type="huber", huber_schedule="exponential", huber_scale=0.5)),
    ("epsilon", dict(loss_type="smooth_l1")),
    ("v_prediction", dict(loss_type="smooth_l1", huber_schedule="constant", huber_c=0.3)),
    ("epsilon", dict(min_snr_gamma=5.0)),
    ("v_prediction", dict(min_snr_gamma=5.0)),
    ("epsilon", dict(debiased_estimation_loss=True)),
    ("v_prediction", dict(debiased_estimation_loss=True)),
    ("v_prediction", dict(scale_v_pred_loss_like_noise_pred=True)),
    ("epsilon", dict(v_pred_like_loss=0.5)),
    ("epsilon", dict(loss_type="huber", min_snr_gamma=1.0, v_pred_like_loss=0.5, debiased_estimation_loss=True)),
    (
        "v_prediction",
        dict(loss_type="smooth_l1", min_snr_gamma=1.0, scale_v_pred_loss_like_noise_pred=True, zero_terminal_snr=True),
    ),
]


@pytest.mark.parametrize(("prediction_type", "given"), LOSSES)
def test_each_setting_gives_the_loss_of_its_formula_and_its_gradient(sample, prediction_type, given):
    """With weights too, which come before the factors of a time step."""
    settings = LossSettings(**given)
    for weights in (None, np.random.default_rng(1).random((3, 1, 5, 6), dtype=np.float32)):
        arguments = sample, prediction_type, settings
        factor = 1.0 if weights is None else weights
        value, gradient = loss_and_gradient(sample, weights, prediction_type, settings)
        assert float(value) == pytest.approx(numpy_loss(*arguments, weights=factor), rel=1e-5)
        step = 1e-6
        ends = [numpy_loss(*arguments, weight=0.5 + change, weights=factor) for change in (step, -step)]
        assert float(gradient) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-4)


@pytest.mark.parametrize("loss_type", ["huber", "smooth_l1"])
def test_huber_keeps_its_digits_for_small_errors(sample, loss_type):
    """sqrt(d^2 + c^2) - c is 0 in float32 for d below c / 3,000."""
    small = {**sample, "noise": 1e-4 * sample["noise"], "latents": 1e-4 * sample["latents"]}
    small["text_embeddings"] = np.broadcast_to(-small["timesteps"].reshape(3, 1, 1) / 1000, (3, 7, 2)).astype(
        np.float32
    )
    settings = LossSettings(loss_type=loss_type, huber_c=1.0)
    value, _ = loss_and_gradient(small, settings=settings)
    assert float(value) == pytest.approx(numpy_loss(small, "epsilon", settings), rel=1e-3)


def test_an_error_of_zero_has_no_gradient(sample):
    nothing = {name: np.zeros_like(array) for name, array in sample.items()}
    for loss_type in ("l1", "huber", "smooth_l1"):
        assert loss_and_gradient(nothing, settings=LossSettings(loss_type=loss_type)) == (0.0, 0.0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_input_can_have_other_noise_than_the_target(sample, prediction_type):
    further = 0.1 * np.random.default_rng(2).standard_normal(sample["noise"].shape).astype(np.float32)
    both = {**sample, "noise": np.concatenate([sample["noise"], sample["noise"] + further], axis=1)}
    value, _ = loss_and_gradient(both, prediction_type=prediction_type)
    assert float(value) == pytest.approx(numpy_loss(both, prediction_type, LossSettings()), rel=1e-5)
    assert value != loss_and_gradient(sample, prediction_type=prediction_type)[0]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_settings_that_are_off_change_no_bit(sample, prediction_type):
    expected = loss_and_gradient(sample, prediction_type=prediction_type)
    off = LossSettings(min_snr_gamma=0.0, v_pred_like_loss=0.0, huber_schedule="constant", noise_offset=0.1)
    assert loss_and_gradient(sample, prediction_type=prediction_type, settings=off) == expected


def test_the_networks_parameter_names_stay_as_they_are():
    unet = Scaled()
    DiffusionLoss(unet, NoiseSchedule(), "epsilon")
    assert [parameter.name for parameter in unet.get_parameters()] == ["weight"]


def test_another_prediction_type_is_refused():
    with pytest.raises(ValueError, match="velocity"):
        DiffusionLoss(Scaled(), NoiseSchedule(), "velocity")
