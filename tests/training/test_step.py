"""The training step, on a loss small enough to check by hand; in graph mode."""

from __future__ import annotations

from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops

from ldm.runtime.device import setup_runtime
from ldm.training.optimizers import AdamW, averages
from ldm.training.step import TrainStep
from ldm.training.step_graphs import LossFromTokens
from ldm.training.step_operators import UnstackOnAscend
from tests.training.toy import Linear, Product, batch, numbers, scalars

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "adamw.npz"


@pytest.fixture(autouse=True)
def set_up(graph_mode):
    setup_runtime("CPU")


def toy_step(dtype=ms.float32, **options):
    loss = Linear(dtype=dtype)
    return loss, TrainStep(loss, [loss.w], **options)


LARGE = {"all in one array": 10**6, "arrays of 20 elements by themselves": 20, "each by itself": 1}


@pytest.mark.parametrize("large", LARGE.values(), ids=LARGE)
def test_adamw_equals_torch(large):
    golden = np.load(GOLDEN, allow_pickle=False)
    count = len([name for name in golden.files if name.startswith("start")])
    loss = Product([golden[f"start{i}"] for i in range(count)])
    step = TrainStep(loss, list(loss.parameters), optimizer=AdamW(betas=(0.9, 0.98)), large=large)
    empty = Tensor(np.zeros(1, np.float32))
    for t, rate in enumerate(golden["rates"]):
        packed = np.concatenate([golden[f"gradients{i}"][t].ravel() for i in range(count)])
        step([(Tensor(packed), empty, empty, empty)], scalars(t + 1, float(rate), decay=0.01, betas=(0.9, 0.98)))
        for i, parameter in enumerate(loss.parameters):
            np.testing.assert_allclose(parameter.asnumpy(), golden[f"after{t}_{i}"], rtol=1e-6, atol=1e-6)


def many_arrays(large, micro_batches=1):
    """A step over 70 arrays, which is more than the flat array is split into at once."""
    shapes = [(2, 1 + i % 5) if i % 3 else (1 + i % 7,) for i in range(70)]
    rng = np.random.default_rng(0)
    loss = Product([rng.standard_normal(shape).astype(np.float32) for shape in shapes])
    step = TrainStep(
        loss, list(loss.parameters), use_ema=True, clip=True, skip_overflow=True, micro_batches=micro_batches,
        large=large,
    )  # fmt: skip
    return loss, step


def gradients_of(loss, seed):
    size = sum(p.size for p in loss.parameters)
    packed = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    return (Tensor(packed), *[Tensor(np.zeros(1, np.float32))] * 3)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_how_arrays_are_grouped_changes_no_value(micro_batches):
    results = []
    for large in (10**6, 8):
        loss, step = many_arrays(large, micro_batches)
        for t in (1, 2):
            batches = [gradients_of(loss, seed=2 * t + i) for i in range(micro_batches)]
            result = step(batches, scalars(t, micro=micro_batches, norm=1e9)).read()
        results.append((result, step.state()))
        # The networks read what the optimizer wrote
        for parameter in loss.parameters:
            np.testing.assert_array_equal(parameter.asnumpy(), step.state()[f"p.{parameter.name}"])
    names = [f"{group}.p{i}" for group in ("p", "m", "v", "ema") for i in range(70)]
    for result, state in results:
        assert list(state) == names
        assert result.gradient_norm == pytest.approx(results[0][0].gradient_norm, rel=1e-6)
        for name, array in state.items():
            np.testing.assert_array_equal(array, results[0][1][name], err_msg=name)


def test_a_state_continues_bit_for_bit_with_other_groups():
    loss, step = many_arrays(10**6)
    step([gradients_of(loss, seed=1)], scalars(1))
    half = step.state()
    step([gradients_of(loss, seed=2)], scalars(2))
    for large in (10**6, 8):
        loss, other = many_arrays(large)
        other.load_state(half)
        for parameter in loss.parameters:
            np.testing.assert_array_equal(parameter.asnumpy(), half[f"p.{parameter.name}"])
        other([gradients_of(loss, seed=2)], scalars(2))
        for name, array in step.state().items():
            np.testing.assert_array_equal(other.state()[name], array, err_msg=name)


