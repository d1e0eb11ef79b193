"""Shared fixtures: fixed seeds, graph mode, an unprivileged user, and a tiny model."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable

# Before MindSpore is imported, here or in a process that a test starts.
os.environ.setdefault("GLOG_v", "3")

from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402

ROOT = Path(__file__).parents[1]

# Tests that a shell starts in the background inherit that Ctrl-C is ignored, and so do their subprocesses.
signal.signal(signal.SIGINT, signal.default_int_handler)


def dump_graphs(module: str, folder: Path, *words: str) -> None:
    """Run a module that compiles graphs and writes them into `folder`, in its own process."""
    command = [sys.executable, "-m", module, str(folder), *words]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


def validated_graphs(folder: Path) -> str:
    """Return the text of the graphs in `folder` after the compiler's last check."""
    return "".join(path.read_text(errors="replace") for path in folder.glob("*_validate_*.ir"))


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable(report):
    """Escape half characters in what tests print and log: pytest-xdist sends UTF-8, and file names may hold others."""
    return _escaped((yield))


def _escaped(value):
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, dict):
        return {_escaped(key): _escaped(entry) for key, entry in value.items()}
    return [_escaped(entry) for entry in value] if isinstance(value, (list, tuple)) else value


@pytest.fixture(autouse=True)
def fixed_seed():
    np.random.seed(0)


@pytest.fixture(autouse=True)
def log_set_back():
    """The log is as Python makes it, before and after each test, whatever another file's fixtures did to it."""
    _set_back_log()
    yield
    _set_back_log()


def _set_back_log() -> None:
    log, root = logging.getLogger("ldm"), logging.getLogger()
    log.setLevel(logging.NOTSET)
    log.propagate = True
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    # Scripts give the root one that writes to a stream which pytest closes. Pytest's own handlers are of other classes.
    for handler in list(root.handlers):
        if type(handler) is logging.StreamHandler:
            root.removeHandler(handler)


@pytest.fixture
def unprivileged():
    """A folder, for a test that runs without root's permission to read and write everything."""
    folder = Path(tempfile.mkdtemp(prefix="ordinary-user-"))
    restore = _drop_file_rights() if os.geteuid() == 0 else lambda: None
    yield folder
    restore()
    subprocess.run(["chmod", "-R", "u+rwx", str(folder)], check=False)
    shutil.rmtree(folder, ignore_errors=True)


def _drop_file_rights() -> Callable[[], None]:
    """Drop CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH (see `man capset`); return a function that restores them."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this thread
    before = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice 32 of each
    libc.capget(header, before)
    without = (ctypes.c_uint32 * 6)(*before)
    without[0] &= ~0b110
    assert libc.capset(header, without) == 0, os.strerror(ctypes.get_errno())
    return lambda: libc.capset(header, before)


@pytest.fixture(scope="session")
def tiny_config():
    """tests/tiny.yaml: 32 pixels, two levels, attention at both."""
    from ldm.settings.model import load_model_config

    return load_model_config(ROOT / "tests" / "tiny.yaml")


@pytest.fixture
def graph_mode():
    """Graph mode, in which training and sampling run. Afterwards MindSpore's default, pynative mode."""
    import mindspore as ms

    ms.set_context(mode=ms.GRAPH_MODE)
    yield
    ms.set_context(mode=ms.PYNATIVE_MODE)


@pytest.fixture
def tiny_model(tiny_config, graph_mode):
    """The tiny networks with random weights, frozen."""
    from ldm.models.stable_diffusion import build_model

    return build_model(tiny_config)


@pytest.fixture(scope="session")
def micro_base_model(tmp_path_factory) -> Path:
    """A base model of the micro architecture with random weights."""
    from tests.training.micro import write_base_model

    path = tmp_path_factory.mktemp("base_model") / "micro.safetensors"
    write_base_model(path)
    return path


@pytest.fixture(scope="session")
def micro_data(tmp_path_factory) -> Path:
    """A data folder with ten plain images."""
    from tests.training.micro import write_data

    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


@pytest.fixture(scope="session")
def full_run(micro_base_model, micro_data, tmp_path_factory) -> Path:
    """The output folder of one uninterrupted training of the whole UNet, by the command line."""
    from tests.training.micro import STEPS, command

    output = tmp_path_factory.mktemp("full") / "run"
    arguments = command(micro_base_model, micro_data, output)
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"{STEPS}/{STEPS}" in done.stderr and "loss" in done.stderr
    return output


@pytest.fixture(scope="session")
def captioned_data(micro_data, tmp_path_factory) -> Path:
    """The images of micro_data with captions of several tags."""
    folder = tmp_path_factory.mktemp("data-of-tags") / "captioned"
    folder.mkdir()
    for i in range(10):
        shutil.copy(micro_data / f"{i}.png", folder)
        (folder / f"{i}.txt").write_text(f"Blue, a square, number {i}", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def shared_settings(micro_base_model, captioned_data):
    """Makes the settings of shared_run, for a run that saves into a folder."""
    from ldm.settings.train import TrainSettings
    from tests.training.micro import SETTINGS

    def make(output: Path, **others: object) -> TrainSettings:
        paths = {"pretrained_model_path": micro_base_model, "data_path": captioned_data, "output_path": output}
        return TrainSettings(**{
            **SETTINGS, **paths, "use_lora": True, "lora_rank": 2, "lora_targets": ["to_q", "to_out.0", "in_layers.2"],
            "max_steps": 6, "start_learning_rate": 1e-2, "output_name": "style", "metadata_title": "Blue squares",
            "metadata_trigger_phrase": "blue", "training_comment": "a test", "log_level": "WARNING", **others,
        })  # fmt: skip

    return make


@pytest.fixture(scope="session")
def shared_run(shared_settings, tmp_path_factory) -> Path:
    """The output folder of a training of a LoRA, of 6 steps, saved after 3 and 6."""
    import mindspore as ms

    from ldm.training.trainer import train

    output = tmp_path_factory.mktemp("shared") / "run"
    ms.set_context(mode=ms.GRAPH_MODE)
    train(shared_settings(output))
    ms.set_context(mode=ms.PYNATIVE_MODE)
    return output
