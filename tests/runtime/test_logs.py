"""The log on the terminal and in a file."""

from __future__ import annotations

import logging

import pytest

from ldm.errors import UserError
from ldm.runtime.logs import set_up_logging

log = logging.getLogger("ldm.somewhere")


@pytest.fixture(autouse=True)
def restored_logging():
    yield
    root = logging.getLogger("ldm")
    root.setLevel(logging.NOTSET)
    for handler in list(root.handlers):
        root.removeHandler(handler)


def test_lines_of_the_level_go_to_the_terminal_and_to_the_end_of_the_file(tmp_path, capsys):
    (tmp_path / "log.txt").write_text("before\n")
    set_up_logging("WARNING", tmp_path / "log.txt")
    log.info("a small thing")
    log.warning("a large thing")
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert lines[0] == "before" and lines[1].endswith("WARNING a large thing") and len(lines) == 2
    assert capsys.readouterr().err == "WARNING: a large thing\n"
    set_up_logging("INFO", prefix=False)
    log.info("a small thing")
    assert capsys.readouterr().err == "a small thing\n"


def test_a_record_is_one_line_whatever_it_contains(tmp_path, capsys):
    set_up_logging("INFO", tmp_path / "log.txt")
    log.info("a caption: %s", "\x1b[2Jred\napple \udcba" + "x" * 10**6)
    for text in (capsys.readouterr().err, (tmp_path / "log.txt").read_text()):
        assert r"\x1b[2Jred apple \xba" in text and text.count("\n") == 1 and len(text) < 2100


def test_a_full_disk_is_reported_once_and_logging_continues(tmp_path, capsys):
    (tmp_path / "log.txt").symlink_to("/dev/full")
    set_up_logging("INFO", tmp_path / "log.txt")
    log.info("first")
    log.info("second")
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "log.txt" not in line] == ["INFO: first", "INFO: second"]
    assert len(lines) == 3 and "log.txt cannot be written (No space left on device)" in " ".join(lines)


def test_a_file_that_cannot_be_opened_is_an_error(tmp_path):
    (tmp_path / "log.txt").mkdir()
    with pytest.raises(UserError, match="log.txt cannot be written"):
        set_up_logging("INFO", tmp_path / "log.txt")
