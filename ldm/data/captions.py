"""The caption that a row is trained with at a step, changed and drawn as kohya's sd-scripts does it.

The order is that of sd-scripts: one line, or all lines where wildcards are enabled; prefix and suffix; drop the whole
caption (every n-th epoch here, at random by `ldm.data.draws.micro_batch_draws`); draw a line and the wildcards; split
into tags; hold the kept tags at their places; cut for the token warm-up; shuffle; drop tags; join; put the caption
separator in place of the secondary one.

Everything is a function of its arguments. `ldm.data.draws.caption_draws` gives the generators of a micro-batch, so a
resumed run draws what an uninterrupted one draws, with any number of processes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Callable, NamedTuple

import numpy as np

from ldm.errors import plain
from ldm.settings.data import CaptionSettings
from ldm.tokenizer import CONTEXT_LENGTH, Tokenizer

MOST_TOKENS = CONTEXT_LENGTH - 2  # without the start and the end token
MOST_NAMED = 5  # captions in a report

_NEWLINE = re.compile(r"\r\n|\r|\n")
_SYMBOLS = re.compile(r"\{\{|\}\}|[{}|]|[^{}|]+")
_ESCAPED = {"{{": "{", "}}": "}"}


def final_caption(
    caption: str,
    settings: CaptionSettings,
    rng: np.random.Generator,
    *,
    step: int = 0,
    epoch: int = 1,
    total_steps: int | None = None,
) -> str:
    """Return the caption that a row is trained with at a step.

    As in sd-scripts, tags are joined by ", " whatever `caption_separator` is; empty tags are removed only where
    `keep_tokens_separator` is found; and where wildcards are enabled, the prefix belongs to the first line of a caption
    of several lines and the suffix to the last.

    Args:
        caption: As the data set gives it, with all its lines. Without wildcards, the first line that is not blank
            counts.
        rng: The row's generator from `ldm.data.draws.caption_draws`.
        step: The number of optimizer steps before this one, for the token warm-up.
        epoch: The number of the epoch, counted from 1, for `caption_dropout_every_n_epochs`.
        total_steps: Optimizer steps of the whole run, needed if `token_warmup_step` is a share of them.
    """
    caption = _with_ends(caption, settings)
    if is_empty_epoch(settings, epoch):
        return ""
    caption = _drawn(caption, settings, rng)
    if settings.changes_tags:
        first, tags, last = _split(caption, settings)
        tags = tags[: _warmed_up(len(tags), settings, step, total_steps)]
        if settings.shuffle_caption:
            tags = [tags[place] for place in rng.permutation(len(tags))]
        if settings.caption_tag_dropout_rate > 0:
            kept = rng.random(len(tags)) >= settings.caption_tag_dropout_rate
            tags = [tag for tag, is_kept in zip(tags, kept) if is_kept]
        caption = _join(first, tags, last)
    return _one_separator(caption, settings)


def whole_caption(caption: str, settings: CaptionSettings, rng: np.random.Generator) -> str:
    """Return a final caption of which nothing is dropped, with its tags in their order. Wildcards are drawn.

    Args:
        caption: See `final_caption`.
        rng: Draws the line and the wildcards.
    """
    caption = _drawn(_with_ends(caption, settings), settings, rng)
    if settings.changes_tags:
        caption = _join(*_split(caption, settings))
    return _one_separator(caption, settings)


def longest_caption(caption: str, settings: CaptionSettings, length: Callable[[str], int]) -> str:
    """Return the final caption of the greatest `length` that may be drawn: with all tags, and the longest wildcards."""
    finals = []
    for line in _with_ends(caption, settings).split("\n"):
        if settings.enable_wildcard:
            line = "".join(max(texts, key=length) if len(texts) > 1 else texts[0] for texts in _wildcards(line))
        if settings.changes_tags:
            line = _join(*_split(line, settings))
        finals.append(_one_separator(line, settings))
    return max(finals, key=length) if len(finals) > 1 else finals[0]


class CutCaption(NamedTuple):
    """A caption of more than 75 tokens."""

    row: int  # its place among the captions
    lost: str  # what the text encoder does not see


def cut_captions(captions: Iterable[str], settings: CaptionSettings, tokenizer: Tokenizer) -> list[CutCaption]:
    """Return the rows whose longest final caption has more than 75 tokens, each once, whatever is drawn later."""

    def length(text: str) -> int:
        return len(tokenizer.tokenize(text))

    cut = []
    ends = len(f"{settings.caption_prefix or ''}{settings.caption_suffix or ''}".encode())
    for row, caption in enumerate(captions):
        if len(caption.encode(errors="replace")) + ends <= MOST_TOKENS:
            continue  # a token is at least a byte: this saves 70 us for each of a million captions
        tokens = tokenizer.tokenize(longest_caption(caption, settings, length))
        if len(tokens) > MOST_TOKENS:
            cut.append(CutCaption(row, tokenizer.decode(tokens[MOST_TOKENS:])))
    return cut


def cut_report(cut: Sequence[CutCaption], count: int, name_of: Callable[[int], str]) -> str:
    """Return one line on the captions that are cut, empty if none is.

    Args:
        count: Number of all captions.
        name_of: Returns the name of a row's image.
    """
    if not cut:
        return ""
    named = [f'{plain(name_of(row), 60)} loses "{plain(lost, 60)}"' for row, lost in cut[:MOST_NAMED]]
    if len(cut) > MOST_NAMED:
        named.append(f"and {len(cut) - MOST_NAMED:,} more")
    longer = "caption is" if count == 1 else "captions are"
    return f"{len(cut):,} of {count:,} {longer} longer than {MOST_TOKENS} tokens and cut there: {', '.join(named)}"


def _with_ends(caption: str, settings: CaptionSettings) -> str:
    """Return the lines that count, with prefix and suffix."""
    lines = [line for line in map(str.strip, _NEWLINE.split(caption)) if line]
    caption = "\n".join(lines if settings.enable_wildcard else lines[:1])
    if settings.caption_prefix:
        caption = f"{settings.caption_prefix} {caption}"
    return f"{caption} {settings.caption_suffix}" if settings.caption_suffix else caption


def is_empty_epoch(settings: CaptionSettings, epoch: int) -> bool:
    """Whether `caption_dropout_every_n_epochs` empties all captions of an epoch, counted from 1."""
    every = settings.caption_dropout_every_n_epochs
    return every > 0 and epoch % every == 0


def _drawn(caption: str, settings: CaptionSettings, rng: np.random.Generator) -> str:
    """Return one of the lines of a caption, with one text of each wildcard, where wildcards are enabled."""
    if not settings.enable_wildcard:
        return caption
    lines = caption.split("\n")
    line = lines[_draw(rng, len(lines))]
    return "".join(texts[_draw(rng, len(texts))] for texts in _wildcards(line))


def _draw(rng: np.random.Generator, count: int) -> int:
    return int(rng.integers(count)) if count > 1 else 0


def _wildcards(line: str) -> list[list[str]]:
    """Return the parts of a line, each as the list of the texts that it may become.

    A wildcard begins at the first open brace and ends at the next closing one. It has at least one character. Doubled
    braces are read from the left and stand for one, inside a wildcard as well.
    """
    parts: list[list[str]] = []
    inside: list[str] | None = None  # symbols since an open brace
    for symbol in _SYMBOLS.findall(line):
        if inside is None:
            if symbol == "{":
                inside = []
            else:
                parts.append([_ESCAPED.get(symbol, symbol)])
        elif symbol != "}":
            inside.append(symbol)
        else:
            parts.append(_options(inside) if inside else ["{}"])
            inside = None
    if inside is not None:  # never closed: an ordinary text
        parts.append(["{" + "".join(_ESCAPED.get(symbol, symbol) for symbol in inside)])
    return parts


def _options(symbols: Sequence[str]) -> list[str]:
    options = [""]
    for symbol in symbols:
        if symbol == "|":
            options.append("")
        else:
            options[-1] += _ESCAPED.get(symbol, symbol)
    return options


def _split(caption: str, settings: CaptionSettings) -> tuple[list[str], list[str], list[str]]:
    """Return the tags that are kept at the beginning, those that may be changed, and those that are kept at the end."""
    mark, separator = settings.keep_tokens_separator, settings.caption_separator
    if mark and mark in caption:
        # Whatever follows a third mark belongs to the end, with the mark.
        sections = (caption.split(mark, 2) + [""])[:3]
        first, tags, last = ([tag for tag in map(str.strip, part.split(separator)) if tag] for part in sections)
        return first, tags, last
    tags = [tag.strip() for tag in caption.strip().split(separator)]
    return tags[: settings.keep_tokens], tags[settings.keep_tokens :], []


def _warmed_up(count: int, settings: CaptionSettings, step: int, total_steps: int | None) -> int:
    """Return how many of `count` tags are used: linear in the step, from token_warmup_min to all."""
    steps = settings.token_warmup_step
    if 0 < steps < 1:
        if total_steps is None:
            raise ValueError(f"token_warmup_step {steps} is a share of the steps: total_steps is needed")
        steps = math.floor(steps * total_steps)
    if step >= steps:
        return count
    least = settings.token_warmup_min
    return max(0, math.floor(step * ((count - least) / steps)) + least)


def _join(first: list[str], tags: list[str], last: list[str]) -> str:
    return ", ".join(first + tags + last)


def _one_separator(caption: str, settings: CaptionSettings) -> str:
    if settings.secondary_separator:
        return caption.replace(settings.secondary_separator, settings.caption_separator)
    return caption
