"""Sums of LoRAs, and LoRAs of lower rank, on the form in memory (ldm.lora.lora); each says how far it is off.

The update of a layer is dW = (alpha / rank) * up @ down. A weighted sum of updates is exact with the ranks joined side
by side: up = [w1 a1/r1 up1, w2 a2/r2 up2, ...], down = [down1; down2; ...]. The best update of a lower rank is its
singular value decomposition cut off (Eckart and Young 1936), which the factors give without their product being formed:
with up = Qu Ru and down^T = Qd Rd the singular values are those of Ru Rd^T, a matrix of the rank's size. For a whole
weight's update D they come from the eigenvectors of D D^T or D^T D, the smaller of the two: its double precision holds
all that the fp32 values of D do, and it takes a fraction of the time of D's own decomposition.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ldm.errors import UserError
from ldm.lora.lora import LoRA, LoRALayer, Strength
from ldm.weights.names import LABELS, component_of, same_up_to_1x1


@dataclass
class Truncation:
    """What a lower rank costs: layer -> (rank before, rank after, squared norm of the update, of what was cut off)."""

    layers: dict[str, tuple[int, int, float, float]] = field(default_factory=dict)

    def error(self, name: str | None = None) -> float:
        """|cut off| / |update| in the Frobenius norm, of a layer or of all together; 0 where there is no update."""
        rows = self.layers.values() if name is None else (self.layers[name],)
        whole, lost = sum(row[2] for row in rows), sum(row[3] for row in rows)
        return math.sqrt(lost / whole) if whole else 0.0

    def __str__(self) -> str:
        if not self.layers:
            return "no layers"
        parts = []
        for component, label in LABELS.items():
            names = [name for name in self.layers if component_of(name) == component]
            if names:
                part = Truncation({name: self.layers[name] for name in names})
                ranks = sorted({row[1] for row in part.layers.values()})
                span = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
                parts.append(f"{label}: {len(names)} layers of rank {span}, relative error {part.error():.2g}")
        worst = max(self.layers, key=self.error)
        text = f"{'; '.join(parts)}; all together {self.error():.2g}"
        return text + (f", most in {worst}: {self.error(worst):.2g}" if self.error(worst) else "")


def weighted_sum(states: Sequence[tuple[LoRA, Strength | float]]) -> LoRA:
    """The sum of weight * update of any number of LoRAs of any ranks, exact within fp32's rounding of the factors.

    A layer that several have gets the sum of their ranks; one that a single LoRA has keeps its factors. What has weight
    0 leaves nothing behind.

    Raises UserError for LoRAs made for different models, a weight that is not finite, and a sum with nothing in it.
    """
    parts: dict[str, list[tuple[float, LoRALayer]]] = {}
    for state, weights in states:
        weights = Strength.from_value(weights)
        weights.check("a LoRA")
        for name, layer in state.layers.items():
            if weights.of_layer(name):
                parts.setdefault(name, []).append((weights.of_layer(name), layer))
    metadata = _common_metadata([state for state, _ in states])
    if not parts:
        raise UserError("nothing is left of the LoRAs: every weight is 0, or they hold no layers")
    return LoRA({name: _joined(name, layers) for name, layers in parts.items()}, metadata)


def mix_factors(first: LoRA, second: LoRA, weight1: float, weight2: float) -> LoRA:
    """Cloneofsimo's `lpl`: the factors themselves are mixed, dW = (w1 up1 + w2 up2)(w1 down1 + w2 down2), where its
    files' factors are up * alpha / rank and down.

    That is not the sum of the updates: their shares are w1^2 and w2^2, and there are cross terms. weighted_sum is.

    Raises UserError unless both have the same layers with the same ranks.
    """
    alone = first.layers.keys() ^ second.layers.keys()
    if alone:
        raise UserError(
            f"factors can be mixed only of LoRAs with the same layers: {len(alone)} are in one alone, such as "
            f"{min(alone)}; take the exact sum (--mode sum)"
        )
    metadata = _common_metadata([first, second])
    layers = {}
    for name, one in first.layers.items():
        two = second.layers[name]
        _check_shapes(name, one, two)
        if one.rank != two.rank:
            raise UserError(
                f"factors can be mixed only of LoRAs of the same rank: {name} has {one.rank} and {two.rank}; take the "
                "exact sum (--mode sum)"
            )
        up = weight1 * one.alpha / one.rank * one.up + weight2 * two.alpha / two.rank * two.up.reshape(one.up.shape)
        down = weight1 * one.down + weight2 * two.down.reshape(one.down.shape)
        layers[name] = LoRALayer(up=up.astype(np.float32), down=down.astype(np.float32), alpha=float(one.rank))
    return LoRA(layers, metadata)


def resize(state: LoRA, rank: int | None = None, energy: float | None = None) -> tuple[LoRA, Truncation]:
    """The best LoRA of a lower rank.

    Args:
        rank: largest rank of a layer; a layer that has no more keeps its factors, bit for bit.
        energy: in its place, or beside it, the share of the squared Frobenius norm that each layer keeps (0 to 1): the
            smallest rank that does.

    Returns:
        The LoRA, its factors scaled evenly and alpha = rank, and what was lost.

    Raises UserError for a rank below 1, an energy outside (0, 1], or neither of them.
    """
    check_cut(rank, energy)
    layers, report = {}, Truncation()
    for name, layer in state.layers.items():
        if energy is None and layer.rank <= rank:
            squares = float(np.sum(_svd_of_factors(layer)[1] ** 2))
            layers[name], report.layers[name] = layer, (layer.rank, layer.rank, squares, 0.0)
            continue
        layers[name], squares, lost = _cut(_svd_of_factors(layer), rank, energy, layer.down.shape[1:])
        report.layers[name] = (layer.rank, layers[name].rank, squares, lost)
    return LoRA(layers, dict(state.metadata)), report


def decompose(
    updates: Iterable[tuple[str, np.ndarray]], rank: int | None = None, energy: float | None = None
) -> tuple[LoRA, Truncation]:
    """A LoRA of updates of whole weights: (layer, dW (out, in) or (out, in, k, k)), by the SVD of each.

    rank, energy: as for `resize`. Exact, within fp32's rounding, for an update whose rank is no more. A layer without
    an update is left out. Raises UserError as `resize`, and for a value that is not finite.
    """
    check_cut(rank, energy)
    layers, report = {}, Truncation()
    for name, update in updates:
        if not np.isfinite(update).all():
            raise UserError(f"the update of {name} holds values that are not finite: one of the checkpoints is broken")
        if not update.any():
            continue
        layers[name], full, squares, lost = _cut_whole(update, rank, energy)
        report.layers[name] = (full, layers[name].rank, squares, lost)
    return LoRA(layers), report


def difference(first: LoRA, second: LoRA) -> float:
    """|update of first - of second| / |of second| in the Frobenius norm over all layers; inf where second is zero."""

    def squares(state: LoRA) -> float:
        return sum(float(np.sum(_svd_of_factors(layer)[1] ** 2)) for layer in state.layers.values())

    off, norm = squares(weighted_sum([(first, 1.0), (second, -1.0)])), squares(second)
    return math.sqrt(off / norm) if norm else (math.inf if off else 0.0)


def _joined(name: str, parts: list[tuple[float, LoRALayer]]) -> LoRALayer:
    if len(parts) == 1:
        weight, layer = parts[0]
        # alpha stays positive: some readers take another for a missing one
        return replace(layer, up=layer.up if weight > 0 else -layer.up, alpha=layer.alpha * abs(weight))
    first = parts[0][1]
    ups, downs = [], []
    for weight, layer in parts:
        _check_shapes(name, first, layer)
        strength = weight * layer.alpha / layer.rank
        ups.append(strength * layer.up.astype(np.float64).reshape(-1, layer.rank, *first.up.shape[2:]))
        downs.append(layer.down.reshape(layer.rank, *first.down.shape[1:]))
    up, down = np.concatenate(ups, axis=1).astype(np.float32), np.concatenate(downs).astype(np.float32)
    return LoRALayer(down, up, float(down.shape[0]))


def _check_shapes(name: str, one: LoRALayer, two: LoRALayer) -> None:
    shapes = [(layer.up.shape[0], *layer.down.shape[1:]) for layer in (one, two)]
    if not same_up_to_1x1(*shapes):
        raise UserError(f"the LoRAs are of different models: {name} is {shapes[0]} in one and {shapes[1]} in another")


def _common_metadata(states: Sequence[LoRA]) -> dict[str, str]:
    metadata: dict[str, str] = {}
    for state in states:
        for key, text in state.metadata.items():
            if metadata.setdefault(key, text) != text:
                raise UserError(
                    f"the LoRAs are of different models: the {key} of one is {metadata[key]}, of another {text}"
                )
    return metadata


def _matrices(layer: LoRALayer) -> tuple[np.ndarray, np.ndarray]:
    """Up (out, rank) and down (rank, in or in * k * k)."""
    return layer.up.reshape(layer.up.shape[0], layer.rank), layer.down.reshape(layer.rank, -1)


def _svd_of_factors(layer: LoRALayer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(U, S, V^T) of the update in double precision, of at most the layer's rank."""
    up, down = (array.astype(np.float64) for array in _matrices(layer))
    qu, ru = np.linalg.qr(up)
    qd, rd = np.linalg.qr(down.T)
    u, s, vt = np.linalg.svd(ru @ rd.T * (layer.alpha / layer.rank), full_matrices=False)
    return qu @ u, s, vt @ qd.T


