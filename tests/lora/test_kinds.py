"""Layers of all kinds of LoRA in one network: they begin as the base model, train, are saved, loaded and dropped."""

from __future__ import annotations

from dataclasses import replace

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from ldm.errors import UserError
from ldm.lora.dropout import UnitDropout, dropout_key, make_dropout_key
from ldm.lora.formats import mindone, read_lora
from ldm.lora.inject import factors_cast_to, get_lora, inject_lora, lora_cells, set_lora
from ldm.lora.lora import LoRA
from ldm.lora.magnitude import row_norms
from ldm.lora.merge import merge_lora
from ldm.lora.product_layers import LoHaCell
from ldm.lora.spec import LayerSpec, LoRASpec
from ldm.lora.updates import DoRA, Full, LoRALayer
from ldm.models.layers import hold_frozen_weights, set_compute_dtype
from tests.lora.conftest import SmallNet
from tests.lora.helpers import BLOCK, CONV, UNET, Fresh
from tests.lora.test_inject import LossAndGradients, MeanSquare

# Every kind once or twice, in linear layers, 1x1 and 3x3 convolutions.
MODULES = {
    "to_q": LayerSpec(2, algo="dora"),
    "attn2.to_q": LayerSpec(2, 3.0, algo="rslora", dora_wd=True, scale=0.5),
    "attn1.to_k": LayerSpec(2, 3.0, algo="loha"),
    "attn1.to_out.0": LayerSpec(2, algo="dora", trainable_scale=True),
    "attn2.to_k": LayerSpec(3, 3.0, algo="loha", dora_wd=True),
    "attn1.to_v": LayerSpec(1, 3.0, algo="lokr", scale=2.0),
    "attn2.to_v": LayerSpec(8, algo="lokr", scale=2.0),  # whole: 6 and 16 channels
    "proj_in": LayerSpec(1, algo="lokr", dora_wd=True, factor=2),
    "proj_out": LayerSpec(2, hard=True, dora_wd=True),
    "in_layers.2": LayerSpec(2, algo="loha", use_tucker=True, dora_wd=True),
    "out_layers.3": LayerSpec(1, algo="lokr", use_tucker=True),
    "ff.net.2": LayerSpec(1, algo="loha"),
    "diffusion_model.out.0": LayerSpec(2, use_tucker=True, rs_lora=True),
}
SPEC = LoRASpec(modules=MODULES)


def train(net, inputs, steps=3, rate=0.02):
    """Change each parameter by `rate` in each step where its gradient is largest. Returns the losses."""
    step = LossAndGradients(MeanSquare(net))
    losses = []
    for _ in range(steps):
        loss, gradients = step(*inputs)
        losses.append(float(loss.asnumpy()))
        for parameter, gradient in zip(net.trainable_params(), gradients):
            change = gradient.asnumpy() / max(np.abs(gradient.asnumpy()).max(), 1e-20)
            parameter.set_data(Tensor(parameter.asnumpy() - np.float32(rate) * change))
    return losses


@pytest.fixture(scope="module")
def trained_net():
    """(network, its outputs before a LoRA was injected, right after, and after training, its inputs)."""
    ms.set_context(mode=ms.GRAPH_MODE)
    random = np.random.RandomState(0)
    inputs = tuple(Tensor(random.standard_normal(s).astype(np.float32)) for s in ((2, 8, 4, 4), (2, 16), (2, 5, 6)))
    net = small_net_of()
    before = net(*inputs).asnumpy()
    inject_lora(net, SPEC)
    begun = Fresh(net)
    after = begun(*inputs).asnumpy()
    started = {parameter.name: parameter.asnumpy().copy() for parameter in net.trainable_params()}
    losses = train(net, inputs)
    return net, before, after, begun(*inputs).asnumpy(), inputs, losses, started


def test_every_kind_begins_as_the_base_model_bit_for_bit(trained_net):
    _, before, after, *_ = trained_net
    np.testing.assert_array_equal(after, before)


