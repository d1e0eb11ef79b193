"""cloneofsimo's files: factors by number, so the order of the layers is everything."""

import dataclasses
import json
import logging

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.lora.formats import read_lora, write_lora
from ldm.lora.formats.cloneofsimo import in_order
from ldm.lora.formats.modules import BaseModules, known_bases
from ldm.lora.lora import LoRA
from ldm.weights.checkpoint import open_checkpoint, read_checkpoint, write_checkpoint
from ldm.weights.file_formats.torch_writer import write_torch
from tests.lora.formats.files import assert_same_updates, random_lora

NANO = known_bases()[2]
UP, DOWN = np.ones((64, 2), np.float32), np.ones((2, 64), np.float32)
PUBLISHED = ("CrossAttention", "Attention", "GEGLU")


def leaf(module):
    return module.path.partition("transformer_blocks.0.")[2]


class TestOrder:
    @pytest.mark.parametrize("early, last", [
        (True, ["ff.net.0.proj", "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"]),
        (False, ["attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0", "ff.net.0.proj"]),
    ])  # fmt: skip
    def test_of_a_block(self, early, last):
        modules = in_order(known_bases()[0].of_component("unet"), PUBLISHED, "unet", early)
        assert len(modules) == 144
        first = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"]
        for start in range(0, 144, 9):
            assert [leaf(module) for module in modules[start : start + 9]] == first + last

    def test_of_the_blocks(self):
        """The middle one comes last: diffusers registers it after the others."""
        modules = in_order(known_bases()[0].of_component("unet"), PUBLISHED, "unet")
        blocks = list(dict.fromkeys(module.path.split(".")[0] for module in modules))
        assert blocks == ["down_blocks", "up_blocks", "mid_block"]

    def test_of_the_text_encoder(self):
        for base, count in zip(known_bases(), (12, 23, 3)):
            modules = in_order(base.of_component("text_encoder"), ("CLIPAttention",), "text_encoder")
            assert [m.path.rpartition(".")[2] for m in modules] == ["k_proj", "v_proj", "q_proj", "out_proj"] * count


def numbered(lora, modules, component):
    """A file's arrays for `modules` in a row."""
    arrays = {}
    for i, module in enumerate(modules):
        layer = lora.layers[module.name]
        arrays[f"{component}:{i}:up"], arrays[f"{component}:{i}:down"] = layer.up, layer.down
    return arrays


@pytest.fixture
def whole():
    return random_lora(NANO, rank=2)


