"""metrics.csv with one row for each step."""

from __future__ import annotations

import csv

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


def test_resuming_drops_rows_after_the_training_state(tmp_path):
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
