"""How a script starts and ends: signals, text streams, errors on one line and exit codes.

    if __name__ == "__main__":
        start_script()  # before the imports that take seconds
    ...
    if __name__ == "__main__":
        run_script(main)

Exit codes: 0 for success, what `main` returns for a result that is no success, 2 for a UserError or an error of the
operating system, 130, 143 and 129 for Ctrl-C, `kill` and a closed terminal. Any other exception is a fault of the
program and keeps its traceback.

MindSpore takes Ctrl-C from Python while it runs a graph, and Python handles no signal while MindSpore compiles. So the
signals are blocked in all threads, and a thread of this module waits for them. Threads inherit the blocked signals from
the thread that starts them, therefore start_script comes before the import of any library that starts threads. On a
signal the waiting thread interrupts the main thread. If the main thread does not end within GRACE_SECONDS, the waiting
thread ends the process. Files are written under temporary names and then renamed, so this is safe at any moment.
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
from typing import Any, NoReturn

from ldm.errors import LONGEST_MESSAGE, UserError, plain, system_error
from ldm.files.atomic import remove_temporaries

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
GRACE_SECONDS = 5.0  # how long the main thread may take to end after a signal
LAST_LINE_SECONDS = 1.0  # how long printing the last line may take
LAST_WORK_SECONDS = 5.0  # how long what `at_interrupt` was given may take

_started: float | None = None
ignored_signals: set[int] = set()
_received: int | None = None
_terminal = 2  # the file descriptor of the last line
_progress_bar_shown = False  # the last line begins on a new line then
_describe: Callable[[], str] | None = None
_last_work: Callable[[], None] | None = None
_ending = threading.Lock()


class _StandardError(io.FileIO):
    """Standard error that ignores failed writes (a full disk behind `2> file`, a closed terminal or pipe)."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def start_script() -> None:
    """Handle the signals that end a program, and make every text printable. Further calls have no effect."""
    global _started
    if _started is not None:
        return
    _started = time.time()
    _open_streams()
    # `nohup`, and shells that start a process in the background, ignore some signals. These stay ignored.
    handled = {number for number in EXIT_CODES if signal.getsignal(number) != signal.SIG_IGN}
    ignored_signals.update(EXIT_CODES.keys() - handled)
    if not handled:
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, EXIT_CODES)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # interrupt_main calls it
    threading.Thread(target=_wait_for_signal, args=(handled,), daemon=True, name="signals").start()
    sys.excepthook = _excepthook


def run_script(main: Callable[[], int | None]) -> None:
    """Call a script's `main` and end the process with the exit codes of this module.

    A number that `main` returns is the exit code, such as 1 for a comparison that finds a difference.
    """
    start_script()
    code = None
    try:
        with _end_if_interrupted():
            code = main()
            sys.stdout.flush()
    except UserError as error:
        _fail(error)
    except BrokenPipeError as error:
        if not _has_no_reader(sys.stdout.fileno()):  # the error is of another pipe
            _fail(system_error(error))
        # The reader has closed the pipe, like `head`, which is not an error. The rest of the output is dropped.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno is None:  # raised by a library, not by the operating system
            raise
        _fail(system_error(error))
    except MemoryError:
        _fail(UserError("this machine's memory is not enough: use smaller sizes or batches, or a smaller file"))
    # Only Python's own shutdown follows, which a signal may end at once.
    for number in EXIT_CODES:
        signal.signal(number, signal.SIG_IGN if number in ignored_signals else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, EXIT_CODES)
    if code:
        sys.exit(code)


def describe_progress(describe: Callable[[], str] | None) -> None:
    """Set what describes the work done so far ("after step 3 of 10; ...") when the script is interrupted."""
    global _describe
    _describe = describe


def at_interrupt(work: Callable[[], None] | None) -> None:
    """Set what is done before a process ends whose main thread does not unwind in time, such as writing a report.

    A step of a large network on a CPU takes longer than GRACE_SECONDS. The work is done in another thread, and is left
    alone after LAST_WORK_SECONDS.
    """
    global _last_work
    _last_work = work


def progress() -> str:
    """Return the description of the work done so far, "" if there is none."""
    return "" if _describe is None else _describe()


