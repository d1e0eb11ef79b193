"""Settings: defaults < YAML < flags, and mistakes that are named."""

# ruff: noqa: UP007, UP045 (the annotations are read when it runs, on Python 3.9 too)
from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Optional, Union

import pytest

from ldm.config.parse import parse_config, save_config, setting
from ldm.errors import UserError

ROOT = Path(__file__).parents[2]


@dataclass
class Config:
    config: Optional[str] = setting(None, "a YAML file")
    epochs: int = setting(10, "passes over the data", group="schedule", low=1)
    rate: float = setting(1e-5, "learning rate", group="schedule", above=0)
    name: str = setting("adamw", "optimizer", choices=("adamw", "adam"))
    use_lora: bool = setting(False, "train a LoRA")
    seed: Optional[int] = setting(None, "seed")
    betas: list[float] = setting([0.9, 0.999], "decay of the moments", low=0, below=1, length=2)
    files: Optional[list[str]] = setting(None, "LoRA files")
    resume: Union[bool, str] = setting(False, "go on")


def parse(*argv, text=None, tmp_path=None):
    argv = list(argv)
    if text is not None:
        (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
        argv = ["--config", str(tmp_path / "c.yaml"), *argv]
    return parse_config(Config, argv, yaml_flag="config", prog="train.py")


def test_defaults_then_yaml_then_flags(tmp_path):
    config = parse("--epochs", "3", text="epochs: 2\nseed: 7\n", tmp_path=tmp_path)
    assert (config.epochs, config.seed, config.name) == (3, 7, "adamw")


def test_a_default_list_is_not_shared():
    parse().betas.append(1.0)
    assert parse().betas == [0.9, 0.999]


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--use_lora"], "use_lora", True),
        (["--use_lora", "True"], "use_lora", True),
        (["--use_lora=True"], "use_lora", True),
        (["--use_lora", "false"], "use_lora", False),
        (["--use_lora", "--epochs", "3"], "use_lora", True),
        (["--use-lora"], "use_lora", True),
        (["--resume"], "resume", True),
        (["--resume", "True"], "resume", True),
        (["--resume", "run/ckpt"], "resume", "run/ckpt"),
        (["--rate", "1e-4"], "rate", 1e-4),
        (["--rate", "1"], "rate", 1.0),
        (["--seed", "None"], "seed", None),
        (["--seed", "-3"], "seed", -3),
        (["--betas", "0.5", "0.6"], "betas", [0.5, 0.6]),
        (["--betas", "0.5,0.6"], "betas", [0.5, 0.6]),
        (["--betas=[0.5, 0.6]"], "betas", [0.5, 0.6]),
        (["--files", "a,b.ckpt:0.7", "c.ckpt", "--epochs", "3"], "files", ["a,b.ckpt:0.7", "c.ckpt"]),
        (["--epochs", "3", "--epochs", "4"], "epochs", 4),
    ],
)
def test_flags_are_read(argv, name, value):
    got = getattr(parse(*argv), name)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("rate: 1e-4", "rate", 1e-4),
        ("rate: 1.0e-4", "rate", 1e-4),
        ("rate: 3", "rate", 3.0),
        ("use_lora: True", "use_lora", True),
        ("betas: [0.5, 0]", "betas", [0.5, 0.0]),
        ("seed: null", "seed", None),
        ("resume: True", "resume", True),
        ("files: [a.ckpt]", "files", ["a.ckpt"]),
        ("", "epochs", 10),
    ],
)
def test_yaml_is_read(text, name, value, tmp_path):
    got = getattr(parse(text=text, tmp_path=tmp_path), name)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--epoch", "3"], "--epochs"),
        (["--uselora"], "--use_lora"),
        (["--epochs", "many"], 'epochs: "many" is not a whole number'),
        (["--epochs", "3.5"], "whole number"),
        (["--epochs"], "needs a value"),
        (["--epochs", "0"], "at least 1"),
        (["--rate", "nan"], "not a number"),
        (["--rate", "0"], "above 0"),
        (["--use_lora", "maybe"], "True or False"),
        (["--name", "adanw"], 'did you mean "adamw"'),
        (["--betas", "0.9"], "wanted 2"),
        (["--betas", "0.9", "1"], "below 1"),
        (["epochs", "3"], "does not belong"),
        (["--epochs", "3", "4"], '"4" does not belong'),
        (["--config", "/nowhere.yaml"], "does not exist"),
    ],
)
def test_wrong_flags_are_named(argv, says):
    with pytest.raises(UserError, match=re.escape(says)):
        parse(*argv)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("epoch: 3", 'did you mean "epochs"'),
        ("epochs: many", "whole number"),
        ('epochs: "3"', "whole number"),
        ("epochs: 3.5", "whole number"),
        ("epochs: True", "whole number"),
        ("epochs: null", "whole number"),
        ("epochs: 0", "at least 1"),
        ("rate: .nan", "not a number"),
        ("use_lora: 1", "True or False"),
        ("name: 5", "quotes"),
        ("betas: 0.9", "a list"),
        ("betas: [a, b]", '"a" is not a number'),
        ("epochs: 3\nepochs: 4", "given twice"),
        ("epochs: [3", "line 1"),
        ("- epochs", "setting: value"),
        ("config: other.yaml", "unknown setting"),
        ("? [epochs]\n: 3", "line 1 is not valid YAML"),
        ("{{epochs: 3}: 4}", "line 1 is not valid YAML"),
        ("epochs: !!python/object/apply:os.system [true]", "not valid YAML"),
    ],
)
def test_wrong_yaml_names_the_file_and_the_setting(text, says, tmp_path):
    with pytest.raises(UserError, match=re.escape(says)) as error:
        parse(text=text, tmp_path=tmp_path)
    assert "c.yaml" in str(error.value) and "\n" not in str(error.value)


def test_help_explains_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("-h")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for word in ("--epochs", "passes over the data", "schedule:", "least 1", "[10]", '"adamw", "adam"', "[0.9, 0.99"):
        assert word in text


@pytest.mark.skipif(os.name != "posix", reason="a pipe whose reader has gone")
def test_help_that_is_read_in_part_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "text_to_image.py", "-h"], cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, timeout=120
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


def test_saved_settings_are_read_back(tmp_path):
    config = parse("--rate", "1e-7", "--files", "a", "--resume")
    config.config = "recipe.yaml"
    save_config(config, tmp_path / "args.yaml", header="python train.py", leave_out=("config", "resume"))
    text = (tmp_path / "args.yaml").read_text()
    assert text.startswith("# python train.py\n# config: recipe.yaml\n# resume: true\n")
    again = parse("--config", str(tmp_path / "args.yaml"))
    assert not again.resume
    assert asdict(again) == {**asdict(config), "config": str(tmp_path / "args.yaml"), "resume": False}

