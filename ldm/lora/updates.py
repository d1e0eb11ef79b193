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

The last three depend on W. All compute in fp32.
"""

from __future__ import annotations

import math
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
        return {"lora_down.weight": self.down, "lora_up.weight": self.up, "alpha": _scalar(self.alpha)}

    def largest(self, strength: float = 1.0) -> float:
        up, down = _largest(self.up), _largest(self.down)
        factor = abs(strength * self.alpha)
        return max(factor / self.rank, up * down * max(self.rank, factor))

    def is_zero(self) -> bool:
        return not (self.alpha and self.up.any() and self.down.any())

    def reshaped(self, shape: tuple[int, ...]) -> LoRALayer:
        up_shape = (*self.up.shape[:2], *(1,) * (len(shape) - 2))
        return replace(self, down=self.down.reshape(self.rank, *shape[1:]), up=self.up.reshape(up_shape))


@dataclass(frozen=True)
class Product(LayerUpdate):
    """Superclass of LoHa and LoKr: a matrix made of factors, times a scale.

    Attributes:
        factors: Name in LyCORIS's files -> fp32 array.
        alpha: The update is multiplied by alpha / rank.
        weight_shape: The shape of the weight, where it is known to be that of a convolution.
    """

    factors: dict[str, np.ndarray]
    alpha: float
    weight_shape: tuple[int, ...] | None = None

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return self.alpha / self.rank if self.rank else 1.0

    def arrays(self) -> dict[str, np.ndarray]:
        return {**self.factors, "alpha": _scalar(self.alpha)}

    def fits(self, shape: tuple[int, ...]) -> bool:
        own = self.shape
        return len(shape) in (2, 4) and own[0] == shape[0] and math.prod(own[1:]) == math.prod(shape[1:])

    def reshaped(self, shape: tuple[int, ...]) -> Product:
        return replace(self, weight_shape=shape)

    def _largest_of(self, name: str, tucker: str) -> float:
        """Return a bound for a matrix that is whole, of two parts, or in Tucker's form, and for what makes it up."""
        if name in self.factors:
            return _largest(self.factors[name])
        a, b = self.factors[f"{name}_a"], self.factors[f"{name}_b"]
        largest = [_largest(a), _largest(b), _largest(a) * _largest(b) * len(b)]
        if tucker in self.factors:
            core = _largest(self.factors[tucker]) * len(b)
            largest = [core, core * largest[0], core * largest[1], core * len(b) * largest[0] * largest[1]]
        return max(largest)


@dataclass(frozen=True)
class LoHa(Product):
    """A Hadamard product of two low-rank matrices: alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b).

    The factors are `hada_w1_a` and `hada_w2_a` (out, rank) and `hada_w1_b` and `hada_w2_b` (rank, in * k * k). In
    Tucker's form `hada_t1` and `hada_t2` (rank, rank, k, k) stand between factors (rank, out) and (rank, in).
    """

    label = "LoHa"

    @property
    def rank(self) -> int:
        return self.factors["hada_w1_b"].shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight_shape or loha_shape({name: array.shape for name, array in self.factors.items()})

    def delta(self, weight: np.ndarray | None = None) -> np.ndarray:
        halves = []
        for half in "12":
            a, b = self.factors[f"hada_w{half}_a"], self.factors[f"hada_w{half}_b"]
            tucker = self.factors.get(f"hada_t{half}")
            halves.append(a @ b if tucker is None else tucker_product(tucker, a, b))
        return (halves[0] * halves[1] * np.float32(self.scale)).reshape(self.shape)

    def is_zero(self) -> bool:
        return not (self.alpha and all(factor.any() for factor in self.factors.values()))

    def largest(self, strength: float = 1.0) -> float:
        first, second = (self._largest_of(f"hada_w{half}", f"hada_t{half}") for half in "12")
        return max(first, second, first * second * max(1.0, abs(self.scale), abs(strength * self.scale)))


