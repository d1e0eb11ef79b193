"""The project's scripts, run from another script and printed as a user would type them."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from ldm.errors import UserError
from ldm.files.paths import ROOT
from ldm.runtime import subprocesses


def call(*command: str) -> None:
    """Print the command of a script as a user would type it, and run it in the project's folder.

    Args:
        *command: The script, as a path relative to the project's folder, and its arguments.

    Raises:
        UserError: The script failed. It has printed why.
    """
    print("\n$ python " + " ".join(shlex.quote(part) for part in command), flush=True)
    code = subprocesses.run([sys.executable, *command], cwd=ROOT)
    if code:
        raise UserError(f"{command[0]} failed with exit code {code}: see its message above")


def from_root(path: str | Path) -> str:
    """Return the path of the working directory's `path` as the scripts that `call` runs see it, for their flags."""
    return os.path.relpath(path, ROOT)
