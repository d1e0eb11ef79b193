"""Randomness depends on seed, stream, step and rank, on nothing else."""

import itertools

import numpy as np

from ldm.data.draws import draws


def first(*arguments):
    return draws(*arguments).integers(2**63)


def test_the_same_arguments_draw_the_same():
    assert (draws(1, "noise", 5).standard_normal(10) == draws(1, "noise", 5).standard_normal(10)).all()


def test_the_published_values_stay():
    # A change of these breaks every resumed run: it has to be meant.
    assert draws(42, "noise", 7, 1).integers(1000, size=5).tolist() == [947, 790, 926, 735, 84]


def test_any_other_argument_draws_something_else():
    seen = [
        first(seed, stream, step, rank)
        for seed, stream, step, rank in itertools.product((0, 1, 11, 2**32), ("noise", "flip"), (0, 1, 11), (0, 1, 11))
    ]
    assert len(set(seen)) == len(seen)


def test_neighbouring_steps_are_independent():
    noise = np.stack([draws(0, "noise", step).standard_normal(4000) for step in range(8)])
    correlation = np.corrcoef(noise) - np.eye(8)
    assert np.abs(correlation).max() < 0.08
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03


def test_numpy_integers_draw_as_pythons_do():
    assert first(np.int64(1), "noise", np.int32(2), np.int64(0)) == first(1, "noise", 2, 0)


def test_numpys_own_state_is_neither_used_nor_moved():
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    value = first(1, "noise", 2)
    assert (np.random.get_state()[1] == before).all()
    np.random.seed(1)
    assert first(1, "noise", 2) == value
