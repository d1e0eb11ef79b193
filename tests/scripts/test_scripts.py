"""The shell scripts for Ascend pass settings that exist, and one of them trains in two processes on the CPU."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ldm.files.paths import under_root
from ldm.settings.generate import GenerateSettings
from ldm.settings.read import read_settings
from ldm.settings.train import TrainSettings
from tests.conftest import ROOT
from tests.training.micro import MICRO, write_data

SCRIPTS = sorted((ROOT / "scripts").glob("*.sh"))
VARIABLES = (
    "VERSION", "DATA_PATH", "CHECKPOINT", "TRAIN_CONFIG", "OUTPUT_PATH", "DEVICE_TARGET", "DEVICE_ID", "PROCESSES",
    "MASTER_PORT", "MASTER_ADDR", "NODE_RANK", "HOSTS", "LOGS", "LORA", "CANN_ENVIRONMENT", "ASCEND_HOME_PATH",
)  # fmt: skip


def call(script, *arguments, path, **variables):
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment.update(variables, PATH=f"{path}{os.pathsep}{os.environ['PATH']}")
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / script), *arguments], env=environment, capture_output=True, text=True,
        timeout=280,
    )  # fmt: skip


@pytest.fixture
def passed(tmp_path):
    """A call runs a script with stand-ins for msrun and python, and returns the words that it passes."""
    for name in ("python", "msrun"):
        (tmp_path / name).write_text('#!/bin/sh\necho "$0"\nfor word in "$@"; do echo "$word"; done\n')
        (tmp_path / name).chmod(0o755)

    def run(script, *arguments, **variables):
        done = call(script, *arguments, path=tmp_path, **variables)
        assert done.returncode == 0, done.stderr
        program, *words = done.stdout.splitlines()
        return [Path(program).name, *words]

    return run


def training(words):
    """Return the settings that the words after train_text_to_image.py stand for."""
    return read_settings(
        TrainSettings, words[words.index("train_text_to_image.py") + 1 :], yaml_flag="train_config"
    )  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_accepts_the_syntax(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_each_variable_that_a_user_may_set_is_explained(script):
    text = script.read_text() + (ROOT / "scripts" / "environment.sh").read_text()
    comments = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    used = {name for name in (*VARIABLES, "CLUSTER_TIMEOUT") if f"${{{name}:-" in text or f"${{{name}-" in text}
    assert used - {"ASCEND_HOME_PATH"} and all(f"   {name} " in comments for name in used - {"ASCEND_HOME_PATH"})


@pytest.mark.parametrize("script", ["train_lora_1p.sh", "train_lora_8p.sh"])
@pytest.mark.parametrize(
    ("version", "recipe", "base"),
    [
        ("1.5", "train_config_lora_v1.yaml", "sd_v1.5-d0ab7146.ckpt"),
        ("2.0", "train_config_lora_v2.yaml", "sd_v2_base-57526ee4.ckpt"),
        ("2.1", "train_config_lora_v2.yaml", "sd_v2-1_base-7c8d09ce.ckpt"),
        ("nano", "train_config_lora_nano.yaml", "nano.safetensors"),
    ],
)
def test_the_recipes_are_the_published_ones(passed, script, version, recipe, base):
    settings = training(passed(script, VERSION=version))
    assert Path(settings.train_config).name == recipe and Path(settings.pretrained_model_path).name == base
    assert settings.use_lora and settings.device_target == "Ascend"
    assert settings.use_parallel == (script == "train_lora_8p.sh")


def test_sd15_is_the_default_and_flags_win(passed):
    words = passed("train_lora_1p.sh", "--epochs", "3", "--jit_level", "O2", DATA_PATH="a folder", OUTPUT_PATH="there")
    settings = training(words)
    assert words[:2] == ["python", "train_text_to_image.py"]
    assert Path(settings.train_config) == under_root("configs/train/train_config_lora_v1.yaml")
    assert (settings.epochs, settings.jit_level) == (3, "O2")
    assert (settings.data_path, settings.output_path) == ("a folder", "there")


def test_eight_cards_are_eight_processes_of_msrun(passed):
    words = passed("train_lora_8p.sh")
    launcher = dict(zip(words[1::2], words[2:12:2]))
    assert words[0] == "msrun" and launcher["--worker_num"] == launcher["--local_worker_num"] == "8"
    assert launcher["--join"] == "True"


@pytest.mark.parametrize("host", ["0", "1"])
def test_two_hosts_are_sixteen_processes_of_msrun(passed, host):
    words = passed("train_lora_2hosts.sh", MASTER_ADDR="10.0.0.1", NODE_RANK=host)
    launcher = dict(zip(words[1::2], words[2 : words.index("train_text_to_image.py") : 2]))
    assert (launcher["--worker_num"], launcher["--local_worker_num"]) == ("16", "8")
    assert (launcher["--master_addr"], launcher["--node_rank"]) == ("10.0.0.1", host)
    assert training(words).use_parallel


def test_two_hosts_need_the_address_and_the_number(tmp_path):
    done = call("train_lora_2hosts.sh", path=tmp_path, NODE_RANK="0")
    assert done.returncode == 2 and "set MASTER_ADDR" in done.stderr


def test_an_unknown_version_is_named(tmp_path):
    done = call("train_lora_1p.sh", path=tmp_path, VERSION="3")
    assert done.returncode == 2 and "VERSION 3 is unknown: 1.5, 2.0, 2.1 or nano" in done.stderr


def test_images_are_generated_with_the_lora_that_training_wrote(passed):
    trained = training(passed("train_lora_1p.sh", VERSION="2.1"))
    words = passed("generate.sh", "--prompt", "a cat", VERSION="2.1")
    assert words[:2] == ["python", "text_to_image.py"]
    settings = read_settings(GenerateSettings, words[2:], yaml_flag="generate_config")
    assert settings.lora_ckpt_path == [f"{trained.output_path}/ckpt/lora.ckpt"]
    assert settings.ckpt_path == trained.pretrained_model_path and settings.prompt == "a cat"


def test_images_are_generated_without_a_lora(passed):
    words = passed("generate.sh", "--prompt", "a cat", LORA="")
    assert read_settings(GenerateSettings, words[2:], yaml_flag="generate_config").lora_ckpt_path is None


def test_canns_environment_is_set_unless_it_is_there(passed, tmp_path):
    (tmp_path / "set_env.sh").write_text("export OUTPUT_PATH=from_cann\n")
    cann = dict(CANN_ENVIRONMENT=str(tmp_path / "set_env.sh"))
    assert training(passed("train_lora_1p.sh", **cann)).output_path == "from_cann"
    assert training(passed("train_lora_1p.sh", **cann, ASCEND_HOME_PATH="/cann")).output_path == "output/lora_1.5"


def test_two_processes_train_on_the_cpu(tmp_path, micro_base_model):
    write_data(tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = call(
        "train_lora_8p.sh", "--model_config", str(MICRO), "--image_size", "16", "--max_steps", "2",
        "--train_batch_size", "2",
        path=Path(sys.executable).parent, VERSION="1.5", PROCESSES="2", DEVICE_TARGET="CPU", MASTER_PORT=str(port),
        DATA_PATH=str(tmp_path), CHECKPOINT=str(micro_base_model), OUTPUT_PATH=str(tmp_path / "run"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (tmp_path / "run" / "ckpt" / "lora.ckpt").is_file()
    assert (tmp_path / "run-logs" / "worker_1.log").is_file()
