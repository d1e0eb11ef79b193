"""What kohya's files have beyond pairs: squeezed axes, a third factor, what they say of their base."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.lora.formats import DETECTORS, base_of, detect_format, kohya, parts, read_lora, write_lora
from ldm.lora.formats.modules import known_bases
from ldm.lora.lora import LoRA
from ldm.lora.updates import OFT, DoRA
from ldm.weights.checkpoint import open_checkpoint, read_checkpoint, write_checkpoint
from ldm.weights.hashes import sshs_hashes
from tests.lora.formats.files import random_lora

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
    with pytest.raises(UserError, match="to_k has alpha alone"):
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
    arrays = {
        f"{CONV}.lora_{half}.weight": np.ones(shape, np.float32)
        for half, shape in (("down", down), ("mid", mid), ("up", (320, 2)))
    }
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


@pytest.fixture(scope="module")
def published():
    with gzip.open(Path(__file__).parents[2] / "weights" / "published_names.json.gz", "rt") as file:
        return json.load(file)


class TestCheckpointsNames:
    """The UNet by the names of the published checkpoints, which SDXL's files have too."""

    STYLES = {
        "underscored": lambda name: "lora_unet_" + name.replace(".", "_"),
        "dotted": lambda name: f"diffusion_model.{name}",
        "whole": lambda name: f"model.diffusion_model.{name}",
    }
    TEXT = {
        "underscored": lambda name: "lora_te_text_model_" + name.replace(".", "_"),
        "dotted": lambda name: f"text_encoders.clip_l.transformer.text_model.{name}",
        "whole": lambda name: f"cond_stage_model.transformer.text_model.{name}",
    }
    HALVES = {"underscored": ("lora_down", "lora_up"), "dotted": ("lora_down", "lora_up"),
              "whole": ("lora_A", "lora_B")}  # fmt: skip

    def arrays(self, layers, style, halves=None, text=()):
        """Rank 1, values that differ from layer to layer; layers: (name, shape)."""
        down, up = halves or self.HALVES[style]
        arrays = {}
        for names, chosen in ((self.STYLES[style], layers), (self.TEXT[style], text)):
            for i, (name, shape) in enumerate(chosen):
                outgoing, incoming, *kernel = shape
                arrays[f"{names(name)}.{down}.weight"] = np.full((1, incoming, *kernel), i + 1, np.float16)
                arrays[f"{names(name)}.{up}.weight"] = np.ones((outgoing, 1, *(1 for _ in kernel)), np.float16)
        return arrays

    @pytest.mark.parametrize("style", STYLES)
    @pytest.mark.parametrize("version", [1, 2])
    def test_every_layer_of_the_published_models(self, tmp_path, published, version, style):
        prefix = "model.diffusion_model."
        keys = published[f"sd{version}_ldm_ckpt_keys"]
        layers = [
            (name[len(prefix) : -len(".weight")], tuple(shape))
            for name, shape in keys.items()
            if name.startswith(prefix) and name.endswith(".weight") and len(shape) > 1
        ]
        path = tmp_path / "lora.safetensors"
        write_checkpoint(path, self.arrays(layers, style))
        assert detect_format(path) == "kohya"
        names = list(open_checkpoint(path))
        assert [name for detect in DETECTORS if (name := detect(names))] == ["kohya"]
        lora = read_lora(path)
        assert lora.layers.keys() == {prefix + name for name, _ in layers}
        for i, (name, shape) in enumerate(layers):
            assert (lora.layers[prefix + name].down == i + 1).all()
            assert lora.layers[prefix + name].down.shape == (1, *shape[1:])
        assert base_of(lora) is known_bases()[version - 1]

    @pytest.mark.parametrize("key, layer, down, up", [
        ("lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q",
         "input_blocks.1.1.transformer_blocks.0.attn1.to_q", (2, 320), (320, 2)),
        ("lora_unet_middle_block_1_transformer_blocks_0_ff_net_0_proj",
         "middle_block.1.transformer_blocks.0.ff.net.0.proj", (2, 1280), (10240, 2)),
        ("lora_unet_output_blocks_3_1_proj_in", "output_blocks.3.1.proj_in", (2, 1280, 1, 1), (1280, 2, 1, 1)),
        ("lora_unet_input_blocks_1_0_in_layers_2", "input_blocks.1.0.in_layers.2", (2, 320, 3, 3), (320, 2, 1, 1)),
        ("lora_unet_input_blocks_1_0_emb_layers_1", "input_blocks.1.0.emb_layers.1", (2, 1280), (320, 2)),
        ("lora_unet_input_blocks_1_0_out_layers_3", "input_blocks.1.0.out_layers.3", (2, 320, 3, 3), (320, 2, 1, 1)),
        ("lora_unet_input_blocks_4_0_skip_connection", "input_blocks.4.0.skip_connection", (2, 320, 1, 1),
         (640, 2, 1, 1)),
        ("lora_unet_input_blocks_3_0_op", "input_blocks.3.0.op", (2, 320, 3, 3), (320, 2, 1, 1)),
        ("lora_unet_output_blocks_2_1_conv", "output_blocks.2.1.conv", (2, 1280, 3, 3), (1280, 2, 1, 1)),
        ("lora_unet_time_embed_0", "time_embed.0", (2, 320), (1280, 2)),
        ("lora_unet_input_blocks_0_0", "input_blocks.0.0", (2, 4, 3, 3), (320, 2, 1, 1)),
        ("lora_unet_out_2", "out.2", (2, 320, 3, 3), (4, 2, 1, 1)),
        ("diffusion_model.input_blocks.1.1.proj_out", "input_blocks.1.1.proj_out", (2, 320), (320, 2)),
    ])  # fmt: skip
    @pytest.mark.parametrize(
        "halves", ["lora_down lora_up", "lora_A lora_B", "lora_A.default lora_B.default", "lora.down lora.up"]
    )
    def test_a_name(self, tmp_path, key, layer, down, up, halves):
        one, two = halves.split()
        arrays = {f"{key}.{one}.weight": normal(*down), f"{key}.{two}.weight": normal(*up), f"{key}.alpha": np.array(1)}
        lora = read(tmp_path, arrays)
        assert {name: layer.alpha for name, layer in lora.layers.items()} == {f"model.diffusion_model.{layer}": 1.0}

    @pytest.mark.parametrize("unet", STYLES)
    @pytest.mark.parametrize(
        "text", [*TEXT.values(), lambda name: f"text_encoders.clip_h.transformer.text_model.{name}"]
    )
    def test_a_text_encoder_beside_it(self, tmp_path, unet, text):
        """Also where the UNet's part alone would be this project's own format."""
        layer = "encoder.layers.1.self_attn.q_proj"
        arrays = {f"{text(layer)}.lora_down.weight": normal(2, 768), f"{text(layer)}.lora_up.weight": normal(768, 2)}
        names = self.STYLES[unet]("input_blocks.1.1.transformer_blocks.0.attn1.to_q")
        arrays |= {f"{names}.lora_down.weight": normal(2, 320), f"{names}.lora_up.weight": normal(320, 2)}
        assert {name.rpartition(".")[2] for name in read(tmp_path, arrays).layers} == {"to_q", "q_proj"}

    def test_a_layer_by_two_of_its_names(self, tmp_path):
        other = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q"
        arrays = {
            f"{name}.lora_{half}.weight": normal(*shape)
            for name in (LAYER, other)
            for half, shape in (("down", (2, 320)), ("up", (320, 2)))
        }
        with pytest.raises(UserError, match=f"{LAYER}.* and {other}.* stand for the same layer"):
            read(tmp_path, arrays)

    def test_names_do_not_meet(self):
        for base in known_bases():
            table = kohya._table(base)
            assert len(table) == sum(3 if module.component == "unet" else 2 for module in (*base.modules, *base.norms))

    @pytest.mark.parametrize("style", STYLES)
    @pytest.mark.parametrize("layers", [
        [("input_blocks.4.1.transformer_blocks.0.attn2.to_k", (640, 2048))],
        [("input_blocks.4.1.transformer_blocks.1.attn1.to_k", (640, 640))],
        [("input_blocks.4.1.proj_in", (640, 640)), ("middle_block.1.transformer_blocks.9.attn1.to_q", (1280, 1280))],
        [("output_blocks.0.1.transformer_blocks.0.attn1.to_q", (1280, 1280)),  # SD1.x has no attention there
         ("output_blocks.0.1.transformer_blocks.0.attn2.to_v", (1280, 2048))],
        [("label_emb.0.0", (1280, 2816))],
    ])  # fmt: skip
    def test_sdxl_by_its_shapes_and_layers(self, tmp_path, style, layers):
        with pytest.raises(UserError, match="is an SDXL LoRA"):
            read(tmp_path, self.arrays(layers, style))


