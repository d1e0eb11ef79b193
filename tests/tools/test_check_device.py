"""The check of a device: what it computes, how it compares, and what it says is wrong."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import mindspore as ms
import numpy as np
import pytest

from ldm.runtime.device import GRAPH, Runtime
from tests.conftest import ROOT
from tools import check_device
from tools.device_check.graphs import Graphs
from tools.device_check.report import LIMITS, Row, compare, deviation, find_problems, report
from tools.device_check.results import Graph, Machine, read_graph

A2 = Machine(
    versions="MindSpore 2.8.0", device="Ascend 0, Ascend910B3", ascend=True, known=True, saturates=False,
    dry_run=False, free=60.0, total=64.0, cann="8.5", cann_fault="",
)  # fmt: skip
FIRST_910 = replace(A2, device="Ascend 0, Ascend910A", saturates=True)
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
    assert compare(values, graph(), A2).verdict == "WRONG"
    assert compare(values, graph(), FIRST_910).verdict == "OK"


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


def test_flash_attention_is_left_out_where_it_does_not_exist():
    found = Graphs(Runtime("Ascend", ms.float16, 0, 1, GRAPH, soc="Ascend910A")).run("unet_flash")
    assert "flash attention" in found.skipped and compare(found, graph(), FIRST_910).verdict == "skipped"


def test_an_overflow_gives_infinity_and_on_a_first_910_the_largest_number():
    assert overflow(np.inf, A2) == "OK" and overflow(65504.0, A2) == "WRONG"
    assert overflow(65504.0, FIRST_910) == "OK" and overflow(np.inf, FIRST_910) == "WRONG"


def rows(**verdicts):
    return [Row(name, "", "", 0.0, verdict) for name, verdict in verdicts.items()]


@pytest.mark.parametrize(
    ("machine", "verdicts", "way_out"),
    [
        ({}, dict(unet="OK", unet_flash="WRONG"), "--enable_flash_attention False"),
        ({}, dict(overflow="WRONG"), "unset MS_ASCEND_CHECK_OVERFLOW_MODE"),
        ({}, dict(unet="WRONG"), "--jit_level"),
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
    text = report(replace(A2, free=3.0), [], [])
    assert "3.0 of 64.0 GB free (SD1.5 with LoRA" in text


def test_a_process_that_dies_is_reported_with_its_last_line(monkeypatch, tmp_path):
    monkeypatch.setattr(check_device, "__file__", str(tmp_path / "dies.py"))
    (tmp_path / "dies.py").write_text(
        "import os, sys\nprint('aclnn: bad', file=sys.stderr)\nos.kill(os.getpid(), 11)\n"
    )
    settings = check_device.Settings(graphs=["unet"])
    ended = check_device.compute_in_a_process("CPU", "fp32", settings, tmp_path / "out")
    assert ended == "the process was ended by signal 11: aclnn: bad"
    assert read_graph(tmp_path / "out", "unet", ended).error == ended
