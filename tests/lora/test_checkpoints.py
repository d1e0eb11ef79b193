"""A LoRA folded into a base on disk, put beside it and taken out again, in whatever names the base has."""

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.lora.checkpoints import EmbeddedArrays, MergedArrays, split_embedded
from ldm.lora.extract import extract_lora
from ldm.lora.lora import LoRA
from ldm.lora.products import LoHa
from ldm.lora.strength import Strength
from ldm.lora.updates import IA3, DoRA, LoRALayer
from ldm.settings.block_weights import BlockWeights
from ldm.weights.base_model import map_base_model
from ldm.weights.checkpoint import open_checkpoint, read_checkpoint, write_checkpoint

UNET, TEXT = "model.diffusion_model.", "cond_stage_model.transformer.text_model.encoder.layers.0."
TO_Q = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_q"
CONV = f"{UNET}input_blocks.1.0.in_layers.2"
Q, K, FC = f"{TEXT}self_attn.q_proj", f"{TEXT}self_attn.k_proj", f"{TEXT}mlp.fc1"
SHAPES = {TO_Q: (8, 6), CONV: (5, 4, 3, 3), Q: (6, 6), K: (6, 6), f"{TEXT}self_attn.v_proj": (6, 6), FC: (24, 6)}
FUSED = {
    "openclip": ("cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight",
                 "cond_stage_model.model.transformer.resblocks.0.mlp.c_fc.weight"),
    "mindone": ("cond_stage_model.transformer.transformer_layer.resblocks.0.attn.attn.in_proj.weight",
                "cond_stage_model.transformer.transformer_layer.resblocks.0.c_fc.weight"),
}  # fmt: skip


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def layer(name, rank=2, alpha=1.0, seed=1):
    shape = SHAPES[name]
    tail = (1,) * (len(shape) - 2)
    return LoRALayer(normal(rank, *shape[1:], seed=seed), normal(shape[0], rank, *tail, seed=seed + 1), alpha)


@pytest.fixture
def lora():
    return LoRA({name: layer(name) for name in (TO_Q, CONV, Q, FC)})


def arrays_of(family="ldm", dtype=np.float32):
    arrays = {f"{name}.weight": normal(*shape).astype(dtype) for name, shape in SHAPES.items()}
    arrays[f"{TO_Q}.bias"] = normal(8, seed=3).astype(dtype)
    for i in range(20):  # a LoRA beside them is not the most of it
        arrays[f"first_stage_model.decoder.up.{i}.bias"] = normal(4, seed=i).astype(dtype)
    if family != "ldm":
        fused, fc = FUSED[family]
        parts = [arrays.pop(f"{TEXT}self_attn.{part}_proj.weight") for part in "qkv"]
        arrays[fused] = np.concatenate(parts)
        arrays[fc] = arrays.pop(f"{FC}.weight")
    return arrays


@pytest.fixture(params=[".safetensors", ".ckpt"])
def base(request, tmp_path):
    path = tmp_path / f"base{request.param}"
    write_checkpoint(path, arrays_of(), {"architecture": "sd1"})
    return open_checkpoint(path)


def canonical(checkpoint):
    from ldm.weights.names import CanonicalArrays

    return dict(CanonicalArrays(checkpoint, map_base_model(checkpoint)))


