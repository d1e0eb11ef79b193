"""The kinds of updates by their definitions, on small matrices; tests/parity/test_lora_updates.py by other projects."""

from dataclasses import replace

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.lora.lora import LoRA
from ldm.lora.merge import Update, add_updates
from ldm.lora.products import LoHa, LoKr
from ldm.lora.updates import IA3, OFT, DoRA, Full, LoRALayer, weight_norms

OUT, IN, SHAPE, KERNEL = 6, 8, (6, 8), (6, 8, 3, 3)
RANDOM = np.random.RandomState(0)


def normal(*shape):
    return RANDOM.standard_normal(shape).astype(np.float32)


WEIGHT, WEIGHT4 = normal(*SHAPE), normal(*KERNEL)
PAIR = LoRALayer(normal(2, IN), normal(OUT, 2), 3.0)
LOHA = LoHa(
    {"hada_w1_a": normal(OUT, 2), "hada_w1_b": normal(2, IN), "hada_w2_a": normal(OUT, 2), "hada_w2_b": normal(2, IN)},
    3.0,
)
TUCKER = LoHa(
    {
        "hada_t1": normal(2, 2, 3, 3), "hada_w1_a": normal(2, OUT), "hada_w1_b": normal(2, IN),
        "hada_t2": normal(2, 2, 3, 3), "hada_w2_a": normal(2, OUT), "hada_w2_b": normal(2, IN),
    },
    3.0,
)  # fmt: skip
LOKR = LoKr({"lokr_w1": normal(2, 4), "lokr_w2_a": normal(3, 1), "lokr_w2_b": normal(1, 2)}, 3.0)
BLOCKS = normal(3, 2, 2)
KINDS = {
    "LoRA": PAIR,
    "LoHa": LOHA,
    "LoKr": LOKR,
    "LoKr of two whole": LoKr({"lokr_w1": normal(2, 4), "lokr_w2": normal(3, 2)}, 7.0),
    "LoKr of two factored": LoKr(
        {"lokr_w1_a": normal(2, 1), "lokr_w1_b": normal(1, 4), "lokr_w2_a": normal(3, 1), "lokr_w2_b": normal(1, 2)},
        3.0,
    ),
    "full": Full(normal(*SHAPE)),
    "IA3": IA3(normal(OUT) * 0.2, False),
    "IA3 on input": IA3(normal(IN) * 0.2, True),
    "OFT": OFT(BLOCKS),
    "OFT with rescale": OFT(BLOCKS, 0.0, 1 + 0.1 * normal(OUT)),
    "OFT with a limit": OFT(BLOCKS, 0.01),
    "DoRA": DoRA(PAIR, 1 + np.abs(normal(OUT))),
    "DoRA by input": DoRA(LOKR, 1 + np.abs(normal(IN)), on_input=True),
}


def test_loha_is_the_elementwise_product_of_two_matrices():
    f = LOHA.factors
    wanted = (f["hada_w1_a"] @ f["hada_w1_b"]) * (f["hada_w2_a"] @ f["hada_w2_b"]) * 3 / 2
    np.testing.assert_allclose(LOHA.delta(), wanted, rtol=1e-6)
    assert LOHA.rank == 2 and LOHA.shape == SHAPE


def test_loha_in_tuckers_form_is_the_sum_over_both_cores():
    f = TUCKER.factors
    wanted = np.ones(KERNEL, np.float64)
    for half in "12":
        core, a, b = (f[f"hada_{name}"].astype(np.float64) for name in (f"t{half}", f"w{half}_a", f"w{half}_b"))
        matrix = np.zeros(KERNEL)
        for i in range(2):
            for j in range(2):
                matrix += core[i, j] * (a[i, :, None] * b[j])[:, :, None, None]
        wanted *= matrix
    np.testing.assert_allclose(TUCKER.delta(), wanted * 3 / 2, rtol=1e-4, atol=1e-5)


def test_lokr_is_the_kronecker_product():
    w2 = LOKR.factors["lokr_w2_a"] @ LOKR.factors["lokr_w2_b"]
    for i in range(2):
        for j in range(4):
            block = LOKR.delta()[3 * i : 3 * i + 3, 2 * j : 2 * j + 2]
            np.testing.assert_allclose(block, 3 * LOKR.factors["lokr_w1"][i, j] * w2, rtol=1e-6)


