"""The plan of a run of text_to_image.py: its prompts, model, checkpoint and LoRAs, and errors for what does not fit."""

from __future__ import annotations

import codecs
import shlex
from pathlib import Path

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.generation.image_metadata import lora_metadata
from ldm.generation.plan import LoRAFile, plan_generation
from ldm.settings.block_weights import BlockWeights
from ldm.settings.generate import GenerateSettings
from ldm.settings.read import read_settings
from ldm.settings.versions import VERSIONS
from ldm.weights.checkpoint import write_checkpoint

TINY = Path(__file__).parents[1] / "tiny.yaml"
codecs.lookup("utf-8-sig")  # loaded now: an unprivileged test may not be allowed to read Python's own files


def parse(command):
    return read_settings(GenerateSettings, shlex.split(command))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with prompts, a checkpoint of no known width and a LoRA file. Planning opens neither."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na cow\n", encoding="utf-8")
    write_checkpoint(tmp_path / "base.safetensors", {"x.attn2.to_k.weight": np.zeros((8, 32), np.float32)})
    (tmp_path / "lora.ckpt").write_bytes(b"lora")
    return tmp_path


def planned(command):
    """Returns the plan for a command with the tiny model."""
    return plan_generation(parse(f"--config {TINY} --ckpt_path base.safetensors {command}"))


# ---- prompts ---------------------------------------------------------------------------------------------------------


def test_all_images_of_a_prompt_are_consecutive(folder):
    plan = planned("--data_path prompts.txt --n_iter 2 --n_samples 1 --negative_prompt blurry")
    assert plan.prompts == ["a cat", "a cat", "a dog", "a dog", "a cow", "a cow"]
    assert plan.negative_prompts == ["blurry"] * 6 and plan.images_per_prompt == 2


def test_there_is_one_negative_prompt_for_all_prompts_or_one_for_each(folder, caplog):
    caplog.set_level("INFO")
    (folder / "one.txt").write_text("blurry\n\n")
    (folder / "three.txt").write_text("blurry\n\ngrey\n")
    assert planned("--data_path prompts.txt --negative_data_path one.txt").negative_prompts == ["blurry"] * 3
    assert "negative_data_path one.txt: its only line is for all 3 prompts" in caplog.text
    assert planned("--data_path prompts.txt --negative_data_path three.txt").negative_prompts == ["blurry", "", "grey"]


@pytest.mark.parametrize("flag", ["data_path", "negative_data_path"])
def test_the_setting_of_a_file_without_prompts_is_named(folder, flag):
    (folder / "p.txt").touch()
    with pytest.raises(UserError, match=f"{flag} p.txt is empty"):
        planned(f"{'--prompt x' if flag == 'negative_data_path' else ''} --{flag} p.txt")


def test_negative_prompts_that_do_not_pair_are_counted(folder):
    (folder / "two.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match="two.txt has 2 negative prompts for 3 prompts"):
        planned("--data_path prompts.txt --negative_data_path two.txt")


def test_more_images_than_a_folder_holds_are_refused(folder):
    with pytest.raises(UserError, match="n_samples 1000000"):
        planned("--data_path prompts.txt --n_samples 1000000")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--prompt", "a \udcff cat"], r"--prompt is not UTF-8 text \(character 3"),
        (["--prompt", "x", "--negative_prompt", "\udce9"], r"--negative_prompt is not UTF-8 text \(character 1"),
    ],
)
def test_prompts_that_are_not_utf_8_are_named(folder, flags, words):
    """Python decodes such bytes to lone surrogates, which cannot be written to a file."""
    config = read_settings(GenerateSettings, [*flags, "--config", str(TINY), "--ckpt_path", "base.safetensors"])
    with pytest.raises(UserError, match=words) as error:
        plan_generation(config)
    str(error.value).encode("utf-8")


# ---- models ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(folder, monkeypatch):
    """The project's folder without any checkpoint in models/."""
    monkeypatch.setattr("ldm.generation.model_choice.ROOT", folder)
    monkeypatch.setattr("ldm.files.paths.ROOT", folder)
    (folder / "configs").symlink_to(TINY.parents[1] / "configs")
    return folder


@pytest.mark.parametrize("version", [version for version in VERSIONS if version != "nano"])
def test_a_version_names_its_published_checkpoint_where_it_is_missing(checkout, version):
    published = VERSIONS[version].checkpoint
    words = f"{published}.* does not exist: give --ckpt_path .*convert_weights.py .*--target {published}$"
    with pytest.raises(UserError, match=words):
        plan_generation(parse(f"--prompt x --version {version}"))


