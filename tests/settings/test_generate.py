"""The settings of text_to_image.py: the published command reads as it is, and wrong settings are named."""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest

from ldm.errors import UserError
from ldm.settings.generate import GenerateSettings
from ldm.settings.read import read_settings
from ldm.settings.versions import VERSIONS


def parse(command):
    return read_settings(GenerateSettings, shlex.split(command))


def test_the_published_command_reads_as_it_is():
    settings = parse(
        '--version "2.0" --config "configs/v2-inference.yaml" --n_iter 1 --n_samples 2 --scale 9.0 --W 512 --H 512 '
        "--use_lora True --lora_ft_text_encoder False --lora_ckpt_path output/lora_pokemon/txt2img/ckpt/rank_0/"
        "sd-72.ckpt --dpm_solver --sampling_steps 20 --data_path datasets/pokemon_blip/test/prompts.txt"
    )
    assert settings == GenerateSettings(
        version="2.0",
        config="configs/v2-inference.yaml",
        n_iter=1,
        n_samples=2,
        scale=9.0,
        W=512,
        H=512,
        use_lora=True,
        lora_ft_text_encoder=False,
        lora_ckpt_path=["output/lora_pokemon/txt2img/ckpt/rank_0/sd-72.ckpt"],
        dpm_solver=True,
        sampling_steps=20,
        data_path="datasets/pokemon_blip/test/prompts.txt",
    )
    assert settings.sampler == "dpm_solver"


def test_every_published_flag_is_known():
    settings = parse(
        '--ms_mode 0 --device_target "CPU" --data_path p.txt --negative_data_path n.txt --version 2.1-v '
        "--output_path out --skip_grid --skip_save --sampling_steps 50 --ddim --ddim_eta 0.5 --n_iter 2 --n_samples 4 "
        "--H 768 --W 768 --scale 9 --config c.yaml --use_lora False --lora_ft_unet True --lora_rank 4 "
        "--ckpt_path m.ckpt --lora_scale 0.8 --seed 1 --log_level logging.WARNING"
    )
    assert settings.log_level == "WARNING" and settings.mode == 0 and settings.skip_grid and settings.skip_save
    assert settings.sampler == "ddim" and settings.lora_ft_unet is True and settings.lora_ft_text_encoder is None


def test_a_yaml_file_holds_settings_and_flags_win_over_it(tmp_path):
    path = tmp_path / "generate.yaml"
    path.write_text("prompt: a cat\nsampling_steps: 10\nlora_ckpt_path: [a.ckpt, 'b.ckpt:0.5']\nscale: 3\n")
    settings = read_settings(
        GenerateSettings, ["--generate_config", str(path), "--scale", "5"], yaml_flag="generate_config"
    )
    assert (settings.prompt, settings.sampling_steps, settings.scale) == ("a cat", 10, 5.0)
    assert settings.lora_ckpt_path == ["a.ckpt", "b.ckpt:0.5"]


def test_dpm_solver_plus_plus_is_the_default():
    assert parse("--prompt x").sampler == "dpm_solver_pp"


@pytest.mark.parametrize(
    ("flags", "sampler", "schedule", "noise_share"),
    [
        ("--plms", "plms", "as_trained", None),
        ("--uni_pc", "uni_pc", "as_trained", None),
        ("--dpm_solver", "dpm_solver", "as_trained", None),
        ("--ddim", "ddim", "as_trained", 0.0),
        ("--ddim --sampler ddim --ddim_eta 0.5", "ddim", "as_trained", 0.5),
        ("--sampler euler_a --eta 0.3 --schedule karras", "euler_a", "karras", 0.3),
        ("--sampler dpmpp_2m_sde", "dpmpp_2m_sde", "as_trained", None),
    ],
)
def test_a_sampler_is_chosen_by_its_name_or_its_published_flag(flags, sampler, schedule, noise_share):
    settings = parse(f"--prompt x {flags}")
    assert (settings.sampler, settings.schedule, settings.noise_share) == (sampler, schedule, noise_share)
    assert replace(settings).sampler == sampler  # a copy is checked again