def test_a_kernel_of_lokr_is_in_the_last_columns_of_the_second_factor():
    whole = LoKr({"lokr_w1": normal(2, 4), "lokr_w2": normal(3, 2, 3, 3)}, 1.0)
    flat = LoKr({**whole.factors, "lokr_w2": whole.factors["lokr_w2"].reshape(3, -1)}, 1.0)
    assert whole.shape == KERNEL and flat.shape == (OUT, IN * 9) and flat.fits(KERNEL)
    np.testing.assert_array_equal(flat.reshaped(KERNEL).delta(), whole.delta())
    np.testing.assert_array_equal(
        whole.delta()[3:, 2:4, 1, 2], whole.factors["lokr_w1"][1, 1] * whole.factors["lokr_w2"][:, :, 1, 2]
    )


@pytest.mark.parametrize("on_input", [False, True])
def test_dora_gives_the_weight_its_magnitude_and_keeps_the_direction(on_input):
    magnitude = 1 + np.abs(normal(IN if on_input else OUT))
    merged = WEIGHT + DoRA(PAIR, magnitude, on_input).delta(WEIGHT)
    np.testing.assert_allclose(weight_norms(merged, on_input).reshape(-1), magnitude, rtol=1e-5)
    changed = WEIGHT + PAIR.delta()
    np.testing.assert_allclose(
        merged / weight_norms(merged, on_input), changed / weight_norms(changed, on_input), rtol=1e-4, atol=1e-6
    )


def test_dora_with_the_norms_of_the_sum_is_the_update_of_its_direction():
    magnitude = weight_norms(WEIGHT + PAIR.delta()).reshape(-1)
    np.testing.assert_allclose(DoRA(PAIR, magnitude).delta(WEIGHT), PAIR.delta(), atol=1e-5)


def test_dora_of_a_kernel():
    pair = LoRALayer(normal(2, IN, 3, 3), normal(OUT, 2, 1, 1), 2.0)
    merged = WEIGHT4 + DoRA(pair, np.full(OUT, 2.0, np.float32)).delta(WEIGHT4)
    np.testing.assert_allclose(np.sqrt((merged**2).sum((1, 2, 3))), 2.0, rtol=1e-5)


def test_oft_keeps_the_angles_between_the_columns_of_a_block():
    rotations = OFT(BLOCKS).rotations()
    np.testing.assert_allclose(rotations @ rotations.transpose(0, 2, 1), np.tile(np.eye(2), (3, 1, 1)), atol=1e-6)
    merged = WEIGHT + OFT(BLOCKS).delta(WEIGHT)
    for block in range(3):
        rows = slice(2 * block, 2 * block + 2)
        np.testing.assert_allclose(merged[rows].T @ merged[rows], WEIGHT[rows].T @ WEIGHT[rows], atol=1e-5)
        np.testing.assert_allclose(merged[rows], rotations[block].T @ WEIGHT[rows], atol=1e-5)


def test_the_limit_of_oft_holds_for_the_norm_of_the_skew_matrices():
    small = OFT(BLOCKS, alpha=0.01).rotations()  # limit 0.06
    skew = np.linalg.solve(small + np.eye(2), small - np.eye(2))  # the inverse of Cayley's transform
    assert np.linalg.norm(skew) == pytest.approx(0.06, rel=1e-4)
    np.testing.assert_array_equal(OFT(BLOCKS, alpha=100.0).rotations(), OFT(BLOCKS).rotations())


