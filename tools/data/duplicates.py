"""Images that a data set has twice: the same content under several names, and names that are nearly the same."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from ldm.data.sources.names import split_suffix

# What copying programs and downloads add to a name: "cat (1)", "cat copy", "cat - Copy (2)", "cat_copy3".
_COPY = re.compile(r"(?:[\s_-]*\(\d+\)|[\s_-]+copy(?:[\s_-]*\d+)?)+$")
_GAPS = re.compile(r"[\s_-]+")


class Duplicates(NamedTuple):
    """The names of images, in groups.

    Attributes:
        same_content: The different names of each content that has several.
        other_captions: A name of each content that has several captions, and these.
        similar_names: Names that differ in case, spaces, suffix, or a copy's number alone.
    """

    same_content: list[list[str]]
    other_captions: list[tuple[str, list[str]]]
    similar_names: list[list[str]]


def find_duplicates(names: Sequence[str], contents: np.ndarray, captions: Sequence[str]) -> Duplicates:
    """Return the images that are there twice.

    Args:
        names: Of each row's image.
        contents: A number (N,) for each row, the same for images of the same bytes.
        captions: Of each row.
    """
    order = np.argsort(contents, kind="stable")
    ends = np.flatnonzero(np.diff(contents[order], append=-1)) + 1
    same_content: list[list[str]] = []
    other_captions: list[tuple[str, list[str]]] = []
    for start, end in zip([0, *ends.tolist()], ends.tolist()):
        if end - start == 1:
            continue
        rows = order[start:end].tolist()
        of_content = list(dict.fromkeys(names[row] for row in rows))
        if len(of_content) > 1:
            same_content.append(of_content)
        different = list(dict.fromkeys(captions[row] for row in rows))
        if len(different) > 1:
            other_captions.append((names[rows[0]], different))
    return Duplicates(same_content, other_captions, _similar(names))


def _similar(names: Iterable[str]) -> list[list[str]]:
    groups = defaultdict(list)
    for name in dict.fromkeys(names):
        groups[_simple(name)].append(name)
    return [group for group in groups.values() if len(group) > 1]


def _simple(name: str) -> str:
    """Return a name without its suffix, case, and what a copy adds to it. Folders count."""
    stem = unicodedata.normalize("NFKC", split_suffix(name)[0]).casefold()
    return _GAPS.sub(" ", _COPY.sub("", stem)).strip()