@dataclass(frozen=True)
class LoKr(Product):
    """A Kronecker product: alpha / rank * kron(w1, w2).

    Each of the two is whole (`lokr_w1`, `lokr_w2`) or a product of two factors (`lokr_w1_a` @ `lokr_w1_b`). In Tucker's
    form `lokr_t2` (rank, rank, k, k) stands between `lokr_w2_a` (rank, out) and `lokr_w2_b` (rank, in). The rank is
    that of the factored one. Where both are whole, alpha has no effect.
    """

    label = "LoKr"

    @property
    def rank(self) -> int | None:
        factored = [self.factors[name] for name in ("lokr_w1_b", "lokr_w2_b") if name in self.factors]
        return factored[0].shape[0] if factored else None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight_shape or lokr_shape({name: array.shape for name, array in self.factors.items()})

    def delta(self, weight: np.ndarray | None = None) -> np.ndarray:
        first = self._whole("1")
        second = self._whole("2")
        product = np.kron(first, second.reshape(len(second), -1))
        return (product * np.float32(self.scale)).reshape(self.shape)

    def _whole(self, half: str) -> np.ndarray:
        """Return w1 or w2, multiplied out."""
        whole = self.factors.get(f"lokr_w{half}")
        if whole is not None:
            return whole
        a, b = self.factors[f"lokr_w{half}_a"], self.factors[f"lokr_w{half}_b"]
        tucker = self.factors.get(f"lokr_t{half}")
        return a @ b if tucker is None else tucker_product(tucker, a, b)

    def is_zero(self) -> bool:
        return not all(factor.any() for factor in self.factors.values()) or not self.scale

    def largest(self, strength: float = 1.0) -> float:
        first, second = (self._largest_of(f"lokr_w{half}", f"lokr_t{half}") for half in "12")
        return max(first, second, first * second * max(1.0, abs(self.scale), abs(strength * self.scale)))


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
        return max(1.0, abs(strength)) * _largest(self.difference)

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
        return {"weight": weight, "on_input": _scalar(self.on_input)}

    def largest(self, strength: float = 1.0) -> float:
        return max(1.0, abs(strength)) * _largest(self.multipliers)

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
        arrays = {"oft_blocks": self.blocks, "alpha": _scalar(self.alpha)}
        if self.rescale is not None:
            arrays["rescale"] = self.rescale.reshape(-1, *(1,) * (self.axes - 1))
        return arrays

    def largest(self, strength: float = 1.0) -> float:
        return max(1.0, abs(strength)) * (1.0 if self.rescale is None else _largest(self.rescale))

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
        return max(self.direction.largest(), abs(strength) * _largest(self.magnitude))

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


def loha_shape(shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Return the shape of a LoHa's update, given those of its factors. Raises ValueError if they do not go together."""
    halves = [_matrix_shape(shapes, f"hada_w{half}", f"hada_t{half}") for half in "12"]
    if halves[0] != halves[1]:
        raise ValueError(f"its two matrices are {halves[0]} and {halves[1]}")
    if shapes["hada_w1_b"][0] != shapes["hada_w2_b"][0]:
        raise ValueError("its two matrices are of different ranks")
    return halves[0]


def lokr_shape(shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Return the shape of a LoKr's update, given those of its factors. Raises ValueError if they do not go together."""
    first, second = (_matrix_shape(shapes, f"lokr_w{half}", f"lokr_t{half}") for half in "12")
    if len(first) != 2:
        raise ValueError(f"lokr_w1 is {first}, not a matrix")
    return (first[0] * second[0], first[1] * second[1], *second[2:])


def _matrix_shape(shapes: dict[str, tuple[int, ...]], name: str, tucker: str) -> tuple[int, ...]:
    """Return the shape of a factor that is whole, of two parts, or in Tucker's form."""
    if name in shapes:
        if len(shapes[name]) not in (2, 4) or not math.prod(shapes[name]):
            raise ValueError(f"{name} is {shapes[name]}, neither a matrix nor a kernel")
        return shapes[name]
    missing = next((part for part in (f"{name}_a", f"{name}_b") if part not in shapes), None)
    if missing:
        raise ValueError(f"{missing} is missing")
    a, b = shapes[f"{name}_a"], shapes[f"{name}_b"]
    if len(a) != 2 or len(b) != 2 or not math.prod(a + b):
        raise ValueError(f"{name}_a is {a} and {name}_b {b}, not two matrices")
    core = shapes.get(tucker)
    if core is None:
        if a[1] != b[0]:
            raise ValueError(f"{name}_a {a} and {name}_b {b} are no pair of factors")
        return (a[0], b[1])
    if len(core) != 4 or core[:2] != (a[0], b[0]) or not math.prod(core):
        raise ValueError(f"{tucker} {core} does not go with {name}_a {a} and {name}_b {b}")
    return (a[1], b[1], *core[2:])


def tucker_product(core: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return sum_ij core[i, j] a[i, p] b[j, r] as (p, r, k, k), for core (i, j, k, k)."""
    product: np.ndarray = np.einsum("ijkl,ip,jr->prkl", core, a, b, optimize=True)
    return product


def with_mid(down: np.ndarray, mid: np.ndarray) -> np.ndarray:
    """Multiply LyCORIS's third factor (rank, rank, k, k) into down (rank, in[, 1, 1]): (rank, in, k, k)."""
    with np.errstate(over="ignore", invalid="ignore"):
        product: np.ndarray = np.einsum("rskl,si->rikl", mid, down.reshape(len(down), -1))
    return product


def _needed(weight: np.ndarray | None) -> np.ndarray:
    if weight is None:
        raise ValueError("this update depends on the weight")
    return weight


def _largest(array: np.ndarray) -> float:
    return float(np.abs(array).max(initial=0.0))


def _scalar(number: float) -> np.ndarray:
    return np.array(number, np.float64)
