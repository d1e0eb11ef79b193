"""tools/import_recipe.py: recipes of other projects become the same recipe here, and nothing is dropped in silence."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Optional

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.lora.spec import TARGETS, LoRASpec
from ldm.lora.target_layers import find_target_layers
from ldm.models.stable_diffusion import build_model
from ldm.settings.declare import setting
from ldm.settings.model import load_model_config
from ldm.settings.read import read_settings
from ldm.settings.train import TrainSettings
from ldm.weights.checkpoint import write_checkpoint
from tests.conftest import ROOT
from tools.import_recipe import main
from tools.recipes import (
    diffusers_command,
    kohya,
    kohya_network,
    kohya_tables,
    onetrainer,
    onetrainer_tables,
    page,
    recipe,
    shell,
)
from tools.recipes.read import read_recipe
from tools.recipes.written import settle

SAMPLES = Path(__file__).parent / "recipes"
TRANSFORMER = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
RESIDUAL = ["in_layers.2", "emb_layers.1", "out_layers.3", "skip_connection", "op", "conv"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "mlp.fc1", "mlp.fc2"]
SD1 = "v1-inference.yaml"


def imported(path: Path, tmp_path: Path) -> tuple[TrainSettings, str]:
    """Run the tool, and return what a training reads of its YAML, and the YAML."""
    output = tmp_path / "recipe.yaml"
    output.unlink(missing_ok=True)
    main([str(path), "--output_path", str(output)])
    settings = read_settings(TrainSettings, ["--train_config", str(output)], yaml_flag="train_config")
    return settings, output.read_text(encoding="utf-8")


def of_text(text: str, tmp_path: Path, name: str = "recipe") -> tuple[TrainSettings, str]:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return imported(path, tmp_path)


def listed(text: str, name: str) -> str:
    """Return one of the lists at the end of a YAML."""
    return text.partition(f"# ---- {name} (")[2].partition("# ----")[0]


def differing(settings: TrainSettings) -> dict[str, object]:
    """Return the settings that differ from this project's defaults."""
    default = TrainSettings()
    names = [field.name for field in dataclasses.fields(settings)]
    found = {name: getattr(settings, name) for name in names if getattr(settings, name) != getattr(default, name)}
    del found["train_config"]  # every YAML is one
    return {**found, "model_config": Path(settings.model_config).name} if settings.model_config else found


# What a training reads of each sample, but for the settings that are this project's defaults.
EXPECTED = {
    "sd_scripts_lora.toml": {
        "data_path": "data/style.toml", "output_path": "output/style",
        "pretrained_model_path": "models/v1-5-pruned.safetensors", "model_config": SD1,
        "use_lora": True, "lora_ft_text_encoder": True, "lora_rank": 32, "lora_alpha": 16.0, "lora_dropout": 0.1,
        "lora_targets": [*TRANSFORMER, *RESIDUAL, *TEXT], "loraplus_lr_ratio": 16.0,
        "min_snr_gamma": 5.0, "noise_offset": 0.05, "adaptive_noise_scale": 0.005,
        "sample_prompts": "data/prompts.txt", "sample_every_n_epochs": 2, "sample_at_first": False,
        "sample_sampler": "euler_a",
        "optimizer_args": ["weight_decay=0.1", "betas=0.9,0.99"], "scheduler": "cosine_with_restarts",
        "start_learning_rate": 1e-4, "end_learning_rate": 0.0, "warmup_steps": 100, "lr_scheduler_num_cycles": 3,
        "unet_lr": 1e-4, "text_encoder_lr": 5e-5, "report_to": ["csv", "html", "tensorboard"],
        "epochs": 12, "train_batch_size": 2, "gradient_accumulation_steps": 2, "gradient_checkpointing": True,
        "clip_grad": True, "ckpt_save_interval": 2, "ckpt_max_keep": 3, "seed": 1234,
        "output_name": "style_v1", "save_precision": "fp16",
    },
    "sd_scripts_short.toml": {
        "data_path": "img", "pretrained_model_path": "v2-1_768-ema-pruned.safetensors", "image_size": 768,
        "model_config": "v2-vpred-inference.yaml",
        "use_lora": True, "lora_alpha": 1.0, "lora_targets": TRANSFORMER, "caption_extension": ".caption",
        "start_learning_rate": 2e-6, "max_steps": 1600, "train_batch_size": 1, "clip_grad": True, "precision": "fp32",
    },
    "kohya_ss_gui.json": {
        "data_path": "/workspace/img", "output_path": "/workspace/out",
        "pretrained_model_path": "runwayml/stable-diffusion-v1-5", "model_config": SD1,
        "use_lora": True, "lora_ft_text_encoder": True, "lora_rank": 128, "lora_alpha": 64.0,
        "lora_targets": [*TRANSFORMER, *TEXT], "caption_extension": ".txt", "image_size": 512,
        "shuffle_caption": True, "keep_tokens": 1, "caption_dropout": 0.05,
        "enable_bucket": True, "bucket_no_upscale": True, "huber_scale": 2.0, "min_snr_gamma": 5.0,
        "debiased_estimation_loss": True, "noise_offset": 0.05, "adaptive_noise_scale": 0.0, "ip_noise_gamma": 0.0,
        "sample_prompts": ["a photo of sks person --n blurry --w 512 --h 512", "a drawing of sks person --d 7"],
        "sample_every_n_epochs": 1, "sample_at_first": False, "sample_sampler": "ddim",
        "optimizer_args": ["weight_decay=0.05", "betas=0.9,0.99"], "scheduler": "cosine",
        "start_learning_rate": 1e-4, "end_learning_rate": 0.0, "warmup_steps": 0.1, "unet_lr": 1e-4,
        "text_encoder_lr": 5e-5, "max_timestep": 1000, "train_batch_size": 2, "clip_grad": True,
        "ckpt_max_keep": recipe.KEEPS_ALL, "precision": "fp16", "output_name": "person", "save_precision": "fp16",
        "training_comment": "trigger: sks",
    },
    "kohya_ss_loha.json": {
        "data_path": "img", "pretrained_model_path": "E:\\models\\sd15.safetensors", "model_config": SD1,
        "use_lora": True, "lora_rank": 32, "lora_alpha": 16.0, "lora_targets": TRANSFORMER, "image_size": 512,
        "multires_noise_iterations": 8, "multires_noise_discount": 0.2, "optim": "prodigy",
        "optimizer_args": ["decouple=True", "weight_decay=0.01"], "start_learning_rate": 1.0,
        "scale_weight_norms": 1.0, "max_steps": 800, "train_batch_size": 1, "clip_grad": True, "precision": "fp32",
    },
    "onetrainer_lora.json": {
        "data_path": "data/cats", "output_path": "workspace/run", "pretrained_model_path": "models/sd15.safetensors",
        "model_config": SD1, "use_lora": True, "lora_ft_text_encoder": True, "lora_rank": 16, "lora_alpha": 8.0,
        "lora_targets": [*TRANSFORMER, *TEXT], "num_repeats": 3, "image_size": 512, "shuffle_caption": True,
        "keep_tokens": 2, "enable_bucket": True, "min_snr_gamma": 5.0, "noise_offset": 0.03,
        "sample_prompts": ["a cat on a mat --w 512 --h 512 --d 42 --l 7.0 --s 20"], "sample_every_n_epochs": 2,
        "optim": "prodigy", "optimizer_args": ["use_bias_correction=True", "safeguard_warmup=True", "d_coef=2.0"],
        "betas": [0.9, 0.99], "weight_decay": 0.01, "scheduler": "cosine", "start_learning_rate": 1.0,
        "end_learning_rate": 0.1, "warmup_steps": 0.05, "max_timestep": 900, "epochs": 20,
        "gradient_accumulation_steps": 2, "gradient_checkpointing": True, "clip_grad": True,
        "use_ema": True, "ema_decay": 0.998, "ckpt_save_interval": 250, "step_mode": True,
        "ckpt_max_keep": recipe.KEEPS_ALL, "output_name": "my lora", "save_precision": "fp16",
    },
    "onetrainer_preset.json": {
        "pretrained_model_path": "stable-diffusion-v1-5/stable-diffusion-v1-5", "model_config": SD1,
        "use_lora": True, "lora_ft_text_encoder": True, "lora_rank": 16, "lora_alpha": 1.0,
        "lora_targets": [*TRANSFORMER, *RESIDUAL, "time_embed.0", "time_embed.2", "input_blocks.0.0", *TEXT],
        "image_size": 512, "enable_bucket": True, "start_learning_rate": 3e-4, "warmup_steps": 200, "epochs": 100,
        "gradient_checkpointing": True, "clip_grad": True, "precision": "fp16", "output_name": "lora",
    },
    "diffusers_lora.sh": {
        "data_path": "data/naruto blip", "output_path": "${OUTPUT_DIR}", "pretrained_model_path": "$MODEL_NAME",
        "use_lora": True, "lora_rank": 8, "lora_targets": TRANSFORMER[:4], "caption_column": "caption#2",
        "image_size": 512, "random_flip": True, "min_snr_gamma": 5.0,
        "sample_prompts": ["A naruto with blue eyes. --d 0", "A naruto with blue eyes. --d 1"],
        "sample_every_n_epochs": 1, "sample_at_first": False, "optimizer_args": ["eps=1e-7"], "weight_decay": 1e-4,
        "scheduler": "cosine", "start_learning_rate": 1e-4, "end_learning_rate": 0.0, "max_steps": 15000,
        "train_batch_size": 1, "gradient_accumulation_steps": 4, "clip_grad": True,
        "ckpt_save_interval": 1000, "step_mode": True, "ckpt_max_keep": recipe.KEEPS_ALL, "precision": "fp16",
        "seed": 1337,
    },
    "diffusers_dreambooth.sh": {
        "data_path": "dog", "output_path": "trained", "pretrained_model_path": "models/sd15", "use_lora": True,
        "lora_ft_text_encoder": True, "lora_targets": [*TRANSFORMER[:4], *TEXT[:4]], "image_size": 512,
        "random_crop": True, "with_prior_preservation": True, "instance_prompt": "a photo of sks dog",
        "class_data_dir": "class_dog", "class_prompt": "a photo of dog", "num_class_images": 100,
        "start_learning_rate": 2e-3, "epochs": 1, "clip_grad": True, "max_grad_norm": 0.5,
        "gradient_accumulation_steps": 2, "ckpt_save_interval": 500, "step_mode": True,
        "ckpt_max_keep": recipe.KEEPS_ALL,
    },
    "diffusers_full.sh": {
        "pretrained_model_path": "models/sd21", "image_size": 512, "random_crop": True, "ip_noise_gamma": 0.1,
        "scheduler": "polynomial", "start_learning_rate": 1e-4, "warmup_steps": 500, "epochs": 100,
        "train_batch_size": 16, "clip_grad": True, "use_ema": True, "ckpt_save_interval": 500, "step_mode": True,
        "ckpt_max_keep": recipe.KEEPS_ALL,
    },
}  # fmt: skip


