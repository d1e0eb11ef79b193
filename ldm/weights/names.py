"""Canonical parameter names, and the plan by which a checkpoint of another family becomes them.

Canonical are the published single-file names of Stable Diffusion 1 with `weight` and `bias` for norms, and Hugging
Face's names for every text encoder (SD2's OpenCLIP as well). Each family of names has one file beside this one, with a
function that says for a single key where it goes; a plan is those answers for all the keys of a file. A plan is made of
names alone, so a file can be judged before anything is read and read one array at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from ldm.errors import UserError
from ldm.weights import compvis, mindone
from ldm.weights.placing import Ignored, Place

COMPONENTS = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.",
}
LABELS = {"unet": "UNet", "vae": "VAE", "text_encoder": "text encoder", "other": "other"}


@dataclass(frozen=True)
class Source:
    """Where a canonical array comes from: a key of the file, and which of `parts` equal blocks of its rows."""

    name: str
    part: int = 0
    parts: int = 1


@dataclass
class Plan:
    """Canonical name -> Source for a family of names; keys known to be of no use with the reason; keys not known."""

    family: str
    sources: dict[str, Source] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    def add(self, key: str, placed: Ignored | list[Place] | None) -> None:
        """Note where `key` goes. Raises UserError if something is there already."""
        if placed is None:
            self.unknown.append(key)
        elif isinstance(placed, Ignored):
            self.ignored[key] = placed.reason
        else:
            for place in placed:
                if place.name in self.sources:
                    raise UserError(f"{self.sources[place.name].name} and {key} both stand for {place.name}")
                self.sources[place.name] = Source(key, place.part, place.parts)


def component_of(name: str) -> str:
    """"unet", "vae" or "text_encoder" for a canonical name, "other" for anything else."""
    return next((component for component, prefix in COMPONENTS.items() if name.startswith(prefix)), "other")


def detect_family(names: Iterable[str]) -> str | None:
    """"ldm" (CompVis, Stability AI and this project's own), "mindone", or None for neither."""
    names = [name for name in names if name.startswith(tuple(COMPONENTS.values()))]
    if not names:
        return None
    return "mindone" if any(mindone.is_typical(name) for name in names) else "ldm"


def plan_names(names: Iterable[str]) -> Plan:
    """The plan for the keys of a single-file checkpoint. Raises UserError if no family has such names."""
    names = list(names)
    family = detect_family(names)
    if family is None:
        raise UserError(f"no Stable Diffusion parameter among {len(names)} names ({', '.join(names[:2])}, ...)")
    plan, place = Plan(family), {"ldm": compvis.place, "mindone": mindone.place}[family]
    for name in names:
        plan.add(name, place(name))
    return plan


def to_canonical(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of a single-file checkpoint under their canonical names; ignored keys are left out.

    Raises UserError if a key is not known.
    """
    plan = plan_names(arrays)
    if plan.unknown:
        raise UserError(f"{len(plan.unknown)} unknown names: {', '.join(plan.unknown[:3])}")
    return {name: take(arrays, source) for name, source in plan.sources.items()}


def take(arrays: Mapping[str, np.ndarray], source: Source) -> np.ndarray:
    """The array that `source` names; a block of rows is a view."""
    array = arrays[source.name]
    if source.parts == 1:
        return array
    rows = array.shape[0] // source.parts
    return array[source.part * rows : (source.part + 1) * rows]


def taken_shape(shape: tuple[int, ...], source: Source) -> tuple[int, ...]:
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