def _cut(
    factors: tuple[np.ndarray, np.ndarray, np.ndarray], rank: int | None, energy: float | None, shape: tuple[int, ...]
) -> tuple[LoRALayer, float, float]:
    """(layer of the first singular values, squared norm of all, of the rest); shape: (in,) or (in, k, k)."""
    u, s, vt = factors
    squares = s**2
    keep = _enough(squares, rank, energy)
    root = np.sqrt(s[:keep])
    layer = _layer(u[:, :keep] * root, root[:, None] * vt[:keep], shape)
    return layer, float(squares.sum()), float(squares[keep:].sum())


def _cut_whole(update: np.ndarray, rank: int | None, energy: float | None) -> tuple[LoRALayer, int, float, float]:
    """(layer of the first singular values, how many there are, squared norm of all, of the rest) of a weight's update,
    (out, in) or (out, in, k, k).
    """
    matrix = update.reshape(update.shape[0], -1).astype(np.float64)
    wide = matrix.shape[0] <= matrix.shape[1]
    squares, vectors = np.linalg.eigh(matrix @ matrix.T if wide else matrix.T @ matrix)  # ascending
    squares, vectors = np.maximum(squares[::-1], 0.0), vectors[:, ::-1]
    keep = _enough(squares, rank, energy)
    kept, root = vectors[:, :keep], squares[:keep] ** 0.25
    root[root == 0] = 1.0
    # the other factor by projection: the product is then right for the smallest values too, whatever `root` is
    up, down = (kept * root, kept.T @ matrix / root[:, None]) if wide else (matrix @ kept / root, (kept * root).T)
    return _layer(up, down, update.shape[1:]), len(squares), float(squares.sum()), float(squares[keep:].sum())


