"""The learning rate and EMA's decay as functions of the step."""

from __future__ import annotations

import math

import pytest

from ldm.training.schedules import ema_decay_at, learning_rate


def rate(step, scheduler, warmup=0, decay=10, start=1.0, end=0.1, **others):
    return learning_rate(
        step, scheduler=scheduler, start=start, end=end, warmup_steps=warmup, decay_steps=decay, **others
    )  # fmt: skip


def test_constant_stays_at_the_start_rate():
    assert [rate(step, "constant") for step in (0, 5, 1000)] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("scheduler", ["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"])
def test_warm_up_rises_in_equal_steps_to_the_start_rate(scheduler):
    assert [rate(step, scheduler, warmup=4) for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_linear_goes_straight_to_the_end_rate_and_stays():
    assert [rate(step, "linear", warmup=2) for step in (2, 7, 12, 99)] == pytest.approx([1.0, 0.55, 0.1, 0.1])


def test_cosine_is_half_a_cosine():
    assert [rate(step, "cosine") for step in (0, 5, 10, 99)] == pytest.approx([1.0, 0.55, 0.1, 0.1])
    assert rate(2, "cosine") > rate(2, "linear") and rate(8, "cosine") < rate(8, "linear")


def diffusers_rate(step, scheduler, warmup, steps, end, cycles, power):
    """The factors of diffusers' get_scheduler, from their formulas. `steps` includes the warm-up."""
    if step < warmup:
        return step / warmup
    done = (step - warmup) / (steps - warmup)
    if scheduler == "cosine_with_restarts":
        return 0.0 if done >= 1 else max(0.0, 0.5 * (1 + math.cos(math.pi * ((cycles * done) % 1.0))))
    return end if step > steps else (1.0 - end) * (1 - done) ** power + end


@pytest.mark.parametrize("cycles", [1, 2, 3])
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("scheduler", ["cosine_with_restarts", "polynomial"])
def test_schedules_equal_those_of_diffusers(scheduler, power, cycles):
    """Their warm-up begins at 0, at which nothing is trained. Ours is one step ahead of it."""
    end = 0.0 if scheduler == "cosine_with_restarts" else 0.05
    options = dict(cycles=cycles, power=power)
    for step in range(40):
        expected = diffusers_rate(step + (step < 4), scheduler, 4, 34, end, **options)
        assert rate(step, scheduler, warmup=4, decay=30, end=end, **options) == pytest.approx(expected, abs=1e-12)


def test_each_restart_begins_at_the_start_rate():
    rates = [rate(step, "cosine_with_restarts", decay=12, cycles=3) for step in range(13)]
    assert rates[:4] == rates[4:8] == rates[8:12] and rates[0] == 1.0
    assert rates[12] == pytest.approx(0.1)


def test_no_restart_is_a_step_late_by_rounding():
    for cycles in (49, 98, 103):
        assert rate(2, "cosine_with_restarts", decay=2 * cycles, cycles=cycles) == 1.0


def test_one_cycle_is_the_cosine_and_power_one_the_line():
    for step in range(13):
        assert rate(step, "cosine_with_restarts") == pytest.approx(rate(step, "cosine"))
        assert rate(step, "polynomial") == pytest.approx(rate(step, "linear"))


def test_the_decay_of_the_average_rises():
    assert [ema_decay_at(step, 0.99) for step in (0, 8, 10**6)] == pytest.approx([0.1, 0.5, 0.99])
