"""metrics.csv and log.txt."""

from __future__ import annotations

import csv
import logging
from pathlib import Path

import pytest

from ldm.runtime.logs import set_up_logging
from ldm.training.metrics_file import Metrics, MetricsFile


def read(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def test_rows_are_on_disk_as_they_are_written(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.csv", 0)
    metrics.write(Metrics(1, 0.5, 1e-4, 65536.0, 0.25, 1.5))
    assert read(tmp_path / "metrics.csv") == [
        ["step", "loss", "learning_rate", "loss_scale", "seconds", "gradient_norm"],
        ["1", "0.5", "0.0001", "65536", "0.25", "1.5"],
    ]
    metrics.close()


def test_resuming_drops_what_was_written_beyond_the_state(tmp_path):
    path = tmp_path / "metrics.csv"
    metrics = MetricsFile(path, 0)
    for step in range(1, 8):
        metrics.write(Metrics(step, 0.5, 1e-4, 1.0, 0.1, 1.0))
    metrics.close()
    path.write_text(path.read_text() + "8,0.1")  # killed in the middle of a line
    MetricsFile(path, 5).close()
    assert [row[0] for row in read(path)] == ["step", "1", "2", "3", "4", "5"]
    MetricsFile(path, 0).close()
    assert len(read(path)) == 1


def test_resuming_drops_lines_that_are_no_rows(tmp_path):
    path = tmp_path / "metrics.csv"
    rows = b"step,loss,learning_rate,loss_scale,seconds,gradient_norm\n1,0.5,1e-4,1,0.1,1\n"
    path.write_bytes(rows + b"\xff\x00" * 9 + b"\n,,,,,\nx,1,1,1,1,1\n" + b"\x00" * 99)
    MetricsFile(path, 5).close()
    assert [row[0] for row in read(path)] == ["step", "1"]


def test_a_full_disk_ends_the_metrics_with_one_warning(tmp_path, caplog, monkeypatch):
    metrics = MetricsFile(tmp_path / "metrics.csv", 0)
    metrics.close()
    metrics.file = open("/dev/full", "w")
    metrics.writer = csv.writer(metrics.file)
    for step in (1, 2, 3):
        metrics.write(Metrics(step, 0.5, 1e-4, 1.0, 0.1, 1.0))
    metrics.close()
    assert len(caplog.records) == 1
    assert "metrics.csv cannot be written (No space left on device" in caplog.text and "before step 1" in caplog.text


@pytest.fixture
def log():
    """The project's log, which is as it was afterwards."""
    log = logging.getLogger("ldm")
    yield log
    log.setLevel(logging.NOTSET)
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()


def test_a_full_disk_ends_the_log_file_with_one_line_on_the_screen(log, capsys):
    set_up_logging("INFO", Path("/dev/full"))
    for step in (1, 2, 3):
        log.info("step %d", step)
    lines = capsys.readouterr().err.splitlines()
    assert sorted(lines) == [
        "INFO: step 1", "INFO: step 2", "INFO: step 3",
        "WARNING: /dev/full cannot be written (No space left on device): what follows is on the screen alone",
    ]  # fmt: skip


def test_the_log_goes_to_file_and_screen_at_its_level(tmp_path, capsys, log):
    set_up_logging("WARNING", tmp_path / "run" / "log.txt")
    log.getChild("training.trainer").info("a small thing")
    log.getChild("training.trainer").warning("a large thing")
    text = (tmp_path / "run" / "log.txt").read_text()
    assert "a large thing" in text and "a small thing" not in text
    assert "a large thing" in capsys.readouterr().err
