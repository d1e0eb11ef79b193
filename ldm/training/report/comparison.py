"""The page that compares several runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ldm.training.report.charts import COLORS, number
from ldm.training.report.document import document, section, table
from ldm.training.report.figures import Figures, figures
from ldm.training.report.markup import Markup, joined, tag
from ldm.training.report.page import data_rows, environment_rows, names_of_rows
from ldm.training.report.records import RunRecord
from ldm.training.report.sections import compared_charts, compared_strips
from ldm.training.report.values import counted, defaults, duration, equal, shown, size

GENERATOR = "compare_runs"
MOST_RUNS = 2 * COLORS  # further ones could not be told apart
# Settings of a single start, or that name the run itself.
OF_THE_START = ("output_path", "resume", "train_config", "log_level", "report_to")


def comparison_page(records: Sequence[RunRecord]) -> str:
    """Return the page that compares these runs: what differs first, then curves over each other, and samples."""
    names = run_names([record.folder for record in records])
    found = [figures(record) for record in records]
    loss, validation, optimizer = compared_charts(records, names)
    differing, same = _settings(records, names)
    other, facts = _facts(records, names)
    faults = [
        tag("p", f"{name}: {fault}", class_="fault") for name, record in zip(names, records) for fault in record.faults
    ]
    sections = [
        section("Settings that differ", differing, identifier="settings"),
        section("Results", _results(found, names), identifier="results"),
        section("Training loss", loss, identifier="training"),
        section("Validation loss", validation, identifier="validation"),
        section("Samples", compared_strips(records, names), identifier="samples"),
        section("Rates, gradients and loss scale", optimizer, identifier="optimization"),
        section("Data, model and environment", other, identifier="facts"),
        section("What is the same", same, facts, identifier="same"),
    ]
    head = [tag("p", f"{counted(len(records), 'run')}: {', '.join(names)}"), faults]
    return document("Comparison of runs", head, sections, GENERATOR)


def run_names(folders: Sequence[Path]) -> list[str]:
    """Return a name for each run: as many of the last parts of its path as tell it from all others."""
    parts = [Path(os.path.normpath(folder)).parts for folder in folders]
    if len(set(parts)) < len(parts):  # a folder is given twice
        return [f"{'/'.join(part[-1:])} ({place})" for place, part in enumerate(parts, 1)]
    most = max(map(len, parts))
    for count in range(1, most + 1):
        names = ["/".join(part[-count:]).replace("//", "/") for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _settings(records: Sequence[RunRecord], names: Sequence[str]) -> tuple[Markup, Markup]:
    """Return the settings that differ between the runs, and those that do not."""
    known = defaults()
    order = list(dict.fromkeys([*known, *(name for record in records for name in record.settings)]))
    differing, same = [], []
    with_settings = [record for record in records if record.settings]
    if not with_settings:
        return joined(), joined()
    for name in order:
        if name in OF_THE_START or not any(name in record.settings for record in records):
            continue
        values = [record.settings.get(name, known.get(name)) for record in records]
        if all(equal(value, values[0]) for value in values):
            same.append((name, shown(values[0]), shown(known.get(name))))
        else:
            differing.append(
                (name, *(shown(value) if record.settings else "" for record, value in zip(records, values)))
            )
    header = ("setting", *names)
    first = table("Settings that differ", header, differing) or tag(
        "p", "The runs have the same settings.", class_="note"
    )
    changed = [row for row in same if row[1] != row[2]]
    usual = [row[:2] for row in same if row[1] == row[2]]
    rest = joined(
        tag("h3", "Settings other than by default") if changed else None,
        table("Same settings, other than by default", ("setting", "value", "default"), changed),
        tag(
            "details", tag("summary", f"{counted(len(usual), 'setting')} as by default"),
            table("Same settings, as by default", ("setting", "value"), usual),
        ) if usual else None,
    )  # fmt: skip
    return first, rest


def _results(found: Sequence[Figures], names: Sequence[str]) -> Markup:
    def known(value: float | None, text: str) -> str:
        return "–" if value is None else text

    def best(each: Figures) -> str:
        return "–" if each.best is None else f"{number(each.best[1])} at step {each.best[0]:,}"

    def steps(each: Figures) -> str:
        return f"{each.steps_done:,}" + ("" if each.steps is None else f" of {each.steps:,}")

    rows = [
        ("steps", *map(steps, found)),
        ("training loss, mean at the end", *(known(each.loss, number(each.loss or 0)) for each in found)),
        ("best validation loss", *map(best, found)),
        ("validation loss at the end",
         *(known(each.last_validation, number(each.last_validation or 0)) for each in found)),
        ("seconds a step, median", *(known(each.step_seconds, number(each.step_seconds or 0)) for each in found)),
        ("time of all steps", *(known(each.seconds, duration(each.seconds or 0)) for each in found)),
        ("compilation", *(known(each.compile_seconds, duration(each.compile_seconds or 0)) for each in found)),
        ("peak memory of the process", *(known(each.memory, size(each.memory or 0)) for each in found)),
        ("peak memory on the device", *(known(each.device_memory, size(each.device_memory or 0)) for each in found)),
        ("steps that overflowed", *(f"{each.overflows:,}" for each in found)),
    ]  # fmt: skip
    rows = [row for row in rows if any(cell != "–" for cell in row[1:])]
    return table("Results", ("", *names), rows, "rows")


def _facts(records: Sequence[RunRecord], names: Sequence[str]) -> tuple[Markup, Markup]:
    """Return the facts on data, model and environment that differ, and those that do not."""
    lists = [data_rows(record) + environment_rows(record) for record in records]
    differing, same = [], []
    for name in names_of_rows(lists):
        values = [dict(rows).get(name, "–") for rows in lists]
        if len(set(values)) == 1:
            same.append((name, values[0]))
        else:
            differing.append((name, *values))
    first = table("What differs of data, model and environment", ("", *names), differing)
    rest = tag(
        "details", tag("summary", "Data, model and environment"), table("What is the same", (), same)
    ) if same else joined()  # fmt: skip
    return first, rest
