"""Reading what a run wrote: damaged rows, missing files, what is best."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ldm.training.report.figures import figures
from ldm.training.report.page import report_page
from ldm.training.report.records import (
    overflows,
    read_metrics,
    read_record,
    read_strips,
    read_validation,
    smoothed,
    smoothing_span,
)
from tests.training.report.runs import write_metrics, write_run, write_samples, write_validation

HEADER = "step,loss,learning_rate,loss_scale,seconds,gradient_norm\n"


def test_metrics_are_read_as_they_were_written(tmp_path):
    rows = write_metrics(tmp_path)
    found = read_metrics(tmp_path / "metrics.csv")
    for name in rows[0]._fields:
        assert found[name] == pytest.approx([getattr(row, name) for row in rows], rel=1e-9)


@pytest.mark.parametrize(
    "damaged",
    [
        "3,0.4,1e-3,1,0.5",  # cut off by a kill
        "3,0.4,1e-3,1,0.5,",
        "3,0.4,1e-3,1,0.5,0.2,9",
        "-3,0.4,1e-3,1,0.5,0.2",
        "x,0.4,1e-3,1,0.5,0.2",
        "3.5,0.4,1e-3,1,0.5,0.2",
        "99999999999999,0.4,1e-3,1,0.5,0.2",
        "²,0.4,1e-3,1,0.5,0.2",
        "3,<b>,1e-3,1,0.5,0.2",
        "\0\0\0\0\0\0\0\0",
        '"3,0.4',
    ],
)
def test_a_damaged_row_is_passed_over(tmp_path, damaged):
    good = "1,0.5,1e-3,1,9,0.2\n2,0.4,1e-3,1,0.5,0.2\n"
    for text in (HEADER + good + damaged, HEADER + damaged + "\n" + good):
        (tmp_path / "metrics.csv").write_text(text, encoding="utf-8")
        found = read_metrics(tmp_path / "metrics.csv")
        assert found["step"].tolist() == [1, 2] and found["loss"].tolist() == [0.5, 0.4]


def test_random_damage_never_stops_the_report(tmp_path):
    write_run(tmp_path / "run")
    random = np.random.default_rng(1)
    names = ("metrics.csv", "validation.csv", "train_args.yaml", "run.json", "samples/prompts.txt",
             "samples/prompt-01/step-00000040.png")  # fmt: skip
    whole = {name: (tmp_path / "run" / name).read_bytes() for name in names}
    for _ in range(30):
        for name, content in whole.items():
            damaged = bytearray(content[: random.integers(0, len(content) + 1)])
            for place in random.integers(0, max(1, len(damaged)), 5):
                damaged[place : place + 1] = bytes([random.integers(0, 256)])
            (tmp_path / "run" / name).write_bytes(damaged)
        assert report_page(read_record(tmp_path / "run")).startswith("<!DOCTYPE html>")


@pytest.mark.parametrize("header", ["", "\n", "a,b\n1,2\n", "step\n1\n2\n", HEADER])
def test_a_table_without_rows_or_columns_leaves_its_part_empty(tmp_path, header):
    for name in ("metrics.csv", "validation.csv"):
        (tmp_path / name).write_text(header)
    assert "Loss by step" not in report_page(read_record(tmp_path))


@pytest.mark.parametrize(
    "facts",
    ['[]', '{"sessions": 3, "data": [], "run": {"steps": "many"}}',
     '{"sessions": [1, {"first_step": [], "seconds": {}, "peak_memory": "x", "ended": {}}], "run": {"steps": true}}',
     '{"data": {"layouts": 5, "rows": -1, "buckets": [[1], [1, 2, "x"], 7]}, "model": {"x": {"y": [null]}}}',
     '{"run": {"steps": 1e400}, "sessions": [{"seconds": NaN, "first_step_seconds": NaN}]}'],
)  # fmt: skip
def test_nonsense_in_run_json_is_no_error(tmp_path, facts):
    write_run(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(facts)
    assert "Loss by step" in report_page(read_record(tmp_path / "run"))


def test_the_rows_of_a_step_that_was_trained_twice_count_once(tmp_path):
    (tmp_path / "metrics.csv").write_text(HEADER + "1,0.5,1,1,1,1\n2,0.4,1,1,1,1\n2,0.3,1,1,1,1\n")
    assert read_metrics(tmp_path / "metrics.csv")["loss"].tolist() == [0.5, 0.3]


def test_the_mean_weighs_each_step_back_by_the_same_factor_and_skips_overflows():
    values = np.array([1.0, 3.0, np.nan, np.inf, 5.0])
    weights = 0.98 ** np.arange(5)[::-1]
    expected = (weights[[0, 1, 4]] * values[[0, 1, 4]]).sum() / weights[[0, 1, 4]].sum()
    # Steps without a value do not age the others.
    aged = (0.98**2 * 1 + 0.98 * 3 + 5) / (0.98**2 + 0.98 + 1)
    assert smoothed(values, 50)[-1] == pytest.approx(aged) and aged != expected
    assert np.isnan(smoothed(np.array([np.nan, 1.0]), 50)).tolist() == [True, False]
    assert (smoothing_span(12), smoothing_span(2000), smoothing_span(100_000)) == (50, 50, 2500)


def test_overflows_are_seen_by_the_norm_and_by_the_scale(tmp_path):
    write_metrics(tmp_path, overflows=(3, 4, 90))
    assert np.flatnonzero(overflows(read_metrics(tmp_path / "metrics.csv"))).tolist() == [2, 3, 89]
    # A number that saturates leaves the norm finite.
    saturated = {"step": np.arange(4), "gradient_norm": np.ones(4), "loss_scale": np.array([8.0, 8.0, 4.0, 8.0])}
    assert overflows(saturated).tolist() == [False, True, False, False]


def test_validation_is_read_by_images_and_time_step(tmp_path):
    write_validation(tmp_path)
    found = read_validation(tmp_path / "validation.csv")
    assert set(found) == {"validation", "training"} and set(found["validation"].by_timestep) == {200, 800}
    assert found["validation"].steps.tolist() == [0, 40, 80, 120]
    mean = np.mean([*found["training"].by_timestep.values()], axis=0)
    assert found["training"].mean == pytest.approx(mean)


def test_the_best_step_is_that_of_best_json_else_the_least_loss(tmp_path):
    write_run(tmp_path / "run")
    assert read_record(tmp_path / "run").best[0] == 80
    (tmp_path / "run" / "ckpt").mkdir()
    (tmp_path / "run" / "ckpt" / "best.json").write_text(json.dumps({"step": 40, "loss": 0.5}))
    assert read_record(tmp_path / "run").best == (40, 0.5)


def test_samples_are_sorted_by_step_and_named_by_their_prompt(tmp_path):
    """prompts.txt is the run's own, a line for each folder: neither a # nor an empty prompt is passed over."""
    prompts = ("#1 girl", "a cat --d 3", "", "a dog")
    write_samples(tmp_path, prompts)
    for name in ("notes.txt", "step-20.png", "step-0000000000020.png"):
        (tmp_path / "samples" / "prompt-01" / name).write_text("x")
    strips = read_strips(tmp_path / "samples")
    assert tuple(strip.prompt for strip in strips) == prompts
    assert [frame.step for frame in strips[0].frames] == [0, 40, 80, 120]


@pytest.mark.parametrize("parts", [[], ["validation"], ["samples"]])
def test_only_what_run_json_names_is_of_the_run(tmp_path, parts):
    write_run(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"parts": parts}))
    record = read_record(tmp_path)
    assert bool(record.validation) == (record.best is not None) == ("validation" in parts)
    assert bool(record.strips) == ("samples" in parts)


def test_figures_leave_compilation_out_of_the_seconds_of_a_step(tmp_path):
    found = figures(read_record(write_run(tmp_path / "run")))
    assert found.step_seconds == 0.5 and found.compile_seconds == 8.5 and found.seconds == pytest.approx(68.5)
    assert (found.steps_done, found.steps, found.memory, found.best[0]) == (120, 120, 2.3e9, 80)


def test_a_folder_without_anything_still_gives_a_page(tmp_path):
    assert report_page(read_record(tmp_path)).startswith("<!DOCTYPE html>")
