"""report.html: one file that loads nothing, says what the run wrote, and can be read by everyone."""

from __future__ import annotations

import json
import os
import re

import pytest
import yaml

from ldm.training.report.document import _part
from ldm.training.report.page import report_page
from ldm.training.report.records import read_record
from ldm.training.report.writer import write_report
from tests.training.report.runs import HOSTILE, write_metrics, write_run

# What screen readers make of the page, but for the names that it should have.
UNNAMED = """
[...document.querySelectorAll("img, .plot, [tabindex], [role=region], figure, section, svg:not([aria-hidden], svg *)")]
    .filter((e) => !(e.getAttribute("alt") || e.getAttribute("aria-label") || e.getAttribute("aria-labelledby")))
    .map((e) => e.outerHTML.slice(0, 80))
"""
# The contrast of each text with what is behind it (WCAG 2).
CONTRAST = """
(() => {
  const channel = (v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = (c) => { const [r, g, b] = c.match(/[0-9.]+/g).map(Number);
                         return 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b); };
  const behind = (e) => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
                          if (!/, 0\\)$/.test(c)) return c; } return "rgb(255,255,255)"; };
  let worst = 21;
  for (const e of document.querySelectorAll("h1,h2,h3,h4,p,th,td,dt,dd span,dd strong,summary,li,text")) {
    if (!e.textContent.trim()) continue;
    const style = getComputedStyle(e);
    const [a, b] = [light(e instanceof SVGElement ? style.fill : style.color), light(behind(e))];
    worst = Math.min(worst, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05));
  }
  return worst;
})()
"""


def tables(page: str) -> dict[str, dict[int, list[str]]]:
    """Return the tables of values below the charts: identifier -> step -> values."""
    found = {}
    for identifier, figure in re.findall(r'<figure id="([\w-]+)"(.*?)</figure>', page, re.DOTALL):
        rows = re.findall(r'<tr><th scope="row">(\d+)</th>(.*?)</tr>', figure)
        found[identifier] = {int(step): re.findall(r"<td>([^<]*)</td>", cells) for step, cells in rows}
    return found


def test_the_numbers_on_the_page_are_those_of_metrics_csv(tmp_path):
    rows = {row.step: row for row in write_metrics(tmp_path)}
    page = report_page(read_record(tmp_path))
    found = tables(page)
    for identifier, column, name in (("loss", 0, "loss"), ("rate", 0, "learning_rate"), ("norm", 0, "gradient_norm")):
        assert len(found[identifier]) == 25
        for step, values in found[identifier].items():
            assert float(values[column]) == pytest.approx(getattr(rows[step], name), rel=1e-5)
    data = json.loads(re.search(r'<figure id="loss".*?json">(.*?)</script>', page, re.DOTALL)[1])["series"][0]
    assert data["x"] == list(rows) and data["y"] == pytest.approx([row.loss for row in rows.values()], rel=1e-5)


def test_settings_that_differ_from_the_defaults_come_first(tmp_path):
    page = report_page(read_record(write_run(tmp_path / "run", lora_rank=16, max_steps=120)))
    changed, others = re.search(r'<section id="settings".*?</section>', page, re.DOTALL)[0].split("<details>")
    rows = re.findall(r'<th scope="row">(\w+)</th><td>([^<]*)</td><td>([^<]*)</td>', changed)
    assert ("lora_rank", "16", "4") in rows and ("max_steps", "120", "not set") in rows
    assert {name for name, *_ in rows} == {"lora_rank", "max_steps", "output_path", "use_lora"}
    assert '<th scope="row">seed</th><td>42</td>' in others and "lora_rank" not in others


@pytest.mark.parametrize(
    ("missing", "section"),
    [("validation.csv", "validation"), ("samples", "samples"), ("metrics.csv", "training"), ("run.json", "data"),
     ("train_args.yaml", "settings")],
)  # fmt: skip
def test_what_a_run_did_not_write_is_left_out(tmp_path, missing, section):
    folder = write_run(tmp_path / "run")
    assert f'<section id="{section}"' in report_page(read_record(folder))
    os.rename(folder / missing, tmp_path / "away")
    assert f'<section id="{section}"' not in report_page(read_record(folder))


def test_the_page_names_no_path_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = write_run(tmp_path / "run", data_path=str(tmp_path / "home" / "cats"))
    (folder / "validation.csv").unlink()
    (folder / "validation.csv").mkdir()  # an error that names the file
    page = report_page(read_record(folder))
    assert str(tmp_path) not in page and "validation.csv" in page and "~/cats" in page


def hostile_run(folder):
    write_run(folder, prompts=(HOSTILE, "a cat"), instance_prompt=HOSTILE, data_path=HOSTILE)
    settings = yaml.safe_load((folder / "train_args.yaml").read_text())
    (folder / "train_args.yaml").write_text(yaml.safe_dump({**settings, HOSTILE: {HOSTILE: [HOSTILE]}}))
    facts = json.loads((folder / "run.json").read_text())
    facts["sessions"][0].update(error=HOSTILE, ended="failed", began=HOSTILE)
    facts["model"][HOSTILE], facts["data"]["layouts"] = HOSTILE, [HOSTILE]
    (folder / "run.json").write_text(json.dumps(facts))
    return folder


