"""The arrays that the optimizer works on: what is in which, and fp16 copies that train as fp32 parameters do."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops

from ldm.lora.inject import factors_cast_to, lora_cells
from ldm.lora.layers import HardLoRAConv2d, LoRAConv2d, LoRALinear
from ldm.models.layers import Conv2d, Linear, set_compute_dtype
from ldm.runtime.device import setup_runtime
from ldm.training.optimizer_arrays import CopyIntoParameters, OptimizerArrays
from ldm.training.step import TrainStep
from tests.training.toy import scalars

SHAPES = ((2, 3), (2, 4), (3,), (3, 4))  # 6, 8, 3 and 12 elements
IN_FP16 = {"conv.lora_down", "conv.lora_up", "linear.lora_down", "linear.lora_up", "scaled.lora_down", "wide.lora_up"}


@pytest.fixture(autouse=True)
def set_up(graph_mode):
    setup_runtime("CPU")


class Net(nn.Cell):
    """A loss with every kind of LoRA layer, in fp16."""

    def __init__(self):
        super().__init__()
        np.random.seed(0)
        rng = np.random.default_rng(0)

        def lora(cell_type, base, name, *shape, **options):
            cell = cell_type(base, rng.standard_normal((2, *shape)) / 4, name, 2.0, **options)
            cell.lora_up.weight.set_data(Tensor(rng.standard_normal(cell.lora_up.weight.shape).astype(np.float32) / 4))
            return cell

        self.conv = lora(LoRAConv2d, Conv2d(4, 4, 3, padding=1), "conv", 4, 3, 3)
        self.hard = lora(HardLoRAConv2d, Conv2d(4, 4, 1), "hard", 4)
        self.wide = lora(LoRALinear, Linear(64, 8), "wide", 64)  # whose factor down is large
        self.linear = lora(LoRALinear, Linear(8, 8), "linear", 8)
        self.scaled = lora(LoRALinear, Linear(8, 8), "scaled", 8, trainable_scale=True)
        self.in_fp32 = lora(LoRALinear, Linear(8, 8), "in_fp32", 8, fp16=False)
        set_compute_dtype(self, ms.float16)
        self.mean = ops.ReduceMean()

    def construct(self, latents, noise, timesteps, text_embeddings):
        h = self.hard(self.conv(latents)).reshape(latents.shape[0], 64)
        h = self.in_fp32(self.scaled(self.linear(self.wide(h))))
        difference = h.astype(ms.float32) - noise
        return self.mean(difference * difference)


def make_step(copies, **options):
    loss = Net()
    in_fp16 = factors_cast_to(loss, ms.float16)
    names = {parameter.name for parameter in in_fp16}
    parameters = [p for cell in lora_cells(loss).values() for p in cell.lora_parameters()]
    # The copies come first in the flat array, and the norm's last bits depend on the order.
    parameters.sort(key=lambda parameter: parameter.name not in names)
    step = TrainStep(
        loss, parameters, clip=True, use_ema=True, skip_overflow=True, large=100,
        read_in_fp16=in_fp16 if copies else (), **options,
    )  # fmt: skip
    return step


def make_batch(seed, spoilt=False):
    rng = np.random.default_rng(seed)
    latents, noise = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, 4, 4, 4), (3, 8)))
    latents *= 1e6 if spoilt else 1.0  # fp16 ends at 65504
    return Tensor(latents), Tensor(noise), Tensor(np.zeros(3, np.int32)), Tensor(np.zeros(1, np.float32))


def assert_equal(step, other):
    state, other_state = step.state(), other.state()
    assert list(state) == list(other_state)
    for name, array in state.items():
        assert array.dtype == other_state[name].dtype == np.float32
        np.testing.assert_array_equal(array, other_state[name], err_msg=name)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_copies_train_the_same_bit_for_bit(micro_batches):
    """With clipping, moving average and an overflow at the third step, from which another step continues."""
    plain, step = make_step(False, micro_batches=micro_batches), make_step(True, micro_batches=micro_batches)
    assert {p.name.removesuffix(".weight") for p in step.parameters if p.dtype == ms.float16} == IN_FP16
    for t in range(1, 6):
        if t == 4 and micro_batches == 1:
            step = make_step(True)
            step.load_state(plain.state())
        batches = [make_batch(10 * t + i, spoilt=t == 3) for i in range(micro_batches)]
        numbers = scalars(t, lr=0.01, scale=64.0, micro=micro_batches, norm=0.1, decay=0.01)
        results = [form(batches, numbers).read() for form in (plain, step)]
        assert results[0] == results[1] or t == 3  # a loss that is not a number is not equal to itself
        assert results[0].finite == results[1].finite == (t != 3)
        assert t == 3 or results[1].gradient_norm > 0.1  # so that it is clipped
        assert_equal(step, plain)
        state = step.state()
        for parameter in step.parameters:
            array = state[f"p.{parameter.name}"]
            np.testing.assert_array_equal(parameter.asnumpy(), array.astype(parameter.asnumpy().dtype))
    assert any((state[f"p.{name}.weight"] != state[f"p.{name}.weight"].astype(np.float16)).any() for name in IN_FP16)


@pytest.fixture
def parameters():
    rng = np.random.default_rng(0)
    return [
        Parameter(Tensor(rng.standard_normal(shape).astype(np.float32)), name=f"p{i}") for i, shape in enumerate(SHAPES)
    ]


def test_small_parameters_are_in_one_flat_array_and_large_ones_by_themselves(parameters):
    arrays = OptimizerArrays(parameters, large=8)
    assert arrays.small == (parameters[0], parameters[2]) and arrays.large == (parameters[1], parameters[3])
    assert arrays.parameters == arrays.small + arrays.large
    assert arrays.arrays == (arrays.flat, parameters[1], parameters[3])
    expected = np.concatenate([parameters[i].asnumpy().ravel() for i in (0, 2)])
    np.testing.assert_array_equal(arrays.flat.asnumpy(), expected)


@pytest.mark.parametrize("large", [1, 4], ids=["none is small", "one is small"])
def test_without_two_small_parameters_there_is_no_flat_array(parameters, large):
    """The copy of a single one would save no kernel."""
    arrays = OptimizerArrays(parameters, large)
    assert arrays.flat is None and arrays.arrays == arrays.parameters == tuple(parameters)


def test_values_are_split_by_name_and_joined_again(parameters):
    arrays = OptimizerArrays(parameters, large=8)
    values = [np.full(9, 0.5, np.float32), np.full((2, 4), 2.0, np.float32), np.full((3, 4), 3.0, np.float32)]
    values[0][:] = range(9)
    split = arrays.split(values)
    assert {name: value.shape for name, value in split.items()} == {f"p{i}": shape for i, shape in enumerate(SHAPES)}
    np.testing.assert_array_equal(split["p0"].ravel(), range(6))
    np.testing.assert_array_equal(split["p2"], [6, 7, 8])
    joined = arrays.join({name: value.astype(np.float64) for name, value in split.items()})
    for array, value in zip(joined, values):
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, value)


def test_what_is_split_does_not_change_with_the_arrays(parameters):
    """`asnumpy` may give the memory that the next step writes into."""
    arrays = OptimizerArrays(parameters, large=8)
    values = [np.ones(9, np.float32), np.ones((2, 4), np.float32), np.ones((3, 4), np.float32)]
    split = arrays.split(values)
    for value in values:
        value[:] = 0
    assert all((value == 1).all() for value in split.values())


def thirds(*sizes):
    return [Parameter(Tensor(np.full(size, 1 / 3, np.float32)), name=f"p{i}") for i, size in enumerate(sizes)]


def test_a_parameter_that_is_large_or_alone_stays_fp32():
    pair = thirds(3, 8)
    arrays = OptimizerArrays(pair, 8, pair)
    assert arrays.flat is None and arrays.large == tuple(pair) and not arrays.small
    assert {p.dtype for p in pair} == {ms.float32}


def test_the_flat_array_has_the_values_and_the_copies_are_rounded():
    three = thirds(2, 3, 4)
    arrays = OptimizerArrays(three, 8, three[1:2])
    assert arrays.small == arrays.parameters == (three[1], three[0], three[2])
    assert [p.dtype for p in arrays.small] == [ms.float16, ms.float32, ms.float32]
    assert arrays.flat.dtype == ms.float32
    np.testing.assert_array_equal(three[1].asnumpy(), np.full(3, 1 / 3, np.float16))
    values = arrays.split([arrays.flat.asnumpy()])
    for parameter in three:
        np.testing.assert_array_equal(values[parameter.name], np.full(parameter.size, 1 / 3, np.float32))
    np.testing.assert_array_equal(arrays.join(values)[0], arrays.flat.asnumpy())


def test_the_flat_array_is_copied_into_the_parameters_in_pynative_mode(parameters):
    """Its parts are views there, whose memory has another size."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    arrays = OptimizerArrays(parameters, 10)
    arrays.flat.set_data(Tensor(np.arange(arrays.flat.size, dtype=np.float32) + 1))
    CopyIntoParameters(arrays)((arrays.flat,))
    expected = arrays.split([p.asnumpy() for p in arrays.arrays])
    for parameter in arrays.small:
        np.testing.assert_array_equal(parameter.asnumpy(), expected[parameter.name])