@pytest.mark.parametrize("kind", KINDS)
class TestEveryKind:
    def test_the_strength_multiplies_the_whole_change(self, kind):
        layer = KINDS[kind]
        np.testing.assert_allclose(layer.update(0.3, WEIGHT), 0.3 * layer.delta(WEIGHT), rtol=1e-5, atol=1e-7)
        assert not layer.update(0.0, WEIGHT).any()
        merged = add_updates(WEIGHT, [Update(layer, 1.0, "")], np.float32)
        np.testing.assert_allclose(merged, WEIGHT + layer.delta(WEIGHT), rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("strength", [1.0, 0.4, -0.7])
    def test_is_taken_out_again(self, kind, strength):
        layer = KINDS[kind]
        merged = add_updates(WEIGHT, [Update(layer, strength, "")], np.float32)
        if isinstance(layer, DoRA):
            with pytest.raises(UserError, match="a DoRA replaces the norms .*: load the base model again"):
                layer.restore(merged, strength)
        else:
            np.testing.assert_allclose(layer.restore(merged, strength), WEIGHT, rtol=0, atol=2e-5)

    def test_fits_its_weight_alone(self, kind):
        layer = KINDS[kind]
        assert layer.fits(SHAPE) and layer.fits((OUT, IN, 1, 1)) and not layer.fits((OUT + 1, IN + 1))
        assert layer.is_finite() and not layer.is_zero()
        assert layer.reshaped((OUT, IN, 1, 1)).update(1.0, WEIGHT.reshape(OUT, IN, 1, 1)).size == WEIGHT.size


@pytest.mark.parametrize("layer", [
    replace(PAIR, alpha=np.nan), replace(PAIR, up=PAIR.up * np.inf), replace(LOKR, alpha=np.inf),
    replace(LOHA, factors={**LOHA.factors, "hada_w1_b": LOHA.factors["hada_w1_b"] * np.nan}),
    Full(np.full(SHAPE, np.inf, np.float32)), IA3(np.full(OUT, np.nan, np.float32), False), OFT(BLOCKS * np.inf),
    OFT(BLOCKS, 0.0, np.full(OUT, np.nan, np.float32)), DoRA(replace(PAIR, alpha=np.nan), np.ones(OUT, np.float32)),
    DoRA(PAIR, np.full(OUT, np.inf, np.float32)),
])  # fmt: skip
def test_values_that_are_not_finite(layer):
    assert not layer.is_finite()


@pytest.mark.parametrize("layer", [
    replace(PAIR, alpha=0.0), replace(PAIR, up=PAIR.up * 0), replace(LOHA, alpha=0.0), replace(LOKR, alpha=0.0),
    replace(LOHA, factors={**LOHA.factors, "hada_w2_a": LOHA.factors["hada_w2_a"] * 0}),
    replace(LOKR, factors={**LOKR.factors, "lokr_w2_b": LOKR.factors["lokr_w2_b"] * 0}),
    Full(np.zeros(SHAPE, np.float32)), IA3(np.zeros(OUT, np.float32), False), OFT(np.ones((3, 2, 2), np.float32)),
])  # fmt: skip
def test_zero_updates(layer):
    assert layer.is_zero() and not layer.delta(WEIGHT).any()


def test_updates_that_depend_on_the_weight_follow_those_before_them():
    """DoRA gives the sum of the weight and an earlier LoRA its magnitude, as in A1111 and ComfyUI."""
    dora = KINDS["DoRA"]
    both = add_updates(WEIGHT, [Update(PAIR, 0.5, ""), Update(dora, 1.0, "")], np.float32)
    first = add_updates(WEIGHT, [Update(PAIR, 0.5, "")], np.float32)
    np.testing.assert_array_equal(both, add_updates(first, [Update(dora, 1.0, "")], np.float32))


def test_a_lora_of_other_kinds_is_no_list_of_pairs():
    lora = LoRA({"a": PAIR, "b": LOHA}, {}, {}, {"c": Full(normal(OUT))})
    with pytest.raises(
        UserError, match=r"x.ckpt holds more than pairs .* \(1 LoHa, 1 bias, such as b\): .*--bake_energy"
    ):
        lora.pairs("x.ckpt")
    assert LoRA({"a": PAIR}).pairs() == {"a": PAIR} and lora.ranks() == [2]
    assert "1 LoRA, 1 LoHa; biases: 1" in str(lora)


@pytest.mark.parametrize("kind", [kind for kind, layer in KINDS.items() if not layer.needs_weight])
def test_the_values_are_bounded(kind):
    layer = KINDS[kind]
    for strength in (0.3, 2.0):
        assert np.abs(layer.update(strength)).max() <= layer.largest(strength)


def huge(layer, **factors):
    return replace(
        layer,
        factors={
            **layer.factors,
            **{name: np.full_like(layer.factors[name], value) for name, value in factors.items()},
        },
    )


@pytest.mark.parametrize("layer", [
    huge(LOHA, hada_w1_a=1e25, hada_w1_b=1e25, hada_w2_a=0.0),
    huge(LOHA, hada_w1_a=1e20, hada_w1_b=1e20, hada_w2_a=1e-25, hada_w2_b=1e-25),
    replace(huge(LOKR, lokr_w2_a=1e25, lokr_w2_b=1e25, lokr_w1=1e-30), alpha=1e-25),
    replace(PAIR, down=np.full_like(PAIR.down, 1e25), up=np.full_like(PAIR.up, 1e25), alpha=1e-30),
    DoRA(huge(LOHA, hada_w1_a=1e25, hada_w1_b=1e25, hada_w2_a=0.0), np.ones(OUT, np.float32)),
])  # fmt: skip
def test_the_bound_holds_for_what_is_computed_on_the_way(layer):
    """The product of the factors leaves the range of fp32 although the update would not."""
    with np.errstate(over="ignore", invalid="ignore"):
        assert not np.isfinite(layer.update(1.0, WEIGHT)).all()
    assert not layer.largest() < np.finfo(np.float32).max