def test_nano_is_drawn_where_neither_version_nor_checkpoint_is_given(checkout):
    with pytest.raises(UserError, match="models/nano/nano.safetensors.*git checkout"):
        plan_generation(parse("--prompt x"))
    (checkout / "models" / "nano").mkdir(parents=True)
    (checkout / "models" / "nano" / "nano.safetensors").write_bytes(b"")
    plan = plan_generation(parse("--prompt x"))
    assert plan.version == "nano" and plan.config.architecture == "nano" and plan.sampling.guidance_scale == 4.0


@pytest.mark.parametrize(
    ("version", "architecture", "prediction_type", "size", "scale"),
    [
        ("1.5", "sd1", "epsilon", 512, 7.5),
        ("2.0", "sd2", "epsilon", 512, 9.0),
        ("2.0-v", "sd2", "v_prediction", 768, 9.0),
        ("2.1", "sd2", "epsilon", 512, 9.0),
        ("2.1-v", "sd2", "v_prediction", 768, 9.0),
    ],
)
def test_a_version_decides_model_and_guidance_scale(checkout, version, architecture, prediction_type, size, scale):
    plan = plan_generation(parse(f"--prompt x --version {version} --ckpt_path base.safetensors"))
    assert (plan.config.architecture, plan.config.prediction_type) == (architecture, prediction_type)
    assert (plan.config.image_size, plan.sampling.guidance_scale) == (size, scale)


def test_the_guidance_rescale_is_left_to_the_loras_unless_it_is_given(folder):
    (folder / "base.safetensors").write_bytes(b"")
    for flags, expected in (("", None), (" --guidance_rescale 0", 0.0), (" --guidance_rescale 0.5", 0.5)):
        plan = plan_generation(parse(f"--prompt x --version 1.5 --ckpt_path base.safetensors{flags}"))
        assert plan.sampling.guidance_rescale == expected


def test_a_checkpoint_with_a_published_file_name_needs_no_version(folder):
    (folder / "sd_v2-1_768_v-061732d1.ckpt").write_bytes(b"")
    assert plan_generation(parse("--prompt x --ckpt_path sd_v2-1_768_v-061732d1.ckpt")).version == "2.1-v"


def write_base_model(path, width, metadata=None):
    """Write a checkpoint whose UNet takes text embeddings of a width."""
    arrays = {"model.diffusion_model.a.attn2.to_k.weight": np.zeros((8, width), np.float32)}
    for part in ("first_stage_model.", "cond_stage_model.transformer.text_model."):
        arrays[part + "a.weight"] = np.zeros((1,), np.float32)
    write_checkpoint(path, arrays, metadata)


def test_a_checkpoint_is_detected_by_its_shapes(folder):
    write_base_model(folder / "mine.safetensors", 768)
    assert plan_generation(parse("--prompt x --ckpt_path mine.safetensors")).version == "1.5"


@pytest.mark.parametrize(
    ("architecture", "prediction_type", "width", "version"),
    [
        ("nano", "v_prediction", 96, "nano"),
        ("sd1", "epsilon", 768, "1.5"),
        ("sd2", "epsilon", 1024, "2.0"),
        ("sd2", "v_prediction", 1024, "2.0-v"),
        (None, "v_prediction", 1024, "2.0-v"),
        ("stable-diffusion-v2", "v", 768, "1.5"),  # metadata of another project, the shapes decide
    ],
)
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_checkpoint_is_detected_by_its_metadata(folder, suffix, architecture, prediction_type, width, version):
    metadata = {"architecture": architecture, "prediction_type": prediction_type, "step": "5"}
    metadata = {key: text for key, text in metadata.items() if text is not None}
    write_base_model(folder / f"mine{suffix}", width, metadata)
    plan = plan_generation(parse(f"--prompt x --ckpt_path mine{suffix}"))
    assert plan.version == version
    if prediction_type != "v":
        assert plan.config.prediction_type == prediction_type


@pytest.mark.parametrize(
    "metadata", [{"architecture": "sd2"}, {"architecture": "custom", "prediction_type": "epsilon"}]
)
def test_a_checkpoint_with_incomplete_metadata_needs_a_version(folder, metadata):
    write_base_model(folder / "mine.safetensors", 1024, metadata)
    with pytest.raises(UserError, match=f"It says architecture {metadata['architecture']}.*--version.*--config"):
        plan_generation(parse("--prompt x --ckpt_path mine.safetensors"))


