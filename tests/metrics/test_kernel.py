"""The kernel distance equals its definition, is unbiased, and has a correct standard error."""

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.metrics import kernel
from ldm.metrics.bootstrap import resampled_indices
from ldm.metrics.kernel import FeatureSample, kernel_distance, weighted_kernel_distances


def by_definition(x, y):
    def k(a, b):
        return (a @ b.T / x.shape[1] + 1) ** 3

    n, m = len(x), len(y)
    xx, yy = k(x, x), k(y, y)
    return (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1)) - 2 * k(x, y).mean()


def features(n, d=8, seed=0, shift=0.0):
    return np.random.default_rng(seed).normal(shift, 1, (n, d)).astype(np.float32)


@pytest.mark.parametrize("n, m", [(40, 40), (13, 31), (4, 4)])
def test_it_equals_its_definition(n, m):
    x, y = features(n), features(m, seed=1, shift=0.5)
    assert kernel_distance(x, y)[0] == pytest.approx(by_definition(x.astype(float), y.astype(float)), rel=1e-9)


def test_blocks_of_rows_change_nothing(monkeypatch):
    x, y = features(50), features(45, seed=1)
    whole = kernel_distance(x, y)
    monkeypatch.setattr(kernel, "BLOCK", 7)
    assert kernel_distance(x, y) == pytest.approx(whole, rel=1e-9)


def test_weights_of_zero_and_one_choose_a_part_of_the_images():
    x, y = features(9), features(7, seed=1, shift=0.5)
    chosen = np.zeros((9, 1))
    chosen[[1, 4, 5, 8]] = 1
    (value,) = weighted_kernel_distances(x, y, chosen, np.ones((7, 1)))
    assert value == pytest.approx(by_definition(x[[1, 4, 5, 8]].astype(float), y.astype(float)), rel=1e-9)


def test_bootstrap_samples_scatter_about_the_distance_of_all_images():
    """An image that was drawn twice would make its set look narrower than it is."""
    x, y = features(20), features(20, seed=1)
    weights = [
        np.stack([np.bincount(sample, minlength=20) for sample in resampled_indices(20, 400, seed)], axis=1)
        for seed in (0, 1)
    ]
    values = weighted_kernel_distances(x, y, *weights)
    naive = np.mean(
        [
            by_definition(x[i].astype(float), y[j].astype(float))
            for i, j in zip(resampled_indices(20, 100), resampled_indices(20, 100, 1))
        ]
    )
    error = abs(values.mean() - kernel_distance(x, y)[0])
    assert error < 4 * values.std() / 400**0.5 < abs(naive - kernel_distance(x, y)[0])


def test_two_sets_of_the_same_kind_have_a_distance_of_zero_within_its_std():
    value, std = kernel_distance(features(300), features(300, seed=1))
    assert abs(value) < 4 * std


def test_its_mean_does_not_depend_on_the_number_of_images():
    small = np.mean(
        [kernel_distance(features(20, seed=s), features(20, seed=s + 500, shift=0.5))[0] for s in range(60)]
    )
    large = np.mean(
        [kernel_distance(features(400, seed=s), features(400, seed=s + 500, shift=0.5))[0] for s in range(4)]
    )
    assert small == pytest.approx(large, rel=0.15)


def test_its_std_is_that_of_drawing_the_images_again():
    pairs = [kernel_distance(features(80, seed=s), features(80, seed=s + 500, shift=0.5)) for s in range(60)]
    spread = np.std([value for value, _ in pairs])
    assert np.mean([std for _, std in pairs]) == pytest.approx(spread, rel=0.35)


def test_the_same_seed_gives_the_same_numbers():
    x, y = features(20), features(20, seed=1)
    assert kernel_distance(x, y, seed=3) == kernel_distance(x, y, seed=3)
    assert kernel_distance(x, y, seed=3)[1] != kernel_distance(x, y, seed=4)[1]


def test_three_images_are_too_few():
    with pytest.raises(UserError, match="4 images"):
        kernel_distance(features(3), features(10))


def test_a_sample_is_everything_while_it_fits():
    sample = FeatureSample(max_count=10)
    sample.add(features(4))
    sample.add(features(6, seed=1))
    np.testing.assert_array_equal(sample.features, np.concatenate([features(4), features(6, seed=1)]))


def test_a_sample_does_not_change_with_the_batch_it_was_given():
    """A row alone would keep its whole batch in memory, too."""
    sample, batch = FeatureSample(max_count=4), features(8)
    sample.add(batch)
    held = sample.features
    batch[:] = 0.0
    np.testing.assert_array_equal(sample.features, held)


def test_a_sample_is_bounded_and_uniform():
    counts = np.zeros(50)
    for seed in range(300):
        sample = FeatureSample(max_count=10, seed=seed)
        for start in range(0, 50, 7):
            sample.add(np.arange(start, min(50, start + 7), dtype=np.float32)[:, None])
        assert len(sample.features) == 10
        counts[sample.features[:, 0].astype(int)] += 1
    assert counts.sum() == 3000 and 30 < counts.min() and counts.max() < 95
