"""Exchanging the LoRAs that are merged into a network's weights."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from ldm.errors import UserError
from ldm.lora.lora import LoRA
from ldm.lora.merge import Update, add_updates, merge_lora
from ldm.lora.merged import MergedLoRA, MergedLoRAs, SamplingRange
from ldm.lora.strength import Strength
from ldm.lora.updates import IA3, OFT, DoRA, Full, LoRALayer
from ldm.models.layers import hold_frozen_weights
from ldm.settings.block_weights import BlockWeights
from ldm.weights.arrays import to_bfloat16
from tests.lora.helpers import CONV, TEXT, TO_K, TO_Q, Fresh, assert_unchanged, normal, weights_of

TEXT_Q = f"{TEXT}q_proj"


def linear(inputs, outputs, rank=2, alpha=3.0):
    return LoRALayer(normal(rank, inputs), normal(outputs, rank), alpha)


@pytest.fixture
def loras():
    """Three LoRAs that share some layers: two of the UNet, and one of both networks."""
    kernel = LoRALayer(normal(4, 8, 3, 3), normal(8, 4, 1, 1), 1.0)
    return {
        "style": LoRA({TO_Q: linear(8, 8), CONV: kernel}),
        "face": LoRA({TO_Q: linear(8, 8, 3), TO_K: linear(6, 8)}),
        "both": LoRA({TO_K: linear(6, 8), TEXT_Q: linear(6, 6)}),
    }


def chosen(loras, **strengths):
    return [MergedLoRA(name, loras[name], Strength.from_value(value)) for name, value in strengths.items()]


def blocks(text, unet, text_encoder=0.0):
    return Strength(unet, text_encoder, BlockWeights.parse(text))


def file_of(weights):
    """What BaseWeights.open is, over weights in memory, and the names that were read."""
    names = []

    def open_base(shapes):
        def read(name):
            assert name in shapes and weights[name].shape == shapes[name]
            names.append(name)
            return weights[name].copy()

        return read

    return open_base, names


SWITCHES = [
    {"style": 0.7},
    {"style": 0.7, "face": -0.5},
    {"face": -0.5, "style": 0.7},
    {"style": 0.3},
    {"both": Strength(0.5, 0.0)},
    {"both": Strength(0.5, 0.25), "style": 0.3},
    {"both": blocks("BASE=2", 0.5, 0.25), "style": 0.3},
    {"both": blocks("IN00=-1,BASE=2", 0.5, 0.25), "style": 0.3},
    {"both": blocks("IN00=0,BASE=0", 0.5, 0.25), "style": blocks("*=1", 0.3)},
    {"style": 0.3},
    {"face": 0.0},
    {},
]


@pytest.mark.parametrize("with_file", [False, True])
def test_the_weights_are_those_of_a_fresh_start_whatever_was_merged_before(small_net, loras, with_file):
    base = weights_of(small_net)
    merged = MergedLoRAs(small_net, file_of(base)[0] if with_file else None)
    for strengths in SWITCHES:
        merged.set(chosen(loras, **strengths))
        switched = weights_of(small_net)
        for parameter in small_net.get_parameters():
            parameter.set_data(Tensor(base[parameter.name]))
        for name, strength in strengths.items():
            merge_lora(small_net, loras[name], strength)
        fresh = weights_of(small_net)
        for name in base:
            assert switched[name].tobytes() == fresh[name].tobytes(), (name, strengths)
            small_net.parameters_dict()[name].set_data(Tensor(switched[name]))


@pytest.mark.parametrize("with_file", [False, True])
def test_in_bf16_each_sum_is_rounded_once_and_the_base_comes_back_bit_for_bit(small_net, loras, with_file):
    base = weights_of(small_net)
    hold_frozen_weights(small_net, ms.bfloat16)
    held = weights_of(small_net)
    start = base if with_file else {name: array.astype(np.float32) for name, array in held.items()}
    merged = MergedLoRAs(small_net, file_of(base)[0] if with_file else None)
    for strengths in SWITCHES:
        merged.set(chosen(loras, **strengths))
        found = weights_of(small_net)
        updates = {}
        for name, strength in strengths.items():
            strength = Strength.from_value(strength)
            for weight, update in loras[name].updates().items():
                if strength.of_layer(weight):
                    updates.setdefault(weight, []).append(Update(update, strength.of_layer(weight), name))
        for name, array in found.items():
            if name not in updates:
                assert array.tobytes() == held[name].tobytes(), (name, strengths)
            else:
                assert array.tobytes() == to_bfloat16(add_updates(start[name], updates[name], np.float32)).tobytes()
    assert not merged._updates and found[f"{TO_Q}.weight"].dtype.name == "bfloat16"
    merge_lora(small_net, loras["both"], 0.5)  # without the base's files: the sum with the rounded weight
    update = [Update(loras["both"].layers[TO_K], 0.5, "")]
    expected = to_bfloat16(add_updates(held[f"{TO_K}.weight"].astype(np.float32), update, np.float32))
    assert small_net.parameters_dict()[f"{TO_K}.weight"].asnumpy().tobytes() == expected.tobytes()


def test_the_order_of_two_loras_is_that_of_the_sums(small_net):
    weight = small_net.parameters_dict()[f"{TO_Q}.weight"]
    weight.set_data(Tensor(np.ones((8, 8), np.float32)))
    # 1 + 2^-24 is 1 in fp32, and 1 + 2 is 3: the small update counts only where it is added to -1 + 1 = 0.
    large, small = (LoRA({TO_Q: LoRALayer(np.ones((1, 8)), np.ones((8, 1)), alpha)}) for alpha in (-1.0, 2.0**-24))
    merged = MergedLoRAs(small_net)
    entries = MergedLoRA("large", large, Strength()), MergedLoRA("small", small, Strength())
    merged.set(entries)
    assert (weight.asnumpy() == 2.0**-24).all()
    merged.set(entries[::-1])
    assert (weight.asnumpy() == 0).all()


@pytest.mark.parametrize("with_file", [False, True])
@pytest.mark.parametrize("strength", [0.0, -0.0])
def test_strength_zero_and_no_lora_give_the_base_model_bit_for_bit(small_net, loras, with_file, strength):
    weight = small_net.parameters_dict()[f"{TO_Q}.weight"]
    weight.set_data(Tensor(np.where(weight.asnumpy() > 0.1, np.float32(-0.0), weight.asnumpy())))  # -0 + 0 is 0
    before = weights_of(small_net)
    merged = MergedLoRAs(small_net, file_of(before)[0] if with_file else None)
    for off in (chosen(loras, style=strength, both=strength), []):
        merged.set(off)
        assert_unchanged(small_net, before)
        merged.set(chosen(loras, style=1e4, face=0.1))
        merged.set(off)
        assert_unchanged(small_net, before)


def test_a_file_that_fails_while_weights_are_written_is_seen(small_net, loras):
    """`loras` is that of before then, and so does not tell."""
    open_base, names = file_of(weights_of(small_net))
    for parameter in small_net.get_parameters():  # rounded weights are summed anew from the file's
        parameter.set_dtype(ms.float16)

    def open_failing(shapes):
        read = open_base(shapes)

        def read_one(name):
            if names:
                raise UserError("the file is gone")
            return read(name)

        return read_one

    net = MergedLoRAs(small_net, open_failing)
    assert net.holds_base_weights
    with pytest.raises(UserError, match="gone"):
        net.set(chosen(loras, style=0.7, both=Strength(0.5, 0.25)))
    assert net.loras == () and not net.holds_base_weights
    names.clear()
    net.set([])  # the one weight that was written
    assert net.holds_base_weights


def test_only_weights_that_change_are_written_and_read(small_net, loras, monkeypatch):
    open_base, read = file_of(weights_of(small_net))
    merged = MergedLoRAs(small_net, open_base)
    written = []
    set_data = ms.Parameter.set_data
    monkeypatch.setattr(ms.Parameter, "set_data", lambda p, *args: written.append(p.name) or set_data(p, *args))

    def changes(**strengths):
        written.clear(), read.clear()
        merged.set(chosen(loras, **strengths))
        return sorted(written), sorted(read)

    to_q, to_k, conv, text = (f"{name}.weight" for name in (TO_Q, TO_K, CONV, TEXT_Q))
    assert changes(style=0.7) == (sorted([to_q, conv]), [])  # the weights are the base model's
    assert changes(style=0.7, both=0.5) == (sorted([to_k, text]), [])
    assert changes(style=0.7, both=Strength(0.5, 0.2)) == ([text], [text])
    assert changes(style=0.7, both=Strength(0.5, 0.2), face=1.0) == (sorted([to_q, to_k]), [])  # added to the rest
    assert changes(face=1.0) == (sorted([to_q, to_k, conv, text]), sorted([to_q, to_k, conv, text]))
    assert changes(face=1.0) == ([], [])


def test_copies_are_held_only_while_a_lora_is_merged_into_the_weight(small_net, loras):
    merged = MergedLoRAs(small_net)
    merged.set(chosen(loras, style=0.7, both=Strength(0.0, 0.5)))
    assert set(merged._copies) == {f"{TO_Q}.weight", f"{CONV}.weight", f"{TEXT_Q}.weight"}
    merged.set(chosen(loras, both=0.5))
    assert set(merged._copies) == {f"{TO_K}.weight", f"{TEXT_Q}.weight"}
    merged.set([])
    assert not merged._copies


def test_weights_held_in_fp16_are_the_fp32_sums_rounded_once(small_net, loras):
    """What an fp16 layer computes with an fp32 weight, which it casts at each use."""
    base = weights_of(small_net)
    for parameter in small_net.get_parameters():
        parameter.set_dtype(ms.float16)
        parameter.set_data(Tensor(base[parameter.name].astype(np.float16)))
    held = weights_of(small_net)
    merged = MergedLoRAs(small_net, file_of(base)[0])
    for strengths in ({"style": 0.7}, {"style": 0.7, "face": 0.01}, {"face": 0.01}):
        merged.set(chosen(loras, **strengths))
        wanted = {name: array.copy() for name, array in base.items()}
        for name, strength in strengths.items():
            for layer_name, layer in loras[name].layers.items():
                wanted[f"{layer_name}.weight"] += layer.update(strength)
        for name, array in weights_of(small_net).items():
            assert array.tobytes() == wanted[name].astype(np.float16).tobytes()
    merged.set([])
    assert_unchanged(small_net, held)


def test_a_compiled_graph_sees_the_new_weights_and_is_not_compiled_again(small_net, small_inputs, loras):
    compiled = Fresh(small_net)
    merged = MergedLoRAs(small_net)
    base = compiled(*small_inputs).asnumpy()
    for strengths in SWITCHES[:-2]:
        merged.set(chosen(loras, **strengths))
        assert np.abs(compiled(*small_inputs).asnumpy() - base).max() > 1e-3
    merged.set([])
    assert compiled(*small_inputs).asnumpy().tobytes() == base.tobytes()
    assert len(compiled.compile_cache) == 1


class TestRefusing:
    def refused(self, net, loras, wrong):
        merged = MergedLoRAs(net)
        merged.set(chosen(loras, style=0.7))
        before = weights_of(net)
        with pytest.raises(UserError) as caught:
            merged.set([*chosen(loras, face=1.0), wrong])
        assert_unchanged(net, before)
        assert [lora.name for lora in merged.loras] == ["style"]
        merged.set([])
        return str(caught.value)

    def test_the_second_of_two_does_not_fit(self, small_net, loras):
        wrong = MergedLoRA("wrong.ckpt", LoRA({TO_Q: linear(9, 8)}), Strength())
        before = weights_of(small_net)
        assert "wrong.ckpt matches nothing in the model" in self.refused(small_net, loras, wrong)
        assert_unchanged(small_net, before)

    def test_a_strength_that_is_no_number(self, small_net, loras):
        wrong = MergedLoRA("wrong.ckpt", loras["both"], Strength(float("nan"), 1.0))
        assert "wrong.ckpt is nan" in self.refused(small_net, loras, wrong)

    def test_block_weights_of_another_model(self, small_net, loras):
        for text, words in (("OUTALL", "has IN00: name"), ("OUT00=0", "no block OUT00. It has IN00")):
            wrong = MergedLoRA("wrong.ckpt", loras["both"], blocks(text, 0.5))
            message = self.refused(small_net, loras, wrong)
            assert "wrong.ckpt: block weights" in message and words in message

    def test_the_lora_that_makes_a_sum_overflow_is_named(self, small_net, loras):
        wrong = MergedLoRA("wrong.ckpt", loras["both"], Strength(1e300, 1.0))
        message = self.refused(small_net, loras, wrong)
        assert "wrong.ckpt at strength 1e+300" in message and TO_K in message and "lower the strength" in message


# ---- LoRAs that are applied at some steps of the sampling ------------------------------------------------------------


@pytest.mark.parametrize("with_file", [False, True])
def test_a_lora_that_is_switched_off_keeps_its_text_encoder_part_alone(small_net, loras, with_file):
    base = weights_of(small_net)
    merged = MergedLoRAs(small_net, file_of(base)[0] if with_file else None)
    entries = chosen(loras, both=Strength(0.5, 0.25), style=0.3)
    merged.set(entries)
    on = weights_of(small_net)

    def expected(**strengths):
        reference = MergedLoRAs(small_net, file_of(base)[0])
        for parameter in small_net.get_parameters():
            parameter.set_data(Tensor(base[parameter.name]))
        reference.set(chosen(loras, **strengths))
        return weights_of(small_net)

    merged.switch([False, True])
    without_both = weights_of(small_net)
    merged.switch([False, False])
    without_any = weights_of(small_net)
    assert merged.loras == tuple(entries)  # what is merged stays known
    merged.switch([True, True])
    assert_unchanged(small_net, on)
    merged.set([])
    assert_unchanged(small_net, base)
    for name, array in expected(both=Strength(0.0, 0.25), style=0.3).items():
        assert array.tobytes() == without_both[name].tobytes(), name
    for name, array in expected(both=Strength(0.0, 0.25)).items():
        assert array.tobytes() == without_any[name].tobytes(), name


def test_a_lora_that_is_switched_off_keeps_its_text_encoder_part_with_its_block_weight(small_net, loras):
    base = weights_of(small_net)
    merged = MergedLoRAs(small_net)
    merged.set(chosen(loras, both=blocks("IN00=3,BASE=2", 0.5, 0.25)))
    on = weights_of(small_net)
    update = loras["both"].layers[TEXT_Q].update(0.5)
    np.testing.assert_allclose(on[f"{TEXT_Q}.weight"], base[f"{TEXT_Q}.weight"] + update, rtol=1e-6)
    merged.switch([False])
    off = weights_of(small_net)
    assert off[f"{TEXT_Q}.weight"].tobytes() == on[f"{TEXT_Q}.weight"].tobytes()
    assert off[f"{TO_K}.weight"].tobytes() == base[f"{TO_K}.weight"].tobytes() != on[f"{TO_K}.weight"].tobytes()
    merged.switch([True])
    assert_unchanged(small_net, on)


def test_block_weights_write_the_weights_of_their_blocks_alone(small_net, loras, monkeypatch):
    merged = MergedLoRAs(small_net)
    merged.set(chosen(loras, both=Strength(0.5, 0.25)))
    written = []
    set_data = ms.Parameter.set_data

    def spy(parameter, data):
        written.append(parameter.name)
        return set_data(parameter, data)

    monkeypatch.setattr(ms.Parameter, "set_data", spy)
    merged.set(chosen(loras, both=blocks("*=1", 0.5, 0.25)))
    assert not written  # the same strengths
    merged.set(chosen(loras, both=blocks("BASE=2", 0.5, 0.25)))
    assert written == [f"{TEXT_Q}.weight"]
    merged.set(chosen(loras, both=blocks("BASE=2,IN00=0", 0.5, 0.25)))
    assert written == [f"{TEXT_Q}.weight", f"{TO_K}.weight"]


def test_a_block_weight_of_0_for_all_layers_of_the_unet_is_no_unet_part(loras):
    def applies(strength):
        return chosen(loras, both=strength)[0].applies_to_unet

    assert [applies(Strength(0.5, 0.0)), applies(blocks("IN00=2,BASE=0", 0.5))] == [True, True]
    assert [applies(Strength(0.0, 1.0)), applies(blocks("IN00=0", 0.5, 1.0))] == [False, False]


def test_what_block_weights_leave_out_is_said_once(small_net, loras, caplog):
    merged = MergedLoRAs(small_net)
    (first,) = chosen(loras, style=blocks("IN00=2,BASE=0", 0.5))
    merged.set([first])
    assert "style has no layer in BASE" in caplog.text
    caplog.clear()
    merged.set([first, *chosen(loras, face=0.5)])
    assert not caplog.text


def test_a_switch_to_the_present_state_writes_nothing(small_net, loras, monkeypatch):
    merged = MergedLoRAs(small_net)
    merged.set(chosen(loras, style=0.3))
    monkeypatch.setattr(ms.Parameter, "set_data", lambda *_: pytest.fail("a weight was written"))
    merged.switch([True])


@pytest.mark.parametrize(
    "start, end, steps, active",
    [
        (0.0, 1.0, 4, [0, 1, 2, 3]),
        (0.5, None, 4, [2, 3]),
        (None, 0.5, 4, [0, 1]),
        (0.3, 0.7, 10, [3, 4, 5, 6]),
        (0.3, 1.0, 4, [2, 3]),  # the step from 0.25 to 0.5 is not in it as a whole
        (0.0, 0.7, 4, [0, 1]),
        (0.3, 0.4, 4, []),
    ],
)
def test_the_steps_are_those_of_control_guidance_start_and_end(loras, start, end, steps, active):
    merged = MergedLoRA("style", loras["style"], Strength(), SamplingRange.from_ends(start, end))
    assert [step for step in range(steps) if merged.is_active(step, steps, 999)] == active


def test_without_a_range_the_time_steps_of_the_training_decide(loras):
    at = [999, 550, 549, 200, 199, 1]
    lora = LoRA(loras["style"].layers, {"min_timestep": "200", "max_timestep": "550"})
    for of, sampling_range, wanted in (
        (lora, None, [549, 200]),
        (lora, SamplingRange(), at),
        (loras["style"], None, at),
    ):
        merged = MergedLoRA("style", of, Strength(), sampling_range)
        assert [timestep for timestep in at if merged.is_active(0, 1, timestep)] == wanted


@pytest.mark.parametrize("ends", [(0.5, 0.5), (0.7, 0.3), (-0.1, 1.0), (0.0, 1.1), (float("nan"), 1.0), (1.0, None)])
def test_an_empty_or_impossible_range_is_refused(ends):
    with pytest.raises(UserError, match="start must be at least 0 and below end"):
        SamplingRange.from_ends(*ends)


@pytest.fixture
def other_kinds():
    """Two LoRAs of kinds that depend on the weight, and one of pairs and biases, on layers that they share."""
    magnitude = 1 + np.abs(normal(8))
    return {
        "dora": LoRA({TO_Q: DoRA(linear(8, 8), magnitude), CONV: IA3(0.1 * normal(8), True, 4)}),
        "oft": LoRA({TO_Q: OFT(normal(4, 2, 2)), TO_K: DoRA(linear(6, 8), 1 + np.abs(normal(6)), on_input=True)}),
        "pairs": LoRA({TO_Q: linear(8, 8)}, {}, {}, {CONV: Full(normal(8), "diff_b")}),
    }


@pytest.mark.parametrize("dtype", [ms.float32, ms.float16])
@pytest.mark.parametrize("with_file", [False, True])
def test_kinds_that_depend_on_the_weight_are_exchanged_and_switched(small_net, other_kinds, dtype, with_file):
    """Each is applied to the sum of the weight and those before it, whatever was merged before."""
    for parameter in small_net.get_parameters():
        parameter.set_dtype(dtype)
    base = weights_of(small_net)
    files = {name: array.astype(np.float32) for name, array in base.items()}
    merged = MergedLoRAs(small_net, file_of(files)[0] if with_file else None)

    def wanted(**strengths):
        result = dict(base)
        for name in base:
            updates = [
                Update(other_kinds[lora].updates()[name], strength, lora)
                for lora, strength in strengths.items()
                if strength and name in other_kinds[lora].updates()
            ]
            if updates:
                result[name] = add_updates(files[name], updates, base[name].dtype)
        return result

    def assert_weights(weights):
        for name, array in weights_of(small_net).items():
            assert array.tobytes() == weights[name].tobytes(), name

    for strengths in (
        {"dora": 1.0},
        {"pairs": 0.5, "dora": 0.7},
        {"dora": 0.7, "pairs": 0.5, "oft": 1.0},
        {"oft": -0.5},
    ):
        merged.set(chosen(other_kinds, **strengths))
        assert_weights(wanted(**strengths))
    merged.set(chosen(other_kinds, dora=0.7, oft=1.0, pairs=0.5))
    merged.switch((False, True, True))
    assert_weights(wanted(dora=0.0, oft=1.0, pairs=0.5))
    merged.switch((True, True, False))
    assert_weights(wanted(dora=0.7, oft=1.0, pairs=0.0))
    merged.set([])
    assert_weights(base)


def test_a_dora_that_leaves_the_range_of_fp16_is_named(small_net):
    for parameter in small_net.get_parameters():
        parameter.set_dtype(ms.float16)
    merged = MergedLoRAs(small_net)
    too_large = LoRA({TO_Q: DoRA(linear(8, 8), np.full(8, 1e6, np.float32))})
    before = weights_of(small_net)
    with pytest.raises(UserError, match="big at strength 1: the sum with .*to_q is outside the range of float16"):
        merged.set([MergedLoRA("big", too_large, Strength())])
    assert_unchanged(small_net, before)