# What settings of later versions change in it.
LATER = {
    "sd_scripts_lora.toml": {"conv_dim": 8, "conv_alpha": 4.0},
    "kohya_ss_loha.json": {"algo": "loha", "use_tucker": True, "scale_weight_norms": None},
}
if "algo" in {field.name for field in dataclasses.fields(TrainSettings)}:
    for _name, _settings in LATER.items():
        EXPECTED[_name] = {key: value for key, value in {**EXPECTED[_name], **_settings}.items() if value is not None}


def names_in(path: Path) -> set[str]:
    """Return every name in a sample, found without the code of the tool."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":

        def names(content: dict, prefix: str = "") -> set[str]:
            found = set()
            for name, value in content.items():
                if isinstance(value, list) and value and isinstance(value[0], dict):
                    value = {str(number): entry for number, entry in enumerate(value)}
                found |= names(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name}
            return found

        return names(json.loads(text))
    if path.suffix == ".toml":
        return set(re.findall(r"^(\w+) =", text, re.MULTILINE)) | set(
            re.findall(r"(conv_\w+|loraplus\w+|down_lr\w+)=", text)
        )
    return set(re.findall(r"--(\w+)", text.partition("accelerate")[2] or text)) | set(re.findall(r"export (\w+)", text))


@pytest.mark.parametrize("name", sorted(path.name for path in SAMPLES.iterdir()))
def test_a_sample_becomes_the_same_recipe_and_every_name_of_it_is_told(name, tmp_path, capsys, monkeypatch):
    for variable in ("MODEL_NAME", "OUTPUT_DIR"):
        monkeypatch.delenv(variable, raising=False)
    settings, text = imported(SAMPLES / name, tmp_path)
    printed = capsys.readouterr().out
    assert differing(settings) == EXPECTED[name]
    made = recipe_of(SAMPLES / name)
    told = {part for entry in made.settings.values() for part in re.split("[ ,]+", entry.theirs)}
    told |= {entry.theirs for entry in made.named}
    ours = {alias for alias in made.known if made.known[alias].name in made.settings}
    for given in names_in(SAMPLES / name):
        if f"the variable {given}" in " ".join(text.replace("#", " ").split()):
            continue
        ends = {given, f"network_args.{given}", f"--{given}"}
        assert ends & (told | ours) or any(name.startswith(f"{given}.") for name in told), (
            f"{given} is neither a setting nor named"
        )
    for entry in made.named:
        assert entry.theirs in text and entry.theirs in printed
    assert "hf_secret" not in text + printed


def recipe_of(path: Path) -> recipe.Recipe:
    made = read_recipe(str(path))
    settle(made)
    return made


def test_every_rule_leads_to_a_setting_or_to_one_of_those_that_are_to_come():
    to_come = set(
        "algo conv_dim conv_alpha factor use_tucker dora_wd rs_lora rank_dropout module_dropout placeholder_token "
        "initializer_token num_vectors learnable_property metadata_thumbnail".split()
    )
    known = set(recipe.Recipe("", {}).known)
    tables = (kohya_tables.SAME, kohya_tables.RULES, kohya_tables.NETWORK_ARGS, onetrainer_tables.RULES,
              onetrainer_tables.CONCEPT_RULES, diffusers_command.SAME, diffusers_command.RULES)  # fmt: skip
    assert {rule.ours for table in tables for rule in table} <= known | to_come
    assert set(onetrainer_tables.DEFAULTS) <= known


# ---- layers


def test_the_layers_of_the_tables_are_those_of_the_groups_here():
    everything = {*recipe.UNET_TRANSFORMER, *recipe.UNET_RESIDUAL, *recipe.TEXT_ENCODER}
    assert everything == set(TARGETS["all"])
    assert {*recipe.UNET_ATTENTION, *recipe.TEXT_ATTENTION} == set(TARGETS["attention"])


def test_each_choice_of_layers_is_found_in_a_model_and_is_the_one_of_the_other_project():
    model = build_model(load_model_config(ROOT / "tests" / "tiny.yaml"))

    def found(targets) -> set[str]:
        unet = any(target not in recipe.TEXT_ENCODER for target in targets)
        text = any(target in recipe.TEXT_ENCODER for target in targets)
        spec = LoRASpec(targets=tuple(targets), unet=unet, text_encoder=text, rank=1)
        return {layer.name for layer, _ in find_target_layers(model, spec)}

    layers = [name for name in (parameter.name for parameter in model.get_parameters()) if name.endswith(".weight")]
    # sd-scripts: every linear layer and 1x1 convolution of the transformers, and of CLIP's attention and MLP.
    transformers = {
        name[:-7]
        for name in layers
        if "diffusion_model" in name and re.search(r"\.(proj_in|proj_out|attn\d\..*|ff\..*)\.weight", name)
    }
    text = {name[:-7] for name in layers if re.search(r"(self_attn\.\w+_proj|mlp\.fc\d)\.weight", name)}
    transformers = {name for name in transformers if "norm" not in name}
    assert transformers and text
    assert found([*recipe.UNET_TRANSFORMER, *recipe.TEXT_ENCODER]) == transformers | text
    assert found(recipe.UNET_TRANSFORMER) == transformers
    assert found([*recipe.UNET_TRANSFORMER, *recipe.UNET_RESIDUAL]) > transformers
    for choice in (*onetrainer_tables.FILTERS.values(), *(unet for unet, _ in kohya_network.PRESETS.values())):
        assert found(choice)
    # OneTrainer's "full" is every linear layer and convolution of the UNet.
    unet = {name[:-7] for name in layers if "diffusion_model" in name and len(shape_of(model, name)) > 1}
    assert found(onetrainer_tables.FILTERS["full"]) == unet


def shape_of(model, name: str) -> tuple[int, ...]:
    return next(parameter.shape for parameter in model.get_parameters() if parameter.name == name)


# ---- what changes its unit, its default or its meaning

NETWORK = 'network_module = "networks.lora"\n'


@pytest.mark.parametrize(
    ("toml", "expected"),
    [
        ("", {"lora_alpha": 1.0, "lora_rank": 4, "start_learning_rate": 2e-6, "max_steps": 1600, "clip_grad": True}),
        ("network_alpha = 0", {"lora_alpha": None}),
        ("network_dim = 8\nnetwork_alpha = 8", {"lora_rank": 8, "lora_alpha": 8.0}),
        ('resolution = "512,512"', {"image_size": 512}),
        ("resolution = 768", {"image_size": 768}),
        ("resolution = [640, 640]", {"image_size": 640}),
        ('resolution = "768,512"', {"image_size": None}),
        ("max_train_epochs = 3\nmax_train_steps = 100", {"epochs": 3, "max_steps": None}),
        ("max_train_steps = 100", {"max_steps": 100}),
        ("epoch = 3", {"max_steps": 1600, "epochs": 10}),
        ('lr_scheduler = "cosine"\nlr_warmup_steps = 0.1', {"warmup_steps": 0.1, "end_learning_rate": 0.0}),
        ('lr_scheduler = "constant"\nlr_warmup_steps = 100', {"warmup_steps": 0.0}),
        ('lr_scheduler = "constant_with_warmup"\nlr_warmup_steps = 9', {"warmup_steps": 9, "scheduler": "constant"}),
        ('lr_scheduler = "polynomial"\nlr_scheduler_power = 2', {"end_learning_rate": 1e-7, "lr_scheduler_power": 2.0}),
        (
            'learning_rate = 1e-4\nlr_scheduler = "cosine_with_min_lr"\nlr_scheduler_min_lr_ratio = 0.1',
            {"scheduler": "cosine", "end_learning_rate": 1e-5},
        ),
        ("max_grad_norm = 0", {"clip_grad": False}),
        ("max_grad_norm = 0.5", {"clip_grad": True, "max_grad_norm": 0.5}),
        ("text_encoder_lr = 0", {"lora_ft_text_encoder": False, "lora_targets": TRANSFORMER, "text_encoder_lr": None}),
        ("text_encoder_lr = [1e-5, 2e-5]", {"lora_ft_text_encoder": True, "text_encoder_lr": 1e-5}),
        ("network_train_text_encoder_only = true", {"lora_ft_unet": False, "lora_targets": TEXT}),
        ("network_train_unet_only = true\ntext_encoder_lr = 1e-5", {"lora_ft_text_encoder": False}),
        ('network_args = ["conv_dim=4", "conv_alpha=1"]', {"lora_targets": [*TRANSFORMER, *RESIDUAL, *TEXT]}),
        ('network_args = ["conv_alpha=1"]', {"lora_targets": [*TRANSFORMER, *TEXT]}),
        ('optimizer_type = "Lion8bit"', {"optim": "lion"}),
        ('optimizer_type = "PagedAdamW"', {"optim": "adamw"}),
        ('optimizer_type = "SGDNesterov"', {"optim": "adamw"}),
        ("use_lion_optimizer = true", {"optim": "lion"}),
        (
            'optimizer_type = "AdaFactor"\nlr_scheduler = "adafactor"\nunet_lr = 1e-4',
            {"optim": "adafactor", "optimizer_args": ["relative_step=True", "scale_parameter=True"], "unet_lr": None},
        ),
        (
            'optimizer_type = "Adafactor"\nunet_lr = 1e-4\n'
            'optimizer_args = ["relative_step=False", "scale_parameter=False"]',
            {"optimizer_args": ["relative_step=False", "scale_parameter=False"], "unet_lr": 1e-4},
        ),
        (
            'optimizer_type = "prodigy"\nlearning_rate = 1\nunet_lr = 0.5\ntext_encoder_lr = 0.5',
            {"optim": "prodigy", "start_learning_rate": 0.5, "unet_lr": None, "text_encoder_lr": None},
        ),
        ('optimizer_type = "prodigy"\nlearning_rate = 1e-4', {"start_learning_rate": 1.0}),
        (
            "save_every_n_steps = 200\nsave_last_n_steps = 1000",
            {"ckpt_save_interval": 200, "step_mode": True, "ckpt_max_keep": 5},
        ),
        ("save_every_n_epochs = 1\nsave_every_n_steps = 200", {"ckpt_save_interval": 1, "step_mode": False}),
        ('mixed_precision = "fp16"', {"precision": "fp16"}),
        ('mixed_precision = "bf16"', {"precision": "auto"}),
        ('train_data_dir = "a"', {"data_path": "a", "caption_extension": ".caption"}),
        ('train_data_dir = "a"\ncaption_extension = ".txt"', {"caption_extension": ".txt"}),
        ('train_data_dir = "a"\ndataset_config = "b.toml"', {"data_path": "b.toml", "caption_extension": None}),
        ("caption_dropout_rate = 0.1\nflip_aug = true", {"caption_dropout": 0.1, "random_flip": True}),
        ("adaptive_noise_scale = 0.1", {"adaptive_noise_scale": None}),
        ("noise_offset = 0.1\nmultires_noise_iterations = 6", {"noise_offset": None}),
        ("zero_terminal_snr = true\nloss_type = 'huber'\nhuber_c = 0.2", {"loss_type": "huber", "huber_c": 0.2}),
        ("bucket_reso_steps = 1", {"bucket_reso_steps": 64}),
    ],
)  # fmt: skip
def test_a_setting_of_sd_scripts_is_the_same_training_here(toml, expected, tmp_path):
    settings, text = of_text(f"{NETWORK}{toml}\n", tmp_path, "a.toml")
    assert {name: getattr(settings, name) for name in expected} == expected
    for name in re.findall(r"^(\w+) =", toml, re.MULTILINE):  # a name of theirs, or ours with the value
        made = recipe_of(tmp_path / "a.toml")
        told = " ".join([*(entry.theirs for entry in made.settings.values()), *(entry.theirs for entry in made.named)])
        assert re.search(rf"\b{name}\b", told), f"{name} is dropped"


def test_what_the_validator_refuses_is_named_with_the_reason(tmp_path):
    toml = 'train_batch_size = "many"\nbucket_reso_steps = 1\nadaptive_noise_scale = 0.1\nloss_type = "x"\nseed = -5\n'
    _, text = of_text(NETWORK + toml, tmp_path, "a.toml")
    refused = listed(text, "no counterpart")
    for line in ("train_batch_size many: refused", "bucket_reso_steps 1: refused", "adaptive_noise_scale 0.1: refused",
                 "loss_type x: refused", "seed -5: refused"):  # fmt: skip
        assert line in refused
    assert "adaptive_noise_scale needs noise_offset" in refused and "at least 8" in refused


def with_settings(**later: tuple[type, object]) -> type:
    """Return TrainSettings with settings that are to come, as far as they are not there yet."""
    names = {field.name for field in dataclasses.fields(TrainSettings)}
    fields = [(name, Optional[kind], setting(default)) for name, (kind, default) in later.items() if name not in names]
    return dataclasses.make_dataclass("Later", fields, bases=(TrainSettings,))


@pytest.mark.parametrize("options", [{"conv_dim": 8, "conv_alpha": 4}, {"algo": "loha"}, {"algo": "lokr", "factor": 8}])
def test_options_of_networks_that_are_not_in_this_version_are_named_and_written_as_soon_as_they_are(
    options, tmp_path, monkeypatch
):
    arguments = ", ".join(f'"{name}={value}"' for name, value in options.items())
    toml = f'network_module = "lycoris.kohya"\nnetwork_dim = 16\nnetwork_alpha = 16\nnetwork_args = [{arguments}]\n'
    path = tmp_path / "a.toml"
    path.write_text(toml, encoding="utf-8")

    later = with_settings(
        conv_dim=(int, None), conv_alpha=(float, None), algo=(str, "lora"), factor=(int, -1), dora_wd=(bool, False)
    )
    names = {field.name for field in dataclasses.fields(TrainSettings)}
    made = recipe_of(path)
    for name, value in options.items():
        if name not in names:
            assert (recipe.NOT_IN_VERSION, f"network_args.{name}", str(value)) in [
                (entry.list, entry.theirs, str(entry.value)) for entry in made.named
            ]
    for module in ("tools.recipes.recipe", "tools.recipes.written"):
        monkeypatch.setattr(f"{module}.TrainSettings", later)
    made = recipe_of(path)
    assert {name: made.settings[name].value for name in options} == options
    assert not [entry for entry in made.named if entry.list == recipe.NOT_IN_VERSION]


def test_the_other_variants_of_onetrainer_and_diffusers(tmp_path):
    def trained(**changes):
        base = {"training_method": "LORA", "model_type": "STABLE_DIFFUSION_21", "learning_rate": 1e-4}
        return of_text(json.dumps({**base, **changes}), tmp_path)

    settings, text = trained(
        text_encoder={"train": False, "learning_rate": 1e-5}, loss_weight_fn="DEBIASED_ESTIMATION", clip_grad_norm=None,
        learning_rate_scheduler="COSINE_WITH_RESTARTS", learning_rate_cycles=2.0, layer_filter="attn1,attn2,ff",
        masked_training=True, peft_type="LOHA", lora_decompose=True,
        concepts=[{"path": "a", "balancing": 2}, {"path": "b"}], gradient_checkpointing="OFF",
    )  # fmt: skip
    assert settings.model_config.endswith("v2-vpred-inference.yaml")
    assert settings.lora_targets == TRANSFORMER[:6] and not settings.lora_ft_text_encoder
    assert settings.debiased_estimation_loss and not settings.clip_grad and settings.lr_scheduler_num_cycles == 2
    assert settings.masked_loss and settings.unmasked_weight == 0.1 and not settings.gradient_checkpointing
    assert settings.data_path is None
    for line in ("concepts.0.path a: of several concepts", "concepts.1.path b", "COSINE_WITH_RESTARTS", "masklabel"):
        assert line in text
    assert "LOHA" in text and "lora_decompose True" in text
    settings, text = trained(
        training_method="FINE_TUNE", mse_strength=0.0, mae_strength=1.0, optimizer={"optimizer": "CAME"}
    )
    assert not settings.use_lora and settings.loss_type == "l1" and "CAME: AdamW is used instead" in text
    settings, text = trained(optimizer={"optimizer": "ADAFACTOR", "eps": 1e-30, "eps2": 1e-3, "scale_parameter": True})
    assert settings.optim == "adafactor" and settings.optimizer_args == ["scale_parameter=True"]

    command = "accelerate launch train_text_to_image_lora.py --pretrained_model_name_or_path=a --train_data_dir b "
    settings, text = of_text(command + "--learning_rate=$RATE --lr_scheduler=linear", tmp_path)
    assert settings.start_learning_rate == 1e-4 and settings.warmup_steps == 500 and settings.epochs == 100
    assert "learning_rate $RATE: refused" in text
    settings, _ = of_text(f"{command} --learning_rate 1e-5 --scale_lr --gradient_accumulation_steps=4", tmp_path)
    assert settings.start_learning_rate == 6.4e-4  # 16 images, 4 times
    settings, text = of_text(
        command.replace("_lora", "") + "--validation_prompts 'a b' \"c d\" --max_grad_norm 0", tmp_path
    )
    assert settings.sample_prompts == ["a b", "c d"] and settings.sample_every_n_epochs == 5 and not settings.clip_grad
    settings, text = of_text(
        "python train_network.py --network_module networks.lora --network_dim 8 --xformers", tmp_path
    )
    assert settings.lora_rank == 8 and settings.lora_alpha == 1.0 and "xformers True" in text


# ---- what is trained otherwise there: the same is written, or the difference is named

OTHERS = ["time_embed.0", "time_embed.2", "input_blocks.0.0", "out.2"]


def network(arguments: str, tmp_path: Path, module: str = "lycoris.kohya", more: str = "") -> tuple[TrainSettings, str]:
    words = ", ".join(f'"{word}"' for word in arguments.split())
    toml = f'network_module = "{module}"\nnetwork_args = [{words}]\n{more}\n'
    settings, text = of_text(toml, tmp_path, "a.toml")
    return settings, one_line(text)


def one_line(text: str) -> str:
    return " ".join(text.replace("#", " ").split())


@pytest.mark.parametrize(
    ("preset", "unet", "text"),
    [
        ("full", [*TRANSFORMER, *RESIDUAL, *OTHERS], TEXT),
        ("full-lin", [*TRANSFORMER, "emb_layers.1", "skip_connection", *OTHERS[:2]], TEXT),
        ("unet-only", [*TRANSFORMER, *RESIDUAL, *OTHERS], []),
        ("unet-convblock-only", [*RESIDUAL, *OTHERS[2:]], []),
        ("unet-transformer-only", TRANSFORMER, []),
    ],
)
def test_a_preset_of_lycoris_trains_all_its_layers_and_no_others(preset, unet, text, tmp_path):
    settings, _ = network(f"preset={preset}", tmp_path)
    assert settings.lora_targets == [*unet, *text] and settings.lora_ft_text_encoder == bool(text)


def test_layers_that_are_narrower_than_the_rank_are_left_out_and_named_because_a_training_refuses_them(tmp_path):
    settings, text = network("conv_dim=40", tmp_path)
    assert not {"input_blocks.0.0", "out.2"} & set(settings.lora_targets) and "out.2 (width 4)" in text
    settings, text = network("", tmp_path, more="network_dim = 16")
    assert "input_blocks.0.0" in settings.lora_targets and "out.2" not in settings.lora_targets
    settings, text = network("algo=lokr", tmp_path, more="network_dim = 16")
    assert "out.2" in settings.lora_targets and "width" not in text


def test_dropouts_that_drop_other_things_are_named(tmp_path):
    settings, text = network("rank_dropout=0.2 module_dropout=0.1", tmp_path, "networks.lora", "network_dropout = 0.1")
    assert (settings.rank_dropout, settings.module_dropout, settings.lora_dropout) == (0.2, 0.1, 0.1)
    assert "multiplied by 1 / (1 - p)" in text and "outputs of the down matrix" in text
    for algo, named in (("loha", False), ("lora", True), ("lora bypass_mode=True", False)):
        settings, text = network(f"algo={algo} rank_dropout=0.2", tmp_path)
        assert settings.rank_dropout == 0.2 and ("outputs of the update are left out" in text) == named
    for algo in ("loha", "lokr"):
        for arguments, more in ((f"algo={algo} dropout=0.2", "network_dropout = 0.5"),
                                (f"algo={algo}", "network_dropout = 0.2")):  # fmt: skip
            settings, text = network(arguments, tmp_path, more=more)
            assert settings.lora_dropout == 0.2 and "down matrix" not in text
            assert f"not implemented for {algo}" in text
    settings, text = of_text(
        json.dumps({"training_method": "LORA", "peft_type": "LOHA", "dropout_probability": 0.1}), tmp_path
    )
    assert settings.lora_dropout == 0.1 and "down matrix" not in text and "numbers of the factors" in one_line(text)


def test_options_of_lycoris_that_do_something_else_are_named(tmp_path):
    for algo in ("loha", "lokr"):
        settings, text = network(f"algo={algo} loraplus_lr_ratio=16", tmp_path)
        assert settings.loraplus_lr_ratio is None and f"with {algo} it does nothing there" in text
    settings, text = network("algo=lora loraplus_lr_ratio=16", tmp_path)
    assert settings.loraplus_lr_ratio == 16
    for algo, named in (("lokr", True), ("loha", False), ("lora", False)):
        settings, text = network(f"algo={algo} rs_lora=True", tmp_path)
        assert settings.rs_lora and ("LoKr of two whole factors" in text) == named
    for name in ("use_tucker", "use_cp", "use_conv_cp"):
        assert network(f"algo=loha {name}=True", tmp_path)[0].use_tucker
    settings, text = network("dora_wd=True algo=loha", tmp_path, "networks.lora")
    assert not settings.dora_wd and settings.algo == "lora" and text.count("LyCORIS alone reads it") == 2


LORA_COMMAND = "accelerate launch train_text_to_image_lora.py --pretrained_model_name_or_path=a --train_data_dir b "


def test_the_first_factors_of_diffusers_are_named_with_the_consequence(tmp_path):
    for rank, consequence in ((4, "7.7 to 15 times smaller here at rank 4: early steps move the weights less"),
                              (128, "2.1 to 4.1 times larger here at rank 128: they move the weights more"),
                              (40, "about as large at rank 40")):  # fmt: skip
        _, text = of_text(f"{LORA_COMMAND} --rank {rank}", tmp_path)
        assert consequence in one_line(listed(text, "another meaning"))


def test_snr_gamma_of_diffusers_is_named_with_velocity_alone(tmp_path):
    for prediction, named in (("v_prediction", True), ("epsilon", False)):
        settings, text = of_text(f"{LORA_COMMAND} --snr_gamma 5 --prediction_type {prediction}", tmp_path)
        assert settings.min_snr_gamma == 5 and ("snr_gamma 5" in listed(text, "another meaning")) == named
    _, text = of_text(f"{LORA_COMMAND} --prediction_type v_prediction", tmp_path)
    assert "snr_gamma" not in listed(text, "another meaning")


def test_pairs_of_instance_and_class_are_as_many_images_in_a_step_here(tmp_path):
    command = (
        "python train_dreambooth_lora.py --instance_data_dir a --instance_prompt x --with_prior_preservation "
        "--class_data_dir c --class_prompt y --train_batch_size 2 --gradient_accumulation_steps 3 "
    )
    settings, text = of_text(f"{command} --max_grad_norm 0.8 --max_train_steps 9", tmp_path)
    assert settings.train_batch_size == 2 and settings.gradient_accumulation_steps == 6
    assert settings.max_grad_norm == 0.4 and settings.max_steps == 9
    assert "max_grad_norm 0.4: half" in one_line(text) and "an epoch there" not in one_line(text)
    settings, text = of_text(f"{command} --max_grad_norm 0 --num_train_epochs 9", tmp_path)
    assert not settings.clip_grad and settings.max_grad_norm == 1 and "an epoch there" in one_line(text)
    settings, _ = of_text(command.replace("--with_prior_preservation", ""), tmp_path)
    assert settings.gradient_accumulation_steps == 3 and settings.max_grad_norm == 1


def test_textual_inversion_of_diffusers_mirrors_squashes_and_has_its_own_templates(tmp_path):
    command = "python textual_inversion.py --placeholder_token='<cat>' --initializer_token=toy --train_data_dir a "
    settings, text = of_text(f"{command} --validation_prompt 'a <cat>' --num_validation_images 1", tmp_path)
    assert settings.random_flip and not settings.random_crop and not settings.clip_grad and settings.max_steps == 5000
    assert settings.num_repeats == 100 and settings.sample_every_n_steps == 100
    named = one_line(listed(text, "another meaning"))
    assert "squashed to a square" in named and "captions are never read" in named
    settings, text = of_text(f"{command} --center_crop", tmp_path)
    assert settings.random_flip and not settings.random_crop and "squashed" not in text


def test_steps_of_onetrainer_are_batches(tmp_path):
    def trained(**changes):
        base = {"training_method": "LORA", "learning_rate": 1e-4, "gradient_accumulation_steps": 4}
        return of_text(json.dumps({**base, **changes}), tmp_path)

    saved = {"save_every": 100, "save_every_unit": "STEP", "sample_after": 50, "sample_after_unit": "STEP"}
    settings, text = trained(learning_rate_warmup_steps=200, samples=[{"prompt": "x"}], **saved)
    assert (settings.warmup_steps, settings.ckpt_save_interval, settings.sample_every_n_steps) == (50, 25, 12)
    for name in ("learning_rate_warmup_steps 200: batches", "save_every 100: batches", "sample_after 50 STEP: batches"):
        assert name in one_line(listed(text, "another meaning"))
    assert trained()[0].warmup_steps == 50  # of 200, which it has where it is left out
    assert trained(learning_rate_warmup_steps=0.1)[0].warmup_steps == 0.1
    assert trained(learning_rate_warmup_steps=0)[0].warmup_steps == 0
    settings, text = trained(learning_rate_warmup_steps=1)
    assert settings.warmup_steps == 0 and "all steps" in text
    saved.update(save_every_unit="EPOCH", sample_after_unit="EPOCH")
    settings, text = trained(samples=[{"prompt": "x"}], **saved)
    assert (settings.ckpt_save_interval, settings.sample_every_n_epochs) == (100, 50)
    settings, text = trained(gradient_accumulation_steps=1, learning_rate_warmup_steps=200)
    assert settings.warmup_steps == 200 and "batches there" not in text


def test_embeddings_of_onetrainer_are_the_token_alone_or_beside_a_lora(tmp_path):
    token = {"placeholder": "<cat>", "initial_embedding_text": "cat", "token_count": 2, "train": True}

    def trained(method, **changes):
        content = {"training_method": method, "model_type": "STABLE_DIFFUSION_15", "learning_rate": 1e-4,
                   "embedding_learning_rate": 5e-3, **changes}  # fmt: skip
        settings, text = of_text(json.dumps(content), tmp_path)
        assert "its embeddings are not trained" not in text
        return settings, one_line(text)

    settings, text = trained("EMBEDDING", embedding=token, unet={"learning_rate": 1e-5})
    assert (settings.placeholder_token, settings.initializer_token, settings.num_vectors) == ("<cat>", "cat", 2)
    assert settings.start_learning_rate == 5e-3 and settings.ti_lr is None and not settings.use_lora
    assert settings.learnable_property is None and settings.unet_lr is None and "begin as * there" in text
    assert "unet.learning_rate 1e-05: that network is not trained" in text
    assert trained("EMBEDDING", embedding=token, embedding_learning_rate=None)[0].start_learning_rate == 1e-4
    settings, text = trained("LORA", additional_embeddings=[token])
    assert settings.use_lora and settings.placeholder_token == "<cat>" and settings.num_vectors == 2
    assert settings.start_learning_rate == 1e-4 and settings.ti_lr == 5e-3
    settings, text = trained("LORA", additional_embeddings=[token, {**token, "train": False, "placeholder": "<b>"}])
    assert settings.placeholder_token == "<cat>" and "additional_embeddings.1.placeholder <b>: one token" in text
    settings, text = trained("LORA", additional_embeddings=[token, token])
    assert settings.placeholder_token is None and settings.ti_lr is None and "there are several" in text
    assert "embedding_learning_rate 0.005: no token is learned" in text
    settings, text = trained("FINE_TUNE", additional_embeddings=[token])
    assert settings.placeholder_token is None and "no token is learned beside a whole UNet" in text
    settings, text = trained("LORA", additional_embeddings=[token], optimizer={"optimizer": "PRODIGY"})
    assert settings.placeholder_token == "<cat>" and settings.ti_lr is None and "Prodigy finds one rate for all" in text


def test_the_tensors_and_not_the_defaults_say_what_a_header_without_its_training_trained(tmp_path):
    header = {name: HEADER[name] for name in ("ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_v2")}
    header["ss_network_args"] = '{"conv_dim": "8"}'
    settings, text = imported(lora_file(tmp_path / "a.safetensors", header, "lora_unet_x", "lora_te_x"), tmp_path)
    assert settings.lora_ft_text_encoder and settings.lora_ft_unet and set(TEXT) < set(settings.lora_targets)
    assert "lora_ft_text_encoder: true" in text and "lora_ft_unet: true" in text
    assert settings.conv_dim == 8 and settings.conv_alpha == 1  # which is conv_dim here where it is left out
    settings, text = imported(lora_file(tmp_path / "b.safetensors", header, "lora_unet_x"), tmp_path)
    assert "lora_ft_text_encoder: false" in text
    header["ss_network_module"] = "lycoris.kohya"
    names = ("lora_unet_x", "lora_unet_conv_in", "lora_unet_time_embedding_linear_1")
    settings, text = imported(lora_file(tmp_path / "c.safetensors", header, *names), tmp_path)
    assert set(OTHERS) & set(settings.lora_targets) == {"time_embed.0", "input_blocks.0.0"} and "width" not in text
    assert settings.conv_alpha == 8  # of LyCORIS, that of the other layers


def test_embeddings_are_read_as_soon_as_this_version_trains_them(tmp_path, monkeypatch):
    later = with_settings(placeholder_token=(str, None), initializer_token=(str, None), num_vectors=(int, 1))
    command = (
        "python textual_inversion.py --placeholder_token='<cat>' --initializer_token=toy --num_vectors 2 --repeats 5"
    )
    (tmp_path / "a.sh").write_text(command, encoding="utf-8")
    embedding = {"placeholder": "<cat>", "initial_embedding_text": "toy", "token_count": 2}
    content = {"training_method": "EMBEDDING", "model_type": "STABLE_DIFFUSION_15", "embedding": embedding}
    (tmp_path / "a.json").write_text(json.dumps(content), encoding="utf-8")
    for name in ("a.sh", "a.json"):
        if "placeholder_token" not in {field.name for field in dataclasses.fields(TrainSettings)}:
            with pytest.raises(UserError, match="version of the project"):
                recipe_of(tmp_path / name)
        with monkeypatch.context() as patch:
            for module in ("tools.recipes.recipe", "tools.recipes.written"):
                patch.setattr(f"{module}.TrainSettings", later)
            written = recipe_of(tmp_path / name).settings
        expected = {"placeholder_token": "<cat>", "initializer_token": "toy", "num_vectors": 2}
        assert {setting: written[setting].value for setting in expected} == expected


# ---- shell scripts


def test_a_shell_script_is_only_taken_apart():
    text = (
        "A=1 B='x y'\n# don't \"stop\necho train_x.py --a # 'train_y.py\nwget x.org && cd d; \\\n  CUDA=0 python -u "
        "dir/train_x.py --a \"b # c\" d#e\\\n  --f=g\\ h --i 'j\nk' --f=2 --neg -1 --n l m >o 2>&1 &\n"
    )
    command = shell.parse(text, "x")
    assert command.script == "train_x.py"
    assert command.flags == {"a": ["b # c", "d#e"], "f": "2", "i": "j\nk", "neg": "-1", "n": ["l", "m"]}
    assert command.repeated == [("f", "g h")] and command.others == []
    assert command.variables == {"A": "1", "B": "x y", "CUDA": "0"}


def test_commands_in_a_script_are_never_run(tmp_path):
    trap = tmp_path / "trap"
    command = "accelerate launch train_text_to_image_lora.py"
    text = (
        f"$(touch {trap}) `touch {trap}`; touch {trap}\n{command} --output_dir='$(touch {trap})' --rank `touch {trap}`"
    )
    settings, yaml = of_text(text, tmp_path)
    assert not trap.exists() and "kept as text" in " ".join(yaml.replace("#", " ").split()) and settings.lora_rank == 4


# ---- a LoRA's header

HEADER = {
    "ss_network_module": "networks.lora", "ss_network_dim": "16", "ss_network_alpha": "8.0",
    "ss_network_args": '{"conv_dim": "16", "conv_alpha": "8"}', "ss_network_dropout": "None",
    "ss_learning_rate": "0.0001", "ss_unet_lr": "0.0001", "ss_text_encoder_lr": "5e-05",
    "ss_optimizer": "bitsandbytes.optim.adamw.AdamW8bit(weight_decay=0.1,betas=(0.9, 0.99))",
    "ss_lr_scheduler": "cosine", "ss_lr_warmup_steps": "50", "ss_max_train_steps": "900", "ss_num_epochs": "3",
    "ss_batch_size_per_device": "2", "ss_gradient_accumulation_steps": "1", "ss_gradient_checkpointing": "True",
    "ss_mixed_precision": "fp16", "ss_full_fp16": "False", "ss_resolution": "(640, 640)", "ss_seed": "7",
    "ss_output_name": "cat",
    "ss_sd_model_name": "base.safetensors", "ss_v2": "False", "ss_clip_skip": "None", "ss_min_snr_gamma": "5.0",
    "ss_debiased_estimation": "True", "ss_max_grad_norm": "1.0", "ss_tag_frequency": '{"a": {"cat": 3}}',
    "ss_base_model_version": "sd_v1", "ss_noise_offset": "None", "ss_new_key": "1", "sshs_model_hash": "00",
    "modelspec.title": "a title",
}  # fmt: skip


def lora_file(path: Path, metadata: dict[str, str], *names: str) -> Path:
    arrays = {f"{name}.lora_down.weight": np.zeros((1, 2), np.float32) for name in names}
    write_checkpoint(path, arrays, metadata)
    return path


def test_the_header_of_a_lora_becomes_its_recipe(tmp_path):
    path = lora_file(tmp_path / "lora.safetensors", HEADER, "lora_unet_mid_block", "lora_te_text_model")
    settings, text = imported(path, tmp_path)
    assert differing(settings) == {
        "pretrained_model_path": "base.safetensors", "model_config": SD1,
        "use_lora": True, "lora_ft_text_encoder": True, "lora_rank": 16, "lora_alpha": 8.0,
        "lora_targets": [*TRANSFORMER, *RESIDUAL, *TEXT], "image_size": 640, "min_snr_gamma": 5.0,
        "debiased_estimation_loss": True, "optimizer_args": ["weight_decay=0.1", "betas=(0.9, 0.99)"],
        "scheduler": "cosine", "start_learning_rate": 1e-4, "end_learning_rate": 0.0, "warmup_steps": 50,
        "unet_lr": 1e-4, "text_encoder_lr": 5e-5, "max_steps": 900, "train_batch_size": 2,
        "gradient_checkpointing": True, "clip_grad": True, "precision": "fp16", "seed": 7, "output_name": "cat",
    }  # fmt: skip
    made = recipe_of(path)
    told = {entry.theirs for entry in (*made.settings.values(), *made.named)}
    told |= {"ss_network_args", "ss_network_dim"} if "ss_network_args.conv_dim" in told else set()
    assert set(HEADER) <= told


def test_the_tensors_of_a_lora_show_which_networks_were_trained(tmp_path):
    header = {name: value for name, value in HEADER.items() if name != "ss_text_encoder_lr"}
    settings, _ = imported(lora_file(tmp_path / "a.safetensors", header, "lora_unet_x"), tmp_path)
    assert not settings.lora_ft_text_encoder and not set(TEXT) & set(settings.lora_targets)


def test_a_header_of_this_project_is_read_as_well(tmp_path):
    header = {name: value for name, value in HEADER.items() if name != "ss_v2"}  # of an architecture of its own
    header["ss_optimizer"] = "AdamW(betas=[0.9, 0.98],weight_decay=0.02)"
    settings, _ = imported(lora_file(tmp_path / "a.safetensors", header, "lora_unet_x"), tmp_path)
    assert settings.model_config is None and settings.optimizer_args == ["betas=[0.9, 0.98]", "weight_decay=0.02"]


def test_a_header_without_its_training_gives_the_network_and_no_defaults(tmp_path):
    header = {name: HEADER[name] for name in ("ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_v2")}
    settings, text = imported(lora_file(tmp_path / "a.safetensors", header, "lora_unet_x"), tmp_path)
    assert set(differing(settings)) == {
        "model_config",
        "use_lora",
        "lora_rank",
        "lora_alpha",
        "lora_targets",
    }
    assert "no_metadata" in text


def test_the_header_of_a_lycoris_network_becomes_its_recipe(tmp_path):
    # As in a published LoKr of 2023, which sd-scripts and LyCORIS of that time wrote.
    lycoris = {
        "ss_network_module": "lycoris.kohya", "ss_network_dim": "4", "ss_network_alpha": "4.0",
        "ss_network_args": '{"conv_rank": "4", "conv_alpha": "4", "algo": "lokr"}', "ss_unet_lr": "0.0003",
        "ss_text_encoder_lr": "0.00015", "ss_optimizer": "lion_pytorch.lion_pytorch.Lion(weight_decay=0.1)",
        "ss_lr_scheduler": "cosine_with_restarts", "ss_lr_warmup_steps": "301", "ss_max_train_steps": "3010",
    }  # fmt: skip
    path = lora_file(tmp_path / "a.safetensors", {**HEADER, **lycoris}, "lora_unet_x", "lora_te_x")
    settings, text = imported(path, tmp_path)
    assert settings.optim == "lion" and settings.optimizer_args == ["weight_decay=0.1"]
    assert settings.max_steps == 3010 and settings.scheduler == "cosine_with_restarts" and settings.warmup_steps == 301
    assert settings.lora_targets == [*TRANSFORMER, *RESIDUAL, *TEXT] and settings.text_encoder_lr == 1.5e-4
    assert "lokr" in text and "ss_network_args.conv_rank 4" in text


# ---- bad files

BINARY = bytes(range(256)) * 8
BAD = {
    "empty.toml": (b"", "is empty"),
    "spaces.txt": (b" \n\n", "is empty"),
    "bad.toml": (b"network_dim = = 3", "not valid TOML"),
    "prose.txt": (b"Train it for ten epochs, please.", "no recipe"),
    "cut.json": (b'{"network_dim": 3, "LoRA', "not valid JSON"),
    "list.json": (b"[1, 2]", "list of JSON"),
    "twice.json": (b'{"network_dim": 3, "network_dim": 4}', "twice"),
    "deep.json": (b'{"a": ' * 3000 + b"1" + b"}" * 3000, "JSON"),
    "other.json": (b'{"model": "x", "steps": 3}', "kohya_ss or OneTrainer"),
    "peft.json": (b'{"r": 8, "target_modules": ["to_q"], "peft_type": "LORA"}', "PEFT"),
    "nested.json": (b'{"network_dim": {"a": 1}}', "section"),
    "other.toml": (b"[tool.ruff]\nline-length = 120", "no recipe of sd-scripts"),
    "sections.toml": (b"[a]\nnetwork_dim = 1\n[b]\nnetwork_dim = 2", "twice"),
    "data.toml": (b"[general]\n[[datasets]]\n", "--data_path"),
    "sdxl.json": (b'{"LoRA_type": "Standard", "sdxl": true, "network_dim": 4}', "SDXL"),
    "flux.json": (b'{"LoRA_type": "Flux1", "network_dim": 4}', "Flux"),
    "one_xl.json": (b'{"training_method": "LORA", "model_type": "STABLE_DIFFUSION_XL_10_BASE"}', "STABLE_DIFFUSION_XL"),
    "one_vae.json": (b'{"training_method": "FINE_TUNE_VAE", "model_type": "STABLE_DIFFUSION_15"}', "FINE_TUNE_VAE"),
    "sdxl.sh": (b"accelerate launch train_text_to_image_lora_sdxl.py --rank 4", "not known"),
    "two.sh": (b"python train_dreambooth.py --a 1\npython train_dreambooth.py --a 2", "2 training commands"),
    "quote.sh": (b"python train_dreambooth.py --a 'b", "quotes"),
    "none.sh": (b"pip install x --upgrade\ncd train.py\n", "no"),
    "echo.sh": (b"echo train_dreambooth.py --a 1", "no command"),
    "mindone.yaml": (b"use_lora: True\nlora_rank: 4\nstart_learning_rate: 1e-4\n", "--train_config"),
    "toolkit.yaml": (b"job: extension\nconfig:\n  name: x\n", "ai-toolkit"),
    "other.yaml": (b"name: x\non: push\n", "no YAML of this project"),
    "junk.bin": (BINARY, "text"),
    "utf16.toml": ("network_dim = 3".encode("utf-16"), "UTF-16"),
    "zero.toml": (b"network_dim = 3\0", "zero byte"),
    "huge.toml": (b"# " + b"x" * (2 << 20), "bytes"),
    "huge.json": (b'{"network_dim": "' + b"x" * (5 << 20) + b'"}', "bytes"),
    "huge.sh": (b"python train_dreambooth.py --a " + b"x" * 300_000, "characters"),
    "many.json": (json.dumps({"network_dim": 4, **{f"a{i}": i for i in range(20_000)}}).encode(), "settings"),
    "words.sh": (b"python " + b"train" * 40_000 + b" --a train.p y", "no recipe"),
    "cut.safetensors": (b"\x40\0\0\0\0\0\0\0{\"a\":", "cut-off"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_an_error_that_names_it_and_the_way_out_and_writes_nothing(name, tmp_path):
    content, expected = BAD[name]
    path, output = tmp_path / name, tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(expected)) as raised:
        main([str(path), "--output_path", str(output)])
    assert name in str(raised.value) and not output.exists()


def test_a_lora_of_another_project_or_model_is_an_error(tmp_path):
    for metadata, expected in (({"format": "pt"}, "no ss_ metadata"),
                               ({**HEADER, "ss_base_model_version": "sdxl_base_v1-0"}, "sdxl_base")):  # fmt: skip
        path = lora_file(tmp_path / "a.safetensors", metadata, "lora_unet_x")
        with pytest.raises(UserError, match=expected):
            main([str(path), "--output_path", str(tmp_path / "b.yaml")])


@pytest.mark.parametrize(
    "value",
    [
        "{}",
        '{"a": ' * 500 + "1" + "}" * 500,
        "[]",
        "[[1]]",
        '{"a": 1}',
        "true",
        "null",
        '"\\u0000"',
        "1e400",
        "-1",
        '"$(x)"',
        '"' + "9" * 400 + '"',
    ],
)
def test_wrong_types_are_named_and_end_no_run(value, tmp_path):
    # One at a time, each setting that the two JSON formats give meets a value of any kind.
    for sample, read in (("kohya_ss_gui.json", kohya.read), ("onetrainer_lora.json", onetrainer.read)):
        content = json.loads((SAMPLES / sample).read_text(encoding="utf-8"))
        for name in content:
            changed = {**content, name: json.loads(value)}
            try:
                made = read(changed, True) if read is kohya.read else read(changed)
            except UserError:
                continue
            assert made.left == {}


def test_an_existing_file_is_not_replaced(tmp_path):
    (tmp_path / "recipe.yaml").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="exists"):
        main([str(SAMPLES / "sd_scripts_short.toml"), "--output_path", str(tmp_path / "recipe.yaml")])
    assert (tmp_path / "recipe.yaml").read_text(encoding="utf-8") == "mine"


def test_control_characters_of_a_recipe_end_no_comment(tmp_path):
    toml = NETWORK + 'unknown = "a\\nlora_rank: 99\\u001b[31m\\u2028lora_rank: 98"\n"odd\\nname: 1" = 5\n'
    settings, text = of_text(toml, tmp_path, "a.toml")
    assert settings.lora_rank == 4 and "\x1b" not in text and "\u2028" not in text


def test_the_page_has_the_tables_of_the_tool():
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.with_tables(text) == text, "run python -m tools.recipes.page"
