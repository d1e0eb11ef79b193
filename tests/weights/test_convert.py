"""From every format into every other and back, bit for bit; what cannot be is said before anything is written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import yaml

from ldm.errors import UserError
from ldm.models.stable_diffusion import build_model
from ldm.settings.model import load_model_config
from ldm.tokenizer import Tokenizer
from ldm.weights import convert as convert_module
from ldm.weights.architecture import detect_model_config, same_config
from ldm.weights.base_model import open_base_model
from ldm.weights.checkpoint import open_checkpoint, read_checkpoint, write_checkpoint
from ldm.weights.convert import convert
from ldm.weights.load import load_base_model
from ldm.weights.names import mindone
from ldm.weights.names.compvis import ema_name
from tests.weights.file_formats.torch_files import Tensor, write_torch

TESTS = Path(__file__).parents[1]
MODELS = {"tiny": TESTS / "tiny.yaml", "sd1": TESTS / "golden/small_sd1.yaml", "sd2": TESTS / "golden/small_sd2.yaml"}
TARGETS = {"ldm": "x.safetensors", "diffusers": "folder", "mindone": "x.ckpt", "own": "y.ckpt"}
UNET, TEXT = "model.diffusion_model.", "cond_stage_model.transformer.text_model."
CONV_IN = f"{UNET}input_blocks.0.0.weight"


@pytest.fixture(scope="module")
def weights():
    """Model -> its parameters under their canonical names."""
    np.random.seed(3)
    return {
        name: {p.name: p.asnumpy() for p in build_model(load_model_config(path)).get_parameters()}
        for name, path in MODELS.items()
    }


@pytest.fixture
def source(tmp_path, weights):
    """A function that writes a model in this project's own format, or changed, and gives the path."""

    def write(model="tiny", name="source.safetensors", metadata=None, **changed):
        arrays = {**weights[model], **changed}
        write_checkpoint(tmp_path / name, {key: array for key, array in arrays.items() if array is not None}, metadata)
        return tmp_path / name

    return write


def equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and np.array_equal(a[name], b[name]), name