class TestMerging:
    @pytest.mark.parametrize("scale", [1.0, -0.5])
    def test_adds_the_updates_and_leaves_the_rest(self, base, lora, scale):
        merged = MergedArrays(base, map_base_model(base), [(lora, scale)])
        assert list(merged) == list(base)
        for name, array in base.items():
            layer = lora.layers.get(name.removesuffix(".weight"))
            if layer is None or name.endswith(".bias"):
                np.testing.assert_array_equal(merged[name], array)
            else:
                np.testing.assert_array_equal(merged[name], array + layer.update(scale))

    def test_block_weights_multiply_the_strength_of_each_layer(self, base, lora, caplog):
        blocks = BlockWeights.parse("IN01=0.5,BASE=-2")
        merged = canonical(MergedArrays(base, map_base_model(base), [(lora, Strength(0.7, 0.3, blocks))]))
        expected = canonical(base)
        for name, factor in ((TO_Q, 0.35), (CONV, 0.35), (Q, -0.6), (FC, -0.6)):
            expected[f"{name}.weight"] = expected[f"{name}.weight"] + lora.layers[name].update(factor)
        for name, array in expected.items():
            assert merged[name].tobytes() == array.tobytes(), name
        assert not caplog.records
        for text, words in (("OUTALL", "numbers are for .* has IN01"), ("IN02=1", "has no block IN02. It has IN01,")):
            with pytest.raises(UserError, match=words):
                MergedArrays(base, map_base_model(base), [(lora, Strength(blocks=BlockWeights.parse(text)))])

    def test_scale_zero_changes_no_bit(self, tmp_path, lora):
        arrays = {name: np.where(array > 0.5, np.float32(-0.0), array) for name, array in arrays_of().items()}
        write_checkpoint(tmp_path / "a.ckpt", arrays)
        base = open_checkpoint(tmp_path / "a.ckpt")
        merged = MergedArrays(base, map_base_model(base), [(lora, 0.0)])
        for name in base:
            assert merged[name].tobytes() == arrays[name].tobytes()

    @pytest.mark.parametrize("family", ["openclip", "mindone"])
    def test_fused_layers_get_their_rows(self, tmp_path, lora, family):
        lora.layers[K] = layer(K, seed=5)
        arrays = arrays_of(family)
        write_checkpoint(tmp_path / "a.safetensors", arrays)
        base = open_checkpoint(tmp_path / "a.safetensors")
        merged = MergedArrays(base, map_base_model(base), [(lora, 1.0)])
        fused, fc = FUSED[family]
        np.testing.assert_array_equal(merged[fused][:6], arrays[fused][:6] + lora.layers[Q].update())
        np.testing.assert_array_equal(merged[fused][6:12], arrays[fused][6:12] + lora.layers[K].update())
        np.testing.assert_array_equal(merged[fused][12:], arrays[fused][12:])
        np.testing.assert_array_equal(merged[fc], arrays[fc] + lora.layers[FC].update())

    def test_half_precision_is_summed_in_fp32(self, tmp_path, lora):
        arrays = arrays_of(dtype=np.float16)
        write_checkpoint(tmp_path / "a.ckpt", arrays)
        base = open_checkpoint(tmp_path / "a.ckpt")
        found = MergedArrays(base, map_base_model(base), [(lora, 1.0)])[f"{TO_Q}.weight"]
        wanted = arrays[f"{TO_Q}.weight"].astype(np.float32) + lora.layers[TO_Q].update()
        assert found.dtype == np.float16
        np.testing.assert_array_equal(found, wanted.astype(np.float16))
        with pytest.raises(UserError, match="outside the range of float16"):
            _ = MergedArrays(base, map_base_model(base), [(lora, 1e6)])[f"{TO_Q}.weight"]

    @pytest.mark.parametrize(
        "wrong, says",
        [
            (LoRA({f"{UNET}input_blocks.9.1.to_q": layer(TO_Q)}), "matches nothing"),
            (LoRA({TO_Q: LoRALayer(normal(2, 7), normal(8, 2), 1.0)}), r"\(8, 7\), wanted \(8, 6\)"),
            (LoRA({TO_Q: layer(TO_Q)}, {"architecture": "sd2"}), "architecture is sd2"),
            (LoRA({}), "holds no layers"),
        ],
    )
    def test_what_does_not_fit(self, base, wrong, says):
        with pytest.raises(UserError, match=says):
            MergedArrays(base, map_base_model(base), [(wrong, 1.0)])
        with pytest.raises(UserError, match=says):
            EmbeddedArrays(base, map_base_model(base), wrong)


