"""tools/benchmark: the measurement of processes, which are replaced by fakes, and the table."""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from ldm.data.dataset import read_image_text_csv
from ldm.errors import UserError
from ldm.settings.model import load_model_config
from tests.conftest import ROOT
from tools.benchmark import inputs, metrics, run, works
from tools.benchmark.report import markdown
from tools.benchmark.run import summarise
from tools.benchmark.worker import Measurement, Worker, WorkerFailed
from tools.benchmark.works import MEMORY_TABLE, TABLE, WORKS, Work

FAKE = """
import sys, time
from tools.benchmark.worker import Turns
turns = Turns()
kind, log = sys.argv[1], sys.argv[2]
if kind == "broken":
    sys.exit("error: no such thing")
kept = []
def call():
    print("a library says something on standard output")
    if kind == "greedy":
        kept.append(b"x" * (400 << 20))
        time.sleep(5)
    if kind == "dies later" and kept:
        sys.exit("error: it was too much")
    kept.append(0)
    time.sleep(0.02)
    with open(log, "a") as file:
        file.write(kind[0])
turns.serve(call, {"fake": "1.0"})
"""
WORK = Work("fake", "a fake work", "unet", works.NANO, 2, 8, (1.0, 0.5), (1.1, 0.9))


def fake(kind, log):
    return [sys.executable, "-c", FAKE, kind, str(log)]


@pytest.fixture
def arguments():
    return argparse.Namespace(
        cores=os.sched_getaffinity(0), memory_limit=4.0, calls=3, apart=False, reference_python=None, repeats=1
    )


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """Return a function that replaces both sides by fakes, and returns the file to which each call adds a letter."""

    def choose(ours, peer):
        log = tmp_path / "log"
        log.touch()
        monkeypatch.setattr(run, "commands", lambda work, args: {"ours": fake(ours, log), "peer": fake(peer, log)})
        return log

    return choose


