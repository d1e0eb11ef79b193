"""A LoRA in memory: for each layer what it adds to the weight, and what is known about its base model.

Most layers have a pair of low-rank factors: dW = strength * (alpha / rank) * up @ down (Hu et al. 2021, with alpha as
in kohya and PEFT). ldm.lora.updates has the other kinds. The strength is chosen at generation. A scale that the LoRA
was trained with is part of its alpha. Layers have canonical names, which each file format is translated to and from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ldm.errors import UserError, plain
from ldm.lora.products import Product
from ldm.lora.updates import Full, LayerUpdate, LoRALayer, direction_of
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


@dataclass
class LoRA:
    """Updates for the layers of a base model.

    Attributes:
        layers: Canonical layer name -> the update of its weight.
        biases: Canonical layer name -> the update of its bias, (out,).
        metadata: What is known about the base model, "architecture" and "prediction_type" as in ModelConfig, and about
            the noise levels of the training, "min_timestep" and "max_timestep" (excluded), and "zero_terminal_snr". A
            key is absent where the file does not say.
        file_metadata: What a file says for other projects, under keys that begin with one of SHARED_PREFIXES: kohya's
            and Stability AI's, and the digests of the training's inputs. kohya's form keeps them.
        embeddings: Learned tokens (textual inversion) that the file bundles: name -> vectors (count, channels), fp32.
    """

    layers: Mapping[str, LayerUpdate]
    metadata: dict[str, str] = field(default_factory=dict)
    embeddings: dict[str, np.ndarray] = field(default_factory=dict)
    biases: Mapping[str, Full] = field(default_factory=dict)
    file_metadata: dict[str, str] = field(default_factory=dict)

    def only(self, component: str) -> LoRA:
        """Return the part for "unet" or "text_encoder", which may be empty. Learned tokens are the text encoder's."""
        prefix = COMPONENTS[component]
        layers = {name: layer for name, layer in self.layers.items() if name.startswith(prefix)}
        biases = {name: bias for name, bias in self.biases.items() if name.startswith(prefix)}
        embeddings = dict(self.embeddings) if component == "text_encoder" else {}
        return LoRA(layers, dict(self.metadata), embeddings, biases)

    def updates(self) -> dict[str, LayerUpdate]:
        """Return the canonical name of each parameter that the LoRA changes -> its update."""
        weights = {f"{name}.weight": layer for name, layer in self.layers.items()}
        return {**weights, **{f"{name}.bias": bias for name, bias in self.biases.items()}}

    def pairs(self, path: str = "the LoRA") -> dict[str, LoRALayer]:
        """Return the layers, if all are pairs of low-rank factors.

        Args:
            path: Name of the LoRA in the error.

        Raises:
            UserError: It has layers of other kinds, or biases.
        """
        others = {name: layer.label for name, layer in self.layers.items() if not isinstance(layer, LoRALayer)}
        others.update({f"{name}.bias": "bias" for name in self.biases})
        if others:
            counts = Counter(others.values())
            raise UserError(
                f"{path} holds more than pairs of low-rank factors "
                f"({', '.join(f'{count} {label}' for label, count in counts.items())}, such as {min(others)}): "
                "tools/lora/convert_lora.py --bake_energy 0.99 makes pairs of them, and says what is lost (DoRA, IA3 "
                "and OFT need --ckpt_path too)"
            )
        return {name: layer for name, layer in self.layers.items() if isinstance(layer, LoRALayer)}

    def ranks(self) -> list[int]:
        """Return the distinct ranks of the layers, ascending, without those of kinds that have none."""
        return sorted({layer.rank for layer in self.layers.values() if layer.rank is not None})

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
        directions = map(direction_of, self.layers.values())
        alphas = sorted({layer.alpha for layer in directions if isinstance(layer, (LoRALayer, Product))})
        kinds = Counter(layer.label for layer in self.layers.values())
        facts = [", ".join(parts) or "no layers"]
        if kinds.keys() - {LoRALayer.label}:
            facts.append(", ".join(f"{count} {label}" for label, count in kinds.items()))
        if self.biases:
            facts.append(f"biases: {len(self.biases)}")
        if self.ranks():
            facts.append(f"rank {_first_values(self.ranks())}")
        if alphas:
            facts.append(f"alpha {_first_values(alphas)}")
        if self.embeddings:
            facts.append(f"learned tokens {plain(', '.join(self.embeddings))}")
        return "; ".join([*facts, *(f"{key} {value}" for key, value in self.metadata.items())])


def _first_values(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values[:4]) + (", ..." if len(values) > 4 else "")
