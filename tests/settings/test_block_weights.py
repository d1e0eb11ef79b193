"""Block weights: which block each number and name is, which models they suit, and errors for what they cannot be."""

import pytest

from ldm.errors import UserError
from ldm.settings.block_weights import (
    BASE,
    FORMS,
    PRESETS,
    SD_BLOCKS,
    BlockWeights,
    block_names,
    block_of,
    block_weights_of_each,
    spans,
    unet_blocks,
)
from ldm.settings.model import load_model_config
from ldm.weights.names.diffusers import unet_modules
from tests.conftest import ROOT

# The order of the numbers, as the published names of the UNet's blocks; "" is the text encoder.
OF_17 = """
    - input_blocks.1 input_blocks.2 input_blocks.4 input_blocks.5 input_blocks.7 input_blocks.8 middle_block
    output_blocks.3 output_blocks.4 output_blocks.5 output_blocks.6 output_blocks.7 output_blocks.8 output_blocks.9
    output_blocks.10 output_blocks.11
""".split()  # fmt: skip
OF_25 = """
    input_blocks.0 input_blocks.1 input_blocks.2 input_blocks.3 input_blocks.4 input_blocks.5 input_blocks.6
    input_blocks.7 input_blocks.8 input_blocks.9 input_blocks.10 input_blocks.11 middle_block output_blocks.0
    output_blocks.1 output_blocks.2 output_blocks.3 output_blocks.4 output_blocks.5 output_blocks.6 output_blocks.7
    output_blocks.8 output_blocks.9 output_blocks.10 output_blocks.11
""".split()  # fmt: skip
GOLDEN = {17: OF_17, 25: OF_25, 26: ["-", *OF_25]}
# Where the attention of diffusers' SD1.x is, for the numbers of a form with 17.
DIFFUSERS_17 = """
    down_blocks.0.attentions.0 down_blocks.0.attentions.1 down_blocks.1.attentions.0 down_blocks.1.attentions.1
    down_blocks.2.attentions.0 down_blocks.2.attentions.1 mid_block.attentions.0 up_blocks.1.attentions.0
    up_blocks.1.attentions.1 up_blocks.1.attentions.2 up_blocks.2.attentions.0 up_blocks.2.attentions.1
    up_blocks.2.attentions.2 up_blocks.3.attentions.0 up_blocks.3.attentions.1 up_blocks.3.attentions.2
""".split()


def block(published):
    return BASE if published == "-" else block_of(f"{published}.1.norm")


@pytest.mark.parametrize("count", [17, 25, 26])
def test_each_number_is_that_of_one_published_block(count):
    weights = BlockWeights.parse(",".join(str(i / 100) for i in range(1, count + 1)))
    assert [weights.of_block(block(published)) for published in GOLDEN[count]] == [i / 100 for i in range(1, count + 1)]
    others = {BASE, *SD_BLOCKS} - {block(published) for published in GOLDEN[count]}
    assert len(others) == 26 - count
    # the extension gives 0 to blocks that 17 numbers do not name; kohya's 25 numbers leave the text encoder as it is
    assert {weights.of_block(other) for other in others} == {17: {0.0}, 25: {1.0}, 26: set()}[count]


def test_17_numbers_are_for_the_blocks_with_attention_in_the_order_of_diffusers():
    for config in ("v1-inference", "v2-inference"):
        modules = unet_modules(load_model_config(ROOT / "configs" / f"{config}.yaml").unet)
        assert [block_of(f"{modules[path]}.") for path in DIFFUSERS_17] == list(FORMS[17][1:])
        attention = {block_of(f"{name}.") for path, name in modules.items() if "attentions" in path}
        assert attention == set(FORMS[17][1:])


@pytest.mark.parametrize(
    "preset, base, inputs, middle, outputs",
    [
        ("NONE", 0, "000000", 0, "000000000"),
        ("ALL", 1, "111111", 1, "111111111"),
        ("INS", 1, "111000", 0, "000000000"),
        ("IND", 1, "000111", 0, "000000000"),
        ("INALL", 1, "111111", 0, "000000000"),
        ("MIDD", 1, "000111", 1, "111100000"),
        ("OUTD", 1, "000000", 0, "111100000"),
        ("OUTS", 1, "000000", 0, "000011111"),
        ("OUTALL", 1, "000000", 0, "111111111"),
    ],
)
def test_presets_are_those_of_the_extension(preset, base, inputs, middle, outputs):
    numbers = ",".join([str(base), *inputs, str(middle), *outputs])
    assert BlockWeights.parse(preset.lower()) == BlockWeights.parse(preset) == BlockWeights.parse(numbers)
    assert BlockWeights.parse(preset).text == preset


def test_the_tenth_preset_halves_everything():
    assert BlockWeights.parse("ALL0.5") == BlockWeights.parse(",".join(["0.5"] * 17))
    assert len(PRESETS) == 10


@pytest.mark.parametrize(
    "text, expected",
    [
        ("MID=0.5", {"MID": 0.5}),
        ("m00 = -0.5 , out3=0", {"MID": -0.5, "OUT03": 0.0}),
        ("IN*=0", {f"IN{i:02}": 0.0 for i in range(12)}),
        ("IN04=2,IN*=0,OUT11=3", {**{f"IN{i:02}": 0.0 for i in range(12)}, "IN04": 2.0, "OUT11": 3.0}),
        ("OUT*=0,*=0.5,BASE=1", {**dict.fromkeys(SD_BLOCKS, 0.5), **{f"OUT{i:02}": 0.0 for i in range(12)}}),
        ("BASE=0", {BASE: 0.0}),
        ("*=0", dict.fromkeys((BASE, *SD_BLOCKS), 0.0)),
        ("*=1", {}),
    ],
)
def test_names_win_over_wildcards_in_any_order_and_what_has_no_name_keeps_1(text, expected):
    weights = BlockWeights.parse(text)
    assert {name: weights.of_block(name) for name in (BASE, *SD_BLOCKS)} == {
        **dict.fromkeys((BASE, *SD_BLOCKS), 1.0),
        **expected,
    }
    weights.check_model(SD_BLOCKS, "SD")


