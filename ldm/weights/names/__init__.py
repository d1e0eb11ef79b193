"""Canonical parameter names, and the plan by which a checkpoint of another family becomes them.

Canonical are the published single-file names of Stable Diffusion 1 with `weight` and `bias` for norms, and Hugging
Face's names for every text encoder (SD2's OpenCLIP as well). Each family of names has one file beside this one, with a
function that says for a single key where it goes; a plan is those answers for all the keys of a file. A plan is made of
names alone, so a file can be judged before anything is read and read one array at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from ldm.errors import UserError, plain
from ldm.weights.arrays import Arrays
from ldm.weights.names import compvis, diffusers, mindone
from ldm.weights.names.tables import Ignored, Target
from ldm.weights.names.unused import find_unused

COMPONENTS = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.",
}
FOLDERS = ("unet/", "vae/", "text_encoder/")  # of a diffusers folder
LABELS = {"unet": "UNet", "vae": "VAE", "text_encoder": "text encoder", "other": "other"}


@dataclass(frozen=True)
class Source:
    """Where a canonical array comes from: a key of the file, and which of `parts` equal blocks of its rows."""

    name: str
    part: int = 0
    parts: int = 1


@dataclass
class KeyMap:
    """Canonical name -> Source for a family of names; keys known to be of no use with the reason; keys not known."""

    family: str
    sources: dict[str, Source] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    def add(self, key: str, placed: Ignored | list[Target] | None) -> None:
        """Note where `key` goes. Raises UserError if something is there already."""
        if placed is None:
            self.unknown.append(key)
        elif isinstance(placed, Ignored):
            self.ignored[key] = placed.reason
        else:
            for place in placed:
                if place.name in self.sources:
                    raise UserError(
                        f"{plain(self.sources[place.name].name)} and {plain(key)} both stand for "
                        f"{place.name}: the file is damaged"
                    )
                self.sources[place.name] = Source(key, place.part, place.parts)


def component_of(name: str) -> str:
    """ "unet", "vae" or "text_encoder" for a canonical name or a diffusers folder's, "other" for anything else."""
    prefixes = zip(COMPONENTS.items(), FOLDERS)
    return next((part for (part, prefix), folder in prefixes if name.startswith((prefix, folder))), "other")


def detect_family(names: Iterable[str]) -> str | None:
    """ "ldm" (CompVis, Stability AI and this project's own), "mindone", "diffusers" (a folder's `component/name`), or
    None for none of them.
    """
    names = list(names)
    if any(name.startswith(FOLDERS) for name in names):
        return "diffusers"
    names = [name for name in names if name.startswith(tuple(COMPONENTS.values()))]
    if not names:
        return None
    return "mindone" if any(mindone.is_typical(name) for name in names) else "ldm"


def map_keys(names: Iterable[str], ema: bool = False) -> KeyMap:
    """The plan for the keys of a checkpoint; `ema`: with the UNet's moving averages in place of its weights.

    Raises UserError if no family has such names, and where averages are asked for that are not there.
    """
    names = list(names)
    family = detect_family(names)
    if family is None:
        raise UserError(f"no Stable Diffusion parameter among {len(names)} names ({plain(', '.join(names[:2]))}, ...)")
    key_map = KeyMap(family)
    place = {"ldm": compvis.map_key, "mindone": mindone.map_key}.get(family) or diffusers.key_mapper(names)
    for name in names:
        key_map.add(name, find_unused(name) or place(name))
    if ema:
        _take_averages(key_map)
    return key_map


def _take_averages(key_map: KeyMap) -> None:
    unet = [name for name in key_map.sources if name.startswith(COMPONENTS["unet"])]
    averages = {name: compvis.ema_name(key_map.sources[name].name) for name in unet}
    there = [name for name in unet if averages[name] in key_map.ignored]
    if not there or len(there) < len(unet):
        raise UserError(
            f"{len(there)} of {len(unet)} UNet arrays have an EMA copy (model_ema. ...) in it: take the weights "
            "themselves, without the flag that asks for EMA"
        )
    for name in unet:
        key_map.ignored[key_map.sources[name].name] = "weight that has an EMA copy"
        del key_map.ignored[averages[name]]
        key_map.sources[name] = Source(averages[name])


class CanonicalArrays(Arrays):
    """The arrays of a checkpoint under their canonical names, each made when it is asked for.

    `shapes`: what a model wants, for arrays that have another one (a 1x1 convolution for a linear layer); without it
    the VAE's attention is taken for convolutions.
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
    """The array that `source` names; a block of rows is a view."""
    array = arrays[source.name]
    if source.parts == 1:
        return array
    rows = array.shape[0] // source.parts
    return array[source.part * rows : (source.part + 1) * rows]


def source_shape(shape: tuple[int, ...], source: Source) -> tuple[int, ...]:
    """The shape that `take` gives for an array of `shape`; unchanged, hence wrong, where the rows do not divide."""
    if source.parts == 1 or not shape or shape[0] % source.parts:
        return tuple(shape)
    return (shape[0] // source.parts, *shape[1:])


def same_up_to_1x1(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether the shapes are equal but for trailing ones: a linear layer (a, b) and a 1x1 convolution (a, b, 1, 1)."""
    return tuple(found) == tuple(wanted) or (
        {len(found), len(wanted)} == {2, 4}
        and tuple(found[:2]) == tuple(wanted[:2])
        and all(size == 1 for size in (*found[2:], *wanted[2:]))
    )
