"""Gradient checkpointing: the same training with another order of computation, in graph mode."""

from __future__ import annotations

import numpy as np
import pytest
from mindspore import Tensor, nn

from ldm.diffusion.loss import DiffusionLoss
from ldm.diffusion.schedule import NoiseSchedule
from ldm.lora.dropout import dropout_key
from ldm.lora.inject import inject_lora
from ldm.lora.spec import LoRASpec
from ldm.models.stable_diffusion import build_model
from ldm.runtime.device import setup_runtime
from ldm.settings.loss import LossSettings
from ldm.settings.model import load_model_config
from ldm.training.checkpointing import CheckpointedGradients
from ldm.training.step import TrainStep
from ldm.training.step_graphs import LossFromTokens
from tests.training.micro import MICRO, prepare
from tests.training.toy import scalars

pytestmark = pytest.mark.processes

ROWS, SIZE = 2, 8


@pytest.fixture
def two_levels(tmp_path):
    """The micro model with a second level and SD1.x's projections, so that its UNet has all kinds of blocks."""
    text = MICRO.read_text(encoding="utf-8")
    for old, new in (("channel_mult: [1]", "channel_mult: [1, 2]"), ("in_transformer: true", "in_transformer: false")):
        assert text.count(old) == 1
        text = text.replace(old, new)
    path = tmp_path / "two_levels.yaml"
    path.write_text(text, encoding="utf-8")
    return load_model_config(path)


def batch(seed: int, *, tokens: bool, masked: bool) -> tuple[Tensor, ...]:
    rng = np.random.default_rng(seed)
    latents, noise = rng.standard_normal((2, ROWS, 4, SIZE, SIZE)).astype(np.float32)
    if tokens:
        text = rng.integers(0, 49408, (ROWS, 77)).astype(np.int32)
    else:
        text = rng.standard_normal((ROWS, 77, 32)).astype(np.float32)
    arrays = [latents, noise, np.array([20, 700], np.int32), text]
    if masked:
        arrays.append(rng.random((ROWS, 1, SIZE, SIZE)).astype(np.float32))
    return tuple(map(Tensor, arrays))


def trained(config, checkpointing, *, spec=None, steps, masked=False, loss=None, **options):
    """Train the whole UNet or a LoRA for some steps. Returns their results and the state of TrainStep."""
    setup_runtime("CPU")
    np.random.seed(5)
    model = build_model(config)
    unet = model.model.diffusion_model
    if spec is None:
        parameters = list(unet.get_parameters())
    else:
        inject_lora(model, spec)
        parameters = list(model.trainable_params())
    for i, parameter in enumerate(parameters):  # `up` of a LoRA is 0 at the start, and so would be gradients of `down`
        noise = np.random.default_rng(i).standard_normal(parameter.shape).astype(np.float32)
        parameter.set_data(Tensor(parameter.asnumpy() + 0.05 * noise))
    cell: nn.Cell = DiffusionLoss(unet, NoiseSchedule.from_config(config), config.prediction_type, loss)
    tokens = spec is not None and spec.text_encoder
    if tokens:
        cell = LossFromTokens(cell, model.cond_stage_model)
    step = TrainStep(
        cell, parameters, clip=True, dropout_key=dropout_key(model), gradient_checkpointing=checkpointing, **options
    )
    micro, results = options.get("micro_batches", 1), []
    for t in range(1, steps + 1):
        seeds = [10 * t + i for i in range(micro)]
        batches = [batch(seed, tokens=tokens, masked=masked) for seed in seeds]
        keys = [np.array([seed, t], np.int32) for seed in seeds]
        results.append(step(batches, scalars(t, 1e-3, micro=micro), keys).read())
    return results, step.state()


def test_a_lora_of_the_unet_trains_bit_for_bit_as_without(two_levels):
    options = dict(
        spec=LoRASpec(rank=2, targets=("all",)), steps=2, micro_batches=2, masked=True, use_ema=True,
        loss=LossSettings(loss_type="huber"),
    )  # fmt: skip
    (plain, expected), (checkpointed, state) = (trained(two_levels, on, **options) for on in (False, True))
    assert checkpointed == plain
    assert list(state) == list(expected)
    for name, array in state.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    moments = [name for name in expected if name.startswith("m.")]
    assert all(np.abs(expected[name]).max() > 0 for name in moments)  # every layer has a gradient


# The gradients that come from all blocks, those of the time and text embeddings, are added up in another order.
@pytest.mark.parametrize(
    "spec",
    [None, LoRASpec(rank=2, text_encoder=True, dropout=0.3)],
    ids=["the whole UNet", "LoRA of UNet and text encoder, with dropout"],
)
def test_other_gradients_are_the_same_up_to_rounding(spec):
    config = load_model_config(MICRO)
    (plain, expected), (checkpointed, state) = (trained(config, on, spec=spec, steps=1) for on in (False, True))
    assert checkpointed[0].loss == plain[0].loss
    assert checkpointed[0].gradient_norm == pytest.approx(plain[0].gradient_norm, rel=1e-6)
    moments = [name for name in expected if name.startswith("m.")]  # a tenth of the gradients, after one step
    assert list(state) == list(expected) and len(moments) > 20
    for name in moments:
        largest = np.abs(expected[name]).max()
        assert largest > 0, name
        np.testing.assert_allclose(state[name], expected[name], rtol=0, atol=1e-5 * largest, err_msg=name)


def test_a_parameter_that_is_in_neither_network_is_refused():
    model = build_model(load_model_config(MICRO))
    unet, schedule = model.model.diffusion_model, NoiseSchedule.from_config(model.config)
    parameters = [*unet.get_parameters(), *model.cond_stage_model.get_parameters()]
    with pytest.raises(ValueError, match="trained parameters are in the networks of the loss"):
        CheckpointedGradients(DiffusionLoss(unet, schedule, "epsilon"), None, parameters)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_setting_decides(settings, empty_run, checkpointing):
    run = prepare(settings(empty_run, use_lora=True, max_steps=2, gradient_checkpointing=checkpointing))
    assert isinstance(run.step.whole.gradients.value_and_grad, CheckpointedGradients) is checkpointing