@pytest.mark.parametrize("width", [1024, 32])
def test_a_checkpoint_of_ambiguous_shapes_needs_a_version(folder, width):
    write_base_model(folder / "mine.safetensors", width)
    with pytest.raises(UserError, match="which model is mine.safetensors.*--version.*--config"):
        plan_generation(parse("--prompt x --ckpt_path mine.safetensors"))


@pytest.mark.parametrize(
    ("version", "config", "words"),
    [
        ("2.0-v", "configs/v2-inference.yaml", "prediction_type epsilon, version 2.0-v has v_prediction"),
        ("2.0", "configs/v2-vpred-inference.yaml", "prediction_type v_prediction, version 2.0 has epsilon"),
        ("1.5", "configs/v2-inference.yaml", "architecture sd2, version 1.5 has sd1"),
    ],
)
def test_a_yaml_of_another_model_than_the_versions_is_refused(folder, version, config, words):
    with pytest.raises(UserError, match=words):
        plan_generation(parse(f"--prompt x --version {version} --config {config} --ckpt_path base.safetensors"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--ckpt_path none.ckpt", "ckpt_path none.ckpt does not exist"),
        ("--ckpt_path base.safetensors --config none.yaml", "none.yaml"),
        ("--ckpt_path base.safetensors --config prompts.txt", "prompts.txt"),
        ("--ckpt_path prompts.txt", "prompts.txt is"),
        ("--ckpt_path .", "folder"),
        ("--unet_ckpt_path none.ckpt --version 1.5 --ckpt_path base.safetensors", "unet_ckpt_path none.ckpt does not"),
    ],
)
def test_missing_or_unsuitable_model_files_are_named(folder, flags, words):
    with pytest.raises(UserError, match=words):
        plan_generation(parse(f"--prompt x {flags}"))


# ---- LoRA files ------------------------------------------------------------------------------------------------------


def test_each_lora_has_its_strength_times_lora_scale(folder):
    (folder / "b.ckpt").write_bytes(b"")
    plan = planned("--prompt x --lora_ckpt_path lora.ckpt b.ckpt:0.7 b.ckpt:0.7:-2 --lora_scale 0.5")
    assert plan.loras == [
        LoRAFile(Path("lora.ckpt"), 0.5, 0.5),
        LoRAFile(Path("b.ckpt"), 0.35, 0.35),
        LoRAFile(Path("b.ckpt"), 0.35, -1.0),
    ]


@pytest.mark.parametrize(
    "flags, ranges",
    [
        ("", [(None, None), (None, None)]),
        ("--lora_start 0.3", [(0.3, None), (0.3, None)]),
        ("--lora_start 0.3 0 --lora_end 1 0.5", [(0.3, 1.0), (0.0, 0.5)]),
    ],
)
def test_start_and_end_are_for_all_loras_or_for_each(folder, flags, ranges):
    (folder / "b.ckpt").write_bytes(b"")
    plan = planned(f"--prompt x --lora_ckpt_path lora.ckpt b.ckpt {flags}")
    assert [(file.start, file.end) for file in plan.loras] == ranges


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--lora_start 0.1 0.2", "lora_start has 2 numbers for 1 LoRAs"),
        ("--lora_end 0.1 0.2 0.3", "lora_end has 3 numbers"),
        ("--lora_start 0.5 --lora_end 0.5", "lora_start 0.5 is not below lora_end 0.5: lora.ckpt"),
        ("--lora_start 1", "lora_start.*below 1"),
        ("--lora_start -0.1", "lora_start.*at least 0"),
        ("--lora_end 0", "lora_end.*above 0"),
        ("--lora_end 1.5", "lora_end.*at most 1"),
        ("--lora_start early", "lora_start.*number"),
    ],
)
def test_a_range_that_is_none_is_refused(folder, flags, words):
    with pytest.raises(UserError, match=words):
        plan_generation(parse(f"--prompt x --lora_ckpt_path lora.ckpt {flags}"))


@pytest.mark.parametrize(
    "flags, blocks",
    [
        ("", [None, None]),
        ("--lora_block_weights MID=0.5", ["MID=0.5", "MID=0.5"]),
        ("--lora_block_weights 'mid=0.5, OUT*=0' BASE=0", ["MID=0.5,OUT*=0", "BASE=0"]),
    ],
)
def test_block_weights_are_for_all_loras_or_for_each(folder, flags, blocks):
    (folder / "b.ckpt").write_bytes(b"")
    plan = planned(f"--prompt x --lora_ckpt_path lora.ckpt b.ckpt:0.5 {flags}")
    assert [file.blocks and file.blocks.text for file in plan.loras] == blocks
    assert [file.blocks for file in plan.loras] == [text and BlockWeights.parse(text) for text in blocks]
    assert [file.strength for file in plan.loras] == [1.0, 0.5]


