"""Take the words of a shell script apart, without running anything."""

from __future__ import annotations

import re
import shlex
from typing import NamedTuple

from ldm.errors import UserError, plain

MAX_SHELL_BYTES = 256 << 10
_OPERATORS = ";&|<>()"
# Scripts that this tool knows, and others, which are named in its error.
_SCRIPT = re.compile(r"(?:.*[/\\])?((?:\w{0,60}train\w{0,60}|textual_inversion\w{0,60}|fine_tune\w{0,60})\.py)$")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)$", re.DOTALL)
VARIABLE = re.compile(r"\$\{?([A-Za-z_]\w*)\}?|\$\(|`|%([A-Za-z_]\w*)%")


class Command(NamedTuple):
    """A training command of a shell script.

    Attributes:
        script: The name of the Python script.
        flags: The names after `--` -> their words: True for none, a text for one, else a list.
        launcher: The flags before the script, likewise.
        others: Words that belong to no flag.
        repeated: (name, value) of flags that are given again later.
        variables: The variables that the script sets -> their values.
    """

    script: str
    flags: dict[str, bool | str | list[str]]
    launcher: dict[str, bool | str | list[str]]
    others: list[str]
    repeated: list[tuple[str, object]]
    variables: dict[str, str]


def has_command(text: str) -> bool:
    """Return whether a text calls a training script with flags."""
    return bool(re.search(r"(train|textual_inversion|fine_tune)\w{0,60}\.py\b", text)) and "--" in text


def parse(text: str, where: str) -> Command:
    """Return the training command of a shell script. Variables are not replaced and nothing is run.

    Raises:
        UserError: A quotation has no end, there is no training command, or there are several.
    """
    found: list[tuple[list[str], int]] = []
    variables: dict[str, str] = {}
    for words in _commands(text, where):
        place = next((place for place, word in enumerate(words) if _SCRIPT.match(word)), None)
        before = words if place is None else words[:place]
        for word in before:
            match = _ASSIGNMENT.match(word)
            if match and not word.startswith("-"):
                variables[match.group(1)] = match.group(2)
            elif word not in ("export", "set", "env"):
                break
        if place is not None and before[:1] not in (["cd"], ["echo"], ["cat"], ["wget"], ["#"]):
            found.append((words, place))
    if not found:
        raise UserError(
            f"{where} holds no command of a training script, such as "
            "accelerate launch train_text_to_image_lora.py --rank=4"
        )
    if len(found) > 1:
        names = ", ".join(plain(words[place], 60) for words, place in found[:4])
        raise UserError(f"{where} holds {len(found)} training commands ({names}): keep one of them")
    words, place = found[0]
    match = _SCRIPT.match(words[place])
    assert match is not None
    flags, others, repeated = _flags(words[place + 1 :])
    launcher, _, _ = _flags(words[:place])
    return Command(match.group(1), flags, launcher, others, repeated, variables)


def _commands(text: str, where: str) -> list[list[str]]:
    """Return the words of each command. Ends of lines and operators outside of quotes divide commands."""
    lexer = shlex.shlex(_prepared(text), posix=True, punctuation_chars=_OPERATORS)
    lexer.whitespace_split = True
    lexer.commenters = ""  # _prepared has removed the comments
    try:
        words = list(lexer)
    except ValueError as error:
        raise UserError(f"{where} is no shell script: {plain(error)}: check its quotes") from None
    commands: list[list[str]] = [[]]
    skip = False
    for word in words:
        if word and not word.strip(_OPERATORS):
            skip = word.startswith((">", "<"))  # a file to read or write follows
            if not skip:
                commands.append([])
        elif skip:
            skip = False
        else:
            commands[-1].append(word)
    return [[word.lstrip("!%") if number == 0 else word for number, word in enumerate(command)]
            for command in commands if command]  # fmt: skip


def _prepared(text: str) -> str:
    """Return a script without comments, with joined lines, and with `;` for other ends of lines."""
    result: list[str] = []
    quote, position = "", 0
    while position < len(text):
        char = text[position]
        if char == "\\" and quote != "'":
            following = text[position + 1 : position + 2]
            result.append(" " if following == "\n" and not quote else char + following)
            position += 2
            continue
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char == "#":
            if position == 0 or text[position - 1].isspace():
                end = text.find("\n", position)
                position = len(text) if end < 0 else end
                continue
            char = "\\#"
        elif char == "\n":
            char = " ; "
        elif char in "<>" and (before := re.search(r"(^|\s)\d+$", "".join(result[-20:]))):
            del result[len(result) - len(before.group().strip()) :]  # 2 of 2>&1 is no word
        result.append(char)
        position += 1
    return "".join(result)


def _flags(words: list[str]) -> tuple[dict[str, bool | str | list[str]], list[str], list[tuple[str, object]]]:
    values: dict[str, bool | str | list[str]] = {}
    others: list[str] = []
    repeated: list[tuple[str, object]] = []
    name, closed = "", False
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            if name in values:
                repeated.append((name, values[name]))
            values[name] = value if equals else True
            closed = bool(equals)
        elif not name or closed:
            others.append(word)
        else:
            earlier = values[name]
            if earlier is True:
                values[name] = word
            else:
                values[name] = [*(earlier if isinstance(earlier, list) else [str(earlier)]), word]
    return values, others, repeated
