"""Sums of LoRAs, and LoRAs of lower rank, each with the error it makes.

The update of a layer is dW = (alpha / rank) * up @ down. A weighted sum of updates is exact with the factors joined
side by side: up = [w1 a1/r1 up1, w2 a2/r2 up2, ...] and down = [down1; down2; ...]. The best update of a lower rank is
the truncated singular value decomposition (Eckart and Young 1936). It is computed from the factors without their
product: with up = Qu Ru and down^T = Qd Rd, the singular values are those of Ru Rd^T, a matrix of the rank's size. For
the update D of a whole weight they come from the eigenvectors of D D^T or D^T D, whichever is smaller. In double
precision that keeps all that the fp32 values of D hold, in a fraction of the time of an SVD of D.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from ldm.errors import UserError
from ldm.lora.lora import LoRA
from ldm.lora.strength import Strength
from ldm.lora.updates import LoRALayer
from ldm.weights.names import LABELS, component_of, same_up_to_1x1


class LayerTruncation(NamedTuple):
    """The ranks of a layer before and after, the squared norm of its update, and of the part that was cut off."""

    rank_before: int
    rank: int
    squared_norm: float
    squared_loss: float


@dataclass
class Truncation:
    """What lower ranks cost, by layer. Norms are Frobenius norms."""

    layers: dict[str, LayerTruncation] = field(default_factory=dict)

    def error(self, name: str | None = None) -> float:
        """Return |part cut off| / |update| of a layer, or of all layers together. It is 0 for a zero update."""
        layers = self.layers.values() if name is None else (self.layers[name],)
        norm, loss = sum(layer.squared_norm for layer in layers), sum(layer.squared_loss for layer in layers)
        return math.sqrt(loss / norm) if norm else 0.0

    def __str__(self) -> str:
        if not self.layers:
            return "no layers"
        parts = []
        for component, label in LABELS.items():
            layers = {name: layer for name, layer in self.layers.items() if component_of(name) == component}
            if layers:
                ranks = sorted({layer.rank for layer in layers.values()})
                span = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
                error = Truncation(layers).error()
                parts.append(f"{label}: {len(layers)} layers of rank {span}, relative error {error:.2g}")
        worst = max(self.layers, key=self.error)
        text = f"{'; '.join(parts)}; all together {self.error():.2g}"
        return text + (f", most in {worst}: {self.error(worst):.2g}" if self.error(worst) else "")


def weighted_sum(loras: Sequence[tuple[LoRA, Strength | float]]) -> LoRA:
    """Add the updates of any number of LoRAs of any ranks, exactly within the rounding of fp32 factors.

    A layer that several LoRAs have gets the sum of their ranks. A layer that only one has keeps its factors. A LoRA of
    strength 0 leaves nothing behind.

    Raises:
        UserError: The LoRAs were made for different models, a strength is not finite, block weights are for another
            model, or the sum has no layers.
    """
    metadata = check_sum(loras)
    parts: dict[str, list[tuple[float, LoRALayer]]] = {}
    for lora, value in loras:
        strength = Strength.from_value(value)
        strength.check_lora(lora, "a LoRA")
        for name, layer in lora.pairs().items():
            if strength.of_layer(name):
                parts.setdefault(name, []).append((strength.of_layer(name), layer))
    layers = {name: _sum_layers(name, of_name) for name, of_name in parts.items()}
    return LoRA(layers, metadata, _all_embeddings([lora for lora, _ in loras]))


def mix_factors(first: LoRA, second: LoRA, weight1: float, weight2: float) -> LoRA:
    """Add the factors of two LoRAs as cloneofsimo's mode `lpl` does, which is not the sum of their updates.

    dW = (w1 up1 + w2 up2) @ (w1 down1 + w2 down2), with up * alpha / rank in place of up. The updates have the weights
    w1^2 and w2^2, and there are cross terms. `weighted_sum` is exact.

    Raises:
        UserError: The LoRAs have different layers or ranks, or were made for different models.
    """
    unshared = first.layers.keys() ^ second.layers.keys()
    if unshared:
        raise UserError(
            f"factors can be mixed only if both LoRAs have the same layers: {len(unshared)} are in only one, such as "
            f"{min(unshared)}; take the exact sum (--mode sum)"
        )
    metadata = check_sum([(first, weight1), (second, weight2)])
    layers, others = {}, second.pairs()
    for name, a in first.pairs().items():
        b = others[name]
        _check_shapes(name, a, b)
        if a.rank != b.rank:
            raise UserError(
                f"factors can be mixed only if both LoRAs have the same rank: {name} has {a.rank} and {b.rank}; take "
                "the exact sum (--mode sum)"
            )
        up = weight1 * a.alpha / a.rank * a.up + weight2 * b.alpha / b.rank * b.up.reshape(a.up.shape)
        down = weight1 * a.down + weight2 * b.down.reshape(a.down.shape)
        layers[name] = LoRALayer(up=up.astype(np.float32), down=down.astype(np.float32), alpha=float(a.rank))
    return LoRA(layers, metadata, _all_embeddings([first, second]))


def resize(lora: LoRA, rank: int | None = None, energy: float | None = None) -> tuple[LoRA, Truncation]:
    """Return the best LoRA of a lower rank.

    Args:
        lora: The LoRA.
        rank: Largest rank of a layer. A layer of no larger rank keeps its factors, bit for bit.
        energy: Share of the squared Frobenius norm that each layer keeps, above 0 and at most 1. Each layer gets the
            smallest rank that does. With `rank` as well, both hold.

    Returns:
        The LoRA, with evenly scaled factors and alpha = rank, and what was lost.

    Raises:
        UserError: Neither rank nor energy is given, or one is out of range.
    """
    check_cut(rank, energy)
    layers, truncation = {}, Truncation()
    for name, layer in lora.pairs().items():
        if energy is None and rank is not None and layer.rank <= rank:
            layers[name] = layer
            truncation.layers[name] = LayerTruncation(layer.rank, layer.rank, _squared_norm(layer), 0.0)
        else:
            layers[name], truncation.layers[name] = _truncate_layer(layer, rank, energy)
    return LoRA(layers, dict(lora.metadata), dict(lora.embeddings)), truncation


def decompose(
    updates: Iterable[tuple[str, np.ndarray]], rank: int | None = None, energy: float | None = None
) -> tuple[LoRA, Truncation]:
    """Return the LoRA of updates of whole weights, by the SVD of each.

    It is exact, within the rounding of fp32, for an update of no larger rank. A layer whose update is zero is left out.

    Args:
        updates: Name of a layer and its update, (out, in) or (out, in, k, k).
        rank, energy: As for `resize`.

    Returns:
        The LoRA and what was lost.

    Raises:
        UserError: As for `resize`, and for a value that is not finite.
    """
    check_cut(rank, energy)
    layers, truncation = {}, Truncation()
    for name, update in updates:
        if not np.isfinite(update).all():
            raise UserError(f"the update of {name} holds values that are not finite: one of the checkpoints is broken")
        if update.any():
            layers[name], truncation.layers[name] = _truncate_weight(update, rank, energy)
    return LoRA(layers), truncation


def relative_difference(lora: LoRA, reference: LoRA) -> float:
    """Return |updates - reference updates| / |reference updates|, in the Frobenius norm over all layers."""

    def squared_norm(lora: LoRA) -> float:
        return sum(map(_squared_norm, lora.pairs().values()))

    difference, norm = squared_norm(weighted_sum([(lora, 1.0), (reference, -1.0)])), squared_norm(reference)
    return math.sqrt(difference / norm) if norm else (math.inf if difference else 0.0)


def check_cut(rank: int | None, energy: float | None) -> None:
    """Raise UserError unless a rank or an energy is given, within its bounds."""
    if rank is None and energy is None:
        raise UserError("neither a rank nor an energy is given: say how small the LoRA may become")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, (int, np.integer)) or rank < 1):
        raise UserError(f"rank is {rank}: it must be a whole number, 1 or more")
    if energy is not None and not 0 < energy <= 1:
        raise UserError(f"energy is {energy}: it must be above 0 and at most 1, such as 0.95")


def check_sum(loras: Sequence[tuple[LoRA, Strength | float]]) -> dict[str, str]:
    """Check that LoRAs can be added, to each other or to a base model. Returns what the metadata of all says.

    Raises:
        UserError: They are for different models or time steps, a strength is not finite, or nothing is left of them.
    """
    strengths = [(lora, Strength.from_value(value)) for lora, value in loras]
    for _, strength in strengths:
        strength.check("a LoRA")
    if not any(strength.of_layer(name) for lora, strength in strengths for name in lora.updates()):
        raise UserError("nothing is left of the LoRAs: every strength is 0, or they hold no layers")
    if any(lora.timesteps != loras[0][0].timesteps for lora, _ in loras):
        raise UserError(
            "the LoRAs are for different time steps (min_timestep and max_timestep in their metadata), which one LoRA "
            "cannot keep apart: apply them together, --lora_ckpt_path a.ckpt b.ckpt"
        )
    metadata: dict[str, str] = {}
    for lora, _ in loras:
        for key, text in lora.metadata.items():
            if metadata.setdefault(key, text) != text:
                raise UserError(
                    f"the LoRAs are for different models: the {key} of one is {metadata[key]}, of another {text}"
                )
    return metadata


def _sum_layers(name: str, layers: list[tuple[float, LoRALayer]]) -> LoRALayer:
    if len(layers) == 1:
        strength, layer = layers[0]
        # alpha stays positive: some readers take a negative alpha for a missing one.
        return replace(layer, up=layer.up if strength > 0 else -layer.up, alpha=layer.alpha * abs(strength))
    first = layers[0][1]
    ups, downs = [], []
    for strength, layer in layers:
        _check_shapes(name, first, layer)
        factor = strength * layer.alpha / layer.rank
        ups.append(factor * layer.up.astype(np.float64).reshape(-1, layer.rank, *first.up.shape[2:]))
        downs.append(layer.down.reshape(layer.rank, *first.down.shape[1:]))
    up, down = np.concatenate(ups, axis=1).astype(np.float32), np.concatenate(downs).astype(np.float32)
    return LoRALayer(down, up, float(len(down)))


def _check_shapes(name: str, a: LoRALayer, b: LoRALayer) -> None:
    if not same_up_to_1x1(a.shape, b.shape):
        raise UserError(f"the LoRAs are for different models: {name} is {a.shape} in one and {b.shape} in another")


def _all_embeddings(loras: Sequence[LoRA]) -> dict[str, np.ndarray]:
    """Return the learned tokens of all LoRAs. Raises UserError if two have different vectors for one name."""
    embeddings: dict[str, np.ndarray] = {}
    for lora in loras:
        for name, vectors in lora.embeddings.items():
            if not np.array_equal(embeddings.setdefault(name, vectors), vectors):
                raise UserError(f"two LoRAs have different vectors for the learned token {name}: apply them one by one")
    return embeddings


def _svd(layer: LoRALayer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return U, S and V^T of a layer's update in double precision, with as many singular values as its rank."""
    up, down = (matrix.astype(np.float64) for matrix in layer.matrices())
    qu, ru = np.linalg.qr(up)
    qd, rd = np.linalg.qr(down.T)
    u, s, vt = np.linalg.svd(ru @ rd.T * (layer.alpha / layer.rank), full_matrices=False)
    return qu @ u, s, vt @ qd.T