def test_a_prompt_may_be_the_word_none():
    assert parse("--prompt none").prompt == "none"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("", "nothing to generate.*--prompt.*--data_path"),
        ('--prompt ""', "nothing to generate"),
        ("--prompt x --data_path p.txt", "--prompt and --data_path"),
        ("--prompt x --negative_prompt y --negative_data_path n.txt", "--negative_prompt and --negative_data_path"),
        ("--prompt x --dpm_solver --ddim", "--dpm_solver and --ddim"),
        ("--prompt x --plms --uni_pc", "--plms and --uni_pc are both given"),
        ("--prompt x --sampler euler --ddim", "--sampler euler and --ddim are both given"),
        ("--prompt x --sampler k_euler_b", "sampler.*k_euler_b.*dpm_solver_pp.*euler_a"),
        ("--prompt x --schedule cosine", "schedule.*cosine.*as_trained.*karras"),
        ("--prompt x --eta 0.5", "eta 0.5 has no effect on dpm_solver_pp.*euler_a.*--ddim_eta"),
        ("--prompt x --ddim --eta 0.5", "no effect on ddim"),
        ("--prompt x --sampler euler_a --eta 1.5", "eta.*at most 1"),
        ("--prompt x --sampler euler_a --ddim_eta 0.5", "add --ddim"),
        ("--prompt x --ddim_eta 0.5", "add --ddim"),
        ("--prompt x --ddim --ddim_eta 1.5", "ddim_eta.*at most 1"),
        ("--prompt x --ddim --ddim_eta -1", "ddim_eta.*at least 0"),
        ("--prompt x --use_lora", "add --lora_ckpt_path"),
        ("--prompt x --use_lora True", "add --lora_ckpt_path"),
        ("--prompt x --n_samples 0", "n_samples.*at least 1"),
        ("--prompt x --n_iter -3", "n_iter.*at least 1"),
        ("--prompt x --n_iter 1.5", "n_iter"),
        ("--prompt x --W 0", "W.*at least 1"),
        ("--prompt x --H -64", "H.*at least 1"),
        ("--prompt x --H big", "H"),
        ("--prompt x --sampling_steps 0", "sampling_steps.*at least 1"),
        ("--prompt x --scale -1", "scale.*at least 0"),
        ("--prompt x --scale nan", "scale"),
        ("--prompt x --scale inf", "scale"),
        ("--prompt x --lora_scale much", "lora_scale"),
        ("--prompt x --lora_rank 0", "lora_rank.*at least 1"),
        ("--prompt x --lora_block_weight MID=1", "did you mean --lora_block_weights"),
        ("--prompt x --seed -1", "seed.*at least 0"),
        ("--prompt x --seed 4294967296", "seed.*at most"),
        ("--prompt x --batch_size 0", "batch_size.*at least 1"),
        ("--prompt x --batch_size 1000000000", "batch_size.*at most 10000"),
        ("--prompt x --H 1000000", "H.*at most 8192"),
        ("--prompt x --n_iter 1000000000", "n_iter.*at most 1000000"),
        ("--prompt x --guidance_rescale 1.5", "guidance_rescale.*at most 1"),
        ("--prompt x --sampling_steps 1000000000", "sampling_steps.*at most 100000"),
        ("--prompt x --scale 1e300", "scale.*at most 1000"),
        ("--prompt x --lora_scale -1e39", "lora_scale.*at least -1000"),
        ("--prompt x --lora_rank 10000000", "lora_rank.*at most 4096"),
        ("--prompt x --version 3.0", "version.*2.0"),
        ("--prompt x --device_target GPU", "device_target.*CPU"),
        ("--prompt x --mode 2", "mode"),
        ("--prompt x --ms_mode 7", "ms_mode"),
        ("--prompt x --precision fp8", "precision.*fp16"),
        ("--prompt x --log_level loud", "log_level"),
        ("--prompt x --sampling_step 20", "did you mean --sampling_steps"),
        ("--prompt x --lora_ckpt_path", "lora_ckpt_path needs a value"),
        ("--prompt x --use_lora perhaps", "use_lora"),
        ("a cat", '"a" does not belong'),
    ],
)
def test_invalid_settings_are_named(command, words):
    with pytest.raises(UserError, match=words):
        parse(command)


def test_the_published_file_names():
    assert {version: published.checkpoint for version, published in VERSIONS.items()} == {
        "1.5": "models/sd_v1.5-d0ab7146.ckpt",
        "2.0": "models/sd_v2_base-57526ee4.ckpt",
        "2.0-v": "models/sd_v2_768_v-e12e3a9b.ckpt",
        "2.1": "models/sd_v2-1_base-7c8d09ce.ckpt",
        "2.1-v": "models/sd_v2-1_768_v-061732d1.ckpt",
        "nano": "models/nano/nano.safetensors",
    }
