"""tools/benchmark: the measurement of processes, which are replaced by fakes, and the table."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import platform
import signal
import subprocess
import sys
import time
import types

import mindspore as ms
import numpy as np
import pytest
from PIL import Image

from ldm.data.dataset import read_image_text_csv
from ldm.errors import UserError
from ldm.models.stable_diffusion import build_model
from ldm.settings.model import load_model_config
from ldm.weights.load import load_base_model
from tests.conftest import ROOT
from tools.benchmark import columns, inputs, metrics, run, works
from tools.benchmark.columns import measure_columns
from tools.benchmark.model_folder import write_model
from tools.benchmark.peers import PEERS, SIDES, Pythons, compared_with, groups, is_ours
from tools.benchmark.processor import machine, processor
from tools.benchmark.report import cell, how, markdown, markdown_columns
from tools.benchmark.run import summarise
from tools.benchmark.scripts import measure_scripts
from tools.benchmark.summary import summarise_columns
from tools.benchmark.worker import Measurement, Worker, WorkerFailed
from tools.benchmark.works import MEMORY_TABLE, PEERS_TABLE, TABLE, WORKS, Work

FAKE = """
import sys, time
from tools.benchmark.worker import Turns
turns = Turns()
kind, log = sys.argv[1], sys.argv[2]
if kind == "broken":
    sys.exit("error: no such thing")
if kind == "rounds":
    weights = b"x" * (300 << 20)
    del weights
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
            assert side.versions == {"Python": platform.python_version(), "fake": "1.0"}
            assert side.first_cpu < 0.02

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

    def test_memory_that_building_alone_held_is_told_apart(self, tmp_path):
        worker = Worker(fake("rounds", tmp_path / "log"), os.sched_getaffinity(0), 4.0)
        worker.call()
        found = worker.end()
        assert found.memory_gb > 0.3
        assert 0.005 < found.own_gb < found.calls_gb < 0.2

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
        ours, peer = (dataclasses.replace(side(first=9.0), first_cpu=cpu) for cpu in (1.5, 6.0))
        line = summarise(WORK, [{"ours": ours, "peer": peer}])
        assert line["ours"]["cpu_seconds"] == 1.5 and line["cpu_ratio"] == 0.25

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


LETTERS = dict(zip(SIDES, "obdDcCvVsS"))  # in the log of the fakes
CORES = os.sched_getaffinity(0)
PROGRAM = """
import sys
log, letter, output = sys.argv[1:]
with open(log, "a") as file:
    file.write(letter)
if letter == "x":
    sys.exit("error: no memory left")
if letter != "n":
    open(output + "/image.png", "w").close()
"""


@pytest.fixture
def fakes(monkeypatch, tmp_path):
    """Return interpreters whose workers and scripts add their side's letter to a file, and that file."""
    log = tmp_path / "log"
    log.touch()

    def script(self, side, work, folder, output):
        return [sys.executable, "-c", PROGRAM, str(log), LETTERS[side], str(output)]

    monkeypatch.setattr(Pythons, "missing", lambda self, side: None)
    monkeypatch.setattr(Pythons, "worker", lambda self, side, work, *more: fake(LETTERS[side], log))
    monkeypatch.setattr(Pythons, "script", script)
    monkeypatch.setattr(columns, "prepare", lambda work, *rest: {})
    return Pythons({None: sys.executable}), log


def measured(pythons, sides, work=WORK, together=3, calls=1):
    """Measure them, and return what each group that took turns gave; what could not start is in the first one."""
    absent, *found = measure_columns(work, sides, pythons, calls, CORES, 4.0, together)
    return [{**group, **(absent if i == 0 else {})} for i, group in enumerate(found or [{}])]


