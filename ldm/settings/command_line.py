"""The command lines of the tools: argparse with mistakes answered in one line.

parser = Parser(__doc__)
parser.add_argument("--source", type=user_path, required=True, help="...")
parser.add_argument("--rank", type=whole_number(low=1), help="...")
args = parser.parse_args(argv)
"""

from __future__ import annotations

import argparse
import difflib
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from ldm.errors import UserError, plain

# More rows than this in a call of a network need a larger machine than any.
MOST_BATCH = 4096


class Parser(argparse.ArgumentParser):
    """argparse whose errors are UserErrors of one line; an unknown flag is told the nearest one, and no beginning of a
    flag is taken for the whole of it.

    description: the help's text before the flags, its lines kept.
    """

    def __init__(self, description: str | None, prog: str | None = None) -> None:
        super().__init__(
            prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            raise self.unknown(rest)
        return found

    def unknown(self, words: Sequence[str], further: Sequence[str] = ()) -> UserError:
        """The error for words that no flag takes; further: names of flags that are known elsewhere."""
        flag = next((word for word in words if word.startswith("-")), None)
        if flag is None:
            return UserError(f'"{plain(words[0])}" belongs to no flag: write --name value (-h lists the flags)')
        flag = flag.partition("=")[0]
        known = [name for name in (*self._option_string_actions, *further) if name.startswith("--")]
        near = difflib.get_close_matches(flag.replace("_", "-"), [name.replace("_", "-") for name in known], 1, 0.0)
        meant = next(name for name in known if name.replace("_", "-") == near[0])
        return UserError(f"there is no flag {plain(flag)}: did you mean {meant}? (-h lists the flags)")

    def error(self, message: str) -> None:
        """Raise what argparse, or a tool itself, finds wrong."""
        message = re.sub(r"^argument ", "", message)
        raise UserError(f"{plain(message, 400)} (-h lists the flags)")


def whole_number(low: int | None = None, high: int | None = None) -> Callable[[str], int]:
    """The type of a flag that takes a whole number from `low` to `high`."""
    return _number(int, "a whole number", low, high)


def number(low: float | None = None, high: float | None = None) -> Callable[[str], float]:
    """The type of a flag that takes a finite number from `low` to `high`."""
    return _number(float, "a number", low, high)


def truth(text: str) -> bool:
    """The type of a flag that takes True or False."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f'"{plain(text)}" is neither True nor False')
    return text.lower() == "true"


def _number(kind: type, words: str, low: float | None, high: float | None) -> Callable[[str], Any]:
    limits = [f"{limit:,} {end}" for limit, end in ((low, "or more"), (high, "or less")) if limit is not None]
    wanted = f"{words}{', ' * bool(limits)}{' and '.join(limits)}"

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        # Compared, not asked for isfinite, which raises for whole numbers of 400 digits; NaN is not below anything.
        within = (low is None or value >= low) and (high is None or value <= high)
        if not (within and -math.inf < value < math.inf):
            raise argparse.ArgumentTypeError(f'"{plain(text, 60)}" is not {wanted}')
        return value

    return read