def test_hostile_texts_are_shown_and_nothing_else(tmp_path):
    page = report_page(read_record(hostile_run(tmp_path / "<script>alert(3)<")))
    assert page.count("<script") == page.count('<script type="application/json"') + 1
    assert "http://" not in page.replace("http://example.com/x onerror", "")
    assert not re.search(r"<[^>]*\bonerror", re.sub(r'"[^"]*"', '""', page)) and "\u202e" not in page
    assert page.count("&lt;/script&gt;&lt;script&gt;document.title=") > 8


# ---- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture
def opened(page, tmp_path):
    """Opens the report of a run, and checks that it reports no error and loads nothing but itself."""

    def open_report(folder, **window):
        path = tmp_path / "report.html"
        write_report(folder, path)
        page.errors.clear()
        page.requests.clear()
        page.open(path, **window)
        assert page.run("document.querySelectorAll('.plot[role=slider]').length") > 3  # the script has run
        assert page.run("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
        assert page.errors == [] and page.requests == [path.resolve().as_uri()]
        return page

    yield open_report
    assert page.errors == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_its_window_and_its_texts_can_be_read(opened, tmp_path, width, dark):
    page = opened(write_run(tmp_path / "run"), width=width, dark=dark)
    assert page.run("document.documentElement.scrollWidth") <= width
    assert page.run(CONTRAST) >= 4.5
    light = page.run("getComputedStyle(document.body).backgroundColor").startswith("rgb(24")
    assert light is not dark


def test_no_hostile_text_is_run_or_loaded(opened, tmp_path):
    page = opened(hostile_run(tmp_path / "run"))
    assert page.run("document.title") == "Training of run"
    assert page.run("document.querySelectorAll('img:not([src^=\"data:image/\"])').length") == 0
    assert "onerror=alert(1)" in page.run("document.querySelector('.prompt .line').textContent")


def test_the_policy_stops_what_would_get_through(page, tmp_path):
    text = report_page(read_record(write_run(tmp_path / "run")))
    bad = "<script>document.title='run'</script><img src='https://example.com/x.png' onerror=\"document.title='run'\">"
    (tmp_path / "bad.html").write_text(text.replace("</main>", bad + "</main>"), encoding="utf-8")
    page.open(tmp_path / "bad.html")
    assert page.run("document.title") == "Training of run" and any("Security Policy" in error for error in page.errors)


def test_the_mouse_shows_the_values_of_a_step(opened, tmp_path):
    page = opened(write_run(tmp_path / "run"))
    x, y, width = page.run("(b => [b.x, b.y + 20, b.width])(document.querySelector('.plot').getBoundingClientRect())")
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    for part, step in ((0.001, 1), (30 / 119, 31), (0.999, 120)):
        page.move_to(x + part * width, y)
        assert page.run("document.querySelector('.legend .step').textContent") == f"step {step}"
        shown = float(page.run("document.querySelector('.legend .value').textContent"))
        assert shown == pytest.approx(float(rows[step].split(",")[1]), rel=1e-4)


def test_the_keyboard_reaches_the_plots_and_moves_along_their_steps(opened, tmp_path):
    page = opened(write_run(tmp_path / "run"))
    page.press("Tab")
    assert page.run("document.activeElement.className") == "skip"
    page.press("Tab")
    value = "document.activeElement.getAttribute('aria-valuetext')"
    assert page.run(value).startswith("step 120: each step 0.")
    for key, step in (("ArrowLeft", 119), ("Home", 1), ("ArrowLeft", 1), ("ArrowRight", 2), ("End", 120)):
        page.press(key)
        assert page.run(value).startswith(f"step {step}: "), key


def test_everything_has_a_name_for_a_screen_reader(opened, tmp_path):
    page = opened(write_run(tmp_path / "run"))
    assert page.run(UNNAMED) == []
    assert page.run("document.querySelector('.strip img').alt") == "a red apple, before training"
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    sliders = [node["name"]["value"] for node in nodes if node.get("role", {}).get("value") == "slider"]
    assert "Loss by step: step" in sliders
    headings = page.run("[...document.querySelectorAll('h1,h2,h3,h4')].map((e) => Number(e.tagName[1]))")
    assert headings[0] == 1 and all(after - before <= 2 for before, after in zip(headings, headings[1:]))
    identifiers = page.run("[...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(set(identifiers)) == len(identifiers)


def test_the_parts_of_the_page_name_no_address():
    assert not re.search(r"https?:|//\w|url\(|@import", _part("page.css"))
    assert not re.search(r"https?:|fetch|XMLHttp|import\(|innerHTML", _part("page.js"))
