"""The output of the processes of a data-parallel run, which msrun or mpirun started.

A launcher mixes what all processes print, and ends them all as soon as one of them fails. Most errors occur in every
process. So only the first process prints. The others write to log files, and after an error they wait for the first
process to report it. If the first process does not end in that time, they give it their error to report
(ldm.runtime.peers, or ldm.runtime.roll_call before all have started), or report it themselves.
"""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ldm.errors import UserError, plain, system_error
from ldm.files.paths import writing
from ldm.runtime import roll_call
from ldm.runtime.launcher import (
    LAUNCHER_SECONDS,
    end_with_launcher,
    is_scheduler,
    local_index,
    process_index,
    process_name,
)
from ldm.runtime.roll_call import ReportedError

FIRST_PROCESS_SECONDS = 15.0  # how much later than the others the first process may report an error
USER_ERROR_CODE = 2  # as in ldm.runtime.script
LONGEST_LOGGED_ERROR = 2000  # characters


@contextmanager
def first_process_prints() -> Iterator[None]:
    """Show progress bars in the first process only, and delay the errors of the others.

    Where this process ends with an error, the others end too, and this one ends when its launcher does. Enter this
    before tqdm is imported.
    """
    end_with_launcher()
    if is_scheduler() or process_index() == 0:
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            _tell_the_others(error)
            raise
        return
    before = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    try:
        yield
    except KeyboardInterrupt as error:
        _tell_the_others(error)
        raise
    except ReportedError:  # one process of each host reports it
        if local_index():
            time.sleep(LAUNCHER_SECONDS + local_index())
        raise
    except Exception as error:
        time.sleep(FIRST_PROCESS_SECONDS)
        _tell_the_others(error)
        if isinstance(error, UserError):
            raise UserError(f"{process_name()}: {error}") from None
        raise
    finally:
        os.environ.pop("TQDM_DISABLE")
        if before is not None:
            os.environ["TQDM_DISABLE"] = before


def _tell_the_others(error: BaseException) -> None:
    """Tell the others that this process ends, and with which exit code they end."""
    # It imports NumPy, which starts threads: ldm.runtime.script must block the signals before.
    from ldm.runtime import peers

    if isinstance(error, ReportedError):
        peers.fail(str(error), USER_ERROR_CODE)  # all have been told already where they are not connected
        return
    name = f"the scheduler on {plain(socket.gethostname())}" if is_scheduler() else process_name()
    if isinstance(error, KeyboardInterrupt):
        peers.fail(f"{name} was interrupted", wait=False)
        return
    if isinstance(error, OSError) and error.errno is not None:
        error = system_error(error)
    is_users = isinstance(error, (UserError, MemoryError))
    message = f"{name}: {error if isinstance(error, UserError) else repr(error)}"
    if peers.are_connected():
        peers.fail(message, USER_ERROR_CODE if is_users else peers.EXIT_CODE)
    else:
        roll_call.report(message)


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
