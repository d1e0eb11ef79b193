"""The page of one run: report.html."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ldm.training.report.charts import number
from ldm.training.report.document import document, section, table, tiles
from ldm.training.report.figures import Figures, figures
from ldm.training.report.markup import Markup, joined, tag
from ldm.training.report.records import RunRecord
from ldm.training.report.sections import (
    loss_chart,
    optimization_charts,
    seconds_chart,
    strips_of_run,
    validation_charts,
)
from ldm.training.report.values import NOT_SET, counted, defaults, duration, shown, size, split_by_default

GENERATOR = "train_text_to_image"
ENDS = {
    "finished": "The run is complete.",
    "interrupted": "The run was interrupted.",
    "failed": "The run ended with an error.",
    "running": "The run was going on when this page was written.",
}


def report_page(record: RunRecord) -> str:
    """Return the page of a run as HTML."""
    found = figures(record)
    head = [
        tag("p", _state(record, found)),
        [tag("p", fault, class_="fault") for fault in record.faults],
        tiles(tiles_of(found)),
    ]
    sections = [
        section("Training loss", loss_chart(record, found), identifier="training"),
        section("Validation loss", validation_charts(record, found), identifier="validation"),
        section("Samples", strips_of_run(record), identifier="samples"),
        section("Rates, gradients and overflows", optimization_charts(record, found), identifier="optimization"),
        section("Settings", _settings(record), identifier="settings"),
        section("Data", data_table(record), identifier="data"),
        section("Time and memory", _time(record, found), identifier="time"),
        section("Model and environment", _environment(record), identifier="environment"),
    ]
    return document(f"Training of {record.name}", head, sections, GENERATOR)


def tiles_of(found: Figures) -> list[tuple[str, str, str]]:
    """Return name, value and note of the figures at the top of a page."""
    entries = [("Steps", f"{found.steps_done:,}", f"of {found.steps:,}" if found.steps is not None else "")]
    if found.loss is not None:
        entries.append(("Training loss", number(found.loss), f"mean of about {found.span} steps"))
    if found.best is not None:
        entries.append(("Best validation loss", number(found.best[1]), f"at step {found.best[0]:,}"))
    if found.step_seconds is not None:
        entries.append(("Seconds a step", number(found.step_seconds), "median"))
    if found.seconds is not None:
        entries.append(("Time of all steps", duration(found.seconds), "with compilation"))
    if found.memory is not None:
        entries.append(("Peak memory", size(found.memory), "of the process"))
    if found.device_memory is not None:
        entries.append(("Peak memory", size(found.device_memory), "on the device"))
    if found.overflows:
        entries.append(("Overflows", f"{found.overflows:,}", "steps"))
    return entries


def _state(record: RunRecord, found: Figures) -> str:
    last = record.sessions[-1] if record.sessions else {}
    text = ENDS.get(str(last.get("ended")), "")
    if last.get("error"):
        text = f"{text[:-1]}: {last['error']}"
    written = last.get("written")
    return " ".join(part for part in (text, f"Written {written}." if written else "") if part)


def _settings(record: RunRecord) -> Markup:
    if not record.settings:
        return joined()
    changed, others = split_by_default(record.settings)
    known = defaults()
    rows = [
        (name, shown(record.settings[name]), shown(known[name]) if name in known else "unknown to this version")
        for name in changed
    ]
    rest = table(
        "Settings as by default", ("setting", "value"), [(name, shown(record.settings[name])) for name in others]
    )
    return joined(
        tag("h3", f"{counted(len(changed), 'setting')} other than by default"),
        table("Settings that differ from the defaults", ("setting", "value", "default"), rows),
        tag("details", tag("summary", f"{counted(len(others), 'setting')} as by default"), rest) if others else None,
    )


def data_rows(record: RunRecord) -> list[tuple[str, str]]:
    """Return what is known of the data: name and value."""
    data = record.section("data")
    rows = [
        ("layout", _listed(data.get("layouts"))),
        ("images", _count(data.get("rows"))),
        ("of these class images", _count(data.get("class_images"), zero=False)),
        ("with a mask", _count(data.get("masks"), zero=False)),
        ("held out for the validation loss", _count(data.get("validated"), zero=False)),
        ("subsets", _count(data.get("subsets")) if data.get("subsets") != 1 else ""),
        (
            "images in an epoch, with repeats",
            _count(data.get("samples")) if data.get("samples") != data.get("rows") else "",
        ),
        ("different captions", _count(data.get("captions"))),
        ("empty captions", _count(data.get("empty_captions"))),
        ("captions looked at", _count(data.get("captions_of"))),
        ("content", _text(data["hash"]) if "hash" in data else ""),
    ]
    return [(name, value) for name, value in rows if value]


def data_table(record: RunRecord) -> Markup:
    """Return the data of a run, and its buckets."""
    buckets = record.section("data").get("buckets")
    rows = []
    for bucket in buckets if isinstance(buckets, list) else []:
        if isinstance(bucket, list) and len(bucket) == 3 and all(isinstance(value, int) for value in bucket):
            rows.append((f"{bucket[0]} x {bucket[1]}", f"{bucket[2]:,}"))
    return joined(
        table("Data", (), data_rows(record)),
        tag("h3", "Sizes that images are trained in") if rows else None,
        table("Sizes of images in pixels", ("width x height", "images"), rows),
    )


def _time(record: RunRecord, found: Figures) -> Markup:
    rows = []
    for place, session in enumerate(record.sessions, 1):
        ended = str(session.get("ended", ""))
        rows.append(
            (
                "start" if place == 1 else f"resumed, {place - 1}",
                _text(session.get("began")),
                f"{_count(session.get('first_step'))} to {_count(session.get('last_step'))}",
                _seconds(session.get("first_step_seconds")),
                _seconds(session.get("seconds")),
                _bytes(session.get("peak_memory")),
                "going on" if ended == "running" else ended,
            )
        )
    header = ("", "began", "steps", "first step, which compiles", "in all", "peak memory", "end")
    summary = ""
    if found.compile_seconds is not None and found.step_seconds is not None:
        summary = (
            f"A step takes {duration(found.step_seconds)} in the median. First steps took "
            f"{duration(found.compile_seconds)} more, to compile the step's graph and to encode the first images."
        )
    return joined(
        tag("p", summary, class_="note") if summary else None,
        table("Starts of the run", header, rows, "rows"),
        seconds_chart(record, found),
    )


def environment_rows(record: RunRecord) -> list[tuple[str, str]]:
    """Return what is known of the model and the environment: name and value."""
    rows = []
    for part in ("model", "environment"):
        for name, value in record.section(part).items():
            text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else _text(value)
            rows.append((name.replace("_", " "), text))
    return rows


def _environment(record: RunRecord) -> Markup:
    return table("Model and environment", (), environment_rows(record))


def _count(value: Any, zero: bool = True) -> str:
    if isinstance(value, bool) or not isinstance(value, int) or not (value or zero):
        return ""
    return f"{value:,}"


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else ""


def _text(value: Any) -> str:
    return NOT_SET if value is None else shown(value)


def _seconds(value: Any) -> str:
    return duration(value) if isinstance(value, (int, float)) and value == value else ""


def _bytes(value: Any) -> str:
    return size(value) if isinstance(value, (int, float)) and value == value else ""


def names_of_rows(rows: Sequence[Sequence[tuple[str, str]]]) -> list[str]:
    """Return the first cells of several lists of rows, each once, in their order."""
    return list(dict.fromkeys(name for each in rows for name, _ in each))