class TestEmbedding:
    def test_of_other_kinds_gives_both_back_bit_for_bit(self, base, tmp_path):
        loha = {
            "hada_w1_a": normal(6, 2), "hada_w1_b": normal(2, 6), "hada_w2_a": normal(6, 2), "hada_w2_b": normal(2, 6)
        }  # fmt: skip
        layers = {TO_Q: DoRA(layer(TO_Q), np.abs(normal(8))), Q: LoHa(loha, 3.0), CONV: IA3(normal(5), False, 4)}
        lora = LoRA(layers)
        path = tmp_path / f"both{base.path.suffix}"
        write_checkpoint(path, EmbeddedArrays(base, map_base_model(base), lora), base.metadata)
        alone, found = split_embedded(open_checkpoint(path))
        assert list(alone) == list(base) and found.updates().keys() == lora.updates().keys()
        for name, update in lora.updates().items():
            for part, array in update.arrays().items():
                np.testing.assert_array_equal(array.reshape(-1), found.updates()[name].arrays()[part].reshape(-1))

    def test_and_taking_out_gives_both_back_bit_for_bit(self, base, lora, tmp_path):
        path = tmp_path / f"both{base.path.suffix}"
        write_checkpoint(path, EmbeddedArrays(base, map_base_model(base), lora), base.metadata)
        alone, split_lora = split_embedded(open_checkpoint(path))
        assert list(alone) == list(base)
        for name in base:
            np.testing.assert_array_equal(alone[name], base[name])
        assert split_lora.layers.keys() == lora.layers.keys() and split_lora.metadata == {"architecture": "sd1"}
        for name, layer in lora.layers.items():
            np.testing.assert_array_equal(split_lora.layers[name].down, layer.down)
            np.testing.assert_array_equal(split_lora.layers[name].up, layer.up)
            assert split_lora.layers[name].alpha == layer.alpha

    def test_it_is_no_base_that_could_be_loaded(self, base, lora, tmp_path):
        path = tmp_path / f"both{base.path.suffix}"
        write_checkpoint(path, EmbeddedArrays(base, map_base_model(base), lora))
        with pytest.raises(UserError, match="with a LoRA beside its weights.*cvtckpt.py --mode merge"):
            map_base_model(open_checkpoint(path))

    def test_a_plain_base_holds_none(self, base):
        alone, split_lora = split_embedded(base)
        assert alone is base and split_lora is None

    def test_lora_wrappers_embedded_checkpoint(self, tmp_path):
        arrays, layer_ = arrays_of(), layer(TO_Q, rank=2, alpha=1.0)
        for kind in ("weight", "bias"):
            arrays[f"{TO_Q}.base_layer.{kind}"] = arrays.pop(f"{TO_Q}.{kind}")
        arrays |= {f"{TO_Q}.lora_A": layer_.down, f"{TO_Q}.lora_B": layer_.up, f"{TO_Q}.lora_scale": np.float32(0.5)}
        write_checkpoint(tmp_path / "a.ckpt", arrays)
        alone, split_lora = split_embedded(open_checkpoint(tmp_path / "a.ckpt"))
        assert set(alone) == set(arrays_of())
        np.testing.assert_allclose(split_lora.layers[TO_Q].update(), 0.5 * layer_.up @ layer_.down, rtol=1e-5)

    def test_mindones_network_with_lora_in_it(self, tmp_path):
        arrays, layer_ = arrays_of(), layer(TO_Q, rank=2)
        for kind in ("weight", "bias"):
            arrays[f"{TO_Q}.linear.{kind}"] = arrays.pop(f"{TO_Q}.{kind}")
        arrays |= {f"{TO_Q}.lora_down.weight": layer_.down, f"{TO_Q}.lora_up.weight": layer_.up}
        write_checkpoint(tmp_path / "a.ckpt", arrays)
        alone, split_lora = split_embedded(open_checkpoint(tmp_path / "a.ckpt"))
        assert set(alone) == set(arrays_of()) and split_lora.layers[TO_Q].alpha == 2.0

    def test_settings_of_the_whole_file_are_the_loras(self, base, lora, tmp_path):
        path = tmp_path / f"both{base.path.suffix}"
        both = EmbeddedArrays(base, map_base_model(base), lora)
        factors = {name: array for name, array in both.items() if not name.endswith(".alpha")}
        settings = {"lora_rank": np.array(2), "lora_alpha": np.array(6.0), "lora_scale": np.array(0.5)}
        write_checkpoint(path, {**factors, **settings})
        alone, split_lora = split_embedded(open_checkpoint(path))
        assert list(alone) == list(base) and {layer.alpha for layer in split_lora.layers.values()} == {3.0}

    @pytest.mark.parametrize(
        "extra, says",
        [
            ({f"{TO_Q}.lora_A": normal(2, 6)}, "lacks its lora_B"),
            ({f"{TO_Q}.lora_down.weight": normal(2, 6)}, "lacks its up"),
            ({f"{CONV}.lora_A.weight": normal(5, 2, 3, 3), f"{CONV}.lora_B.weight": normal(2, 4, 3, 3)}, "soft convol"),
            ({f"{TO_Q}.lora_A": normal(2, 6), f"{TO_Q}.lora_B": normal(8, 3)}, "no pair of factors"),
        ],
    )
    def test_what_cannot_be_taken_out(self, tmp_path, extra, says):
        write_checkpoint(tmp_path / "a.ckpt", {**arrays_of(), **extra})
        with pytest.raises(UserError, match=says):
            split_embedded(open_checkpoint(tmp_path / "a.ckpt"))


