"""Device, precision and seeds."""

from __future__ import annotations

import os
import subprocess
import sys

import mindspore as ms
import numpy as np
import pytest

from ldm.errors import UserError
from ldm.runtime import device
from ldm.runtime.device import Runtime, decide_flash_attention, is_out_of_memory, setup_runtime
from ldm.settings.train import TrainSettings
from ldm.settings.values import settings_of
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def restored_mode(graph_mode):
    """Each test ends in the mode of the other tests."""


def ascend(dtype=ms.float16, soc="Ascend910B3"):
    return Runtime("Ascend", dtype, 0, 1, 0, soc)


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


def test_ascend_computes_in_fp16_with_the_infnan_mode_and_the_jit_level(monkeypatch):
    monkeypatch.delenv("MS_ASCEND_CHECK_OVERFLOW_MODE", raising=False)
    calls = []

    def set_device(name):
        calls.append((name, device.os.environ.get("MS_ASCEND_CHECK_OVERFLOW_MODE")))

    monkeypatch.setattr(device.ms, "set_device", set_device)
    monkeypatch.setattr(device.ms, "set_context", lambda **settings: calls.append(settings))
    found = setup_runtime("Ascend", jit_level="O1")
    assert found.fp16 and found.is_ascend
    assert calls == [("Ascend", "INFNAN_MODE"), {"mode": 0}, {"jit_config": {"jit_level": "O1"}}]


def test_the_overflow_mode_is_set_before_an_ascend_is_looked_for(monkeypatch):
    monkeypatch.delenv("MS_ASCEND_CHECK_OVERFLOW_MODE", raising=False)
    seen = []

    def has_ascend():
        seen.append(device.os.environ.get("MS_ASCEND_CHECK_OVERFLOW_MODE"))
        return False

    monkeypatch.setattr(device, "_has_ascend", has_ascend)
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
    monkeypatch.setattr(device.ms, "set_device", lambda name: None)
    setup_runtime("Ascend")
    assert device.os.environ["MS_ASCEND_CHECK_OVERFLOW_MODE"] == "SATURATION_MODE"


def test_a_jit_level_without_effect_on_the_cpu_is_reported(caplog):
    with caplog.at_level("INFO"):
        setup_runtime("CPU", jit_level="O1")
    assert "no effect on the CPU" in caplog.text


def test_use_parallel_without_msrun_names_the_way_to_start_it(monkeypatch):
    monkeypatch.delenv("MS_ROLE", raising=False)
    with pytest.raises(UserError, match="msrun --worker_num"):
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
    ("name", "first", "a2_or_later"),
    [
        ("Ascend910A", True, False),
        ("Ascend910B", True, False),  # not an A2, whose names have a digit after the B
        ("Ascend910ProB", True, False),
        ("Ascend910B1", False, True),
        ("Ascend910B4-1", False, True),
        ("Ascend910_9391", False, True),
        ("Ascend310P3", False, False),
        ("", False, False),
    ],
)
def test_the_name_of_a_device_tells_its_generation(name, first, a2_or_later):
    runtime = ascend(soc=name)
    assert (runtime.saturates, runtime.is_a2_or_later) == (first, a2_or_later)


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
