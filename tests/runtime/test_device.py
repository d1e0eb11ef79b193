"""Device, precision and seeds."""

from __future__ import annotations

import os
import subprocess
import sys

import mindspore as ms
import numpy as np
import pytest

from ldm.errors import UserError
from ldm.runtime import device as runtime
from ldm.runtime.device import Runtime, check_flash_attention, is_out_of_memory, setup_runtime
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def restored(graph_mode):
    """The mode of the other tests comes back after each of these."""


def ascend(dtype=ms.float16):
    return Runtime("Ascend", dtype, 0, 1, 0)


@pytest.fixture
def no_ascend(monkeypatch):
    monkeypatch.setattr(runtime.glob, "glob", lambda pattern: [])


def test_without_an_ascend_it_is_the_cpu_in_fp32_and_graph_mode(no_ascend):
    found = setup_runtime()
    assert (found.device, found.compute_dtype, found.rank, found.rank_size) == ("CPU", ms.float32, 0, 1)
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


@pytest.mark.skipif(bool(runtime.glob.glob("/dev/davinci[0-9]*")), reason="there is an Ascend here")
def test_an_ascend_that_is_not_there_is_said():
    with pytest.raises(UserError, match="device_target Ascend cannot be used here.*--device_target CPU"):
        setup_runtime("Ascend")


def test_on_ascend_it_is_fp16_with_the_infnan_mode_and_the_jit_level(monkeypatch):
    monkeypatch.delenv("MS_ASCEND_CHECK_OVERFLOW_MODE", raising=False)
    calls = []

    def set_device(device):
        calls.append((device, runtime.os.environ.get("MS_ASCEND_CHECK_OVERFLOW_MODE")))

    monkeypatch.setattr(runtime.ms, "set_device", set_device)
    monkeypatch.setattr(runtime.ms, "set_context", lambda **settings: calls.append(settings))
    found = setup_runtime("Ascend", jit_level="O1")
    assert found.fp16 and found.is_ascend
    assert calls == [("Ascend", "INFNAN_MODE"), {"mode": 0}, {"jit_config": {"jit_level": "O1"}}]


def test_the_overflow_mode_is_set_before_it_is_asked_whether_there_is_an_ascend(monkeypatch):
    monkeypatch.delenv("MS_ASCEND_CHECK_OVERFLOW_MODE", raising=False)
    seen = []

    def has_ascend():
        seen.append(runtime.os.environ.get("MS_ASCEND_CHECK_OVERFLOW_MODE"))
        return False

    monkeypatch.setattr(runtime, "_has_ascend", has_ascend)
    assert setup_runtime().device == "CPU" and seen == ["INFNAN_MODE"]


@pytest.mark.parametrize("level", runtime.JIT_LEVELS)
def test_mindspore_knows_the_jit_levels_in_the_form_that_they_are_given(level):
    """In a process of its own: the setting cannot be taken back."""
    code = f"import mindspore as ms; ms.set_context(jit_config={{'jit_level': '{level}'}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_an_exported_overflow_mode_is_kept(monkeypatch):
    monkeypatch.setenv("MS_ASCEND_CHECK_OVERFLOW_MODE", "SATURATION_MODE")
    monkeypatch.setattr(runtime.ms, "set_device", lambda device: None)
    setup_runtime("Ascend")
    assert runtime.os.environ["MS_ASCEND_CHECK_OVERFLOW_MODE"] == "SATURATION_MODE"


def test_jit_level_is_said_to_do_nothing_on_the_cpu(caplog):
    with caplog.at_level("INFO"):
        setup_runtime("CPU", jit_level="O1")
    assert "no effect on the CPU" in caplog.text


def test_parallel_without_msrun_says_how_to_start_it(monkeypatch):
    monkeypatch.delenv("MS_ROLE", raising=False)
    with pytest.raises(UserError, match="msrun --worker_num"):
        setup_runtime("CPU", use_parallel=True)


def test_a_process_that_has_ended_is_no_traceback_of_the_others(monkeypatch):
    """Least of all of msrun's scheduler, whose output comes last."""

    def init():
        raise RuntimeError("The total number of timed out node is 1\n\n- C++ Call Stack:\nmeta_server_node.cc:550")

    monkeypatch.setenv("MS_ROLE", "MS_SCHED")
    monkeypatch.setattr(ms.communication, "init", init)
    with pytest.raises(UserError, match=r"has ended \(The total number of timed out node is 1\): its own error"):
        setup_runtime("CPU", use_parallel=True)


def test_flash_attention_is_ascends_and_fp16s():
    check_flash_attention(True, ascend())
    check_flash_attention(False, setup_runtime("CPU"))
    with pytest.raises(UserError, match="needs an Ascend device"):
        check_flash_attention(True, setup_runtime("CPU"))
    with pytest.raises(UserError, match="fp16"):
        check_flash_attention(True, ascend(ms.float32))


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
def test_errors_that_say_that_memory_is_short(error, short):
    assert is_out_of_memory(error) == short


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("text_to_image", ["--prompt", "x", "--lora_ckpt_path", "README.md"]),
        ("train_text_to_image", ["--data_path", "docs", "--pretrained_model_path", "README.md"]),
    ],
)
def test_mindspores_warnings_are_turned_off_before_it_is_imported(script, flags, tmp_path):
    """Later would be too late for those of its compiled parts. The mistakes are of the kind that is found with it."""
    flags = [*flags, "--output_path", str(tmp_path / "out")]
    watch = f"""
import os, sys, {script}
from ldm.errors import UserError
class Watch:
    def find_spec(self, name, path, target=None):
        if name == "mindspore":
            print("GLOG_v is", os.environ.get("GLOG_v"))
sys.meta_path.insert(0, Watch())
sys.argv[1:] = {flags}
try:
    {script}.main()
except UserError:
    print("ended")
"""
    environment = {name: value for name, value in os.environ.items() if name != "GLOG_v"}
    done = subprocess.run(
        [sys.executable, "-c", watch], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.splitlines() == ["GLOG_v is 3", "ended"], done.stderr
