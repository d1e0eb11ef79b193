"""Random draws depend only on seed, stream, step and process."""

import itertools

import numpy as np
import pytest

from ldm.data.draws import augmentation_draws, draws, micro_batch_draws


def first_draw(*arguments):
    return draws(*arguments).integers(2**63)


def test_the_same_arguments_draw_the_same():
    assert (draws(1, "noise", 5).standard_normal(10) == draws(1, "noise", 5).standard_normal(10)).all()


def test_the_published_values_stay():
    # A change of these values breaks the resuming of every run.
    assert draws(42, "noise", 7, 1).integers(1000, size=5).tolist() == [947, 790, 926, 735, 84]


def test_any_other_argument_draws_something_else():
    seen = [
        first_draw(seed, stream, step, process_index)
        for seed, stream, step, process_index in itertools.product(
            (0, 1, 11, 2**32), ("noise", "flip"), (0, 1, 11), (0, 1, 11)
        )
    ]
    assert len(set(seen)) == len(seen)


def test_neighbouring_steps_are_independent():
    noise = np.stack([draws(0, "noise", step).standard_normal(4000) for step in range(8)])
    correlation = np.corrcoef(noise) - np.eye(8)
    assert np.abs(correlation).max() < 0.08
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03


def test_numpy_integers_draw_as_pythons_do():
    assert first_draw(np.int64(1), "noise", np.int32(2), np.int64(0)) == first_draw(1, "noise", 2, 0)


def test_numpys_own_state_is_neither_used_nor_moved():
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    value = first_draw(1, "noise", 2)
    assert (np.random.get_state()[1] == before).all()
    np.random.seed(1)
    assert first_draw(1, "noise", 2) == value


def test_each_draw_of_a_micro_batch_has_its_own_stream():
    drawn = micro_batch_draws(3, 8, (2, 4, 3, 3), 1000, 0.5, process_index=1)
    assert (drawn.posterior == draws(3, "posterior", 8, 1).standard_normal((2, 4, 3, 3), dtype=np.float32)).all()
    assert (drawn.noise == draws(3, "noise", 8, 1).standard_normal((2, 4, 3, 3), dtype=np.float32)).all()
    assert drawn.timesteps.tolist() == draws(3, "timesteps", 8, 1).integers(0, 1000, 2).tolist()
    assert drawn.posterior.dtype == drawn.noise.dtype == np.float32 and drawn.timesteps.dtype == np.int32
    assert (micro_batch_draws(3, 8, (2, 4, 3, 3), 1000, 0.5).noise != drawn.noise).all()


def test_captions_are_dropped_as_often_as_asked():
    shares = [micro_batch_draws(0, step, (50, 1, 1, 1), 10, 0.2).dropped.mean() for step in range(100)]
    assert np.mean(shares) == pytest.approx(0.2, abs=0.03)
    assert not micro_batch_draws(0, 1, (50, 1, 1, 1), 10, 0.0).dropped.any()


def test_every_image_of_a_micro_batch_has_its_own_generator_for_crop_and_flip():
    one_batch, again, next_batch = (augmentation_draws(0, step, 3) for step in (1, 1, 2))
    values = [[rng.integers(2**63) for rng in generators] for generators in (one_batch, again, next_batch)]
    assert values[0] == values[1] and len({*values[0], *values[2]}) == 6
