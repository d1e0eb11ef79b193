"""Canonical parameter names, and the mapping of a checkpoint's keys to them.

Canonical names are those of the published single files of Stable Diffusion 1, with `weight` and `bias` for norms, and
Hugging Face's names for every text encoder, that of SD2 included. Each other family of names is a table in a module
beside this one. A mapping is made of keys alone, so a checkpoint is judged before an array is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from ldm.errors import UserError, plain
from ldm.weights.arrays import Arrays
from ldm.weights.names import compvis, diffusers, mindone
from ldm.weights.names.tables import COMPONENTS, UNET_PREFIX, Ignored
from ldm.weights.names.unused import find_unused

FOLDERS = tuple(f"{component}/" for component in COMPONENTS)  # of a diffusers folder
LABELS = {"unet": "UNet", "vae": "VAE", "text_encoder": "text encoder", "other": "other"}


@dataclass(frozen=True)
class Source:
    """Where a canonical array comes from.

    Attributes:
        name: Key in the checkpoint.
        part: Which of the equal blocks of the key's rows it is.
        parts: Number of the blocks.
    """

    name: str
    part: int = 0
    parts: int = 1


@dataclass
class KeyMap:
    """The keys of a checkpoint in terms of canonical names.

    Attributes:
        family: "ldm", "mindone" or "diffusers".
        sources: Canonical name -> where its array comes from.
        ignored: Key that is not used -> reason.
        unknown: Keys that are not known.
    """

    family: str
    sources: dict[str, Source] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    def add(self, key: str, mapped: tuple[str, ...] | Ignored | None) -> None:
        """Add a key with what its table says. Raises UserError if another key has the same canonical name."""
        if mapped is None:
            self.unknown.append(key)
        elif isinstance(mapped, Ignored):
            self.ignored[key] = mapped.reason
        else:
            for part, name in enumerate(mapped):
                if name in self.sources:
                    raise UserError(
                        f"{plain(self.sources[name].name)} and {plain(key)} are both {name}: the file is damaged"
                    )
                self.sources[name] = Source(key, part, len(mapped))


def component_of(name: str) -> str:
    """Return the component of a canonical or a diffusers name: "unet", "vae", "text_encoder" or "other"."""
    for component, prefix in COMPONENTS.items():
        if name.startswith((prefix, f"{component}/")):
            return component
    return "other"


def detect_family(keys: Iterable[str]) -> str | None:
    """Return the family of names that keys belong to.

    Returns:
        "ldm" (CompVis, Stability AI and this project), "mindone", "diffusers" (`component/name`, as DiffusersFolder
        has them), or None for other keys.
    """
    keys = list(keys)
    if any(key.startswith(FOLDERS) for key in keys):
        return "diffusers"
    keys = [key for key in keys if key.startswith(tuple(COMPONENTS.values()))]
    if not keys:
        return None
    return "mindone" if any(mindone.is_typical(key) for key in keys) else "ldm"


def map_keys(keys: Iterable[str], ema: bool = False) -> KeyMap:
    """Map the keys of a checkpoint to canonical names.

    Args:
        keys: All keys of the checkpoint.
        ema: Take the moving averages of the UNet's weights (EMA) in place of the weights.

    Raises:
        UserError: The keys belong to no family, or moving averages are asked for and missing.
    """
    keys = list(keys)
    family = detect_family(keys)
    if family is None:
        raise UserError(f"no Stable Diffusion parameter among {len(keys)} names ({plain(', '.join(keys[:2]))}, ...)")
    key_map = KeyMap(family)
    map_key = {"ldm": compvis.map_key, "mindone": mindone.map_key}.get(family) or diffusers.key_mapper(keys)
    for key in keys:
        key_map.add(key, find_unused(key) or map_key(key))
    if ema:
        _use_averages(key_map)
    return key_map


def _use_averages(key_map: KeyMap) -> None:
    weights = {name: source.name for name, source in key_map.sources.items() if name.startswith(UNET_PREFIX)}
    averages = {name: compvis.ema_name(key) for name, key in weights.items()}
    count = sum(average in key_map.ignored for average in averages.values())
    if not count or count < len(weights):
        raise UserError(
            f"{count} of {len(weights)} UNet arrays have an EMA copy (model_ema. ...): leave out the flag for EMA"
        )
    for name, average in averages.items():
        key_map.ignored[weights[name]] = "weight that has an EMA copy"
        del key_map.ignored[average]
        key_map.sources[name] = Source(average)


class CanonicalArrays(Arrays):
    """The arrays of a checkpoint under canonical names. Each one is read when it is asked for.

    Args:
        checkpoint: The arrays under their own keys.
        key_map: The mapping of these keys.
        shapes: Canonical name -> shape in the model, for arrays that have another one (a 1x1 convolution for a linear
            layer). Arrays that are not named have the shape in the checkpoint, and projections in the attention of
            the VAE are 1x1 convolutions.
    """

    def __init__(self, checkpoint: Arrays, key_map: KeyMap, shapes: Mapping[str, tuple[int, ...]] | None = None):
        self._checkpoint = checkpoint
        self._sources = key_map.sources
        self._shapes = shapes or {}

    def spec(self, name: str) -> tuple[np.dtype, tuple[int, ...]]:
        source = self._sources[name]
        dtype, shape = self._checkpoint.spec(source.name)
        shape = source_shape(shape, source)
        is_projection = ".attn_1." in name and len(shape) == 2
        return dtype, tuple(self._shapes.get(name) or (shape + (1, 1) if is_projection else shape))

    def __getitem__(self, name: str) -> np.ndarray:
        return read_source(self._checkpoint, self._sources[name]).reshape(self.shape(name))

    def release(self, name: str) -> None:
        self._checkpoint.release(self._sources[name].name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


def read_source(arrays: Mapping[str, np.ndarray], source: Source) -> np.ndarray:
    """Return the array of a source. A block of rows is a view."""
    array = arrays[source.name]
    if source.parts == 1:
        return array
    rows = array.shape[0] // source.parts
    return array[source.part * rows : (source.part + 1) * rows]


def source_shape(shape: tuple[int, ...], source: Source) -> tuple[int, ...]:
    """Return the shape of a source's array, given that of its key.

    It is unchanged, and therefore found to be wrong later, if the rows cannot be divided into equal blocks.
    """
    if source.parts == 1 or not shape or shape[0] % source.parts:
        return tuple(shape)
    return (shape[0] // source.parts, *shape[1:])


def same_up_to_1x1(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether shapes are equal, or those of a linear layer (M, N) and a 1x1 convolution (M, N, 1, 1)."""
    return tuple(a) == tuple(b) or (
        {len(a), len(b)} == {2, 4} and tuple(a[:2]) == tuple(b[:2]) and all(size == 1 for size in (*a[2:], *b[2:]))
    )