class TestSeveralPeers:
    @pytest.mark.parametrize(
        "together, order", [(4, "odDcodDc"), (3, "odDodDococ"), (2, "ododoDoDococ"), (1, "ooddDDcc")]
    )
    def test_they_take_turns_in_groups_with_this_project_in_each(self, fakes, together, order):
        pythons, log = fakes
        found = measured(pythons, ["ours", "diffusers", "diffusers-bf16", "compile"], together=together)
        assert log.read_text() == order
        assert all(isinstance(side, Measurement) for group in found for side in group.values())

    @pytest.mark.parametrize("together", range(1, 12))
    @pytest.mark.parametrize("ours", [["ours"], ["ours", "ours-bf16"]])
    def test_groups_hold_each_peer_once_and_never_more_than_asked_for(self, ours, together):
        peers = [side for side in SIDES if not is_ours(side)]
        found = groups([*ours, *peers], together)
        assert [side for group in found for side in group if not is_ours(side)] == peers
        if together > 1:
            assert all(group[: len(ours)] == ours for group in found)
        assert max(map(len, found)) <= max(together, len(ours) + 1 if together > 1 else 1)

    def test_this_project_alone_is_a_group(self):
        assert groups(["ours", "ours-bf16"], 3) == [["ours", "ours-bf16"]]
        assert groups([], 3) == groups([], 1) == []

    def test_scripts_take_turns_in_one_group(self, fakes):
        pythons, log = fakes
        work = dataclasses.replace(WORK, kind="script")
        (found,) = measured(pythons, ["ours", "diffusers", "openvino", "sd.cpp"], work, together=2, calls=2)
        assert log.read_text() == "odvsodvsodvs"
        assert all(len(side.seconds) == 2 and side.calls_gb == side.memory_gb > 0.001 for side in found.values())

    def test_a_peer_without_this_kind_of_work_has_no_cell(self, fakes):
        pythons, log = fakes
        work = dataclasses.replace(WORK, kind="lora")
        (found,) = measured(pythons, ["ours", "ours-bf16", "diffusers", "openvino", "sd.cpp"], work)
        assert list(found) == ["ours", "ours-bf16", "diffusers"]

    def test_an_absent_environment_is_not_measured_and_the_others_are(self, fakes, monkeypatch, tmp_path):
        monkeypatch.undo()
        log = tmp_path / "log"
        paths = {None: sys.executable, "reference_python": sys.executable, "peers_python": tmp_path / "python"}
        pythons = Pythons(paths)
        monkeypatch.setitem(SIDES, "diffusers", dataclasses.replace(SIDES["diffusers"], packages=("numpy", "no_such")))
        monkeypatch.setattr(Pythons, "worker", lambda self, side, work, *more: fake(LETTERS[side], log))
        found = measured(pythons, ["ours", "diffusers", "openvino"])
        assert found[0]["diffusers"] == f"not measured: no no_such in {sys.executable}"
        assert found[0]["openvino"] == f"not measured: no Python at {tmp_path / 'python'}"
        versions = {"Python": platform.python_version(), "numpy": np.__version__}
        assert pythons.packages("diffusers") == {**versions, "no_such": None}
        assert pythons.packages("ours") == {**versions, "mindspore": ms.__version__}
        assert isinstance(found[0]["ours"], Measurement) and log.read_text() == "oo"

    def test_what_cannot_be_prepared_is_quoted(self, fakes, monkeypatch):
        pythons, log = fakes
        monkeypatch.setattr(columns, "prepare", lambda work, *rest: {"openvino": "failed: too large"})
        (found,) = measured(pythons, ["ours", "openvino"], dataclasses.replace(WORK, kind="load"))
        assert found["openvino"] == "failed: too large"
        assert log.read_text() == "oo"
        sides = ["ours", "openvino"]
        monkeypatch.setattr(columns, "prepare", lambda work, sides, *rest: dict.fromkeys(sides, "failed: disk full"))
        for kind, together in (("load", 3), ("load", 1), ("script", 3)):
            (found,) = measured(pythons, sides, dataclasses.replace(WORK, kind=kind), together)
            assert found == dict.fromkeys(sides, "failed: disk full")

    def test_a_failed_script_is_quoted_and_not_run_again(self, tmp_path):
        def command(letter):
            return lambda output: [sys.executable, "-c", PROGRAM, str(tmp_path / "log"), letter, str(output)]

        found = measure_scripts({name: command(name) for name in "axn"}, 2, CORES)
        assert found["x"] == "failed: -c ended with 1 and wrote no PNG: error: no memory left"
        assert found["n"] == "failed: -c ended with 0 and wrote no PNG"
        assert len(found["a"].seconds) == 2
        assert (tmp_path / "log").read_text() == "axnaa"

    def test_scripts_of_this_project_name_their_precision(self):
        pythons = Pythons({None: "python", "reference_python": "other"})
        for side, precision in (("ours", "fp32"), ("ours-bf16", "bf16")):
            command = pythons.script(side, WORK, ROOT, ROOT / "out")
            assert command[:2] == ["python", "text_to_image.py"]
            flags = dict(zip(command[2::2], command[3::2]))
            assert flags["--precision"] == precision and flags["--ckpt_path"] == str(ROOT / "model")
            assert flags["--H"] == flags["--W"] == "32", "eight latents of the nano model's VAE"
        command = pythons.script("compile-bf16", WORK, ROOT, ROOT / "out")
        assert command[:6] == ["other", "-m", "tools.benchmark.reference", "fake", "--precision", "bf16"]
        assert command[6:] == ["--compile", "--folder", str(ROOT), "--image", str(ROOT / "out" / "image.png")]

    @pytest.mark.parametrize("precision, wtype", [("fp32", "f32"), ("bf16", "bf16")])
    def test_what_stable_diffusion_cpp_is_asked_for(self, monkeypatch, tmp_path, precision, wtype):
        asked = {}

        class StableDiffusion:
            def __init__(self, **settings):
                asked.update(settings)

            def generate_image(self, **settings):
                asked.update(settings)
                return [Image.new("RGBA", (settings["width"], settings["height"]))]

        fake_package = types.SimpleNamespace(StableDiffusion=StableDiffusion)
        monkeypatch.setitem(sys.modules, "stable_diffusion_cpp", fake_package)
        monkeypatch.delitem(sys.modules, "tools.benchmark.cpp_worker", raising=False)
        worker = importlib.import_module("tools.benchmark.cpp_worker")
        worker.script(dataclasses.replace(WORK, kind="script"), tmp_path, precision, tmp_path / "image.png")
        with Image.open(tmp_path / "image.png") as image:
            assert (image.mode, image.size) == ("RGB", (32, 32))
        assert asked["wtype"] == wtype and asked["model_path"] == str(tmp_path / "model")
        assert asked["n_threads"] == len(CORES)
        assert (asked["cfg_scale"], asked["sample_method"], asked["sample_steps"]) == (7.5, "dpm++2m", 20)

    def test_the_model_that_all_sides_read(self, tiny_config, tmp_path):
        write_model(tmp_path / "model", tiny_config)
        model = build_model(tiny_config, random=False)
        report = load_base_model(model, tmp_path / "model")
        assert report.ok
        weights = np.concatenate([p.asnumpy().ravel() for p in model.model.get_parameters()])
        assert np.isfinite(weights).all() and 0.001 < weights.std() < 1


