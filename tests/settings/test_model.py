"""Model YAMLs: the bundled and the published ones read, and invalid values are named."""

from __future__ import annotations

import copy
import dataclasses
import os
import typing

import pytest
import yaml

from ldm.errors import UserError
from ldm.settings.model import PREDICTION_TYPES, ModelConfig, load_model_config
from ldm.settings.model_size import text_parameters, unet_parameters, vae_parameters
from ldm.settings.model_yaml import ModelParams, TextParams, UNetParams, VAENetworkParams, VAEParams
from tests.conftest import ROOT

V1 = ROOT / "configs" / "v1-inference.yaml"
SECTIONS = {
    "params": "model.params",
    "unet": "model.params.unet_config.params",
    "vae": "model.params.first_stage_config.params",
    "ddconfig": "model.params.first_stage_config.params.ddconfig",
    "text": "model.params.cond_stage_config.params",
}


@pytest.fixture
def change(tmp_path):
    """Write v1-inference.yaml with the value at a dotted place set (or removed, for None), and read it.

    A place begins at the top, or in one of SECTIONS.
    """

    def write_and_read(place=None, value=None):
        document = yaml.safe_load(V1.read_text())
        if place is not None:
            section_name, dot, rest = place.partition(".")
            *folders, last = (SECTIONS.get(section_name, section_name) + dot + rest).split(".")
            section = document
            for folder in folders:
                section = section[folder]
            if value is None:
                del section[last]
            else:
                section[last] = copy.deepcopy(value)
        path = tmp_path / "model.yaml"
        path.write_text(yaml.safe_dump(document))
        return load_model_config(path)

    return write_and_read


@pytest.mark.parametrize(
    "name, expected",
    [
        ("v1-inference", ("sd1", "epsilon", 512, 768, "end", 8)),
        ("v2-inference", ("sd2", "epsilon", 512, 1024, "zero", 8)),
        ("v2-vpred-inference", ("sd2", "v_prediction", 768, 1024, "zero", 8)),
        ("nano", ("nano", "v_prediction", 64, 96, "end", 4)),
    ],
)
def test_bundled_configurations(name, expected):
    config = load_model_config(ROOT / "configs" / f"{name}.yaml")
    image = (config.image_size, config.context_dim, config.pad_token, config.vae_factor)
    assert (config.architecture, config.prediction_type, *image) == expected
    assert config.scale_factor == 0.18215 or name == "nano"
    assert (config.linear_start, config.linear_end, config.timesteps) == (0.00085, 0.012, 1000)
    assert config.beta_schedule == "scaled_linear" and config.latent_channels == 4


def test_text_encoders_are_the_published_ones():
    v1, v2 = (load_model_config(ROOT / "configs" / f"{name}-inference.yaml").text for name in ("v1", "v2"))
    assert v1 == dict(width=768, num_layers=12, num_heads=12, activation="quick_gelu")
    assert v2 == dict(width=1024, num_layers=23, num_heads=16, activation="gelu")  # 24, the penultimate one is used


def test_a_published_yaml_reads_unchanged(change):
    """With what CompVis's file holds besides: training settings that this project has no use for."""
    plain = change()
    config = change(
        "model.params",
        {
            **yaml.safe_load(V1.read_text())["model"]["params"],
            "num_timesteps_cond": 1,
            "finetune_keys": None,
            "use_fp16": True,
            "log_every_t": 200,
            "first_stage_key": "jpg",
            "cond_stage_key": "txt",
            "channels": 4,
            "cond_stage_trainable": False,
            "conditioning_key": "crossattn",
            "use_ema": False,
            "monitor": "val/loss_simple_ema",
            "scheduler_config": {
                "target": "ldm.lr_scheduler.LambdaLinearScheduler",
                "params": {"warm_up_steps": [10000]},
            },
        },
    )
    assert (config.unet, config.vae, config.text) == (plain.unet, plain.vae, plain.text)
    checkpointed = change("model.params.unet_config.params.use_checkpoint", True)
    assert checkpointed.unet == plain.unet