def test_an_overflow_of_one_array_leaves_all_as_they_are():
    loss, step = many_arrays(8)
    step([gradients_of(loss, seed=1)], scalars(1))
    before = step.state()
    spoilt = gradients_of(loss, seed=2)[0].asnumpy()
    for value in (np.inf, np.nan):
        spoilt[3] = value
        assert not step([(Tensor(spoilt), *gradients_of(loss, seed=2)[1:])], scalars(2)).read().finite
        for name, array in step.state().items():
            np.testing.assert_array_equal(array, before[name], err_msg=name)


def test_the_norm_of_many_elements_is_accurate():
    """MindSpore's L2Loss adds the squares up one after the other: 4e-4 off for 10^6 elements."""
    gradient = np.random.default_rng(0).standard_normal(10**6).astype(np.float32)
    loss = Product([np.zeros(10**6 - 8, np.float32), np.zeros(8, np.float32)])
    empty = Tensor(np.zeros(1, np.float32))
    step = TrainStep(loss, list(loss.parameters), large=10**7)
    result = step([(Tensor(gradient), empty, empty, empty)], scalars()).read()
    assert result.gradient_norm == pytest.approx(np.linalg.norm(gradient.astype(np.float64)), rel=1e-6)


def test_loss_and_norm_equal_those_by_hand_and_other_parameters_stay():
    loss, step = toy_step()
    latents, noise = numbers()
    expected_loss, gradient = loss.by_hand(latents, noise)
    before = loss.b.asnumpy().copy()
    old = loss.w.asnumpy().copy()
    result = step([batch(latents, noise)], scalars()).read()
    assert result.loss == pytest.approx(expected_loss, rel=1e-5)
    assert result.gradient_norm == pytest.approx(np.linalg.norm(gradient), rel=1e-5)
    assert result.finite
    # AdamW's first update is the rate times the sign of the gradient
    np.testing.assert_allclose(loss.w.asnumpy(), old - 0.1 * np.sign(gradient), atol=1e-5)
    np.testing.assert_array_equal(loss.b.asnumpy(), before)
    assert sorted(step.state()) == ["m.w", "p.w", "v.w"]


def test_clipping_scales_the_gradients_down_to_the_norm():
    loss, step = toy_step(clip=True)
    latents, noise = numbers()
    _, gradient = loss.by_hand(latents, noise)
    norm = np.linalg.norm(gradient)
    result = step([batch(latents, noise)], scalars(norm=norm / 4)).read()
    assert result.gradient_norm == pytest.approx(norm, rel=1e-5)
    # m after the first update is (1 - beta1) times the gradient that AdamW was given
    np.testing.assert_allclose(step.state()["m.w"], 0.1 * gradient / 4, rtol=1e-4)

    _, step = toy_step(clip=True)
    step([batch(latents, noise)], scalars(norm=norm * 4))
    np.testing.assert_allclose(step.state()["m.w"], 0.1 * gradient, rtol=1e-4)


def test_two_micro_batches_equal_one_step_of_twice_the_batch():
    latents, noise = numbers(rows=8)
    states = []
    for parts in (1, 2):
        _, step = toy_step(micro_batches=parts, use_ema=True, clip=True)
        for t in (1, 2, 3):
            batches = [batch(*half) for half in zip(np.split(latents, parts), np.split(noise, parts))]
            result = step(batches, scalars(t, micro=parts)).read()
        states.append((step.state(), result))
    assert states[1][1].loss == pytest.approx(states[0][1].loss, rel=1e-5)
    assert states[1][1].gradient_norm == pytest.approx(states[0][1].gradient_norm, rel=1e-4)
    for name, array in states[0][0].items():
        np.testing.assert_allclose(states[1][0][name], array, rtol=1e-4, atol=1e-6, err_msg=name)