def test_every_kind_trains_all_of_its_factors(trained_net):
    net, _, after, trained, _, losses, started = trained_net
    assert losses[-1] < losses[0] and not np.allclose(trained, after, atol=1e-3)
    for parameter in net.trainable_params():
        assert not np.array_equal(parameter.asnumpy(), started[parameter.name]), parameter.name
    kinds = {cell.kind.label + " DoRA" * cell.dora for cell in lora_cells(net).values()}
    assert kinds == {"LoRA", "LoRA DoRA", "LoHa", "LoHa DoRA", "LoKr", "LoKr DoRA"}
    lohas = [cell for cell in lora_cells(net).values() if isinstance(cell, LoHaCell)]
    assert {cell.is_pair for cell in lohas} == {True, False}  # both ways to compute one


def small_net_of(seed=0):
    np.random.seed(seed)
    net = SmallNet()
    for parameter in net.get_parameters():
        parameter.requires_grad = False
    return net


def test_the_file_read_back_gives_what_was_trained(trained_net, tmp_path):
    net, _, _, trained, inputs, *_ = trained_net
    mindone.write(tmp_path / "lora.ckpt", get_lora(net))
    merged = small_net_of()
    merge_lora(merged, read_lora(tmp_path / "lora.ckpt"))
    np.testing.assert_allclose(merged(*inputs).asnumpy(), trained, rtol=0, atol=1e-5 * np.abs(trained).max())


def test_training_goes_on_from_a_lora_of_every_kind(trained_net):
    """Other alphas and scales than it was trained with go into the factors."""
    lora = get_lora(trained_net[0])
    modules = {
        name: replace(layer, use_tucker=False) if name.endswith("out.0") else layer for name, layer in MODULES.items()
    }
    modules = {name: replace(layer, scale=0.25, alpha=5.0) for name, layer in modules.items()}
    net = small_net_of()
    inject_lora(net, replace(SPEC, modules=modules, seed=9))
    set_lora(net, lora)
    begun = get_lora(net)
    weights = {p.name: p.asnumpy() for p in small_net_of().get_parameters()}
    assert begun.layers.keys() == lora.layers.keys()
    for name, layer in begun.layers.items():
        assert type(layer) is type(lora.layers[name]) and layer.label == lora.layers[name].label
        weight = weights[f"{name}.weight"]
        found, wanted = (each.delta(weight) for each in (layer, lora.layers[name]))
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6, err_msg=name)
        if isinstance(layer, DoRA):
            np.testing.assert_array_equal(layer.magnitude, lora.layers[name].magnitude)


LOKR, LOHA = LayerSpec(1, algo="lokr"), LayerSpec(2, algo="loha")


@pytest.mark.parametrize(
    ("saved", "trained", "words"),
    [
        (
            LayerSpec(2),
            LayerSpec(2, algo="dora"),
            "is a LoRA, and a DoRA of LoRA is trained here: set algo and dora_wd",
        ),
        (LayerSpec(2, algo="dora"), LayerSpec(2), "is a DoRA, and a LoRA is trained here"),
        (LOHA, LOKR, "is a LoHa, and a LoKr is trained here"),
        (LOHA, replace(LOHA, rank=3), "has rank 2, here it is 3: set lora_rank 2"),
        (LOHA, replace(LOHA, use_tucker=True), "has the factors hada_w1_a, .*here they are hada_t1.*set use_tucker"),
        (LayerSpec(2, use_tucker=True), LayerSpec(2, use_tucker=True), "a pair in Tucker's form is saved without it"),
        (LOKR, replace(LOKR, rank=8), "has the factors .*lokr_w2_a.*here they are lokr_w1, lokr_w2: .*lora_rank"),
        (LOKR, replace(LOKR, factor=1), "lokr_w1 is .2, 2., wanted .1, 1.: .*or with another factor"),
        (LOHA, replace(LOHA, scale=0.0), "scale 0"),
    ],
)
def test_a_lora_of_another_kind_is_refused(saved, trained, words):
    spec = LoRASpec(modules={"in_layers.2": saved})
    lora, net = None, small_net_of()
    inject_lora(net, spec)
    lora = get_lora(net)
    net = small_net_of()
    inject_lora(net, replace(spec, modules={"in_layers.2": trained}))
    with pytest.raises(UserError, match=f"mine.ckpt.*{words}"):
        set_lora(net, lora, "mine.ckpt")


