"""The settings of training that concern textual inversion, under the names of mindone and diffusers.

TrainSettings holds them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Optional

from ldm.errors import UserError
from ldm.settings.declare import names_of, setting

MOST_VECTORS = 64  # so that a template around the token fits into the 75 tokens of a prompt
PROPERTIES = ("object", "style")

_ti_setting = partial(
    setting,
    graph_key=True,
    not_in_diffusers="diffusers' LoRA training learns no token; its textual inversion is another",
)


@dataclass
class TextualInversionSettings:
    """Which token is learned, and from what."""

    placeholder_token: Optional[str] = _ti_setting(
        None,
        "learn the vectors of this token, such as <cat-toy>, for prompts: alone, or with use_lora together with the "
        "LoRA (pivotal tuning)",
        group="textual inversion",
        resume="fixed",
        aliases=("token_string",),
    )
    initializer_token: Optional[str] = _ti_setting(
        None,
        "word that the vectors start as, such as toy; None: random ones as large as those of words",
        resume="fixed",
        needs="placeholder_token",
        aliases=("init_word",),
    )
    num_vectors: int = _ti_setting(
        1,
        "vectors of the token, each of which takes the place of a token in the prompt",
        low=1,
        high=MOST_VECTORS,
        resume="fixed",
        needs="placeholder_token",
        aliases=("num_vectors_per_token",),
    )
    learnable_property: Optional[str] = _ti_setting(
        "object",
        "captions without the token, and images without a caption, get templates with it, for an object or a style; "
        "None: captions stay as they are",
        choices=PROPERTIES,
        resume="fixed",
        needs="placeholder_token",
    )

    def check_textual_inversion(self) -> None:
        """Check these settings against each other. Raises UserError."""
        if self.placeholder_token is not None:
            return
        for name in names_of(type(self), needs="placeholder_token"):
            if getattr(self, name) != getattr(type(self), name):
                raise UserError(f"{name} needs placeholder_token, the token that is learned: give that too")
