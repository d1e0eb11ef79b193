"""The text encoder: shapes, and that later words leave earlier states alone. Its numbers are in test_golden.py."""

from __future__ import annotations

import numpy as np
import pytest
from mindspore import Tensor

pytestmark = pytest.mark.usefixtures("graph_mode")

TOKENS = np.random.default_rng(0).integers(0, 49408, (2, 77)).astype(np.int32)


def test_states_of_every_position(tiny_model, tiny_config):
    states = tiny_model.cond_stage_model(Tensor(TOKENS))
    assert states.shape == (2, 77, tiny_config.context_dim)
    np.testing.assert_allclose(states.asnumpy().mean(-1), 0, atol=1e-5)  # the final LayerNorm is the last thing done


def test_a_state_depends_on_its_own_and_earlier_tokens_alone(tiny_model):
    before = tiny_model.cond_stage_model(Tensor(TOKENS)).asnumpy()
    changed = TOKENS.copy()
    changed[0, 30] = (changed[0, 30] + 1) % 49408
    after = tiny_model.cond_stage_model(Tensor(changed)).asnumpy()
    np.testing.assert_array_equal(after[0, :30], before[0, :30])
    assert (np.abs(after[0, 30:] - before[0, 30:]).max(-1) > 1e-6).all()
    np.testing.assert_array_equal(after[1], before[1])