def process_state(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


class TestMeasuring:
    def test_the_sides_take_turns(self, arguments, commands):
        log = commands("a", "b")
        found = run.measure(WORK, arguments)
        assert log.read_text() == "abababab"
        for side in found.values():
            assert len(side.seconds) == len(side.cpu_seconds) == 3
            assert all(0.02 <= seconds < 5 for seconds in [side.first, *side.seconds])
            assert max(side.cpu_seconds) < 0.02, "sleeping is not computing"
            assert 0.005 < side.memory_gb < 1
            assert side.versions == {"fake": "1.0"}

    def test_short_workloads_have_more_calls(self, arguments, commands):
        log = commands("a", "b")
        run.measure(dataclasses.replace(WORK, calls=2), arguments)
        assert log.read_text() == "ab" * 6

    def test_the_sides_run_one_after_the_other_with_apart(self, arguments, commands):
        log = commands("a", "b")
        arguments.apart = True
        run.measure(WORK, arguments)
        assert log.read_text() == "aaaabbbb"

    def test_a_process_is_stopped_between_its_turns(self, tmp_path):
        worker = Worker(fake("a", tmp_path / "log"), os.sched_getaffinity(0), 4.0)
        try:
            worker.call()
            for _ in range(100):
                if process_state(worker.process.pid) == "T":
                    break
                time.sleep(0.01)
            assert process_state(worker.process.pid) == "T"
        finally:
            worker.kill()

    def test_a_side_that_exceeds_the_memory_limit_is_ended(self, arguments, commands):
        commands("greedy", "b")
        arguments.memory_limit = 0.2
        found = run.measure(WORK, arguments)
        assert found["ours"] == "over 0.2 GB"
        assert len(found["peer"].seconds) == 3

    @pytest.mark.parametrize("kind, message", [("broken", "no such thing"), ("dies later", "it was too much")])
    def test_a_process_that_fails_is_quoted(self, arguments, commands, kind, message):
        commands("a", kind)
        found = run.measure(WORK, arguments)
        assert found["peer"] == f"failed: error: {message}"
        assert isinstance(found["ours"], Measurement)

    def test_a_missing_program_fails_too(self):
        with pytest.raises((OSError, WorkerFailed)):
            Worker(["/no/such/python"], os.sched_getaffinity(0), 4.0)

    def test_the_processes_end_with_the_runner_even_while_stopped(self, tmp_path):
        program = (
            f"import os, sys, time; from tools.benchmark.worker import Worker; "
            f"worker = Worker({fake('a', tmp_path / 'log')!r}, os.sched_getaffinity(0), 4.0); "
            f"print(worker.process.pid, flush=True); time.sleep(60)"
        )
        runner = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        pid = int(runner.stdout.readline())
        assert os.path.exists(f"/proc/{pid}")
        runner.send_signal(signal.SIGKILL)
        runner.wait()
        for _ in range(200):
            if not os.path.exists(f"/proc/{pid}") or process_state(pid) == "Z":
                return
            time.sleep(0.02)
        os.kill(pid, signal.SIGKILL)
        pytest.fail("the worker did not end")


def side(*seconds, memory=1.0, first=9.0):
    return Measurement(first, list(seconds), [value / 2 for value in seconds], memory, 1.0, {"numpy": "1"})


class TestTheTable:
    def test_medians_over_all_calls_and_their_ratios(self):
        found = [
            {"ours": side(1, 2, memory=2), "peer": side(4, 4, memory=1)},
            {"ours": side(3, 100, memory=3), "peer": side(5, 6, memory=2)},
        ]
        line = summarise(WORK, found)
        assert line["ours"]["seconds"] == 2.5
        assert line["peer"]["seconds"] == 4.5
        assert line["time_ratio"] == pytest.approx(2.5 / 4.5)
        assert line["cpu_ratio"] == pytest.approx(2.5 / 4.5)
        assert line["memory_ratio"] == pytest.approx(2.5 / 1.5)
        assert line["ours"]["first_seconds"] == 9

    def test_a_workload_with_a_single_call_is_measured_by_it(self):
        line = summarise(WORK, [{"ours": side(first=3.0), "peer": side(first=6.0)}])
        assert line["time_ratio"] == 0.5
        assert "cpu_ratio" not in line

    def test_without_a_peer_there_is_no_ratio(self):
        line = summarise(WORK, [{"ours": side(1)}])
        assert line["peer"] == {"problem": "not measured"}
        assert "time_ratio" not in line

    def test_a_failure_is_not_hidden_by_another_repeat(self):
        line = summarise(WORK, [{"ours": side(1), "peer": side(1)}, {"ours": "over 20 GB", "peer": side(1)}])
        assert line["ours"] == {"problem": "over 20 GB"}

    def test_markdown(self):
        alone = dataclasses.replace(WORK, title="alone", peer="none", time=(20.0, 8.0), memory=None)
        result = {
            "machine": {"cpu": "a CPU", "cores": [0, 1], "memory_gb": 24, "load": 0.1, "python": "3.11"},
            "settings": {"repeats": 2, "calls": 5, "apart": False},
            "works": [
                summarise(WORK, [{"ours": side(0.5), "peer": side(20, memory=2)}]),
                summarise(alone, [{"ours": side(12.3)}]),
            ],
        }
        text = markdown(result)
        head, _, table = text.partition("\n\n")
        assert "a CPU" in head and "2 cores" in head and "numpy 1" in head
        lines = table.splitlines()
        assert lines[2] == (
            "| a fake work | 500 ms | 20.0 s | 0.03 | 0.03 | 1, 0.5 | 1.00 GB | 2.00 GB | 0.50 | "
            "1.1, 0.9 | 9.00 s | 9.00 s |"
        )
        assert lines[3] == "| alone | 12.3 s | none |  |  | 20 s, 8 s | 1.00 GB |  |  |  | 9.00 s |  |"
        assert {line.count("|") for line in lines} == {13}


class TestChoosing:
    def test_the_table_and_the_memory_table_share_no_name(self):
        assert not set(TABLE) & set(MEMORY_TABLE)
        assert all(work.config.is_file() for work in WORKS.values())
        assert all(name == work.name for name, work in WORKS.items())

    @pytest.mark.parametrize(
        "argv, expected",
        [
            ([], list(TABLE)),
            (["text"], ["text"]),
            (["text", "lora_256"], ["text", "lora_256"]),
            (["--memory_table"], list(MEMORY_TABLE)),
            (["lora_256_b4"], ["lora_256_b4"]),
        ],
    )
    def test_workloads_are_chosen_by_name(self, argv, expected):
        assert [work.name for work in run.chosen_works(run.parse(argv))] == expected

    def test_an_unknown_name_is_refused(self):
        with pytest.raises(UserError, match="no workload 'textt'.*--list"):
            run.chosen_works(run.parse(["textt"]))

    @pytest.mark.parametrize(
        "argv",
        [
            ["--cores", "x"],
            ["--cores", "999"],
            ["--cores", ""],
            ["--repeats", "0"],
            ["--calls", "0"],
            ["--memory_limit", "much"],
        ],
    )
    def test_invalid_settings(self, argv):
        with pytest.raises(UserError, match=argv[0]):
            run.parse(argv)

    def test_an_unusable_output_is_refused_before_the_work(self, tmp_path, monkeypatch):
        monkeypatch.setattr(run, "measure_all", lambda *arguments: pytest.fail("it began"))
        (tmp_path / "out.md").mkdir()
        with pytest.raises(UserError, match="--output .*out.md is a folder"):
            run.main(["text", "--output", str(tmp_path / "out")])

    def test_without_diffusers_only_this_project_is_measured(self, tmp_path, capsys):
        assert run.reference_python(tmp_path / "python") is None
        assert "only this project is measured" in capsys.readouterr().err

    def test_the_peer_of_a_merged_lora_is_the_base(self, arguments):
        found = run.commands(TABLE["merged_nano"], arguments)
        assert found["peer"] == [*found["ours"], "--kind", "generate"]

    def test_every_peer_is_known(self):
        from tools.benchmark import ours

        assert {work.peer for work in TABLE.values()} <= {"reference", "none", *ours.KINDS}


class TestInputs:
    def test_both_sides_draw_the_same_inputs(self):
        work = TABLE["lora_nano"]
        config = load_model_config(work.config)
        first, second = inputs.draw_inputs(config, work), inputs.draw_inputs(config, work)
        assert {name: array.shape for name, array in first.items()} == {
            "latents": (16, 4, 16, 16),
            "noise": (16, 4, 16, 16),
            "text_embeddings": (16, 77, 96),
            "timesteps": (16,),
            "tokens": (16, 77),
        }
        assert all(np.array_equal(first[name], second[name]) for name in first)

    def test_the_epochs_images_are_a_data_set(self, tmp_path):
        inputs.write_images(tmp_path / "data", 16)
        rows = read_image_text_csv(tmp_path / "data").rows
        assert len(rows) == len({row.caption for row in rows}) == works.EPOCH_IMAGES


class TestMetrics:
    def test_every_side_gets_its_row(self, monkeypatch, capsys):
        monkeypatch.setattr(metrics, "take_turns", lambda commands, *rest, **more: dict.fromkeys(commands, side(2, 4)))
        metrics.main(["--images", "8", "--size", "8", "--reference_python", "python"])
        rows = capsys.readouterr().out.splitlines()[-3:]
        assert rows[0] == "| this project | 4.00 | 2.67 | 8.00 | 9.0 | 1024 |"
        assert [row.split(" | ")[0] for row in rows[1:]] == ["| pytorch-fid", "| torchmetrics"]

    def test_a_side_that_fails_is_an_error_with_its_python(self, monkeypatch):
        measured = {"this project": side(1, 2), "pytorch-fid": "failed: no torch", "torchmetrics": side(1, 2)}
        monkeypatch.setattr(metrics, "take_turns", lambda *arguments, **more: measured)
        with pytest.raises(UserError, match="pytorch-fid failed: no torch: check that a/python has"):
            metrics.main(["--images", "1", "--size", "8", "--reference_python", "a/python"])

    def test_the_references_need_no_package_of_this_project(self):
        program = (
            "import sys; import tools.benchmark.metrics_worker; print('ldm' in sys.modules, 'yaml' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
        assert done.stdout == "False False\n"


@pytest.mark.usefixtures("graph_mode")
@pytest.mark.parametrize("kind", ["text", "decode", "epoch", "merged", "checkpointed"])
def test_the_workloads_run(kind, tiny_config, monkeypatch):
    """With a tiny model. The other workloads are parts of these."""
    from tools.benchmark import ours

    monkeypatch.setattr(works, "STEPS", 2)
    monkeypatch.setattr(inputs, "EPOCH_IMAGES", 2)
    work = Work("tiny", "tiny", kind, ROOT / "tests" / "tiny.yaml", 2, 8)
    ours.KINDS[kind](work, tiny_config)()