class TestReading:
    @pytest.mark.parametrize("early", [True, False])
    def test_both_orders_by_the_shapes(self, tmp_path, whole, early):
        modules = in_order(NANO.of_component("unet"), PUBLISHED, "unet", early)
        path = tmp_path / "lora.safetensors"
        write_checkpoint(path, numbered(whole, modules, "unet"), {"unet": json.dumps(PUBLISHED)})
        lora = read_lora(path)
        assert lora.layers.keys() == {module.name for module in modules}
        for name, layer in lora.layers.items():
            np.testing.assert_array_equal(layer.down, whole.layers[name].down)

    @pytest.mark.parametrize("classes", [
        ("CrossAttention", "Attention"), ("ResnetBlock2D", "Attention", "GEGLU"), ("FeedForward",),
        ("Transformer2DModel",), ("Downsample2D", "Upsample2D", "TimestepEmbedding"),
    ])  # fmt: skip
    def test_other_classes(self, tmp_path, whole, classes):
        modules = in_order(NANO.of_component("unet"), classes, "unet")
        path = tmp_path / "lora.safetensors"
        write_checkpoint(path, numbered(whole, modules, "unet"), {"unet": json.dumps(classes)})
        assert read_lora(path).layers.keys() == {module.name for module in modules}

    def test_linear_layers_alone_pass_the_convolutions_over(self, tmp_path, whole):
        modules = [
            m for m in in_order(NANO.of_component("unet"), ("ResnetBlock2D", "GEGLU"), "unet") if len(m.shape) == 2
        ]
        path = tmp_path / "lora.safetensors"
        write_checkpoint(path, numbered(whole, modules, "unet"), {"unet": '["ResnetBlock2D", "GEGLU"]'})
        assert read_lora(path).layers.keys() == {module.name for module in modules}

    @pytest.mark.parametrize("noted", [
        {}, {"unet": '["Attn", "Proj"]'}, {"unet": '["CrossAttention", "GEGLUv2"]'}, {"unet": '["", "\\u0000"]'},
    ])  # fmt: skip
    @pytest.mark.parametrize("early", [True, False])
    def test_the_shapes_tell_where_the_classes_are_not_known(self, tmp_path, whole, noted, early):
        modules = in_order(NANO.of_component("unet"), PUBLISHED, "unet", early)
        write_checkpoint(tmp_path / "lora.safetensors", numbered(whole, modules, "unet"), noted)
        lora = read_lora(tmp_path / "lora.safetensors")
        assert lora.layers.keys() == {module.name for module in modules}
        for name, layer in lora.layers.items():
            np.testing.assert_array_equal(layer.down, whole.layers[name].down)

    @pytest.mark.parametrize("attention", ["CLIPSdpaAttention", "CLIPFlashAttention2", "AttentionOfTomorrow"])
    def test_a_text_encoder_of_any_attention(self, tmp_path, whole, attention):
        modules = in_order(NANO.of_component("text_encoder"), ("CLIPAttention",), "text_encoder")
        path = tmp_path / "lora.safetensors"
        write_checkpoint(path, numbered(whole, modules, "text_encoder"), {"text_encoder": json.dumps([attention])})
        assert list(read_lora(path).layers) == [module.name for module in modules]

    def test_classes_that_are_not_known_and_two_that_fit(self, tmp_path):
        """Of a model with the same width at every level, the convolutions down and up have the same shapes."""
        config = dataclasses.replace(NANO.config, unet={**NANO.config.unet, "channel_mult": [1, 1, 1]})
        base = BaseModules(config)
        lora = random_lora(base, rank=1)
        modules = in_order(base.of_component("unet"), ("Downsample2D",), "unet")
        path = tmp_path / "lora.safetensors"
        write_checkpoint(path, numbered(lora, modules, "unet"), {"unet": '["Resampling"]'})
        with pytest.raises(UserError, match="2 layers of the UNet may be those of Downsample2D or of Upsample2D"):
            read_lora(path, config)
        write_checkpoint(path, numbered(lora, modules, "unet"), {"unet": '["Downsample2D"]'})
        assert list(read_lora(path, config).layers) == [module.name for module in modules]

    def test_classes_that_are_not_known_and_nothing_that_fits(self, tmp_path, whole):
        modules = in_order(NANO.of_component("unet"), PUBLISHED, "unet")[:-1]
        path = tmp_path / "lora.safetensors"
        write_checkpoint(path, numbered(whole, modules, "unet"), {"unet": '["Attn\\n", "Attn2"]'})
        with pytest.raises(UserError, match=r"its 89 layers of the UNet \(Attn , Attn2\) are not those of SD1.x or"):
            read_lora(path)
        write_checkpoint(path, numbered(whole, modules, "unet"))
        with pytest.raises(UserError, match=r"89 layers of the UNet \(classes that are not listed\) .* saved again by"):
            read_lora(path)

    def test_learned_tokens_are_read_and_written(self, tmp_path, whole):
        modules = in_order(NANO.of_component("text_encoder"), ("CLIPAttention",), "text_encoder")
        arrays = {**numbered(whole, modules, "text_encoder"), "<s1>": np.ones(96, np.float32)}
        write_checkpoint(tmp_path / "lora.safetensors", arrays, {"text_encoder": '["CLIPAttention"]'})
        lora = read_lora(tmp_path / "lora.safetensors")
        assert len(lora.layers) == 12
        write_lora(tmp_path / "again.safetensors", lora, "cloneofsimo")
        for read in (lora, read_lora(tmp_path / "again.safetensors")):
            assert list(read.embeddings) == ["<s1>"]
            np.testing.assert_array_equal(read.embeddings["<s1>"], np.ones((1, 96), np.float32))

    def test_a_learned_token_of_several_vectors_has_no_place(self, tmp_path):
        lora = random_lora(NANO, only="attn1.to_q")
        lora.embeddings["cat"] = np.ones((2, 96), np.float32)
        with pytest.raises(UserError, match="cat has 2 vectors.* write kohya"):
            write_lora(tmp_path / "lora.safetensors", lora, "cloneofsimo")