def test_the_loss_scale_cancels_out():
    latents, noise = numbers()
    results = []
    for scale in (1.0, 1024.0):
        _, step = toy_step(skip_overflow=scale != 1)
        results.append((step([batch(latents, noise)], scalars(scale=scale)).read(), step.state()["m.w"]))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    np.testing.assert_allclose(results[1][1], results[0][1], rtol=1e-5)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_step_that_overflows_changes_nothing_and_the_next_one_does(micro_batches):
    loss, step = toy_step(use_ema=True, skip_overflow=True, micro_batches=micro_batches)
    latents, noise = numbers()
    spoilt = latents.copy()
    spoilt[0, 0] = np.inf
    before = step.state()
    result = step([batch(spoilt, noise)] + [batch(latents, noise)] * (micro_batches - 1), scalars(scale=8.0)).read()
    assert not result.finite
    for name, array in step.state().items():
        np.testing.assert_array_equal(array, before[name], err_msg=name)
    result = step([batch(latents, noise)] * micro_batches, scalars(scale=8.0, micro=micro_batches)).read()
    assert result.finite
    assert not np.array_equal(step.state()["p.w"], before["p.w"])


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_step_launched_before_the_last_result_is_read_has_the_scalars_of_its_outcome(micro_batches):
    good, spoilt = [batch(*numbers())] * micro_batches, [batch(*numbers())] * micro_batches
    spoilt[-1] = batch(np.full((4, 3), np.inf, np.float32), numbers()[1])
    options = dict(use_ema=True, skip_overflow=True, micro_batches=micro_batches)
    (_, known), (_, late) = toy_step(**options), toy_step(**options)
    expected, results, t, finite = [], [], 1, True
    for i, batches in enumerate([good, spoilt, spoilt, good, good]):
        rows = {
            outcome: scalars(
                t + outcome,
                scale=64.0 if outcome else 8.0,
                micro=micro_batches,
                decay=0.1 * i,
                ema_rate=0.25 + 0.5 * outcome,
            )
            for outcome in (True, False)
        }
        expected.append(known(batches, rows[finite]).read())
        results.append(late(batches, rows[True], after_overflow=rows[False]))
        finite = expected[-1].finite
        t += finite
    assert [result.finite for result in expected] == [True, False, False, True, True]
    np.testing.assert_array_equal([result.read() for result in results], expected)
    for name, array in known.state().items():
        np.testing.assert_array_equal(late.state()[name], array, err_msg=name)


def test_fp16_overflows_at_a_large_loss_scale_and_not_at_a_small_one():
    latents, noise = numbers()
    for scale, finite in ((2.0**24, False), (2.0**4, True)):
        loss, step = toy_step(dtype=ms.float16, skip_overflow=True)
        assert step([batch(latents, noise)], scalars(scale=scale)).read().finite == finite
        assert loss.w.dtype == ms.float32


def test_without_skipping_an_overflow_reaches_the_weights():
    loss, step = toy_step(skip_overflow=False)
    latents, noise = numbers()
    latents[0, 0] = np.inf
    assert not step([batch(latents, noise)], scalars(scale=8.0)).read().finite
    assert not np.isfinite(step.state()["p.w"]).all()


class DeviceFlags:
    """Stands for the flags of a device that saturates, and for the operators that read and clear them.

    There is no saturation on the CPU: clearing the flags sets them to `in_step`, what the step would leave in them.
    """

    def __init__(self):
        self.flags, self.in_step = (
            Parameter(Tensor(np.zeros(8, np.int32)), name=name, requires_grad=False)
            for name in ("device_flags", "in_step")
        )

    def set(self, before, in_step):
        for parameter, flag in ((self.flags, before), (self.in_step, in_step)):
            parameter.set_data(Tensor(np.array([0, flag, 0, 0, 0, 0, 0, 0], np.int32)))


class ReadFlags(nn.Cell):
    def __init__(self, device):
        super().__init__(auto_prefix=False)
        self.flags = device.flags

    def construct(self, x):
        return self.flags + x


class ClearFlags(nn.Cell):
    def __init__(self, device):
        super().__init__(auto_prefix=False)
        self.flags, self.in_step = device.flags, device.in_step

    def construct(self, x):
        return ops.assign(self.flags, self.in_step + x)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_step_in_which_a_number_saturated_changes_nothing(micro_batches, monkeypatch):
    """The operators exist on Ascend only. What the step does with the flags is the same everywhere.

    Flags that something before the step has set are cleared first.
    """
    device = DeviceFlags()
    monkeypatch.setattr("ldm.training.step_operators.NPUGetFloatStatusV2", lambda: ReadFlags(device))
    monkeypatch.setattr("ldm.training.step_operators.NPUClearFloatStatusV2", lambda: ClearFlags(device))
    _, step = toy_step(skip_overflow=True, saturates=True, micro_batches=micro_batches)
    pair, before = batch(*numbers()), step.state()
    for flags_before, in_step, finite in ((0, 3, False), (3, 0, True)):
        device.set(flags_before, in_step)
        assert step([pair] * micro_batches, scalars(micro=micro_batches)).read().finite == finite
        assert np.array_equal(step.state()["p.w"], before["p.w"]) == (not finite)


