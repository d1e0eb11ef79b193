"""A LoRA in memory: for each layer the factors down and up, and their alpha.

The update of a layer is dW = strength * (alpha / rank) * up @ down (Hu et al. 2021, with alpha as in kohya and PEFT).
The strength is chosen at generation. A scale that the LoRA was trained with is part of its alpha. Layers go by their
canonical names, which every file format is translated to and from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ldm.settings.model import model_metadata
from ldm.weights.names import COMPONENTS, LABELS

TIMESTEPS = ("min_timestep", "max_timestep")  # keys of the metadata, both or none
ZERO_TERMINAL_SNR = "zero_terminal_snr"  # key of the metadata, "True" or absent
SHARED_PREFIXES = ("ss_", "modelspec.", "passport.")  # of keys in LoRA.file_metadata


def lora_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return what this project reads of a LoRA file's metadata, see LoRA. Other words under these keys are ignored."""
    known = model_metadata(metadata)
    low, end = (metadata.get(key, "") for key in TIMESTEPS)
    if low.isdecimal() and end.isdecimal() and len(low + end) < 20 and int(low) < int(end):
        known.update(timesteps_metadata(range(int(low), int(end))))
    if "True" in (metadata.get(ZERO_TERMINAL_SNR), metadata.get(f"ss_{ZERO_TERMINAL_SNR}")):  # the latter of kohya
        known[ZERO_TERMINAL_SNR] = "True"
    return known


def shared_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return what a file says for other projects, see LoRA.file_metadata."""
    return {key: text for key, text in metadata.items() if key.startswith(SHARED_PREFIXES)}


def timesteps_metadata(timesteps: range) -> dict[str, str]:
    """Return the metadata of a LoRA that is trained on these time steps alone."""
    return dict(zip(TIMESTEPS, (str(timesteps.start), str(timesteps.stop))))


@dataclass(frozen=True)
class LoRALayer:
    """The factors of one layer, fp32.

    Attributes:
        down: (rank, in) for a linear layer, (rank, in, k, k) for a convolution.
        up: (out, rank) or (out, rank, 1, 1).
        alpha: The update is multiplied by alpha / rank.
    """

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
        """The shape of the update and of the weight it is for: (out, in) or (out, in, k, k)."""
        return (self.up.shape[0], *self.down.shape[1:])

    def matrices(self) -> tuple[np.ndarray, np.ndarray]:
        """Up as (out, rank) and down as (rank, in) or (rank, in * k * k)."""
        return self.up.reshape(-1, self.rank), self.down.reshape(self.rank, -1)

    def update(self, strength: float = 1.0) -> np.ndarray:
        """Compute strength * (alpha / rank) * up @ down in fp32."""
        up, down = self.matrices()
        product = up.astype(np.float32) @ down.astype(np.float32)
        product *= np.float32(strength * self.alpha / self.rank)
        return product.reshape(self.shape)

    def largest(self, strength: float = 1.0) -> float:
        """Return a bound for the values that `update` computes, without multiplying the factors."""
        up, down = (float(np.abs(factor).max(initial=0.0)) for factor in (self.up, self.down))
        factor = abs(strength * self.alpha)
        return max(factor / self.rank, up * down * max(self.rank, factor))

    def is_zero(self) -> bool:
        """Whether the update is zero everywhere because alpha or a factor is."""
        return not (self.alpha and self.up.any() and self.down.any())


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


@dataclass
class LoRA:
    """Low-rank updates for the layers of a base model.

    Attributes:
        layers: Canonical layer name -> LoRALayer.
        metadata: What is known about the base model, "architecture" and "prediction_type" as in ModelConfig, and about
            the noise levels of the training, "min_timestep" and "max_timestep" (excluded), and "zero_terminal_snr". A
            key is absent where the file does not say.
        file_metadata: What a file says for other projects, under keys that begin with one of SHARED_PREFIXES: kohya's
            and Stability AI's, and the digests of the training's inputs. kohya's form keeps them.
        embeddings: Learned tokens (textual inversion) that the file bundles: name -> vectors (count, channels), fp32.
    """

    layers: dict[str, LoRALayer]
    metadata: dict[str, str] = field(default_factory=dict)
    embeddings: dict[str, np.ndarray] = field(default_factory=dict)
    file_metadata: dict[str, str] = field(default_factory=dict)

    def only(self, component: str) -> LoRA:
        """Return the part for "unet" or "text_encoder", which may be empty."""
        prefix = COMPONENTS[component]
        layers = {name: layer for name, layer in self.layers.items() if name.startswith(prefix)}
        return LoRA(layers, dict(self.metadata))

    def ranks(self) -> list[int]:
        """Return the distinct ranks of the layers, ascending."""
        return sorted({layer.rank for layer in self.layers.values()})

    @property
    def timesteps(self) -> range | None:
        """The time steps that the LoRA was trained on, or None for all of them."""
        return range(*(int(self.metadata[key]) for key in TIMESTEPS)) if TIMESTEPS[0] in self.metadata else None

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether the LoRA was trained on a schedule whose last time step is noise alone."""
        return ZERO_TERMINAL_SNR in self.metadata

    def zero_layers(self) -> list[str]:
        """Return the names of the layers whose update is zero."""
        return [name for name, layer in self.layers.items() if layer.is_zero()]

    def __str__(self) -> str:
        counts = {component: len(self.only(component).layers) for component in COMPONENTS}
        parts = [f"{LABELS[component]}: {count} layers" for component, count in counts.items() if count]
        alphas = sorted({layer.alpha for layer in self.layers.values()})
        return (
            f"{', '.join(parts) or 'no layers'}; rank {_first_values(self.ranks())}; alpha {_first_values(alphas)}"
            f"{''.join(f'; {key} {value}' for key, value in self.metadata.items())}"
        )


def _first_values(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values[:4]) + (", ..." if len(values) > 4 else "")
