r"""A1111's prompt syntax: weights in brackets, escapes and BREAK.

| in a prompt | meaning |
| --- | --- |
| `(x)` | x with weight 1.1; nested brackets multiply |
| `[x]` | x with weight 1 / 1.1 |
| `(x:1.3)` | x with weight 1.3 |
| `\(` `\)` `\[` `\]` `\\` | the character behind the backslash; a backslash before anything else is left out |
| `BREAK` | the end of a chunk (see ldm.prompts.chunks) |

A bracket that is never closed ends with the prompt. A closing bracket without an opening one is a character, and so is
a colon whose number is not followed by a bracket. The rules are those of `parse_prompt_attention` in AUTOMATIC1111's
stable-diffusion-webui, with two differences: a BREAK inside brackets is a BREAK, where A1111 reads it as a word, and
`(x:1.2.3)` is a text in brackets, where A1111 stops with an error.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from ldm.errors import UserError, plain
from ldm.files.prompts import MAX_CHARACTERS
from ldm.settings.prompts import SYNTAXES

logger = logging.getLogger(__name__)

ROUND = 1.1
SQUARE = 1 / 1.1
MAX_WEIGHT = 100.0  # 48 round brackets

_SYMBOLS = re.compile(r"\\[()\[\]\\]|\\|\(|\[|:\s*([+-]?[0-9.]+)\s*\)|\)|\]|[^\\()\[\]:]+|:")
_BREAK = re.compile(r"\bBREAK\b")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)")
_EDITING = re.compile(r"\[(?:[^\[\]|]*\|[^\[\]]*|[^\[\]]*:\s*[0-9.]+\s*)\]")
_ESCAPED = re.compile(r"[\\()\[\]]")
_AND = re.compile(r"\bAND\b")


class Piece(NamedTuple):
    """A part of a prompt whose tokens have one weight."""

    text: str
    weight: float


def parse_prompt(text: str, syntax: str = "a1111") -> list[list[Piece]]:
    """Return the pieces of a prompt, one list for each part between BREAKs. Neighbouring pieces differ in weight.

    Args:
        text: The prompt.
        syntax: "a1111", or "plain" for a prompt in which every character belongs to a word.

    Raises:
        UserError: The prompt has more than MAX_CHARACTERS characters, or a weight is beyond MAX_WEIGHT.
        ValueError: The syntax is unknown.
    """
    if syntax not in SYNTAXES:
        raise ValueError(f"prompt syntax {syntax!r}: one of {SYNTAXES}")
    check_length(text)
    if syntax == "plain":
        return [[Piece(text, 1.0)]]
    with np.errstate(over="ignore", invalid="ignore"):
        texts, weights = _weighted(text)
    largest = float(np.abs(weights).max(initial=0.0))
    if not largest <= MAX_WEIGHT:
        raise UserError(
            f'prompt "{plain(text, 60)}": a weight of {largest:.3g}, at most {MAX_WEIGHT:g} is used: close the '
            "brackets earlier, or lower the number"
        )
    sections: list[list[Piece]] = [[]]
    for part, weight in zip(texts, weights.tolist()):
        if part is None:
            sections.append([])
        elif sections[-1] and sections[-1][-1].weight == weight:
            sections[-1][-1] = Piece(sections[-1][-1].text + part, weight)
        else:
            sections[-1].append(Piece(part, weight))
    return sections


def _weighted(text: str) -> tuple[list[str | None], np.ndarray]:
    """Return the texts in order, None for a BREAK, and their weights."""
    matches = list(_SYMBOLS.finditer(text))
    texts: list[str | None] = []
    # A symbol is one text, or two more for each BREAK in it.
    weights = np.ones(len(matches) + 2 * text.count("BREAK"))
    opened: dict[str, list[int]] = {"(": [], "[": []}  # the numbers of the texts that follow them

    def close(bracket: str, factor: float) -> None:
        weights[opened[bracket].pop() : len(texts)] *= factor

    for match in matches:
        symbol, number = match.group(), match.group(1)
        if symbol.startswith("\\"):
            texts.append(symbol[1:])
        elif symbol in opened:
            opened[symbol].append(len(texts))
        elif number is not None and opened["("] and _NUMBER.fullmatch(number):
            close("(", float(number))
        elif number is not None and opened["("]:  # no number: a text, and a bracket with nothing said
            texts.append(symbol[:-1])
            close("(", ROUND)
        elif symbol == ")" and opened["("]:
            close("(", ROUND)
        elif symbol == "]" and opened["["]:
            close("[", SQUARE)
        else:
            first, *others = _parts(symbol)
            texts.append(first)
            for part in others:
                texts += [None, part]
    for bracket, factor in (("(", ROUND), ("[", SQUARE)):
        for start in opened[bracket]:
            weights[start : len(texts)] *= factor
    return texts, weights[: len(texts)]


def escaped(text: str) -> str:
    """Return a plain text in A1111's syntax: no bracket weighs a word."""
    return _ESCAPED.sub(r"\\\g<0>", text)


def _parts(symbol: str) -> list[str]:
    """Return the texts between the BREAKs of a symbol, without the spaces beside a BREAK."""
    parts = _BREAK.split(symbol)  # a pattern with the spaces would try each of them as a beginning
    last = len(parts) - 1
    parts = [part if place == 0 else part.lstrip() for place, part in enumerate(parts)]
    return [part if place == last else part.rstrip() for place, part in enumerate(parts)]


def check_length(text: str) -> None:
    """Raise UserError for a prompt of more than MAX_CHARACTERS characters."""
    if len(text) > MAX_CHARACTERS:
        raise UserError(
            f'prompt "{plain(text, 60)}" has {len(text):,} characters, at most {MAX_CHARACTERS:,} are read: shorten it'
        )


def warn_of_unsupported(prompts: Iterable[str]) -> None:
    """Log a warning for A1111's prompt editing and AND, which are read as words."""
    for prompt in prompts:
        for pattern, what in ((_EDITING, "prompt editing and alternation"), (_AND, "AND between prompts")):
            match = pattern.search(prompt)
            if match is not None:
                logger.warning(
                    'prompt_syntax a1111: %s are not supported, "%s" is read as words', what, plain(match.group(), 40)
                )
                return
