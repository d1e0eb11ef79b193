"""The arrays that the optimizer works on: what is in which, and the way from values by name and back."""

from __future__ import annotations

import numpy as np
import pytest
from mindspore import Parameter, Tensor

from ldm.training.optimizer_arrays import OptimizerArrays

SHAPES = ((2, 3), (2, 4), (3,), (3, 4))  # 6, 8, 3 and 12 elements


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
