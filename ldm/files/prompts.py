"""Prompts from text files: what generation draws and what evaluation compares images with are read alike."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence

from ldm.errors import UserError, plain
from ldm.files.inputs import read_text

logger = logging.getLogger(__name__)

MOST_BYTES = 128 << 20  # of a file: a million prompts of 130 characters
MOST_PROMPTS = 1_000_000
MOST_CHARACTERS = 10_000  # of one prompt; the text encoder sees about 300 of them
LINES_NAMED = 5  # in a warning
WAY = "give a text file with one prompt a line"

_FLAG = re.compile(r"(?<!\S)--[A-Za-z]+")


def read_prompts(path: str | os.PathLike, name: str) -> list[str]:
    """Returns the prompts of a UTF-8 text file, one a line, without the spaces around them.

    Line feeds at the end of the file end it. Every other empty line is an empty prompt; so is a line of spaces, with
    which the last prompt can be empty too. Comments (`#`) and flags (`--n ...`, as other projects read them) are text.
    Each of these is warned of once, with its lines.

    Args:
        path: of the file.
        name: of the setting, for messages.

    Raises:
        UserError: the file cannot be read (see ldm.files.inputs), holds no text, or has more than MOST_BYTES,
            MOST_PROMPTS or MOST_CHARACTERS a prompt.
    """
    where = f"{name} {plain(os.fspath(path))}"
    text = read_text(path, name, WAY, MOST_BYTES).rstrip("\n")
    count = text.count("\n") + 1
    if count > MOST_PROMPTS:
        raise UserError(f"{where} has {count:,} lines, at most {MOST_PROMPTS:,} are read: split it into several files")
    lines = [line.strip() for line in text.split("\n")]
    if not any(lines):
        raise UserError(f"{where} is empty: write one prompt a line")
    for number, line in enumerate(lines, 1):
        if len(line) > MOST_CHARACTERS:
            raise UserError(
                f"{where}, line {number}: a prompt of {len(line):,} characters, at most {MOST_CHARACTERS:,} are read: "
                "write one prompt a line"
            )

    flags = {i: flag.group() for i, line in enumerate(lines, 1) if "--" in line and (flag := _FLAG.search(line))}
    flag = plain(next(iter(flags.values()), ""), 20)
    kinds = {
        "empty lines are empty prompts": [i for i, line in enumerate(lines, 1) if not line],
        "# begins no comment, these lines are prompts": [i for i, line in enumerate(lines, 1) if line.startswith("#")],
        f"flags such as {flag} are words of the prompt here; text_to_image.py has settings for all prompts instead "
        "(--negative_prompt, --W, --H, --seed, --scale, --sampling_steps)": list(flags),
    }
    for what, numbers in kinds.items():
        if numbers:
            logger.warning("%s: %s: %s", where, what, _numbered(numbers))
    return lines


def _numbered(numbers: Sequence[int]) -> str:
    named = ", ".join(map(str, numbers[:LINES_NAMED]))
    more = f" and {len(numbers) - LINES_NAMED:,} more" if len(numbers) > LINES_NAMED else ""
    return f"line{'s' if len(numbers) > 1 else ''} {named}{more}"
