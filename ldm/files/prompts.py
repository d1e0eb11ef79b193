"""Prompts from text files, read by the same rules for generation and evaluation."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence

from ldm.errors import UserError, plain
from ldm.files.inputs import read_text

logger = logging.getLogger(__name__)

MAX_BYTES = 128 << 20  # of a file: a million prompts of 130 characters
MAX_PROMPTS = 1_000_000
MAX_CHARACTERS = 10_000  # of a prompt; the text encoder reads about 300 of them
LINES_NAMED = 5  # in a warning
WAY = "give a text file with one prompt a line"

_FLAG = re.compile(r"(?<!\S)--[A-Za-z]+")


def read_prompts(path: str | os.PathLike, name: str, flags: bool = False) -> list[str]:
    """Return the prompts of a UTF-8 text file, one per line, without surrounding spaces. `name` is that of the setting.

    Line feeds at the end of the file are ignored. Every other empty line is an empty prompt, and so is a line of
    spaces, which allows an empty prompt at the end. Comments (`#`) and the flags of other projects' prompt files
    (`--n ...`) are words of the prompt. Each of these cases logs one warning with its line numbers.

    With `flags`, the lines are those of a prompt file of kohya's sd-scripts: empty ones and comments do not count.

    Raises:
        UserError: The file cannot be read (see ldm.files.inputs), is empty, or exceeds MAX_BYTES, MAX_PROMPTS or
            MAX_CHARACTERS per prompt.
    """
    where = f"{name} {plain(os.fspath(path))}"
    text = read_text(path, name, WAY, MAX_BYTES).rstrip("\n")
    count = text.count("\n") + 1
    if count > MAX_PROMPTS:
        raise UserError(f"{where} has {count:,} lines, at most {MAX_PROMPTS:,} are read: split it into several files")
    prompts = [line.strip() for line in text.split("\n")]
    if not any(prompts):
        raise UserError(f"{where} is empty: write one prompt a line")
    for number, prompt in enumerate(prompts, 1):
        if len(prompt) > MAX_CHARACTERS:
            raise UserError(
                f"{where}, line {number}: a prompt of {len(prompt):,} characters, at most {MAX_CHARACTERS:,} are "
                "read: write one prompt a line"
            )

    if flags:
        prompts = [prompt for prompt in prompts if prompt and not prompt.startswith("#")]
        if not prompts:
            raise UserError(f"{where} holds comments alone: write one prompt a line")
        return prompts
    with_flags = {i: match.group() for i, p in enumerate(prompts, 1) if "--" in p and (match := _FLAG.search(p))}
    flag = plain(next(iter(with_flags.values()), ""), 20)
    warnings = {
        "empty lines are empty prompts": [i for i, prompt in enumerate(prompts, 1) if not prompt],
        "lines that begin with # are prompts, not comments": [
            i for i, prompt in enumerate(prompts, 1) if prompt.startswith("#")
        ],
        f"flags such as {flag} are words of the prompt; text_to_image.py reads them with --prompt_flags, and has "
        "settings for all prompts (--negative_prompt, --W, --H, --seed, --scale, --sampling_steps)": list(with_flags),
    }
    for warning, lines in warnings.items():
        if lines:
            logger.warning("%s: %s: %s", where, warning, _line_numbers(lines))
    return prompts


def _line_numbers(lines: Sequence[int]) -> str:
    named = ", ".join(map(str, lines[:LINES_NAMED]))
    more = f" and {len(lines) - LINES_NAMED:,} more" if len(lines) > LINES_NAMED else ""
    return f"line{'s' if len(lines) > 1 else ''} {named}{more}"
