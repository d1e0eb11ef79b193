"""mindone's and this project's LoRA files: what is written is read back, mindone's own are understood."""

import mindspore as ms
import numpy as np
import pytest

from ldm.errors import UserError
from ldm.lora.formats import parts, read_lora, write_lora
from ldm.lora.inject import get_lora, inject_lora
from ldm.lora.lora import LoRA
from ldm.lora.merge import match_lora
from ldm.lora.spec import LoRASpec
from ldm.lora.updates import LoRALayer
from ldm.weights.checkpoint import read_checkpoint, write_checkpoint

BLOCK = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0."
TO_Q = f"{BLOCK}attn1.to_q"
TEXT = "cond_stage_model.transformer."
TEXT_LAYER = f"{TEXT}text_model.encoder.layers.3.self_attn."
RANDOM = np.random.RandomState(0)


def normal(*shape):
    return RANDOM.standard_normal(shape).astype(np.float32)


def pair(name, rank=4, width=8):
    return {f"{name}.lora_down.weight": normal(rank, width), f"{name}.lora_up.weight": normal(width, rank)}


def same(one, two):
    assert one.layers.keys() == two.layers.keys()
    for name, layer in one.layers.items():
        other = two.layers[name]
        np.testing.assert_array_equal(layer.down, other.down)
        np.testing.assert_array_equal(layer.up, other.up)
        assert layer.alpha == other.alpha
    assert one.metadata == two.metadata


class TestRoundTrip:
    @pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
    def test_every_kind_of_layer_bit_for_bit(self, tiny_model, tiny_config, randomise, tmp_path, suffix):
        inject_lora(tiny_model, LoRASpec(rank=3, alpha=1.5, scale=0.7, targets="all", text_encoder=True))
        randomise(tiny_model)
        lora = get_lora(tiny_model, tiny_config)
        write_lora(tmp_path / f"lora{suffix}", lora)
        back = read_lora(tmp_path / f"lora{suffix}")
        same(back, lora)
        assert match_lora(tiny_model, back).ok

    def test_layers_with_ranks_and_alphas_of_their_own(self, tmp_path):
        lora = LoRA(
            {
                TO_Q: LoRALayer(normal(2, 8), normal(8, 2), 1.0),
                f"{TEXT_LAYER}q_proj": LoRALayer(normal(5, 6), normal(6, 5), 10.0),
            }
        )
        write_lora(tmp_path / "lora.ckpt", lora)
        same(read_lora(tmp_path / "lora.ckpt"), lora)

    def test_mindspore_finds_the_published_entries(self, tmp_path):
        metadata = {"architecture": "sd2", "prediction_type": "v_prediction"}
        write_lora(tmp_path / "lora.ckpt", LoRA({TO_Q: LoRALayer(normal(4, 8), normal(8, 4), 2.0)}, metadata))
        loaded = ms.load_checkpoint(str(tmp_path / "lora.ckpt"))
        assert set(loaded) == {
            f"{TO_Q}.lora_down.weight",
            f"{TO_Q}.lora_up.weight",
            "lora_rank",
            "lora_alpha",
            "lora_scale",
            "architecture",
            "prediction_type",
        }
        assert [float(loaded[key]) for key in ("lora_rank", "lora_alpha", "lora_scale")] == [4.0, 2.0, 1.0]
        assert loaded["architecture"] == "sd2" and loaded["prediction_type"] == "v_prediction"

    def test_factors_are_written_in_fp32(self, tmp_path):
        half = LoRALayer(normal(4, 8).astype(np.float16), normal(8, 4).astype(np.float16), 4.0)
        write_lora(tmp_path / "lora.ckpt", LoRA({TO_Q: half}))
        arrays, _ = read_checkpoint(tmp_path / "lora.ckpt")
        assert {arrays[f"{TO_Q}.lora_{factor}.weight"].dtype for factor in ("down", "up")} == {np.dtype(np.float32)}

    def test_nothing_to_write(self, tmp_path):
        with pytest.raises(UserError, match="no layers"):
            write_lora(tmp_path / "lora.ckpt", LoRA({}))
        with pytest.raises(UserError, match="written as .ckpt or .safetensors"):
            write_lora(tmp_path / "lora.pt", LoRA({TO_Q: LoRALayer(normal(1, 8), normal(8, 1), 1.0)}))
        assert not list(tmp_path.iterdir())


