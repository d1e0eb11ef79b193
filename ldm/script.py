"""How a script begins and ends: signals, text streams, errors as one line and an exit code.

    if __name__ == "__main__":
        start()  # before the imports that take seconds
    ...
    if __name__ == "__main__":
        run(main)

Exit codes: 0 done; 2 a UserError, or an answer of the operating system; 130, 143, 129 for Ctrl-C, `kill` and a closed
terminal. Anything else is a fault of the program and keeps its traceback.

MindSpore takes Ctrl-C from Python while it runs a graph, and Python hears no signal while MindSpore compiles. So the
signals are blocked for all threads (threads inherit it: `start` comes before any library makes its own) and a thread of
this module waits for them. It interrupts the main thread; where that does not end within GRACE seconds, it ends the
process itself. Everything is written beside and renamed, so this is safe at any moment.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from ldm.atomic import remove_temporaries
from ldm.errors import LONGEST_MESSAGE, UserError, plain, system_error

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
GRACE = 5.0  # seconds

_started: float | None = None
_received = signal.SIGINT
_describe: Callable[[], str] | None = None


def start() -> None:
    """Listen to the signals that end a program, and let every text be printed. Calling it again changes nothing."""
    global _started
    if _started is not None:
        return
    _started = time.time()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a stream of a test or a notebook may have no such method
            stream.reconfigure(errors="backslashreplace")
    # `nohup` and shells that start a process in the background ignore some: they stay ignored.
    heard = {number for number in EXIT_CODES if signal.getsignal(number) != signal.SIG_IGN}
    if not heard:
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_BLOCK, heard)
    threading.Thread(target=_listen, args=(heard,), daemon=True, name="signals").start()
    sys.excepthook = _except


def run(main: Callable[[], None]) -> None:
    """Call a script's `main`, and end the process as the module's first lines say."""
    start()
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        _fail(error)
    except BrokenPipeError:  # its reader has gone, as `| head` does; what is left goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.filename is None and error.errno is None:  # not an answer of the operating system
            raise
        _fail(system_error(error))
    except MemoryError:
        _fail(UserError("this machine's memory is not enough: use smaller sizes or batches, or a smaller file"))


def progress(describe: Callable[[], str] | None) -> None:
    """Let `describe` say what is done when the script is interrupted: "after step 3 of 10; ..."."""
    global _describe
    _describe = describe


def _fail(error: Exception) -> None:
    print(f"error: {plain(error, LONGEST_MESSAGE)}", file=sys.stderr)
    sys.exit(2)


def _listen(heard: set[int]) -> None:
    global _received
    _received = signal.sigwait(heard)
    _thread.interrupt_main()
    # A second signal means now.
    signal.sigtimedwait(heard, GRACE)
    _conclude()


def _except(kind: type[BaseException], error: BaseException, traceback) -> None:
    if issubclass(kind, KeyboardInterrupt):
        _conclude()
    sys.__excepthook__(kind, error, traceback)


def _conclude() -> None:
    """Say in one line what was done, leave nothing half-written, end the process. Python's own end is passed over: it
    waits for threads, and MindSpore's fails where its import was interrupted."""
    done = f" {plain(_describe(), LONGEST_MESSAGE)}" if _describe is not None else ""
    try:
        sys.stdout.flush()
        os.write(2, f"interrupted{done}\n".encode("utf-8", "backslashreplace"))
    except OSError:  # a closed terminal
        pass
    remove_temporaries()
    _remove_compiler_notes()
    os._exit(EXIT_CODES[signal.Signals(_received)])


def _remove_compiler_notes() -> None:
    """Take away what MindSpore writes into the working directory when its compiler is interrupted."""
    for file in Path().glob("rank_*/om/analyze_fail.ir"):
        try:
            if file.stat().st_mtime >= (_started or 0) - 1:
                file.unlink()
                file.parent.rmdir()
                file.parent.parent.rmdir()
        except OSError:  # other files lie beside it
            continue
