"""Sums of LoRAs are exact whatever their ranks, alphas and weights; what a smaller rank loses is what is said."""

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.lora.algebra import decompose, mix_factors, relative_difference, resize, weighted_sum
from ldm.lora.lora import LoRA
from ldm.lora.strength import Strength
from ldm.lora.updates import LoRALayer

UNET, TEXT = "model.diffusion_model.", "cond_stage_model."
A, B, C = f"{UNET}middle_block.1.x.to_q", f"{UNET}input_blocks.1.0.in_layers.2", f"{TEXT}layers.0.q_proj"
SHAPES = {A: (12, 10), B: (9, 4, 3, 3), C: (8, 8)}


def layer(shape, rank, alpha=None, seed=0):
    random = np.random.default_rng(seed)
    down = random.standard_normal((rank, *shape[1:])).astype(np.float32)
    up = random.standard_normal((shape[0], rank) + (1,) * (len(shape) - 2)).astype(np.float32)
    return LoRALayer(down, up, float(rank if alpha is None else alpha))


def lora(rank, alpha=None, seed=0, names=(A, B, C), **metadata):
    return LoRA({name: layer(SHAPES[name], rank, alpha, seed + i) for i, name in enumerate(names)}, metadata)


def exact(layer):
    """The update in double precision."""
    up, down = layer.up.reshape(len(layer.up), -1).astype(np.float64), layer.down.reshape(layer.rank, -1)
    return (layer.alpha / layer.rank * up @ down).reshape(layer.up.shape[0], *layer.down.shape[1:])


def assert_same(state, wanted):
    """wanted: name -> update."""
    assert state.layers.keys() == wanted.keys()
    for name, update in wanted.items():
        np.testing.assert_allclose(exact(state.layers[name]), update, rtol=0, atol=2e-6 * np.abs(update).max())


