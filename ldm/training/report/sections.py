"""The sections of pages that show one run or several: curves, validation, samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ldm.training.report.charts import COLORS, Chart, Mark, Series, draw, number
from ldm.training.report.figures import Figures, compiles
from ldm.training.report.markup import Markup, joined, tag
from ldm.training.report.records import RunRecord, Strip, ValidationLoss, overflows, smoothed, smoothing_span
from ldm.training.report.strips import LONGEST_STRIP, all_steps, choose_frames, embed
from ldm.training.report.values import counted

MOST_ROWS_OF_SAMPLES = 8  # steps in the comparison of samples
BEFORE = "before training"


def _metric(record: RunRecord, name: str) -> np.ndarray:
    return record.metrics.get(name, np.full(len(record.steps), np.nan))


# ---- one run ---------------------------------------------------------------------------------------------------------


def loss_chart(record: RunRecord, found: Figures) -> Markup:
    """Return the training loss of each step and its mean."""
    steps, loss = record.steps, _metric(record, "loss")
    if not len(steps) or not np.isfinite(loss).any():
        return joined()
    mean = smoothed(loss, found.span)
    # The first means are of few steps each, and a low one says nothing.
    settled = np.flatnonzero(np.arange(len(mean)) >= min(found.span, len(mean) - 1))
    least = settled[int(np.nanargmin(mean[settled]))] if np.isfinite(mean[settled]).any() else len(mean) - 1
    highest = int(np.argmax(np.where(np.isfinite(loss), loss, -np.inf)))
    summary = (
        f"The mean over about {found.span} steps ends at {number(mean[-1])}; it is lowest at step {steps[least]:,}, "
        f"{number(mean[least])}. The highest loss of a single step is {number(loss[highest])}, at step "
        f"{steps[highest]:,}."
    )
    series = [
        Series("each step", steps, loss, 0, faint=True),
        Series(f"mean of about {found.span} steps", steps, mean, 0),
    ]
    return draw(Chart("Loss by step", summary, series, end=found.steps), "loss")


def validation_charts(record: RunRecord, found: Figures) -> Markup:
    """Return the validation loss in the mean and by time step, beside that of images that are trained."""
    if not record.validation:
        return joined()
    held_out, trained = record.validation.get("validation"), record.validation.get("training")
    marks = [Mark(found.best[0], "best")] if found.best is not None and held_out is not None else []
    named = [(name, losses, color) for name, losses, color in (
        ("held-out images", held_out, 1), ("training images", trained, 0)) if losses is not None]  # fmt: skip
    series = [Series(name, losses.steps, losses.mean, color) for name, losses, color in named]
    parts = [
        draw(
            Chart("Mean over the time steps", _validation_summary(record, found), series, marks=marks),
            "validation-mean",
        )
    ]
    timesteps = sorted({timestep for _, losses, _ in named for timestep in losses.by_timestep})
    small = []
    for timestep in timesteps:
        series = [
            Series(name, losses.steps, losses.by_timestep[timestep], color)
            for name, losses, color in named
            if timestep in losses.by_timestep
        ]
        chart = Chart(f"Time step {timestep}", _change(series[0]), series, small=True)
        small.append(draw(chart, f"validation-{timestep}"))
    if len(timesteps) > 1:
        note = (
            "The loss differs far more between time steps than between checkpoints, so each one has its own scale. "
            "A low time step is an image with little noise, a high one is nearly noise alone."
        )
        parts += [tag("h3", "By time step"), tag("p", note, class_="note"), tag("div", small, class_="charts")]
    return joined(parts)


def _validation_summary(record: RunRecord, found: Figures) -> str:
    held_out, trained = record.validation.get("validation"), record.validation.get("training")
    text = "Both kinds of images have the same time steps and the same noise at every validation. "
    if held_out is None or not len(held_out.mean):
        return text
    if found.best is not None:
        step, least = found.best
        text += f"That of held-out images is lowest at step {step:,}, {number(least)}, and ends at "
        text += f"{number(held_out.mean[-1])}. "
    if trained is not None and len(trained.mean):
        gap = held_out.mean[-1] - trained.mean[-1]
        if np.isfinite(gap):
            text += f"At the end it is {number(abs(gap))} {'above' if gap >= 0 else 'below'} that of training images."
    return text.strip()


def _change(series: Series) -> str:
    finite = series.y[np.isfinite(series.y)]
    return f"From {number(finite[0])} to {number(finite[-1])} ({series.name})." if len(finite) else ""


def optimization_charts(record: RunRecord, found: Figures) -> Markup:
    """Return learning rate, gradient norm, and loss scale with overflows."""
    steps = record.steps
    if not len(steps):
        return joined()
    rate, norm, scale = (_metric(record, name) for name in ("learning_rate", "gradient_norm", "loss_scale"))
    overflowed = steps[overflows(record.metrics)]
    charts = []
    if np.isfinite(rate).any():
        highest = int(np.nanargmax(rate))
        summary = f"Highest {number(rate[highest])}, at step {steps[highest]:,}; {number(rate[-1])} at the end."
        charts.append(
            draw(
                Chart("Learning rate", summary, [Series("learning rate", steps, rate, 2)], small=True, end=found.steps),
                "rate",
            )
        )
    finite = norm[np.isfinite(norm) & (norm > 0)]
    if len(finite):
        median = float(np.median(finite))
        summary = f"Before clipping. Median {number(median)}, largest {number(float(finite.max()))}."
        series = [Series("each step", steps, norm, 3, faint=True), Series("mean", steps, smoothed(norm, found.span), 3)]
        wide = bool(np.percentile(finite, 99) > 20 * np.percentile(finite, 1))
        charts.append(draw(Chart("Gradient norm", summary, series, log=wide, small=True, end=found.steps), "norm"))
    uses_scale = np.isfinite(scale).any() and bool((scale[np.isfinite(scale)] != 1).any())
    if uses_scale or len(overflowed):
        summary = f"{counted(len(overflowed), 'step')} overflowed{_named_steps(overflowed)}."
        marks = [Mark(int(step), "") for step in overflowed[:200]]
        chart = Chart(
            "Loss scale",
            summary,
            [Series("loss scale", steps, scale, 4)],
            log=True,
            marks=marks,
            small=True,
            end=found.steps,
        )
        charts.append(draw(chart, "scale"))
        note = None
    else:
        note = tag("p", "The loss was not scaled, and no step overflowed.", class_="note")
    return joined(tag("div", charts, class_="charts") if charts else None, note)


def _named_steps(steps: np.ndarray) -> str:
    if not len(steps):
        return ""
    names = ", ".join(f"{step:,}" for step in steps[:8].tolist())
    return f": {names}{', ...' if len(steps) > 8 else ''}"


def seconds_chart(record: RunRecord, found: Figures) -> Markup:
    """Return the seconds of each step."""
    steps, seconds = record.steps, _metric(record, "seconds")
    if found.step_seconds is None or len(steps) < 3:
        return joined()
    usual = np.where(compiles(record), np.nan, seconds)
    largest = number(float(np.nanmax(usual)))
    summary = f"Median {number(found.step_seconds)}, largest {largest}, without first steps, which compile."
    series = [Series("each step", steps, usual, 5, faint=True), Series("mean", steps, smoothed(usual, found.span), 5)]
    return draw(Chart("Seconds a step", summary, series, small=True, end=found.steps), "seconds")


def strips_of_run(record: RunRecord) -> Markup:
    """Return the film strips of the sample images, one a prompt."""
    parts = []
    for place, strip in enumerate(record.strips, 1):
        prompt = _prompt(strip)
        images = []
        for frame in choose_frames(strip.frames):
            when = BEFORE if frame.step == 0 else f"step {frame.step:,}"
            image = embed(frame.path)
            if image is not None:
                alt = f"{prompt}, {when}"
                picture = tag("img", src=image.url, width=image.width, height=image.height, alt=alt)
                images.append(tag("li", picture, tag("span", when)))
        if images:
            strip_list = tag(
                "ol",
                images,
                class_="strip",
                tabindex="0",
                role="list",
                aria_label=f"Images of prompt {place}, the oldest first",
            )
        elif strip.whole is not None and (image := embed(strip.whole, LONGEST_STRIP)) is not None:
            alt = f"Film strip of {prompt}, the oldest image at its left"
            picture = tag("img", src=image.url, width=image.width, height=image.height, alt=alt)
            strip_list = tag("div", picture, class_="scroll whole", tabindex="0", role="region", aria_label=alt)
        else:
            continue
        parts.append(tag("div", tag("p", prompt, class_="line"), strip_list, class_="prompt"))
    return joined(parts)


def _prompt(strip: Strip) -> str:
    return strip.prompt or strip.name


# ---- several runs ----------------------------------------------------------------------------------------------------


def compared_charts(records: Sequence[RunRecord], names: Sequence[str]) -> tuple[Markup, Markup, Markup]:
    """Return the curves of several runs over each other: training loss, validation loss, and those of the optimizer."""
    span = smoothing_span(max((len(record.steps) for record in records), default=0))

    def curves(of: str, mean: bool) -> list[Series]:
        found = []
        for color, (record, name) in enumerate(zip(records, names)):
            values = _metric(record, of)
            if len(values) and np.isfinite(values).any():
                found.append(_of_run(color, name, record.steps, smoothed(values, span) if mean else values))
        return found

    series = curves("loss", mean=True)
    loss = (
        draw(Chart(f"Training loss, mean of about {span} steps", _ends(series), series), "loss") if series else joined()
    )
    validation = _compared_validation(records, names)
    charts = []
    for title, of, mean, log in (
        ("Learning rate", "learning_rate", False, False),
        ("Gradient norm, mean", "gradient_norm", True, False),
        ("Loss scale", "loss_scale", False, True),
    ):
        series = curves(of, mean)
        if of == "loss_scale" and all((line.y[np.isfinite(line.y)] == 1).all() for line in series):
            continue
        if series:
            charts.append(draw(Chart(title, _ends(series), series, log=log, small=True), of.replace("_", "-")))
    return loss, validation, tag("div", charts, class_="charts") if charts else joined()


def _of_run(place: int, name: str, x: np.ndarray, y: np.ndarray) -> Series:
    """Return the curve of a run, from 0, whose colour and dashes together no other of 16 runs has."""
    return Series(name, x, y, place, dashed=COLORS // 2 <= place < COLORS + COLORS // 2)


def _compared_validation(records: Sequence[RunRecord], names: Sequence[str]) -> Markup:
    found: list[tuple[str, int, ValidationLoss]] = [
        (name, color, record.validation["validation"])
        for color, (record, name) in enumerate(zip(records, names))
        if "validation" in record.validation
    ]
    if not found:
        return joined()
    series = [_of_run(color, name, losses.steps, losses.mean) for name, color, losses in found]
    parts = [draw(Chart("Held-out images, mean over the time steps", _ends(series), series), "validation-mean")]
    timesteps = sorted(set.union(*(set(losses.by_timestep) for *_, losses in found)))
    small = []
    for timestep in timesteps:
        series = [
            _of_run(color, name, losses.steps, losses.by_timestep[timestep])
            for name, color, losses in found
            if timestep in losses.by_timestep
        ]
        small.append(draw(Chart(f"Time step {timestep}", _ends(series), series, small=True), f"validation-{timestep}"))
    if len(timesteps) > 1:
        parts += [tag("h3", "By time step"), tag("div", small, class_="charts")]
    return joined(parts)


def _ends(series: Sequence[Series]) -> str:
    """Say where each curve ends."""
    ends = [(line.name, line.y[np.isfinite(line.y)]) for line in series]
    return (
        "At the end: " + "; ".join(f"{name} {number(float(values[-1]))}" for name, values in ends if len(values)) + "."
    )


def compared_strips(records: Sequence[RunRecord], names: Sequence[str]) -> Markup:
    """Return the samples of several runs: for each prompt a table with a column for each run, a row for each step."""
    prompts: dict[str, list[tuple[int, Strip]]] = {}
    for column, record in enumerate(records):
        for strip in record.strips:
            if strip.frames:
                prompts.setdefault(_prompt(strip), []).append((column, strip))
    parts = []
    for prompt, strips in prompts.items():
        of_column = dict(strips)
        frames = {column: {frame.step: frame for frame in strip.frames} for column, strip in strips}
        columns = sorted(of_column)
        rows = []
        for step in all_steps(list(of_column.values()), MOST_ROWS_OF_SAMPLES):
            when = BEFORE if step == 0 else f"step {step:,}"
            cells = []
            for column in columns:
                frame = frames[column].get(step)
                image = embed(frame.path) if frame is not None else None
                alt = f"{prompt}, {names[column]}, {when}"
                picture = (
                    "–" if image is None else tag("img", src=image.url, width=image.width, height=image.height, alt=alt)
                )
                cells.append(tag("td", picture))
            rows.append(tag("tr", tag("th", when, scope="row"), cells))
        head = tag("tr", tag("th", "step", scope="col"), [tag("th", names[column], scope="col") for column in columns])
        inner = tag(
            "table", tag("caption", prompt, class_="hidden"), tag("thead", head), tag("tbody", rows), class_="samples"
        )
        box = tag("div", inner, class_="scroll", tabindex="0", role="region", aria_label=f"Samples of: {prompt}")
        parts.append(tag("div", tag("p", prompt, class_="line"), box, class_="prompt"))
    return joined(parts)