@pytest.mark.parametrize("text", ["NONE", "none"])
def test_none_is_a_preset_and_not_a_missing_value(folder, text):
    with pytest.raises(UserError, match='lora_block_weights "NONE": 17 numbers'):
        planned(f"--prompt x --lora_ckpt_path lora.ckpt --lora_block_weights {text}")


def test_the_metadata_of_a_png_names_block_weights(folder):
    settings = parse("--prompt x --lora_ckpt_path lora.ckpt --lora_block_weights 'mid=0.25, OUT3=0'")
    (file,) = planned("--prompt x --lora_ckpt_path lora.ckpt --lora_block_weights 'mid=0.25, OUT3=0'").loras
    assert lora_metadata(settings, file)["block_weights"] == "MID=0.25,OUT3=0"
    assert "block_weights" not in lora_metadata(settings, file._replace(blocks=None))


@pytest.mark.parametrize(
    "flags, words",
    [
        ("OUTALL", "lora_block_weights .*17 numbers.*tiny.yaml has IN00 to IN03, MID, OUT00 to OUT03: name its blocks"),
        ("MID=1 MID=2", "lora_block_weights has 2 texts for 1 LoRAs"),
        ("MID=1,OUT04=2", "the model of .*tiny.yaml has no block OUT04. It has IN00 to IN03"),
        ("0 1 2", "has 3 texts for 1 LoRAs.*joined by commas"),
        ("0,1,2", "lora_block_weights .* has 3 numbers"),
        ("MID=much", "is not a number"),
        ("", "needs a value"),
        ("''", "is empty"),
    ],
)
def test_block_weights_that_do_not_suit_the_model_are_refused_before_anything_is_read(folder, flags, words):
    with pytest.raises(UserError, match=words):
        planned(f"--prompt x --lora_ckpt_path lora.ckpt --lora_block_weights {flags}")


def test_a_lora_is_left_out_where_use_lora_is_false(folder, caplog):
    assert planned("--prompt x --use_lora False --lora_ckpt_path lora.ckpt").loras == []
    assert "not applied" in caplog.text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--lora_scale 0.5 --lora_ft_unet False", "no lora_ckpt_path is given: lora_scale, lora_ft_unet has no effect"),
        ("--lora_block_weights MID=0", "no lora_ckpt_path is given: lora_block_weights has no effect"),
        ("--scale 1 --negative_prompt ugly", "scale 1 is without guidance: the negative prompts are not used"),
        ("--skip_save --skip_grid", "skip_save and skip_grid without save_latents: nothing of this run is kept"),
        ("--use_lora False --lora_rank 4 --scale 1 --skip_save --skip_grid --save_latents a.npy", ""),
        ("--lora_ckpt_path lora.ckpt --lora_scale 0.5 --scale 2 --negative_prompt ugly --skip_save", ""),
    ],
)
def test_settings_without_an_effect_are_reported(folder, caplog, flags, words):
    planned(f"--prompt x {flags}")
    assert words in caplog.text and bool(words) == bool(caplog.text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("none.ckpt:0.5", "none.ckpt does not exist"),
        ("lora.ckpt:abc", '"abc" after the colon is not a number'),
        ("lora.ckpt:", '"" after the colon'),
        ("lora.ckpt:1:x", '"x" after the colon'),
        ("lora.ckpt:x:1", '"x" after the colon'),
        ("lora.ckpt:nan", "is not a number from"),
        ("lora.ckpt:inf", "is not a number from"),
        (":0.7", "does not exist"),
        ("lora.ckpt:1001", "from -1000 to 1000"),
        ("lora.ckpt:0.5:1e39", "from -1000 to 1000"),
        ('""', '"" is no path'),
    ],
)
def test_wrong_lora_paths_are_named(folder, text, words):
    with pytest.raises(UserError, match=words):
        planned(f"--prompt x --lora_ckpt_path {text}")


# ---- outputs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--save_latents out.npz", "must end in .npy"),
        ("--save_latents out", "must end in .npy"),
        ("--save_latents folder.npy", "is a folder"),
        ("--init_latents in.npy --save_latents ./in.npy", "would overwrite init_latents"),
    ],
)
def test_unsuitable_outputs_are_named_before_anything_runs(folder, flags, words):
    (folder / "folder.npy").mkdir()
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(UserError, match=words):
        planned(f"--prompt x {flags}")
    assert sorted(path.name for path in folder.iterdir()) == before
