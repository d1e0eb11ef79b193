"""Device, precision and seeds."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import mindspore as ms
import numpy as np
import pytest

from ldm.errors import UserError
from ldm.runtime import device
from ldm.runtime.device import Runtime, decide_flash_attention, describe_runtime, is_out_of_memory, setup_runtime
from ldm.settings.train import TrainSettings
from ldm.settings.values import settings_of
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def restored_mode(graph_mode, monkeypatch):
    """Each test ends in the mode and with the threads of the other tests."""
    for name in ("DEVICE_ID", "RANK_ID", "RANK_TABLE_FILE", "MS_ROLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(device.ascend, "give_enough_threads", lambda: None)


def unasked():
    raise AssertionError("the kernels would have to be compiled")


def ascend(dtype=ms.float16, soc="Ascend910B3"):
    return Runtime("Ascend", dtype, 0, 1, 0, soc)


@pytest.fixture
def pretended(monkeypatch):
    """A call makes setup_runtime find an Ascend device of a name, with CANN 8.5, and change nothing in MindSpore."""

    def pretend(name):
        monkeypatch.delenv("MS_ASCEND_CHECK_OVERFLOW_MODE", raising=False)
        for function in ("set_device", "set_context"):
            monkeypatch.setattr(device.ms, function, lambda *arguments, **settings: None)
        monkeypatch.setattr(device.ascend, "device_name", lambda: name)
        monkeypatch.setattr(device.ascend, "cann_version", lambda: "8.5")
        monkeypatch.setattr(device.ms.device_context.ascend.op_precision, "precision_mode", lambda mode: None)

    return pretend


@pytest.fixture
def no_ascend(monkeypatch):
    monkeypatch.setattr(device.glob, "glob", lambda pattern: [])


def test_without_an_ascend_the_cpu_computes_in_fp32_and_graph_mode(no_ascend):
    found = setup_runtime()
    assert found == device.current_runtime()
    assert (found.device, found.compute_dtype, found.process_index, found.process_count) == ("CPU", ms.float32, 0, 1)
    assert ms.get_context("mode") == ms.GRAPH_MODE and not found.is_ascend and not found.fp16


def test_fp16_can_be_asked_for_on_the_cpu():
    assert setup_runtime("CPU", precision="fp16").fp16
    setup_runtime("CPU")


def test_bf16_is_of_the_cpu():
    runtime = setup_runtime("CPU", precision="bf16")
    assert (runtime.precision, runtime.bf16, runtime.fp16) == ("bf16", True, False)
    assert describe_runtime(runtime, False, lambda: "amx") == "device: CPU, bf16 by amx"
    line = "device: CPU, bf16, which this machine's kernels do not multiply (docs/precision.md)"
    assert describe_runtime(runtime, False, lambda: None) == line
    fp32 = setup_runtime("CPU")
    assert (fp32.precision, fp32.bf16, fp32.with_compute_dtype(ms.bfloat16).precision) == ("fp32", False, "bf16")
    on_ascend = dataclasses.replace(fp32, device="Ascend")
    for refused in (
        lambda: setup_runtime("Ascend", precision="bf16"),
        lambda: on_ascend.with_compute_dtype(ms.bfloat16),
    ):
        with pytest.raises(
            UserError, match=r"bf16 is for the CPU: on Ascend use --precision fp16 \(or auto\), or fp32"
        ):
            refused()


def test_bf16_is_of_graph_mode():
    with pytest.raises(UserError, match=r"bf16 is for graph mode: leave out mode 1 .*, or use --precision fp32"):
        setup_runtime("CPU", mode=device.PYNATIVE, precision="bf16")


@pytest.mark.parametrize("said", ["fp32", "bf16"])
def test_auto_on_the_cpu_is_what_the_caller_says(said):
    assert setup_runtime("CPU", automatic=lambda: said).precision == said
    assert setup_runtime("CPU").precision == "fp32"


def test_only_auto_in_graph_mode_on_the_cpu_asks_the_caller(pretended):
    assert setup_runtime("CPU", precision="fp32", automatic=unasked).precision == "fp32"
    assert setup_runtime("CPU", precision="bf16", automatic=unasked).precision == "bf16"
    assert setup_runtime("CPU", mode=device.PYNATIVE, automatic=unasked).precision == "fp32"
    pretended("Ascend910B3")
    assert setup_runtime("Ascend", automatic=unasked).precision == "fp16"


def test_the_seed_decides_the_initial_weights():
    draws = []
    for seed in (1, 1, 2):
        setup_runtime("CPU", seed=seed)
        draws.append(np.random.uniform())
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.skipif(bool(device.glob.glob("/dev/davinci[0-9]*")), reason="there is an Ascend here")
def test_a_missing_ascend_is_named():
    with pytest.raises(UserError, match="device_target Ascend cannot be used here.*--device_target CPU"):
        setup_runtime("Ascend")


@pytest.mark.parametrize(("given", "level"), [(None, "O0"), ("O0", "O0"), ("O1", "O1")])
def test_ascend_computes_in_fp16_with_the_infnan_mode_and_the_jit_level(given, level, monkeypatch):
    """The level is set where none is given too, because the default of MindSpore is not the same everywhere."""
    monkeypatch.delenv("MS_ASCEND_CHECK_OVERFLOW_MODE", raising=False)
    calls = []

    def set_device(name, number):
        calls.append((name, number, device.os.environ.get("MS_ASCEND_CHECK_OVERFLOW_MODE")))

    monkeypatch.setattr(device.ms, "set_device", set_device)
    monkeypatch.setattr(device.ms, "set_context", lambda **settings: calls.append(settings))
    found = setup_runtime("Ascend", jit_level=given)
    assert found.fp16 and found.is_ascend and found.jit_level == level
    assert calls == [("Ascend", None, "INFNAN_MODE"), {"mode": 0}, {"jit_config": {"jit_level": level}}]


def test_device_id_chooses_the_ascend(monkeypatch):
    calls = []
    monkeypatch.setenv("DEVICE_ID", "3")
    monkeypatch.setattr(device.ms, "set_device", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(device.ms, "set_context", lambda **settings: None)
    setup_runtime("Ascend")
    assert calls == [("Ascend", 3)]
    calls.clear()
    setup_runtime("CPU")
    assert not calls  # the variable is Ascend's alone


def test_a_cann_that_does_not_fit_is_warned_of_once(pretended, monkeypatch, caplog):
    pretended("Ascend910B3")
    monkeypatch.setattr(device.ascend, "cann_version", lambda: "7.7")
    setup_runtime("Ascend")
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "CANN 7.7" in caplog.text


def test_o2_is_warned_of_once(pretended, caplog):
    pretended("Ascend910B3")
    setup_runtime("Ascend", jit_level="O2")
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "use --jit_level O0" in caplog.text


def test_a_rank_table_makes_it_o2_and_the_log_says_so(pretended, monkeypatch, caplog):
    pretended("Ascend910B3")
    monkeypatch.setenv("RANK_TABLE_FILE", "table.json")
    monkeypatch.setenv("DEVICE_ID", "1")
    runtime = setup_runtime("Ascend", jit_level="O0")
    assert "jit_level O2," in describe_runtime(runtime, True, unasked) and "unset RANK_TABLE_FILE" in caplog.text


@pytest.mark.parametrize("name", ["", "Ascend310P3"])
def test_a_device_that_is_not_known_is_warned_of_with_what_is_assumed(name, pretended, monkeypatch, caplog):
    pretended(name)
    runtime = setup_runtime("Ascend")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    for words in (name, "flash attention is off", "precision mode", "become infinity", "check_device.py"):
        assert words in caplog.text
    assert not decide_flash_attention(None, runtime) and not runtime.saturates
    caplog.clear()
    monkeypatch.setenv("MS_ASCEND_CHECK_OVERFLOW_MODE", "SATURATION_MODE")
    assert setup_runtime("Ascend").saturates and "become the largest number" in caplog.text


def test_fp32_on_a_first_910_is_warned_of(pretended, caplog):
    pretended("Ascend910A")
    setup_runtime("Ascend", precision="fp32")
    assert "precision fp32: this Ascend910A" in caplog.text and "compute in fp16" in caplog.text
    caplog.clear()
    pretended("Ascend910B3")
    setup_runtime("Ascend", precision="fp32")
    assert not caplog.text


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        (
            "Ascend910B3",
            {},
            "device: Ascend 0, Ascend910B3, fp16, precision mode must_keep_origin_dtype, jit_level O0, flash "
            "attention on, overflow mode INFNAN, CANN 8.5",
        ),
        (
            "Ascend910A",
            dict(jit_level="O1"),
            "device: Ascend 0, Ascend910A, fp16, precision mode allow_fp32_to_fp16, jit_level O1, flash attention off, "
            "overflow mode saturation, CANN 8.5",
        ),
    ],
)
def test_one_line_tells_how_an_ascend_runs(name, options, line, pretended):
    pretended(name)
    runtime = setup_runtime("Ascend", **options)
    assert describe_runtime(runtime, decide_flash_attention(None, runtime), unasked) == line


def test_one_line_tells_how_the_cpu_runs():
    assert describe_runtime(setup_runtime("CPU"), False, unasked) == "device: CPU, fp32"


def test_the_overflow_mode_is_set_before_an_ascend_is_looked_for(monkeypatch):
    monkeypatch.delenv("MS_ASCEND_CHECK_OVERFLOW_MODE", raising=False)
    seen = []

    def has_ascend():
        seen.append(device.os.environ.get("MS_ASCEND_CHECK_OVERFLOW_MODE"))
        return False

    monkeypatch.setattr(device, "has_ascend", has_ascend)
    assert setup_runtime().device == "CPU" and seen == ["INFNAN_MODE"]


def test_mindspore_accepts_the_jit_levels():
    """In a process of its own, because the setting cannot be undone."""
    levels = settings_of(TrainSettings)["jit_level"].rules["choices"]
    assert levels
    code = "import mindspore as ms\n" + "\n".join(
        f"ms.set_context(jit_config={{'jit_level': '{level}'}})" for level in levels
    )
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert completed.returncode == 0, completed.stderr


def test_an_exported_overflow_mode_is_kept(monkeypatch):
    monkeypatch.setenv("MS_ASCEND_CHECK_OVERFLOW_MODE", "SATURATION_MODE")
    monkeypatch.setattr(device.ms, "set_device", lambda name, number: None)
    monkeypatch.setattr(device.ms, "set_context", lambda **settings: None)
    setup_runtime("Ascend")
    assert device.os.environ["MS_ASCEND_CHECK_OVERFLOW_MODE"] == "SATURATION_MODE"


def test_a_jit_level_without_effect_on_the_cpu_is_reported(caplog):
    with caplog.at_level("INFO"):
        setup_runtime("CPU", jit_level="O1")
    assert "no effect on the CPU" in caplog.text


@pytest.mark.parametrize("script", ["text_to_image.py", "tools/eval/eval_fid.py"])
def test_use_parallel_without_msrun_names_the_way_to_start_this_script(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script, "--use_parallel"])
    with pytest.raises(UserError, match=f"msrun --worker_num.* {script} --use_parallel True"):
        setup_runtime("CPU", use_parallel=True)


def test_the_end_of_another_process_is_one_line(monkeypatch):
    """In the scheduler above all, whose output comes last."""

    def init():
        raise RuntimeError("The total number of timed out node is 1\n\n- C++ Call Stack:\nmeta_server_node.cc:550")

    monkeypatch.setenv("MS_ROLE", "MS_SCHED")
    monkeypatch.setattr(ms.communication, "init", init)
    with pytest.raises(UserError, match=r"has ended \(The total number of timed out node is 1\): its own error"):
        setup_runtime("CPU", use_parallel=True)


@pytest.mark.parametrize(
    ("name", "variable", "saturates"),
    [
        ("Ascend910A", "INFNAN_MODE", True),
        ("Ascend910B3", "INFNAN_MODE", False),
        ("Ascend910B3", "SATURATION_MODE", True),  # the training step reads the overflow flags then
    ],
)
def test_a_runtime_saturates_as_the_overflow_mode_says(name, variable, saturates, monkeypatch):
    monkeypatch.setenv("MS_ASCEND_CHECK_OVERFLOW_MODE", variable)
    runtime = ascend(soc=name)
    assert runtime.saturates == saturates
    assert runtime.is_first_910 == (name == "Ascend910A") == (not decide_flash_attention(None, runtime))


def test_the_cpu_does_not_saturate(monkeypatch):
    monkeypatch.setenv("MS_ASCEND_CHECK_OVERFLOW_MODE", "SATURATION_MODE")
    assert not setup_runtime("CPU").saturates


def test_flash_attention_is_on_in_fp16_on_an_a2_and_off_elsewhere():
    assert decide_flash_attention(None, ascend(soc="Ascend910B3"))
    assert not decide_flash_attention(None, ascend(ms.float32, soc="Ascend910B3"))
    assert not decide_flash_attention(None, ascend(soc="Ascend910A"))
    assert not decide_flash_attention(None, ascend(soc=""))
    assert not decide_flash_attention(None, setup_runtime("CPU"))


def test_flash_attention_can_be_switched_off():
    assert not decide_flash_attention(False, ascend(soc="Ascend910B3"))
    assert not decide_flash_attention(False, setup_runtime("CPU"))


def test_flash_attention_is_refused_where_it_does_not_exist():
    assert decide_flash_attention(True, ascend(soc="Ascend910B3"))
    with pytest.raises(UserError, match="needs an Ascend device: leave it out"):
        decide_flash_attention(True, setup_runtime("CPU"))
    with pytest.raises(UserError, match="needs an Atlas A2 or later.*Ascend910A.*leave it out"):
        decide_flash_attention(True, ascend(soc="Ascend910A"))
    with pytest.raises(UserError, match="--precision fp16"):
        decide_flash_attention(True, ascend(ms.float32, soc="Ascend910B3"))


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (MemoryError("Unable to allocate 1. TiB"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("Allocate memory failed for size: 512"), True),
        (RuntimeError("Device(id:0) memory isn't enough and alloc failed, alloc size: 512B"), True),
        (RuntimeError("Malloc for kernel output failed, Memory isn't enough"), True),
        (RuntimeError("The shapes do not fit"), False),
        (ValueError("a memory of it"), False),
    ],
)
def test_failed_allocations_are_recognised(error, short):
    assert is_out_of_memory(error) == short


def test_mindspores_warnings_are_off_before_it_is_imported():
    """Its compiled parts read the level when they are loaded, so the package itself sets it."""
    code = "import os, sys, ldm; print(os.environ['GLOG_v'], 'mindspore' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "GLOG_v"}
    for level in ({}, {"GLOG_v": "1"}):
        output = subprocess.check_output(
            [sys.executable, "-c", code], cwd=ROOT, env={**environment, **level}, text=True, timeout=60
        )
        assert output.split() == [level.get("GLOG_v", "3"), "False"]
