"""The settings of training: the published names and defaults, the recipes, contradictions."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from ldm.config.model import load_model_config
from ldm.config.parse import parse_config
from ldm.config.train import TrainConfig
from ldm.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "configs" / "train").glob("*.yaml"))


def parse(*argv):
    return parse_config(TrainConfig, list(argv), yaml_flag="train_config")


def test_the_defaults_of_the_published_recipe():
    config = parse()
    assert (config.use_lora, config.lora_ft_unet, config.lora_ft_text_encoder) == (False, True, False)
    assert (config.lora_rank, config.lora_alpha, config.lora_scale, config.lora_fp16) == (4, None, 1.0, True)
    assert (config.mode, config.device_target, config.precision, config.resume) == (0, None, "auto", False)


def test_every_setting_is_explained():
    for field in dataclasses.fields(TrainConfig):
        assert len(field.metadata["help"]) > 5, field.name


def test_there_is_a_recipe_for_each_model_and_way():
    assert [path.stem for path in RECIPES] == [
        f"train_config_{way}_{model}"
        for way in ("lora", "vanilla")
        for model in ("nano", "v1", "v2", "v2_vpred")
    ]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_reads_fits_its_model_and_opens_with_its_command(path):
    config = parse("--train_config", str(path))
    model = load_model_config(ROOT / config.model_config)
    assert config.image_size == model.image_size
    assert config.use_lora == ("_lora_" in path.stem)
    assert model.prediction_type == ("v_prediction" if path.stem.endswith(("vpred", "nano")) else "epsilon")
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    command = "".join(line.lstrip("# ").rstrip("\\") for line in header[1:])
    assert command.startswith("python train_text_to_image.py --train_config configs/train/" + path.name)
    for flag in ("--data_path", "--output_path", "--pretrained_model_path"):
        assert flag in command


def test_the_keys_of_a_published_recipe_mean_the_same(tmp_path):
    recipe = tmp_path / "published.yaml"
    recipe.write_text(
        'mode: 0\nuse_parallel: False\nnum_workers: 1\ndata_path: "/path"\ntrain_batch_size: 4\nimage_size: 512\n'
        'image_filter_size: 200\nmodel_config: "configs/v1-inference.yaml"\npretrained_model_path: "/model"\n'
        'output_path: "/out"\nckpt_save_interval: 5\nepochs: 72\nuse_ema: False #True\nclip_grad: True\n'
        'scheduler: "cosine_decay"\nstart_learning_rate: 1e-4\nend_learning_rate: 0\nwarmup_steps: 0\n'
        'decay_steps: 0\noptim: "adamw"\nbetas: [0.9, 0.98]\nweight_decay: 0.01\nuse_lora: True\n'
        "lora_ft_text_encoder: False\nlora_rank: 128\nlora_fp16: True\n"
    )
    config = parse("--train_config", str(recipe))
    assert (config.scheduler, config.start_learning_rate, config.end_learning_rate) == ("cosine", 1e-4, 0.0)
    assert (config.epochs, config.betas, config.lora_rank) == (72, [0.9, 0.98], 128)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--use_lora", "--lora_ft_unet", "False"], "nothing to train"),
        (["--use_lora", "--unet_initialize_random"], "unet_initialize_random"),
        (["--lora_ft_text_encoder"], "needs use_lora"),
        (["--lora_init_path", "lora.ckpt"], "lora_init_path needs use_lora"),
        (["--lora_rank", "0"], "at least 1"),
        (["--scheduler", "cosinus"], '"cosine"'),
        (["--precision", "bf16"], "fp16"),
        (["--caption_dropout", "2"], "at most 1"),
        (["--learning_rate", "1e-4"], "_learning_rate"),
    ],
)
def test_contradictions_and_mistakes_are_named(argv, says):
    with pytest.raises(UserError, match=says):
        parse(*argv)
