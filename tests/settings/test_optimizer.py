"""The settings of the optimizer: sd-scripts' names, options by name, contradictions."""

from __future__ import annotations

from dataclasses import fields

import pytest

from ldm.errors import UserError
from ldm.settings.optimizer import OPTIONS, OptimizerSettings
from ldm.settings.read import read_settings
from ldm.settings.train import TrainSettings


def parse(*argv):
    return read_settings(TrainSettings, list(argv), yaml_flag="train_config")


def options(*argv):
    return parse(*argv).optimizer_options()


def test_the_names_of_sd_scripts_mean_the_same(tmp_path):
    recipe = tmp_path / "kohya.yaml"
    recipe.write_text(
        'optimizer_type: "Prodigy"\noptimizer_args: ["decouple=True", "d_coef=2", "betas=0.9,0.99"]\n'
        "learning_rate: 1.0\nlr_scheduler: constant_with_warmup\nlr_warmup_steps: 0.05\n"
    )
    settings = parse("--train_config", str(recipe))
    assert (settings.optim, settings.scheduler, settings.start_learning_rate) == ("prodigy", "constant", 1.0)
    assert settings.warmup_steps == 0.05
    chosen = settings.optimizer_options()
    assert (chosen.d_coef, chosen.betas, chosen.decouple, chosen.growth_rate) == (2.0, [0.9, 0.99], True, None)


@pytest.mark.parametrize(
    ("optim", "betas", "weight_decay"),
    [
        ("adamw", [0.9, 0.999], 0.01), ("lion", [0.9, 0.99], 0.0), ("adamwschedulefree", [0.9, 0.999], 0.01),
        ("prodigy", [0.9, 0.999], 0.0), ("adafactor", None, 0.0),
    ],
)  # fmt: skip
def test_each_optimizer_has_its_own_defaults(optim, betas, weight_decay):
    settings = parse("--optim", optim, "--start_learning_rate", "1")
    assert settings.resolved() == {"betas": betas, "weight_decay": weight_decay}


def test_an_option_wins_over_the_setting_of_the_same_name():
    argv = ["--optim=lion", "--betas", "0.95", "0.98", "--weight_decay", "0.5", "--optimizer_args", "weight_decay=0.1"]
    assert parse(*argv).resolved() == {"betas": [0.95, 0.98], "weight_decay": 0.1}


def test_none_takes_back_what_a_recipe_gives(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("betas: [0.9, 0.98]\nweight_decay: 0.01\n")
    argv = ["--train_config", str(recipe), "--betas", "None", "--weight_decay", "None"]
    assert parse(*argv, "--optim=adafactor").resolved() == {"betas": None, "weight_decay": 0.0}
    assert parse(*argv, "--optim=lion").resolved() == {"betas": [0.9, 0.99], "weight_decay": 0.0}


def test_options_read_as_their_types():
    chosen = options("--optim=Adafactor", "--optimizer_args", "eps=(1e-20, 1e-2)", "beta1=none", "scale_parameter=true")
    assert (chosen.eps, chosen.beta1, chosen.scale_parameter) == ([1e-20, 1e-2], None, True)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--optim", "Lionn"], "Lion"),
        (["--optimizer_args", "weight_decay"], "is no name=value"),
        (["--optimizer_args", "weightdecay=1"], 'did you mean "weight_decay"'),
        (["--optimizer_args", "d_coef=2"], "is no option of adamw"),
        (["--optimizer_args", "eps=1e-8", "eps=1e-9"], "twice"),
        (["--optimizer_args", "betas=0.9"], "1 values given"),
        (["--optimizer_args", "betas=0.9,1"], "below 1"),
        (["--optimizer_args", "eps=big"], "is not a number"),
        (["--optim=adafactor", "--betas", "0.9", "0.99"], "betas is no option of adafactor.* None"),
        (["--optim=adafactor", "--optimizer_args", "warmup_init=True"], "needs relative_step"),
        (["--optim=adafactor", "--optimizer_args", "relative_step=True", "--unet_lr=1"], "unet_lr does not go with"),
        (["--optim=adamwschedulefree", "--betas", "0", "0.999"], "betas: 0.0 is not allowed"),
        (["--optim=prodigy"], "give --start_learning_rate 1"),
        (["--optim=prodigy", "--learning_rate=1", "--unet_lr=1"], "one rate for all"),
        (["--optim=prodigy", "--learning_rate=1", "--optimizer_args", "decouple=False"], "decouple"),
        (["--optim=adamwschedulefree", "--use_ema"], "use_ema does not go with"),
        (["--optim=prodigy", "--learning_rate=1", "--shard_optimizer", "--use_parallel"], "shard_optimizer does not"),
        (["--warmup_steps", "2.5"], "no whole number"),
        (["--text_encoder_lr", "1e-5", "--use_lora"], "needs lora_ft_text_encoder"),
        (["--unet_lr=1", "--use_lora", "--lora_ft_unet=False", "--lora_ft_text_encoder"], "unet_lr has no effect"),
        (["--loraplus_lr_ratio", "16"], "loraplus_lr_ratio needs use_lora"),
        (["--scale_weight_norms", "1"], "scale_weight_norms needs use_lora"),
        (["--scale_weight_norms", "1", "--use_lora", "--use_ema"], "scale_weight_norms does not go with averages"),
    ],
)
def test_mistakes_are_named(argv, says):
    with pytest.raises(UserError, match=says):
        parse(*argv)


def test_every_option_is_explained():
    for cls in (*OPTIONS.values(), OptimizerSettings):
        for field in fields(cls):
            assert len(field.metadata["help"]) > 5, field.name
