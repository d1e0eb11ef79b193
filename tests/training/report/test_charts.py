"""Curves: where their points are, which are left out, and round numbers at the axes."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from ldm.training.report.charts import MOST_POINTS, MOST_ROWS, Chart, Series, draw, number, step_ticks, value_ticks


def chart(x, y, **options) -> str:
    series = Series("loss", np.asarray(x, float), np.asarray(y, float), faint=options.pop("faint", False))
    return draw(Chart("Loss", "A curve.", [series], **options), "loss")


def path_of(markup: str) -> list[tuple[float, float]]:
    return [
        (float(x), float(y))
        for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", re.search(r'<path d="([^"]*)"', markup)[1])
    ]


def data_of(markup: str) -> dict:
    return json.loads(re.search(r'<script type="application/json">(.*?)</script>', markup)[1])


def test_points_are_where_the_axes_of_the_plot_say():
    markup = chart([0, 50, 100], [1.0, 3.0, 2.0])
    data = data_of(markup)
    assert len(path_of(markup)) == 3
    for (x, y), step, value in zip(path_of(markup), [0, 50, 100], [1.0, 3.0, 2.0]):
        assert x / 1000 * (data["last"] - data["first"]) + data["first"] == pytest.approx(step, abs=0.01)
        assert data["high"] - y / 1000 * (data["high"] - data["low"]) == pytest.approx(value, abs=0.001)


def test_on_a_log_scale_equal_factors_have_equal_distances():
    points = path_of(chart([1, 2, 3], [0.01, 1.0, 100.0], log=True))
    assert points[0][1] - points[1][1] == pytest.approx(points[1][1] - points[2][1], abs=0.2)


def test_values_that_are_not_finite_leave_gaps():
    markup = chart([1, 2, 3, 4, 5], [1.0, 2.0, np.nan, np.inf, 2.0])
    assert len(path_of(markup)) == 3 and re.search(r'<path d="([^"]*)"', markup)[1].count("M") == 2
    assert data_of(markup)["series"][0]["y"] == [1.0, 2.0, None, None, 2.0]
    assert chart([1, 2], [np.nan, np.inf]) == ""


def test_a_long_run_keeps_its_peaks_and_a_bounded_number_of_points():
    y = np.full(100_000, 0.5)
    y[[77, 50_001, 99_998]] = [3.0, 4.0, 0.0]
    data = data_of(chart(np.arange(1, 100_001), y, faint=True))["series"][0]
    assert len(data["x"]) <= MOST_POINTS + 2 and {3.0, 4.0, 0.0} <= set(data["y"])
    assert data["x"][0] == 1 and data["x"][-1] == 100_000
    data = data_of(chart(np.arange(1, 100_001), y))["series"][0]
    assert len(data["x"]) <= MOST_POINTS + 1 and data["x"][-1] == 100_000


def test_the_table_holds_the_first_the_last_and_steps_between():
    markup = chart(np.arange(1, 1001), np.arange(1, 1001) / 7)
    rows = re.findall(r'<tr><th scope="row">(\d+)</th><td>([^<]*)</td></tr>', markup)
    assert len(rows) == MOST_ROWS and rows[0][0] == "1" and rows[-1][0] == "1000"
    assert all(float(value) == pytest.approx(int(step) / 7, rel=1e-5) for step, value in rows)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.31, 0.33), (1e-5, 1e-3), (-2, 9), (0, 65536), (0.2, 3.4e38)])
def test_ticks_are_few_round_and_inside(low, high):
    values = [value for value, _ in value_ticks(low, high)]
    assert 2 <= len(values) <= 7 and all(low - 1e-9 * high <= value <= high * (1 + 1e-9) for value in values)
    texts = [text for _, text in value_ticks(low, high)]
    assert len(set(texts)) == len(texts) and max(map(len, texts)) <= 9


@pytest.mark.parametrize(("low", "high"), [(0.02, 7), (1, 65536), (1e-6, 1e6), (0.9, 2.2)])
def test_ticks_of_a_log_scale(low, high):
    ticks = value_ticks(low, high, log=True)
    assert 2 <= len(ticks) <= 7 and all(low <= value <= high for value, _ in ticks)


def test_steps_at_the_axis_are_whole():
    assert step_ticks(1, 500) == [100, 200, 300, 400, 500] and step_ticks(1, 2) == [1, 2]
    assert len(step_ticks(1, 123_456)) <= 7


@pytest.mark.parametrize("y", [[0.0, 0.0], [1e-3, 1e-3], [-5.0, -5.0], [1e30, 1e-30]])
def test_level_and_extreme_curves_are_drawn_inside_the_plot(y):
    points = path_of(chart([1, 2], y))
    assert len(points) == 2 and all(0 <= place <= 1000 for _, place in points)


def test_a_run_of_one_step_has_a_point():
    assert "circle" in chart([1], [0.5]) and data_of(chart([1], [0.5]))["last"] == 2


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.38291, "0.3829"), (1e-5, "1e-5"), (1.0412e-5, "1.041e-5"), (65536, "65,536"), (0, "0"), (12345678, "1.235e7"),
     (3.0, "3"), (float("nan"), "not finite")],
)  # fmt: skip
def test_numbers_have_four_digits(value, text):
    assert number(value) == text