class TestWeightedSum:
    @pytest.mark.parametrize("weights", [(1, 1), (0.5, 0.5), (0.3, 0.7), (1, -1), (-2, 0.01), (3, 5)])
    def test_is_the_sum_of_the_updates(self, weights):
        one, two = lora(4, alpha=1.0), lora(2, alpha=8.0, seed=9)
        result = weighted_sum([(one, weights[0]), (two, weights[1])])
        assert_same(result, {n: weights[0] * exact(one.layers[n]) + weights[1] * exact(two.layers[n]) for n in SHAPES})
        assert result.ranks() == [6] and {found.alpha for found in result.layers.values()} == {6.0}

    def test_any_number_of_any_ranks(self):
        states = [lora(rank, alpha, seed=10 * rank) for rank, alpha in ((1, 1), (3, 0.5), (4, 4), (7, 2))]
        weights = (0.1, -0.7, 1.3, 2.0)
        result = weighted_sum(list(zip(states, weights)))
        assert_same(result, {n: sum(w * exact(s.layers[n]) for s, w in zip(states, weights)) for n in SHAPES})
        assert result.ranks() == [15]

    def test_half_of_one_is_half_of_it(self):
        """kohya's merge scales both factors: a lone ratio 0.5 acts as 0.25 (its issue 868)."""
        one = lora(4, alpha=2.0)
        result = weighted_sum([(one, 0.5)])
        assert_same(result, {name: 0.5 * exact(found) for name, found in one.layers.items()})
        for name in SHAPES:
            np.testing.assert_array_equal(result.layers[name].down, one.layers[name].down)
            np.testing.assert_array_equal(result.layers[name].up, one.layers[name].up)

    def test_equal_ranks_keep_their_strength(self):
        """kohya's --concat halves it."""
        one, two = lora(4), lora(4, seed=5)
        assert_same(weighted_sum([(one, 1.0), (two, 1.0)]),
                    {n: exact(one.layers[n]) + exact(two.layers[n]) for n in SHAPES})  # fmt: skip

    def test_a_negative_weight_keeps_alpha_positive(self):
        result = weighted_sum([(lora(4), -0.5)])
        assert {found.alpha for found in result.layers.values()} == {2.0}
        assert_same(result, {name: -0.5 * exact(found) for name, found in lora(4).layers.items()})

    def test_unet_and_text_encoder_separately(self):
        one, two = lora(2), lora(3, seed=4)
        result = weighted_sum([(one, Strength(0.7, 0.3)), (two, Strength(-0.2, 0.0))])
        assert_same(result, {
            A: 0.7 * exact(one.layers[A]) - 0.2 * exact(two.layers[A]),
            B: 0.7 * exact(one.layers[B]) - 0.2 * exact(two.layers[B]),
            C: 0.3 * exact(one.layers[C]),
        })  # fmt: skip

    def test_layers_that_one_has_alone(self):
        one, two = lora(2, names=(A,)), lora(3, seed=4, names=(A, B))
        result = weighted_sum([(one, 0.5), (two, 2.0)])
        assert_same(result, {A: 0.5 * exact(one.layers[A]) + 2 * exact(two.layers[A]), B: 2 * exact(two.layers[B])})

    def test_a_dense_layer_and_a_1x1_convolution_are_the_same(self):
        flat = layer((12, 10), 2, seed=1)
        kernel = LoRALayer(flat.down[:, :, None, None], flat.up[:, :, None, None], flat.alpha)
        result = weighted_sum([(LoRA({A: flat}), 1.0), (LoRA({A: kernel}), 1.0)])
        assert_same(result, {A: 2 * exact(flat)})

    def test_metadata_is_kept(self):
        result = weighted_sum([(lora(2), 1.0), (lora(2, architecture="sd1", prediction_type="epsilon"), 1.0)])
        assert result.metadata == {"architecture": "sd1", "prediction_type": "epsilon"}

    @pytest.mark.parametrize(
        "states, says",
        [
            ([], "nothing is left"),
            ([(lora(2), 0.0)], "nothing is left"),
            ([(LoRA({}), 1.0)], "nothing is left"),
            ([(lora(2), float("nan"))], "must be a finite number"),
            ([(lora(2), Strength(1.0, float("inf")))], "must be a finite number"),
            ([(lora(2, architecture="sd1"), 1), (lora(2, architecture="sd2"), 1)], "architecture of one is sd1"),
            ([(lora(2, prediction_type="epsilon"), 1), (lora(2, prediction_type="v_prediction"), 1)], "prediction_t"),
            ([(lora(2), 1), (lora(2, min_timestep="0", max_timestep="550"), 1)], "different time steps.*together"),
            ([(lora(2), 1), (LoRA({A: layer((12, 11), 2)}), 1)], r"\(12, 10\) in one and \(12, 11\)"),
            ([(lora(2), 1), (LoRA({B: layer((9, 4, 1, 1), 2)}), 1)], "different models"),
        ],
    )
    def test_what_cannot_be_added(self, states, says):
        with pytest.raises(UserError, match=says):
            weighted_sum(states)


class TestMixedFactors:
    def test_are_the_originals_formula(self):
        one, two = lora(3, alpha=6.0), lora(3, seed=7)
        result = mix_factors(one, two, 0.4, 0.6)
        for name, found in result.layers.items():
            a, b = one.layers[name], two.layers[name]
            np.testing.assert_allclose(found.down, 0.4 * a.down + 0.6 * b.down, rtol=1e-6)
            np.testing.assert_allclose(found.up, 0.4 * 2.0 * a.up + 0.6 * b.up, rtol=1e-5, atol=1e-6)
            assert found.alpha == found.rank == 3

    def test_have_cross_terms_and_squared_weights(self):
        one, two = lora(2), lora(2, seed=3)
        mixed, summed = mix_factors(one, two, 0.5, 0.5), weighted_sum([(one, 0.5), (two, 0.5)])
        assert relative_difference(mixed, summed) > 0.1
        assert relative_difference(mix_factors(one, one, 0.5, 0.5), one) < 1e-6

    @pytest.mark.parametrize(
        "other, says",
        [(lora(3), "same rank"), (lora(2, names=(A,)), "2 are in only one"), (LoRA({}), "in only one")],
    )
    def test_want_the_same_layers_and_ranks(self, other, says):
        with pytest.raises(UserError, match=f"{says}.*--mode sum"):
            mix_factors(lora(2), other, 0.5, 0.5)


