"""The LoRA in memory: its formula, merging exactly and back, and refusing what was made for something else."""

from dataclasses import replace

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from ldm.errors import UserError
from ldm.lora.inject import get_lora, inject_lora, set_lora
from ldm.lora.lora import LoRA, LoRALayer, Strength
from ldm.lora.merge import check_compatible, match_lora, merge_lora, unmerge_lora
from ldm.lora.spec import LoRASpec

UNET, TEXT = "model.diffusion_model.", "cond_stage_model."
BLOCK = f"{UNET}input_blocks.0."
TO_Q = f"{BLOCK}1.transformer_blocks.0.attn1.to_q"
TO_K = f"{BLOCK}1.transformer_blocks.0.attn2.to_k"
CONV = f"{BLOCK}0.in_layers.2"
RANDOM = np.random.RandomState(0)


def normal(*shape):
    return RANDOM.standard_normal(shape).astype(np.float32)


def weights_of(net):
    return {parameter.name: parameter.asnumpy().copy() for parameter in net.get_parameters()}


def assert_unchanged(net, before):
    for name, array in weights_of(net).items():
        np.testing.assert_array_equal(array.view(np.uint8), before[name].view(np.uint8))


class Fresh(nn.Cell):
    """A network to be compiled anew, after its cells were changed."""

    def __init__(self, net):
        super().__init__(auto_prefix=False)
        self.net = net

    def construct(self, *inputs):
        return self.net(*inputs)


@pytest.fixture
def trained(small_net, randomise):
    """(network with low-rank cells of random values, its state)."""
    inject_lora(small_net, LoRASpec(rank=2, alpha=3.0, scale=0.5, targets="all"))
    randomise(small_net)
    return small_net, get_lora(small_net)