@pytest.mark.parametrize(
    "place, value, says",
    [
        ("model.target", "os.system", 'model.target: "os.system" is not allowed'),
        ("params.unet_config.target", "somewhere.UNet", "unet_config.target: "),
        ("params.first_stage_config.target", "torch.nn.Identity", "first_stage_config.target"),
        ("params.cond_stage_config.target", "ldm.modules.encoders.modules.FrozenT5Embedder", "cond_stage_config"),
        ("unet.num_haeds", 8, 'unknown setting "model.params.unet_config.params.num_haeds": did you mean "num_heads"?'),
        ("ddconfig.z", 8, 'ddconfig.z": did you mean'),
        ("ddconfig.attn_resolutions", [16], "attn_resolutions in ddconfig must be empty"),
        ("params.parameterization", "x0", 'parameterization: "x0" is not allowed: one of "eps", "v"'),
        ("model.pad_token", "start", 'pad_token: "start" is not allowed: one of "end", "zero"'),
        ("unet.context_dim", 1024, "width 768 is not the UNet's context_dim 1024"),
        ("params.linear_start", None, "linear_start is missing"),
        ("params.scale_factor", None, "scale_factor is missing"),
        ("params.unet_config", None, "model.params.unet_config is missing: give a section"),
        ("vae.ddconfig", None, "first_stage_config.params.ddconfig is missing: give a section"),
        ("model", None, "no section model"),
        ("unet.model_channels", None, "unet_config.params.model_channels is missing"),
        ("vae.embed_dim", None, "first_stage_config.params.embed_dim is missing"),
        ("ddconfig.ch_mult", None, "ddconfig.ch_mult is missing: give a list, each a whole number"),
        ("unet.in_channels", None, "unet_config.params.in_channels is missing"),
        ("unet.num_heads", None, "needs num_heads (SD1.x) or num_head_channels (SD2.x)"),
        ("unet.channel_mult", 4, "channel_mult: 4 is not a list, each a whole number"),
        ("unet.channel_mult", [1, "2"], 'channel_mult: "2" is a text, not a whole number'),
        ("unet.channel_mult", [], "channel_mult: 0 values given, wanted 1 to 10"),
        ("unet.model_channels", "wide", 'model_channels: "wide" is not a whole number'),
        ("unet.model_channels", True, "model_channels: True is not a whole number"),
        ("ddconfig.ch", 1.5, "ddconfig.ch: 1.5 is not a whole number"),
        ("params.timesteps", "many", 'timesteps: "many" is not a whole number'),
        ("params.timesteps", float("inf"), "timesteps: inf is not a whole number"),
        ("params.timesteps", 1, "timesteps: 1 is not allowed: at least 2"),
        ("params.timesteps", 999.5, "timesteps: 999.5 is not a whole number"),
        ("params.image_size", 0.5, "image_size: 0.5 is not a whole number"),
        ("params.image_size", True, "image_size: True is not"),
        ("params.linear_start", 0.02, "linear_start 0.02 is above linear_end 0.012"),
        ("params.linear_end", 1.0, "linear_end: 1.0 is not allowed: at least 1e-08, below 1"),
        ("params.scale_factor", float("nan"), "scale_factor: nan is not a number"),
        ("params.scale_factor", 10**400, "is not a number"),
        ("params.parameterisation", "v", '"model.params.parameterisation": did you mean "parameterization"'),
        ("params.beta_schedule", "linear", 'unknown setting "model.params.beta_schedule"'),
        ("model.pad_tokn", "zero", 'unknown setting "model.pad_tokn": did you mean "pad_token"?'),
        ("model.architecture", "sdxl", 'architecture: "sdxl" is not allowed: one of "sd1", "sd2", "nano", "custom"'),
        ("model.params.unet_config.parms", {}, 'unet_config.parms": did you mean "params"?'),
        (
            "model.target",
            "ldm.models.diffusion.ddpm.LatentInpaintDiffusion",
            "whose UNet has in_channels 9 and out_channels 4, not 4 and 4",
        ),
        ("params.cond_stage_config.target", ["a"], "cond_stage_config.target: ['a'] is not a text"),
        ("text", [1], "cond_stage_config.params: [1] is not a section"),
        ("text", {"activation": "quickgelu"}, 'activation: "quickgelu" is not allowed: one of "quick_gelu", "gelu"'),
        ("text", {"num_heads": 7}, "width 768 is not a multiple of its num_heads 7"),
        ("text", {"num_heads": 0}, "cond_stage_config.params.num_heads: 0 is not allowed: at least 1"),
        ("text", {"num_layers": 1, "layer": "penultimate"}, "num_layers in cond_stage"),
        ("unet.num_heads", 0, "num_heads in unet_config is 0; it must be above 0"),
        ("unet.num_heads", -1, "needs num_heads (SD1.x) or num_head_channels (SD2.x)"),
        ("unet.num_heads", 7, "are not a multiple of num_heads 7"),
        ("unet.num_head_channels", 48, "are not a multiple of num_head_channels 48"),
        ("unet.channel_mult", [1, 0], "channel_mult: 0 is not allowed: at least 1"),
        ("unet.model_channels", 30, "30 channels (model_channels 30 x 1) in unet_config"),
        ("unet.num_groups", 48, "are not a multiple of num_groups 48"),
        ("unet.in_channels", 8, "which an InstructPix2Pix model has"),
        ("unet.in_channels", 10, "in_channels 10 and out_channels 4"),
        ("unet.out_channels", 8, "in_channels 4 and out_channels 8"),
        ("vae.embed_dim", 8, "embed_dim 8 must be the same"),
        ("ddconfig.ch", 100, "100 channels (ch 100 x 1) in ddconfig are not a mult"),
        ("ddconfig.in_channels", 1, "ddconfig.in_channels: 1 is not allowed: one of 3"),
        ("ddconfig.double_z", False, "double_z: False is not allowed: one of True"),
        ("params.scale_factor", 0, "scale_factor: 0.0 is not allowed: at least 0.001"),
        ("params.linear_start", "8.5e-4", 'linear_start: "8.5e-4" is a text, not a number: leave the quotes away'),
        ("params.linear_end", [1], "linear_end: [1] is not a number"),
        ("unet", 5, "unet_config.params must hold lines of"),
        # more than any model has: named with the bound, before anything is built
        ("params.timesteps", 10**12, "timesteps: 1000000000000 is not allowed: at least 2, at most 100000"),
        ("params.image_size", 10**6, "image_size: 1000000 is not allowed: at least 1, at most 8192"),
        ("params.scale_factor", 1e300, "scale_factor: 1e+300 is not allowed: at least 0.001, at most 1000"),
        ("params.scale_factor", 1e-30, "scale_factor: 1e-30 is not allowed: at least 0.001"),
        ("params.linear_start", 1e-300, "linear_start: 1e-300 is not allowed: at least 1e-08"),
        ("params.linear_end", 0.9999, "after timesteps 1000 with linear_end 0.9999 only"),
        ("unet.num_res_blocks", 10**8, "num_res_blocks: 100000000 is not allowed"),
        ("unet.channel_mult", [1] * 10**4, "channel_mult: 10,000 values given, wanted 1 to 10"),
        ("unet.channel_mult", [1, 10**9], "channel_mult: 1000000000 is not allowed"),
        ("unet.attention_resolutions", [1] * 11, "attention_resolutions: 11 values given, wanted 1 to 10"),
        ("unet.model_channels", 10**300, "model_channels: 1000000"),
        ("unet.transformer_depth", 10**6, "transformer_depth: 1000000 is not"),
        ("unet.num_groups", 10**9, "num_groups: 1000000000 is not allowed: at least 1, at most 8192"),
        ("unet.model_channels", 8192, "parameters; 5,000,000,000 is the most: lower"),
        ("ddconfig.ch", 10**9, "ddconfig.ch: 1000000000 is not allowed: at least 1, at most 4096"),
        ("ddconfig.ch_mult", [1] * 11, "ch_mult: 11 values given"),
        ("ddconfig.z_channels", 10**9, "z_channels: 1000000000 is not"),
        ("vae.embed_dim", 10**9, "embed_dim: 1000000000 is not"),
        ("text", {"num_layers": 10**8}, "num_layers: 100000000 is not"),
        ("text", {"vocab_size": 10**12}, "vocab_size: 1000000000000 is not"),
        ("text", {"length": 10**9}, "length: 1000000000 is not"),
        # foreign text is cut out of the middle
        ("params.parameterization", "x" * 10**5, 'parameterization: "xxx'),
        ("params." + "x" * 10**5, 1, 'unknown setting "model.params.xxx'),
        ("text", ["x" * 10**5] * 2, "cond_stage_config.params: ['xxx"),
        ("params.scale_factor", "1\x1b[2J", 'scale_factor: "1'),
    ],
)
def test_an_invalid_value_is_named_with_its_place(change, place, value, says):
    with pytest.raises(UserError) as error:
        change(place, value)
    assert says in str(error.value) and "model.yaml" in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize(
    "place, value",
    [
        ("unet.num_head_channels", -1),  # num_heads counts then
        ("text", {"activation": "gelu"}),
        ("params.scale_factor", 1),
        ("params.timesteps", 2),
        ("params.timesteps", 1000.0),  # as YAML reads 1e3
        ("model.base_learning_rate", 1e-4),
    ],
)
def test_an_unusual_value_is_read(change, place, value):
    assert isinstance(change(place, value), ModelConfig)