class TestResize:
    def test_is_the_best_of_its_rank_and_the_error_is_what_it_lost(self):
        state = lora(6, alpha=3.0)
        smaller, report = resize(state, rank=2)
        lost = whole = 0.0
        for name, found in state.layers.items():
            matrix = exact(found).reshape(len(found.up), -1)
            u, s, vt = np.linalg.svd(matrix)
            best = (u[:, :2] * s[:2]) @ vt[:2]
            got = exact(smaller.layers[name]).reshape(matrix.shape)
            np.testing.assert_allclose(got, best, rtol=0, atol=2e-6 * s[0])
            assert report.error(name) == pytest.approx(np.linalg.norm(matrix - got) / np.linalg.norm(matrix), rel=1e-4)
            lost, whole = lost + np.sum((matrix - got) ** 2), whole + np.sum(matrix**2)
        assert smaller.ranks() == [2] and {found.alpha for found in smaller.layers.values()} == {2.0}
        assert report.error() == pytest.approx(np.sqrt(lost / whole), rel=1e-4)
        assert f"all together {report.error():.2g}" in str(report)

    def test_factors_are_of_the_same_size(self):
        smaller, _ = resize(LoRA({A: layer((12, 10), 6)}), rank=2)
        found = smaller.layers[A]
        assert np.linalg.norm(found.up) == pytest.approx(np.linalg.norm(found.down), rel=1e-5)

    def test_is_exact_where_the_rank_suffices(self):
        one = lora(3)
        doubled = weighted_sum([(one, 0.25), (one, 0.5)])
        assert doubled.ranks() == [6]
        smaller, report = resize(doubled, rank=3)
        assert smaller.ranks() == [3] and report.error() < 1e-6
        assert_same(smaller, {name: 0.75 * exact(found) for name, found in one.layers.items()})

    def test_a_layer_of_no_larger_rank_keeps_its_bits(self):
        state = lora(3, alpha=0.7)
        same, report = resize(state, rank=3)
        assert report.error() == 0
        for name, found in state.layers.items():
            assert same.layers[name] is found

    def test_a_rank_beyond_the_layers_width(self):
        state = LoRA({A: layer((12, 10), 40)})
        smaller, report = resize(state, rank=10)
        assert_same(smaller, {A: exact(state.layers[A])})
        assert report.error() < 1e-6

    @pytest.mark.parametrize("energy, rank", [(0.5, 1), (0.7, 2), (0.95, 3), (1.0, 4)])
    def test_energy_keeps_the_smallest_rank_with_that_share(self, energy, rank):
        q1, q2 = (np.linalg.qr(np.random.default_rng(i).standard_normal((10, 4)))[0] for i in (1, 2))
        squares = np.array([0.55, 0.25, 0.15, 0.05])
        up, down = (q1 * np.sqrt(squares)).astype(np.float32), q2.T.astype(np.float32)
        smaller, report = resize(LoRA({A: LoRALayer(down, up, 4.0)}), energy=energy)
        assert smaller.ranks() == [rank]
        assert report.error() == pytest.approx(np.sqrt(1 - squares[:rank].sum()), abs=1e-6)

    def test_energy_one_leaves_out_what_is_no_more_than_rounding(self):
        one = lora(3)
        assert resize(weighted_sum([(one, 0.25), (one, 0.5)]), energy=1.0)[0].ranks() == [3]

    def test_an_update_of_zeros_stays_one(self):
        zero = LoRALayer(np.ones((4, 10), np.float32), np.zeros((12, 4), np.float32), 4.0)
        smaller, report = resize(LoRA({A: zero}), energy=0.9)
        assert not exact(smaller.layers[A]).any() and report.error() == 0

    @pytest.mark.parametrize(
        "size",
        [dict(), dict(rank=0), dict(rank=True), dict(rank=1.5), dict(energy=0.0), dict(energy=1.1),
         dict(energy=float("nan")), dict(rank=2, energy=-1)],
    )  # fmt: skip
    def test_sizes_that_make_no_sense(self, size):
        with pytest.raises(UserError, match="rank|energy"):
            resize(lora(4), **size)


