"""The pages of the lessons name only scripts, flags, files and images that exist."""

from __future__ import annotations

import importlib
import re
import shlex
from dataclasses import fields

import pytest

from ldm.settings.generate import GenerateSettings
from ldm.settings.train import TrainSettings
from tests.conftest import ROOT

FOLDER = ROOT / "examples"
LESSONS = sorted(path.stem for path in FOLDER.glob("*.py"))
PAGES = sorted(path.name for path in FOLDER.glob("*.md"))
SETTINGS = {"train_text_to_image.py": TrainSettings, "text_to_image.py": GenerateSettings}
# Names in commands that stand for the reader's own files, and files that are not part of the repository.
READERS_OWN = ("my_", "output/", "models/sd_v1.5")
OTHER_PROGRAMS = {"--caption_extension"}  # flags of sd-scripts
LARGEST_IMAGE = 200_000  # bytes


def commands(page: str) -> list[list[str]]:
    """Return the words of each command in the code blocks of a page, without `python`."""
    found = []
    for block in re.findall(r"```\n(.*?)```", (FOLDER / page).read_text(encoding="utf-8"), re.DOTALL):
        found += [shlex.split(line, comments=True)[1:] for line in block.replace("\\\n", " ").splitlines() if
                  line.strip().startswith("python ")]  # fmt: skip
    found += [shlex.split(text)[1:] for text in re.findall(r"`(python [^`]+)`", page_text(page))]
    return found


def page_text(page: str) -> str:
    """Return the text of a page in which each paragraph is one line."""
    return re.sub(r"(?<!\n)\n\s*(?!\n)", " ", (FOLDER / page).read_text(encoding="utf-8"))


def flags_in_text(text: str) -> set[str]:
    """Return the long flags in the spans of code that are no commands, such as `--steps 100`."""
    spans = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return {word for span in spans if not span.startswith("python ") for word in re.findall(r"(?<!\S)--[a-z]\w*", span)}


def flags_of(script: str) -> set[str]:
    """Return the flags of a script of the project."""
    settings = SETTINGS.get(script)
    if settings is None:
        settings = importlib.import_module(script.removesuffix(".py").replace("/", ".")).Settings
    return {"-h", *(f"--{field.name}" for field in fields(settings))}


def test_each_lesson_has_a_page_in_the_index_and_each_page_a_lesson():
    index = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [f"{name}.md" for name in LESSONS] == [page for page in PAGES if page != "README.md"]
    assert [name for name in LESSONS if f"]({name}.md)" not in index] == []
    assert "(examples/README.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_commands_have_scripts_flags_and_files_that_exist(page):
    for script, *arguments in commands(page):
        assert (ROOT / script).is_file(), script
        unknown = {argument for argument in arguments if argument.startswith("-")} - flags_of(script)
        assert not unknown, f"{script} {unknown}"
        paths = [argument for argument in arguments if "/" in argument and not argument.startswith(READERS_OWN)]
        assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_flags_in_the_text_are_those_of_the_lesson_the_two_scripts_or_a_tool_of_its_commands(page):
    lessons = LESSONS if page == "README.md" else [page.removesuffix(".md")]
    scripts = {*SETTINGS, *(f"examples/{name}.py" for name in lessons), *(words[0] for words in commands(page))}
    known = OTHER_PROGRAMS.union(*map(flags_of, scripts))
    assert flags_in_text((FOLDER / page).read_text(encoding="utf-8")) - known == set()


@pytest.mark.parametrize("page", PAGES)
def test_links_and_names_of_files_lead_to_files(page):
    text = (FOLDER / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", text) + re.findall(r'src="([^"]+)"', text)
    assert links and [link for link in links if not (FOLDER / link).exists()] == []
    names = re.findall(r"(?<![\w/.])(?:configs|datasets|docs|examples|ldm|tools)/[\w/]+(?:\.\w+)?", text)
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_images_are_small_and_all_of_them_are_shown():
    shown = "".join((FOLDER / page).read_text(encoding="utf-8") for page in PAGES)
    for image in (FOLDER / "images").iterdir():
        assert image.stat().st_size <= LARGEST_IMAGE and f"images/{image.name}" in shown, image.name


def test_the_check_of_commands_sees_blocks_continued_lines_and_spans():
    found = commands("kohya_to_a1111.md")
    assert ["examples/kohya_to_a1111.py"] in found
    assert any(words[0] == "tools/lora/convert_lora.py" and words[-2:] == ["--dtype", "fp16"] for words in found)
    assert any(words[0] == "tools/lora/resize_lora.py" for words in commands("rank.md"))


def test_the_check_of_flags_sees_bullets_and_no_commands():
    text = (
        "- `--steps 100 --output_path output/x`: less.\n- `python a.py --other`\n```\npython b.py --more\n```\n`k--no`"
    )
    assert flags_in_text(text) == {"--steps", "--output_path"}
    assert "--steps" in flags_in_text((FOLDER / "first_lora.md").read_text(encoding="utf-8"))
    assert "--rank" in flags_in_text((FOLDER / "mixing.md").read_text(encoding="utf-8"))
