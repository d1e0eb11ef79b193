"""The check of a device: what it computes, how it compares, and what it says is wrong."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest

from ldm.generation.loading import set_up_sampling
from ldm.runtime.device import GRAPH, Runtime
from tests.conftest import ROOT
from tools import check_device
from tools.device_check.graphs import Graphs
from tools.device_check.machine import describe
from tools.device_check.report import LIMITS, Row, compare, deviation, find_problems, report
from tools.device_check.results import Graph, Machine, read_graph

A2 = Machine(
    versions="MindSpore 2.8.0", device="Ascend 0, Ascend910B3", ascend=True, flash_attention=True, known=True,
    is_first_910=False, saturates=False, dry_run=False, free=60.0, total=64.0, cann="8.5", cann_fault="",
)  # fmt: skip
FIRST_910 = replace(A2, device="Ascend 0, Ascend910A", flash_attention=False, is_first_910=True, saturates=True)
SATURATING_A2 = replace(A2, saturates=True)
VALUES = np.ones(100, np.float32)


def graph(values=VALUES, name="unet", precision="fp16", **rest):
    return Graph(name, precision, 1.0, {"output": values}, **rest)


def overflow(value, machine):
    return compare(Graph("overflow", "fp16", 0.0, {"doubled": np.array([value])}), graph(), machine).verdict


def test_the_cpu_agrees_with_itself():
    done = subprocess.run(
        [
            sys.executable, "tools/check_device.py", "--device_target", "CPU",
            "--graphs", "overflow", "attention", "text_encoder",
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| device | CPU, fp32 |" in done.stdout and "**OK**: all 3 graphs agree, 0 skipped." in done.stdout
    assert "| text_encoder | 0.0e+00 | 5e-03 |" in done.stdout


def test_rounding_is_right_and_more_is_wrong():
    for precision, limit in LIMITS.items():
        for factor, verdict in ((0.9, "OK"), (1.1, "WRONG")):
            row = compare(graph(VALUES * (1 + factor * limit), precision=precision), graph(), A2)
            assert row.verdict == verdict, (precision, factor)


def test_the_vae_of_a_first_910_is_measured_as_fp16():
    values = graph(VALUES * 1.01, name="vae_decode", precision="fp32")
    assert compare(values, graph(), FIRST_910).verdict == "OK"
    for machine in (A2, SATURATING_A2):
        assert compare(values, graph(), machine).verdict == "WRONG"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_wrong(value):
    values = VALUES.copy()
    values[3] = value
    row = compare(graph(values), graph(), A2)
    assert (row.verdict, row.reason) == ("WRONG", "not finite")


def test_another_shape_is_wrong():
    assert deviation(np.ones((2, 3)), np.ones((3, 2))) == np.inf


def test_the_worst_of_several_arrays_is_shown():
    cpu = Graph("lora_step", "fp32", 1.0, {"loss": VALUES, "gradients": VALUES})
    device = Graph("lora_step", "fp32", 1.0, {"loss": VALUES, "gradients": np.full_like(VALUES, np.nan)})
    assert compare(device, cpu, A2).deviation == "nan (gradients)"


def test_an_error_of_the_device_is_shown():
    row = compare(graph(error="RuntimeError: aclnn failed"), graph(), A2)
    assert (row.verdict, row.reason) == ("WRONG", "RuntimeError: aclnn failed")


def test_an_error_of_a_graph_is_its_result_in_one_line(monkeypatch):
    def fails(graphs):
        raise RuntimeError("\naclnn failed\n  in C++")

    monkeypatch.setattr(Graphs, "unet", fails)
    found = Graphs(Runtime("CPU", ms.float32, 0, 1, GRAPH)).run("unet")
    assert (found.error, found.precision, found.arrays) == ("RuntimeError: aclnn failed", "fp32", {})


@pytest.mark.parametrize(
    ("soc", "known", "is_first_910"),
    [("Ascend910A", True, True), ("Ascend910B3", True, False), ("Other", False, False)],
)
def test_a_device_is_known_by_its_name_and_not_by_how_it_overflows(soc, known, is_first_910, monkeypatch):
    monkeypatch.setenv("MS_ASCEND_CHECK_OVERFLOW_MODE", "SATURATION_MODE")
    monkeypatch.setattr("tools.device_check.machine.describe_runtime", lambda *_: "device: Ascend 0")
    monkeypatch.setattr("ldm.runtime.ascend.cann_version", lambda: "8.5")
    monkeypatch.setattr(
        "mindspore.hal.get_device_properties", lambda *_: SimpleNamespace(free_memory=0, total_memory=0)
    )
    machine = describe(Runtime("Ascend", ms.float16, 0, 1, GRAPH, soc=soc), False)
    assert (machine.known, machine.is_first_910, machine.saturates) == (known, is_first_910, True)


@pytest.mark.parametrize("name", ["unet", "text_encoder"])
def test_networks_hold_their_weights_as_those_of_a_pipeline(name, monkeypatch):
    def held(model, dtype, flash):
        set_up_sampling(model, dtype, flash)
        held_in.update(parameter.dtype for parameter in model.get_parameters())
        raise RuntimeError("networks are built")

    held_in = set()
    monkeypatch.setattr("tools.device_check.graphs.set_up_sampling", held)
    found = Graphs(Runtime("CPU", ms.float16, 0, 1, GRAPH)).run(name)
    assert found.error == "RuntimeError: networks are built" and held_in == {ms.float16, ms.float32}


def test_the_step_is_that_of_a_run_with_clipping_and_averages(monkeypatch):
    def step(loss, trainable, **options):
        built.update(options, types={parameter.dtype for parameter in loss.get_parameters()}, trainable=trainable)
        raise RuntimeError("the step is built")

    built = {}
    monkeypatch.setattr("ldm.training.setup.TrainStep", step)
    found = Graphs(Runtime("CPU", ms.float16, 0, 1, GRAPH)).run("lora_step")
    assert found.error == "RuntimeError: the step is built"
    assert built["clip"] and built["use_ema"] and built["skip_overflow"]
    assert built["types"] == {ms.float16, ms.float32} and built["read_in_fp16"] == built["trainable"]


def test_flash_attention_is_left_out_where_it_does_not_exist():
    found = Graphs(Runtime("Ascend", ms.float16, 0, 1, GRAPH, soc="Ascend910A")).run("unet_flash")
    assert "flash attention" in found.skipped and compare(found, graph(), FIRST_910).verdict == "skipped"


def test_an_overflow_gives_infinity_and_on_a_first_910_the_largest_number():
    assert overflow(np.inf, A2) == "OK" and overflow(65504.0, A2) == "WRONG"
    for machine in (FIRST_910, SATURATING_A2):
        assert overflow(65504.0, machine) == "OK" and overflow(np.inf, machine) == "WRONG"


def rows(**verdicts):
    return [Row(name, "", "", 0.0, verdict) for name, verdict in verdicts.items()]


@pytest.mark.parametrize(
    ("machine", "verdicts", "way_out"),
    [
        ({}, dict(unet="OK", unet_flash="WRONG"), "--enable_flash_attention False"),
        ({}, dict(overflow="WRONG"), "unset MS_ASCEND_CHECK_OVERFLOW_MODE"),
        ({}, dict(unet="WRONG"), "--jit_level O0 or O1)"),
        (dict(cann_fault="CANN 7.7 does not fit"), dict(unet="OK"), "CANN 7.7 does not fit."),
        (dict(known=False), dict(unet="OK"), "name is unknown"),
        (dict(dry_run=True), dict(unet="WRONG"), "dry run"),
    ],
)
def test_what_is_wrong_comes_with_the_way_out(machine, verdicts, way_out):
    problems = find_problems(replace(A2, **machine), rows(**verdicts))
    assert any(way_out in problem for problem in problems)


def test_a_dry_run_is_no_report_to_send():
    assert "Please send" not in report(replace(A2, dry_run=True), [], [])


def test_nothing_is_wrong_with_a_device_that_agrees():
    agreeing = rows(unet="OK", unet_flash="skipped")
    assert find_problems(A2, agreeing) == []
    text = report(A2, agreeing, [])
    assert "**OK**: all 1 graphs agree, 1 skipped." in text and "Please send this report" in text


def test_the_report_is_a_table_whatever_an_error_contains():
    text = report(A2, [Row("unet", "", "", 0.0, "WRONG", "a | b")], ["Do this."])
    assert r"WRONG: a \| b |" in text and "**WRONG**: 1 of 1 graphs are wrong" in text and "- Do this." in text


def test_too_little_memory_is_said():
    for machine, needed in ((A2, 8), (FIRST_910, 11)):
        text = report(replace(machine, free=needed - 2), [], [])
        assert f"{needed - 2:.1f} of 64.0 GB free (SD1.5 with LoRA" in text and f"needs about {needed} GB" in text
        assert "needs about" not in report(replace(machine, free=needed + 1), [], [])


def test_a_process_that_dies_is_reported_with_its_last_line(monkeypatch, tmp_path):
    monkeypatch.setattr(check_device, "__file__", str(tmp_path / "dies.py"))
    (tmp_path / "dies.py").write_text(
        "import os, sys\nprint('aclnn: bad', file=sys.stderr)\nos.kill(os.getpid(), 11)\n"
    )
    settings = check_device.Settings(graphs=["unet"])
    ended = check_device.compute_in_a_process("CPU", "fp32", settings, tmp_path / "out")
    assert ended == "the process was ended by signal 11: aclnn: bad"
    assert read_graph(tmp_path / "out", "unet", ended).error == ended


def test_a_device_that_hangs_is_reported_with_the_graphs_that_finished(monkeypatch, tmp_path):
    monkeypatch.setattr(check_device, "__file__", str(tmp_path / "hangs.py"))
    (tmp_path / "hangs.py").write_text(
        f"import sys, time\nsys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\n"
        "from tools.device_check.results import Graph\n"
        "Graph('text_encoder').write(Path(sys.argv[sys.argv.index('--into') + 1]))\ntime.sleep(60)\n"
    )
    settings = check_device.Settings(graphs=["text_encoder", "unet"], timeout=5)
    ended = check_device.compute_in_a_process("CPU", "fp32", settings, tmp_path / "out")
    assert "did not end within 5 s" in ended and "--timeout" in ended
    finished, hanging = (read_graph(tmp_path / "out", name, ended) for name in settings.graphs)
    assert not finished.error and hanging.error == ended
