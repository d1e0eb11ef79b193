"""The project's log: on the screen above the progress bars, and in a file where there is one."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from ldm.errors import plain
from ldm.files.paths import writing

LONGEST_LINE = 2000  # characters
MOST_WARNINGS = 20  # of one kind


class PlainFormatter(logging.Formatter):
    """Formats a record on one line that a terminal shows as it is, whatever a caption or a file name holds."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.exc_info:  # a traceback keeps its lines
            return text
        return plain(text, LONGEST_LINE)


class _Screen(logging.Handler):
    """Writes to standard error above the progress bar, not through it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except OSError:  # a closed terminal
            self.setLevel(logging.CRITICAL + 1)


class _File(logging.FileHandler):
    """Writes to the end of a file; where the disk refuses, says so once on the screen and goes on without the file."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        logging.getLogger("ldm").removeHandler(self)
        logging.getLogger("ldm").warning(
            "%s cannot be written (%s): what follows is on the screen alone", self.baseFilename,
            getattr(error, "strerror", None) or error,
        )  # fmt: skip


def set_up_logging(level: str, log_file: Path | None = None, prefix: bool = True) -> None:
    """Send the project's log to standard error and, where given, to the end of `log_file`.

    prefix: begin each line on the screen with its level. Raises UserError where `log_file` cannot be opened.
    """
    root = logging.getLogger("ldm")
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)
    screen = _Screen()
    screen.setFormatter(PlainFormatter("%(levelname)s: %(message)s" if prefix else "%(message)s"))
    root.addHandler(screen)
    if log_file is not None:
        with writing(log_file):
            log_file.parent.mkdir(parents=True, exist_ok=True)
            file = _File(log_file, encoding="utf-8", errors="backslashreplace")
        file.setFormatter(PlainFormatter("%(asctime)s %(levelname)s %(message)s"))
        root.addHandler(file)


def warn_each(logger: logging.Logger, message: str, items: Sequence[str]) -> None:
    """Warn of the first of many items, each on a line, and say how many more there are; log_level DEBUG names all."""
    for place, item in enumerate(items):
        logger.log(logging.WARNING if place < MOST_WARNINGS else logging.DEBUG, message, item)
    if len(items) > MOST_WARNINGS:
        logger.warning(message, f"{len(items) - MOST_WARNINGS:,} more (log_level DEBUG names all)")