def _enough(squares: np.ndarray, rank: int | None, energy: float | None) -> int:
    """How many of the squared singular values, descending, are kept."""
    keep = len(squares) if rank is None else min(rank, len(squares))
    if energy is None:
        return keep
    # summed from the small end; a share of 1 leaves out what fp32 could not hold beside the rest
    rest = np.append(np.cumsum(squares[::-1])[::-1], 0.0)
    return min(keep, max(1, int(np.argmax(rest <= max(1.0 - energy, 1e-13) * rest[0]))))


def _layer(up: np.ndarray, down: np.ndarray, shape: tuple[int, ...]) -> LoRALayer:
    """The layer of up (out, rank) and down (rank, in or in * k * k), alpha = rank; shape: (in,) or (in, k, k)."""
    rank = up.shape[1]
    up = up.astype(np.float32).reshape(-1, rank, *(1,) * (len(shape) - 1))
    return LoRALayer(down.astype(np.float32).reshape(rank, *shape), up, float(rank))


def check_cut(rank: int | None, energy: float | None) -> None:
    """Raise UserError unless a rank or an energy is given, within its bounds."""
    if rank is None and energy is None:
        raise UserError("neither a rank nor an energy is given: say how small the LoRA may become")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, (int, np.integer)) or rank < 1):
        raise UserError(f"rank is {rank}: it must be a whole number, 1 or more")
    if energy is not None and not 0 < energy <= 1:
        raise UserError(f"energy is {energy}: it must be above 0 and at most 1, such as 0.95")