@pytest.mark.parametrize("shape", [(2,), (1, 2), (0,), (1,) * 9])
@pytest.mark.parametrize("dtype", [np.float32, np.bool_])
def test_an_alpha_that_is_not_one_number(tmp_path, shape, dtype):
    arrays = {f"{LAYER}.lora_down.weight": normal(4, 320), f"{LAYER}.lora_up.weight": normal(320, 4)}
    with pytest.raises(UserError, match="to_q: alpha is of shape .* not one number"):
        read(tmp_path, {**arrays, f"{LAYER}.alpha": np.ones(shape, dtype)})


@pytest.mark.parametrize("alpha", [1e300, -1e39, 1e38])
def test_an_alpha_that_fp32_does_not_hold(tmp_path, alpha):
    arrays = {f"{LAYER}.lora_down.weight": normal(4, 320), f"{LAYER}.lora_up.weight": normal(320, 4)}
    with pytest.raises(UserError, match="to_q is outside the range of fp32"):
        read(tmp_path, {**arrays, f"{LAYER}.alpha": np.array(alpha)})


@pytest.mark.parametrize("width, rank, says", [
    (2_000, 1_600, r"conv1 is \(320, 2000, 3, 3\), in .* \(320, 320, 3, 3\)"),
    (20_000, 16_000, "conv1: mid .* make a factor of 2,880,000,000 values"),
    (320, 17_000, "conv1 is of rank 17,000, at most 16,384"),
])  # fmt: skip
def test_a_third_factor_of_another_model(tmp_path, monkeypatch, width, rank, says):
    """It is not multiplied out: its product may be any number of times as large as the file."""
    monkeypatch.setattr(parts, "with_mid", None)
    arrays = {
        f"{CONV}.lora_down.weight": normal(1, width),
        f"{CONV}.lora_mid.weight": normal(rank, 1, 3, 3),
        f"{CONV}.lora_up.weight": normal(320, rank),
    }
    write_checkpoint(tmp_path / "lora.safetensors", arrays)
    for config in (None, known_bases()[0].config):
        with pytest.raises(UserError, match=says):
            read_lora(tmp_path / "lora.safetensors", config)


