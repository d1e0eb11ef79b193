"""The settings of training: the published names and defaults, the recipes, contradictions."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path

import pytest

from ldm.errors import UserError
from ldm.settings.declare import names_of
from ldm.settings.generate import GenerateSettings
from ldm.settings.model import load_model_config
from ldm.settings.read import read_settings
from ldm.settings.train import TrainSettings

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "configs" / "train").glob("*.yaml"))


def parse(*argv):
    return read_settings(TrainSettings, list(argv), yaml_flag="train_config")


def test_the_defaults_of_the_published_recipe():
    settings = parse()
    assert (settings.use_lora, settings.lora_ft_unet, settings.lora_ft_text_encoder) == (False, True, False)
    assert (settings.lora_rank, settings.lora_alpha, settings.lora_scale, settings.lora_fp16) == (4, None, 1.0, True)
    assert (settings.mode, settings.device_target, settings.precision, settings.resume) == (0, None, "auto", False)


def test_every_setting_is_explained():
    for field in dataclasses.fields(TrainSettings):
        assert len(field.metadata["help"]) > 5, field.name


def test_the_settings_in_a_training_state_stay_the_same():
    """States that earlier versions wrote are compared by these names. One that is missing would not be compared."""
    assert sorted(names_of(TrainSettings, resume="fixed")) == [
        "adaptive_noise_scale", "algo", "alpha_color", "alpha_mask", "bucket_no_upscale", "bucket_reso_steps",
        "caption_dropout", "caption_dropout_every_n_epochs", "caption_prefix", "caption_separator", "caption_suffix",
        "caption_tag_dropout_rate", "check_images", "class_prompt", "conditioning_data_dir", "conv_alpha", "conv_dim",
        "debiased_estimation_loss", "dora_wd", "enable_bucket", "enable_wildcard", "factor",
        "gradient_accumulation_steps", "huber_c", "huber_scale", "huber_schedule", "image_size", "initializer_token",
        "instance_prompt", "ip_noise_gamma", "keep_tokens", "keep_tokens_separator", "learnable_property", "lora_alpha",
        "lora_config", "lora_dropout", "lora_fp16", "lora_ft_text_encoder", "lora_ft_unet", "lora_rank", "lora_scale",
        "lora_targets", "loss_type", "masked_loss", "max_bucket_reso", "max_buckets", "max_timestep", "min_bucket_reso",
        "min_snr_gamma", "min_timestep", "module_dropout", "multires_noise_discount", "multires_noise_iterations",
        "noise_offset", "normalize_masked_area_loss", "num_class_images", "num_repeats", "num_vectors", "optim",
        "placeholder_token", "precision", "prior_loss_weight", "random_crop", "random_flip", "rank_dropout", "rs_lora",
        "scale_v_pred_loss_like_noise_pred", "secondary_separator", "seed", "shuffle_buffer_size", "shuffle_caption",
        "token_warmup_min", "token_warmup_step", "unmasked_weight", "use_ema", "use_lora", "use_tucker",
        "v_pred_like_loss", "validation_seed", "validation_split", "with_prior_preservation", "zero_terminal_snr",
    ]  # fmt: skip
    assert sorted(names_of(TrainSettings, resume="followed")) == [
        "betas", "clip_grad", "decay_steps", "drop_overflow_update", "ema_decay", "end_learning_rate",
        "gradient_checkpointing", "loraplus_lr_ratio", "loss_scale_factor", "loss_scaler_type",
        "lr_scheduler_num_cycles", "lr_scheduler_power", "max_grad_norm", "optimizer_args", "scale_weight_norms",
        "scale_window", "scheduler", "start_learning_rate", "text_encoder_lr", "ti_lr", "unet_lr", "warmup_steps",
        "weight_decay",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("cls", "known"),
    [
        (TrainSettings, {"use_lora", "use_parallel", "sample_prompts", "placeholder_token"}),
        (GenerateSettings, {"lora_ckpt_path", "init_image", "mask_image", "hires_scale", "variation_seed"}),
    ],
)
def test_what_a_setting_is_part_of_is_declared_in_known_words(cls, known):
    rules = [field.metadata for field in dataclasses.fields(cls)]
    assert {rule["resume"] for rule in rules} <= {None, "fixed", "followed"}
    assert {rule["needs"] for rule in rules} == {None} | known


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(lora_rank=0), "lora_rank: 0 is not allowed: at least 1"),
        (dict(epochs="3"), 'epochs: "3" is a text, not a whole number'),
        (dict(scheduler="cosinus"), 'did you mean "cosine"'),
        (dict(start_learning_rate=float("nan")), "start_learning_rate: nan is not a number"),
        (dict(shard_optimizer=True), "shard_optimizer needs use_parallel"),
        (dict(shard_optimizer=True, use_parallel=True, use_lora=True), "leave it out"),
        (dict(algo="locon", use_lora=True), 'algo: "locon".*one of "lora", "loha", "lokr"'),
        (dict(algo="loha"), "algo needs use_lora"),
        (dict(dora_wd=True), "dora_wd needs use_lora"),
        (dict(rank_dropout=0.1), "rank_dropout needs use_lora"),
        (dict(rank_dropout=1.0, use_lora=True), "rank_dropout: 1.0 is not allowed.*below 1"),
        (dict(module_dropout=-0.1, use_lora=True), "module_dropout: -0.1 is not allowed.*at least 0"),
        (dict(conv_dim=0, use_lora=True), "conv_dim: 0 is not allowed: at least 1"),
        (dict(conv_alpha=1.0, use_lora=True), "conv_alpha has no effect without conv_dim"),
        (dict(conv_dim=4, lora_config="a.json", use_lora=True), "conv_dim and lora_config both"),
        (dict(conv_dim=4, use_lora=True, lora_ft_unet=False, lora_ft_text_encoder=True), "the UNet's convolutions"),
        (dict(factor=4, use_lora=True), "factor is for algo lokr, here it is lora"),
        (dict(factor=0, algo="lokr", use_lora=True), "factor: 0 is not allowed: at least 1, or -1"),
        (dict(factor=-2, algo="lokr", use_lora=True), "factor: -2 is not allowed: at least -1"),
        (dict(algo="loha", scale_weight_norms=1.0, use_lora=True), "scale_weight_norms is for pairs.*loha"),
        (dict(use_tucker=True, scale_weight_norms=1.0, use_lora=True), "third factor of use_tucker"),
    ],
)
def test_settings_made_in_python_are_checked_like_flags(change, says):
    with pytest.raises(UserError, match=says):
        TrainSettings(**change)


def test_there_is_a_recipe_for_each_model_and_way():
    models = ("mnist", "nano", "v1", "v2", "v2_vpred")
    assert [path.stem for path in RECIPES] == [
        "train_config_dreambooth_lora_nano", "train_config_dreambooth_lora_v1",
        "train_config_lora_mnist", "train_config_lora_nano", "train_config_lora_text_nano",
        *(f"train_config_lora_{model}" for model in models[2:]), "train_config_ti_nano", "train_config_ti_v1",
        *(f"train_config_vanilla_{model}" for model in models),
    ]  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_reads_fits_its_model_and_opens_with_its_command(path):
    settings = parse("--train_config", str(path))
    model = load_model_config(ROOT / settings.model_config)
    assert settings.image_size == model.image_size
    assert settings.use_lora == ("_lora_" in path.stem)
    assert model.prediction_type == ("v_prediction" if path.stem.endswith(("vpred", "nano", "mnist")) else "epsilon")
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
    settings = parse("--train_config", str(recipe))
    assert (settings.scheduler, settings.start_learning_rate, settings.end_learning_rate) == ("cosine", 1e-4, 0.0)
    assert (settings.epochs, settings.betas, settings.lora_rank) == (72, [0.9, 0.98], 128)


def test_mindones_names_of_dreambooth_mean_the_same_in_a_recipe(tmp_path):
    recipe = tmp_path / "published.yaml"
    recipe.write_text(
        'instance_data_dir: "/dog"\ninstance_prompt: "a photo of sks dog"\nclass_data_dir: "/class"\n'
        'class_prompt: "a photo of a dog"\nwith_prior_preservation: True\nnum_class_images: 200\n'
        "prior_loss_weight: 1.0\ntrain_data_repeats: 40\nsample_batch_size: 4\n"
    )
    settings = parse("--train_config", str(recipe))
    assert (settings.data_path, settings.class_data_dir, settings.num_repeats) == ("/dog", "/class", 40)
    recipe.write_text("train_data_repeats: 40\nnum_repeats: 10\n")
    with pytest.raises(UserError, match="train_data_repeats and another name of num_repeats"):
        parse("--train_config", str(recipe))


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--use_lora", "--lora_ft_unet", "False"], "nothing to train"),
        (["--use_lora", "--unet_initialize_random"], "unet_initialize_random"),
        (["--lora_ft_text_encoder"], "needs use_lora"),
        (["--lora_init_path", "lora.ckpt"], "lora_init_path needs use_lora"),
        (["--lora_config", "lora.json"], "lora_config needs use_lora"),
        (["--lora_rank", "0"], "at least 1"),
        (["--scheduler", "cosinus"], '"cosine"'),
        (["--precision", "fp8"], "bf16"),
        (["--precision", "bf16"], "trains and saves them in fp32: use auto or fp32, or train a LoRA"),
        (["--precision", "bf16", "--mode", "1", "--use_lora", "True"], "graph mode: leave out mode 1.*precision fp32"),
        (["--caption_dropout", "2"], "at most 1"),
        (["--learning_rates", "1e-4"], "learning_rate"),
    ],
)
def test_contradictions_and_mistakes_are_named(argv, says):
    with pytest.raises(UserError, match=says):
        parse(*argv)


@pytest.mark.parametrize("cls", [TrainSettings, GenerateSettings])
def test_every_number_is_bounded(cls):
    """What is beyond a bound would fail late, or work on nothing for ever."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kinds = {hints[field.name], *typing.get_args(hints[field.name])}
        if kinds & {int, float} and bool not in kinds:
            rules = field.metadata
            lower = [rules[rule] for rule in ("low", "above") if rules[rule] is not None]
            upper = [rules[rule] for rule in ("high", "below") if rules[rule] is not None]
            assert rules["choices"] or (lower and upper), field.name


