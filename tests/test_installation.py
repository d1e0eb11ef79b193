"""The wheel holds everything that the scripts and tools need, and they run from any folder."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.conftest import ROOT

SOURCES = ("ldm", "configs", "models/nano", "tools", "datasets/LICENSES")
FILES = ("pyproject.toml", "setup.py", "requirements.txt", "README.md", "LICENSE", "NOTICE", "text_to_image.py",
         "train_text_to_image.py")  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The path of a wheel, built from a copy of the repository: setuptools writes into the folder that it builds."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in SOURCES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    done = subprocess.run([*command, "-w", str(folder), str(source)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with the unpacked wheel, as site-packages would hold it."""
    folder = tmp_path_factory.mktemp("site-packages")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def run_command(installed, folder, name, *arguments):
    """Run a console command in `folder`, as the script that pip writes for it does."""
    code = f"import sys; sys.argv[0] = {name!r}; from ldm.commands import {name}; sys.exit({name}())"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(installed)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def commands(installed):
    """Return {command: "module:function"} from the wheel's entry points."""
    parser = configparser.ConfigParser()
    parser.read(next(installed.glob("*.dist-info")) / "entry_points.txt")
    return dict(parser["console_scripts"])


def test_every_file_of_the_library_and_its_data_is_installed(installed):
    missing = [
        path.relative_to(ROOT)
        for folder, place in (
            ("ldm", "ldm"),
            ("configs", "ldm/bundled/configs"),
            ("models/nano", "ldm/bundled/models/nano"),
            ("tools/studio_page", "ldm/bundled/tools/studio_page"),
        )
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
        and "__pycache__" not in path.parts
        and not (installed / place / path.relative_to(ROOT / folder)).is_file()
    ]
    assert missing == []


def test_only_ldm_is_added_to_site_packages(installed):
    assert {path.name for path in installed.iterdir() if path.suffix != ".dist-info"} == {"ldm"}
    assert not (installed / "ldm" / "bundled" / "setup.py").exists()


def test_the_licences_of_bundled_data_are_installed(installed):
    licences = next(installed.glob("*.dist-info")) / "licenses"
    assert {"LICENSE", "NOTICE"} <= {path.name for path in licences.iterdir()}
    assert len(list((licences / "datasets" / "LICENSES").iterdir())) == len(
        list((ROOT / "datasets/LICENSES").iterdir())
    )


def test_both_scripts_and_every_tool_for_users_are_commands(installed):
    scripts = {path.stem for path in ROOT.glob("*_to_image.py")}
    folders = ("lora", "model_conversion", "eval")
    tools = {path.stem for folder in folders for path in (ROOT / "tools" / folder).glob("*.py")}
    tools -= {"__init__", "ablations"}  # ablations trains on the data sets, which are not installed
    # Of the tools beside these folders, the others are for developers. The modules beside inspect_data are its parts.
    tools |= {"check_device", "compare_runs", "import_recipe", "inspect_data", "studio"}
    names = {"doctor": "lora_doctor", "verify": "lora_verify"}  # others would have too general a name on a PATH
    tools = {names.get(tool, tool) for tool in tools}
    assert commands(installed) == {name: f"ldm.commands:{name}" for name in scripts | tools}


def test_a_tool_runs_in_any_folder_and_ends_mistakes_with_exit_code_2(installed, tmp_path):
    flags = ("--source", "nowhere.ckpt", "--target", "a.safetensors", "--to", "kohya")
    done = run_command(installed, tmp_path, "convert_lora", *flags)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "nowhere.ckpt" in done.stderr


def test_a_data_set_is_inspected_in_any_folder(installed, tmp_path):
    flags = ("--data_path", str(ROOT / "datasets" / "line_art_cat"), "--instance_prompt", "a cat")
    done = run_command(installed, tmp_path, "inspect_data", *flags)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "output" / "inspect_data").glob("*.*")) == [
        "contact_sheet_1.png", "inspect_data.json"
    ]  # fmt: skip


def test_a_device_is_checked_in_any_folder(installed, tmp_path):
    done = run_command(installed, tmp_path, "check_device", "--device_target", "CPU", "--graphs", "overflow")
    assert done.returncode == 0, done.stderr
    assert "**OK**: all 1 graphs agree" in done.stdout


def test_an_image_is_generated_in_any_folder(installed, tmp_path):
    done = run_command(installed, tmp_path, "text_to_image", "--prompt", "a red apple", "--sampling_steps", "1")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "output" / "samples").glob("*.png"))) == 1
