"""The page that compares runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ldm.training.report.comparison import comparison_page, run_names
from ldm.training.report.records import read_record
from tests.training.report.runs import HOSTILE, write_run


@pytest.fixture
def records(tmp_path):
    prompts = ("a red apple", HOSTILE)
    first = write_run(tmp_path / "a" / "run", prompts=prompts, lora_rank=4, max_steps=120)
    second = write_run(tmp_path / "b" / "run", prompts=prompts, seed=1, lora_rank=16, max_steps=120)
    third = write_run(tmp_path / "c" / "run", seed=2, lora_rank=4, optim="lion", max_steps=120)
    return [read_record(first), read_record(second), read_record(third)]


def part(page: str, name: str) -> str:
    return re.search(rf'<section id="{name}".*?</section>', page, re.DOTALL)[0]


def test_settings_that_differ_come_first_and_the_same_ones_last(records):
    page = comparison_page(records)
    rows = re.findall(r'<th scope="row">(\w+)</th>(.*?)</tr>', part(page, "settings"))
    cells = {name: re.findall("<td>(.*?)</td>", row) for name, row in rows}
    assert cells == {"lora_rank": ["4", "16", "4"], "optim": ["adamw", "adamw", "lion"]}
    assert page.index('id="settings"') < page.index('id="results"') < page.index('id="same"')
    assert '<th scope="row">max_steps</th><td>120</td>' in part(page, "same")
    assert "output_path" not in page  # it is the run's name


def test_curves_lie_over_each_other_and_samples_beside_each_other(records):
    page = comparison_page(records)
    loss = re.search(r'<figure id="loss".*?</figure>', page, re.DOTALL)[0]
    assert len(re.findall("<path", loss)) == 3
    assert re.findall(r"<th scope=\"col\">([^<]*)</th>", loss) == ["step", "a/run", "b/run", "c/run"]
    apple, hostile = re.findall(r'<table class="samples">.*?</table>', page, re.DOTALL)
    assert re.findall(r"<th scope=\"col\">([^<]*)</th>", apple) == ["step", "a/run", "b/run", "c/run"]
    assert apple.count("<img") == 12 and hostile.count("<img") == 8
    assert re.findall(r"<th scope=\"row\">([^<]*)</th>", apple) == ["before training", "step 40", "step 80", "step 120"]


def test_sixteen_curves_can_be_told_apart(records):
    loss = re.search(r'<figure id="loss".*?</figure>', comparison_page([records[0]] * 16), re.DOTALL)[0]
    classes = re.findall(r'<path [^>]*class="([^"]*)"', loss)
    assert len(classes) == len(set(classes)) == 16


def test_runs_are_named_by_what_tells_them_apart():
    assert run_names([Path("x/a"), Path("x/b")]) == ["a", "b"]
    assert run_names([Path("x/a/run"), Path("x/b/run/")]) == ["a/run", "b/run"]
    assert run_names([Path("a"), Path("a")]) == ["a (1)", "a (2)"]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_opens_without_errors_and_loads_nothing(page, records, tmp_path, dark):
    path = tmp_path / "compare.html"
    path.write_text(comparison_page(records), encoding="utf-8")
    page.errors.clear()
    page.requests.clear()
    for width in (1280, 390):
        page.open(path, width=width, dark=dark)
        assert page.run("document.documentElement.scrollWidth") <= width
        assert page.run("document.title") == "Comparison of runs"
    assert page.errors == [] and set(page.requests) == {path.resolve().as_uri()}
