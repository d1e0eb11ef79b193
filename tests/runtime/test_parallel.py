"""The output of processes of a launcher: the first prints, the others write log files and report their errors late."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from ldm.errors import UserError
from ldm.runtime import parallel
from ldm.runtime.launcher import LAUNCHER_VARIABLES, is_scheduler, process_index
from ldm.runtime.parallel import first_process_prints, output_to_file
from ldm.runtime.roll_call import ReportedError
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """A call sets the environment that a launcher gives; nothing of the real one is left."""
    for name in (*LAUNCHER_VARIABLES, "RANK_ID", "TQDM_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(parallel, "FIRST_PROCESS_SECONDS", 0.05)
    return lambda **names: [monkeypatch.setenv(name, value) for name, value in names.items()]


@pytest.mark.parametrize(
    ("environment", "index"),
    [
        ({}, 0),
        (dict(RANK_ID="3"), 0),  # without a launcher
        (dict(MS_ROLE="MS_WORKER", RANK_ID="0"), 0),
        (dict(MS_ROLE="MS_WORKER", RANK_ID="3"), 3),
        (dict(MS_ROLE="MS_WORKER", RANK_ID="x"), 0),
        (dict(RANK_TABLE_FILE="table.json", RANK_ID="1"), 1),
        (dict(OMPI_COMM_WORLD_RANK="2"), 2),
    ],
)
def test_the_index_is_the_launchers(launched, environment, index):
    launched(**environment)
    assert process_index() == index


def test_msruns_scheduler_is_recognised(launched):
    launched(MS_ROLE="MS_SCHED", RANK_ID="0")
    assert is_scheduler()


def test_the_first_process_reports_its_error_at_once(launched):
    launched(MS_ROLE="MS_WORKER", RANK_ID="0")
    with pytest.raises(UserError, match="^no such file$"), first_process_prints():
        raise UserError("no such file")
    assert "TQDM_DISABLE" not in os.environ


def test_another_process_waits_before_it_reports_its_error(launched, monkeypatch):
    launched(MS_ROLE="MS_WORKER", RANK_ID="1")
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    with pytest.raises(UserError, match="^process 1 on .*: no such file$"), first_process_prints():
        assert os.environ["TQDM_DISABLE"] == "1"
        raise UserError("no such file")
    assert waits == [parallel.FIRST_PROCESS_SECONDS]


@pytest.mark.parametrize(("place", "wait"), [("0", []), ("2", [parallel.LAUNCHER_SECONDS + 2])])
def test_one_process_of_each_host_reports_the_error_of_another(launched, monkeypatch, place, wait):
    launched(MS_ROLE="MS_WORKER", RANK_ID="9", DEVICE_ID=place)
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    with pytest.raises(ReportedError, match="^process 2 on host1: no such file$"), first_process_prints():
        raise ReportedError("process 2 on host1: no such file")
    assert waits == wait


@pytest.mark.parametrize("error", [UserError("a bad image"), ValueError("a fault")])
def test_output_and_error_go_to_the_log_file(tmp_path, capfd, monkeypatch, error):
    for number, name in ((1, "stdout"), (2, "stderr")):  # pytest replaces them
        monkeypatch.setattr(sys, name, open(number, "w", closefd=False))
    log = tmp_path / "run" / "log-1.txt"
    with pytest.raises(type(error)) as caught, output_to_file(log):
        print("of Python")
        os.write(2, b"of C++\n")
        raise error
    print("back", flush=True)
    text = log.read_text()
    assert "of Python" in text and "of C++" in text and str(error) in text
    assert capfd.readouterr() == ("back\n", "")
    assert ("its log: " in str(caught.value)) == isinstance(error, UserError)


def test_two_processes_report_the_same_error_once():
    """As msrun starts them, which ends all of them when the first has ended."""
    command = [sys.executable, "train_text_to_image.py", "--lora_rank=0"]
    environment = {**os.environ, "MS_ROLE": "MS_WORKER"}
    first, other = (
        subprocess.Popen(command, cwd=ROOT, env={**environment, "RANK_ID": number}, stderr=subprocess.PIPE, text=True)
        for number in ("0", "1")
    )
    message = first.communicate(timeout=60)[1]
    other.kill()
    assert first.returncode == 2 and message.count("error: --lora_rank: 0") == 1
    assert other.communicate()[1] == ""


def test_the_scripts_can_block_the_signals_before_a_library_starts_threads():
    code = "import sys, train_text_to_image; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
