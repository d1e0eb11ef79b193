"""tools/lora: lora_add with the original's command line and meaning, cvtckpt's three modes, extract and resize."""

import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.files.outputs import claim_new
from ldm.lora.algebra import relative_difference, weighted_sum
from ldm.lora.formats import detect_format, read_lora, write_lora
from ldm.lora.formats.modules import known_bases
from ldm.lora.lora import LoRA
from ldm.lora.merge import Update, add_updates
from ldm.lora.products import LoHa
from ldm.lora.strength import Strength
from ldm.lora.updates import DoRA, LoRALayer
from ldm.weights.base_model import map_base_model, open_base_model
from ldm.weights.checkpoint import read_checkpoint, write_checkpoint
from ldm.weights.names import CanonicalArrays
from tests.lora.formats.files import random_lora
from tools.lora import cvtckpt, extract_lora, lora_add, resize_lora

ROOT = Path(__file__).resolve().parents[2]
TO_Q = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q"
Q = "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj"
WIDTH = 96  # of the nano text encoder
NANO_BASE = str(ROOT / "models" / "nano" / "nano.safetensors")
VAE = "first_stage_model.decoder.conv_in.weight"


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def lora(rank, seed, alpha=None):
    alpha = float(rank if alpha is None else alpha)
    return LoRA({
        TO_Q: LoRALayer(normal(rank, 6, seed=seed), normal(8, rank, seed=seed + 1), alpha),
        Q: LoRALayer(normal(rank, 5, seed=seed + 2), normal(5, rank, seed=seed + 3), alpha),
    })  # fmt: skip


ONE, TWO, THREE = lora(2, 10, alpha=1.0), lora(2, 20), lora(3, 30)


@pytest.fixture
def files(tmp_path):
    """(folder, paths of three LoRAs by name)."""
    paths = {}
    for name, source in (("one", ONE), ("two", TWO), ("three", THREE)):
        paths[name] = str(tmp_path / f"{name}.ckpt")
        write_lora(paths[name], source)
    return tmp_path, paths


@pytest.fixture
def base(tmp_path):
    arrays = {f"{TO_Q}.weight": normal(8, 6), f"{TO_Q}.bias": normal(8), f"{Q}.weight": normal(5, 5),
              VAE: normal(4, 3, 3, 3)}  # fmt: skip
    write_checkpoint(tmp_path / "base.ckpt", arrays, {"architecture": "custom", "prediction_type": "epsilon"})
    return str(tmp_path / "base.ckpt"), arrays


