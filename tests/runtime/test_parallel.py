"""Processes that a launcher started: the first speaks, the others keep a log file and are heard if they fail alone."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from ldm.errors import UserError
from ldm.runtime import parallel
from ldm.runtime.parallel import first_process_prints, is_scheduler, output_to_file, process_index
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """A call sets the environment that a launcher gives; nothing of the real one is left."""
    for name in (*parallel.LAUNCHER_VARIABLES, "RANK_ID", "TQDM_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(parallel, "FIRST_PROCESS_SECONDS", 0.05)
    return lambda **names: [monkeypatch.setenv(name, value) for name, value in names.items()]


@pytest.mark.parametrize(
    ("environment", "number"),
    [
        ({}, 0),
        (dict(RANK_ID="3"), 0),  # left from elsewhere: there is no launcher
        (dict(MS_ROLE="MS_WORKER", RANK_ID="0"), 0),
        (dict(MS_ROLE="MS_WORKER", RANK_ID="3"), 3),
        (dict(MS_ROLE="MS_WORKER", RANK_ID="x"), 0),
        (dict(RANK_TABLE_FILE="table.json", RANK_ID="1"), 1),
        (dict(OMPI_COMM_WORLD_RANK="2"), 2),
    ],
)
def test_the_number_is_the_launcher_s(launched, environment, number):
    launched(**environment)
    assert process_index() == number


def test_msrun_s_scheduler_is_no_process_that_trains(launched):
    launched(MS_ROLE="MS_SCHED", RANK_ID="0")
    assert is_scheduler()


def test_the_first_says_its_error_at_once_as_it_is(launched):
    launched(MS_ROLE="MS_WORKER", RANK_ID="0")
    with pytest.raises(UserError, match="^no such file$"), first_process_prints():
        raise UserError("no such file")
    assert "TQDM_DISABLE" not in os.environ


def test_another_lets_it_speak_first_and_then_says_its_own(launched, monkeypatch):
    launched(MS_ROLE="MS_WORKER", RANK_ID="1")
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    with pytest.raises(UserError, match="^process 1: no such file$"), first_process_prints():
        assert os.environ["TQDM_DISABLE"] == "1"
        raise UserError("no such file")
    assert waits == [parallel.FIRST_PROCESS_SECONDS]


@pytest.mark.parametrize("error", [UserError("a bad image"), ValueError("a fault")])
def test_what_another_prints_is_in_its_log_with_the_error(tmp_path, capfd, monkeypatch, error):
    for number, name in ((1, "stdout"), (2, "stderr")):  # pytest's own lead elsewhere
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


def test_two_processes_with_one_mistake_say_it_once():
    """As msrun starts them, and ends them all once the first has ended."""
    command = [sys.executable, "train_text_to_image.py", "--lora_rank=0"]
    environment = {**os.environ, "MS_ROLE": "MS_WORKER"}
    first, other = (
        subprocess.Popen(command, cwd=ROOT, env={**environment, "RANK_ID": number}, stderr=subprocess.PIPE, text=True)
        for number in ("0", "1")
    )
    said = first.communicate(timeout=60)[1]
    other.kill()
    assert first.returncode == 2 and said.count("error: --lora_rank: 0") == 1
    assert other.communicate()[1] == ""
