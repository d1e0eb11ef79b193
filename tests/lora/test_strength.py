"""The strength of each layer: by network, and by block of the UNet."""

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.lora.algebra import weighted_sum
from ldm.lora.formats.modules import known_bases
from ldm.lora.lora import LoRA
from ldm.lora.merge import merge_lora, unmerge_lora
from ldm.lora.strength import Strength
from ldm.lora.updates import Full, LoRALayer
from ldm.settings.block_weights import SD_BLOCKS, BlockWeights
from tests.lora.helpers import CONV, TEXT, TO_K, TO_Q, UNET, assert_unchanged, normal, weights_of

SD1, SD2, NANO = known_bases()
ONES = ",".join(["1"] * 26)
TEXT_Q, OUT = f"{TEXT}q_proj", f"{UNET}out.0"


def weights(text, unet=1.0, text_encoder=1.0):
    return Strength(unet, text_encoder, BlockWeights.parse(text))


def sd_lora(*ends, base=SD1, **metadata):
    """A LoRA of small random factors on the layers of a base model whose names end so. Sums do not compare shapes."""
    names = [module.name for module in base.modules if module.name.endswith(ends)]
    return LoRA({name: LoRALayer(normal(2, 3), normal(4, 2), 1.0) for name in names}, metadata)


def assert_same(found, expected):
    assert found.layers.keys() == expected.layers.keys()
    for name, layer in expected.layers.items():
        other = found.layers[name]
        assert layer.up.tobytes() == other.up.tobytes() and layer.down.tobytes() == other.down.tobytes(), name
        assert layer.alpha == other.alpha


def test_the_factor_of_a_block_multiplies_the_strength_of_its_network():
    strength = weights("BASE=0.5,IN04=3,MID=0,OUT*=-1,OUT11=2", unet=0.5, text_encoder=0.25)
    for name, expected in {
        f"{UNET}input_blocks.4.1.proj_in": 1.5,
        f"{UNET}input_blocks.5.1.proj_in": 0.5,
        f"{UNET}middle_block.1.proj_in": 0.0,
        f"{UNET}output_blocks.1.0.emb_layers.1": -0.5,
        f"{UNET}output_blocks.11.1.proj_in": 1.0,
        f"{UNET}time_embed.0": 0.5,
        f"{UNET}out.2": 0.5,
        "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1": 0.125,
    }.items():
        assert strength.of_layer(name) == expected, name
        assert (-strength).of_layer(name) == -expected
    assert strength.without_unet().of_layer(f"{TEXT}x") == 0.125
    assert strength.without_unet().of_layer(f"{UNET}input_blocks.4.1.proj_in") == 0.0


def test_a_strength_says_its_blocks():
    assert str(weights("outall", 0.7, 0.7)) == "0.7, blocks OUTALL"
    assert str(weights("MID=0.5, OUT3=0", 0.7, 0.3)) == "0.7 (text encoder 0.3), blocks MID=0.5,OUT3=0"
    assert Strength.from_numbers([0.7], blocks=BlockWeights.parse("OUTALL")) == weights("OUTALL", 0.7, 0.7)
    assert Strength.from_numbers([0.7, 0.2], 1.0) == Strength(0.7, 0.2) != weights("OUTALL", 0.7, 0.2)


def test_ones_change_no_bit():
    lora = sd_lora("to_q", "in_layers.2", "time_embed.0", "q_proj", "op")
    plain_sum = weighted_sum([(lora, Strength(0.7, 0.3))])
    for ones in (ONES, ONES[2:], "*=1"):
        assert_same(weighted_sum([(lora, weights(ones, 0.7, 0.3))]), plain_sum)
    attention = sd_lora("to_q", "q_proj")
    for ones in ("ALL", ONES[18:]):
        assert_same(
            weighted_sum([(attention, weights(ones, 0.7, 0.3))]), weighted_sum([(attention, Strength(0.7, 0.3))])
        )


@pytest.mark.parametrize("base", [SD1, SD2])
@pytest.mark.parametrize("block", ["BASE", *SD_BLOCKS])
def test_a_block_of_0_gives_the_sum_of_a_lora_without_its_layers(base, block):
    lora = sd_lora("to_q", "in_layers.2", "q_proj", "op", "input_blocks.0.0", base=base)
    prefix = {"BASE": "cond_stage_model.", "MID": f"{UNET}middle_block.", "IN": f"{UNET}input_blocks.",
              "OUT": f"{UNET}output_blocks."}[block.rstrip("0123456789")]  # fmt: skip
    prefix += f"{int(block[-2:])}." if block[-1].isdigit() else ""
    rest = LoRA({name: layer for name, layer in lora.layers.items() if not name.startswith(prefix)})
    assert 0 < len(rest.layers) < len(lora.layers)
    numbers = ["0" if other == block else "1" for other in ("BASE", *SD_BLOCKS)]
    for text in (f"{block}=0", ",".join(numbers)):
        assert_same(weighted_sum([(lora, weights(text, 0.7, 0.3))]), weighted_sum([(rest, Strength(0.7, 0.3))]))