@pytest.fixture
def change_pixels(tmp_path):
    """Write configs/mnist.yaml with some values of model.params set, and read it."""

    def write_and_read(unet=(), first_stage=(), **params):
        document = yaml.safe_load((ROOT / "configs" / "mnist.yaml").read_text())
        section = document["model"]["params"]
        section.update(params)
        section["unet_config"]["params"].update(unet)
        section["first_stage_config"].update(first_stage)
        path = tmp_path / "pixels.yaml"
        path.write_text(yaml.safe_dump(document))
        return load_model_config(path)

    return write_and_read


@pytest.mark.parametrize("name, channels", [("mnist", 1), ("mnist_rgb", 3)])
def test_in_pixel_space_the_latents_are_the_pixels(name, channels):
    config = load_model_config(ROOT / "configs" / f"{name}.yaml")
    assert config.in_pixel_space and config.vae == {} and config.scale_factor == 1
    assert (config.image_channels, config.latent_channels, config.moment_channels) == (channels,) * 3
    assert (config.image_size, config.vae_factor, config.size_multiple) == (32, 1, 4)
    assert (config.architecture, config.prediction_type) == ("custom", "v_prediction")


def test_with_an_autoencoder_the_images_are_rgb():
    config = load_model_config(V1)
    assert not config.in_pixel_space
    assert (config.image_channels, config.latent_channels, config.moment_channels) == (3, 4, 8)


