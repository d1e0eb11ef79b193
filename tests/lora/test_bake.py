"""Low-rank factors in place of other kinds: exact where the rank suffices, and what is lost is said."""

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.files.paths import ROOT
from ldm.lora.bake import bake
from ldm.lora.formats.modules import known_bases
from ldm.lora.lora import LoRA
from ldm.lora.products import LoHa, LoKr
from ldm.lora.updates import DoRA, Full, LoRALayer
from ldm.weights.base_model import map_base_model, open_base_model
from ldm.weights.names import CanonicalArrays

NANO = known_bases()[2]
NANO_BASE = ROOT / "models" / "nano" / "nano.safetensors"
RANDOM = np.random.RandomState(0)
TO_K = next(module for module in NANO.modules if module.path.endswith("attn2.to_k"))
TO_Q = next(module for module in NANO.modules if module.path.endswith("attn2.to_q"))
CONV = next(module for module in NANO.modules if module.path.endswith("resnets.0.conv1"))


def normal(*shape):
    return RANDOM.standard_normal(shape).astype(np.float32)


def loha(module, rank=2):
    out, columns = module.shape[0], int(np.prod(module.shape[1:]))
    factors = {"hada_w1_a": normal(out, rank), "hada_w1_b": normal(rank, columns)}
    return LoHa({**factors, "hada_w2_a": normal(out, rank), "hada_w2_b": normal(rank, columns)}, float(rank))


def pair(module, rank=2):
    down, up = normal(rank, *module.shape[1:]), normal(module.shape[0], rank, *(1,) * (len(module.shape) - 2))
    return LoRALayer(down, up, float(rank))


@pytest.mark.parametrize("module", [TO_K, CONV])
def test_a_loha_is_exact_at_the_square_of_its_rank(module):
    """A Hadamard product of matrices of ranks r and r has at most the rank r^2."""
    lora = LoRA({module.name: loha(module), TO_Q.name: pair(TO_Q)}, {"architecture": "nano"}, {"cat": normal(1, 96)})
    baked = bake(lora, rank=4)
    layer, wanted = baked.lora.layers[module.name], lora.layers[module.name].delta().reshape(module.shape)
    assert layer.rank == 4 and layer.shape == module.shape
    np.testing.assert_allclose(layer.update(), wanted, atol=1e-5 * np.abs(wanted).max())
    assert baked.lora.layers[TO_Q.name] is lora.layers[TO_Q.name]
    assert (baked.lora.metadata, baked.lora.embeddings) == (lora.metadata, lora.embeddings)
    assert "energy kept: 100.0000%" in str(baked)


def test_what_a_lower_rank_loses_is_said():
    lora = LoRA({TO_K.name: loha(TO_K, 3)})
    baked = bake(lora, rank=2)
    update, kept = lora.layers[TO_K.name].delta().astype(np.float64), baked.lora.layers[TO_K.name].update()
    share = 1 - np.sum((update - kept) ** 2) / np.sum(update**2)
    assert baked.lora.layers[TO_K.name].rank == 2
    assert 0.2 < share < 0.95 and f"energy kept: {share:.4%}" in str(baked)


def test_an_energy_gives_each_layer_the_smallest_rank():
    whole = LoKr({"lokr_w1": normal(4, 4), "lokr_w2": normal(TO_Q.shape[0] // 4, TO_Q.shape[1] // 4)}, 1.0)
    lora = LoRA({TO_K.name: loha(TO_K), TO_Q.name: whole})
    baked = bake(lora, energy=0.9)
    for name, layer in baked.lora.layers.items():
        update = lora.layers[name].delta().astype(np.float64)
        values = np.linalg.svd(update, compute_uv=False) ** 2
        assert layer.rank == int(np.argmax(np.cumsum(values) >= 0.9 * values.sum())) + 1


def test_dora_needs_the_base_model_and_gets_its_weights():
    lora = LoRA({TO_K.name: DoRA(pair(TO_K), 1 + RANDOM.random_sample(TO_K.shape[0]).astype(np.float32))})
    with pytest.raises(UserError, match="DoRA depends on the weights of the base model: give it .*--ckpt_path"):
        bake(lora, energy=0.9)
    baked = bake(lora, energy=1.0, base_path=NANO_BASE)
    checkpoint = open_base_model(NANO_BASE)
    weight = np.array(CanonicalArrays(checkpoint, map_base_model(checkpoint))[f"{TO_K.name}.weight"], np.float32)
    wanted = lora.layers[TO_K.name].delta(weight)
    np.testing.assert_allclose(baked.lora.layers[TO_K.name].update(), wanted, atol=1e-5 * np.abs(wanted).max())


def test_what_no_factors_hold_is_named():
    norm = NANO.norms[0]
    lora = LoRA(
        {TO_K.name: loha(TO_K), norm.name: Full(normal(*norm.shape), "w_norm")},
        {},
        {},
        {CONV.name: Full(normal(CONV.shape[0]))},
    )
    baked = bake(lora, rank=4)
    assert list(baked.lora.layers) == [TO_K.name] and not baked.lora.biases
    assert baked.left_out == sorted([f"{norm.name}.weight", f"{CONV.name}.bias"])
    assert "left out: 2 updates of normalisations and biases" in str(baked)


@pytest.mark.parametrize("arguments", [{}, {"rank": 0}, {"energy": 0.0}, {"energy": 1.5}])
def test_a_cut_that_is_none(arguments):
    with pytest.raises(UserError, match="rank|energy"):
        bake(LoRA({TO_K.name: loha(TO_K)}), **arguments)


def test_nothing_is_left():
    norm = NANO.norms[0]
    with pytest.raises(UserError, match="nothing is left of the LoRA"):
        bake(LoRA({norm.name: Full(normal(*norm.shape), "w_norm")}), rank=4)
