"""The limit of the norms of LoRA's layers, against the product of the factors in float64."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn

from ldm.errors import UserError
from ldm.lora.new_cells import new_lora_cell
from ldm.lora.spec import LayerSpec, LoRASpec
from ldm.models.layers import Conv2d
from ldm.runtime.device import setup_runtime
from ldm.training.optimizer_arrays import OptimizerArrays
from ldm.training.weight_norms import LimitNorms, NormLimit, norm_limit

# down and up of a linear layer, of a convolution and of a wide layer; a parameter of no layer
SHAPES = ((2, 9), (7, 2), (2, 3, 3, 3), (5, 2, 1, 1), (4, 200), (30, 4), (6,))
MULTIPLIERS = (1.0, 0.5, 2.0)


@pytest.fixture(autouse=True)
def set_up(graph_mode):
    setup_runtime("CPU")


def expected(values, limit):
    """The values after the limit, by the formula of sd-scripts."""
    values = [value.astype(np.float64) for value in values]
    for i, multiplier in enumerate(MULTIPLIERS):
        down, up = values[2 * i], values[2 * i + 1]
        norm = np.linalg.norm(multiplier * up.reshape(len(up), -1) @ down.reshape(len(down), -1))
        for k in (2 * i, 2 * i + 1):
            values[k] = values[k] * np.sqrt(min(norm, limit) / norm)
    return values


@pytest.mark.parametrize("large", [10**6, 100, 1], ids=["all in one array", "some by themselves", "each by itself"])
def test_factors_are_scaled_where_the_norm_is_above_the_limit(large):
    rng = np.random.default_rng(0)
    values = [rng.standard_normal(shape).astype(np.float32) for shape in SHAPES]
    values[0] *= 0.01  # the first layer is below the limit
    parameters = [Parameter(Tensor(value), name=f"p{i}") for i, value in enumerate(values)]
    arrays = OptimizerArrays(parameters, large)
    layers = [(parameters[2 * i], parameters[2 * i + 1], multiplier) for i, multiplier in enumerate(MULTIPLIERS)]
    limit_norms = LimitNorms(arrays, NormLimit(5.0, layers))
    waited = (Tensor(0.0, ms.float32),)

    limit_norms(waited, Tensor(False))
    for name, array in arrays.split([a.asnumpy() for a in arrays.arrays]).items():
        np.testing.assert_array_equal(array, values[int(name[1:])])
    limit_norms(waited, Tensor(True))
    limited = arrays.split([a.asnumpy() for a in arrays.arrays])
    for i, array in enumerate(expected(values, 5.0)):
        np.testing.assert_allclose(limited[f"p{i}"], array, rtol=1e-6)
    np.testing.assert_array_equal(limited["p0"], values[0])
    np.testing.assert_array_equal(limited["p6"], values[6])
    assert not np.array_equal(limited["p3"], values[3])


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (LayerSpec(1, algo="loha"), "does not go with the LoHa of layer"),
        (LayerSpec(1, algo="lokr"), "the LoKr of layer"),
        (LayerSpec(1, use_tucker=True), "the third factor .use_tucker. of layer"),
        (LayerSpec(1, trainable_scale=True), "the trainable_scale of layer"),
    ],
)
def test_layers_without_a_plain_pair_of_factors_are_refused(layer, words):
    net = nn.SequentialCell([new_lora_cell(Conv2d(4, 4, 3), "layer", layer, LoRASpec(), None)])
    with pytest.raises(UserError, match=f"scale_weight_norms.*{words}"):
        norm_limit(net, 1.0)
    plain = nn.SequentialCell(
        [new_lora_cell(Conv2d(4, 4, 3), "layer", LayerSpec(2, 1.0, algo="dora"), LoRASpec(), None)]
    )
    assert [multiplier for _, _, multiplier in norm_limit(plain, 1.0).layers] == [0.5]
