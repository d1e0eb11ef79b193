"""When a run writes its report, also when it ends early, and that this changes nothing that is trained."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from types import SimpleNamespace

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.runtime import script
from ldm.settings.train import TrainSettings
from ldm.training.metrics_file import Metrics
from ldm.training.own_files import find_states
from ldm.training.rates import Rates
from ldm.training.report import writer
from ldm.training.report.facts import parts_of
from ldm.training.report.records import read_record
from ldm.training.report.tensorboard import TensorBoard
from ldm.training.report.writer import Reports
from ldm.training.trainer import train
from ldm.training.training_state import load_state
from tests.training.micro import ROOT, STEPS, command, metrics
from tests.training.report.runs import HOSTILE, write_metrics, write_samples, write_validation


def facts(output) -> dict:
    return json.loads((output / "run.json").read_text())


# ---- with real runs --------------------------------------------------------------------------------------------------


def test_a_run_says_what_it_trained_on_and_how_long_it_took(full_run, micro_data):
    found = facts(full_run)
    assert found["run"]["steps"] == STEPS and found["data"]["rows"] == found["data"]["captions"] == 10
    assert found["data"]["buckets"] == [[16, 16, 10]] and found["data"]["layouts"] == ["image_text_csv"]
    [session] = found["sessions"]
    assert (session["first_step"], session["last_step"], session["ended"]) == (1, STEPS, "finished")
    assert 0 < session["first_step_seconds"] < session["seconds"] and session["peak_memory"] > 50e6
    page = (full_run / "report.html").read_text(encoding="utf-8")
    assert "The run is complete." in page and f"of {STEPS}" in page and 'id="loss"' in page
    assert os.uname().nodename not in json.dumps(found) and str(micro_data) not in json.dumps(found)


@pytest.mark.usefixtures("graph_mode")
def test_reports_change_nothing_that_is_trained(full_run, saved_run, settings):
    """The run in `full_run` wrote reports. This one trains its last steps without."""
    newest = find_states(saved_run / "ckpt")[0]
    newest.unlink()
    from tests.training.micro import FULL

    train(settings(saved_run, **FULL, resume=True, report_to=[]))
    ours, theirs = load_state(newest), load_state(full_run / "ckpt" / newest.name)
    assert ours.arrays.keys() == theirs.arrays.keys() and ours.scaler == theirs.scaler
    for name, array in ours.arrays.items():
        np.testing.assert_array_equal(array, theirs.arrays[name], err_msg=name)
    assert not (saved_run / "report.html").exists()


def test_an_interrupted_run_leaves_its_report(micro_base_model, micro_data, tmp_path):
    output = tmp_path / "run"
    arguments = command(micro_base_model, micro_data, output, "--max_steps=100000", "--ckpt_save_interval=100000")
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while not (output / "metrics.csv").exists() or len(metrics(output)) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and b"interrupted" in errors
    last = int(metrics(output)[-1]["step"])
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "The run was interrupted." in page and f"<strong>{last:,}</strong><span>of 100,000</span>" in page
    assert facts(output)["sessions"][0]["ended"] == "interrupted"
    assert not list(output.glob(".*partial*"))


# ---- without a run ---------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Makes what Reports sees of a run that has done some steps."""
    monkeypatch.setattr(writer, "describe_run", lambda run: {"run": {"steps": 10}, "parts": parts_of(run)})

    def make(steps_done: int = 0, validates: bool = False, samples: bool = False, **settings):
        return SimpleNamespace(
            validation=object() if validates else None, samples=SimpleNamespace(prompts=["a cat"] * samples),
            output=tmp_path, is_first_process=True, settings=TrainSettings(**settings),
            status=SimpleNamespace(steps_done=steps_done), plan=SimpleNamespace(steps=10, steps_per_epoch=5.0),
            runtime=SimpleNamespace(is_ascend=False), rates=Rates(1.0, 1.0, {}),
        )  # fmt: skip

    return make


def test_a_run_that_fails_says_why(run, tmp_path):
    with pytest.raises(UserError), Reports(run()):
        write_metrics(tmp_path, 3)
        raise UserError(f"the loss is not finite {HOSTILE}")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "The run ended with an error: the loss is not finite &lt;/script&gt;" in page


def test_an_interrupt_within_a_long_step_leaves_the_report(run, tmp_path):
    """The main thread does not unwind, so another thread writes."""
    with Reports(run()):
        write_metrics(tmp_path, 3)
        assert script._last_work is not None
        script._last_work()
        assert "The run was interrupted." in (tmp_path / "report.html").read_text(encoding="utf-8")
        (tmp_path / "report.html").unlink()
    assert script._last_work is None
    assert not (tmp_path / "report.html").exists()  # it was written already


def test_each_start_is_kept_and_a_killed_one_is_called_so(run, tmp_path):
    with Reports(run()) as reports:
        reports.add(Metrics(1, 0.5, 1e-3, 1.0, 9.0, 0.2), 0.5)
        reports.update()
        killed = (tmp_path / "run.json").read_text()
    (tmp_path / "run.json").write_text(killed)
    with Reports(run(steps_done=1)) as reports:
        reports.add(Metrics(2, 0.5, 1e-3, 1.0, 8.0, 0.2), 0.5)
    found = [(start["first_step"], start["last_step"], start["ended"]) for start in facts(tmp_path)["sessions"]]
    assert found == [(1, 1, "killed"), (2, 2, "finished")]
    with Reports(run()):  # a new run in the same folder
        pass
    assert len(facts(tmp_path)["sessions"]) == 1