class TestMindonesFiles:
    def save(self, path, arrays, **entries):
        parameters = [{"name": name, "data": ms.Tensor(array)} for name, array in arrays.items()]
        ms.save_checkpoint(parameters, str(path), append_dict=entries or None)
        return path

    def test_without_an_alpha_it_is_the_rank(self, tmp_path):
        arrays = {**pair(TO_Q), **pair(f"{BLOCK}attn1.to_out.0")}
        lora = read_lora(self.save(tmp_path / "lora.ckpt", arrays, lora_rank=4))
        assert set(lora.layers) == {TO_Q, f"{BLOCK}attn1.to_out.0"}
        assert all(layer.alpha == layer.rank == 4 for layer in lora.layers.values())
        assert lora.metadata == {}

    def test_without_any_entry(self, tmp_path):
        assert read_lora(self.save(tmp_path / "lora.ckpt", pair(TO_Q))).layers[TO_Q].alpha == 4

    def test_half_precision(self, tmp_path):
        arrays = {name: array.astype(np.float16) for name, array in pair(TO_Q).items()}
        layer = read_lora(self.save(tmp_path / "lora.ckpt", arrays)).layers[TO_Q]
        assert layer.down.dtype == layer.up.dtype == np.float32
        np.testing.assert_array_equal(layer.down, arrays[f"{TO_Q}.lora_down.weight"].astype(np.float32))

    def test_a_fused_text_projection_is_split_by_rows(self, tmp_path):
        fused = f"{TEXT}transformer_layer.resblocks.3.attn.attn.in_proj"
        arrays = {f"{fused}.lora_down.weight": normal(4, 6), f"{fused}.lora_up.weight": normal(18, 4)}
        arrays.update(pair(f"{TEXT}transformer_layer.resblocks.3.attn.attn.out_proj", width=6))
        lora = read_lora(self.save(tmp_path / "lora.ckpt", arrays, lora_rank=4))
        assert set(lora.layers) == {f"{TEXT_LAYER}{part}_proj" for part in ("q", "k", "v", "out")}
        whole = arrays[f"{fused}.lora_up.weight"] @ arrays[f"{fused}.lora_down.weight"]
        updates = [lora.layers[f"{TEXT_LAYER}{part}_proj"].update() for part in "qkv"]
        np.testing.assert_allclose(np.concatenate(updates), whole, rtol=1e-6)

    def test_base_weights_beside_the_factors_are_left_out_with_a_warning(self, tmp_path, caplog):
        arrays = {**pair(TO_Q), f"{TO_Q}.linear.weight": normal(8, 8)}
        lora = read_lora(self.save(tmp_path / "lora.ckpt", arrays))
        assert list(lora.layers) == [TO_Q]
        assert "1 arrays that are not LoRA's are left out" in caplog.text


class TestEntries:
    def test_alpha_and_scale_of_the_file_make_the_strength(self, tmp_path):
        entries = {"lora_alpha": np.array(8.0), "lora_scale": np.array(0.5)}
        write_checkpoint(tmp_path / "lora.ckpt", {**pair(TO_Q), **entries})
        assert read_lora(tmp_path / "lora.ckpt").layers[TO_Q].alpha == 4.0

    def test_numbers_may_be_texts(self, tmp_path):
        write_checkpoint(tmp_path / "lora.safetensors", pair(TO_Q), {"lora_rank": "4", "lora_alpha": "2"})
        assert read_lora(tmp_path / "lora.safetensors").layers[TO_Q].alpha == 2.0

    @pytest.mark.parametrize("key", ["lora_rank", "lora_alpha", "lora_scale"])
    @pytest.mark.parametrize("value", ["four", "nan", "inf", ""])
    def test_nonsense(self, tmp_path, key, value):
        write_checkpoint(tmp_path / "lora.safetensors", pair(TO_Q), {key: value})
        with pytest.raises(UserError, match=f"lora.safetensors: {key}"):
            read_lora(tmp_path / "lora.safetensors")

    @pytest.mark.parametrize("rank", [0, -1, 8])
    def test_a_rank_that_is_not_the_factors(self, tmp_path, rank):
        write_checkpoint(tmp_path / "lora.ckpt", {**pair(TO_Q), "lora_rank": np.array(rank)})
        with pytest.raises(UserError, match="lora_rank"):
            read_lora(tmp_path / "lora.ckpt")


class TestAlphas:
    @pytest.mark.parametrize("alpha", [np.array(2), np.array([2.0], np.float32), np.array([[2]], np.float16)])
    def test_of_any_type(self, tmp_path, alpha):
        write_checkpoint(tmp_path / "lora.ckpt", {**pair(TO_Q), f"{TO_Q}.alpha": alpha})
        assert read_lora(tmp_path / "lora.ckpt").layers[TO_Q].alpha == 2.0

    @pytest.mark.parametrize("alpha", [np.ones(2, np.float32), np.ones(0, np.float32)])
    def test_that_is_no_number(self, tmp_path, alpha):
        write_checkpoint(tmp_path / "lora.safetensors", {**pair(TO_Q), f"{TO_Q}.alpha": alpha})
        with pytest.raises(UserError, match=f"lora.safetensors: {TO_Q}"):
            read_lora(tmp_path / "lora.safetensors")


