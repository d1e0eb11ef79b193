"""LoHa and LoKr, the updates of LyCORIS that are products of small matrices (see ldm.lora.updates for all kinds)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from ldm.lora.updates import LayerUpdate, largest_value, scalar


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
        return {**self.factors, "alpha": scalar(self.alpha)}

    def fits(self, shape: tuple[int, ...]) -> bool:
        own = self.shape
        return len(shape) in (2, 4) and own[0] == shape[0] and math.prod(own[1:]) == math.prod(shape[1:])

    def reshaped(self, shape: tuple[int, ...]) -> Product:
        return replace(self, weight_shape=shape)

    def _largest_of(self, name: str, tucker: str) -> float:
        """Return a bound for a matrix that is whole, of two parts, or in Tucker's form, and for what makes it up."""
        if name in self.factors:
            return largest_value(self.factors[name])
        a, b = self.factors[f"{name}_a"], self.factors[f"{name}_b"]
        largest = [largest_value(a), largest_value(b), largest_value(a) * largest_value(b) * len(b)]
        if tucker in self.factors:
            core = largest_value(self.factors[tucker]) * len(b)
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