class TestColumns:
    def test_ratios_are_those_inside_the_group(self):
        slow = {"ours": side(20, memory=2), "compile": side(10, memory=1)}
        line = summarise_columns(WORK, [[{"ours": side(2), "diffusers": side(4)}, slow]])
        assert line["sides"]["diffusers"]["time_ratio"] == 0.5
        assert line["sides"]["compile"]["time_ratio"] == line["sides"]["compile"]["cpu_ratio"] == 2
        assert line["sides"]["ours"]["seconds"] == 11
        assert "time_ratio" not in line["sides"]["ours"]

    def test_without_turns_ratios_are_those_of_the_medians(self):
        line = summarise_columns(WORK, [[{"ours": side(2)}, {"diffusers": side(4)}]])
        assert line["sides"]["diffusers"]["time_ratio"] == 0.5

    @pytest.mark.parametrize(
        "name, measured, expected",
        [
            ("ours", ["ours", "ours-bf16"], None),
            ("ours-bf16", ["ours", "ours-bf16"], "ours"),
            ("diffusers", ["ours", "ours-bf16"], "ours"),
            ("openvino-bf16", ["ours", "ours-bf16"], "ours-bf16"),
            ("openvino-bf16", ["ours"], "ours"),
        ],
    )
    def test_a_peer_is_compared_with_this_project_in_its_precision(self, name, measured, expected):
        assert compared_with(name, measured) == expected

    def test_a_failed_bf16_leaves_the_comparison_to_fp32(self):
        group = {"ours": side(2), "ours-bf16": "failed: no bf16", "openvino-bf16": side(4)}
        line = summarise_columns(WORK, [[group]])
        assert line["sides"]["ours-bf16"] == {"problem": "failed: no bf16", "against": "ours"}
        assert line["sides"]["openvino-bf16"]["against"] == "ours"

    def test_markdown(self):
        sides = ["ours", "ours-bf16", "diffusers", "openvino-bf16", "sd.cpp"]
        fp32, bf16, peer = (dataclasses.replace(side(s, memory=9), calls_gb=gb) for s, gb in ((4, 4), (1, 2), (0.5, 1)))
        loading = [{name: dataclasses.replace(side(first=2.0), own_gb=2.5) for name in ("ours", "sd.cpp")}]
        group = {"ours": fp32, "ours-bf16": bf16, "diffusers": peer, "openvino-bf16": "not measured: no openvino in a"}
        result = {
            "machine": {**processor("model name: a CPU\nflags: avx2 avx512f\n"), "cores": [0], "memory_gb": 24,
                        "load": 0.1, "python": "3.11"},
            "settings": {"repeats": 1, "calls": 5, "apart": False, "together": 3},
            "sides": sides,
            "versions": {
                "ours": {"Python": "3.9"},
                "diffusers": {"Python": "3.11", "torch": "3"},
                "openvino-bf16": {"Python": "3.11", "torch": "4", "openvino": "2"},
                "sd.cpp": {"Python": "3.11"},
            },
            "works": [
                summarise_columns(WORK, [[group]]),
                summarise_columns(dataclasses.replace(WORK, title="loading", kind="load"), [loading]),
            ],
        }  # fmt: skip
        text = markdown_columns(result)
        assert (
            "with AVX2, AVX-512 without AVX512-BF16, AMX-BF16, 1 cores" in text
            and "numpy 1, openvino 2, Python 3.9 (ours) and 3.11 (diffusers, openvino, sd.cpp)" in text
            and "torch 3 (diffusers) and 4 (openvino). Medians" in text
        )
        rows = [line for line in text.splitlines() if line.startswith("|")]
        assert rows[0] == (
            "| work | this project, fp32 | this project, bf16 | diffusers, fp32 | OpenVINO, bf16 | "
            "stable-diffusion.cpp, fp32 |"
        )
        assert rows[2] == (
            "| a fake work | 4.00 s, 4.00 GB | 1.00 s (0.25, 0.25), 2.00 GB (0.50) | "
            "500 ms (8.00, 8.00), 1.00 GB (4.00) | not measured |  |"
        )
        assert rows[3] == "| loading | 2.00 s, 2.50 GB |  |  |  | 2.00 s (1.00), 2.50 GB (1.00) |"
        assert rows[6] == "| a fake work | 9.00 s | 9.00 s | 9.00 s |  |  |"
        assert {row.count("|") for row in rows} == {7}

    def test_the_first_call_is_named_where_it_counts(self):
        assert how({"repeats": 1, "calls": 0}) == "First calls, 1 of each; medians of more calls for short workloads"

    def test_a_long_failure_is_shortened(self):
        assert cell({"problem": "failed: " + "a | b " * 50}, "calls_gb") == "failed: " + "a / b " * 11 + "a ..."

    def test_the_processor(self):
        xeon = (
            "processor: 0\ncpu family: 6\nmodel: 143\nmodel name: Xeon\nflags: fpu avx2 avx512f avx512_bf16 amx_bf16\n"
        )
        found = processor(xeon + "processor: 1\nmodel name: Other\nflags: avx2\n")
        assert found["cpu"] == "Xeon" and found["cpu_numbers"] == "family 6, model 143"
        assert all(found["extensions"].values())
        assert not any(processor("flags: avx512fx xavx2")["extensions"].values())
        assert not any(processor("")["extensions"].values())
        assert machine({0})["cores"] == [0] and machine({0})["extensions"].keys() == found["extensions"].keys()


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
            (["--peers", "all"], list(PEERS_TABLE)),
            (["text", "--peers", "compile"], ["text"]),
        ],
    )
    def test_workloads_are_chosen_by_name(self, argv, expected):
        assert [work.name for work in run.chosen_works(run.parse(argv))] == expected

    def test_an_unknown_name_is_refused(self):
        with pytest.raises(UserError, match="no workload 'textt'.*--list"):
            run.chosen_works(run.parse(["textt"]))

    @pytest.mark.parametrize("name", ["script_512", "load"])
    def test_works_of_several_columns_need_peers(self, name):
        with pytest.raises(UserError, match=f"{name} .*--peers all"):
            run.chosen_works(run.parse([name]))
        assert [work.name for work in run.chosen_works(run.parse([name, "--peers", "all"]))] == [name]

    def test_the_nano_script_is_of_this_project_alone(self):
        with pytest.raises(UserError, match="script_nano.*leave out --peers"):
            run.chosen_works(run.parse(["script_nano", "--peers", "all"]))

    @pytest.mark.parametrize(
        "argv",
        [
            ["--cores", "x"],
            ["--cores", "999"],
            ["--cores", ""],
            ["--repeats", "0"],
            ["--calls", "-1"],
            ["--memory_limit", "much"],
            ["--peers", "diffuser"],
            ["--together", "1"],
        ],
    )
    def test_invalid_settings(self, argv):
        with pytest.raises(UserError, match=argv[0]):
            run.parse(argv)

    def test_the_columns_have_an_order_of_their_own(self):
        assert run.parse(["--peers", "openvino", "ours-bf16", "openvino"]).peers == ["ours", "ours-bf16", "openvino"]
        assert run.parse(["--peers", "all"]).peers == list(SIDES) == ["ours", *PEERS]
        assert run.parse([]).peers == []

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
