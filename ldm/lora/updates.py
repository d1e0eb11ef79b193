"""What a LoRA file changes in one weight: a low-rank pair, or one of the kinds of LyCORIS.

Every kind gives a dense matrix for a weight W, and all follow one rule for the strength:

    W' = W + strength * delta(W)

| Kind      | delta(W)                                              | Source                           |
| --------- | ----------------------------------------------------- | -------------------------------- |
| LoRALayer | alpha / rank * up @ down                              | Hu et al. 2021                   |
| LoHa      | alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b)          | Hyeon-Woo et al. 2021 (FedPara)  |
| LoKr      | alpha / rank * kron(w1, w2)                           | Yeh et al. 2023 (LyCORIS)        |
| Full      | the difference itself                                 | LyCORIS                          |
| IA3       | W * w, w by output or by input                        | Liu et al. 2022                  |
| OFT       | rescale * R^T W - W, R block-diagonal and orthogonal  | Qiu et al. 2023                  |
| DoRA      | m * (W + d) / |W + d| - W, d of another kind          | Liu et al. 2024                  |

The last three depend on W. All compute in fp32. LoHa and LoKr are in ldm.lora.products.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from ldm.errors import UserError
from ldm.weights.names import same_up_to_1x1

EPSILON = float(np.finfo(np.float32).eps)  # added to DoRA's norms by LyCORIS


class LayerUpdate(ABC):
    """What a LoRA changes in one weight.

    Attributes:
        label: What users call this kind.
        needs_weight: Whether `delta` depends on the weight.
    """

    label: ClassVar[str]
    needs_weight: ClassVar[bool] = False

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the update, (out, in) or (out, in, k, k), or (out, in * k * k) where the factors do not tell k.

        For the weight of a normalisation it is (channels,).
        """

    @property
    def rank(self) -> int | None:
        """The rank of the factors, None for kinds without one."""
        return None

    @abstractmethod
    def delta(self, weight: np.ndarray | None = None) -> np.ndarray:
        """Compute the dense update at strength 1 in fp32, in its shape or the weight's.

        Args:
            weight: The weight that is changed. Only kinds with `needs_weight` read it.
        """

    def update(self, strength: float = 1.0, weight: np.ndarray | None = None) -> np.ndarray:
        """Compute strength * delta(weight) in fp32."""
        return self.delta(weight) * np.float32(strength)

    def restore(self, merged: np.ndarray, strength: float = 1.0) -> np.ndarray:
        """Return the weight W of which `merged` = W + strength * delta(W), in fp32 and within its rounding.

        Raises:
            UserError: The weight cannot be computed from the merged one.
        """
        return merged.astype(np.float32) + self.update(-strength).reshape(merged.shape)

    @abstractmethod
    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by their names in kohya's and LyCORIS's files, "alpha" included."""

    @abstractmethod
    def largest(self, strength: float = 1.0) -> float:
        """Return a bound for all values that `update` computes on its way, apart from those of the weight it reads."""

    def is_finite(self) -> bool:
        return all(np.isfinite(array).all() for array in self.arrays().values())

    @abstractmethod
    def is_zero(self) -> bool:
        """Whether the update is zero everywhere because a factor is."""

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether this is an update of a weight of `shape`. SD1 has 1x1 convolutions where SD2 has linear layers."""
        return same_up_to_1x1(self.shape, shape)

    def misfit(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape that is at fault where this does not fit a weight of `shape`."""
        return self.shape

    def reshaped(self, shape: tuple[int, ...]) -> LayerUpdate:
        """Return the same update with as many axes as a weight of `shape`, which it fits."""
        return self


@dataclass(frozen=True)
class LoRALayer(LayerUpdate):
    """A pair of low-rank factors, fp32: alpha / rank * up @ down.

    Attributes:
        down: (rank, in) for a linear layer, (rank, in, k, k) for a convolution.
        up: (out, rank) or (out, rank, 1, 1).
        alpha: The update is multiplied by alpha / rank.
    """

    label = "LoRA"

    down: np.ndarray
    up: np.ndarray
    alpha: float

    def __post_init__(self) -> None:
        update_shape(self.down.shape, self.up.shape)

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.up.shape[0], *self.down.shape[1:])

    def matrices(self) -> tuple[np.ndarray, np.ndarray]:
        """Up as (out, rank) and down as (rank, in) or (rank, in * k * k)."""
        return self.up.reshape(-1, self.rank), self.down.reshape(self.rank, -1)

    def delta(self, weight: np.ndarray | None = None) -> np.ndarray:
        return self.update()

    def update(self, strength: float = 1.0, weight: np.ndarray | None = None) -> np.ndarray:
        """Compute strength * (alpha / rank) * up @ down in fp32."""
        up, down = self.matrices()
        product = up.astype(np.float32) @ down.astype(np.float32)
        product *= np.float32(strength * self.alpha / self.rank)
        return product.reshape(self.shape)

    def arrays(self) -> dict[str, np.ndarray]:
        return {"lora_down.weight": self.down, "lora_up.weight": self.up, "alpha": scalar(self.alpha)}

    def largest(self, strength: float = 1.0) -> float:
        up, down = largest_value(self.up), largest_value(self.down)
        factor = abs(strength * self.alpha)
        return max(factor / self.rank, up * down * max(self.rank, factor))

    def is_zero(self) -> bool:
        return not (self.alpha and self.up.any() and self.down.any())

    def reshaped(self, shape: tuple[int, ...]) -> LoRALayer:
        up_shape = (*self.up.shape[:2], *(1,) * (len(shape) - 2))
        return replace(self, down=self.down.reshape(self.rank, *shape[1:]), up=self.up.reshape(up_shape))


@dataclass(frozen=True)
class Full(LayerUpdate):
    """A whole difference, fp32. Layers of normalisations and biases have no other kind.

    Attributes:
        difference: (out, in), (out, in, k, k) or (channels,).
        name: Its name in LyCORIS's files, "diff" or "w_norm".
    """

    label = "full"

    difference: np.ndarray
    name: str = "diff"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.difference.shape

    def delta(self, weight: np.ndarray | None = None) -> np.ndarray:
        return self.difference.astype(np.float32)

    def arrays(self) -> dict[str, np.ndarray]:
        return {self.name: self.difference}

    def largest(self, strength: float = 1.0) -> float:
        return max(1.0, abs(strength)) * largest_value(self.difference)

    def is_zero(self) -> bool:
        return not self.difference.any()

    def reshaped(self, shape: tuple[int, ...]) -> Full:
        return replace(self, difference=self.difference.reshape(shape))


@dataclass(frozen=True)
class IA3(LayerUpdate):
    """Factors for the outputs or the inputs of a layer: W' = W * (1 + strength * w).

    Attributes:
        multipliers: w, (out,) or (in,), fp32.
        on_input: Whether it is by input.
        axes: Axes of the weight. LyCORIS writes w as (1, channels, 1, 1) for a convolution.
    """

    label = "IA3"
    needs_weight = True

    multipliers: np.ndarray
    on_input: bool
    axes: int = 2

    @property
    def shape(self) -> tuple[int, ...]:
        return (1, len(self.multipliers)) if self.on_input else (len(self.multipliers), 1)

    def delta(self, weight: np.ndarray | None = None) -> np.ndarray:
        weight = _needed(weight)
        return weight.astype(np.float32) * self._along(weight)

    def restore(self, merged: np.ndarray, strength: float = 1.0) -> np.ndarray:
        multipliers = 1 + np.float32(strength) * self._along(merged)
        if not multipliers.all():
            raise UserError(
                "a multiplier of 0 has removed a part of the weight, which cannot be restored: load it again"
            )
        return merged.astype(np.float32) / multipliers

    def _along(self, weight: np.ndarray) -> np.ndarray:
        axis = 1 if self.on_input else 0
        return self.multipliers.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])

    def arrays(self) -> dict[str, np.ndarray]:
        weight = self.multipliers if self.axes == 2 else self.multipliers.reshape(1, -1, *(1,) * (self.axes - 2))
        return {"weight": weight, "on_input": scalar(self.on_input)}

    def largest(self, strength: float = 1.0) -> float:
        return max(1.0, abs(strength)) * largest_value(self.multipliers)

    def is_zero(self) -> bool:
        return not self.multipliers.any()

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) in (2, 4) and shape[1 if self.on_input else 0] == len(self.multipliers)

    def reshaped(self, shape: tuple[int, ...]) -> IA3:
        return replace(self, axes=len(shape))


@dataclass(frozen=True)
class OFT(LayerUpdate):
    """A rotation of the outputs in blocks: W' = W + strength * (rescale * R^T W - W).

    R is Cayley's (I + Q)(I - Q)^-1 of the skew-symmetric Q = blocks - blocks^T.

    Attributes:
        blocks: `oft_blocks` (number of blocks, size, size), fp32.
        alpha: Q is scaled down to the norm alpha * out where it is larger. 0 is no limit.
        rescale: (out,) or None.
        axes: Axes of the weight, and of `rescale` in LyCORIS's files.
    """

    label = "OFT"
    needs_weight = True

    blocks: np.ndarray
    alpha: float = 0.0
    rescale: np.ndarray | None = None
    axes: int = 2

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.blocks.shape[0] * self.blocks.shape[1], 1)

    def rotations(self) -> np.ndarray:
        """Return R (number of blocks, size, size), fp32."""
        skew = (self.blocks - self.blocks.transpose(0, 2, 1)).astype(np.float64)
        norm, limit = float(np.linalg.norm(skew)) + 1e-8, self.alpha * self.shape[0]
        if 0 < limit < norm:
            skew = skew * (limit / norm)
        identity = np.eye(skew.shape[1])
        rotations: np.ndarray = (identity + skew) @ np.linalg.inv(identity - skew)
        return rotations.astype(np.float32)

    def _matrices(self, strength: float) -> np.ndarray:
        """Return what the blocks of rows of a weight are multiplied by."""
        rotations = self.rotations().transpose(0, 2, 1)
        if self.rescale is not None:
            rotations = rotations * self.rescale.reshape(*self.blocks.shape[:2], 1)
        identity = np.eye(self.blocks.shape[1], dtype=np.float32)
        return identity + np.float32(strength) * (rotations - identity)

    def delta(self, weight: np.ndarray | None = None) -> np.ndarray:
        weight = _needed(weight)
        identity = np.eye(self.blocks.shape[1], dtype=np.float32)
        rows = weight.astype(np.float32).reshape(*self.blocks.shape[:2], -1)
        return ((self._matrices(1.0) - identity) @ rows).reshape(weight.shape)

    def restore(self, merged: np.ndarray, strength: float = 1.0) -> np.ndarray:
        rows = merged.astype(np.float32).reshape(*self.blocks.shape[:2], -1)
        try:
            restored: np.ndarray = np.linalg.solve(self._matrices(strength), rows)
        except np.linalg.LinAlgError:
            raise UserError(
                f"at strength {strength:g} the rotation has no inverse: load the base model again"
            ) from None
        return restored.reshape(merged.shape)

    def arrays(self) -> dict[str, np.ndarray]:
        arrays = {"oft_blocks": self.blocks, "alpha": scalar(self.alpha)}
        if self.rescale is not None:
            arrays["rescale"] = self.rescale.reshape(-1, *(1,) * (self.axes - 1))
        return arrays

    def largest(self, strength: float = 1.0) -> float:
        return max(1.0, abs(strength)) * (1.0 if self.rescale is None else largest_value(self.rescale))

    def is_zero(self) -> bool:
        return not (self.blocks - self.blocks.transpose(0, 2, 1)).any() and (
            self.rescale is None or bool((self.rescale == 1).all())
        )

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) in (2, 4) and shape[0] == self.shape[0]

    def reshaped(self, shape: tuple[int, ...]) -> OFT:
        return replace(self, axes=len(shape))


@dataclass(frozen=True)
class DoRA(LayerUpdate):
    """A direction and a magnitude: W' = W + strength * (m * (W + d) / |W + d| - W), d the update of `direction`.

    The strength is applied to the whole difference, as in ComfyUI.

    Attributes:
        direction: The update d of another kind.
        magnitude: m, (out,) or (in,), fp32.
        on_input: Whether m and the norms are by input (older LyCORIS, OneTrainer) instead of by output (LyCORIS, PEFT).
    """

    needs_weight = True

    direction: LayerUpdate
    magnitude: np.ndarray
    on_input: bool = False

    @property
    def label(self) -> str:  # type: ignore[override]
        return "DoRA" if isinstance(self.direction, LoRALayer) else f"DoRA of {self.direction.label}"

    @property
    def rank(self) -> int | None:
        return self.direction.rank

    @property
    def shape(self) -> tuple[int, ...]:
        return self.direction.shape

    def delta(self, weight: np.ndarray | None = None) -> np.ndarray:
        weight = _needed(weight).astype(np.float32)
        changed = weight + self.direction.delta(weight).reshape(weight.shape)
        return changed * (self._along(weight) / (weight_norms(changed, self.on_input) + EPSILON)) - weight

    def restore(self, merged: np.ndarray, strength: float = 1.0) -> np.ndarray:
        if not strength:
            return merged.astype(np.float32)
        raise UserError(
            "a DoRA replaces the norms of the weights, which cannot be computed from the merged ones: load the base "
            "model again, or let Pipeline.set_loras exchange it, which keeps the base model"
        )

    def _along(self, weight: np.ndarray) -> np.ndarray:
        axis = 1 if self.on_input else 0
        return self.magnitude.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])

    def arrays(self) -> dict[str, np.ndarray]:
        axes = max(len(self.shape), 2)
        shape = [-1 if i == int(self.on_input) else 1 for i in range(axes)]
        return {**self.direction.arrays(), "dora_scale": self.magnitude.reshape(shape)}

    def largest(self, strength: float = 1.0) -> float:
        return max(self.direction.largest(), abs(strength) * largest_value(self.magnitude))

    def is_zero(self) -> bool:
        return False  # only the weight tells

    def fits(self, shape: tuple[int, ...]) -> bool:
        return self.direction.fits(shape) and shape[1 if self.on_input else 0] == len(self.magnitude)

    def misfit(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.magnitude.shape if self.direction.fits(shape) else self.direction.misfit(shape)

    def reshaped(self, shape: tuple[int, ...]) -> DoRA:
        return replace(self, direction=self.direction.reshaped(shape))


def direction_of(layer: LayerUpdate) -> LayerUpdate:
    """Return the update without a DoRA's magnitude."""
    return layer.direction if isinstance(layer, DoRA) else layer


def weight_norms(weight: np.ndarray, on_input: bool = False) -> np.ndarray:
    """Return the norms of a weight's rows, or of its columns with `on_input`, with the weight's number of axes."""
    axes = tuple(i for i in range(weight.ndim) if i != int(on_input))
    norms: np.ndarray = np.sqrt(np.sum(np.square(weight), axis=axes, keepdims=True))
    return norms


def update_shape(down: tuple[int, ...], up: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the update, (out, in) or (out, in, k, k), given the shapes of the factors.

    Raises:
        ValueError: The shapes are not those of a pair of factors.
    """
    shapes = f"down {down} and up {up}"
    if len(down) not in (2, 4) or len(up) not in (2, 4):
        raise ValueError(f"{shapes} must have 2 or 4 axes")
    if down[0] != up[1] or any(size != 1 for size in up[2:]):
        raise ValueError(f"{shapes} are no pair of factors")
    if not down[0]:
        raise ValueError(f"{shapes} are of rank 0: they hold nothing")
    return (up[0], *down[1:])


def with_mid(down: np.ndarray, mid: np.ndarray) -> np.ndarray:
    """Multiply LyCORIS's third factor (rank, rank, k, k) into down (rank, in[, 1, 1]): (rank, in, k, k)."""
    with np.errstate(over="ignore", invalid="ignore"):
        product: np.ndarray = np.einsum("rskl,si->rikl", mid, down.reshape(len(down), -1))
    return product


def _needed(weight: np.ndarray | None) -> np.ndarray:
    if weight is None:
        raise ValueError("this update depends on the weight")
    return weight


def largest_value(array: np.ndarray) -> float:
    """Return the largest absolute value of an array, 0 of an empty one."""
    return float(np.abs(array).max(initial=0.0))


def scalar(number: float) -> np.ndarray:
    """Return a number as an array for a file, in fp64, which holds every alpha."""
    return np.array(number, np.float64)
