r"""Wildcards of prompts, in the notation of the extension dynamic-prompts: texts that are drawn for each image.

| in a prompt | becomes |
| --- | --- |
| `{red|blue}` | one of the texts, which may hold wildcards themselves |
| `{3::red|blue}` | the same, where red is drawn three times as often |
| `{2$$red|green|blue}`, `{1-2$$red|blue}` | two, or one to two, different ones, joined by ", " |
| `{2$$ and $$red|green|blue}` | the same, joined by " and " |
| `__colours__`, `__clothes/hats__` | a line of colours.txt, or of clothes/hats.txt, in the folder of wildcards |

`\{`, `\}` and `\|` are characters. Empty lines of a file, and those that begin with `#`, do not count.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

import numpy as np

from ldm.data.draws import draws
from ldm.errors import UserError, plain
from ldm.files.inputs import is_file, is_folder, read_text
from ldm.files.prompts import MAX_CHARACTERS

MAX_BYTES = 16 << 20  # of a file
MAX_FILES = 10_000  # that an error looks at for a near name
MAX_DEPTH = 20  # wildcards inside wildcards
MAX_DRAWS = 1000  # for one prompt
MOST_DRAWN = 10 * MAX_CHARACTERS  # where drawing stops; what is shorter is counted to its end for the error
JOINED_BY = ", "

_FILE = re.compile(r"__((?:[^\W_]|[./])(?:[\w\-. /]{0,198}?[^\W_])?)__(?!_)")
_SHARE = re.compile(r"\s*([0-9]{1,6}(?:\.[0-9]{0,6})?)::")
_COUNT = re.compile(r"\s*([0-9]{1,4})(?:-([0-9]{1,4}))?\$\$")


class Wildcards:
    """Draws the wildcards of prompts. Each file is read once.

    Args:
        folder: The folder of the files, None for braces alone.

    Raises:
        UserError: The folder does not exist.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        if folder is not None and not is_folder(folder, "wildcard_dir"):
            raise UserError(f"wildcard_dir {plain(folder)} is not a folder: give one with .txt files, a text a line")
        self.folder = None if folder is None else Path(folder)
        self._lines: dict[str, list[str]] = {}

    def draw(self, text: str, seed: int, index: int, stream: str = "prompt") -> str:
        """Return a prompt with its wildcards drawn, which depends on the arguments and the files alone.

        Args:
            text: The prompt.
            seed: Of the image.
            index: The number of the image.
            stream: "prompt" or "negative prompt", whose draws are independent of each other.

        Raises:
            UserError: A file is missing or is no text, a wildcard leads to itself, or the prompt becomes too long.
        """
        if not any(mark in text for mark in ("{", "__", "\\")):
            return text  # a generator costs 20 us, and a run may have a million prompts
        drawn = _Drawing(self, draws(seed, f"wildcards of the {stream}", index), text).expand(text, ())
        if len(drawn) > MAX_CHARACTERS:
            raise UserError(
                f'prompt "{plain(text, 60)}": its wildcards make {len(drawn):,} characters, at most '
                f"{MAX_CHARACTERS:,} are read: shorten their lines"
            )
        return drawn

    def lines(self, name: str, prompt: str) -> list[str]:
        """Return the texts that `__name__` stands for. `prompt` is named in errors."""
        if name not in self._lines:
            self._lines[name] = self._read(name, f'prompt "{plain(prompt, 60)}", __{plain(name, 60)}__')
        return self._lines[name]

    def _read(self, name: str, where: str) -> list[str]:
        if self.folder is None:
            raise UserError(f"{where}: give the folder of the wildcards: --wildcard_dir <folder>")
        path = self.folder / f"{name}.txt"
        root = os.path.realpath(self.folder)
        if os.path.isabs(name) or not os.path.realpath(path).startswith(root.rstrip(os.sep) + os.sep):
            raise UserError(f"{where}: the file is not inside wildcard_dir {plain(self.folder)}: copy it there")
        if not is_file(path, "wildcard_dir"):
            near = difflib.get_close_matches(name, self._names(), 3, 0.5)
            raise UserError(
                f"{where}: {plain(path)} does not exist: "
                + (f"did you mean {plain(' or '.join(f'__{other}__' for other in near))}?" if near else "add it")
            )
        text = read_text(path, "wildcard_dir", "give a text file with a text a line", MAX_BYTES)
        lines = [line for line in map(str.strip, text.split("\n")) if line and not line.startswith("#")]
        if not lines:
            raise UserError(f"{where}: {plain(path)} is empty: write a text a line")
        longest = max(map(len, lines))
        if longest > MAX_CHARACTERS:
            raise UserError(
                f"{where}: {plain(path)} has a line of {longest:,} characters, at most {MAX_CHARACTERS:,} are read"
            )
        return lines

    def _names(self) -> list[str]:
        names: list[str] = []
        for folder, folders, files in os.walk(self.folder or "."):
            folders.sort()
            place = os.path.relpath(folder, self.folder)
            names += [os.path.normpath(os.path.join(place, file))[:-4] for file in files if file.endswith(".txt")]
            if len(names) > MAX_FILES:
                break
        return sorted(names)