def test_sdxl_by_what_it_says(tmp_path):
    arrays = {f"{LAYER}.lora_down.weight": normal(4, 320), f"{LAYER}.lora_up.weight": normal(320, 4)}
    with pytest.raises(UserError, match="SDXL"):
        read(tmp_path, arrays, {"ss_base_model_version": "sdxl_base_v1-0"})


def test_a_lone_first_text_encoder_is_the_text_encoder(tmp_path):
    name = "lora_te1_text_model_encoder_layers_3_mlp_fc1"
    arrays = {f"{name}.lora_down.weight": normal(4, 768), f"{name}.lora_up.weight": normal(3072, 4)}
    assert list(read(tmp_path, arrays).layers) == ["cond_stage_model.transformer.text_model.encoder.layers.3.mlp.fc1"]


def test_an_alpha_of_0_which_others_take_for_the_rank_is_not_written(tmp_path):
    lora = random_lora(known_bases()[2], rank=2, alpha=0.0, only="attn1.to_q")
    write_lora(tmp_path / "lora.safetensors", lora, "kohya")
    arrays, _ = read_checkpoint(tmp_path / "lora.safetensors")
    assert {float(array) for name, array in arrays.items() if name.endswith(".alpha")} == {2.0}
    assert not any(array.any() for name, array in arrays.items() if ".lora_up." in name)


def test_alphas_that_differ_are_warned_of(tmp_path, caplog):
    lora = random_lora(known_bases()[2], rank=2, alpha=lambda i: 1 + i % 2, only="to_q")
    write_lora(tmp_path / "lora.safetensors", lora, "kohya")
    assert "for diffusers, write diffusers" in caplog.text


def test_what_is_written_for_other_programs(tmp_path):
    sd2 = known_bases()[1]
    lora = LoRA(
        random_lora(sd2, rank=4, alpha=2.0, only="0.resnets.0.conv1").layers,
        {"architecture": "sd2", "prediction_type": "v_prediction"},
    )
    write_lora(tmp_path / "lora.safetensors", lora, "kohya")
    arrays, texts = read_checkpoint(tmp_path / "lora.safetensors")
    assert sorted(arrays)[0] == "lora_unet_down_blocks_0_resnets_0_conv1.alpha"
    assert texts["ss_network_dim"] == "4" and texts["ss_network_alpha"] == "2"
    assert texts["ss_base_model_version"] == "sd_v2_v" and texts["ss_v2"] == "True"
    assert texts["ss_network_module"] == "networks.lora"
    assert json.loads(texts["ss_network_args"]) == {"conv_dim": 4, "conv_alpha": 2.0}
    assert "lora_adapter_metadata" not in texts  # diffusers refuses alphas and it together


