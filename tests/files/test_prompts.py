"""Prompt files: generation and evaluation read them by the same rules, with warnings for unsupported syntax."""

from __future__ import annotations

import os
import re

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.files.prompts import MAX_BYTES, MAX_CHARACTERS, read_prompts
from ldm.generation.image_files import ImageWriter
from ldm.generation.plan import plan_generation
from ldm.metrics.image_files import find_images
from ldm.settings.generate import GenerateSettings
from tests.conftest import ROOT
from tools.eval.eval_clip_score import find_prompts


@pytest.fixture
def prompts(tmp_path):
    """Write a prompts file and return its path."""

    def write(content):
        path = tmp_path / "prompts.txt"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.mark.parametrize(
    ("content", "read"),
    [
        ("a cat\na dog\n\n\n", ["a cat", "a dog"]),  # line feeds end the file
        ("a cat\n\na dog", ["a cat", "", "a dog"]),
        ("a cat\n \n", ["a cat", ""]),  # a line of spaces is an empty prompt
        ("a cat\r\na dog\r\n\r\n", ["a cat", "a dog"]),
        ("\ufeffa cat\n", ["a cat"]),
        ("猫\n🐈\n", ["猫", "🐈"]),
        ("a\u2028b\x0bc\nd", ["a\u2028b\x0bc", "d"]),
        ("  spaces  \n\ttab\n", ["spaces", "tab"]),
    ],
)
def test_generation_and_evaluation_read_the_same_prompts(content, read, prompts, tmp_path):
    path = prompts(content)
    model = {"version": "nano", "ckpt_path": str(path)}
    drawn = plan_generation(GenerateSettings(data_path=str(path), **model))
    against = plan_generation(GenerateSettings(data_path=str(path), negative_data_path=str(path), **model))
    scored = find_prompts(str(path), [tmp_path / f"{i}.png" for i in range(len(read))])
    assert drawn.prompts == against.negative_prompts == scored == read


def test_the_prompts_of_samples_pair_with_their_images(prompts, tmp_path):
    drawn = ["a\ncat", "", "a dog\u2028", ""]
    writer = ImageWriter(tmp_path, drawn, [""] * 4, 1, {}, grid=False)
    writer.add(range(4), np.zeros((4, 8, 8, 3), np.uint8))
    assert find_prompts(None, find_images(tmp_path / "samples")) == ["a cat", "", "a dog", ""]


@pytest.mark.parametrize("prompt", ["a cat", "long " * 1000, "a/b " * 2000, "$HOME, sweet home", "x" * 300])
def test_a_prompt_is_distinguished_from_a_file(prompt, tmp_path):
    assert find_prompts(prompt, [tmp_path / "0.png"]) == [prompt]


def test_a_prompts_path_is_expanded(prompts, monkeypatch, tmp_path):
    prompts("a cat\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_prompts("~/prompts.txt", [tmp_path / "0.png"]) == ["a cat"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a\n\nb\n \n", "empty lines are empty prompts: lines 2, 4"),
        ("a\n# people\nb", "lines that begin with # are prompts, not comments: line 2"),
        ("a --n bad --w 512\n" * 8, "flags such as --n are words .*--negative_prompt.*: lines 1, 2, 3, 4, 5 and 3"),
    ],
)
def test_unsupported_syntax_logs_one_warning(content, says, prompts, caplog):
    read_prompts(prompts(content), "data_path")
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert re.search("data_path .*prompts.txt: " + says, record.getMessage())


@pytest.mark.parametrize("content", ["a cat\n", "a -- b\n", "a #cat\n", "well--done\n"])
def test_ordinary_prompts_log_no_warning(content, prompts, caplog):
    read_prompts(prompts(content), "data_path")
    assert not caplog.records


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\n \n\n", "is empty: write one prompt a line"),
        (b"a\n" + b"x" * (MAX_CHARACTERS + 1), f"line 2: a prompt of 10,001 characters, at most {MAX_CHARACTERS:,}"),
        (b"a\n" * 1_000_001, "has 1,000,001 lines, at most 1,000,000 are read: split it"),
        (b"a cat\n\xb0\xa1\n", "line 2: not a UTF-8 text file"),
        ("a cat\n".encode("utf-16"), "is UTF-16: save it as UTF-8"),
        (b"PK\3\4\0\0", "line 1: not a text file"),
    ],
)
def test_an_unreadable_file_is_named_with_the_way_out(content, says, prompts):
    with pytest.raises(UserError, match=f"^data_path .*prompts.txt,? {says}"):
        read_prompts(prompts(content), "data_path")


def test_a_gigabyte_is_refused_before_it_is_read(prompts):
    path = prompts("")
    os.truncate(path, 1 << 30)
    with pytest.raises(UserError, match=f"1,073,741,824 bytes, at most {MAX_BYTES:,} are read: give a text file"):
        read_prompts(path, "data_path")


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "dead link", "circle"])
def test_a_path_that_is_not_a_file_is_named(kind, tmp_path):
    path = tmp_path / "prompts.txt"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/zero", "dead link": "nowhere", "circle": "prompts.txt"}[kind])
    with pytest.raises(UserError, match="data_path .*prompts.txt (is a|does not exist|cannot be read: Too many).*: "):
        read_prompts(path, "data_path")


def test_a_million_prompts_are_read(prompts):
    path = prompts("a prompt of many, with more than a few words in it, as people write\n" * 10**6)
    assert len(read_prompts(path, "data_path")) == 10**6


def test_the_bundled_prompts_log_no_warning(caplog):
    files = sorted((ROOT / "datasets").glob("*/test/prompts.txt"))
    assert files and all(read_prompts(path, "data_path") for path in files)
    assert not caplog.records