class TestOtherKinds:
    LOHA = {
        "hada_w1_a": np.ones((8, 1), np.float32), "hada_w1_b": np.ones((1, 4), np.float32),
        "hada_w2_a": np.ones((8, 1), np.float32), "hada_w2_b": np.ones((1, 4), np.float32),
    }  # fmt: skip

    def test_a_scale_that_only_pairs_have(self, tmp_path):
        arrays = {f"{TO_Q}.{part}": array for part, array in self.LOHA.items()}
        write_checkpoint(tmp_path / "lora.ckpt", {**arrays, "lora_scale": np.array(1.0)})
        assert read_lora(tmp_path / "lora.ckpt").layers[TO_Q].delta().max() == 1
        write_checkpoint(tmp_path / "lora.ckpt", {**arrays, "lora_scale": np.array(0.5)})
        with pytest.raises(UserError, match="lora_scale is 0.5, which only pairs"):
            read_lora(tmp_path / "lora.ckpt")

    def test_a_bias_of_three_layers_in_one_is_split_like_its_factors(self, tmp_path):
        fused = f"{TEXT}transformer_layer.resblocks.3.attn.attn.in_proj"
        arrays = {
            f"{fused}.lora_down.weight": normal(2, 4), f"{fused}.lora_up.weight": normal(12, 2),
            f"{fused}.diff_b": np.arange(12, dtype=np.float32),
        }  # fmt: skip
        write_checkpoint(tmp_path / "lora.ckpt", arrays)
        lora = read_lora(tmp_path / "lora.ckpt")
        biases = [lora.biases[f"{TEXT_LAYER}{part}_proj"].difference for part in "qkv"]
        np.testing.assert_array_equal(np.concatenate(biases), np.arange(12))
        write_checkpoint(tmp_path / "lora.ckpt", {**arrays, f"{fused}.diff_b": np.zeros(9, np.float32)})
        with pytest.raises(UserError, match="the 12 rows of .*in_proj are not those of 3 layers"):
            read_lora(tmp_path / "lora.ckpt")

    def test_a_third_factor_that_would_fill_the_memory(self, tmp_path, monkeypatch):
        monkeypatch.setattr(parts, "with_mid", None)
        arrays = {
            f"{TO_Q}.lora_down.weight": normal(1, 8_200), f"{TO_Q}.lora_mid.weight": normal(8_200, 1, 1, 1),
            f"{TO_Q}.lora_up.weight": normal(1, 8_200),
        }  # fmt: skip
        write_checkpoint(tmp_path / "lora.ckpt", arrays)
        with pytest.raises(UserError, match="make a factor of 67,240,000 values"):
            read_lora(tmp_path / "lora.ckpt")


class TestDamage:
    @pytest.mark.parametrize("half", ["lora_down", "lora_up"])
    def test_half_a_pair(self, tmp_path, half):
        arrays = {**pair(TO_Q), **pair(f"{BLOCK}attn1.to_k")}
        del arrays[f"{TO_Q}.{half}.weight"]
        write_checkpoint(tmp_path / "lora.ckpt", arrays)
        with pytest.raises(UserError, match=f"{TO_Q} lacks its {half[len('lora_') :]}"):
            read_lora(tmp_path / "lora.ckpt")

    def test_factors_of_different_ranks(self, tmp_path):
        arrays = pair(TO_Q)
        arrays[f"{TO_Q}.lora_up.weight"] = normal(8, 5)
        write_checkpoint(tmp_path / "lora.ckpt", arrays)
        with pytest.raises(UserError, match="no pair of factors"):
            read_lora(tmp_path / "lora.ckpt")

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_values_that_are_not_finite(self, tmp_path, value):
        arrays = pair(TO_Q)
        arrays[f"{TO_Q}.lora_up.weight"][3, 1] = value
        write_checkpoint(tmp_path / "lora.ckpt", arrays)
        with pytest.raises(UserError, match=f"{TO_Q} holds values that are not finite"):
            read_lora(tmp_path / "lora.ckpt")

    def test_a_fused_projection_that_does_not_divide(self, tmp_path):
        fused = f"{TEXT}transformer_layer.resblocks.3.attn.attn.in_proj"
        arrays = {f"{fused}.lora_down.weight": normal(4, 6), f"{fused}.lora_up.weight": normal(17, 4)}
        write_checkpoint(tmp_path / "lora.ckpt", arrays)
        with pytest.raises(UserError, match="17 rows"):
            read_lora(tmp_path / "lora.ckpt")

    def test_the_same_layer_whole_and_fused(self, tmp_path):
        fused = f"{TEXT}transformer_layer.resblocks.3.attn.attn.in_proj"
        arrays = {f"{fused}.lora_down.weight": normal(4, 6), f"{fused}.lora_up.weight": normal(18, 4)}
        write_checkpoint(tmp_path / "lora.ckpt", {**arrays, **pair(f"{TEXT_LAYER}k_proj", width=6)})
        with pytest.raises(UserError, match="k_proj is there twice"):
            read_lora(tmp_path / "lora.ckpt")

    def test_a_layer_that_no_stable_diffusion_has(self, tmp_path):
        write_checkpoint(tmp_path / "lora.ckpt", pair(f"{TEXT}towers.0.attn"))
        with pytest.raises(UserError, match="no layer of Stable Diffusion"):
            read_lora(tmp_path / "lora.ckpt")

    def test_a_cut_off_file(self, tmp_path):
        write_checkpoint(tmp_path / "lora.ckpt", pair(TO_Q))
        content = (tmp_path / "lora.ckpt").read_bytes()
        (tmp_path / "lora.ckpt").write_bytes(content[: len(content) // 3])
        with pytest.raises(UserError, match="cut off"):
            read_lora(tmp_path / "lora.ckpt")
