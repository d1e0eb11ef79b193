"""fp16 copies of trained parameters: the same training, bit for bit, as with fp32 ones that are cast at each use."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops

from ldm.lora.inject import factors_cast_to, lora_cells
from ldm.lora.layers import HardLoRAConv2d, LoRAConv2d, LoRALinear
from ldm.models.layers import Conv2d, Linear, set_compute_dtype
from ldm.runtime.device import setup_runtime
from ldm.training.optimizer_arrays import OptimizerArrays
from ldm.training.step import TrainStep
from tests.training.toy import scalars

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


def parameters(*sizes):
    return [Parameter(Tensor(np.full(size, 1 / 3, np.float32)), name=f"p{i}") for i, size in enumerate(sizes)]


def test_a_parameter_that_is_large_or_alone_stays_fp32():
    pair = parameters(3, 8)
    arrays = OptimizerArrays(pair, 8, pair)
    assert arrays.flat is None and arrays.large == tuple(pair) and not arrays.small
    assert {p.dtype for p in pair} == {ms.float32}


def test_the_flat_array_has_the_values_and_the_copies_are_rounded():
    three = parameters(2, 3, 4)
    arrays = OptimizerArrays(three, 8, three[1:2])
    assert arrays.small == arrays.parameters == (three[1], three[0], three[2])
    assert [p.dtype for p in arrays.small] == [ms.float16, ms.float32, ms.float32]
    assert arrays.flat.dtype == ms.float32
    np.testing.assert_array_equal(three[1].asnumpy(), np.full(3, 1 / 3, np.float16))
    values = arrays.split([arrays.flat.asnumpy()])
    for parameter in three:
        np.testing.assert_array_equal(values[parameter.name], np.full(parameter.size, 1 / 3, np.float32))
    np.testing.assert_array_equal(arrays.join(values)[0], arrays.flat.asnumpy())
