"""The output of the processes of a data-parallel run, which msrun or mpirun started.

A launcher mixes what all processes print, and ends them all as soon as one of them fails. Most errors occur in every
process. So only the first process prints. The others write to log files, and after an error they wait for the first
process to report it. If the first process does not end in that time, they give it their error to report, or report it
themselves (ldm.runtime.peers).
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ldm.errors import UserError, plain
from ldm.files.paths import writing
from ldm.runtime import peers

FIRST_PROCESS_SECONDS = 15.0  # how much later than the others the first process may report an error
LAUNCHER_VARIABLES = ("MS_ROLE", "RANK_TABLE_FILE", "OMPI_COMM_WORLD_RANK")  # every launcher sets one of them
LONGEST_LOGGED_ERROR = 2000  # characters


def process_index() -> int:
    """Return this process's index among those of the launcher, 0 without one. It is known before they connect."""
    if not any(name in os.environ for name in LAUNCHER_VARIABLES):
        return 0
    index = os.environ.get("RANK_ID") or os.environ.get("OMPI_COMM_WORLD_RANK") or "0"
    return int(index) if index.isdecimal() else 0


def is_scheduler() -> bool:
    """Whether this is msrun's scheduler, a process that connects the others and does not train."""
    return os.environ.get("MS_ROLE") == "MS_SCHED"


@contextmanager
def first_process_prints() -> Iterator[None]:
    """Show progress bars in the first process only, and delay the errors of the others.

    Enter this before tqdm is imported.
    """
    if is_scheduler() or process_index() == 0:
        try:
            yield
        except BaseException as error:
            peers.fail(f"process 0: {error}")
            raise
        return
    before = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    try:
        yield
    except Exception as error:
        time.sleep(FIRST_PROCESS_SECONDS)
        peers.fail(f"process {process_index()}: {error if isinstance(error, UserError) else repr(error)}")
        if isinstance(error, UserError):
            raise UserError(f"process {process_index()}: {error}") from None
        raise
    finally:
        os.environ.pop("TQDM_DISABLE")
        if before is not None:
            os.environ["TQDM_DISABLE"] = before


@contextmanager
def output_to_file(path: Path) -> Iterator[None]:
    """Append what this process prints, in C++ too, to a file. An error is written there as well and names the file.

    Raises:
        UserError: The file cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    before = [os.dup(number) for number in (1, 2)]
    _redirect(file, file)
    try:
        yield
    except UserError as error:
        print(f"error: {plain(error, LONGEST_LOGGED_ERROR)}", file=sys.stderr)
        raise UserError(f"{error} (its log: {path})") from error
    except Exception:
        traceback.print_exc()
        raise
    finally:
        _redirect(*before)
        for number in (file, *before):
            os.close(number)


def _redirect(output: int, errors: int) -> None:
    """Let standard output and standard error write to these file descriptors."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(output, 1)
    os.dup2(errors, 2)