class TestDamage:
    def refused(self, tmp_path, arrays, metadata, pattern):
        write_checkpoint(tmp_path / "lora.safetensors", arrays, metadata)
        with pytest.raises(UserError, match=pattern) as caught:
            read_lora(tmp_path / "lora.safetensors")
        assert str(tmp_path) in str(caught.value)

    @pytest.fixture
    def arrays(self, whole):
        return numbered(whole, in_order(NANO.of_component("unet"), PUBLISHED, "unet"), "unet")

    def test_half_a_pair(self, tmp_path, arrays):
        del arrays["unet:7:up"]
        self.refused(tmp_path, arrays, {"unet": json.dumps(PUBLISHED)}, "unet:7 lacks its up")

    def test_a_gap_in_the_numbers(self, tmp_path, arrays):
        del arrays["unet:7:up"], arrays["unet:7:down"]
        self.refused(tmp_path, arrays, {"unet": json.dumps(PUBLISHED)}, "unet:7 is missing")

    def test_the_last_one_missing(self, tmp_path, arrays):
        del arrays["unet:89:up"], arrays["unet:89:down"]
        self.refused(tmp_path, arrays, {"unet": json.dumps(PUBLISHED)}, "89 layers of the UNet .* are not those of SD1")

    @pytest.mark.parametrize("metadata, pattern", [
        ({"unet": "CrossAttention"}, "its text unet .*not valid JSON"),
        ({"unet": "3"}, "no list of classes"),
        ({"unet": '"CrossAttention"'}, "no list of classes"),
        ({"unet": "[" * 100_000}, "its text unet is not valid JSON: it is nested too deeply"),
        ({"unet": "[" + "9" * 5000 + "]"}, "its text unet is not valid JSON"),
        ({"unet": "[[1]]"}, "no list of classes"),
        ({"unet": '["GEGLU"]'}, "are not those of SD1.x or SD2.x or the nano model"),
    ])  # fmt: skip
    def test_its_classes(self, tmp_path, arrays, metadata, pattern):
        self.refused(tmp_path, arrays, metadata, pattern)

    @pytest.mark.parametrize("key", ["unet:00:up", "unet:٣:up", "unet:-1:up", "unet:99999999:up", "unet:1:up\n"])
    def test_a_number_that_is_none(self, tmp_path, arrays, key):
        arrays[key] = np.ones((64, 2), np.float32)
        self.refused(tmp_path, arrays, {"unet": json.dumps(PUBLISHED)}, "belongs to nothing in a LoRA of cloneofsimo's")

    def test_a_number_that_no_model_reaches(self, tmp_path, arrays):
        arrays["unet:9999999:up"] = np.ones((64, 2), np.float32)
        self.refused(tmp_path, arrays, {"unet": json.dumps(PUBLISHED)}, "unet:90 is missing")

    def test_a_stray_key(self, tmp_path, arrays):
        arrays["unet:0:alpha"] = np.ones(1, np.float32)
        self.refused(tmp_path, arrays, {"unet": json.dumps(PUBLISHED)}, "unet:0:alpha belongs to nothing")

    def test_two_layers_exchanged(self, tmp_path, arrays):
        arrays["unet:4:down"], arrays["unet:4:up"] = arrays["unet:0:down"], arrays["unet:0:up"]
        self.refused(tmp_path, arrays, {"unet": json.dumps(PUBLISHED)}, "are not those of")

    def test_factors_of_different_ranks(self, tmp_path, arrays):
        arrays["unet:4:down"] = arrays["unet:4:down"][:1]
        self.refused(tmp_path, arrays, {"unet": json.dumps(PUBLISHED)}, "unet:4: down .* are no pair")


