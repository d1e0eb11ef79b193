"""The golden file holds what its script answers today."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.golden.make_networks import answers
from tests.named_weights import relative_error

GOLDEN = Path(__file__).parents[1] / "golden" / "networks.npz"


def test_golden_networks_are_up_to_date():
    stored, fresh = np.load(GOLDEN, allow_pickle=False), answers()
    assert set(stored) == set(fresh)
    assert max(relative_error(stored[name], fresh[name]) for name in fresh) < 1e-5
