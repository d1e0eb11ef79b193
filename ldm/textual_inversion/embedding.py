"""A learned token in memory: a word for prompts, and the vectors that the text encoder takes for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ldm.errors import UserError, plain
from ldm.tokenizer import CONTEXT_LENGTH
from ldm.tokenizer.tokenizer import END_TEXT, START_TEXT, WORD_END, vocabulary

MAX_VECTORS = CONTEXT_LENGTH - 2  # what a prompt can hold
LONGEST_TOKEN = 500  # characters, as of a checkpoint's added tokens


@dataclass(frozen=True, eq=False)
class Embedding:
    """A learned token.

    Attributes:
        token: What prompts call it.
        vectors: (count, width) fp32. In a prompt the token stands for `count` tokens.
    """

    token: str
    vectors: np.ndarray

    def __str__(self) -> str:
        count, width = self.vectors.shape
        return f"{plain(self.token, 60)}: {count} vector{'s' * (count > 1)} of {width} numbers"


def check_token(token: str, where: str) -> None:
    """Raise UserError for a text that cannot stand for learned vectors. `where` names its place."""
    if token != token.strip() or not 0 < len(token) <= LONGEST_TOKEN or not token.isprintable():
        raise UserError(
            f"{where}: a token is a text of 1 to {LONGEST_TOKEN} printable characters without a space at its ends, not "
            f"{plain(repr(token), 60)}: give another one, such as <cat-toy>"
        )
    if token.lower() in (START_TEXT, END_TEXT):
        raise UserError(f"{where}: {token} begins or ends every prompt: give another token, such as <cat-toy>")


def is_word(token: str) -> bool:
    """Whether CLIP's vocabulary has this text as a word, which the token would replace in all prompts."""
    return f"{token.lower()}{WORD_END}" in vocabulary().ids


def check_width(embeddings: Iterable[Embedding], width: int, path: str) -> None:
    """Raise UserError unless the vectors have the text encoder's width. `path` names their file."""
    for embedding in embeddings:
        own = embedding.vectors.shape[1]
        if own != width:
            raise UserError(
                f"{path}: the vectors of {plain(embedding.token, 60)} have {own} numbers, the model's tokens have "
                f"{width}: it was learned with another model (SD1.x has 768, SD2.x has 1024)"
            )