def _squared_norm(layer: LoRALayer) -> float:
    return float(np.sum(_svd(layer)[1] ** 2))


def _truncate_layer(layer: LoRALayer, rank: int | None, energy: float | None) -> tuple[LoRALayer, LayerTruncation]:
    u, s, vt = _svd(layer)
    squares = s**2
    keep = _kept_values(squares, rank, energy)
    root = np.sqrt(s[:keep])
    cut = _layer_of(u[:, :keep] * root, root[:, None] * vt[:keep], layer.down.shape[1:])
    return cut, LayerTruncation(layer.rank, keep, float(squares.sum()), float(squares[keep:].sum()))


def _truncate_weight(update: np.ndarray, rank: int | None, energy: float | None) -> tuple[LoRALayer, LayerTruncation]:
    """Truncate the update of a weight, (out, in) or (out, in, k, k)."""
    matrix = update.reshape(len(update), -1).astype(np.float64)
    wide = matrix.shape[0] <= matrix.shape[1]
    squares, vectors = np.linalg.eigh(matrix @ matrix.T if wide else matrix.T @ matrix)  # ascending
    squares, vectors = np.maximum(squares[::-1], 0.0), vectors[:, ::-1]
    keep = _kept_values(squares, rank, energy)
    kept, root = vectors[:, :keep], squares[:keep] ** 0.25
    root[root == 0] = 1.0
    # The other factor is a projection: the product is then right for the smallest values too, whatever `root` is.
    up, down = (kept * root, kept.T @ matrix / root[:, None]) if wide else (matrix @ kept / root, (kept * root).T)
    report = LayerTruncation(len(squares), keep, float(squares.sum()), float(squares[keep:].sum()))
    return _layer_of(up, down, update.shape[1:]), report


def _kept_values(squares: np.ndarray, rank: int | None, energy: float | None) -> int:
    """Return how many singular values are kept, given their squares in descending order."""
    keep = len(squares) if rank is None else min(rank, len(squares))
    if energy is None:
        return keep
    # Summed from the smallest value up. An energy of 1 drops what fp32 could not hold beside the rest.
    rest = np.append(np.cumsum(squares[::-1])[::-1], 0.0)
    return min(keep, max(1, int(np.argmax(rest <= max(1.0 - energy, 1e-13) * rest[0]))))


def _layer_of(up: np.ndarray, down: np.ndarray, in_shape: tuple[int, ...]) -> LoRALayer:
    """Return the layer, with alpha = rank, of up (out, rank) and down (rank, in * k * k). `in_shape`: (in, k, k)."""
    rank = up.shape[1]
    up = up.astype(np.float32).reshape(-1, rank, *(1,) * (len(in_shape) - 1))
    return LoRALayer(down.astype(np.float32).reshape(rank, *in_shape), up, float(rank))
