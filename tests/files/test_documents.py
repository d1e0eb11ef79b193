"""YAML and JSON files are read without surprises, or refused quickly with an error of one line."""

from __future__ import annotations

import itertools
import os
from contextlib import suppress

import pytest

from ldm.errors import UserError
from ldm.files.documents import MAX_BYTES, MAX_YAML_BYTES, read_json, read_yaml, write_yaml
from tests.growth import assert_linear, text_maker


@pytest.fixture
def yaml_file(tmp_path):
    """Write a YAML file and return its path."""

    def write(content, name="a.yaml"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        return path

    return write


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.5E+3", 1500.0),
        ("-.5", -0.5),
        ("3.", 3.0),
        ("1_000", 1000),
        ("0x1F", 31),
        ("+7", 7),
        ("yes", True),
        ("Off", False),
        ("~", None),
        ("", None),
        # numbers and dates in YAML 1.1, texts here
        ("1:30", "1:30"),
        ("12:30:45.5", "12:30:45.5"),
        ("010", "010"),
        ("2020-01-01", "2020-01-01"),
        ("2020-13-45", "2020-13-45"),
        ("1e", "1e"),
        ("-", [None]),
        ("٣", "٣"),
    ],
)
def test_scalars_without_surprises(text, value, yaml_file):
    read = read_yaml(yaml_file(text))
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize("content", ["\ufeffa: 1\n", "a: 1\r\n", "%YAML 1.2\n---\na: 1\n", '{"a": 1}'])
def test_variants_that_editors_write(content, yaml_file):
    assert read_yaml(yaml_file(content)) == {"a": 1}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a: 1\nb: !!int x", ' line 2 is not valid YAML: "x" is not a valid !!int'),
        ("a: !!float x", ' line 1 is not valid YAML: "x" is not a valid !!float'),
        ("a: !!bool x", ' line 1 is not valid YAML: "x" is not a valid !!bool'),
        ("a: !!timestamp x", ' line 1 is not valid YAML: "x" is not a valid !!timestamp'),
        ("a: !!timestamp 2020-13-45", '"2020-13-45" is not a valid !!timestamp'),
        ("a: !!binary x", " line 1 is not valid YAML: failed to decode"),
        ("a: !!int [1]", " line 1 is not valid YAML"),
        ("a: !!int", ' line 1 is not valid YAML: "" is not a valid !!int'),
        ("a: !!set [1]", " line 1 is not valid YAML"),
        ("a: !!python/object/apply:os.system [true]", " line 1 is not valid YAML: could not determine a constructor"),
        ("a: !!python/name:os.system", "could not determine a constructor"),
        ("a: !mine 3", "could not determine a constructor"),
        ("a: " + "9" * 5000, " line 1 is not valid YAML: a number of more than 1000 digits"),
        ("a: 0x" + "f" * 5000, "a number of more than 1000 digits"),
        ("a: !!int " + "1:" * 5000 + "1", "a number of more than 1000 digits"),
        ("[" * 100_000, " line 1 is not valid YAML: it is nested too deeply"),
        ("{a: " * 60_000, "it is nested too deeply"),
        ("? [a]\n: b", " line 1 is not valid YAML: found unhashable key"),
        ("? {a: b}\n: c", " line 1 is not valid YAML: found unhashable key"),
        ("a: 1\n<<: 3", " line 2 is not valid YAML: << must name a mapping"),
        ("a:\n\t- x", " line 2 is not valid YAML"),
        ("%YAML 9.0\n---\na: 1", " line 1 is not valid YAML: found incompatible YAML document"),
        ("a: 1\n--- \nb: 2", " line 2 is not valid YAML: but found another document"),
        ("a: *b", " line 1 is not valid YAML: found undefined alias"),
        ("a: 1\nb: \x07", " line 2 is not valid YAML"),
        ("a: 1\nb: \0", ", line 2: not a text file, it holds a zero byte"),
        ('a: "\\0"', r": \\x00 in a text is not a valid character"),
        ('a: "\\ud800"', r": \\ud800 in a text is not a valid character"),
        ('"\\ud83d\\ude00": 1', r": \\ud83d in a text is not a valid character"),
        (b"a: caf\xe9", ", line 1: not a UTF-8 text file: save it as UTF-8"),
        ("a: 1".encode("utf-16"), " is UTF-16: save it as UTF-8"),
        ("a: 1".encode("utf-16-be"), ", line 1: not a text file"),
        ("a" * (MAX_YAML_BYTES + 1), f" has 262,145 bytes, at most {MAX_YAML_BYTES:,} are read"),
        ("a: 1\na: 2", ' line 2 is not valid YAML: "a" is given twice'),
        ("a: " + "x" * 300 + ": 1", " line 1 is not valid YAML: mapping values are not allowed here"),
    ],
)  # fmt: skip
def test_invalid_yaml_is_refused_with_its_line(content, says, yaml_file):
    with pytest.raises(UserError, match=r"^train_config .*a.yaml.*" + says) as error:
        read_yaml(yaml_file(content), "train_config")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def lines(first, line, count):
    """Lines that name the line before them, as x0, x1, ..."""
    return f"x0: &x0 {first}\n" + "".join(f"x{i}: &x{i} {line.format(i - 1)}\n" for i in range(1, count))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        pytest.param(lines("[1]", "[*x{0}, *x{0}]", 24), "more than 1,000,000 entries", id="lists"),
        pytest.param(f"x: &x {'y' * 100_000}\nz: [{'*x, ' * 10_000}]\n", "more than 1,000,000 entries", id="texts"),
        pytest.param("x: &x [*x]\n", "more than 1,000,000 entries", id="a list in itself"),
        pytest.param(lines("[1]", "[*x{0}]", 3000), "more than 1,000,000 entries", id="depth"),
        pytest.param(
            f"x: &x {{{', '.join(f'k{i}: 1' for i in range(3000))}}}\ny: {{<<: [{'*x, ' * 9000}]}}\n",
            "more than 1,000,000 entries are merged",
            id="a long merge",
        ),
        pytest.param("a: " + "1" * 250_000, "more than 1000 digits", id="digits"),
        pytest.param("- " * 120_000, "nested too deeply", id="nested lists"),
    ],
)
def test_bombs_are_refused(text, says, yaml_file):
    with pytest.raises(UserError, match=says) as error:
        read_yaml(yaml_file(text))
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("make", "size"),
    [
        # Not with the entries that 20 lines stand for, 2 ** 20.
        pytest.param(lambda count: lines("[1]", "[*x{0}, *x{0}]", count), 20, id="lists"),
        pytest.param(lambda count: lines("{a: 1}", "{{<<: [*x{0}, *x{0}]}}", count), 20, id="merges"),
        pytest.param(text_maker("a: ", "1"), 100_000, id="digits"),
        pytest.param(text_maker("a: ", "1:", "1"), 100_000, id="sexagesimal"),
        pytest.param(text_maker("a: ", "1_", "x"), 100_000, id="underscores"),
        pytest.param(text_maker("", "- "), 100_000, id="nested lists"),
        pytest.param(text_maker("[", "a,", "]"), 10_000, id="words"),
        pytest.param(text_maker("{", "? , ", "}"), 10_000, id="keys that are nothing"),
    ],
)
def test_the_work_grows_with_the_file_alone(make, size, yaml_file):
    count = itertools.count()

    def read(path):
        with suppress(UserError):
            read_yaml(path)

    assert_linear(read, lambda size: yaml_file(make(size), f"{next(count)}.yaml"), size)


