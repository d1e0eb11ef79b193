"""The length of a run in steps, and when it saves."""

from __future__ import annotations

import pytest

from ldm.settings.train import TrainSettings
from ldm.training.plan import completes_interval, make_plan


def saves(plan):
    return [step for step in range(1, plan.steps + 1) if plan.is_save_step(step)]


@pytest.mark.parametrize(
    ("settings", "batches", "steps", "saved"),
    [
        (dict(epochs=3), 4, 12, [4, 8, 12]),
        (dict(epochs=3, ckpt_save_interval=2), 4, 12, [8, 12]),
        (dict(epochs=3, max_steps=5), 4, 5, [4, 5]),
        (dict(max_steps=7, step_mode=True, ckpt_save_interval=3), 4, 7, [3, 6, 7]),
        (dict(epochs=2, gradient_accumulation_steps=2), 5, 5, [3, 5]),  # an epoch is two and a half steps
        (dict(epochs=1, gradient_accumulation_steps=4), 2, 1, [1]),
        (dict(max_steps=3, gradient_accumulation_steps=4), 2, 3, [1, 2, 3]),
    ],
)
def test_length_and_saves(settings, batches, steps, saved):
    plan = make_plan(TrainSettings(**settings), batches)
    assert plan.steps == steps
    assert saves(plan) == saved


@pytest.mark.parametrize(
    ("every", "steps"),
    [(4, [4, 8, 12]), (2.5, [3, 5, 8, 10]), (1, list(range(1, 13))), (0.5, list(range(1, 13))), (20, []),
     (1.1, [2, 3, 4, 5, 6, 7, 8, 9, 10, 11])],
)  # fmt: skip
def test_an_interval_need_not_be_a_whole_number_of_steps(every, steps):
    assert [step for step in range(1, 13) if completes_interval(step, every)] == steps


def test_the_decay_fills_the_run_unless_it_is_given():
    assert make_plan(TrainSettings(max_steps=100, warmup_steps=10), 5).decay_steps == 90
    assert make_plan(TrainSettings(max_steps=100, decay_steps=20), 5).decay_steps == 20
    assert make_plan(TrainSettings(max_steps=5, warmup_steps=10), 5).decay_steps == 1


def test_a_warm_up_below_one_is_a_share_of_all_steps():
    plan = make_plan(TrainSettings(max_steps=200, warmup_steps=0.1), 5)
    assert (plan.warmup_steps, plan.decay_steps) == (20, 180)
    assert make_plan(TrainSettings(max_steps=200, warmup_steps=1), 5).warmup_steps == 1
    assert make_plan(TrainSettings(max_steps=5, warmup_steps=0.1), 5).warmup_steps == 0
