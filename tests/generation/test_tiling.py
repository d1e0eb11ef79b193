"""The VAE's tiles cover an image, are of one size, and show no seam where the network looks at few pixels."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest

from ldm.generation.decoding import TILED_ABOVE, VAETiling
from ldm.generation.tiling import run_tiled, tile_starts
from ldm.settings.model import load_model_config
from tests.image_to_image_cases import GOLDEN


@pytest.mark.parametrize("length", [1, 7, 8, 9, 13, 14, 15, 20, 64, 100, 257])
@pytest.mark.parametrize("tile, overlap", [(8, 2), (64, 16), (10, 0)])
def test_tiles_cover_an_axis_and_overlap(length, tile, overlap):
    starts = tile_starts(length, tile, overlap)
    assert starts[0] == 0 and (starts == [0] or starts[-1] == length - tile)
    assert all(0 < after - before <= tile - overlap for before, after in zip(starts, starts[1:]))
    if length > tile:
        assert len(starts) <= 2 or (length - overlap) / (tile - overlap) > len(starts) - 1  # no tile too many


def nearest_doubled(seen):
    """A decoder of factor 2 without a neighbourhood, which notes the sizes that it gets."""

    def network(tensor):
        seen.append(tensor.shape)
        return ms.Tensor(np.repeat(np.repeat(tensor.asnumpy() * 3, 2, 2), 2, 3))

    return network


@pytest.mark.parametrize("height, width", [(8, 8), (9, 30), (50, 21), (3, 20), (5, 5)])
def test_where_tiles_agree_their_mixture_is_the_whole(height, width):
    rows, seen = np.random.default_rng(0).standard_normal((2, 4, height, width)).astype(np.float32), []
    tiled = run_tiled(nearest_doubled(seen), rows, 8, into=2)
    np.testing.assert_allclose(tiled, nearest_doubled([])(ms.Tensor(rows)).asnumpy(), rtol=1e-6, atol=1e-6)
    assert set(seen) == {(1, 4, min(8, height), min(8, width))}  # one graph


def test_an_encoder_makes_smaller_tiles():
    rows = np.random.default_rng(0).standard_normal((1, 3, 40, 64)).astype(np.float32)
    tiled = run_tiled(lambda tensor: ms.Tensor(tensor.asnumpy()[:, :, ::4, ::4]), rows, 6, out_of=4)
    np.testing.assert_allclose(tiled, rows[:, :, ::4, ::4], rtol=1e-6)


def test_tiles_that_differ_fade_into_each_other():
    """A network whose tiles differ by a constant, as by other statistics of its norms: no step is above 1 / ramp."""
    calls = iter(range(100))
    row = run_tiled(lambda tensor: tensor * 0 + next(calls), np.zeros((1, 1, 4, 20), np.float32), 8, into=1)[0, 0, 0]
    assert row[0] == 0 and row[-1] == 2 and (np.diff(row) >= 0).all() and np.diff(row).max() <= 0.5


def test_large_images_are_tiled_by_themselves():
    config = load_model_config(GOLDEN / "small_sd1.yaml")
    assert VAETiling().tile(config, 1024, 1024) is None and VAETiling().tile(config, 1536, 1536) is None
    assert TILED_ABOVE == 1536 * 1536 and VAETiling().tile(config, 1536, 1544) == 256  # of 4 pixels
    assert VAETiling(True, 512).tile(config, 64, 64) == 128 and VAETiling(False).tile(config, 4096, 4096) is None