def was_interrupted() -> bool:
    """Return whether a signal is ending the script, whatever exception the interrupted libraries raise."""
    return _received is not None


def _open_streams() -> None:
    """Make every text printable, whatever standard output and standard error lead to."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # it is closed, so the next file to be opened would get its number and the output
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # opens with the lowest free number
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)
    if sys.stderr is sys.__stderr__:  # not replaced by a test or a notebook
        encoding = getattr(sys.stderr, "encoding", "utf-8")
        sys.stderr = io.TextIOWrapper(
            io.BufferedWriter(_StandardError(2, "w", closefd=False)), encoding, line_buffering=True
        )
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a stream of a test or a notebook may lack the method
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def _end_if_interrupted() -> Iterator[None]:
    """End the process when the block is interrupted, whatever exception the interrupted libraries raise.

    sys.excepthook does not suffice: MindSpore replaces it when it compiles with a cache or connects to other processes.
    """
    try:
        yield
    except BaseException as error:
        if _received is not None or isinstance(error, KeyboardInterrupt):
            _end_process()
        raise
    if _received is not None:
        _end_process()


def _has_no_reader(number: int) -> bool:
    """Whether nobody reads from the pipe with this file descriptor."""
    poll = select.poll()
    poll.register(number, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _fail(error: Exception) -> None:
    """Print an error on one line and exit with code 2."""
    print(f"error: {plain(error, LONGEST_MESSAGE)}", file=sys.stderr)
    sys.exit(2)


def _wait_for_signal(handled: set[int]) -> None:
    """Wait for a signal, interrupt the main thread, and end the process if that takes long or a second signal comes."""
    global _received, _terminal, _progress_bar_shown
    received = signal.sigwait(handled)
    _progress_bar_shown = bool(getattr(getattr(sys.modules.get("tqdm"), "tqdm", None), "_instances", ()))
    # MindSpore reports an interrupted compilation as an error of many lines. Only the last line of the script is shown.
    _terminal = os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    _received = received
    _thread.interrupt_main()
    timer = threading.Timer(GRACE_SECONDS, _end_process)
    timer.daemon = True
    timer.start()
    signal.sigwait(handled)  # a second signal ends the process at once
    _end_process()


def _excepthook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if _received is not None or issubclass(kind, KeyboardInterrupt):
        _end_process()
    sys.__excepthook__(kind, error, traceback)


def _end_process() -> NoReturn:
    """Remove temporary files, print one line about the work done so far, and end the process.

    Python's own shutdown is skipped: it waits for threads, and MindSpore's part fails where its import was interrupted.
    """
    code = EXIT_CODES[signal.SIGINT if _received is None else signal.Signals(_received)]
    if not _ending.acquire(timeout=LAST_LINE_SECONDS):  # another thread is ending the process and hangs
        os._exit(code)
    try:
        if _last_work is not None:
            worker = threading.Thread(target=_last_work, daemon=True)
            worker.start()
            worker.join(LAST_WORK_SECONDS)
        remove_temporaries()
        _remove_compiler_files()
        # A reader such as `less` may have stopped reading without closing the stream.
        timer = threading.Timer(LAST_LINE_SECONDS, os._exit, [code])
        timer.daemon = True
        timer.start()
        done = f" {plain(_describe(), LONGEST_MESSAGE)}" if _describe is not None else ""
        line = "\n" * _progress_bar_shown + f"interrupted{done}\n"
        sys.stdout.flush()
        os.write(_terminal, line.encode("utf-8", "backslashreplace"))
    finally:  # even if the terminal is closed
        os._exit(code)


def _remove_compiler_files() -> None:
    """Remove the files that MindSpore writes into the working directory when its compiler is interrupted."""
    for name in glob.glob("rank_*/om/analyze_fail.ir"):  # unlike Path.glob, it ignores files that vanish meanwhile
        file = Path(name)
        try:
            if file.stat().st_mtime >= (_started or 0) - 1:
                file.unlink()
                file.parent.rmdir()
                file.parent.parent.rmdir()
        except OSError:  # the folder holds other files
            continue
