"""The captions of a data set: their length in tokens, what is cut, which are the same, and their tags or words."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from ldm.data.captions import MOST_TOKENS, CutCaption, longest_caption
from ldm.data.training_data import TrainingData
from ldm.tokenizer import Tokenizer

_WORD = re.compile(r"\w+(?:['’-]\w+)*")


@dataclass
class CaptionFigures:
    """What the captions of a training are. Where they change from step to step, the longest that may be drawn counts.

    Args:
        tokens: Of each row (N,), without the start and the end token.
        cut: The captions of more than 75 tokens, and what they lose.
        empty: Captions without a word.
        repeated: Captions of several instance images, with their number, the most frequent first.
        has_tags: Whether most captions hold the separator of tags.
        frequent: Tags, or else words, in lower case, with the number of captions that hold them, the most frequent
            first.
        distinct: How many different tags or words there are.
    """

    tokens: np.ndarray
    cut: list[CutCaption]
    empty: int
    repeated: list[tuple[str, int]]
    has_tags: bool
    frequent: list[tuple[str, int]]
    distinct: int


def read_captions(data: TrainingData, tokenizer: Tokenizer) -> CaptionFigures:
    """Return what the captions of a training are. Class images, which share a caption, count for the tokens alone."""

    def length(text: str) -> int:
        return len(tokenizer.tokenize(text))

    tokens = np.zeros(len(data), np.int64)
    cut: list[CutCaption] = []
    empty = 0
    counts: Counter[str] = Counter()
    seen: dict[tuple[int, str], tuple[str, int, str]] = {}
    with_separator: Counter[bool] = Counter()
    separators: dict[str, str] = {}
    for number, row in enumerate(tqdm(data.rows, desc="reading captions", unit="caption", delay=1, leave=False)):
        rules, text = data.rules[row.subset].captions, data.text(number)
        known = seen.get((row.subset, text))
        if known is None:
            final = longest_caption(text, rules, length)
            ids = tokenizer.tokenize(final)
            lost = tokenizer.decode(ids[MOST_TOKENS:]) if len(ids) > MOST_TOKENS else ""
            known = seen[row.subset, text] = (final, len(ids), lost)
        final, tokens[number], lost = known
        if tokens[number] > MOST_TOKENS:
            cut.append(CutCaption(number, lost))
        empty += not final.strip()
        if not data.subsets[row.subset].is_reg and final.strip():
            counts[final] += 1
            # Changed tags are joined by commas, whatever the separator is.
            separator = "," if rules.changes_tags else rules.caption_separator
            separators[final] = separator
            with_separator[separator in final] += 1
    has_tags = with_separator[True] > with_separator[False]
    frequent: Counter[str] = Counter()
    for text, count in counts.items():
        parts = _tags(text, separators[text]) if has_tags else set(_WORD.findall(text.lower()))
        for part in parts:
            frequent[part] += count
    repeated = [(text, count) for text, count in counts.most_common() if count > 1]
    return CaptionFigures(tokens, cut, empty, repeated, has_tags, _sorted(frequent), len(frequent))


def _tags(text: str, separator: str) -> set[str]:
    tags = (" ".join(tag.lower().split()) for tag in text.split(separator))
    return {tag for tag in tags if tag}


def _sorted(counter: Counter[str]) -> list[tuple[str, int]]:
    return sorted(counter.items(), key=lambda item: (-item[1], item[0]))
