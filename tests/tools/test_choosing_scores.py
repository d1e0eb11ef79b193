"""The scores that choose a checkpoint equal their NumPy forms, and tell candidates apart only where prompts agree."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ldm.metrics.bootstrap import resampled_indices
from tools.eval.choosing.scores import Score, clip_score, image_score, kid, mean_rank

RESAMPLES = 200


def unit(array):
    return array / np.linalg.norm(array, axis=-1, keepdims=True)


def features(*shape, seed=0):
    return unit(np.random.default_rng(seed).normal(0.3, 1.0, shape).astype(np.float32))


def score(values, samples, higher_is_better=True):
    return Score("a", "a", higher_is_better, np.array(values, float), None if samples is None else np.array(samples))


def test_clip_and_image_scores_equal_their_numpy_forms():
    images, prompts, real = features(2, 6, 5), features(6, 5, seed=1), features(9, 5, seed=2)
    indices = resampled_indices(6, RESAMPLES)
    clip = np.maximum((images.astype(float) * prompts).sum(axis=2), 0) * 100
    likeness = (images.astype(float) @ real.T.astype(float)).mean(axis=2) * 100
    for made, of_image in (
        (clip_score(images, prompts, indices), clip),
        (image_score(images, real, indices), likeness),
    ):
        np.testing.assert_allclose(made.values, of_image.mean(axis=1), rtol=1e-6, atol=1e-5)
        for candidate in range(2):
            means = [np.mean([of_image[candidate, i] for i in sample]) for sample in indices]
            np.testing.assert_allclose(made.samples[candidate], means, rtol=1e-6, atol=1e-5)
            assert made.std(candidate) == pytest.approx(np.std(means, ddof=1), rel=1e-6)


def test_the_kid_of_a_bootstrap_sample_leaves_out_the_pairs_of_one_image_with_itself():
    images, real = features(2, 9, 4), features(8, 4, seed=1)
    indices, of_real = resampled_indices(9, 5), resampled_indices(8, 5, seed=1)

    def k(a, b):
        return (float(a.astype(float) @ b.astype(float)) / 4 + 1) ** 3

    def within(x, sample):
        pairs = [k(x[i], x[j]) for i in sample for j in sample if i != j]
        return np.mean(pairs)

    made = kid(images, real, indices, of_real)
    for candidate in range(2):
        for column, (i, j) in enumerate([(range(9), range(8)), *zip(indices, of_real)]):
            cross = np.mean([k(images[candidate][a], real[b]) for a in i for b in j])
            expected = within(images[candidate], i) + within(real, j) - 2 * cross
            value = made.values[candidate] if column == 0 else made.samples[candidate, column - 1]
            assert value == pytest.approx(expected, rel=1e-9)
    assert not made.higher_is_better


def test_a_small_difference_on_every_prompt_is_told_apart_although_the_prompts_differ_much():
    hard = np.random.default_rng(0).normal(30, 10, 24)
    indices = resampled_indices(24, RESAMPLES)
    of_image = np.stack([hard, hard + 0.1])
    made = score(of_image.mean(axis=1), of_image[:, indices].mean(axis=2))
    assert made.std(0) > 1 and made.best == 1 and made.alike(1) == []


def test_differences_that_change_with_the_prompt_are_not_told_apart():
    of_image = np.random.default_rng(0).normal(30, 10, (3, 24))
    of_image[2] -= 40
    made = score(of_image.mean(axis=1), of_image[:, resampled_indices(24, RESAMPLES)].mean(axis=2))
    best = made.best
    assert made.alike(best) == [1 - best]  # and not the third


def test_equal_candidates_are_not_told_apart_and_the_first_is_the_best():
    same = np.ones((3, 24))
    made = score(same.mean(axis=1), same[:, resampled_indices(24, RESAMPLES)].mean(axis=2))
    assert made.best == 0 and made.alike(0) == [1, 2]


def test_a_score_without_images_is_alike_where_it_is_equal():
    made = score([0.3, 0.2, 0.2], None, higher_is_better=False)
    assert made.best == 1 and made.alike(1) == [2] and made.std(1) is None


def test_the_mean_rank_counts_each_score_in_its_direction_and_shares_equal_ranks():
    clip = score([30.0, 20.0, 10.0], [[30, 10], [20, 20], [10, 30]])
    loss = score([0.2, 0.2, 0.1], None, higher_is_better=False)
    made = mean_rank([clip, loss], 2)
    np.testing.assert_allclose(made.values, [(1 + 2.5) / 2, (2 + 2.5) / 2, (3 + 1) / 2])
    np.testing.assert_allclose(made.samples, [[1.75, 2.75], [2.25, 2.25], [2, 1]])
    assert made.best == 0 and not made.higher_is_better


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_a_score_that_is_no_number_is_the_worst(higher_is_better):
    made = score([1.0, np.nan, 2.0], None, higher_is_better)
    assert made.best == (2 if higher_is_better else 0)
    assert mean_rank([made], 1).values.tolist() == ([2.0, 3.0, 1.0] if higher_is_better else [1.0, 3.0, 2.0])


def test_a_clip_score_above_that_of_the_real_images_has_no_better_rank():
    clip = replace(score([30.0, 35.0, 25.0], [[30, 20], [35, 35], [25, 30]]), enough=29.0)
    made = mean_rank([clip], 2)
    np.testing.assert_allclose(made.values, [1.5, 1.5, 3])
    np.testing.assert_allclose(made.samples, [[1.5, 3], [1.5, 1.5], [3, 1.5]])
    assert clip.best == 1  # in its own column, the highest is the best