def test_magnitudes_by_input_and_biases_are_refused():
    net = small_net_of()
    inject_lora(net, LoRASpec(modules={"in_layers.2": LayerSpec(2, algo="dora")}))
    lora = get_lora(net)
    layer = replace(lora.layers[CONV], on_input=True)
    with pytest.raises(UserError, match="a magnitude for each input"):
        set_lora(net, LoRA({CONV: layer}))
    with pytest.raises(UserError, match="changes biases"):
        set_lora(net, LoRA(lora.layers, biases={CONV: Full(np.zeros(8, np.float32))}))


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        ({"to_q": {"algo": "oft"}}, 'to_q.algo: "oft".*one of'),
        (
            {"to_q": {"algo": "loha", "trainable_scale": 1}},
            "trainable_scale is for pairs of factors, not for algo loha",
        ),
        ({"proj_in": {"algo": "lokr", "hard": 1}}, "hard is for pairs of factors, not for algo lokr"),
        ({"to_q": {"factor": 4}}, "to_q.factor is for algo lokr"),
        ({"to_q": {"algo": "lokr", "factor": 0}}, "to_q.factor: 0 is not allowed"),
        ({"proj_in": {"hard": 1, "use_tucker": 1}}, "leave one of them out"),
        ({"to_q": {"rank_dropout": 1}}, "to_q.rank_dropout: 1"),
    ],
)
def test_a_configuration_names_what_does_not_go_together(modules, words):
    with pytest.raises(UserError, match=words):
        LoRASpec().with_config(modules)


def test_settings_are_the_defaults_of_a_configuration():
    spec = LoRASpec(algo="lokr", factor=4, rank_dropout=0.25, dora_wd=True).with_config(
        {"to_q": {"r": 2}, "to_k": {"algo": "lokr"}}
    )
    assert spec.modules["to_q"] == LayerSpec(2, algo="lokr", factor=4, rank_dropout=0.25, dora_wd=True)
    # A training state holds a hash of this text, which earlier versions wrote too.
    assert repr(LayerSpec(2)) == (
        "LayerSpec(rank=2, alpha=None, scale=1.0, trainable_scale=False, hard=False, dropout=0.0)"
    )
    assert repr(LayerSpec(2, algo="loha", lr=1.0)).endswith("dropout=0.0, algo='loha')")


def test_convolutions_have_a_rank_of_their_own_and_bring_the_residual_blocks():
    net = small_net_of()
    names = inject_lora(net, LoRASpec(rank=2, alpha=1.0, conv_rank=3, conv_alpha=6.0))
    layers = get_lora(net).layers
    found = {name.removeprefix(BLOCK): (layers[name].rank, layers[name].alpha) for name in names}
    assert found["0.in_layers.2"] == found["0.out_layers.3"] == (3, 6.0)
    assert found["0.emb_layers.1"] == found["1.transformer_blocks.0.attn1.to_q"] == (2, 1.0)
    assert "1.proj_in" not in found
    with pytest.raises(UserError, match="conv_dim 99 is more than the width 8"):
        inject_lora(small_net_of(), LoRASpec(rank=2, conv_rank=99))


class Unit(nn.Cell):
    """The mask of a UnitDropout."""

    def __init__(self, rate, name, count):
        super().__init__(auto_prefix=False)
        self.key, self.count = make_dropout_key(), count
        self.dropout = UnitDropout(rate, name, self.key)
        self.set_train()

    def construct(self):
        return self.dropout(self.count)

    def at(self, *key):
        self.key.set_data(Tensor(np.array(key, np.int32)))
        return self().asnumpy()


def test_units_are_dropped_by_key_and_name():
    net, other = Unit(0.3, "layer ranks", 4000), Unit(0.3, "another ranks", 4000)
    first = net.at(12345, -678)
    assert set(first) == {0.0, 1.0} and abs(1 - first.mean() - 0.3) < 5 * np.sqrt(0.21 / 4000)
    np.testing.assert_array_equal(net.at(12345, -678), first)
    for mask in (net.at(12346, -678), net.at(12345, -679), other.at(12345, -678)):
        assert abs(np.corrcoef(mask, first)[0, 1]) < 5 / np.sqrt(4000)
    np.testing.assert_array_equal(net.at(0, 0), 1.0)
    of_layers = [Unit(0.25, f"layer {i}", 1) for i in range(2)]
    keys = np.random.RandomState(0).randint(-(2**31), 2**31, (150, 2))
    dropped = np.array([[1 - unit.at(*key)[0] for key in keys] for unit in of_layers])
    assert np.all(np.abs(dropped.mean(1) - 0.25) < 5 * np.sqrt(0.19 / 150))