def test_spaces_and_the_brackets_of_kohyas_list_do_not_matter():
    numbers = ",".join(str(i) for i in range(26))
    assert BlockWeights.parse(f"[{numbers.replace(',', ', ')}]") == BlockWeights.parse(numbers)


def test_layers_outside_of_the_blocks_keep_1():
    for name in ("time_embed.0", "out.2"):
        assert block_of(name) is None
    assert BlockWeights.parse("NONE").of_block(None) == BlockWeights.parse("*=0").of_block(None) == 1.0


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "is empty"),
        ("  ", "is empty"),
        ("[]", "is empty"),
        (",".join("1" * 16), "has 16 numbers.*17 numbers.*25.*26"),
        (",".join("1" * 18), "has 18 numbers"),
        (",".join("1" * 27), "has 27 numbers"),
        (",".join("1" * 12), "12 numbers are for SDXL"),
        (",".join("1" * 20), "20 numbers are for SDXL"),
        ("0.5", "has 1 numbers"),
        (",".join("1" * 16) + ",", '"" is not a number'),
        (",".join("1" * 16) + ",R", '"R" is not a number'),
        (",".join("1" * 16) + ",nan", "is not a number from -1000 to 1000"),
        (",".join("1" * 16) + ",inf", "is not a number from"),
        (",".join("1" * 16) + ",1001", "is not a number from"),
        ("1;1;1", "is not a number from"),
        ("OUTAL", "is no preset: did you mean OUTALL"),
        ("FLUXALL", "is no preset"),
        ("MID", "is no preset"),
        ("MID=", '"" is not a number'),
        ("MID=x", '"X" is not a number'),
        ("MID=nan", '"NAN" is not a number'),
        ("MID=1=2", "is not a number"),
        ("=1", "is no block and factor"),
        ("MIDDLE=1", '"MIDDLE=1" is no block and factor'),
        ("IN=1", "is no block and factor"),
        ("IN1*=1", "is no block and factor"),
        ("IN001=1", "is no block and factor"),
        ("UP3=1", "is no block and factor"),
        ("MID=1,OUT03", '"OUT03" is no block and factor'),
        ("MID=1,", '"" is no block and factor'),
        ("MID=1,M00=0", "names MID twice"),
        ("IN4=1,IN04=1", "names IN04 twice"),
        ("IN*=1,IN*=1", r"names IN\* twice"),
        ("MID=1," * 400, "2,400 characters, at most 1,000"),
        (17, "give a text"),
        (None, "give a text"),
    ],
)  # fmt: skip
def test_what_is_no_form_is_refused(text, words):
    with pytest.raises(UserError, match=f"--lora_block_weights.*{words}"):
        BlockWeights.parse(text, "--lora_block_weights")


# ---- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, inputs, outputs",
    [("v1-inference", 12, 12), ("v2-inference", 12, 12), ("v2-vpred-inference", 12, 12), ("nano", 6, 6)],
)
def test_the_blocks_of_a_model_follow_from_its_yaml(config, inputs, outputs):
    unet = load_model_config(ROOT / "configs" / f"{config}.yaml").unet
    assert unet_blocks(unet) == block_names(inputs, outputs)


@pytest.mark.parametrize("text", ["OUTALL", ",".join("1" * 17), ",".join("1" * 25), ",".join("1" * 26)])
def test_numbers_are_refused_for_another_model_with_its_own_blocks(text):
    BlockWeights.parse(text).check_model(SD_BLOCKS, "SD")
    with pytest.raises(UserError, match="configs/nano.yaml has IN00 to IN05, MID, OUT00 to OUT05"):
        BlockWeights.parse(text).check_model(block_names(6, 6), "configs/nano.yaml")


def test_a_block_that_a_model_does_not_have_is_named():
    nano = block_names(6, 6)
    BlockWeights.parse("IN05=0,OUT05=1,MID=1,BASE=0,IN*=1,OUT*=2,*=3").check_model(nano, "nano")
    for text, unknown in (("MID=1,OUT06=0", "OUT06"), ("IN99=0", "IN99")):
        with pytest.raises(UserError, match=f"nano has no block {unknown}. It has IN00 to IN05, MID, OUT00 to OUT05"):
            BlockWeights.parse(text).check_model(nano, "nano")
    with pytest.raises(UserError, match=r"the model has no block OUT\*. It has IN00"):
        BlockWeights.parse("OUT*=0").check_model(["IN00"], "the model")


def test_blocks_are_listed_in_few_words():
    assert spans(["OUT10", "OUT09", "MID", "IN08", "IN02", "IN01", "BASE"]) == (
        "BASE, IN01 to IN02, IN08, MID, OUT09 to OUT10"
    )


# ---- several LoRAs ---------------------------------------------------------------------------------------------------


def test_a_text_is_for_all_loras_or_there_is_one_for_each():
    mid, out = BlockWeights.parse("MID=0"), BlockWeights.parse("OUTALL")
    assert block_weights_of_each([], 2, "x") == [None, None]
    assert block_weights_of_each(["MID=0"], 2, "x") == [mid, mid]
    assert block_weights_of_each(["MID=0", "OUTALL"], 2, "x") == [mid, out]
    for count in (1, 3):
        with pytest.raises(UserError, match=f"x has 2 texts for {count} LoRAs: give one for all, or one for each"):
            block_weights_of_each(["MID=0", "OUTALL"], count, "x")
