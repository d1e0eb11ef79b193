"""The log of the project: on standard error above the progress bars, and in a file."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from ldm.errors import plain
from ldm.files.paths import writing

LONGEST_LINE = 2000  # characters
MAX_WARNINGS = 20  # of one kind; the rest is counted


class PlainFormatter(logging.Formatter):
    """Formats a record as one printable line, whatever characters a caption or a file name contains."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.exc_info:  # a traceback keeps its lines
            return text
        return plain(text, LONGEST_LINE)


class _TerminalHandler(logging.Handler):
    """Writes to standard error above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except OSError:  # the terminal is closed
            self.setLevel(logging.CRITICAL + 1)


class _LogFileHandler(logging.FileHandler):
    """Appends to a file. If that fails, it warns once on the terminal and logs there only."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        logging.getLogger("ldm").removeHandler(self)
        logging.getLogger("ldm").warning(
            "%s cannot be written (%s): the rest of the log is on the terminal only",
            self.baseFilename,
            getattr(error, "strerror", None) or error,
        )


def set_up_logging(level: str, log_file: Path | None = None, prefix: bool = True) -> None:
    """Send the log of the project to standard error, and append it to `log_file` if one is given.

    With `prefix`, lines on the terminal begin with their level. Raises UserError if the file cannot be opened.
    """
    root = logging.getLogger("ldm")
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)
    terminal = _TerminalHandler()
    terminal.setFormatter(PlainFormatter("%(levelname)s: %(message)s" if prefix else "%(message)s"))
    root.addHandler(terminal)
    if log_file is not None:
        with writing(log_file):
            log_file.parent.mkdir(parents=True, exist_ok=True)
            file = _LogFileHandler(log_file, encoding="utf-8", errors="backslashreplace")
        file.setFormatter(PlainFormatter("%(asctime)s %(levelname)s %(message)s"))
        root.addHandler(file)


def warn_each(logger: logging.Logger, message: str, items: Sequence[str]) -> None:
    """Warn of each of the first MAX_WARNINGS items, and of the number of the others, which are logged at DEBUG."""
    for i, item in enumerate(items):
        logger.log(logging.WARNING if i < MAX_WARNINGS else logging.DEBUG, message, item)
    if len(items) > MAX_WARNINGS:
        logger.warning(message, f"{len(items) - MAX_WARNINGS:,} more (log_level DEBUG names all)")
