"""CLIP scores of features, and how images find their prompts."""

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.metrics.bootstrap import bootstrap, bootstrap_std
from ldm.metrics.clip_score import clip_scores, mean_of_all_pairs, paired_prompts


def test_it_is_a_hundred_cosines_whatever_the_length():
    a, b = np.array([[3.0, 0.0], [1.0, 1.0]]), np.array([[7.0, 0.0], [5.0, 0.0]])
    np.testing.assert_allclose(clip_scores(a, b), [100, 100 / np.sqrt(2)])


def test_each_pair_is_clamped_before_the_mean():
    scores = clip_scores(np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([[-1.0, 0.0], [1.0, 0.0]]))
    assert scores.tolist() == [0.0, 100.0]


def test_a_feature_of_zeros_scores_zero():
    assert clip_scores(np.zeros((1, 4)), np.ones((1, 4))).tolist() == [0.0]


def test_all_pairs_are_those_of_every_image_with_every_other():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(5, 8)), rng.normal(size=(3, 8))
    pairs = [100 * x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x in a for y in b]
    assert mean_of_all_pairs(a, b) == pytest.approx(np.mean(pairs))


def test_k_images_a_prompt_are_paired_in_order():
    assert paired_prompts(["a", "b"], 6) == ["a", "a", "a", "b", "b", "b"]
    assert paired_prompts(["a", "b"], 2) == ["a", "b"]


@pytest.mark.parametrize("prompts, images", [(["a", "b"], 3), (["a"] * 4, 2), ([], 3)])
def test_counts_that_do_not_divide_are_refused(prompts, images):
    with pytest.raises(UserError, match="prompts"):
        paired_prompts(prompts, images)


def test_the_bootstrap_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(0).normal(5, 2, 400)
    assert bootstrap_std(lambda i: values[i].mean(), 400, 1000) == pytest.approx(2 / 20, rel=0.15)


def test_paired_scores_stay_paired():
    values = np.random.default_rng(0).normal(5, 2, 50)
    first, second = (bootstrap(lambda i, s=s: (values + s)[i].mean(), 50) for s in (0, 1))
    assert len(first) == 200
    np.testing.assert_allclose(second - first, 1.0)
    assert not np.allclose(first, bootstrap(lambda i: values[i].mean(), 50, seed=1))
