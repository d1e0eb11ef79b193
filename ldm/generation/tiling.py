"""The VAE on tiles of a large image, whose parts overlap and are blended.

A call of SD's decoder for 2,048 x 2,048 pixels holds several arrays of 4 GB. Tiles of 512 x 512 pixels take 1/16 of the
memory. A network is compiled for one size of tile: where a side is no multiple, the tiles overlap more instead.

The group norms of the VAE see one tile at a time, so neighbouring tiles differ a little in colour. They overlap by
OVERLAP of their side, over which one fades into the other linearly, as in diffusers (`enable_vae_tiling`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import mindspore as ms
import numpy as np

OVERLAP = 0.25  # diffusers' `tile_overlap_factor`


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Return where tiles of one axis begin, evenly spaced, so that neighbours share at least `overlap`.

    The first begins at 0 and the last ends at `length`. A tile that is as long as the axis, or longer, is alone.
    """
    if length <= tile:
        return [0]
    count = math.ceil((length - overlap) / (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def run_tiled(
    network: Callable[[ms.Tensor], ms.Tensor], rows: np.ndarray, tile: int, into: int = 1, out_of: int = 1
) -> np.ndarray:
    """Run a network on the tiles of each row and blend what it returns.

    Args:
        network: Maps (1, C, h, w) to (1, D, h * into / out_of, w * into / out_of).
        rows: (N, C, h, w) float32.
        tile: Side of a tile in cells, of which each is `out_of` elements of the input and `into` of the output along a
            side. An axis that is shorter has one tile of its length.
        into: Elements of the output for a cell: the VAE's factor for a decoder.
        out_of: Elements of the input for a cell: the VAE's factor for an encoder.

    Returns:
        (N, D, h * into / out_of, w * into / out_of) float32.
    """
    overlap = int(tile * OVERLAP)
    cells = [side // out_of for side in rows.shape[2:]]
    height, width = (min(tile, side) for side in cells)
    ramp = max(1, overlap) * into
    outputs = []
    for row in rows:
        total = weights = None
        for top in tile_starts(cells[0], tile, overlap):
            down = _ramps(height * into, ramp, top > 0, top + height < cells[0])
            for left in tile_starts(cells[1], tile, overlap):
                across = _ramps(width * into, ramp, left > 0, left + width < cells[1])
                part = row[None, :, top * out_of : (top + height) * out_of, left * out_of : (left + width) * out_of]
                output = network(ms.Tensor(np.ascontiguousarray(part))).asnumpy()[0]
                if total is None or weights is None:
                    total = np.zeros((len(output), cells[0] * into, cells[1] * into), np.float32)
                    weights = np.zeros(total.shape[1:], np.float32)
                weight = down[:, None] * across
                place = np.s_[top * into : (top + height) * into, left * into : (left + width) * into]
                total[(slice(None), *place)] += output * weight
                weights[place] += weight
        assert total is not None and weights is not None  # there is at least one tile
        outputs.append(total / weights)
    return np.stack(outputs)


def _ramps(length: int, ramp: int, at_start: bool, at_end: bool) -> np.ndarray:
    """Return the weights (length,) of a tile along an axis: they rise and fall over `ramp` where it has neighbours."""
    rise = np.minimum(1.0, (np.arange(length, dtype=np.float32) + 0.5) / ramp)
    weights = np.ones(length, np.float32)
    if at_start:
        weights = weights * rise
    if at_end:
        weights = weights * rise[::-1]
    return weights