@pytest.mark.parametrize("shape", [(7,), (2, 7)], ids=str)
def test_ascends_rows_of_a_tensor(shape):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    rows = UnstackOnAscend()(Tensor(x))
    assert len(rows) == len(x) and rows[0].shape == shape[1:]
    for row, expected in zip(rows, x):
        np.testing.assert_array_equal(row.asnumpy(), expected)


def test_the_moving_average_follows():
    loss, step = toy_step(use_ema=True)
    average = loss.w.asnumpy().copy()
    for t in (1, 2):
        step([batch(*numbers())], scalars(t, ema_rate=0.25))
        average += 0.25 * (loss.w.asnumpy() - average)
    np.testing.assert_allclose(averages(step.state())["w"], average, rtol=1e-5)
    np.testing.assert_allclose(step.state()["ema.w"], average, rtol=1e-5)


def test_without_an_average_the_parameters_are_returned_for_it():
    loss = Linear()
    np.testing.assert_array_equal(averages(TrainStep(loss, [loss.w]).state())["w"], loss.w.asnumpy())


def test_a_loaded_state_continues_bit_for_bit():
    data = [numbers(seed=seed) for seed in range(4)]
    loss, step = toy_step(use_ema=True)
    for t, pair in enumerate(data, 1):
        step([batch(*pair)], scalars(t))
        if t == 2:
            half = step.state()
    _, other = toy_step(use_ema=True)
    other.load_state(half)
    for t, pair in enumerate(data[2:], 3):
        other([batch(*pair)], scalars(t))
    for name, array in step.state().items():
        np.testing.assert_array_equal(other.state()[name], array, err_msg=name)


def test_a_state_of_another_run_is_refused():
    loss, step = toy_step()
    state = step.state()
    with pytest.raises(ValueError, match="m.w"):
        step.load_state({**state, "m.w": np.zeros((2, 2), np.float32)})
    with pytest.raises(ValueError, match="ema.w"):
        step.load_state({**state, "ema.w": state["p.w"]})


def test_pynative_mode_computes_the_same():
    states = []
    for mode in (0, 1):
        setup_runtime("CPU", mode=mode)
        _, step = toy_step(use_ema=True, clip=True, skip_overflow=True, micro_batches=2)
        for t in (1, 2):
            step([batch(*numbers())] * 2, scalars(t, micro=2))
        states.append(step.state())
    for name, array in states[0].items():
        np.testing.assert_allclose(states[1][name], array, rtol=1e-5, atol=1e-7, err_msg=name)


def test_half_precision_parameters_are_refused():
    half = Parameter(Tensor(np.zeros(3, np.float16)), name="w")
    with pytest.raises(ValueError, match="must be fp32"):
        TrainStep(Linear(), [half])
    with pytest.raises(ValueError, match="nothing to train"):
        TrainStep(Linear(), [])


def test_the_text_encoder_can_be_part_of_the_loss():
    class Encoder(nn.Cell):
        def __init__(self):
            super().__init__()
            self.scale = Parameter(Tensor(np.ones(3, np.float32)), name="scale")

        def construct(self, tokens):
            return tokens.astype(ms.float32) * ops.broadcast_to(self.scale, tokens.shape)

    class Loss(nn.Cell):
        def __init__(self):
            super().__init__()
            self.mean = ops.ReduceMean()

        def construct(self, latents, noise, timesteps, context):
            return self.mean((latents - context) * (latents - context))

    encoder = Encoder()
    step = TrainStep(LossFromTokens(Loss(), encoder), [encoder.scale])
    latents, tokens = np.zeros((4, 3), np.float32), np.arange(12, dtype=np.int32).reshape(4, 3)
    empty = Tensor(np.zeros(1, np.float32))
    result = step([(Tensor(latents), empty, empty, Tensor(tokens))], scalars()).read()
    assert result.loss == pytest.approx(np.mean(np.square(tokens)), rel=1e-5)
    np.testing.assert_allclose(encoder.scale.asnumpy(), 0.9, atol=1e-5)
