"""Image-to-image and inpainting against diffusers: the golden file, which `make test` compares with, is current."""

from __future__ import annotations

import numpy as np

from tests.golden.make_image_to_image import answers
from tests.image_to_image_cases import CASES, GOLDEN
from tests.named_weights import relative_error


def test_the_golden_file_is_up_to_date():
    stored, fresh = np.load(GOLDEN / "image_to_image.npz", allow_pickle=False), answers()
    assert set(stored) == set(fresh)
    assert max(relative_error(stored[name], fresh[name]) for name in CASES) < 1e-4
    for name in fresh.keys() - CASES.keys():
        assert np.abs(stored[name].astype(int) - fresh[name]).max() <= 1