class TestDecompose:
    @pytest.mark.parametrize("shape", [(12, 10), (10, 12), (9, 4, 3, 3), (8, 8, 1, 1)])
    def test_finds_a_low_rank_update_again(self, shape):
        update = exact(layer(shape, 3)).astype(np.float32)
        state, report = decompose([(A, update)], rank=3)
        found = state.layers[A]
        assert found.rank == 3 and (found.up.shape[0], *found.down.shape[1:]) == shape
        np.testing.assert_allclose(exact(found), update, rtol=0, atol=2e-6 * np.abs(update).max())
        assert report.error() < 1e-6

    def test_says_what_it_cut_off(self):
        update = exact(layer((12, 10), 6)).astype(np.float32)
        state, report = decompose([(A, update)], rank=2)
        assert report.error() == pytest.approx(np.linalg.norm(exact(state.layers[A]) - update) / np.linalg.norm(update),
                                               rel=1e-4)  # fmt: skip

    @pytest.mark.parametrize("shape", [(12, 30), (30, 12), (9, 4, 3, 3)])
    @pytest.mark.parametrize("rank", [1, 4, 9])
    def test_is_the_best_of_its_rank_for_any_update(self, shape, rank):
        update = np.random.default_rng(rank).standard_normal(shape).astype(np.float32)
        state, report = decompose([(A, update)], rank=rank)
        u, s, vt = np.linalg.svd(update.reshape(shape[0], -1).astype(np.float64), full_matrices=False)
        found, best = exact(state.layers[A]).reshape(shape[0], -1), (u[:, :rank] * s[:rank]) @ vt[:rank]
        np.testing.assert_allclose(found, best, rtol=0, atol=2e-6 * s[0])
        assert report.error() == pytest.approx(np.sqrt(np.sum(s[rank:] ** 2) / np.sum(s**2)), abs=1e-7)
        up, down = state.layers[A].up, state.layers[A].down
        assert np.linalg.norm(up) == pytest.approx(np.linalg.norm(down), rel=1e-5)

    def test_values_far_apart_keep_their_digits(self):
        """Products of an update with itself hold the squares of its singular values."""
        q1, q2 = (np.linalg.qr(np.random.default_rng(i).standard_normal((12, 3)))[0] for i in (1, 2))
        update = ((q1 * [1.0, 1e-3, 1e-6]) @ q2.T).astype(np.float32)
        state, _ = decompose([(A, update)], rank=3)
        np.testing.assert_allclose(exact(state.layers[A]), update, rtol=0, atol=2e-7)
        small = decompose([(A, update * np.float32(1e-38))], rank=3)[0].layers[A]  # down to subnormal values
        np.testing.assert_allclose(exact(small) * 1e38, update, rtol=0, atol=1e-6)

    def test_energy_one_leaves_out_what_is_no_more_than_rounding(self):
        assert decompose([(A, exact(layer((12, 10), 3)).astype(np.float32))], energy=1.0 - 1e-12)[0].ranks() == [3]

    def test_a_rank_beyond_the_updates_own(self):
        update = np.zeros((12, 10), np.float32)
        update[3] = np.arange(10)
        state, report = decompose([(A, update)], rank=10)
        np.testing.assert_allclose(exact(state.layers[A]), update, rtol=0, atol=1e-6)
        assert report.error() < 1e-7

    def test_no_update_no_layer(self):
        assert decompose([(A, np.zeros((3, 3), np.float32))], rank=1)[0].layers == {}

    def test_values_that_are_not_finite(self):
        with pytest.raises(UserError, match="not finite"):
            decompose([(A, np.full((3, 3), np.nan, np.float32))], rank=1)