def listing(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


class TestAllDirections:
    @pytest.mark.parametrize("model", MODELS)
    def test_a_round_through_all_forms_ends_where_it_began(self, tmp_path, source, weights, model):
        # The order holds each format as source and as target of an unlike one.
        path, config = source(model), MODELS[model]
        for number, format in enumerate(("diffusers", "mindone", "ldm", "diffusers", "own", "ldm", "mindone", "own")):
            target = tmp_path / f"{number}" / TARGETS[format]
            report = convert(path, target, format, model_config=config)
            assert report.ok and sum(part.matched for part in report.components.values()) == len(weights[model])
            # From here on a YAML lies beside each, or the folder says it itself.
            path, config = target, None
        equal(read_checkpoint(path)[0], weights[model])

    @pytest.mark.parametrize("format", TARGETS)
    def test_every_form_loads_into_the_networks(self, tmp_path, source, weights, format):
        target = tmp_path / "out" / TARGETS[format]
        convert(source("sd2"), target, format, model_config=MODELS["sd2"])
        model = build_model(load_model_config(MODELS["sd2"]), random=False)
        assert load_base_model(model, target).ok
        equal({p.name: p.asnumpy() for p in model.get_parameters()}, weights["sd2"])

    @pytest.mark.parametrize("format", TARGETS)
    @pytest.mark.parametrize("model", ["sd1", "sd2"])
    def test_a_written_checkpoint_names_its_model(self, tmp_path, source, model, format):
        target = tmp_path / "out" / TARGETS[format]
        convert(source(model), target, format, model_config=MODELS[model])
        assert same_config(detect_model_config(target), load_model_config(MODELS[model]))

    @pytest.mark.parametrize("channels", [8, 16])
    def test_latents_of_other_channels_go_through_all_forms(self, tmp_path, channels):
        """A UNet of eight channels on both sides is no InstructPix2Pix, whose eight give four."""
        document = yaml.safe_load(MODELS["sd1"].read_text())
        params = document["model"]["params"]
        params["unet_config"]["params"].update(in_channels=channels, out_channels=channels)
        params["first_stage_config"]["params"]["embed_dim"] = channels
        params["first_stage_config"]["params"]["ddconfig"]["z_channels"] = channels
        path = tmp_path / "source.safetensors"
        path.with_suffix(".yaml").write_text(yaml.safe_dump(document))
        config = load_model_config(path.with_suffix(".yaml"))
        assert config.latent_channels == channels
        arrays = {p.name: p.asnumpy() for p in build_model(config).get_parameters()}
        write_checkpoint(path, arrays)
        for number, format in enumerate(("diffusers", "mindone", "ldm", "own")):
            source, path = path, tmp_path / f"{number}" / TARGETS[format]
            assert convert(source, path, format).ok
            if format == "diffusers":
                (tmp_path / f"{number}" / "folder.yaml").unlink()
            assert same_config(detect_model_config(path), config)
        equal(read_checkpoint(path)[0], arrays)

    def test_an_inpainting_model_goes_through_all_forms(self, tmp_path):
        document = yaml.safe_load(MODELS["sd1"].read_text())
        document["model"]["params"]["unet_config"]["params"]["in_channels"] = 9
        path = tmp_path / "source.safetensors"
        path.with_suffix(".yaml").write_text(yaml.safe_dump(document))
        config = load_model_config(path.with_suffix(".yaml"))
        assert config.is_inpainting and config.latent_channels == 4
        arrays = {p.name: p.asnumpy() for p in build_model(config).get_parameters()}
        assert arrays[CONV_IN].shape[1] == 9
        write_checkpoint(path, arrays)
        for number, format in enumerate(("diffusers", "mindone", "ldm", "own")):
            source, path = path, tmp_path / f"{number}" / TARGETS[format]
            assert convert(source, path, format).ok
            if format == "diffusers":
                index = json.loads((path / "model_index.json").read_text())
                assert index["_class_name"] == "StableDiffusionInpaintPipeline"
                (tmp_path / f"{number}" / "folder.yaml").unlink()
            assert same_config(detect_model_config(path), config)
        equal(read_checkpoint(path)[0], arrays)

    def test_a_model_in_pixel_space_goes_through_all_forms_but_a_folder(self, tmp_path):
        path, config = tmp_path / "source.safetensors", load_model_config(TESTS / "pixels.yaml")
        arrays = {p.name: p.asnumpy() for p in build_model(config).get_parameters()}
        write_checkpoint(path, arrays)
        given = TESTS / "pixels.yaml"
        with pytest.raises(UserError, match="in pixel space.* need a VAE: write ldm, mindone or own"):
            convert(path, tmp_path / "folder", model_config=given)
        for number, format in enumerate(("mindone", "ldm", "own")):
            source, path = path, tmp_path / f"{number}" / TARGETS[format]
            assert convert(source, path, format, model_config=given).ok
            assert same_config(detect_model_config(path), config)  # by the YAML beside it
            given = None
        equal(read_checkpoint(path)[0], arrays)

    def test_a_folder_says_all_of_its_model_without_a_yaml(self, tmp_path, source):
        convert(source("sd2"), tmp_path / "sd", model_config=MODELS["sd2"])
        (tmp_path / "sd.yaml").unlink()
        assert same_config(detect_model_config(tmp_path / "sd"), load_model_config(MODELS["sd2"]))

    def test_the_suffix_chooses_the_form(self, tmp_path, source):
        path = source()
        for name in ("a.safetensors", "b.ckpt", "c"):
            convert(path, tmp_path / name, model_config=MODELS["tiny"])
        assert "betas" in open_checkpoint(tmp_path / "a.safetensors")
        assert any(mindone.is_typical(name) for name in open_checkpoint(tmp_path / "b.ckpt"))
        assert open_base_model(tmp_path / "c").format == "diffusers"


class TestWhatIsWritten:
    def test_the_published_single_file_is_complete(self, tmp_path, source, weights):
        convert(source("sd1"), tmp_path / "x.safetensors", model_config=MODELS["sd1"])
        arrays, metadata = read_checkpoint(tmp_path / "x.safetensors")
        extra = arrays.keys() - weights["sd1"].keys()
        assert len(extra) == 13 and arrays["alphas_cumprod"].shape == (1000,)
        ids = arrays[f"{TEXT}embeddings.position_ids"]
        assert ids.dtype == np.int64 and np.array_equal(ids, [range(77)])
        assert metadata == {"architecture": "custom", "prediction_type": "epsilon", "format": "pt"}

    def test_sd2s_text_encoder_is_openclips(self, tmp_path, source, weights):
        convert(source("sd2"), tmp_path / "x.safetensors", model_config=MODELS["sd2"])
        arrays, _ = read_checkpoint(tmp_path / "x.safetensors")
        fused = arrays["cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight"]
        parts = [weights["sd2"][f"{TEXT}encoder.layers.1.self_attn.{part}_proj.weight"] for part in "qkv"]
        np.testing.assert_array_equal(fused, np.concatenate(parts))

    def test_a_published_file_keeps_unused_arrays_in_the_given_type(self, tmp_path, source):
        convert(source("sd2"), tmp_path / "x.safetensors", model_config=MODELS["sd2"])
        arrays, metadata = read_checkpoint(tmp_path / "x.safetensors")
        more = {
            "cond_stage_model.model.text_projection": np.ones((3, 3), np.float32),
            "cond_stage_model.model.logit_scale": np.array(4.6, np.float32),
            "cond_stage_model.model.transformer.resblocks.23.ln_1.bias": np.ones(3, np.float32),
            "betas": np.full(1000, 0.5, np.float32),
        }
        unused = {"model_ema.decay": np.array(0.99, np.float32)}
        write_checkpoint(tmp_path / "full.safetensors", {**arrays, **more, **unused}, metadata)
        report = convert(
            tmp_path / "full.safetensors", tmp_path / "y.safetensors", model_config=MODELS["sd2"], dtype="fp16"
        )
        again, _ = read_checkpoint(tmp_path / "y.safetensors")
        assert report.ignored == {"EMA copy": 1}
        assert again.keys() == arrays.keys() | more.keys()
        for name, array in more.items():
            np.testing.assert_array_equal(again[name], array.astype(np.float16 if "." in name else np.float32))
            assert again[name].dtype == (np.float16 if "." in name else np.float32)

    def test_the_vaes_attention_is_linear_in_a_diffusers_folder(self, tmp_path, source, weights):
        convert(source(), tmp_path / "sd", model_config=MODELS["tiny"])
        arrays, metadata = read_checkpoint(tmp_path / "sd/vae/diffusion_pytorch_model.safetensors")
        name = "encoder.mid.attn_1.q.weight"
        assert arrays["encoder.mid_block.attentions.0.to_q.weight"].ndim == 2
        assert weights["tiny"][f"first_stage_model.{name}"].ndim == 4 and metadata == {"format": "pt"}

    @pytest.mark.parametrize("model, token", [("sd1", "<|endoftext|>"), ("sd2", "!")])
    def test_the_folder_has_the_tokenizer_of_this_project(self, tmp_path, source, model, token):
        convert(source(model), tmp_path / "sd", model_config=MODELS[model])
        vocabulary = json.loads((tmp_path / "sd/tokenizer/vocab.json").read_text(encoding="utf-8"))
        merges = (tmp_path / "sd/tokenizer/merges.txt").read_text(encoding="utf-8").splitlines()
        assert len(vocabulary) == 49408 and len(merges) == 48895 and merges[1] == "i n"
        assert vocabulary["<|startoftext|>"] == 49406 and vocabulary["cat</w>"] == 2368
        special = json.loads((tmp_path / "sd/tokenizer/special_tokens_map.json").read_text())
        assert special["pad_token"] == token
        pad = {"sd1": "end", "sd2": "zero"}[model]
        assert Tokenizer(pad=pad).encode(["x"])[0, -1] == vocabulary[token]

    def test_a_known_model_gets_no_yaml(self, tmp_path):
        nano = TESTS.parent / "models" / "nano" / "nano.safetensors"
        convert(nano, tmp_path / "nano.ckpt")
        assert listing(tmp_path) == ["nano.ckpt"]
        assert open_checkpoint(tmp_path / "nano.ckpt").metadata == {
            "architecture": "nano", "prediction_type": "v_prediction"
        }  # fmt: skip
        assert detect_model_config(tmp_path / "nano.ckpt").architecture == "nano"

    @pytest.mark.parametrize("format", TARGETS)
    def test_one_array_at_a_time_is_in_memory(self, tmp_path, source, monkeypatch, format):
        """Of each array nothing is held when the one after the next is made."""
        import weakref

        alive = []

        class Watched(convert_module.ConvertedArrays):
            def __getitem__(self, name):
                array = super().__getitem__(name).copy()
                assert sum(reference() is not None for reference in alive) <= 1
                alive.append(weakref.ref(array))
                return array

        monkeypatch.setattr(convert_module, "ConvertedArrays", Watched)
        convert(source(), tmp_path / "out" / TARGETS[format], format, model_config=MODELS["tiny"])
        assert len(alive) >= 300


class TestTypes:
    @pytest.mark.parametrize("format", TARGETS)
    def test_fp16_halves_the_weights_and_nothing_else(self, tmp_path, source, weights, format):
        target = tmp_path / "out" / TARGETS[format]
        convert(source(), target, format, dtype="fp16", model_config=MODELS["tiny"])
        checkpoint = open_base_model(target)
        dtypes = {name: checkpoint.spec(name)[0] for name in checkpoint}
        halves = [name for name, dtype in dtypes.items() if dtype == np.float16]
        assert len(halves) == sum(1 for name in dtypes if format == "diffusers" or "." in name and "_ids" not in name)
        convert(target, tmp_path / "back.safetensors", "own", dtype="fp32")
        back, _ = read_checkpoint(tmp_path / "back.safetensors")
        equal(back, {name: array.astype(np.float16).astype(np.float32) for name, array in weights["tiny"].items()})

    def test_keep_changes_no_weight(self, tmp_path, source, weights):
        half = weights["tiny"][CONV_IN].astype(np.float16)
        convert(source(**{CONV_IN: half}), tmp_path / "x.ckpt", model_config=MODELS["tiny"])
        checkpoint = open_base_model(tmp_path / "x.ckpt")
        assert [checkpoint.spec(name)[0] for name in checkpoint].count(np.float16) == 1

    def test_bfloat16_becomes_fp32_exactly(self, tmp_path, weights):
        arrays = dict(weights["tiny"])
        bits = (arrays[CONV_IN].view(np.uint32) >> 16).astype(np.uint16)
        steps = tuple(step // 2 for step in bits.strides)
        arrays[CONV_IN] = Tensor(bits.reshape(-1), bits.shape, steps, kind="BFloat16")
        write_torch(tmp_path / "x.ckpt", {"state_dict": arrays})
        convert(tmp_path / "x.ckpt", tmp_path / "y.safetensors", model_config=MODELS["tiny"])
        found = read_checkpoint(tmp_path / "y.safetensors")[0][CONV_IN]
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found.view(np.uint32), bits.astype(np.uint32) << 16)

    def test_a_value_too_large_for_fp16(self, tmp_path, source, weights):
        large = weights["tiny"][CONV_IN] + 70000
        with pytest.raises(UserError, match="too large for fp16"):
            convert(source(**{CONV_IN: large}), tmp_path / "x.ckpt", dtype="fp16", model_config=MODELS["tiny"])
        assert listing(tmp_path) == ["source.safetensors"]


class TestMovingAverages:
    def test_are_taken_where_they_are_asked_for(self, tmp_path, source, weights):
        averages = {ema_name(name): array + 1 for name, array in weights["tiny"].items() if name.startswith(UNET)}
        path = source(**averages)
        convert(path, tmp_path / "plain.safetensors", "own", model_config=MODELS["tiny"])
        equal(read_checkpoint(tmp_path / "plain.safetensors")[0], weights["tiny"])
        convert(path, tmp_path / "ema.safetensors", "own", ema=True, model_config=MODELS["tiny"])
        wanted = {name: array + 1 if name.startswith(UNET) else array for name, array in weights["tiny"].items()}
        equal(read_checkpoint(tmp_path / "ema.safetensors")[0], wanted)

    def test_that_are_not_there(self, tmp_path, source):
        with pytest.raises(UserError, match="0 of 286 UNet arrays have an EMA copy"):
            convert(source(), tmp_path / "x.ckpt", ema=True, model_config=MODELS["tiny"])


class TestRefusing:
    """Each is said in one line, and nothing is written."""

    def refused(self, source, target, **options):
        before = listing(target.parent)
        with pytest.raises(UserError) as caught:
            convert(source, target, **options)
        assert listing(target.parent) == before and "\n" not in str(caught.value)
        return str(caught.value)

    def test_an_unknown_model_without_a_yaml(self, tmp_path, source):
        assert "add --model_config" in self.refused(source(), tmp_path / "x.ckpt")

    @pytest.mark.parametrize(
        "changed, words",
        [
            ({"first_stage_model.quant_conv.bias": None}, "VAE: 151 matched, 1 missing"),
            ({"extra": np.zeros(1)}, "other: 1 unexpected"),
            ({CONV_IN: np.zeros((32, 9, 3, 3))}, "it is an inpainting model"),
            ({CONV_IN: np.zeros((3, 3))}, "UNet: 285 matched, 1 of a wrong shape"),
            ({"conditioner.embedders.0.x": np.zeros(1)}, "SDXL"),
            ({"model.diffusion_model.label_emb.0.0.weight": np.zeros(1)}, "SDXL"),
            ({"control_model.x": np.zeros(1)}, "ControlNet"),
        ],
    )
    def test_what_does_not_fit(self, tmp_path, source, changed, words):
        message = self.refused(source(**changed), tmp_path / "x.ckpt", model_config=MODELS["tiny"])
        assert words in message

    def test_another_architecture(self, tmp_path, source):
        message = self.refused(source("sd1"), tmp_path / "x.ckpt", model_config=MODELS["tiny"])
        assert "of another architecture" in message

    def test_a_contradiction(self, tmp_path, source):
        path = source(metadata={"prediction_type": "v_prediction"})
        assert "says that its prediction_type" in self.refused(path, tmp_path / "x.ckpt", model_config=MODELS["tiny"])
        path = source(name="b.safetensors")
        message = self.refused(path, tmp_path / "x.ckpt", model_config=MODELS["tiny"], prediction_type="v_prediction")
        assert "contradicts" in message

    def test_a_prediction_type_that_contradicts_the_source(self, tmp_path, source):
        path = source(metadata={"prediction_type": "v_prediction"})
        (tmp_path / "source.yaml").write_text(MODELS["tiny"].read_text() + "    parameterization: v\n")
        assert convert(path, tmp_path / "good.ckpt", prediction_type="v_prediction").ok
        message = self.refused(path, tmp_path / "x.ckpt", prediction_type="epsilon")
        assert "--prediction_type epsilon contradicts" in message and "source.safetensors" in message
        # the YAML beside the source says it alone
        message = self.refused(source(), tmp_path / "x.ckpt", prediction_type="epsilon")
        assert "--prediction_type epsilon contradicts" in message and "source.yaml" in message

    def test_a_yaml_beside_the_source_that_contradicts_it(self, tmp_path, source):
        path = source(metadata={"prediction_type": "v_prediction"})
        (tmp_path / "source.yaml").write_text(MODELS["tiny"].read_text())
        assert "says that its prediction_type is v_prediction" in self.refused(path, tmp_path / "x.ckpt")

    @pytest.mark.parametrize("format", TARGETS)
    def test_a_yaml_beside_the_target_that_is_of_another_model(self, tmp_path, source, format):
        target = tmp_path / "out" / ("sd.v1" if format == "diffusers" else TARGETS[format])
        target.parent.mkdir()
        beside = target.parent / ("sd.v1.yaml" if format == "diffusers" else f"{target.stem}.yaml")
        beside.write_text(MODELS["sd1"].read_text())
        assert f"{beside} describes another model" in self.refused(
            source(), target, format=format, model_config=MODELS["tiny"]
        )
        own = "# my own\n" + MODELS["tiny"].read_text()
        beside.write_text(own)
        convert(source(), target, format, model_config=MODELS["tiny"])
        assert beside.read_text() == own

    @pytest.mark.parametrize(
        "name, format, words",
        [
            ("x.ckpt", "ldm", "x.ckpt is no name for the format ldm, which wants .safetensors"),
            ("x.safetensors", "mindone", "wants .ckpt"),
            ("x", "own", "wants .safetensors or .ckpt"),
            ("x.ckpt", "diffusers", "wants a folder's name"),
            ("x.bin", None, ".bin is not written"),
            ("x.pt", "diffusers", "wants a folder's name"),
        ],
    )
    def test_a_name_that_does_not_go_with_the_form(self, tmp_path, source, name, format, words):
        assert words in self.refused(source(), tmp_path / name, format=format, model_config=MODELS["tiny"])

    @pytest.mark.parametrize("name", ["there.ckpt", "there"])
    def test_a_target_that_exists(self, tmp_path, source, name):
        path = tmp_path / name
        if path.suffix:
            path.write_text("x")
        else:
            path.mkdir()
            (path / "x").write_text("x")
        assert "exists: choose another name" in self.refused(source(), path, model_config=MODELS["tiny"])

    def test_the_source_itself(self, tmp_path, source):
        path = source()
        assert "exists" in self.refused(path, path, model_config=MODELS["tiny"])

    def test_sizes_that_diffusers_has_not(self, tmp_path):
        nano = TESTS.parent / "models" / "nano" / "nano.safetensors"
        assert "ch_mult must begin with 1" in self.refused(nano, tmp_path / "nano")

    def test_a_place_that_cannot_be_written(self, tmp_path, source):
        (tmp_path / "file").write_text("x")
        for name in ("file/x.ckpt", "file/folder"):
            with pytest.raises(UserError, match="cannot be written"):
                convert(source(), tmp_path / name, model_config=MODELS["tiny"])

    def test_a_disk_that_fills_up_leaves_nothing(self, tmp_path, source, monkeypatch):
        path = source()

        def full(*args):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(convert_module.ConvertedArrays, "release", full)
        for name in ("x.ckpt", "x.safetensors", "folder"):
            message = self.refused(path, tmp_path / name, model_config=MODELS["tiny"])
            assert "No space left" in message
        assert os.listdir(tmp_path) == ["source.safetensors"]
