"""The processes of a data-parallel run, which msrun or mpirun started: the first speaks, the others keep a log file.

A launcher shows what all of them print, mixed, and ends all as soon as one of them ends with an error. Most mistakes
end all alike. So the others print nothing, and after an error wait for the first process to say it. Where that does not
end, the error is theirs alone, and they say it themselves.
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

PATIENCE = 15.0  # seconds that the first process may be behind the others
LAUNCHED = ("MS_ROLE", "RANK_TABLE_FILE", "OMPI_COMM_WORLD_RANK")  # one of them is set by every launcher


def process_number() -> int:
    """Of this process as its launcher counts them; 0 without a launcher. Known before the processes meet."""
    if not any(name in os.environ for name in LAUNCHED):
        return 0
    number = os.environ.get("RANK_ID") or os.environ.get("OMPI_COMM_WORLD_RANK") or "0"
    return int(number) if number.isdecimal() else 0


def is_scheduler() -> bool:
    """Whether this is the process that msrun starts besides, to let the others meet: it trains nothing."""
    return os.environ.get("MS_ROLE") == "MS_SCHED"


@contextmanager
def first_speaks() -> Iterator[None]:
    """Within the block, show no progress bars but in the first process, and let that say errors before the others.

    It comes before the import of tqdm.
    """
    if is_scheduler() or process_number() == 0:
        yield
        return
    before = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    try:
        yield
    except Exception as error:
        time.sleep(PATIENCE)
        if isinstance(error, UserError):
            raise UserError(f"process {process_number()}: {error}") from None
        raise
    finally:
        os.environ.pop("TQDM_DISABLE")
        if before is not None:
            os.environ["TQDM_DISABLE"] = before


@contextmanager
def own_log(path: Path) -> Iterator[None]:
    """Within the block, write what this process prints, also from C++, to the end of a file; an error at its end too,
    which names the file then. Raises UserError where it cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    before = [os.dup(number) for number in (1, 2)]
    _point(file, file)
    try:
        yield
    except UserError as error:
        print(f"error: {plain(error, 2000)}", file=sys.stderr)
        raise UserError(f"{error} (its log: {path})") from error
    except Exception:
        traceback.print_exc()
        raise
    finally:
        _point(*before)
        for number in (file, *before):
            os.close(number)


def _point(out: int, err: int) -> None:
    """Let standard output and error lead to these files."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(out, 1)
    os.dup2(err, 2)