@pytest.fixture
def folder(tmp_path):
    """A diffusers folder with one layer in each network, and what else such a folder has."""
    root = tmp_path / "folder"
    arrays = {
        "unet": {"conv_in.weight": normal(4, 4, 3, 3), "down_blocks.0.resnets.0.conv1.bias": normal(4),
                 "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight": normal(8, 6)},
        "text_encoder": {"text_model.encoder.layers.0.self_attn.q_proj.weight": normal(5, 5)},
        "vae": {"decoder.conv_in.weight": normal(4, 3, 3, 3)},
    }  # fmt: skip
    for part in arrays:
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        write_checkpoint(root / part / f"{stem}.safetensors", arrays[part], {"format": "pt"})
        (root / part / "config.json").write_text("{}")
    write_checkpoint(root / "unet" / "diffusion_pytorch_model.fp16.safetensors", arrays["unet"])
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "notes.txt").write_text('{"a": 0}')
    (root / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    return root, arrays


def assert_sum(path, *weighted):
    assert relative_difference(read_lora(path), weighted_sum(weighted)) < 1e-6


class TestLoRAAndLoRA:
    def test_two_are_mixed_as_the_original_mixes_them_unless_told_otherwise(self, files, capsys):
        tmp_path, paths = files
        out = str(tmp_path / "out.ckpt")
        lora_add.main(["--path_1", paths["one"], "--path_2", paths["two"], "--alpha", "0.3", "--output_path", out])
        found = read_lora(out).layers[TO_Q]
        one, two = ONE.layers[TO_Q], TWO.layers[TO_Q]
        np.testing.assert_allclose(found.down, 0.3 * one.down + 0.7 * two.down, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.up, 0.3 * 0.5 * one.up + 0.7 * two.up, rtol=1e-5, atol=1e-6)
        assert "against the exact weighted sum (--mode sum)" in capsys.readouterr().out

    def test_sum_is_exact(self, files):
        tmp_path, paths = files
        out = str(tmp_path / "out.safetensors")
        lora_add.main(["--path_1", paths["one"], "--path_2", paths["three"], "--mode", "sum", "--alpha", "0.3",
                       "--output_path", out])  # fmt: skip
        assert_sum(out, (ONE, 0.3), (THREE, 0.7))

    def test_join_leaves_alpha_alone(self, files):
        tmp_path, paths = files
        out = str(tmp_path / "out.ckpt")
        lora_add.main(["--path_1", paths["one"], "--path_2", paths["three"], "--mode", "ljl", "--alpha", "0.1",
                       "--output_path", out])  # fmt: skip
        assert_sum(out, (ONE, 1.0), (THREE, 1.0))
        assert read_lora(out).ranks() == [5]

    def test_any_number_with_weights_of_their_own(self, files, capsys):
        tmp_path, paths = files
        out = str(tmp_path / "out.ckpt")
        lora_add.main(["--paths", f"{paths['one']}:0.7", f"{paths['two']}:-0.5:0", paths["three"],
                       "--output_path", out])  # fmt: skip
        assert_sum(out, (ONE, 0.7), (TWO, Strength(-0.5, 0.0)), (THREE, 1.0))
        assert "strength -0.5 (text encoder 0)" in capsys.readouterr().out

    def test_block_weights_multiply_the_strengths(self, files, capsys, caplog):
        tmp_path, paths = files
        out = str(tmp_path / "out.ckpt")
        lora_add.main(["--paths", paths["one"], f"{paths['three']}:0.5", "--output_path", out,
                       "--lora_block_weights", "IN01=0.5", "MIDD"])  # fmt: skip
        assert_sum(out, (ONE, Strength(0.5, 1.0)), (THREE, Strength(0.0, 0.5)))
        printed = capsys.readouterr().out
        assert "strength 1, blocks IN01=0.5" in printed and "strength 0.5, blocks MIDD" in printed
        out = str(tmp_path / "all.ckpt")
        lora_add.main(["--paths", paths["one"], paths["three"], "--output_path", out, "--lora_block_weights",
                       "BASE=0,MID=0"])  # fmt: skip
        assert_sum(out, (ONE.only("unet"), 1.0), (THREE.only("unet"), 1.0))
        assert f"{paths['three']} has no layer in MID" in caplog.text

    def test_the_originals_order_without_flags(self, files):
        tmp_path, paths = files
        out = str(tmp_path / "out.ckpt")
        lora_add.main([paths["one"], paths["two"], out, "0.25", "--mode", "sum"])
        assert_sum(out, (ONE, 0.25), (TWO, 0.75))

    def test_a_pt_is_written_as_the_originals(self, tmp_path):
        nano = known_bases()[2]
        paths = [tmp_path / "a.pt", tmp_path / "b.pt", tmp_path / "out.pt"]
        sources = [random_lora(nano, rank=2, only="to_q", component="unet", seed=seed) for seed in (1, 2)]
        for path, source in zip(paths, sources):
            write_lora(path, source, "cloneofsimo-pt")
        lora_add.main([*map(str, paths), "0.3"])
        assert detect_format(paths[2]) == "cloneofsimo-pt"
        found = read_lora(paths[2])
        for name in sources[0].layers:
            one, two = (source.layers[name] for source in sources)
            np.testing.assert_allclose(found.layers[name].down, 0.3 * one.down + 0.7 * two.down, rtol=1e-5, atol=1e-6)

    def test_two_weights_as_in_later_versions(self, files):
        tmp_path, paths = files
        out = str(tmp_path / "out.ckpt")
        lora_add.main([paths["one"], paths["two"], out, "--alpha_1=0.9", "--alpha_2=0.8", "--mode", "sum"])
        assert_sum(out, (ONE, 0.9), (TWO, 0.8))

    def test_down_to_a_rank_with_its_error(self, files, capsys):
        tmp_path, paths = files
        out = str(tmp_path / "out.ckpt")
        lora_add.main(["--paths", paths["one"], paths["two"], "--output_path", out, "--rank", "2"])
        assert read_lora(out).ranks() == [2]
        off = relative_difference(read_lora(out), weighted_sum([(ONE, 1.0), (TWO, 1.0)]))
        assert off > 0.1 and f"all together {off:.2g}" in capsys.readouterr().out

    def test_without_the_text_encoder(self, files):
        tmp_path, paths = files
        out = str(tmp_path / "out.ckpt")
        lora_add.main([paths["one"], paths["two"], out, "--mode", "sum", "--with_text_lora", "False"])
        assert list(read_lora(out).layers) == [TO_Q]

    @pytest.mark.parametrize(
        "words, says",
        [
            (["{one}", "{three}", "{out}"], "same rank.*--mode sum"),
            (["--paths", "{one}", "{two}", "{three}", "--mode", "lpl", "--output_path", "{out}"], "takes two"),
            (["{one}:1:0", "{two}", "{out}"], "one strength for both networks"),
            (["{one}", "{two}", "{out}", "--lora_block_weights", "MID=0"], "one strength for all layers.*--mode sum"),
            (
                ["--paths", "{one}", "--output_path", "{out}", "--lora_block_weights", "MID=0", "MID=0"],
                "--lora_block_weights has 2 texts for 1 LoRAs",
            ),
            (["--paths", "{one}", "--output_path", "{out}", "--lora_block_weights", "1,0"], "has 2 numbers"),
            (["--paths", "{one}", "--output_path", "{out}", "--lora_block_weights", "NONE"], "nothing is left"),
            (["{one}", "nowhere.ckpt", "{out}"], "nowhere.ckpt does not exist"),
            (["{one}:x", "{two}", "{out}"], "after the colon is not a number"),
            (["{one}:nan", "{two}", "{out}"], "nan.* after the colon is not a number"),
            (["--paths", "{one}:0", "--output_path", "{out}"], "nothing is left"),
            (["--paths", "{one}", "--output_path", "{out}", "--rank", "0"], "--rank: 0 is not allowed: at least 1"),
            (["--mode", "sum", "--output_path", "{out}"], "takes at least one"),
            (
                ["--mode", "upl", "--path_1", "{one}", "--path_2", "{two}", "--output_path", "{out}"],
                "is a LoRA, not a base model",
            ),
        ],
    )
    def test_mistakes(self, files, words, says):
        tmp_path, paths = files
        out = tmp_path / "out.ckpt"
        with pytest.raises(UserError, match=says):
            lora_add.main([word.format(**paths, out=out) for word in words])
        assert not out.exists()

    @pytest.mark.parametrize(
        "words, says",
        [
            (["a", "b"], "--output_path is needed"),
            (["a", "b", "c", "0.5", "d"], "5 values without a flag"),
            (["--mode", "upl", "--path_2", "b", "--output_path", "c"], "--path_1 is needed"),
            (["--mode", "add", "a", "b", "c"], "--mode: .add. is not allowed: one of .lpl."),
            (["a", "b", "c", "--with_text_lora", "perhaps"], "with_text_lora: .perhaps. is not True or False"),
            (["a", "b", "c", "x"], '--alpha: "x" is not a number'),
            (["a", "b", "c", "--alpha", "nan"], '--alpha: "nan" is not a number'),
            (["--path1", "a", "b", "c"], "unknown setting --path1: did you mean --path_1?"),
        ],
    )
    def test_mistakes_in_the_flags(self, words, says):
        with pytest.raises(UserError, match=says):
            lora_add.main(words)


class TestBaseAndLoRA:
    def test_alpha_is_the_weight(self, files, base):
        tmp_path, paths = files
        path, arrays = base
        out = tmp_path / "merged.ckpt"
        lora_add.main(["--path_1", path, "--path_2", paths["one"], "--mode", "upl", "--alpha", "0.6",
                       "--output_path", str(out)])  # fmt: skip
        merged, metadata = read_checkpoint(out)
        assert merged.keys() == arrays.keys() and metadata["architecture"] == "custom"
        for name in (TO_Q, Q):
            wanted = arrays[f"{name}.weight"] + ONE.layers[name].update(0.6)
            np.testing.assert_allclose(merged[f"{name}.weight"], wanted, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(merged[VAE], arrays[VAE])

    def test_several(self, files, base):
        tmp_path, paths = files
        path, arrays = base
        out = tmp_path / "merged.safetensors"
        lora_add.main(["--path_1", path, "--paths", f"{paths['one']}:0.5", f"{paths['three']}:-1:2", "--mode", "upl",
                       "--output_path", str(out)])  # fmt: skip
        merged, _ = read_checkpoint(out)
        for name, weights in ((TO_Q, (0.5, -1)), (Q, (0.5, 2))):
            update = ONE.layers[name].update(weights[0]) + THREE.layers[name].update(weights[1])
            wanted = arrays[f"{name}.weight"] + update
            np.testing.assert_allclose(merged[f"{name}.weight"], wanted, rtol=1e-5, atol=1e-5)

    def test_block_weights(self, files, base):
        tmp_path, paths = files
        path, arrays = base
        out = tmp_path / "merged.safetensors"
        lora_add.main(["--path_1", path, "--paths", paths["one"], "--mode", "upl", "--output_path", str(out),
                       "--lora_block_weights", "IN01=0.5,BASE=0"])  # fmt: skip
        merged, _ = read_checkpoint(out)
        np.testing.assert_allclose(merged[f"{TO_Q}.weight"], arrays[f"{TO_Q}.weight"] + ONE.layers[TO_Q].update(0.5))
        np.testing.assert_array_equal(merged[f"{Q}.weight"], arrays[f"{Q}.weight"])
        for text, says in (("OUTALL", "17 numbers.*base.ckpt has IN01"), ("MID=1", "base.ckpt has no block MID")):
            with pytest.raises(UserError, match=f"one.ckpt: block weights .*{says}"):
                lora_add.main(["--path_1", path, "--paths", paths["one"], "--mode", "upl", "--output_path",
                               str(tmp_path / "no.ckpt"), "--lora_block_weights", text])  # fmt: skip
        assert not (tmp_path / "no.ckpt").exists()

    def test_a_diffusers_folder_stays_one(self, files, folder):
        tmp_path, paths = files
        root, arrays = folder
        out = tmp_path / "merged"
        lora_add.main([str(root), paths["one"], str(out), "1.0", "--mode", "upl"])
        unet, _ = read_checkpoint(out / "unet" / "diffusion_pytorch_model.safetensors")
        text, _ = read_checkpoint(out / "text_encoder" / "model.safetensors")
        key = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
        np.testing.assert_allclose(unet[key], arrays["unet"][key] + ONE.layers[TO_Q].update(), rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(unet["conv_in.weight"], arrays["unet"]["conv_in.weight"])
        key = "text_model.encoder.layers.0.self_attn.q_proj.weight"
        wanted = arrays["text_encoder"][key] + ONE.layers[Q].update()
        np.testing.assert_allclose(text[key], wanted, rtol=1e-5, atol=1e-5)
        assert (out / "tokenizer" / "notes.txt").exists() and (out / "model_index.json").exists()
        assert (out / "unet" / "config.json").exists()
        # not the weights of the base in another type: a reader that prefers them would not see the LoRA
        assert [path.name for path in (out / "unet").glob("*.safetensors")] == ["diffusion_pytorch_model.safetensors"]
        with pytest.raises(UserError, match="exists: choose another name"):
            lora_add.main([str(root), paths["one"], str(out), "1.0", "--mode", "upl"])

    @pytest.mark.parametrize("flag", [("--rank", "2"), ("--energy", "0.9"), ("--to", "kohya"), ("--dtype", "fp16")])
    @pytest.mark.parametrize("mode", ["upl", "upl-ckpt-v2"])
    def test_flags_of_a_lora_make_no_sense(self, files, base, mode, flag):
        tmp_path, paths = files
        with pytest.raises(UserError, match=f"{flag[0]} is for a LoRA: leave it out, mode {mode} writes"):
            lora_add.main([base[0], paths["one"], str(tmp_path / "o.ckpt"), "--mode", mode, *flag])
        assert not (tmp_path / "o.ckpt").exists()


class TestCvtckpt:
    def run(self, mode, model, out, *others):
        cvtckpt.main(["--mode", mode, "--model_ckpt", str(model), "--out_ckpt", str(out), *map(str, others)])

    def test_embed_then_extract_gives_both_back(self, files, base):
        tmp_path, paths = files
        path, arrays = base
        self.run("embed", path, tmp_path / "both.ckpt", "--lora_ckpt", paths["three"])
        self.run("extract", tmp_path / "both.ckpt", tmp_path / "lora.safetensors",
                 "--out_base", tmp_path / "alone.ckpt")  # fmt: skip
        alone, metadata = read_checkpoint(tmp_path / "alone.ckpt")
        assert alone.keys() == arrays.keys() and metadata["prediction_type"] == "epsilon"
        for name, array in arrays.items():
            np.testing.assert_array_equal(alone[name], array)
        found = read_lora(tmp_path / "lora.safetensors")
        for name, layer in THREE.layers.items():
            np.testing.assert_array_equal(found.layers[name].up, layer.up)
            assert found.layers[name].alpha == layer.alpha

    def test_several_are_embedded_as_their_sum(self, files, base):
        tmp_path, paths = files
        self.run("embed", base[0], tmp_path / "both.ckpt", "--lora_ckpt", f"{paths['one']}:0.5", paths["three"])
        self.run("extract", tmp_path / "both.ckpt", tmp_path / "lora.ckpt")
        assert_sum(tmp_path / "lora.ckpt", (ONE, 0.5), (THREE, 1.0))

    def test_block_weights_are_for_the_loras_that_are_added(self, files, base):
        tmp_path, paths = files
        path, arrays = base
        given = ["--lora_ckpt", f"{paths['three']}:2", "--lora_block_weights", "IN01=0.25,BASE=0"]
        self.run("embed", path, tmp_path / "both.ckpt", *given)
        self.run("extract", tmp_path / "both.ckpt", tmp_path / "lora.ckpt")
        assert_sum(tmp_path / "lora.ckpt", (THREE, Strength(0.5, 0.0)))
        self.run("merge", tmp_path / "both.ckpt", tmp_path / "merged.ckpt", *given)
        merged, _ = read_checkpoint(tmp_path / "merged.ckpt")
        np.testing.assert_allclose(merged[f"{TO_Q}.weight"], arrays[f"{TO_Q}.weight"] + THREE.layers[TO_Q].update(1.0),
                                   rtol=1e-6, atol=1e-6)  # fmt: skip
        np.testing.assert_array_equal(merged[f"{Q}.weight"], arrays[f"{Q}.weight"])

    @pytest.mark.parametrize("way", ["files", "embedded", "both"])
    def test_merge(self, files, base, way):
        tmp_path, paths = files
        path, arrays = base
        given = ["--lora_ckpt", f"{paths['one']}:0.5"]
        if way == "embedded":
            self.run("embed", path, tmp_path / "both.ckpt", *given)
            path, given = tmp_path / "both.ckpt", []
        elif way == "both":
            self.run("embed", path, tmp_path / "both.ckpt", "--lora_ckpt", f"{paths['one']}:-0.5")
            path, given = tmp_path / "both.ckpt", ["--lora_ckpt", paths["one"]]
        self.run("merge", path, tmp_path / "merged.ckpt", *given)
        merged, _ = read_checkpoint(tmp_path / "merged.ckpt")
        assert merged.keys() == arrays.keys()
        for name, layer in ONE.layers.items():
            wanted = arrays[f"{name}.weight"] + layer.update(0.5)
            np.testing.assert_allclose(merged[f"{name}.weight"], wanted, rtol=1e-5, atol=1e-6)

    def test_merging_and_merging_its_negative_is_the_base_within_rounding(self, files, base):
        tmp_path, paths = files
        self.run("merge", base[0], tmp_path / "a.ckpt", "--lora_ckpt", f"{paths['one']}:0.8")
        self.run("merge", tmp_path / "a.ckpt", tmp_path / "b.ckpt", "--lora_ckpt", f"{paths['one']}:-0.8")
        back, _ = read_checkpoint(tmp_path / "b.ckpt")
        for name, array in base[1].items():
            np.testing.assert_allclose(back[name], array, rtol=0, atol=1e-6)

    @pytest.mark.parametrize(
        "mode, model, others, says",
        [
            ("extract", "base", [], "has no LoRA beside its weights"),
            ("merge", "base", [], "nothing to merge"),
            ("embed", "base", [], "--lora_ckpt is needed"),
            ("extract", "base", ["--lora_ckpt", "{one}"], "leave out --lora_ckpt"),
            ("extract", "both", ["--lora_block_weights", "MID=1"], "leave out --lora_block_weights"),
            ("merge", "both", ["--lora_block_weights", "MID=1"], "is for LoRAs of --lora_ckpt"),
            ("merge", "base", ["--lora_ckpt", "{one}", "--lora_block_weights", "MID=1"], "base.ckpt has no block MID"),
            ("embed", "base", ["--lora_ckpt", "{one}", "--lora_block_weights", "ALL"], "base.ckpt has IN01"),
            ("merge", "base", ["--lora_ckpt", "{one}", "--lora_block_weights", "0,1"], "has 2 numbers"),
            ("embed", "both", ["--lora_ckpt", "{one}"], "has a LoRA in it"),
            ("merge", "one", ["--lora_ckpt", "{two}"], "without any arrays|LoRA"),
            ("merge", "base", ["--lora_ckpt", "{one}:0"], "nothing is left"),
            ("merge", "base", ["--lora_ckpt", "{one}", "--to", "kohya"], "--to belongs to --mode extract"),
            ("embed", "base", ["--lora_ckpt", "{one}", "--dtype", "fp16"], "--dtype belongs to --mode extract"),
            ("merge", "both", ["--out_base", "b.ckpt"], "--out_base belongs to --mode extract"),
        ],
    )
    def test_mistakes(self, files, base, mode, model, others, says):
        tmp_path, paths = files
        self.run("embed", base[0], tmp_path / "both.ckpt", "--lora_ckpt", paths["one"])
        models = {"base": base[0], "both": tmp_path / "both.ckpt", "one": paths["one"]}
        with pytest.raises(UserError, match=says):
            self.run(mode, models[model], tmp_path / "out.ckpt", *(word.format(**paths) for word in others))
        assert not (tmp_path / "out.ckpt").exists()


class TestExtractAndResize:
    def test_a_merged_lora_is_found_again(self, files, base, capsys):
        tmp_path, paths = files
        cvtckpt.main(["--mode", "merge", "--model_ckpt", base[0], "--lora_ckpt", paths["three"], "--out_ckpt",
                      str(tmp_path / "tuned.safetensors")])  # fmt: skip
        extract_lora.main(["--base_model", base[0], "--target_model", str(tmp_path / "tuned.safetensors"),
                           "--rank", "3", "--save_path", str(tmp_path / "found.ckpt")])  # fmt: skip
        assert "relative error" in capsys.readouterr().out
        assert relative_difference(read_lora(tmp_path / "found.ckpt"), THREE) < 1e-6

    def test_resize_says_what_it_costs(self, files, capsys):
        tmp_path, paths = files
        resize_lora.main(["--source", paths["three"], "--target", str(tmp_path / "small.ckpt"), "--rank", "2"])
        found = read_lora(tmp_path / "small.ckpt")
        assert found.ranks() == [2]
        assert f"all together {relative_difference(found, THREE):.2g}" in capsys.readouterr().out

    def test_resize_wants_a_size(self, files):
        with pytest.raises(UserError, match="neither a rank nor an energy"):
            resize_lora.main(["--source", files[1]["three"], "--target", "small.ckpt"])


def test_a_tool_runs_from_anywhere_and_ends_with_one_line(tmp_path):
    words = [sys.executable, str(ROOT / "tools" / "lora" / "lora_add.py"), "a.ckpt", "b.ckpt", "c.ckpt"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == "error: LoRA a.ckpt does not exist: check the path"


@pytest.mark.parametrize("tool, flags", [
    (lora_add, "--path_1 IN --path_2 IN --output_path OUT"),
    (lora_add, "--mode upl --path_1 BASE --path_2 IN --output_path OUT"),
    (cvtckpt, "--mode embed --model_ckpt BASE --lora_ckpt IN --out_ckpt OUT"),
    (cvtckpt, "--mode extract --model_ckpt BOTH --out_ckpt new.ckpt --out_base OUT"),
    (cvtckpt, "--mode merge --model_ckpt BASE --lora_ckpt IN --out_ckpt OUT"),
    (extract_lora, "--base_model BASE --target_model BASE --save_path OUT"),
    (resize_lora, "--source IN --target OUT --rank 1"),
])  # fmt: skip
def test_nothing_takes_the_place_of_a_file(files, base, monkeypatch, tool, flags):
    tmp_path, paths = files
    monkeypatch.chdir(tmp_path)
    Path("out.ckpt").write_text("dear")
    places = {"IN": paths["one"], "BASE": base[0], "BOTH": base[0], "OUT": "out.ckpt"}
    with pytest.raises(UserError, match="out.ckpt exists: choose another name, or remove it first"):
        tool.main([str(places.get(word, word)) for word in flags.split()])
    assert Path("out.ckpt").read_text() == "dear" and not Path("new.ckpt").exists()


TOOLS = [
    (lora_add, "nowhere.ckpt nowhere.ckpt --output_path", ("kohya", "--to", "kohya")),
    (lora_add, "nowhere.ckpt nowhere.ckpt --mode upl --output_path", ("base model",)),
    (lora_add, "nowhere.ckpt nowhere.ckpt --mode upl-ckpt-v2 --output_path", ("base model",)),
    (cvtckpt, "--mode embed --model_ckpt nowhere.ckpt --lora_ckpt nowhere.ckpt --out_ckpt", ("base model",)),
    (cvtckpt, "--mode merge --model_ckpt nowhere.ckpt --lora_ckpt nowhere.ckpt --out_ckpt", ("base model",)),
    (cvtckpt, "--mode extract --model_ckpt nowhere.ckpt --out_ckpt", ("kohya", "--to", "kohya")),
    (cvtckpt, "--mode extract --model_ckpt nowhere.ckpt --out_ckpt x.ckpt --out_base", ("base model",)),
    (extract_lora, "--base_model nowhere.ckpt --target_model nowhere.ckpt --save_path", ("kohya", "--to", "kohya")),
    (resize_lora, "--source nowhere.ckpt --rank 1 --target", ("kohya", "--to", "kohya")),
]


@pytest.mark.parametrize("tool, flags, wrong", TOOLS)
def test_an_output_that_cannot_be_is_refused_before_any_input_is_read(tmp_path, monkeypatch, tool, flags, wrong):
    monkeypatch.chdir(tmp_path)
    Path("dead").symlink_to("nowhere/else")
    Path("file").touch()
    for output, words in (
        ("dead/out.ckpt", "dead is a link to nowhere/else, which does not exist"),
        ("file/out.ckpt", "as .*file is a file"),
        ("n" * 251 + ".ckpt", "File name too long: choose a shorter path"),
    ):
        with pytest.raises(UserError, match=words):
            tool.main([*flags.split(), output])
    with pytest.raises(UserError, match=f"out.bin: .*({wrong[0]} is written as|a name that ends in)"):
        tool.main([*flags.split(), "out.bin", *wrong[1:]])
    with claim_new("out.ckpt", "another"), pytest.raises(UserError, match="out.ckpt is the path of two outputs"):
        tool.main([*flags.split(), "out.ckpt"])
    with pytest.raises(UserError, match="nowhere.ckpt does not exist|nowhere.ckpt.*No such file"):
        tool.main([*flags.split(), "~/made/out.ckpt"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dead", "file"]


def test_what_lies_beside_an_output_is_tried_too(files, base, monkeypatch):
    tmp_path, paths = files
    monkeypatch.chdir(tmp_path)
    Path("out.text_encoder.pt").symlink_to("nowhere/else")
    with pytest.raises(UserError, match="out.text_encoder.pt exists"):
        resize_lora.main(["--source", paths["one"], "--rank", "1", "--target", "out.pt", "--to", "cloneofsimo-pt"])
    Path(base[0]).with_suffix(".yaml").write_text("model")
    Path("merged.yaml").mkdir()
    with pytest.raises(UserError, match="merged.yaml is a folder"):
        cvtckpt.main(["--mode", "merge", "--model_ckpt", base[0], "--lora_ckpt", paths["one"], "--out_ckpt",
                      "merged.ckpt"])  # fmt: skip
    assert not Path("merged.ckpt").exists() and not Path("out.pt").exists()


def test_permission_is_what_a_closed_folder_lacks(unprivileged):
    (unprivileged / "closed").mkdir(mode=0)
    with pytest.raises(UserError, match="closed/lora.ckpt.*Permission denied"):
        resize_lora.main(["--source", str(unprivileged / "closed/lora.ckpt"), "--rank", "1", "--target",
                          str(unprivileged / "out.ckpt")])  # fmt: skip
    with pytest.raises(UserError, match="closed/base.*Permission denied"):
        cvtckpt.main(["--mode", "merge", "--model_ckpt", str(unprivileged / "closed/base"), "--lora_ckpt", "x",
                      "--out_ckpt", str(unprivileged / "out.ckpt")])  # fmt: skip


@pytest.mark.parametrize("base_name, words", [
    ("x.ckpt", "--out_ckpt and --out_base are both x.ckpt"),
    ("y.pt", "--out_base y.pt: .* a name that ends in .safetensors or .ckpt"),
])  # fmt: skip
def test_a_base_that_cannot_be_written_is_refused_before_its_lora_is(files, base, monkeypatch, base_name, words):
    tmp_path, paths = files
    monkeypatch.chdir(tmp_path)
    cvtckpt.main(["--mode", "embed", "--model_ckpt", base[0], "--lora_ckpt", paths["one"], "--out_ckpt", "both.ckpt"])
    with pytest.raises(UserError, match=words):
        cvtckpt.main(["--mode", "extract", "--model_ckpt", "both.ckpt", "--out_ckpt", "x.ckpt",
                      "--out_base", base_name])  # fmt: skip
    assert not Path("x.ckpt").exists()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder with a published file, a diffusers folder and a LoRA file; the LoRA; the weights with it merged)."""
    from ldm.lora import LoRASpec, get_lora, inject_lora, merge_lora, remove_lora
    from ldm.models.stable_diffusion import build_model
    from ldm.settings.model import load_model_config
    from ldm.weights.convert import convert

    root = tmp_path_factory.mktemp("whole")
    shutil.copy(ROOT / "tests" / "tiny.yaml", root / "base.yaml")
    model = build_model(load_model_config(root / "base.yaml"))
    arrays = {name: parameter.asnumpy() for name, parameter in model.parameters_dict().items()}
    write_checkpoint(root / "base.safetensors", arrays)
    convert(root / "base.safetensors", root / "folder", "diffusers")
    inject_lora(model, LoRASpec(rank=2, targets="all", text_encoder=True))
    trained = get_lora(model)
    for i, (name, layer) in enumerate(trained.layers.items()):
        trained.layers[name] = replace(layer, up=0.1 * normal(*layer.up.shape, seed=i))
    remove_lora(model)
    write_lora(root / "lora.ckpt", trained)
    merge_lora(model, trained, 0.5)
    return root, trained, {name: parameter.asnumpy() for name, parameter in model.parameters_dict().items()}


class TestWholeModel:
    """The tiny model as a published file, with its YAML beside it, and as a diffusers folder."""

    @pytest.mark.parametrize("source, target", [("base.safetensors", "out.ckpt"), ("folder", "out.safetensors")])
    def test_upl_ckpt_v2_writes_one_file_in_fp16(self, whole, tmp_path, source, target):
        root, _, merged = whole
        lora_add.main([str(root / source), str(root / "lora.ckpt"), str(tmp_path / target), "0.5",
                       "--mode", "upl-ckpt-v2"])  # fmt: skip
        found = open_base_model(tmp_path / target)
        found = CanonicalArrays(found, map_base_model(found))
        assert merged.keys() <= set(found)
        for name, array in merged.items():
            assert found[name].dtype == np.float16
            np.testing.assert_allclose(found[name].reshape(array.shape), array, rtol=1e-3, atol=1e-6, err_msg=name)
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]

    def test_upl_on_a_folder_is_one_that_holds_the_same(self, whole, tmp_path):
        root, _, merged = whole
        lora_add.main([str(root / "folder"), str(root / "lora.ckpt"), str(tmp_path / "out"), "0.5", "--mode", "upl"])
        found = open_base_model(tmp_path / "out")
        assert (tmp_path / "out.yaml").read_text() == (root / "folder.yaml").read_text()
        found = CanonicalArrays(found, map_base_model(found))
        for name, array in merged.items():
            np.testing.assert_allclose(found[name].reshape(array.shape), array, rtol=1e-6, atol=1e-7, err_msg=name)

    def test_a_folder_embedded_extracted_and_merged(self, whole, tmp_path):
        root, trained, merged = whole
        both, lora = str(tmp_path / "both.ckpt"), str(tmp_path / "lora.ckpt")
        cvtckpt.main(["--mode", "embed", "--model_ckpt", str(root / "folder"), "--lora_ckpt",
                      f"{root / 'lora.ckpt'}:0.5", "--out_ckpt", both])  # fmt: skip
        cvtckpt.main(["--mode", "extract", "--model_ckpt", both, "--out_ckpt", lora])
        assert relative_difference(read_lora(lora), weighted_sum([(trained, 0.5)])) < 1e-6
        cvtckpt.main(["--mode", "merge", "--model_ckpt", both, "--out_ckpt", str(tmp_path / "merged.ckpt")])
        found, _ = read_checkpoint(tmp_path / "merged.ckpt")
        for name, array in merged.items():
            np.testing.assert_allclose(found[name].reshape(array.shape), array, rtol=1e-6, atol=1e-7, err_msg=name)

    def test_extracted_from_two_forms(self, whole, tmp_path):
        root, trained, _ = whole
        lora_add.main([str(root / "folder"), str(root / "lora.ckpt"), str(tmp_path / "out"), "0.5", "--mode", "upl"])
        extract_lora.main(["--base_model", str(root / "base.safetensors"), "--target_model", str(tmp_path / "out"),
                           "--rank", "2", "--save_path", str(tmp_path / "found.ckpt")])  # fmt: skip
        found = read_lora(tmp_path / "found.ckpt")
        assert found.layers.keys() == trained.layers.keys()
        assert relative_difference(found, weighted_sum([(trained, 0.5)])) < 1e-4


def test_other_kinds_are_merged_into_a_base_model_one_after_another(tmp_path):
    """A LoHa and a DoRA, as merge_lora applies them to the model in memory; sums of LoRAs alone refuse them."""
    nano = known_bases()[2]
    module = next(module for module in nano.modules if module.path.endswith("attn2.to_k"))
    out, incoming = module.shape
    loha = LoHa(
        {"hada_w1_a": normal(out, 2), "hada_w1_b": normal(2, incoming), "hada_w2_a": normal(out, 2),
         "hada_w2_b": normal(2, incoming)}, 0.2,
    )  # fmt: skip
    pair = LoRALayer(normal(2, incoming), normal(out, 2), 0.1)
    paths = []
    for name, layer in (("loha", loha), ("dora", DoRA(pair, 1 + np.abs(normal(out))))):
        paths.append(str(tmp_path / f"{name}.ckpt"))
        write_lora(paths[-1], LoRA({module.name: layer}))
    with pytest.raises(UserError, match="holds more than pairs of low-rank factors"):
        lora_add.main(["--paths", *paths, "--output_path", str(tmp_path / "sum.ckpt")])
    out_path = tmp_path / "out.safetensors"
    lora_add.main([NANO_BASE, f"{paths[0]}:0.5", str(out_path), "--paths", f"{paths[1]}:0.7", "--mode", "upl"])
    weight = read_checkpoint(NANO_BASE)[0][f"{module.name}.weight"].astype(np.float32)
    wanted = add_updates(
        weight, [Update(loha, 0.5, ""), Update(read_lora(paths[1]).layers[module.name], 0.7, "")], np.float32
    )
    found = read_checkpoint(out_path)[0][f"{module.name}.weight"]
    np.testing.assert_array_equal(found, wanted.astype(found.dtype))


class TestLearnedTokens:
    """upl-ckpt-v2 onto the nano model, of LoRAs of cloneofsimo's with textual inversion in them."""

    def lora(self, target, **vectors):
        write_lora(target, random_lora(known_bases()[2], rank=2, only="to_q", component="unet"), "cloneofsimo")
        arrays, metadata = read_checkpoint(target)
        write_checkpoint(target, {**arrays, **{f"<{name}>": vector for name, vector in vectors.items()}}, metadata)
        return str(target)

    def test_are_written_as_an_embedding(self, tmp_path, capsys):
        one = self.lora(tmp_path / "one.safetensors", s2=normal(WIDTH, seed=2), s1=normal(WIDTH, seed=1))
        two = self.lora(tmp_path / "two.safetensors", s1=normal(WIDTH, seed=3))
        lora_add.main([NANO_BASE, one, str(tmp_path / "out.safetensors"), "--paths", two, "--mode", "upl-ckpt-v2"])
        assert "out.pt: <s1>, <s2>, <s1>, in this order" in capsys.readouterr().out
        with zipfile.ZipFile(tmp_path / "out.pt") as archive:  # tests/parity reads it with torch.load
            vectors = np.frombuffer(archive.read("archive/data/1"), np.float32).reshape(3, WIDTH)
        np.testing.assert_array_equal(vectors, [normal(WIDTH, seed=i) for i in (1, 2, 3)])
        with pytest.raises(UserError, match="out.pt exists: choose another name, or remove it first"):
            lora_add.main([NANO_BASE, one, str(tmp_path / "out.ckpt"), "--mode", "upl-ckpt-v2"])
        assert not (tmp_path / "out.ckpt").exists()

    def test_are_not_written_by_upl(self, tmp_path):
        one = self.lora(tmp_path / "one.safetensors", s1=normal(WIDTH))
        lora_add.main([NANO_BASE, one, str(tmp_path / "out.safetensors"), "--mode", "upl"])
        assert not list(tmp_path.glob("*.pt"))

    @pytest.mark.parametrize("vector, words", [
        (normal(WIDTH + 1), f"the learned token <s1> has {WIDTH + 1} numbers, the base model's tokens have {WIDTH}"),
        (np.full(WIDTH, np.nan, np.float32), "the learned token <s1> is no vector of finite numbers"),
        (np.float32(1), "the learned token <s1> is no vector of finite numbers"),
        (normal(1, WIDTH), "the learned token <s1> is no vector of finite numbers"),
    ])  # fmt: skip
    def test_that_are_none_are_refused(self, tmp_path, vector, words):
        one = self.lora(tmp_path / "one.safetensors", s1=np.asarray(vector))
        with pytest.raises(UserError, match=words):
            lora_add.main([NANO_BASE, one, str(tmp_path / "out.ckpt"), "--mode", "upl-ckpt-v2"])
        assert not list(tmp_path.glob("out*"))