def test_reports_take_a_small_share_of_the_time(run, monkeypatch):
    clock, written = [100.0], []
    monkeypatch.setattr(writer.time, "perf_counter", lambda: clock[0])

    def write(output):
        written.append(clock[0])
        clock[0] += 0.5

    monkeypatch.setattr(writer, "write_report", write)
    with Reports(run()) as reports:
        for _ in range(60):
            clock[0] += 1
            reports.update()
        assert written == [101.0, 126.5, 152.0]  # 0.5 s are 2 % of 25 s


def test_the_last_step_writes_one_report(run, monkeypatch):
    written = []
    monkeypatch.setattr(writer, "write_report", written.append)
    with Reports(run(steps_done=10)) as reports:
        reports.update()
        assert written == []
    assert len(written) == 1


def test_a_disk_that_refuses_is_one_warning(run, tmp_path, caplog):
    (tmp_path / "report.html").mkdir()
    with Reports(run()) as reports:
        reports.update()
        reports._next = 0
        reports.update()
    assert caplog.text.count("the report cannot be written") == 1 and "report.html" in caplog.text


@pytest.mark.parametrize("parts", [[], ["validation"], ["samples"]])
def test_what_an_earlier_run_left_in_the_folder_is_not_shown_as_this_run_s(run, tmp_path, parts):
    write_validation(tmp_path)
    write_samples(tmp_path, ("a cat",))
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "best.json").write_text('{"step": 80, "loss": 0.5}')
    assert read_record(tmp_path).parts == ["validation", "samples"]  # a folder without run.json
    with Reports(run(validates="validation" in parts, samples="samples" in parts)):
        pass
    record = read_record(tmp_path)
    assert bool(record.validation) == (record.best is not None) == ("validation" in parts)
    assert bool(record.strips) == ("samples" in parts)


def test_a_resumed_run_still_shows_what_its_earlier_starts_wrote(run, tmp_path):
    with Reports(run(validates=True)):
        pass
    with Reports(run(steps_done=5, samples=True)):
        pass
    assert facts(tmp_path)["parts"] == ["validation", "samples"]


def test_run_json_is_of_this_run_from_its_beginning(run, tmp_path):
    """Otherwise a run that is killed before its first report seems to be the one before it."""
    with Reports(run(validates=True)):
        pass
    with Reports(run()):
        assert facts(tmp_path)["parts"] == [] and facts(tmp_path)["sessions"][0]["ended"] == "running"


def test_a_file_of_the_user_s_is_renamed_and_not_replaced(run, tmp_path, caplog):
    (tmp_path / "report.html").write_text("<title>Report of mine</title>")
    (tmp_path / "run.json").write_text('{"mine": 1}')
    with Reports(run()):
        pass
    assert (tmp_path / "report-kept.html").read_text() == "<title>Report of mine</title>"
    assert (tmp_path / "run-kept.json").read_text() == '{"mine": 1}'
    assert "report.html was not written by this run: it is renamed to report-kept.html" in caplog.text
    caplog.clear()
    with Reports(run()):  # replaces the files of the run before
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "report-kept.html", "report.html", "run-kept.json", "run.json"
    ] and not caplog.records  # fmt: skip


def test_a_page_that_the_run_does_not_write_is_left_alone(run, tmp_path):
    (tmp_path / "report.html").write_text("mine")
    with Reports(run(report_to=["csv"])):
        pass
    assert (tmp_path / "report.html").read_text() == "mine"


def test_an_error_of_tensorboard_s_part_leaves_the_page(run, tmp_path, monkeypatch, caplog):
    pytest.importorskip("tensorboardX")

    def update(self):
        raise UserError("validation.csv cannot be read")

    monkeypatch.setattr(TensorBoard, "update", update)
    with Reports(run(report_to=["html", "tensorboard"])):
        write_metrics(tmp_path, 3)
    assert "The run is complete." in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert facts(tmp_path)["sessions"][0]["ended"] == "finished"
    assert caplog.text.count("validation.csv cannot be read") == 1


def test_csv_alone_writes_no_page_and_other_processes_write_nothing(run, tmp_path):
    with Reports(run(report_to=["csv"])):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    (tmp_path / "run.json").unlink()
    other = run()
    other.is_first_process = False
    with Reports(other) as reports:
        reports.add(Metrics(1, 0.5, 1e-3, 1.0, 9.0, 0.2), 0.5)
        reports.update()
    assert list(tmp_path.iterdir()) == []


def test_the_rates_of_the_networks_are_factors_of_the_one_that_is_logged(run):
    made = run()
    names = ("model.diffusion_model.a.lora_down.weight", "model.diffusion_model.a.lora_up.weight",
             "cond_stage_model.a.lora_down.weight")  # fmt: skip
    # LoRA+ with 16, and half of the rate for the text encoder.
    made.rates = Rates(16.0, 1.0, dict(zip(names, (1 / 16, 1.0, 0.5 / 16))))
    assert Reports(made)._rates() == {"lr/unet": 1.0, "lr/textencoder": 0.5}