def test_what_a_file_says_for_others_is_kept_and_what_the_network_says_is_written_anew(tmp_path):
    lora = random_lora(known_bases()[0], rank=4, only="attn1.to_q", architecture="sd1")
    lora.file_metadata = {
        "ss_tag_frequency": '{"cat": {}}', "modelspec.title": "Cat", "passport.version": "1", "ss_network_dim": "8",
        "ss_network_module": "lycoris.kohya", "sshs_model_hash": "0" * 64,
    }  # fmt: skip
    write_lora(tmp_path / "a.safetensors", lora, "kohya")
    write_lora(tmp_path / "b.safetensors", read_lora(tmp_path / "a.safetensors"), "kohya", dtype="fp16")
    (arrays, texts), (half, again) = (read_checkpoint(tmp_path / f"{name}.safetensors") for name in "ab")
    assert {key: texts[key] for key in ("ss_tag_frequency", "modelspec.title", "passport.version")} == {
        "ss_tag_frequency": '{"cat": {}}', "modelspec.title": "Cat", "passport.version": "1",
    }  # fmt: skip
    assert texts["ss_network_dim"] == "4" and texts["ss_network_module"] == "networks.lora"
    for found, said in ((arrays, texts), (half, again)):
        assert sshs_hashes(found, said).items() <= said.items()
    assert {key for key in texts if texts[key] != again[key]} == {"sshs_model_hash"}  # the file is small


class TestOtherNames:
    """Names of keys that other programs give, of the layer `to_q` in the first block."""

    def arrays(self, **parts):
        return {"lora_down.weight": normal(4, 320), "lora_up.weight": normal(320, 4), **parts}

    @pytest.mark.parametrize("magnitude", [
        f"{LAYER}.dora_scale", f"{LAYER}.lora_magnitude_vector", f"{LAYER}.lora_magnitude_vector.weight",
        f"{LAYER}.lora_magnitude_vector.default.weight", f"{LAYER[: -len('_to_q')]}.to_q.lora_magnitude_vector",
    ])  # fmt: skip
    def test_of_a_magnitude(self, tmp_path, magnitude):
        pair = {f"{LAYER}.{part}": array for part, array in self.arrays().items()}
        (layer,) = read(
            tmp_path, {**pair, magnitude: np.arange(1, 321, dtype=np.float32).reshape(-1, 1)}
        ).layers.values()
        assert isinstance(layer, DoRA) and not layer.on_input and layer.magnitude[2] == 3

    @pytest.mark.parametrize("prefix", ["lycoris_", "oft_unet_"])
    def test_of_prefixes(self, tmp_path, prefix):
        name = LAYER.replace("lora_unet_", prefix)
        lora = read(tmp_path, {f"{name}.oft_blocks": normal(32, 10, 10), f"{name}.alpha": np.array(0.001)})
        assert [type(layer) for layer in lora.layers.values()] == [OFT] and list(lora.layers)[0].endswith("attn1.to_q")

    def test_a_magnitude_of_another_length(self, tmp_path):
        pair = {f"{LAYER}.{part}": array for part, array in self.arrays(dora_scale=normal(319, 1)).items()}
        with pytest.raises(UserError, match=r"to_q is \(319,\), in SD1.x \(320, 320\)"):
            read(tmp_path, pair)

    @pytest.mark.parametrize(
        "layer, says",
        [
            (LAYER, "to_q has a bias of .*, in SD1.x it has none"),
            (CONV, r"conv1 has a bias of \(321,\), in SD1.x it is \(320,\)"),
        ],
    )
    def test_a_bias_that_is_not_the_models(self, tmp_path, layer, says):
        with pytest.raises(UserError, match=says):
            read(tmp_path, {f"{layer}.diff_b": normal(320 if layer == LAYER else 321)})

    def test_biases_alone_are_a_lora(self, tmp_path, caplog):
        lora = read(tmp_path, {f"{CONV}.diff_b": normal(320)})
        assert not lora.layers and len(lora.biases) == 1 and "zero" not in caplog.text
        write_lora(tmp_path / "again.ckpt", lora)
        assert list(read_lora(tmp_path / "again.ckpt").biases) == list(lora.biases)

    def test_a_conversion_keeps_the_arguments_of_the_network(self, tmp_path):
        arguments = json.dumps({"conv_dim": "2", "conv_alpha": "1", "loraplus_lr_ratio": "16"})
        metadata = {
            "ss_network_module": "networks.lora", "ss_network_args": arguments, "ss_network_dim": "8",
            "modelspec.hash_sha256": "0xab",
        }  # fmt: skip
        lora = read(tmp_path, {f"{LAYER}.{part}": array for part, array in self.arrays().items()}, metadata)
        write_lora(tmp_path / "again.safetensors", lora, "kohya")
        written = read_checkpoint(tmp_path / "again.safetensors")[1]
        assert written["ss_network_args"] == arguments and written["ss_network_dim"] == "8"
        assert "modelspec.hash_sha256" not in written
