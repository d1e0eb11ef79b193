"""Errors that a person can act on, and the one place where they become an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake in a setting, file or command line: the message says what, where, and the way out."""


def run(main: Callable[[], None]) -> None:
    """Call a script's `main`; a UserError is printed in one line and exits with 2, Ctrl-C with 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
