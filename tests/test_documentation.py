"""The files, modules and names that the documentation mentions exist."""

from __future__ import annotations

import ast
import importlib
import re

import pytest

from tests.conftest import ROOT

PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in (".", "docs", "datasets", "tools/eval")
    for path in (ROOT / folder).glob("*.md")
)


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def resolve(name: str) -> object:
    """Return the module or the object with a dotted name."""
    module, _, attribute = name.rpartition(".")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return getattr(resolve(module), attribute)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\((?!https?:)([^)#\s]+)", read(page))
    assert [target for target in targets if not ((ROOT / page).parent / target).exists()] == []


def test_the_files_that_contributing_names_exist():
    paths = re.findall(r"`((?:ldm|tests|tools|docs|\.ci)/[\w/.]+)`", read("CONTRIBUTING.md"))
    assert len(paths) > 20
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_public_api_exists():
    page = read("docs/api.md")
    names = set(re.findall(r"\bldm(?:\.\w+)+", page))
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                names.update(f"{node.module}.{alias.name}" for alias in node.names)
    table = page.partition("| `ldm.lora` |")[2].partition("##")[0]
    for cell in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE):
        names.update(f"ldm.lora.{name}" for name in re.findall(r"`(\w+)", cell))
    assert len(names) > 30
    for name in sorted(names):
        resolve(name)


def test_the_examples_of_the_api_page_are_those_of_the_readme():
    """Other tests run the examples of the README."""
    readme, blocks = read("README.md"), re.findall(r"```python\n(.*?)```", read("docs/api.md"), re.DOTALL)
    for block in blocks:
        if "Pipeline" in block or "train_lora" in block:
            assert block in readme
