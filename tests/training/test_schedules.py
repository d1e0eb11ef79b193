"""The learning rate and EMA's decay as functions of the step."""

from __future__ import annotations

import pytest

from ldm.training.schedules import ema_decay_at, learning_rate


def rate(step, scheduler, warmup=0, decay=10, start=1.0, end=0.1):
    return learning_rate(step, scheduler=scheduler, start=start, end=end, warmup_steps=warmup, decay_steps=decay)


def test_constant_stays_at_the_start_rate():
    assert [rate(step, "constant") for step in (0, 5, 1000)] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("scheduler", ["constant", "linear", "cosine"])
def test_warm_up_rises_in_equal_steps_to_the_start_rate(scheduler):
    assert [rate(step, scheduler, warmup=4) for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_linear_goes_straight_to_the_end_rate_and_stays():
    assert [rate(step, "linear", warmup=2) for step in (2, 7, 12, 99)] == pytest.approx([1.0, 0.55, 0.1, 0.1])


def test_cosine_is_half_a_cosine():
    assert [rate(step, "cosine") for step in (0, 5, 10, 99)] == pytest.approx([1.0, 0.55, 0.1, 0.1])
    assert rate(2, "cosine") > rate(2, "linear") and rate(8, "cosine") < rate(8, "linear")


def test_the_decay_of_the_average_rises():
    assert [ema_decay_at(step, 0.99) for step in (0, 8, 10**6)] == pytest.approx([0.1, 0.5, 0.99])