class _Drawing:
    """The wildcards of one prompt, which is named in errors."""

    def __init__(self, wildcards: Wildcards, rng: np.random.Generator, prompt: str) -> None:
        self.wildcards, self.rng, self.prompt = wildcards, rng, prompt
        self.count = 0
        self.characters = 0  # that are drawn so far, those of inner wildcards too

    def expand(self, text: str, inside: tuple[str, ...]) -> str:
        """Return a text without wildcards. `inside`: names of the wildcards that it comes from."""
        if len(inside) > MAX_DEPTH:
            raise self._error(f"wildcards lead to each other ({' > '.join(inside[-4:])}), or lie too deep")
        ends = _closing_braces(text)
        parts: list[str] = []
        place = 0
        while place < len(text):
            letter = text[place]
            if letter == "\\" and text[place + 1 : place + 2] in ("{", "}", "|"):
                parts.append(self._counted(text[place + 1]))
                place += 2
            elif letter == "{" and place in ends:
                parts.append(self._choose(text[place + 1 : ends[place]], inside))
                place = ends[place] + 1
            elif letter == "_" and (match := _FILE.match(text, place)):
                name = match.group(1)
                lines = self.wildcards.lines(name, self.prompt)
                parts.append(self.expand(lines[self._draw(len(lines))], (*inside, f"__{name}__")))
                place = match.end()
            else:
                parts.append(self._counted(letter))
                place += 1
        return "".join(parts)

    def _choose(self, content: str, inside: tuple[str, ...]) -> str:
        """Return what `{content}` becomes."""
        low = high = 1
        joined_by = JOINED_BY
        if count := _COUNT.match(content):
            low = int(count.group(1))
            high = int(count.group(2) or low)
            content = content[count.end() :]
            separator, found, rest = content.partition("$$")
            if found and "|" not in separator and "{" not in separator:
                joined_by, content = separator, rest
        options = _options(content)
        shares = np.ones(len(options))
        for number, option in enumerate(options):
            if share := _SHARE.match(option):
                shares[number] = float(share.group(1))
                options[number] = option[share.end() :]
        possible = int(np.count_nonzero(shares))
        if not low <= high or high > possible:
            raise self._error(f"{{{plain(content, 40)}}} has {possible} texts, {low} to {high} cannot be drawn")
        number = low + self._draw(high - low + 1)
        if number == 1 and (shares == shares[0]).all():
            chosen = [self._draw(len(options))]
        else:
            chosen = self.rng.choice(len(options), number, replace=False, p=shares / shares.sum()).tolist()
        texts: list[str] = []
        for place in chosen:
            if texts:
                self._counted(joined_by)
            texts.append(self.expand(options[place], (*inside, "{}")))
        return joined_by.join(texts)

    def _draw(self, count: int) -> int:
        """Draw a number below `count`, and count the draws of the prompt."""
        self.count += 1
        if self.count > MAX_DRAWS:
            raise self._error(f"more than {MAX_DRAWS} wildcards are drawn for it")
        return int(self.rng.integers(count)) if count > 1 else 0

    def _counted(self, part: str) -> str:
        """Return a part of the prompt, and count its characters."""
        self.characters += len(part)
        if self.characters > MOST_DRAWN:
            raise self._error(f"its wildcards make more than {MOST_DRAWN:,} characters")
        return part

    def _error(self, reason: str) -> UserError:
        return UserError(f'prompt "{plain(self.prompt, 60)}": {reason}: change the prompt or the files of wildcards')


def _closing_braces(text: str) -> dict[int, int]:
    """Return the place of each opening brace with that of its closing one. Braces without a partner are characters."""
    pairs, opened = {}, []
    place = 0
    while place < len(text):
        if text[place] == "\\":
            place += 1
        elif text[place] == "{":
            opened.append(place)
        elif text[place] == "}" and opened:
            pairs[opened.pop()] = place
        place += 1
    return pairs


def _options(content: str) -> list[str]:
    """Divide a text at the bars that are outside of inner braces. Escapes stay as they are."""
    options, depth, start, place = [], 0, 0, 0
    while place < len(content):
        letter = content[place]
        if letter == "\\":
            place += 1
        elif letter == "{":
            depth += 1
        elif letter == "}":
            depth -= 1
        elif letter == "|" and depth == 0:
            options.append(content[start:place])
            start = place + 1
        place += 1
    return [*options, content[start:]]
