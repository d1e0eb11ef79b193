"""Settings: defaults < YAML < flags, and mistakes that are named."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Optional, Union

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.settings.declare import REQUIRED, names_of, setting
from ldm.settings.read import check_values, read_mapping, read_settings, save_settings, split_flags

ROOT = Path(__file__).parents[2]


@dataclass
class Example:
    """Settings of all types."""

    config: Optional[str] = setting(None, "a YAML file", path=True, project=True)
    epochs: int = setting(10, "passes over the data", group="schedule", low=1)
    rate: float = setting(1e-5, "learning rate", group="schedule", above=0)
    name: str = setting("adamw", "optimizer", group="others", choices=("adamw", "adam"))
    use_lora: bool = setting(False, "train a LoRA")
    seed: Optional[int] = setting(None, "seed")
    betas: list[float] = setting([0.9, 0.999], "decay of the moments", low=0, below=1, length=2)
    files: Optional[list[str]] = setting(None, "LoRA files")
    resume: Union[bool, str] = setting(False, "go on", path=True)
    folder: Optional[str] = setting(None, "a folder", path=True)
    data: Optional[str] = setting(None, "a folder that may be the project's", path=True, project=True)
    loras: Optional[list[str]] = setting(None, "files with weights", path=True)
    prompt: str = setting("", "a text")
    decay: float = setting(0.9, "of an average", low=0, below=1)


def parse(*argv, text=None, tmp_path=None):
    argv = list(argv)
    if text is not None:
        (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
        argv = ["--config", str(tmp_path / "c.yaml"), *argv]
    return read_settings(Example, argv, yaml_flag="config", prog="train.py")


def test_defaults_then_yaml_then_flags(tmp_path):
    settings = parse("--epochs", "3", text="epochs: 2\nseed: 7\n", tmp_path=tmp_path)
    assert (settings.epochs, settings.seed, settings.name) == (3, 7, "adamw")


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
        ("seed: None", "seed", None),
        ("files: None", "files", None),
        ("prompt: None", "prompt", "None"),  # a text, which may be this one
        ("resume: None", "resume", "None"),
        ("seed: 1_000", "seed", 1000),
        ("use_lora: yes", "use_lora", True),
        ("use_lora: off", "use_lora", False),
        ("\ufeffseed: 3\r\n", "seed", 3),
        ("prompt: 2020-13-45", "prompt", "2020-13-45"),
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
        (["--config", "/nowhere.yaml"], "--config /nowhere.yaml does not exist"),
        (["--folder", ""], '--folder: "" is no path: give one, or leave the setting out'),
        (["--rate", "1e39"], "fp32, which is computed with, ends at 3.4e38"),
        (["--rate", "1e-50"], "above 0 (in fp32, which is computed with, it is 0.0)"),
        (["--decay", "0.99999999"], "below 1 (in fp32, which is computed with, it is 1.0)"),
        (["--betas", "0.9", "0.99999999"], "2 values (in fp32, which is computed with, it is 1.0)"),
        (["--epochs", "9" * 5000], "is not a whole number"),
        (["--epochs", "-" + "9" * 900], "at least 1"),
        (["--" + "a" * 5000], "unknown setting --aaa"),
        (["a" * 5000], '" does not belong'),
        (["--rate", "\x1b[2J\udce9"], '"\\x1b[2J\\xe9" is not a number'),
    ],
)
def test_wrong_flags_are_named(argv, says):
    with pytest.raises(UserError, match=re.escape(says)) as error:
        parse(*argv)
    assert len(str(error.value)) < 400


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
        ('use_lora: "yes"', '"yes" is a text, not True or False: leave the quotes away'),
        ("use_lora: y", '"y" is not True or False'),
        ("seed: 2020-13-45", '"2020-13-45" is not a whole number'),
        ("seed: 1:30", '"1:30" is not a whole number'),
        ("seed: 010", "leave the quotes away, and zeros at its beginning"),
        ("seed: !!int x", "line 1"),
        ("seed: 1e400", "inf is not a whole number"),
        ("rate: 1e400", "inf is not a number"),
        ("seed: !!binary aGk=", "is not a whole number"),
        ("seed: [[[1]]]", "[[[1]]] is not a whole number"),
        ("prompt: !!timestamp 2020-01-01", "put the text in quotes"),
        ("prompt: true", "put the text in quotes"),
        ('folder: ""', '"" is no path'),
        ("1: 2", 'unknown setting "1"'),
        ("null: 2", 'unknown setting "None"'),
        ("? !!timestamp 2020-01-01\n: 2", "unknown setting"),
        (f"? {'long' * 50_000}\n: 2", "unknown setting"),
        (f"rate: {'long' * 50_000}", "is not a number"),
        (f"seed: [{'1, ' * 5000}]", "is not a whole number"),
        ("seed: 0x" + "f" * 1000, "a number of more than 1000 digits"),
        ("rate: 0x" + "f" * 900, "is not a number"),
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
    assert "c.yaml" in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 600


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


@pytest.mark.parametrize("way", ["flag", "flag=", "yaml"])
def test_paths_are_expanded_and_texts_are_not(way, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("RUN", "run 7")
    given = {
        "folder": "~/$RUN", "resume": "~/run", "loras": ["~/a.ckpt:0.7", "${RUN}.ckpt"], "prompt": "~ $RUN",
        "files": ["~/b"],
    }  # fmt: skip
    if way == "yaml":
        settings = parse(text="".join(f"{name}: {value}\n" for name, value in given.items()), tmp_path=tmp_path)
    elif way == "flag":
        settings = parse(*(word for n, v in given.items() for word in (f"--{n}", *(v if isinstance(v, list) else [v]))))
    else:
        settings = parse(*(f"--{name}={value}" for name, value in given.items() if isinstance(value, str)))
    assert (settings.folder, settings.resume, settings.prompt) == ("/home/me/run 7", "/home/me/run", "~ $RUN")
    if way != "flag=":
        assert settings.loras == ["/home/me/a.ckpt:0.7", "run 7.ckpt"] and settings.files == ["~/b"]
    save_settings(settings, tmp_path / "args.yaml")
    assert "folder: /home/me/run 7\n" in (tmp_path / "args.yaml").read_text()


def test_the_yaml_file_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TESTS", "tests")
    with pytest.raises(UserError, match=re.escape(f"{ROOT}/tests/tiny.yaml: unknown setting")):
        parse("--config", "$TESTS/tiny.yaml")  # a file of the project, though none with settings


def test_files_of_the_project_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = parse("--folder", "configs", text="data: configs/train\n", tmp_path=tmp_path)
    assert (settings.folder, settings.data) == ("configs", str(ROOT / "configs" / "train"))
    (tmp_path / "configs" / "train").mkdir(parents=True)
    assert parse("--data", "configs/train").data == "configs/train"
    assert parse("--data", "configs/nowhere").data == "configs/nowhere"


@pytest.mark.parametrize("text", ["1e5", "010", "1:30", "None", "yes", "\udce9", "a: b", "2020-01-01", " x "])
def test_a_saved_text_is_read_back_as_it_was(text, tmp_path):
    save_settings(parse("--prompt", text, "--folder", "x"), tmp_path / "args.yaml", leave_out=("config",))
    assert parse("--config", str(tmp_path / "args.yaml")).prompt == text


def test_saved_settings_are_read_back(tmp_path):
    settings = parse("--rate", "1e-7", "--files", "a", "--resume")
    settings.config = "recipe.yaml"
    save_settings(settings, tmp_path / "args.yaml", leave_out=("config", "resume"))
    text = (tmp_path / "args.yaml").read_text()
    assert text.startswith("# config: recipe.yaml\n# resume: true\n")
    again = parse("--config", str(tmp_path / "args.yaml"))
    assert not again.resume
    assert asdict(again) == {**asdict(settings), "config": str(tmp_path / "args.yaml"), "resume": False}


@dataclass
class Tool:
    """The command line of a tool."""

    source: Path = setting(REQUIRED, "what to read", path=True)
    output: Optional[Path] = setting(None, "what to write", path=True, aliases=("result_path",))
    texts: list[str] = setting([], "words", positional=True)
    layers: list[int] = setting([1], "numbers", low=0, length=(1, 3))
    hidden: bool = setting(False, key="secret")


class TestToolCommandLines:
    def test_paths_aliases_positional_words_and_other_names(self, monkeypatch):
        monkeypatch.setenv("HOME", "/home/me")
        settings = read_settings(Tool, ["a", "--source", "~/x", "--result-path=b", "c", "--layers", "1,2", "--secret"])
        assert settings == Tool(Path("/home/me/x"), Path("b"), ["a", "c"], [1, 2], True)

    def test_a_positional_word_may_follow_a_bare_boolean_or_a_list_of_numbers(self):
        settings = read_settings(Tool, ["--source", "x", "--secret", "a", "--layers", "1", "2", "b"])
        assert (settings.hidden, settings.layers, settings.texts) == (True, [1, 2], ["a", "b"])

    @pytest.mark.parametrize(
        ("argv", "says"),
        [
            ([], "--source is missing: give a path (what to read)"),
            (["--source", ""], '--source: "" is no path'),
            (["--source", "x", "--layers"], "--layers needs a value"),
            (["--source", "x", "--layers", "1", "2", "3", "4"], "--layers: 4 values given, wanted 1 to 3"),
            (["--source", "x", "--result", "y"], "unknown setting --result: did you mean --result_path?"),
        ],
    )
    def test_mistakes_are_named(self, argv, says):
        with pytest.raises(UserError, match=re.escape(says)):
            read_settings(Tool, argv)

    def test_help_keeps_the_description_and_hides_what_has_no_help(self, capsys):
        with pytest.raises(SystemExit):
            read_settings(Tool, ["-h"], description="A tool.\n\n    an example\n")
        text = capsys.readouterr().out
        assert text.startswith("A tool.\n\n    an example\n") and "secret" not in text
        assert "--source <path>\n      what to read [required]" in text and "--output, --result_path" in text

    def test_flags_of_two_classes_are_told_apart(self):
        argv = ["--source", "x", "--epochs", "3", "--layers", "1", "2", "--unknown=1", "-h"]
        assert split_flags(Tool, argv) == (
            ["--source", "x", "--layers", "1", "2", "-h"],
            ["--epochs", "3", "--unknown=1"],
        )


@dataclass
class Inner:
    """A section of a file."""

    rate: float = setting(REQUIRED, above=0)
    names: Optional[dict[str, Union[int, float]]] = setting(None, low=0, length=(0, 2))
    on: bool = setting(False, zero_one=True)
    IGNORED = ("old",)


@dataclass
class Outer:
    """A whole file."""

    kind: str = setting("a", choices=("a", "b"), resume="fixed")
    inner: Inner = setting(REQUIRED, graph_key=True)
    extra: Optional[dict] = setting(None)


class TestMappings:
    def test_given_values_in_the_order_of_declaration(self):
        content = {"extra": {"x": 1}, "inner": {"on": 1, "old": 3, "rate": 2, "names": {"a": 1, "b": 0.5}}}
        values = read_mapping(Outer, content, "file")
        assert values == {"inner": {"rate": 2.0, "names": {"a": 1, "b": 0.5}, "on": True}, "extra": {"x": 1}}
        assert list(values) == ["inner", "extra"] and list(values["inner"]) == ["rate", "names", "on"]

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            ([], "file must hold lines of `setting: value`, not a value of type list"),
            ({}, "file: inner is missing: give a section"),
            ({"inner": 3}, "file: inner must hold lines of"),
            ({"inner": {}}, "file: inner.rate is missing: give a number, above 0"),
            ({"inner": {"rats": 1}}, 'file: unknown setting "inner.rats": did you mean "rate"?'),
            ({"inner": {"rate": "1"}}, 'file: inner.rate: "1" is a text, not a number'),
            ({"inner": {"rate": 1, "on": 2}}, "file: inner.on: 2 is not True or False"),
            (
                {"inner": {"rate": 1, "names": {"a": "x"}}},
                'file: inner.names: a: "x" is not a whole number or a number',
            ),
            ({"inner": {"rate": 1, "names": {"a": -1}}}, "file: inner.names: -1 is not allowed: at least 0"),
            (
                {"inner": {"rate": 1, "names": dict.fromkeys("abc", 1)}},
                "file: inner.names: 3 values given, wanted 0 to 2",
            ),
            ({"inner": {"rate": 1, "names": [1]}}, "file: inner.names: [1] is not a mapping from names"),
            ({"inner": {"rate": 1}, "extra": [1]}, "file: extra: [1] is not a section"),
            ({"kind": "c", "inner": {"rate": 1}}, 'file: kind: "c" is not allowed: one of "a", "b"'),
        ],
    )
    def test_mistakes_are_named_with_file_and_place(self, content, says):
        with pytest.raises(UserError, match=re.escape(says)):
            read_mapping(Outer, content, "file")

    def test_unknown_names_may_be_passed_over(self):
        assert read_mapping(Inner, {"rate": 1, "other": 2}, "file", ignore_unknown=True) == {"rate": 1.0}


class TestValuesFromPython:
    def test_other_types_of_the_same_values_are_taken(self):
        settings = Example(
            epochs=np.int64(3), rate=1, betas=(0.5, np.float32(0.25)), folder=Path("x"), resume=Path("y")
        )
        check_values(settings)
        assert (settings.epochs, settings.rate, settings.betas) == (3, 1.0, [0.5, 0.25])
        assert (settings.folder, settings.resume) == ("x", "y")
        assert {type(settings.epochs), type(settings.rate), type(settings.folder)} == {int, float, str}

    @pytest.mark.parametrize(
        ("given", "says"),
        [
            (dict(epochs=0), "epochs: 0 is not allowed: at least 1"),
            (dict(epochs="3"), 'epochs: "3" is a text, not a whole number'),
            (dict(epochs=True), "epochs: True is not a whole number"),
            (dict(rate=float("nan")), "rate: nan is not a number"),
            (dict(betas=[0.5]), "betas: 1 values given, wanted 2"),
            (dict(name="adamww"), 'name: "adamww" is not allowed: one of "adamw", "adam"; did you mean "adamw"?'),
        ],
    )
    def test_mistakes_are_named(self, given, says):
        with pytest.raises(UserError, match="^" + re.escape(says)):
            check_values(Example(**given))

    def test_a_missing_value(self):
        with pytest.raises(UserError, match="^source is missing"):
            check_values(Tool())


def test_settings_are_found_by_what_they_are_part_of():
    assert names_of(Outer, resume="fixed") == ("kind",) and names_of(Outer, graph_key=True) == ("inner",)
