"""Masks of the loss as kohya's sd-scripts computes them with PyTorch: averaged by interpolate(mode="area")."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.masks import load_mask, loss_weights


def saved_mask(tmp_path, height, width):
    values = np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "mask.png")
    Image.new("RGB", (width, height)).save(tmp_path / "image.png")
    return str(tmp_path / "mask.png"), tmp_path / "image.png", torch.from_numpy(values / 255)[None, None]


@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 32), (512, 448)])
def test_a_mask_is_averaged_as_by_pytorch(tmp_path, height, width):
    mask, image, values = saved_mask(tmp_path, height, width)
    result = load_mask(mask, image, (width, height), 8)
    expected = torch.nn.functional.interpolate(values, size=(height // 8, width // 8), mode="area")
    np.testing.assert_allclose(result, expected[0].numpy(), atol=1e-6)


@pytest.mark.parametrize("normalize", [False, True])
def test_the_weighted_loss_is_that_of_the_formula_in_pytorch(tmp_path, normalize):
    mask, image, values = saved_mask(tmp_path, 64, 96)
    errors = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(0)).square()
    clamped = torch.nn.functional.interpolate(values, size=(8, 12), mode="area").clamp(0.4, 1.0)
    losses = errors * clamped
    if normalize:
        losses = losses / clamped.mean(dim=(1, 2, 3), keepdim=True)
    weights = loss_weights(
        [load_mask(mask, image, (96, 64), 8)], (8, 12), unmasked_weight=0.4, normalize_masked_area_loss=normalize
    )
    assert (errors.numpy() * weights).mean() == pytest.approx(float(losses.mean()), rel=1e-5)
