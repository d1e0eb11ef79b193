"""Random draws depend only on seed, stream and step, and processes share those of one process."""

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
    assert draws(42, "noise", 7).integers(1000, size=5).tolist() == [561, 106, 120, 819, 236]


def test_any_other_argument_draws_something_else():
    seen = [
        first_draw(seed, stream, step)
        for seed, stream, step in itertools.product((0, 1, 11, 2**32), ("noise", "flip"), (0, 1, 11))
    ]
    assert len(set(seen)) == len(seen)


def test_neighbouring_steps_are_independent():
    noise = np.stack([draws(0, "noise", step).standard_normal(4000) for step in range(8)])
    correlation = np.corrcoef(noise) - np.eye(8)
    assert np.abs(correlation).max() < 0.08
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03


def test_numpy_integers_draw_as_pythons_do():
    assert first_draw(np.int64(1), "noise", np.int32(2)) == first_draw(1, "noise", 2)


def test_numpys_own_state_is_neither_used_nor_moved():
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    value = first_draw(1, "noise", 2)
    assert (np.random.get_state()[1] == before).all()
    np.random.seed(1)
    assert first_draw(1, "noise", 2) == value


def test_each_draw_of_a_micro_batch_has_its_own_stream():
    drawn = micro_batch_draws(3, 8, (2, 4, 3, 3), range(1000), 0.5)
    assert (drawn.posterior == draws(3, "posterior", 8).standard_normal((2, 4, 3, 3), dtype=np.float32)).all()
    assert (drawn.noise == draws(3, "noise", 8).standard_normal((2, 4, 3, 3), dtype=np.float32)).all()
    assert drawn.timesteps.tolist() == draws(3, "timesteps", 8).integers(0, 1000, 2).tolist()
    assert drawn.posterior.dtype == drawn.noise.dtype == np.float32 and drawn.timesteps.dtype == np.int32


def test_time_steps_are_drawn_from_a_range():
    drawn = micro_batch_draws(3, 8, (4000, 1, 1, 1), range(200, 203), 0.0).timesteps
    assert np.unique(drawn).tolist() == [200, 201, 202]


@pytest.mark.parametrize("count", [1, 3])
def test_processes_divide_what_one_process_draws(count):
    whole = micro_batch_draws(3, 8, (4 * count, 4, 3, 3), range(1000), 0.5)
    parts = [micro_batch_draws(3, 8, (count, 4, 3, 3), range(1000), 0.5, process_index) for process_index in range(4)]
    for name, array in whole._asdict().items():
        np.testing.assert_array_equal(np.concatenate([getattr(part, name) for part in parts]), array, err_msg=name)
    generators = [rng for process in range(4) for rng in augmentation_draws(3, 8, count, process)]
    expected = augmentation_draws(3, 8, 4 * count)
    assert [rng.integers(2**63) for rng in generators] == [rng.integers(2**63) for rng in expected]


def test_captions_are_dropped_as_often_as_asked():
    shares = [micro_batch_draws(0, step, (50, 1, 1, 1), range(10), 0.2).dropped.mean() for step in range(100)]
    assert np.mean(shares) == pytest.approx(0.2, abs=0.03)
    assert not micro_batch_draws(0, 1, (50, 1, 1, 1), range(10), 0.0).dropped.any()


def test_every_image_of_a_micro_batch_has_its_own_generator_for_crop_and_flip():
    one_batch, again, next_batch = (augmentation_draws(0, step, 3) for step in (1, 1, 2))
    values = [[rng.integers(2**63) for rng in generators] for generators in (one_batch, again, next_batch)]
    assert values[0] == values[1] and len({*values[0], *values[2]}) == 6
