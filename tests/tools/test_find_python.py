"""tools/find_python chooses the Python of the virtual environments, or says why there is none."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "find_python"

pytestmark = pytest.mark.skipif(os.name != "posix", reason="a shell script")


def python(folder, name, version, venv=True):
    """A stand-in that answers the two questions that the script asks."""
    path = folder / name
    path.write_text(f'#!/bin/sh\ncase "$2" in *version_info*) echo {version};; *) exit {0 if venv else 1};; esac\n')
    path.chmod(0o755)
    return path


def find(folder, *arguments):
    done = subprocess.run(
        ["/bin/sh", str(SCRIPT), *arguments], capture_output=True, text=True, env={"PATH": str(folder)}, timeout=60
    )
    return done.returncode, done.stdout.strip(), done.stderr


@pytest.mark.parametrize("version", ["3.9", "3.10", "3.11", "3.12"])
def test_a_python_with_a_wheel_and_venv_is_taken(tmp_path, version):
    python(tmp_path, "python3", version)
    assert find(tmp_path, "9") == (0, "python3", "")


def test_another_is_taken_where_the_first_is_too_new(tmp_path):
    python(tmp_path, "python3", "3.13")
    python(tmp_path, "python3.11", "3.11")
    assert find(tmp_path, "9") == (0, "python3.11", "")


@pytest.mark.parametrize(
    ("version", "venv", "says"),
    [
        ("3.13", True, "python3 is Python 3.13"),
        ("3.8", True, "python3 is Python 3.8"),
        ("2.7", True, "python3 is Python 2.7"),
        ("3.11", False, "python3 (Python 3.11) has no venv module: on Debian and Ubuntu, apt install python3.11-venv"),
    ],
)
def test_a_python_that_cannot_be_used_is_named_at_once(tmp_path, version, venv, says):
    python(tmp_path, "python3", version, venv)
    code, found, error = find(tmp_path, "9")
    assert (code, found) == (2, "")
    assert "error: this needs Python 3.9 to 3.12" in error and says in error and "Nothing was installed" in error


def test_no_python_at_all(tmp_path):
    code, _, error = find(tmp_path, "9")
    assert code == 2 and "python3 was not found" in error


def test_the_one_asked_for_is_taken_or_refused_and_no_other(tmp_path):
    python(tmp_path, "python3", "3.11")
    asked = python(tmp_path, "other", "3.12")
    assert find(tmp_path, "9", str(asked)) == (0, str(asked), "")
    asked = python(tmp_path, "other", "3.14")
    code, _, error = find(tmp_path, "9", str(asked))
    assert code == 2 and f"{asked} is Python 3.14" in error


def test_the_comparisons_need_a_later_one(tmp_path):
    python(tmp_path, "python3", "3.10")
    code, _, error = find(tmp_path, "11")
    assert code == 2 and "Python 3.11 to 3.12" in error
