"""Which model a checkpoint is, its shapes tell and what is written in it; what they leave open is asked for."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from ldm.errors import UserError
from ldm.files.paths import ROOT
from ldm.models.stable_diffusion import build_model
from ldm.settings.model import load_model_config, model_document, parse_model_config
from ldm.weights.architecture import (
    KNOWN_CONFIGS,
    candidate_configs,
    detect_model_config,
    known_config_path,
    missing_information,
    same_config,
)
from ldm.weights.arrays import Arrays
from ldm.weights.base_model import map_base_model
from ldm.weights.diffusers_folder.configs import scheduler_config, text_config, unet_config, vae_config
from ldm.weights.diffusers_folder.reader import DiffusersFolder

HERE = Path(__file__).parent
V1, V2, V2_V, NANO, MNIST, MNIST_RGB, V1_INPAINTING, V2_INPAINTING = KNOWN_CONFIGS


@pytest.fixture(scope="module")
def published():
    return json.loads(gzip.decompress((HERE / "published_names.json.gz").read_bytes()))


class Shapes(Arrays):
    """A checkpoint of which nothing is there but names and shapes."""

    path, metadata = Path("nowhere/model.safetensors"), {}

    def __init__(self, shapes, **metadata):
        self._shapes, self.metadata = shapes, metadata

    def spec(self, name):
        return np.dtype(np.float32), tuple(self._shapes[name])

    def __getitem__(self, name):
        raise AssertionError("nothing is read to tell what it is")

    def __iter__(self):
        return iter(self._shapes)

    def __len__(self):
        return len(self._shapes)


class Folder(Shapes, DiffusersFolder):
    """A diffusers folder of which nothing is there but names, shapes and settings."""

    path = Path("nowhere/sd")

    def __init__(self, published, version, settings):
        parts = {
            "unet": f"diffusers_unet_sd{version}",
            "vae": "diffusers_vae_sd",
            "text_encoder": f"transformers_text_encoder_sd{version}",
        }
        shapes = {f"{part}/{name}": shape for part, key in parts.items() for name, shape in published[key].items()}
        prediction_type = settings.get("scheduler/scheduler_config.json", {}).get("prediction_type")
        Shapes.__init__(self, shapes, **({"prediction_type": prediction_type} if prediction_type else {}))
        self._settings = settings

    def config(self, component):
        return self._settings.get(f"{component}/config.json", {})

    def read_json(self, name):
        return self._settings.get(name, {})


def settings_of(model, **changed):
    """The settings of a folder of `model`; changed: component -> what differs, None for no file."""
    settings = {
        "unet/config.json": unet_config(model),
        "vae/config.json": vae_config(model),
        "text_encoder/config.json": text_config(model),
        "scheduler/scheduler_config.json": scheduler_config(model),
        "tokenizer/special_tokens_map.json": {"pad_token": "!" if model.pad_token == "zero" else "<|endoftext|>"},
    }
    for part, change in changed.items():
        name = next(name for name in settings if name.startswith(part))
        settings[name] = {} if change is None else {**settings[name], **change}
    return settings


def candidate_paths(checkpoint, prediction_type=None):
    return [
        Path(model.path).relative_to(ROOT).as_posix() if Path(model.path).is_absolute() else model.path
        for model in candidate_configs(checkpoint, map_base_model(checkpoint), prediction_type)
    ]


class TestSingleFiles:
    @pytest.mark.parametrize("kind", ["sd{}_ldm_ckpt_keys", "mindone_ckpt_names_v{}"])
    def test_published_files(self, published, kind):
        assert candidate_paths(Shapes(published[kind.format(1)])) == [V1]
        # Noise and velocity have the same shapes.
        assert candidate_paths(Shapes(published[kind.format(2)])) == [V2, V2_V]

    @pytest.mark.parametrize("prediction_type, path", [("epsilon", V2), ("v_prediction", V2_V)])
    def test_the_prediction_type_decides_among_sd2(self, published, prediction_type, path):
        names = published["sd2_ldm_ckpt_keys"]
        assert candidate_paths(Shapes(names, prediction_type=prediction_type)) == [path]
        assert candidate_paths(Shapes(names), prediction_type) == [path]

    def test_a_known_model_with_the_other_prediction_type(self, published):
        checkpoint = Shapes(published["sd1_ldm_ckpt_keys"])
        (model,) = candidate_configs(checkpoint, map_base_model(checkpoint), "v_prediction")
        assert (
            model.prediction_type == "v_prediction" and model.architecture == "sd1" and known_config_path(model) is None
        )

    def test_the_nano_model(self):
        assert same_config(
            detect_model_config(ROOT / "models" / "nano" / "nano.safetensors"), load_model_config(ROOT / NANO)
        )

    @pytest.mark.parametrize("path", [MNIST, MNIST_RGB])
    def test_models_in_pixel_space(self, path):
        config = load_model_config(ROOT / path)
        names = {p.name: p.shape for p in build_model(config, random=False).get_parameters()}
        assert candidate_paths(Shapes(names)) == [path]
        nano = {p.name: p.shape for p in build_model(load_model_config(ROOT / NANO), random=False).get_parameters()}
        with_vae = {**names, **{name: shape for name, shape in nano.items() if name.startswith("first_stage_model.")}}
        assert candidate_paths(Shapes(with_vae)) == []

    def test_added_tokens_make_no_other_architecture(self, published):
        name = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
        names = {**published["sd1_ldm_ckpt_keys"], name: [49409, 768]}
        checkpoint = Shapes(names, added_tokens='[["<cat-toy>", 49408, true, false]]')
        assert candidate_paths(checkpoint) == [V1]
        (model,) = candidate_configs(checkpoint, map_base_model(checkpoint))
        assert model.text["vocab_size"] == 49409 and [added.text for added in model.added_tokens] == ["<cat-toy>"]
        with pytest.raises(UserError, match="adds 0 tokens to CLIP's 49,408, but .* 49,409 rows"):
            candidate_paths(Shapes(names))

    def test_other_sizes_are_not_those_of_a_known_model(self, published):
        names = dict(published["sd1_ldm_ckpt_keys"])
        names["first_stage_model.post_quant_conv.weight"] = [16, 16, 1, 1]
        assert candidate_paths(Shapes(names)) == []

    def test_a_single_component_is_compared_with_the_known_models(self, published):
        names = published["sd1_ldm_ckpt_keys"]
        for part in ("model.diffusion_model.", "cond_stage_model."):
            assert candidate_paths(Shapes({name: names[name] for name in names if name.startswith(part)})) == [V1]

    @pytest.mark.parametrize(
        "part, words",
        [
            ("first_stage_model.", "holds no UNet and no text encoder"),
            ("cond_stage_model.", "holds no UNet and no VAE"),
        ],
    )
    def test_missing_components_are_reported_first(self, published, part, words):
        names = published["sd2_ldm_ckpt_keys"]
        checkpoint = Shapes({name: names[name] for name in names if name.startswith(part)})
        assert f"{words}: give the whole model" in missing_information(checkpoint, map_base_model(checkpoint), "say it")

    def test_a_file_without_a_unet_can_start_a_training(self, published):
        names = published["sd2_ldm_ckpt_keys"]
        checkpoint = Shapes({name: names[name] for name in names if not name.startswith("model.")})
        message = missing_information(checkpoint, map_base_model(checkpoint), "say it")
        assert message == "Its shapes do not show whether it predicts noise or velocity: say it"

    def test_a_unet_of_eight_channels_on_both_sides_is_no_other_task(self, published):
        names = {**published["sd1_ldm_ckpt_keys"], "model.diffusion_model.input_blocks.0.0.weight": [320, 8, 3, 3]}
        with pytest.raises(UserError, match="is an InstructPix2Pix checkpoint"):
            candidate_paths(Shapes(names))
        assert candidate_paths(Shapes({**names, "model.diffusion_model.out.2.weight": [8, 320, 3, 3]})) == []

    @pytest.mark.parametrize("keys, path", [("sd1_ldm_ckpt_keys", V1_INPAINTING), ("sd2_ldm_ckpt_keys", V2_INPAINTING)])
    def test_inpainting(self, published, keys, path):
        names = {**published[keys], "model.diffusion_model.input_blocks.0.0.weight": [320, 9, 3, 3]}
        assert candidate_paths(Shapes(names)) == [path]
        for channels, words in ((5, "a depth-to-image"), (7, "an upscaling"), (8, "an InstructPix2Pix")):
            other = {**names, "model.diffusion_model.input_blocks.0.0.weight": [320, channels, 3, 3]}
            with pytest.raises(UserError, match=f"is {words} checkpoint"):
                candidate_paths(Shapes(other))

    def test_the_yaml_beside_it_says_the_rest(self, tmp_path, published):
        checkpoint = Shapes(published["sd2_ldm_ckpt_keys"])
        checkpoint.path = tmp_path / "mine.safetensors"
        document = model_document(load_model_config(ROOT / V2_V))
        document["model"]["params"]["timesteps"] = 500
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(document))
        (model,) = candidate_configs(checkpoint, map_base_model(checkpoint))
        assert model.timesteps == 500 and model.prediction_type == "v_prediction"


class TestDiffusersFolders:
    @pytest.mark.parametrize("path", [V1, V2, V2_V, V1_INPAINTING, V2_INPAINTING])
    def test_published_models(self, published, path):
        model = load_model_config(ROOT / path)
        version = {"sd1": 1, "sd2": 2}[model.architecture]
        folder = Folder(published, version, settings_of(model))
        folder._shapes = {**folder._shapes, "unet/conv_in.weight": [320, model.unet["in_channels"], 3, 3]}
        assert candidate_paths(folder) == [path]
        if model.is_inpainting:
            return
        # Without config.json the shapes tell, and the scheduler.
        assert candidate_paths(Folder(published, version, settings_of(model, vae=None))) == [path]

    def test_a_unet_that_lacks_an_array_is_left_to_the_strict_loading(self, published):
        folder = Folder(published, 1, settings_of(load_model_config(ROOT / V1)))
        folder._shapes = {name: shape for name, shape in folder._shapes.items() if name != "unet/conv_in.weight"}
        assert candidate_paths(folder) == [V1]

    @pytest.mark.parametrize("part, words", [("text_encoder", "It holds no text encoder: give the whole model"),
                                             ("vae", "and holds no VAE and has no vae/config.json")])  # fmt: skip
    def test_a_network_that_is_missing_is_named(self, published, part, words):
        folder = Folder(published, 1, settings_of(load_model_config(ROOT / V1), **{part.split("_")[0]: None}))
        folder._shapes = {name: shape for name, shape in folder._shapes.items() if not name.startswith(part)}
        assert words in missing_information(folder, map_base_model(folder), "say it")

    def test_a_missing_config_is_named_for_an_unknown_model(self, published):
        folder = Folder(published, 1, settings_of(load_model_config(ROOT / V1), unet=None))
        folder._shapes = {**folder._shapes, "vae/post_quant_conv.weight": [16, 16, 1, 1]}
        key_map = map_base_model(folder)
        assert candidate_configs(folder, key_map) == []
        message = missing_information(folder, key_map, "say it")
        assert "has no unet/config.json, and its shapes do not show the rest: say it" in message

    @pytest.mark.parametrize(
        "changed, field, value",
        [
            ({"scheduler": {"beta_end": 0.02}}, "linear_end", 0.02),
            ({"scheduler": {"prediction_type": "v_prediction"}}, "prediction_type", "v_prediction"),
            ({"scheduler": {"num_train_timesteps": 500}}, "timesteps", 500),
            ({"vae": {"scaling_factor": 0.13}}, "scale_factor", 0.13),
            ({"unet": {"sample_size": 96}}, "image_size", 768),
            ({"unet": {"sample_size": [96, 96]}}, "image_size", 768),
            ({"tokenizer": {"pad_token": {"content": "!"}}}, "pad_token", "zero"),
        ],
    )
    def test_a_different_setting_makes_another_model(self, published, changed, field, value):
        folder = Folder(published, 1, settings_of(load_model_config(ROOT / V1), **changed))
        (model,) = candidate_configs(folder, map_base_model(folder))
        assert getattr(model, field) == value and model.architecture == "sd1" and known_config_path(model) is None

    @pytest.mark.parametrize(
        "changed, part, key, value",
        [
            ({"unet": {"attention_head_dim": 4}}, "unet", "num_heads", 4),
            ({"unet": {"attention_head_dim": [5, 10, 20, 20]}}, "unet", "num_head_channels", 64),
            ({"unet": {"num_attention_heads": 16}}, "unet", "num_heads", 16),
            ({"unet": {"norm_num_groups": 16}}, "unet", "num_groups", 16),
            ({"vae": {"norm_num_groups": 16}}, "vae", "num_groups", 16),
            ({"text": {"hidden_act": "gelu"}}, "text", "activation", "gelu"),
            ({"text": {"num_attention_heads": 8}}, "text", "num_heads", 8),
        ],
    )
    def test_settings_that_shapes_do_not_show(self, published, changed, part, key, value):
        folder = Folder(published, 1, settings_of(load_model_config(ROOT / V1), **changed))
        (model,) = candidate_configs(folder, map_base_model(folder))
        assert getattr(model, part)[key] == value

    @pytest.mark.parametrize(
        "changed, words",
        [
            ({"unet": {"attention_head_dim": [5, 10, 10, 20]}}, "attention_head_dim"),
            ({"unet": {"attention_head_dim": "8"}}, "attention_head_dim in unet/config.json is '8'"),
            ({"unet": {"attention_head_dim": [5, 10]}}, "one for each of the 4 levels"),
            ({"unet": {"attention_head_dim": [8, 8, 8, "8"]}}, "one for each of the 4 levels"),
            ({"unet": {"attention_head_dim": 0}}, "attention_head_dim"),
            ({"unet": {"sample_size": "64"}}, "sample_size in unet/config.json is '64'"),
            ({"unet": {"sample_size": {"height": 64}}}, "sample_size"),
            ({"unet": {"act_fn": "gelu"}}, "act_fn in unet/config.json is 'gelu'"),
            ({"unet": {"class_embed_type": "timestep"}}, "class_embed_type"),
            ({"unet": {"addition_embed_type": "text_time"}}, "addition_embed_type"),
            ({"unet": {"dual_cross_attention": True}}, "dual_cross_attention"),
            ({"vae": {"shift_factor": 0.1}}, "shift_factor"),
            ({"scheduler": {"beta_schedule": "linear"}}, "beta_schedule"),
            ({"scheduler": {"rescale_betas_zero_snr": True}}, "rescale_betas_zero_snr"),
            ({"scheduler": {"prediction_type": "sample"}}, "prediction_type"),
            ({"text": {"hidden_act": "relu"}}, "activation"),
            ({"scheduler": {"beta_end": "big"}}, "linear_end"),
            ({"unet": {"attention_head_dim": 7}}, "num_heads"),
            ({"unet": {"num_attention_heads": 10**9}}, "num_attention_heads in unet/config.json is 1000000000"),
            ({"unet": {"num_attention_heads": -1}}, "num_attention_heads in unet/config.json is -1"),
            ({"unet": {"attention_head_dim": [True] * 4}}, "attention_head_dim"),
            ({"unet": {"attention_head_dim": "8" * 10_000}}, "attention_head_dim .* is '888.* [.]{3} 8"),
            ({"unet": {"sample_size": 10**9}}, "sample_size in unet/config.json is 1000000000"),
            ({"unet": {"sample_size": -64}}, "sample_size in unet/config.json is -64"),
            ({"unet": {"norm_num_groups": 0}}, "norm_num_groups in unet/config.json is 0"),
            ({"vae": {"norm_num_groups": None}}, "norm_num_groups in vae/config.json is None"),
            ({"vae": {"scaling_factor": "x"}}, "scale_factor"),
            ({"text": {"num_attention_heads": 0}}, "num_attention_heads in text_encoder/config.json is 0"),
            ({"text": {"num_attention_heads": -1}}, "num_attention_heads in text_encoder/config.json is -1"),
            ({"text": {"num_attention_heads": 10**9}}, "num_attention_heads in text_encoder/config.json is 1000"),
            ({"text": {"num_attention_heads": "8"}}, "num_attention_heads in text_encoder/config.json is '8'"),
            ({"text": {"num_attention_heads": None}}, "num_attention_heads in text_encoder/config.json is None"),
            ({"text": {"num_attention_heads": True}}, "num_attention_heads in text_encoder/config.json is True"),
            ({"text": {"hidden_act": ["gelu"]}}, "activation"),
            ({"scheduler": {"num_train_timesteps": 10**12}}, "num_train_timesteps .* is 1000000000000"),
            ({"scheduler": {"num_train_timesteps": 1}}, "num_train_timesteps"),
            ({"scheduler": {"num_train_timesteps": 1e3}}, "num_train_timesteps"),
            ({"scheduler": {"prediction_type": ["epsilon"]}}, "prediction_type"),
            ({"scheduler": {"beta_schedule": {}}}, "beta_schedule"),
        ],
    )
    def test_settings_that_the_networks_here_do_not_have(self, published, changed, words):
        folder = Folder(published, 1, settings_of(load_model_config(ROOT / V1), **changed))
        with pytest.raises(UserError, match=words) as caught:
            candidate_configs(folder, map_base_model(folder))
        assert "nowhere/sd" in str(caught.value)


@pytest.mark.parametrize(
    "path",
    [*(ROOT / path for path in KNOWN_CONFIGS), *sorted(ROOT.glob("tests/golden/*.yaml")), ROOT / "tests" / "tiny.yaml"],
    ids=lambda path: path.stem,
)
def test_a_written_model_yaml_is_read_back(path):
    model = load_model_config(path)
    document = yaml.safe_load(yaml.safe_dump(model_document(model)))
    back = parse_model_config(document, path)
    assert dataclasses.asdict(back) == dataclasses.asdict(model)
