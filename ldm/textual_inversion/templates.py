"""Captions for images that have none with the learned token, as textual inversion (Gal et al. 2022) trains it.

The words around the token change from step to step, so that the token learns what the images have in common and not
what a caption says. diffusers and mindone have such lists too.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "object": (
        "{}", "a {}", "the {}", "one {}", "an image of {}", "an image of a {}", "an image of the {}", "a small {}",
        "a large {}", "a clear view of a {}", "a {} in the middle", "a {} seen from near", "this is a {}",
    ),
    "style": (
        "{}", "{} style", "in {} style", "an image in {} style", "something in {} style", "in the style of {}",
        "an image in the style of {}", "a thing in the style of {}", "a scene in the style of {}", "drawn like {}",
        "made in the style of {}", "a detail in {} style",
    ),
}  # fmt: skip


def draw_template(learnable_property: str, token: str, rng: np.random.Generator) -> str:
    """Return a caption with the token for an "object" or a "style"."""
    templates = TEMPLATES[learnable_property]
    return templates[int(rng.integers(len(templates)))].format(token)