def test_merged_weights_and_biases_are_those_of_each_layers_strength(small_net):
    lora = LoRA({TO_Q: LoRALayer(normal(2, 8), normal(8, 2), 3.0), TEXT_Q: LoRALayer(normal(2, 6), normal(6, 2), 3.0),
                 OUT: LoRALayer(normal(2, 8, 3, 3), normal(4, 2, 1, 1), 1.0)},
                biases={CONV: Full(normal(8)), TEXT_Q: Full(normal(6))})  # fmt: skip
    before = weights_of(small_net)
    strength = weights("IN00=0.5,BASE=-2", 0.7, 0.3)
    merge_lora(small_net, lora, strength)
    after = weights_of(small_net)
    factors = {f"{TO_Q}.weight": 0.35, f"{TEXT_Q}.weight": -0.6, f"{OUT}.weight": 0.7, f"{CONV}.bias": 0.35,
               f"{TEXT_Q}.bias": -0.6}  # fmt: skip
    assert factors.keys() == lora.updates().keys()
    for name, factor in factors.items():
        expected = before[name] + lora.updates()[name].update(factor, before[name]).reshape(before[name].shape)
        np.testing.assert_allclose(after[name], expected, rtol=1e-6, atol=1e-6)
    unmerge_lora(small_net, lora, strength)
    for name, array in weights_of(small_net).items():
        np.testing.assert_allclose(array, before[name], atol=1e-6)


# ---- what does not fit -----------------------------------------------------------------------------------------------


def test_block_weights_for_another_model_leave_the_weights_as_they_are(small_net):
    lora = LoRA({TO_Q: LoRALayer(normal(2, 8), normal(8, 2), 3.0)})
    before = weights_of(small_net)
    for text, words in (("OUTALL", "a.ckpt: block weights.*17 numbers.*has IN00"), ("MID=0", "no block MID")):
        with pytest.raises(UserError, match=words):
            merge_lora(small_net, lora, weights(text), "a.ckpt")
        with pytest.raises(UserError, match="block weights"):
            unmerge_lora(small_net, lora, weights(text))
    assert_unchanged(small_net, before)


@pytest.mark.parametrize("lora", [sd_lora("to_q", base=NANO), sd_lora("attn1.to_q", "q_proj", architecture="nano")])
@pytest.mark.parametrize("text", ["OUTALL", ONES, ONES[2:]])
def test_numbers_are_refused_in_a_sum_of_loras_of_another_model(lora, text):
    with pytest.raises(UserError, match="numbers are for the blocks of Stable Diffusion.* has .*IN01.*MID.*OUT"):
        weighted_sum([(lora, weights(text))])
    weighted_sum([(lora, weights("MID=0.5"))])


def test_layers_that_17_numbers_do_not_name_are_left_out_and_counted(caplog):
    lora = sd_lora("to_q", "op", "conv", "input_blocks.0.0")
    unnamed = [f"{UNET}{name}" for name in ("input_blocks.0.0", "input_blocks.3.0.op", "input_blocks.6.0.op",
                                            "input_blocks.9.0.op", "output_blocks.2.1.conv")]  # fmt: skip
    rest = LoRA({name: layer for name, layer in lora.layers.items() if name not in unnamed})
    assert len(rest.layers) == len(lora.layers) - 5
    assert_same(weighted_sum([(lora, weights("ALL"))]), rest)
    weights("ALL").warn_of_layers(lora, "a.ckpt")
    (record,) = caplog.records
    assert "a.ckpt: 5 layers in IN00, IN03, IN06, IN09, OUT02 are left out" in record.getMessage()
    caplog.clear()
    weights(ONES).warn_of_layers(lora, "a.ckpt")
    weights("ALL").warn_of_layers(sd_lora("to_q", "q_proj"), "a.ckpt")
    weights(ONES[2:]).warn_of_layers(sd_lora("to_q", "q_proj"), "a.ckpt")  # the text encoder keeps its strength
    Strength(0.5).warn_of_layers(lora, "a.ckpt")
    assert not caplog.records


def test_names_without_layers_and_layers_without_block_are_reported(caplog):
    weights("IN00=0,BASE=0,MID=0").warn_of_layers(sd_lora("to_q"), "a.ckpt")
    assert "a.ckpt has no layer in IN00, BASE: its factor has no effect" in caplog.text
    caplog.clear()
    weights("MID=0").warn_of_layers(sd_lora("to_q", "time_embed.0", "time_embed.2"), "a.ckpt")
    assert "a.ckpt: 2 layers outside of the blocks keep the UNet's strength" in caplog.text


def test_a_merge_reports_them(small_net, caplog):
    lora = LoRA(
        {OUT: LoRALayer(normal(2, 8, 3, 3), normal(4, 2, 1, 1), 1.0), TO_K: LoRALayer(normal(2, 6), normal(8, 2), 1.0)}
    )
    merge_lora(small_net, lora, weights("IN00=0"), "a.ckpt")
    assert "a.ckpt: 1 layers outside of the blocks" in caplog.text