class TestExtracting:
    @pytest.fixture
    def pair(self, tmp_path, lora):
        """(base, its sum with `lora` and other changes): of different families."""
        write_checkpoint(tmp_path / "base.safetensors", arrays_of("openclip"))
        write_checkpoint(tmp_path / "plain.ckpt", arrays_of())
        base = open_checkpoint(tmp_path / "plain.ckpt")
        tuned = dict(MergedArrays(base, map_base_model(base), [(lora, 1.0)]))
        tuned[f"{TO_Q}.bias"] = tuned[f"{TO_Q}.bias"] + 2
        write_checkpoint(tmp_path / "tuned.ckpt", tuned, {"architecture": "sd1", "prediction_type": "epsilon"})
        return tmp_path / "base.safetensors", tmp_path / "tuned.ckpt"

    def test_finds_a_lora_again_that_was_merged(self, pair, lora):
        found = extract_lora(*pair, rank=2)
        assert found.lora.layers.keys() == lora.layers.keys()
        for name, layer in lora.layers.items():
            np.testing.assert_allclose(found.lora.layers[name].update(), layer.update(), rtol=0, atol=2e-6)
        assert found.truncation.error() < 1e-6
        assert found.lora.metadata == {"architecture": "sd1", "prediction_type": "epsilon"}

    def test_says_what_no_lora_holds(self, pair):
        found = extract_lora(*pair, rank=2)
        assert found.left_out == {"unet": (1, pytest.approx(8 * 2.0**2))}
        assert "left out: 1 other arrays of the UNet" in str(found)

    def test_the_shares_are_of_the_whole_distance(self, pair, tmp_path):
        arrays, metadata = read_checkpoint(pair[1])
        arrays[f"{FC}.weight"] = read_checkpoint(tmp_path / "plain.ckpt")[0][f"{FC}.weight"] + 1
        write_checkpoint(tmp_path / "more.ckpt", arrays, metadata)
        found = extract_lora(pair[0], tmp_path / "more.ckpt", rank=2, targets=("attention",))
        shares = [float(line.split("%")[0].rsplit(" ", 1)[1]) for line in str(found).splitlines()[1:]]
        held = sum(row[2] for row in found.truncation.layers.values())
        out = [found.left_out[part][1] for part in ("unet", "text_encoder")]
        assert shares == pytest.approx([100 * one / (held + sum(out)) for one in out], abs=0.006)

    def test_says_what_a_rank_cuts_off(self, pair, lora):
        found = extract_lora(*pair, rank=1)
        lost = sum(np.sum((found.lora.layers[n].update() - e.update()) ** 2) for n, e in lora.layers.items())
        whole = sum(np.sum(e.update() ** 2) for e in lora.layers.values())
        assert found.truncation.error() == pytest.approx(np.sqrt(lost / whole), rel=1e-3)

    def test_some_layers_and_networks(self, pair):
        assert list(extract_lora(*pair, rank=2, targets=("attention",)).lora.layers) == [TO_Q, Q]
        assert list(extract_lora(*pair, rank=2, targets=("attention",), components=("unet",)).lora.layers) == [TO_Q]
        found = extract_lora(*pair, rank=2, targets=("in_layers.*",))
        assert list(found.lora.layers) == [CONV] and found.left_out["text_encoder"][0] == 2

    def test_a_target_that_matches_nothing(self, pair):
        with pytest.raises(UserError, match='"to_qq" matches no layer'):
            extract_lora(*pair, rank=2, targets=("attention", "to_qq"))

    def test_two_that_are_the_same(self, pair):
        with pytest.raises(UserError, match="differ in none"):
            extract_lora(pair[0], pair[0], rank=2)

    @pytest.mark.parametrize("change", ["an array less", "another shape"])
    def test_two_models(self, pair, tmp_path, change):
        arrays, _ = read_checkpoint(pair[1])
        if change == "an array less":
            del arrays[f"{CONV}.weight"]
        else:
            arrays[f"{CONV}.weight"] = normal(5, 5, 3, 3)
        write_checkpoint(tmp_path / "other.ckpt", arrays)
        with pytest.raises(UserError, match="not of one model"):
            extract_lora(pair[0], tmp_path / "other.ckpt", rank=2)
