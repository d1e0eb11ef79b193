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
import glob
import io
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from ldm.errors import LONGEST_MESSAGE, UserError, plain, system_error
from ldm.files.atomic import remove_temporaries

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
GRACE = 5.0  # seconds
LAST_WORD = 1.0  # seconds that the last line may take

_started: float | None = None
ignored: set[int] = set()
_received: int | None = None
_screen = 2  # where the last line goes
_after_a_bar = False  # it begins a new line then
_describe: Callable[[], str] | None = None
_concluding = threading.Lock()


class _Screen(io.FileIO):
    """Standard error, which drops what is refused (a full disk behind `2> file`, a terminal or a reader that has gone):
    the work goes on without it.
    """

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def start() -> None:
    """Listen to the signals that end a program, and let every text be printed. Calling it again changes nothing."""
    global _started
    if _started is not None:
        return
    _started = time.time()
    _open_streams()
    # `nohup` and shells that start a process in the background ignore some: those are blocked and never waited for.
    heard = {number for number in EXIT_CODES if signal.getsignal(number) != signal.SIG_IGN}
    ignored.update(EXIT_CODES.keys() - heard)
    if not heard:
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, EXIT_CODES)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which interrupt_main calls
    threading.Thread(target=_listen, args=(heard,), daemon=True, name="signals").start()
    sys.excepthook = _except


def run(main: Callable[[], None]) -> None:
    """Call a script's `main`, and end the process as the module's first lines say."""
    start()
    try:
        with _concluded():
            main()
            sys.stdout.flush()
    except UserError as error:
        _fail(error)
    except BrokenPipeError as error:
        if not _has_lost_its_reader(sys.stdout.fileno()):  # but that of another process
            _fail(system_error(error))
        # What is left goes nowhere: so `| head` has it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno is None:  # a library's own, not an answer of the operating system
            raise
        _fail(system_error(error))
    except MemoryError:
        _fail(UserError("this machine's memory is not enough: use smaller sizes or batches, or a smaller file"))
    # What is left is Python's own end: a signal may simply end it.
    for number in EXIT_CODES:
        signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, EXIT_CODES)


def progress(describe: Callable[[], str] | None) -> None:
    """Let `describe` say what is done when the script is interrupted: "after step 3 of 10; ..."."""
    global _describe
    _describe = describe


def _open_streams() -> None:
    """Let every text be printed, wherever standard output and error lead."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file that is opened would have its number, and be printed into
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it takes the lowest free number
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)
    if sys.stderr is sys.__stderr__:  # not a test's or a notebook's
        encoding = getattr(sys.stderr, "encoding", "utf-8")
        sys.stderr = io.TextIOWrapper(io.BufferedWriter(_Screen(2, "w", closefd=False)), encoding, line_buffering=True)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a stream of a test or a notebook may have no such method
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def _concluded() -> Iterator[None]:
    """End the process with the block where it was interrupted, whatever the interrupted libraries raise. sys.excepthook
    is not enough for that: MindSpore sets its own when it compiles with a cache or meets other processes.
    """
    try:
        yield
    except BaseException as error:
        if _received is not None or isinstance(error, KeyboardInterrupt):
            _conclude()
        raise
    if _received is not None:
        _conclude()


def _has_lost_its_reader(number: int) -> bool:
    poll = select.poll()
    poll.register(number, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _fail(error: Exception) -> None:
    print(f"error: {plain(error, LONGEST_MESSAGE)}", file=sys.stderr)
    sys.exit(2)


def _listen(heard: set[int]) -> None:
    global _received, _screen, _after_a_bar
    received = signal.sigwait(heard)
    _after_a_bar = bool(getattr(getattr(sys.modules.get("tqdm"), "tqdm", None), "_instances", ()))
    # MindSpore reports an interrupted compilation as an error of many lines: nothing but the last line is shown.
    _screen = os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    _received = received
    _thread.interrupt_main()
    patience = threading.Timer(GRACE, _conclude)
    patience.daemon = True
    patience.start()
    signal.sigwait(heard)  # a second one means now
    _conclude()


def _except(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if _received is not None or issubclass(kind, KeyboardInterrupt):
        _conclude()
    sys.__excepthook__(kind, error, traceback)


def _conclude() -> None:
    """Leave nothing half-written, say in one line what was done, end the process. Python's own end is passed over: it
    waits for threads, and MindSpore's fails where its import was interrupted.
    """
    code = EXIT_CODES[signal.SIGINT if _received is None else signal.Signals(_received)]
    if not _concluding.acquire(timeout=LAST_WORD):  # another thread does it, and is stuck
        os._exit(code)
    try:
        remove_temporaries()
        _remove_compiler_notes()
        # Who reads these streams may have stopped reading without closing them, as `less` does.
        patience = threading.Timer(LAST_WORD, os._exit, [code])
        patience.daemon = True
        patience.start()
        done = f" {plain(_describe(), LONGEST_MESSAGE)}" if _describe is not None else ""
        line = "\n" * _after_a_bar + f"interrupted{done}\n"
        sys.stdout.flush()
        os.write(_screen, line.encode("utf-8", "backslashreplace"))
    finally:  # a closed terminal must not keep it from ending
        os._exit(code)


def _remove_compiler_notes() -> None:
    """Take away what MindSpore writes into the working directory when its compiler is interrupted."""
    for name in glob.glob("rank_*/om/analyze_fail.ir"):  # unlike Path.glob, it passes over what vanishes meanwhile
        file = Path(name)
        try:
            if file.stat().st_mtime >= (_started or 0) - 1:
                file.unlink()
                file.parent.rmdir()
                file.parent.parent.rmdir()
        except OSError:  # other files lie beside it
            continue