DROPPED = {
    "to_q": LayerSpec(2, rank_dropout=0.5, module_dropout=0.5),
    "to_k": LayerSpec(2, algo="dora", rank_dropout=0.5),
    "to_out.0": LayerSpec(2, algo="dora", module_dropout=0.5),
    "to_v": LayerSpec(2, algo="loha", rank_dropout=0.5),
    "in_layers.2": LayerSpec(2, rank_dropout=0.5),
    "out_layers.3": LayerSpec(1, algo="loha", dora_wd=True, rank_dropout=0.5),
}


def test_ranks_of_a_pair_and_outputs_of_a_product_are_left_out(small_inputs):
    """What a step drops is the same as factors with zeros in its place."""
    net = small_net_of()
    inject_lora(net, LoRASpec(modules=DROPPED))
    random = np.random.RandomState(0)
    for cell in lora_cells(net).values():
        for parameter in cell.parts().values():
            values = random.standard_normal(parameter.shape).astype(np.float32) / 2
            parameter.set_data(Tensor(parameter.asnumpy() + values))
    net.set_train()
    graph = Fresh(net)
    graph.set_train()
    whole = graph(*small_inputs).asnumpy()
    key = dropout_key(net)
    key.set_data(Tensor(np.array([3, 4], np.int32)))
    dropped = graph(*small_inputs).asnumpy()
    modules = []
    for name, cell in lora_cells(net).items():
        is_pair = cell.kind is LoRALayer
        parameter = cell.parts()["lora_up.weight" if is_pair else "hada_w1_a"]
        mask = np.ones(1)
        if cell.rank_dropout is not None:
            mask = Unit(0.5, f"{name} ranks", cell.rank if is_pair else cell.base.weight.shape[0]).at(3, 4)
        if cell.module_dropout is not None:
            kept = Unit(0.5, f"{name} module", 1).at(3, 4)
            modules.append((cell.dora, kept[0]))
            if cell.dora and not kept[0]:  # nothing is left of the layer, its magnitudes neither
                cell.parts()["dora_scale"].set_data(row_norms(cell.base.weight))
            mask = mask * kept
        shape = (1, -1, *(1,) * (parameter.ndim - 2)) if is_pair else (-1, 1)
        parameter.set_data(Tensor(parameter.asnumpy() * mask.reshape(shape)))
    key.set_data(Tensor(np.zeros(2, np.int32)))
    expected = graph(*small_inputs).asnumpy()
    np.testing.assert_allclose(dropped, expected, rtol=0, atol=1e-5)
    assert not np.allclose(dropped, whole, atol=1e-3)
    assert set(modules) == {(dora, kept) for dora in (False, True) for kept in (0.0, 1.0)}


def test_fp16_layers_round_their_factors_and_nothing_else(trained_net):
    """DoRA's norms and products of factors are fp32. What is read in fp16 alone may be fp16 itself."""
    _, _, _, trained, inputs, *_ = trained_net
    net = small_net_of()
    inject_lora(net, SPEC)
    for source, target in zip(trained_net[0].trainable_params(), net.trainable_params()):
        target.set_data(Tensor(source.asnumpy()))
    set_compute_dtype(net, ms.float16)
    before = Fresh(net)(*inputs).asnumpy()
    np.testing.assert_allclose(before, trained, rtol=0, atol=0.02 * np.abs(trained).max())
    cells = lora_cells(net)
    assert factors_cast_to(net, ms.float16) == [cells[f"{UNET}out.0"].lora_up.weight]
    hold_frozen_weights(net, ms.float16)
    held = {name: cell.base.weight.dtype == ms.float16 for name, cell in cells.items()}
    assert held == {name: not cell.dora for name, cell in cells.items()}
    for parameter in factors_cast_to(net, ms.float16):
        parameter.set_dtype(ms.float16)
    np.testing.assert_array_equal(Fresh(net)(*inputs).asnumpy(), before)
