"""Merging a LoRA into a network's weights, taking it out again, and refusing one that was made for another model."""

import re
from dataclasses import replace

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from ldm.errors import UserError
from ldm.lora.lora import LoRA
from ldm.lora.merge import check_compatible, match_lora, merge_lora, unmerge_lora
from ldm.lora.strength import Strength
from ldm.lora.updates import LoRALayer
from tests.lora.helpers import BLOCK, CONV, TEXT, TO_K, TO_Q, UNET, Fresh, assert_unchanged, normal, weights_of


class TestMerging:
    def test_weights_become_base_plus_update(self, small_net):
        before = weights_of(small_net)
        kernel = LoRALayer(normal(4, 8, 3, 3), normal(8, 4, 1, 1), 1.0)
        lora = LoRA({TO_Q: LoRALayer(normal(2, 8), normal(8, 2), 3.0), CONV: kernel})
        merge_lora(small_net, lora, 0.7)
        after = weights_of(small_net)
        for name, layer in lora.layers.items():
            up, down = layer.up.reshape(8, -1).astype(np.float64), layer.down.reshape(layer.rank, -1)
            base = before[f"{name}.weight"]
            wanted = base + (0.7 * layer.alpha / layer.rank * up @ down).reshape(base.shape)
            np.testing.assert_allclose(after[f"{name}.weight"], wanted, rtol=1e-5, atol=1e-5)
        touched = {f"{name}.weight" for name in lora.layers}
        for name in after.keys() - touched:
            np.testing.assert_array_equal(after[name], before[name])

    def test_gives_the_outputs_of_the_injected_network(self, trained, small_inputs):
        net, lora = trained
        compiled = Fresh(net)
        injected = compiled(*small_inputs).asnumpy()
        for parameter in net.trainable_params():
            parameter.set_data(Tensor(np.zeros(parameter.shape, np.float32)))
        base = compiled(*small_inputs).asnumpy()
        merge_lora(net, lora)
        merged = compiled(*small_inputs).asnumpy()  # a compiled graph sees the new weights
        assert np.abs(injected - base).max() > 0.01
        np.testing.assert_allclose(merged, injected, rtol=0, atol=1e-5 * np.abs(injected).max())

    def test_strength_zero_changes_no_bit(self, trained):
        net, lora = trained
        weight = net.parameters_dict()[f"{TO_Q}.weight"]
        weight.set_data(Tensor(np.where(weight.asnumpy() > 0.1, np.float32(-0.0), weight.asnumpy())))  # -0 + 0 is 0
        before = weights_of(net)
        assert merge_lora(net, lora, 0.0).ok
        merge_lora(net, lora, -0.0)
        assert_unchanged(net, before)

    def test_unmerging_returns_the_base_within_rounding(self, trained):
        net, lora = trained
        before = weights_of(net)
        merge_lora(net, lora, 0.8)
        changed = weights_of(net)
        unmerge_lora(net, lora, 0.8)
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

    def test_networks_have_strengths_of_their_own(self, small_net):
        before = weights_of(small_net)
        text = f"{TEXT}q_proj"
        lora = LoRA({TO_Q: LoRALayer(normal(2, 8), normal(8, 2), 2.0),
                           text: LoRALayer(normal(2, 6), normal(6, 2), 2.0)})  # fmt: skip
        merge_lora(small_net, lora, Strength(0.5, 0.0))
        after = weights_of(small_net)
        assert after[f"{text}.weight"].tobytes() == before[f"{text}.weight"].tobytes()
        wanted = before[f"{TO_Q}.weight"] + lora.layers[TO_Q].update(0.5)
        np.testing.assert_array_equal(after[f"{TO_Q}.weight"], wanted)
        merge_lora(small_net, lora, Strength(-0.5, 0.25))
        wanted = before[f"{text}.weight"] + lora.layers[text].update(0.25)
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
    def refused(self, net, lora, **options):
        before = weights_of(net)
        with pytest.raises(UserError) as caught:
            merge_lora(net, lora, path="style.ckpt", **options)
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
        net, lora = trained
        layers = {**lora.layers, "stray.to_q": lora.layers[TO_Q]}
        message = self.refused(net, LoRA(layers))
        assert f"UNet: {len(lora.layers)} matched; other: 1 unmatched; for example stray.to_q" in message

    def test_wrong_shapes(self, trained):
        net, lora = trained
        layers = {**lora.layers, TO_Q: LoRALayer(normal(2, 9), normal(8, 2), 2.0)}
        message = self.refused(net, LoRA(layers))
        assert "1 of a wrong shape" in message and f"{TO_Q} is (8, 9), wanted (8, 8)" in message

    def test_a_kernel_of_another_size(self, small_net):
        lora = LoRA({CONV: LoRALayer(normal(2, 8, 1, 1), normal(8, 2, 1, 1), 2.0)})
        assert "(8, 8, 1, 1), wanted (8, 8, 3, 3)" in self.refused(small_net, lora)

    @pytest.mark.parametrize("width, made_for", [(768, "SD1.x"), (1024, "SD2.x"), (64, "width 64")])
    def test_another_architecture_is_named(self, small_net, width, made_for):
        lora = LoRA({TO_K: LoRALayer(normal(2, width), normal(8, 2), 2.0)})
        assert re.search(f"it was made for .*{made_for}, not for .* width 6", self.refused(small_net, lora))

    @pytest.mark.parametrize("strength", [float("nan"), float("inf"), -float("inf"), Strength(1.0, float("nan"))])
    def test_a_strength_that_is_no_number(self, trained, strength):
        net, lora = trained
        assert "must be a finite number" in self.refused(net, lora, strength=strength)

    @pytest.mark.parametrize("strength", [1e300, -1e42])
    def test_a_strength_beyond_fp32(self, trained, strength, recwarn):
        net, lora = trained
        assert "lower the strength" in self.refused(net, lora, strength=strength)
        assert not [warning for warning in recwarn if "overflow" in str(warning.message)]

    def test_a_sum_beyond_a_weights_type(self, small_net):
        weight = small_net.parameters_dict()[f"{TO_K}.weight"]
        weight.set_dtype(ms.float16)
        weight.set_data(Tensor(weight.asnumpy().astype(np.float16)))
        one, two = (LoRALayer(normal(2, width), normal(8, 2), 2.0) for width in (8, 6))
        message = self.refused(small_net, LoRA({TO_Q: one, TO_K: replace(two, alpha=1e6)}))
        assert f"{TO_K} is outside the range of float16: lower the strength" in message

    def test_matching_alone_changes_nothing_and_counts(self, trained):
        net, lora = trained
        before = weights_of(net)
        match = match_lora(net, LoRA({TO_Q: lora.layers[TO_Q], "x": lora.layers[TO_Q]}))
        assert match.matched == [TO_Q] and match.unmatched == ["x"] and not match.ok
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