@pytest.mark.parametrize("params", [None, {}])
def test_the_identity_takes_no_params(change_pixels, params):
    assert change_pixels(first_stage={"params": params}).in_pixel_space
    with pytest.raises(UserError, match="first_stage_config.params holds embed_dim, but IdentityFirstStage takes no"):
        change_pixels(first_stage={"params": {"embed_dim": 4}})


@pytest.mark.parametrize(
    "changes, says",
    [
        (
            dict(unet=dict(in_channels=2, out_channels=2)),
            "in_channels 2 and out_channels 2 .*1 \\(grey\\) or 3 \\(RGB\\)",
        ),
        (dict(unet=dict(in_channels=3)), "in_channels 3 and out_channels 1 .*must be 1"),
        (dict(scale_factor=0.5), "scale_factor is 0.5.*must be 1: the latents are the pixels"),
        (dict(image_size=30), "image_size 30 must be a multiple of 4 pixels"),
        (
            dict(first_stage=dict(target="ldm.models.autoencoder.AutoencoderKL")),
            "first_stage_config.params.embed_dim is",
        ),
        (
            dict(first_stage=dict(target="ldm.models.autoencoder.VQModel")),
            "first_stage_config.target.*IdentityFirstStage",
        ),
    ],
)
def test_what_does_not_suit_pixel_space_is_named(change_pixels, changes, says):
    with pytest.raises(UserError, match=says):
        change_pixels(**changes)