class TestLayer:
    def test_update_is_the_scaled_product(self):
        down, up = normal(2, 7), normal(5, 2)
        wanted = 0.5 * 3.0 / 2 * up.astype(np.float64) @ down
        np.testing.assert_allclose(LoRALayer(down, up, 3.0).update(0.5), wanted, rtol=1e-5, atol=1e-6)

    def test_a_convolutions_update_is_a_kernel(self):
        down, up = normal(2, 4, 3, 3), normal(5, 2, 1, 1)
        wanted = np.einsum("or,rikl->oikl", up[:, :, 0, 0], down)
        np.testing.assert_allclose(LoRALayer(down, up, 2.0).update(), wanted, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(
        "down, up",
        [((2, 7), (5, 3)), ((2,), (5, 2)), ((2, 7), (5, 2, 3, 3)), ((2, 7, 3), (5, 2)), ((0,), (0,)), ((0, 7), (5, 0))],
    )
    def test_no_pair_of_factors(self, down, up):
        with pytest.raises(ValueError):
            LoRALayer(np.zeros(down), np.zeros(up), 1.0)


class TestTakingItOut:
    def test_holds_every_injected_layer_with_its_strength(self, trained):
        net, state = trained
        parameters = net.parameters_dict()
        assert {f"{name}.lora_up.weight" for name in state.layers} == {n for n in parameters if ".lora_up." in n}
        for name, layer in state.layers.items():
            np.testing.assert_array_equal(layer.up, parameters[f"{name}.lora_up.weight"].asnumpy())
            assert layer.rank == 2 and layer.alpha == 3.0 * 0.5

    def test_is_a_copy(self, trained):
        net, state = trained
        layer = state.layers[TO_Q]
        before = layer.down.copy(), layer.up.copy()
        for parameter in net.trainable_params():
            ops.assign_add(parameter, Tensor(np.ones(parameter.shape, np.float32)))  # in place, as an optimizer does
        np.testing.assert_array_equal(layer.down, before[0])
        np.testing.assert_array_equal(layer.up, before[1])

    def test_notes_what_it_was_made_for(self, small_net, tiny_config):
        inject_lora(small_net, LoRASpec())
        assert get_lora(small_net, tiny_config).metadata == {"architecture": "custom", "prediction_type": "epsilon"}

    def test_nothing_injected(self, small_net):
        with pytest.raises(UserError, match="no LoRA layers"):
            get_lora(small_net)

    def test_parts(self, small_net):
        inject_lora(small_net, LoRASpec(rank=2, text_encoder=True))
        state = get_lora(small_net)
        unet, text = state.only("unet"), state.only("text_encoder")
        assert len(unet.layers) == 8 and list(text.layers) == [f"{TEXT}q_proj"]
        assert state.has("unet") and state.has("text_encoder")
        assert not unet.has("text_encoder") and not text.only("unet").layers
        assert "UNet: 8 layers, text encoder: 1 layers; rank 2; alpha 2" in str(state)


class TestStartingFromIt:
    @pytest.mark.parametrize("alpha, scale", [(None, 1.0), (3.0, 0.5), (1.0, 4.0)])
    def test_every_layer_begins_at_its_update(self, trained, fresh_net, alpha, scale):
        _, state = trained
        inject_lora(fresh_net, LoRASpec(rank=2, alpha=alpha, scale=scale, targets="all", seed=9))
        set_lora(fresh_net, state)
        begun = get_lora(fresh_net)
        assert begun.layers.keys() == state.layers.keys()
        for name, layer in begun.layers.items():
            np.testing.assert_array_equal(layer.down, state.layers[name].down)
            np.testing.assert_allclose(layer.update(), state.layers[name].update(), rtol=1e-5, atol=1e-7)
            assert layer.alpha == (alpha or 2) * scale

    def test_a_hard_convolution_takes_its_kernels(self, small_net, randomise, fresh_net):
        config = {"in_layers.2": {"r": 2}, "proj_in": {"r": 2, "hard": 1}}
        for net in (small_net, fresh_net):
            inject_lora(net, LoRASpec().with_config(config))
        randomise(small_net)
        state = get_lora(small_net)
        set_lora(fresh_net, state)
        for name, layer in get_lora(fresh_net).layers.items():
            np.testing.assert_array_equal(layer.up, state.layers[name].up)

    @pytest.mark.parametrize(
        "spec, words",
        [
            (LoRASpec(rank=2), "of its layers get no LoRA here.*lora_targets"),
            (LoRASpec(rank=2, targets="all", text_encoder=True), "0 of its layers.* 1 that do.*q_proj"),
            (LoRASpec(rank=3, targets="all"), "has rank 2, here it is 3: set lora_rank 2"),
        ],
    )
    def test_another_spec_is_refused(self, trained, fresh_net, spec, words):
        inject_lora(fresh_net, spec)
        before = weights_of(fresh_net)
        with pytest.raises(UserError, match=f"mine.ckpt.*{words}"):
            set_lora(fresh_net, trained[1], "mine.ckpt")
        assert_unchanged(fresh_net, before)

    def test_factors_beyond_fp32_are_refused(self, trained, fresh_net, recwarn):
        _, state = trained
        inject_lora(fresh_net, LoRASpec(rank=2, alpha=1e-9, scale=1e-9, targets="all"))
        layers = {name: replace(layer, alpha=1e30) for name, layer in state.layers.items()}
        with pytest.raises(UserError, match="at alpha 1e-18 are beyond fp32's range: set lora_alpha and lora_scale"):
            set_lora(fresh_net, LoRA(layers))
        assert not [warning for warning in recwarn if "overflow" in str(warning.message)]

    def test_a_scale_of_zero_is_refused(self, trained, fresh_net):
        inject_lora(fresh_net, LoRASpec(rank=2, scale=0.0, targets="all"))
        with pytest.raises(UserError, match="mine.ckpt.*at scale 0.*set lora_scale"):
            set_lora(fresh_net, trained[1], "mine.ckpt")

    def test_another_models_shapes_are_refused(self, trained, fresh_net):
        inject_lora(fresh_net, LoRASpec(rank=2, targets="all"))
        layer = trained[1].layers[TO_Q]
        trained[1].layers[TO_Q] = LoRALayer(layer.down[:, :-1], layer.up, layer.alpha)
        before = weights_of(fresh_net)
        with pytest.raises(UserError, match="another model"):
            set_lora(fresh_net, trained[1])
        assert_unchanged(fresh_net, before)


class TestMerging:
    def test_weights_become_base_plus_update(self, small_net):
        before = weights_of(small_net)
        kernel = LoRALayer(normal(4, 8, 3, 3), normal(8, 4, 1, 1), 1.0)
        state = LoRA({TO_Q: LoRALayer(normal(2, 8), normal(8, 2), 3.0), CONV: kernel})
        merge_lora(small_net, state, 0.7)
        after = weights_of(small_net)
        for name, layer in state.layers.items():
            up, down = layer.up.reshape(8, -1).astype(np.float64), layer.down.reshape(layer.rank, -1)
            base = before[f"{name}.weight"]
            wanted = base + (0.7 * layer.alpha / layer.rank * up @ down).reshape(base.shape)
            np.testing.assert_allclose(after[f"{name}.weight"], wanted, rtol=1e-5, atol=1e-5)
        touched = {f"{name}.weight" for name in state.layers}
        for name in after.keys() - touched:
            np.testing.assert_array_equal(after[name], before[name])

    def test_gives_the_outputs_of_the_injected_network(self, trained, small_inputs):
        net, state = trained
        compiled = Fresh(net)
        injected = compiled(*small_inputs).asnumpy()
        for parameter in net.trainable_params():
            parameter.set_data(Tensor(np.zeros(parameter.shape, np.float32)))
        base = compiled(*small_inputs).asnumpy()
        merge_lora(net, state)
        merged = compiled(*small_inputs).asnumpy()  # a compiled graph sees the new weights
        assert np.abs(injected - base).max() > 0.01
        np.testing.assert_allclose(merged, injected, rtol=0, atol=1e-5 * np.abs(injected).max())

    def test_scale_zero_changes_no_bit(self, trained):
        net, state = trained
        weight = net.parameters_dict()[f"{TO_Q}.weight"]
        weight.set_data(Tensor(np.where(weight.asnumpy() > 0.1, np.float32(-0.0), weight.asnumpy())))  # -0 + 0 is 0
        before = weights_of(net)
        assert merge_lora(net, state, 0.0).ok
        merge_lora(net, state, -0.0)
        assert_unchanged(net, before)

    def test_unmerging_returns_the_base_within_rounding(self, trained):
        net, state = trained
        before = weights_of(net)
        merge_lora(net, state, 0.8)
        changed = weights_of(net)
        unmerge_lora(net, state, 0.8)
        for name, array in weights_of(net).items():
            limit = 2 * np.spacing(np.maximum(np.abs(before[name]), np.abs(changed[name])).max(initial=0))
            assert np.abs(array - before[name]).max() <= limit

    def test_several_add_up_whatever_their_ranks(self, small_net):
        before = weights_of(small_net)[f"{TO_Q}.weight"]
        one, two = LoRALayer(normal(1, 8), normal(8, 1), 1.0), LoRALayer(normal(3, 8), normal(8, 3), 6.0)
        merge_lora(small_net, LoRA({TO_Q: one}), 0.5)
        merge_lora(small_net, LoRA({TO_Q: two}), -0.25)
        wanted = before + one.update(0.5) + two.update(-0.25)
        np.testing.assert_allclose(weights_of(small_net)[f"{TO_Q}.weight"], wanted, rtol=1e-6, atol=1e-6)

    def test_networks_have_weights_of_their_own(self, small_net):
        before = weights_of(small_net)
        text = f"{TEXT}q_proj"
        state = LoRA({TO_Q: LoRALayer(normal(2, 8), normal(8, 2), 2.0),
                           text: LoRALayer(normal(2, 6), normal(6, 2), 2.0)})  # fmt: skip
        merge_lora(small_net, state, Strength(0.5, 0.0))
        after = weights_of(small_net)
        assert after[f"{text}.weight"].tobytes() == before[f"{text}.weight"].tobytes()
        wanted = before[f"{TO_Q}.weight"] + state.layers[TO_Q].update(0.5)
        np.testing.assert_array_equal(after[f"{TO_Q}.weight"], wanted)
        merge_lora(small_net, state, Strength(-0.5, 0.25))
        wanted = before[f"{text}.weight"] + state.layers[text].update(0.25)
        np.testing.assert_array_equal(weights_of(small_net)[f"{text}.weight"], wanted)
        np.testing.assert_allclose(weights_of(small_net)[f"{TO_Q}.weight"], before[f"{TO_Q}.weight"], atol=1e-6)

    def test_half_precision_weights_are_summed_in_fp32(self, small_net):
        weight = small_net.parameters_dict()[f"{TO_Q}.weight"]
        base = (normal(8, 8) * 100).astype(np.float16)
        weight.set_dtype(ms.float16)
        weight.set_data(Tensor(base))
        layer = LoRALayer(normal(2, 8) * 300, normal(8, 2) * 300, 0.002)  # up @ down alone is beyond fp16
        merge_lora(small_net, LoRA({TO_Q: layer}))
        merged = weight.asnumpy()
        assert merged.dtype == np.float16
        np.testing.assert_array_equal(merged, (base.astype(np.float32) + layer.update()).astype(np.float16))

    @pytest.mark.parametrize("name, shape", [(TO_Q, (2, 8, 1, 1)), (f"{BLOCK}1.proj_in", (2, 8))])
    def test_linear_factors_and_1x1_convolutions_stand_for_each_other(self, small_net, name, shape):
        before = weights_of(small_net)[f"{name}.weight"]
        layer = LoRALayer(normal(*shape), normal(8, 2), 2.0)
        merge_lora(small_net, LoRA({name: layer}))
        wanted = before + layer.update().reshape(before.shape)
        np.testing.assert_array_equal(weights_of(small_net)[f"{name}.weight"], wanted)


class TestRefusing:
    def refused(self, net, state, **options):
        before = weights_of(net)
        with pytest.raises(UserError) as caught:
            merge_lora(net, state, path="style.ckpt", **options)
        assert_unchanged(net, before)
        message = str(caught.value)
        assert "style.ckpt" in message and "\n" not in message
        return message

    def test_no_layers(self, small_net):
        assert "holds no layers" in self.refused(small_net, LoRA({}))

    def test_zero_matches(self, small_net):
        layers = {f"{UNET}input_blocks.{i}.1.x.to_q": LoRALayer(normal(2, 8), normal(8, 2), 2) for i in range(3)}
        layers[f"{TEXT}layers.9.q_proj"] = LoRALayer(normal(2, 8), normal(8, 2), 2)
        message = self.refused(small_net, LoRA(layers))
        assert "matches nothing in the model (UNet: 3 unmatched; text encoder: 1 unmatched" in message

    def test_one_stray_layer(self, trained):
        net, state = trained
        layers = {**state.layers, "stray.to_q": state.layers[TO_Q]}
        message = self.refused(net, LoRA(layers))
        assert f"UNet: {len(state.layers)} matched; other: 1 unmatched; for example stray.to_q" in message

    def test_wrong_shapes(self, trained):
        net, state = trained
        layers = {**state.layers, TO_Q: LoRALayer(normal(2, 9), normal(8, 2), 2.0)}
        message = self.refused(net, LoRA(layers))
        assert "1 of a wrong shape" in message and f"{TO_Q} is (8, 9), wanted (8, 8)" in message

    def test_a_kernel_of_another_size(self, small_net):
        state = LoRA({CONV: LoRALayer(normal(2, 8, 1, 1), normal(8, 2, 1, 1), 2.0)})
        assert "(8, 8, 1, 1), wanted (8, 8, 3, 3)" in self.refused(small_net, state)

    @pytest.mark.parametrize("width, made_for", [(768, "SD1.x"), (1024, "SD2.x"), (64, "a context of 64")])
    def test_another_architecture_is_named(self, small_net, width, made_for):
        state = LoRA({TO_K: LoRALayer(normal(2, width), normal(8, 2), 2.0)})
        assert f"it was made for {made_for}, the model is of context 6" in self.refused(small_net, state)

    @pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf"), Strength(1.0, float("nan"))])
    def test_a_scale_that_is_no_number(self, trained, scale):
        net, state = trained
        assert "must be a finite number" in self.refused(net, state, scale=scale)

    @pytest.mark.parametrize("scale", [1e300, -1e42])
    def test_a_scale_beyond_fp32(self, trained, scale, recwarn):
        net, state = trained
        assert "lower its weight" in self.refused(net, state, scale=scale)
        assert not [warning for warning in recwarn if "overflow" in str(warning.message)]

    def test_a_sum_beyond_a_weights_type(self, small_net):
        weight = small_net.parameters_dict()[f"{TO_K}.weight"]
        weight.set_dtype(ms.float16)
        weight.set_data(Tensor(weight.asnumpy().astype(np.float16)))
        one, two = (LoRALayer(normal(2, width), normal(8, 2), 2.0) for width in (8, 6))
        message = self.refused(small_net, LoRA({TO_Q: one, TO_K: replace(two, alpha=1e6)}))
        assert f"{TO_K} with it is beyond the range of Float16: lower its weight" in message

    def test_matching_alone_changes_nothing_and_counts(self, trained):
        net, state = trained
        before = weights_of(net)
        match = match_lora(net, LoRA({TO_Q: state.layers[TO_Q], "x": state.layers[TO_Q]}))
        assert match.matched == {"unet": [TO_Q]} and match.unmatched == {"other": ["x"]} and not match.ok
        assert_unchanged(net, before)


class TestCompatible:
    def test_the_same_model(self, tiny_config):
        metadata = {"architecture": "custom", "prediction_type": "epsilon"}
        check_compatible(LoRA({}, metadata), tiny_config)

    def test_a_file_that_does_not_say(self, tiny_config):
        check_compatible(LoRA({}), tiny_config)

    @pytest.mark.parametrize(
        "metadata, pattern",
        [
            ({"architecture": "sd2"}, "architecture is sd2, .* is custom"),
            ({"prediction_type": "v_prediction"}, "prediction_type is v_prediction, .* is epsilon"),
        ],
    )
    def test_another_model(self, tiny_config, metadata, pattern):
        with pytest.raises(UserError, match=pattern) as caught:
            check_compatible(LoRA({}, metadata), tiny_config, "style.ckpt")
        assert "style.ckpt" in str(caught.value) and "tiny.yaml" in str(caught.value)

    def test_a_velocity_lora_on_a_velocity_model(self, tiny_config):
        config = replace(tiny_config, prediction_type="v_prediction")
        check_compatible(LoRA({}, {"prediction_type": "v_prediction"}), config)