def test_merged_sections_hold_each_key_once_and_their_own_wins(yaml_file):
    text = "base: &b {r: 4, s: 1}\nmore: &m {s: 2, t: 3}\nto_q: &q {<<: [*b, *m], r: 8}\nto_k: {<<: *q}\n=: 5\n"
    read = read_yaml(yaml_file(text))
    assert read["to_q"] == read["to_k"] == {"r": 8, "s": 1, "t": 3} and read["="] == 5


@pytest.mark.parametrize("text", ["1e5", "010", "1:30", "2020-01-01", "yes", "null", "~/x", "猫", "\udce9", "a\nb", ""])
def test_texts_survive_writing_and_reading(text, yaml_file):
    content = {"a": text, "b": [text], "c": 1e-7, "d": None}
    assert read_yaml(yaml_file(write_yaml(content))) == content


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", " line 1 is not valid JSON"),
        ("", " line 1 is not valid JSON"),
        ("{'a': 1}", " line 1 is not valid JSON"),
        ('{"a": 1, "a": 2}', ' is not valid JSON: "a" is given twice'),
        ('{"a": ' + "9" * 5000 + "}", " is not valid JSON: a number of 5,000 digits"),
        ("[" * 100_000, " is not valid JSON: it is nested too deeply"),
        ("1 2", " line 1 is not valid JSON: Extra data"),
        (" " * (MAX_BYTES + 1), f"at most {MAX_BYTES:,} are read"),
    ],
    ids=lambda text: text.strip()[:40],  # not all 16 MB in pytest's report
)
def test_invalid_json_is_refused(content, says, tmp_path):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match="^lora_config .*a.json.*" + says) as error:
        read_json(tmp_path / "a.json", "lora_config")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_json_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}


def test_pipes_and_files_without_permission_are_refused(unprivileged):
    os.mkfifo(unprivileged / "pipe.yaml")
    (unprivileged / "a.yaml").write_text("a: 1")
    (unprivileged / "a.yaml").chmod(0)
    with pytest.raises(UserError, match=r"is a pipe \(FIFO\), not a file: give the path of a YAML file"):
        read_yaml(unprivileged / "pipe.yaml")
    with pytest.raises(UserError, match="a.yaml cannot be read: Permission denied: give this user the permission"):
        read_yaml(unprivileged / "a.yaml")