@pytest.mark.parametrize("cls", [TrainSettings, GenerateSettings])
def test_every_path_is_declared_as_a_path(cls):
    """`~` and `$NAME` are expanded in these."""
    words = [
        "path",
        "config",
        "latents",
        "data_dir",
        "from_image",
        "init_image",
        "mask_image",
        "wildcard_dir",
        "lora_dir",
        *(["resume"] if cls is TrainSettings else []),
    ]
    for field in dataclasses.fields(cls):
        named = any(word in field.name for word in words) and field.name != "cache_latents"
        assert field.metadata["path"] == named, field.name


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("num_workers", "1000000000"), ("epochs", "1" + "0" * 30), ("max_steps", "1" + "0" * 30),
        ("train_batch_size", "1000000000"), ("gradient_accumulation_steps", "1000000000"), ("image_size", "1000000"),
        ("lora_rank", "2147483648"), ("ckpt_max_keep", "1" + "0" * 30), ("warmup_steps", "1" + "0" * 30),
        ("lora_scale", "1e300"), ("ema_decay", "0.99999999999"), ("init_loss_scale", "1e300"), ("seed", "-1"),
        ("start_learning_rate", "1e-300"), ("weight_decay", "1e39"),
    ],
)  # fmt: skip
def test_absurd_numbers_are_refused_with_their_range(flag, value):
    with pytest.raises(UserError, match=f"^--{flag}: .* is not allowed: .*(at most|below|above|at least)"):
        parse(f"--{flag}", value)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("num_workers", "64"), ("max_steps", "10000000"), ("train_batch_size", "4096"), ("lora_rank", "1024"),
        ("ckpt_max_keep", "1000000"), ("ema_decay", "0.999999"), ("init_loss_scale", "16777216"),
        ("max_grad_norm", "1e9"), ("start_learning_rate", "1"), ("image_size", "2048"),
    ],
)  # fmt: skip
def test_usual_values_are_accepted(flag, value):
    assert getattr(parse(f"--{flag}", value), flag) == float(value)
