"""What kohya's files have beyond pairs: squeezed axes, a third factor, what they say of their base."""

import json

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.lora.formats import read_lora, write_lora
from ldm.lora.formats.modules import known_bases
from ldm.lora.state import LoRAState
from ldm.weights.read import read_checkpoint, write_checkpoint
from tests.lora.formats.files import random_state

LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
RANDOM = np.random.RandomState(0)


def normal(*shape):
    return RANDOM.standard_normal(shape).astype(np.float32)


def read(tmp_path, arrays, metadata=None):
    write_checkpoint(tmp_path / "lora.safetensors", arrays, metadata)
    return read_lora(tmp_path / "lora.safetensors")


def test_the_strength_is_alpha_over_rank(tmp_path):
    down, up = normal(4, 320), normal(320, 4)
    arrays = {f"{LAYER}.lora_down.weight": down, f"{LAYER}.lora_up.weight": up, f"{LAYER}.alpha": np.array(1.0)}
    (layer,) = read(tmp_path, arrays).layers.values()
    assert layer.alpha == 1.0
    np.testing.assert_allclose(layer.update(), up @ down / 4, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alpha", [np.array(2, np.float16), np.array([2.0], np.float32), np.array([[2]], np.int64)])
def test_an_alpha_of_any_type(tmp_path, alpha):
    arrays = {f"{LAYER}.lora_down.weight": normal(4, 320), f"{LAYER}.lora_up.weight": normal(320, 4)}
    (layer,) = read(tmp_path, {**arrays, f"{LAYER}.alpha": alpha}).layers.values()
    assert layer.alpha == 2.0


def test_an_alpha_that_is_no_number(tmp_path):
    arrays = {f"{LAYER}.lora_down.weight": normal(4, 320), f"{LAYER}.lora_up.weight": normal(320, 4)}
    with pytest.raises(UserError, match="to_q"):
        read(tmp_path, {**arrays, f"{LAYER}.alpha": np.ones(2)})


@pytest.mark.parametrize("alpha", [np.nan, np.inf])
def test_an_alpha_that_is_not_finite(tmp_path, alpha):
    arrays = {f"{LAYER}.lora_down.weight": normal(4, 320), f"{LAYER}.lora_up.weight": normal(320, 4)}
    with pytest.raises(UserError, match="to_q holds values that are not finite"):
        read(tmp_path, {**arrays, f"{LAYER}.alpha": np.array(alpha)})


def test_an_alpha_alone_is_half_a_pair(tmp_path):
    arrays = {f"{LAYER}.lora_down.weight": normal(4, 320), f"{LAYER}.lora_up.weight": normal(320, 4)}
    with pytest.raises(UserError, match="to_k lacks its down"):
        read(tmp_path, {**arrays, f"{LAYER.replace('to_q', 'to_k')}.alpha": np.array(1.0)})


def test_factors_of_a_dense_layer_with_axes_of_a_convolution(tmp_path):
    arrays = {f"{LAYER}.lora_down.weight": normal(4, 320, 1, 1), f"{LAYER}.lora_up.weight": normal(320, 4, 1, 1)}
    (layer,) = read(tmp_path, arrays).layers.values()
    assert layer.down.shape == (4, 320) and layer.up.shape == (320, 4)


def test_a_convolution_in_three_steps(tmp_path):
    down, mid, up = normal(2, 320, 1, 1), normal(2, 2, 3, 3), normal(320, 2, 1, 1)
    arrays = {f"{CONV}.lora_down.weight": down, f"{CONV}.lora_mid.weight": mid, f"{CONV}.lora_up.weight": up}
    (layer,) = read(tmp_path, arrays).layers.values()
    wanted = np.einsum("or,rskl,si->oikl", up[:, :, 0, 0], mid, down[:, :, 0, 0])
    np.testing.assert_allclose(layer.update(), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("down, mid", [((), (2, 2, 3, 3)), ((2, 320), (2, 2)), ((2, 320), (2, 3, 3, 3))])
def test_a_third_factor_that_does_not_fit(tmp_path, down, mid):
    arrays = {f"{CONV}.lora_{half}.weight": np.ones(shape, np.float32)
              for half, shape in (("down", down), ("mid", mid), ("up", (320, 2)))}
    with pytest.raises(UserError, match="conv1: mid .* does not go with down"):
        read(tmp_path, arrays)


@pytest.mark.parametrize("name, down, up", [
    ("lora_unet_down_blocks_1_resnets_0_conv_shortcut", (2, 320, 1, 1), (640, 2)),
    ("lora_unet_down_blocks_1_resnets_0_conv_shortcut", (2, 320), (640, 2, 1, 1)),
    ("lora_unet_down_blocks_1_resnets_0_conv_shortcut", (2, 320), (640, 2)),
    ("lora_unet_down_blocks_1_resnets_0_conv1", (2, 320, 3, 3), (640, 2)),
])  # fmt: skip
def test_factors_of_a_convolution_with_axes_left_out(tmp_path, name, down, up):
    arrays = {f"{name}.lora_down.weight": normal(*down), f"{name}.lora_up.weight": normal(*up)}
    (layer,) = read(tmp_path, arrays).layers.values()
    assert layer.down.ndim == 4 and layer.up.shape == (640, 2, 1, 1)


@pytest.mark.parametrize(
    "version, metadata",
    [
        ("sd_v1", {"architecture": "sd1"}),
        ("sd_v2", {"architecture": "sd2"}),
        ("sd_v2_v", {"architecture": "sd2", "prediction_type": "v_prediction"}),
        ("sd_v7", {}),
    ],
)
def test_the_version_of_the_base(tmp_path, version, metadata):
    arrays = {f"{LAYER}.lora_down.weight": normal(4, 320), f"{LAYER}.lora_up.weight": normal(320, 4)}
    assert read(tmp_path, arrays, {"ss_base_model_version": version}).metadata == metadata


def test_sdxl_by_what_it_says(tmp_path):
    arrays = {f"{LAYER}.lora_down.weight": normal(4, 320), f"{LAYER}.lora_up.weight": normal(320, 4)}
    with pytest.raises(UserError, match="SDXL"):
        read(tmp_path, arrays, {"ss_base_model_version": "sdxl_base_v1-0"})


def test_a_lone_first_text_encoder_is_the_text_encoder(tmp_path):
    name = "lora_te1_text_model_encoder_layers_3_mlp_fc1"
    arrays = {f"{name}.lora_down.weight": normal(4, 768), f"{name}.lora_up.weight": normal(3072, 4)}
    assert list(read(tmp_path, arrays).layers) == [
        "cond_stage_model.transformer.text_model.encoder.layers.3.mlp.fc1"
    ]


def test_an_alpha_of_0_which_others_take_for_the_rank_is_not_written(tmp_path):
    state = random_state(known_bases()[2], rank=2, alpha=0.0, only="attn1.to_q")
    write_lora(tmp_path / "lora.safetensors", state, "kohya")
    arrays, _ = read_checkpoint(tmp_path / "lora.safetensors")
    assert {float(array) for name, array in arrays.items() if name.endswith(".alpha")} == {2.0}
    assert not any(array.any() for name, array in arrays.items() if ".lora_up." in name)


def test_alphas_that_differ_are_warned_of(tmp_path, caplog):
    state = random_state(known_bases()[2], rank=2, alpha=lambda i: 1 + i % 2, only="to_q")
    write_lora(tmp_path / "lora.safetensors", state, "kohya")
    assert "for diffusers, write diffusers" in caplog.text


def test_what_is_written_for_other_programs(tmp_path):
    sd2 = known_bases()[1]
    state = LoRAState(
        random_state(sd2, rank=4, alpha=2.0, only="0.resnets.0.conv1").layers,
        {"architecture": "sd2", "prediction_type": "v_prediction"},
    )
    write_lora(tmp_path / "lora.safetensors", state, "kohya")
    arrays, texts = read_checkpoint(tmp_path / "lora.safetensors")
    assert sorted(arrays)[0] == "lora_unet_down_blocks_0_resnets_0_conv1.alpha"
    assert texts["ss_network_dim"] == "4" and texts["ss_network_alpha"] == "2"
    assert texts["ss_base_model_version"] == "sd_v2_v" and texts["ss_v2"] == "True"
    assert texts["ss_network_module"] == "networks.lora"
    assert json.loads(texts["ss_network_args"]) == {"conv_dim": 4, "conv_alpha": 2.0}
    assert "lora_adapter_metadata" not in texts  # diffusers refuses alphas and it together