@pytest.mark.parametrize(
    "path",
    [*sorted((ROOT / "configs").glob("*.yaml")), *sorted(ROOT.glob("tests/**/*.yaml"))],
    ids=lambda path: path.stem,
)
def test_every_model_yaml_of_this_project_reads(path):
    assert load_model_config(path).prediction_type in PREDICTION_TYPES


@pytest.mark.parametrize("content", [b"", b"just text", b"- a list", b"model: [1", b"\xff\xfe\x00", b"model:\n\t- x"])
def test_a_file_that_is_not_a_model_yaml_is_refused(tmp_path, content):
    path = tmp_path / "other.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match="other.yaml"):
        load_model_config(path)


def test_a_key_given_twice_is_named_with_its_line(tmp_path):
    """Plain YAML would take the second and say nothing."""
    path = tmp_path / "twice.yaml"
    text = (ROOT / "configs" / "nano.yaml").read_text()
    path.write_text(text.replace("    timesteps:", "    image_size: 8\n    timesteps:"))
    with pytest.raises(UserError, match='twice.yaml line [0-9]+ is not valid YAML: "image_size" is given twice'):
        load_model_config(path)


def test_a_missing_file_is_named_with_the_setting(tmp_path):
    with pytest.raises(UserError, match="--model_config"):
        load_model_config(tmp_path / "nowhere.yaml")


def test_a_yaml_makes_no_objects(tmp_path):
    path = tmp_path / "evil.yaml"
    path.write_text("model: !!python/object/apply:os.system ['echo harm']\n")
    with pytest.raises(UserError, match="not valid YAML"):
        load_model_config(path)


def test_the_parameters_of_a_model_are_counted_before_it_is_built(tiny_config, tiny_model):
    built = (tiny_model.model.diffusion_model, tiny_model.first_stage_model, tiny_model.cond_stage_model)
    counted = (
        unet_parameters(**tiny_config.unet),
        vae_parameters(**tiny_config.vae),
        text_parameters(**tiny_config.text),
    )
    assert counted == tuple(sum(parameter.size for parameter in net.get_parameters()) for net in built)


@pytest.mark.parametrize(
    ("name", "unet", "vae", "text"),
    [
        ("v1-inference", 859_520_964, 83_653_863, 123_060_480),
        # the text encoder's are of 23 layers
        ("v2-inference", 865_910_724, 83_653_863, 340_387_840),
    ],
)
def test_the_published_models_have_the_published_numbers_of_parameters(name, unet, vae, text):
    config = load_model_config(ROOT / "configs" / f"{name}.yaml")
    counted = (unet_parameters(**config.unet), vae_parameters(**config.vae), text_parameters(**config.text))
    assert counted == (unet, vae, text)


@pytest.mark.parametrize("section", [UNetParams, VAENetworkParams, VAEParams, TextParams, ModelParams])
def test_every_number_has_a_range(section):
    """A number without one could describe a network that exhausts memory."""
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        if hints[field.name] in (int, float, list[int]):
            rules = field.metadata
            assert rules["choices"] or (rules["low"] and (rules["high"] or rules["below"])), field.name
            assert rules["length"] or hints[field.name] != list[int], field.name


def test_a_pipe_is_no_model_yaml(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(UserError, match=r"pipe.yaml is a pipe \(FIFO\), not a file.*--model_config"):
        load_model_config(tmp_path / "pipe.yaml")