class TestWriting:
    def test_a_part_of_a_class_is_filled_up_with_zeros(self, tmp_path, caplog):
        lora = random_lora(NANO, rank=2, alpha=3.0, only="to_q", component="unet")
        with caplog.at_level(logging.INFO):
            write_lora(tmp_path / "lora.safetensors", lora, "cloneofsimo")
        assert "60 layers of the UNet without a LoRA are written as zeros" in caplog.text
        back = read_lora(tmp_path / "lora.safetensors")
        assert len(back.layers) == 80 and len(back.zero_layers()) == 60
        assert_same_updates(back, lora)

    @pytest.mark.parametrize("only, classes", [
        ("to_q", ["CrossAttention", "Attention"]),
        ("net.0.proj", ["CrossAttention", "Attention", "GEGLU"]),
        ("net.2", ["CrossAttention", "Attention", "FeedForward"]),
        ("proj_in", ["Transformer2DModel"]),
        ("conv1", ["ResnetBlock2D", "CrossAttention", "Attention", "GEGLU"]),
        ("downsamplers.0.conv", ["ResnetBlock2D", "Transformer2DModel", "Downsample2D", "Upsample2D"]),
    ])  # fmt: skip
    def test_the_classes_are_as_few_as_hold_it(self, tmp_path, only, classes):
        lora = random_lora(NANO, rank=1, only=only, component="unet")
        write_lora(tmp_path / "lora.safetensors", lora, "cloneofsimo")
        _, texts = read_checkpoint(tmp_path / "lora.safetensors")
        assert json.loads(texts["unet"]) == classes and texts["unet:0:rank"] == "1"

    def test_a_pt_is_two_files(self, tmp_path):
        text = random_lora(NANO, rank=2, only="_proj", component="text_encoder")
        unet = random_lora(NANO, rank=2, only="to_q", component="unet")
        write_lora(tmp_path / "a.b.pt", text, "cloneofsimo-pt")
        assert [path.name for path in tmp_path.iterdir()] == ["a.b.text_encoder.pt"]
        with pytest.raises(UserError, match="a.b.text_encoder.pt is beside it"):
            write_lora(tmp_path / "a.b.pt", unet, "cloneofsimo-pt")
        both = LoRA({**text.layers, **unet.layers})
        with pytest.raises(UserError, match="a.b.text_encoder.pt is beside it and .* or replaced: move it away"):
            write_lora(tmp_path / "a.b.pt", both, "cloneofsimo-pt")
        assert [path.name for path in tmp_path.iterdir()] == ["a.b.text_encoder.pt"]
        (tmp_path / "a.b.text_encoder.pt").unlink()
        write_lora(tmp_path / "a.b.pt", both, "cloneofsimo-pt")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.b.pt", "a.b.text_encoder.pt"]
        assert len(read_lora(tmp_path / "a.b.pt").layers) == 80 + 12
        (tmp_path / "a.b.text_encoder.pt").rename(tmp_path / "text.pt")  # told by its shapes as well
        assert len(read_lora(tmp_path / "text.pt").layers) == 12

    def test_a_pt_is_a_list_up_and_down_in_turn(self, tmp_path):
        lora = random_lora(NANO, rank=2, only="to_q", component="unet")
        write_lora(tmp_path / "lora.pt", lora, "cloneofsimo-pt", dtype="fp16")
        checkpoint = open_checkpoint(tmp_path / "lora.pt")
        assert list(checkpoint) == [str(i) for i in range(160)]
        assert checkpoint.shape("0") == (64, 2) and checkpoint.shape("1") == (2, 64)
        assert checkpoint.spec("0")[0] == np.float16

    def test_a_list_of_an_odd_length(self, tmp_path):
        write_torch(tmp_path / "lora.pt", [UP, DOWN, UP])
        with pytest.raises(UserError, match="half of a pair is missing"):
            read_lora(tmp_path / "lora.pt")

    @pytest.mark.parametrize("names", [("5", "7"), ("0", "2"), ("00", "1"), ("²", "1")])
    def test_numbers_that_are_no_list(self, tmp_path, names):
        write_checkpoint(tmp_path / "lora.safetensors", dict(zip(names, (UP, DOWN))))
        with pytest.raises(UserError, match="go by number, and [01] is missing|nor a LoRA: 2 unknown names"):
            read_lora(tmp_path / "lora.safetensors")

    def test_a_list_in_no_known_order(self, tmp_path):
        write_torch(tmp_path / "lora.pt", [UP, DOWN])
        with pytest.raises(UserError, match="its 1 pairs for the UNet are in no order of layers of SD1.x or SD2.x or"):
            read_lora(tmp_path / "lora.pt")
