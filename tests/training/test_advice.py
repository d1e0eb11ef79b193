"""The advice fits data and base model, and warns of what other projects do not do. It changes nothing."""

from __future__ import annotations

import logging
import re

import pytest
from PIL import Image

from ldm.data.preparation import prepare_data, read_listing
from ldm.settings.model import load_model_config
from ldm.settings.read import read_settings
from ldm.settings.train import TrainSettings
from ldm.training.advice import PEERS, DataFacts, advise, alikeness, look_at
from ldm.training.plan import make_plan
from tests.conftest import ROOT
from tests.training.micro import MICRO, prepare

CONFIGS = {"sd1": "v1-inference.yaml", "sd2": "v2-inference.yaml", "nano": "nano.yaml"}


def facts(images, alike, samples=None, own_samples=None, enlarged=0.0):
    samples = images if samples is None else samples
    return DataFacts(images, images, samples if own_samples is None else own_samples, samples, alike, 600, enlarged)


def advice_for(facts, architecture="sd1", steps=1000, **settings):
    given = {"use_lora": True, "max_steps": steps, "train_batch_size": 1, "start_learning_rate": 1e-4, **settings}
    config = load_model_config(ROOT / "configs" / CONFIGS[architecture])
    made = TrainSettings(**given)
    return advise(facts, made, config, make_plan(made, facts.samples))


DOG = facts(5, 1.0)  # DreamBooth: all captions are the same
POKEMON = facts(833, 0.2)
EMOJI = facts(358, 0.15)


@pytest.mark.parametrize(
    "facts, architecture, settings, kind, flags",
    [
        (DOG, "sd1", {}, "one subject", ["--lora_rank 8", "--start_learning_rate 0.0001", "--max_steps 600"]),
        (DOG, "sd1", {"train_batch_size": 2}, "one subject", ["--max_steps 300"]),
        (DOG, "nano", {}, "one subject", ["--lora_rank 16", "--start_learning_rate 0.001", "--max_steps 400"]),
        (facts(40, 0.1), "sd2", {}, "a style", ["--lora_rank 16", "--max_steps 3000"]),
        (POKEMON, "sd1", {"train_batch_size": 4}, "a style", ["--start_learning_rate 0.0001", "--max_steps 15000"]),
        (EMOJI, "nano", {"train_batch_size": 16}, "a style", ["--start_learning_rate 0.001", "--max_steps 500"]),
        (facts(50_000, 0.1), "sd1", {"train_batch_size": 4}, "a style", ["--max_steps 130000"]),
        (facts(300, 0.9), "sd1", {}, "a style", ["more than 100 images", "--lora_rank 16"]),
        # Half of each epoch are class images: twice the steps show the dog as often.
        (facts(5, 1.0, samples=10, own_samples=5), "sd1", {}, "one subject", ["--max_steps 1200"]),
        (POKEMON, "sd1", {"optim": "lion"}, "a style", ["--start_learning_rate 2e-05"]),
        (POKEMON, "sd1", {"optim": "prodigy", "start_learning_rate": 1.0}, "a style", ["--start_learning_rate 1 "]),
        (POKEMON, "sd1", {"use_lora": False}, "a style", ["--start_learning_rate 1e-05"]),
    ],
)
def test_rank_rate_and_steps_follow_data_and_base(facts, architecture, settings, kind, flags):
    lines = advice_for(facts, architecture, **settings).lines
    assert f"taken for {kind}" in lines[0] and f"{facts.images:,} images" in lines[0]
    for flag in flags:
        assert any(flag in line for line in lines), lines
    assert all(": " in line for line in lines[1:])  # each with its reason
    assert any("--lora_rank" in line for line in lines) == settings.get("use_lora", True)


@pytest.mark.parametrize(
    "recipe, facts",
    [
        ("train_config_lora_nano.yaml", EMOJI),
        ("train_config_lora_text_nano.yaml", EMOJI),
        ("train_config_dreambooth_lora_nano.yaml", facts(6, 1.0, samples=96, own_samples=48)),
        ("train_config_lora_v1.yaml", POKEMON),
        ("train_config_lora_v2.yaml", facts(100, 0.2)),
        ("train_config_dreambooth_lora_v1.yaml", facts(5, 1.0, samples=400, own_samples=200)),
    ],
)
def test_the_recipes_are_not_warned_of(recipe, facts):
    flags = ["--train_config", str(ROOT / "configs" / "train" / recipe)]
    settings = read_settings(TrainSettings, flags, yaml_flag="train_config")
    config = load_model_config(settings.model_config)
    plan = make_plan(settings, facts.samples // settings.train_batch_size)
    assert advise(facts, settings, config, plan).warnings == []


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"lora_rank": 320}, "lora_rank is 320, in other projects 1 to 128 (cloneofsimo"),
        ({"lora_alpha": 64.0}, "lora_alpha is 64, in other projects 1 to 4 "),
        ({"start_learning_rate": 1e-5}, "start_learning_rate with adamw is 1e-05, in other projects 5e-05 to 0.001"),
        ({"unet_lr": 1e-2}, "unet_lr with adamw is 0.01"),
        ({"optim": "lion"}, ""),
        ({"optim": "lion", "start_learning_rate": 1e-3}, "with lion is 0.001, in other projects 5e-06 to 0.000333"),
        (
            {"optim": "prodigy", "start_learning_rate": 0.1},
            "start_learning_rate with prodigy is 0.1, in other projects 1",
        ),
        ({"lora_ft_text_encoder": True, "text_encoder_lr": 2e-4}, "as a share of the UNet's rate, is 2"),
        ({"lora_ft_text_encoder": True, "text_encoder_lr": 5e-5}, ""),
        ({"min_snr_gamma": 50.0}, "min_snr_gamma is 50, in other projects 1 to 5"),
        ({"min_snr_gamma": 5.0, "noise_offset": 0.1, "caption_dropout": 0.1}, ""),
        ({"noise_offset": 0.5}, "noise_offset is 0.5"),
        ({"loraplus_lr_ratio": 100.0}, "loraplus_lr_ratio is 100, in other projects 1 to 16"),
        ({"caption_dropout": 0.5}, "caption_dropout is 0.5, in other projects 0 to 0.2"),
        ({"steps": 100}, "times that each image is seen is 2.5, in other projects 70 to 280 (mindone"),
        ({"steps": 40_000}, "it may learn the images by heart"),
        ({"image_size": 256}, "image_size is 256, the base model draws at 512"),
        ({"train_batch_size": 64, "steps": 60}, "a step sees 64 images, an epoch has 40"),
    ],
)
def test_settings_outside_what_others_use_are_named_with_the_source(settings, words):
    warnings = advice_for(facts(40, 0.1), **{"steps": 4000, **settings}).warnings
    assert len(warnings) == bool(words), warnings
    assert all(words in warning for warning in warnings)


def test_what_the_data_lacks_is_named():
    warnings = advice_for(facts(2, 1.0, enlarged=0.5), steps=200).warnings
    assert len(warnings) == 2
    assert "50% of the images are smaller than they are trained" in warnings[0]
    assert "2 images to train on: DreamBooth's paper" in warnings[1]


def test_every_range_has_a_source():
    for ranges in PEERS.values():
        assert all(limits.source and limits.low < limits.high for limits in ranges.values())


def test_the_page_has_the_ranges():
    rows = re.findall(r"^\| (.*) \| (.*) \| (.*) \|$", (ROOT / "docs" / "choosing.md").read_text(), re.MULTILINE)
    names = {
        "rate": "learning rate, AdamW",
        "views": "times that each image is seen",
        "text_encoder": "text encoder's rate, share of the UNet's",
    }
    shown = {name: (of_sd, of_nano) for name, of_sd, of_nano in rows}
    for name in PEERS["sd1"]:
        ranges = [PEERS[architecture][name] for architecture in ("sd1", "nano")]
        texts = [f"{limits.low:g} to {'the rank' if name == 'lora_alpha' else f'{limits.high:g}'}" for limits in ranges]
        assert shown[names.get(name, name)] == tuple(texts)


def test_captions_are_alike_by_their_words():
    assert alikeness(["a photo of sks dog"] * 3) == 1.0 and alikeness(["a"]) == 1.0
    assert alikeness(["a red cat", "A cat, red"]) == 1.0
    assert alikeness(["a koala", "a rocket"]) == pytest.approx(1 / 3)
    assert alikeness(["cat", "dog", "cat dog"]) == pytest.approx((0 + 0.5 + 0.5) / 3)


def test_the_facts_are_those_of_the_data_set(micro_data, tmp_path):
    settings = TrainSettings(data_path=str(micro_data), image_size=16, num_repeats=3)
    data, _ = prepare_data(read_listing(settings), settings, load_model_config(MICRO))
    seen = look_at(data)
    # Nine images of 24 x 28 pixels, and one of 8 x 12.
    assert (seen.images, seen.captions, seen.own_samples, seen.samples) == (10, 10, 30, 30)
    assert (seen.shorter_side, seen.enlarged) == (24, 0.1)
    assert seen.alike == pytest.approx(4 / 6) and seen.is_subject


def test_a_run_logs_the_advice_before_it_trains(settings, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "ldm"):
        prepare(settings(tmp_path / "run", use_lora=True, max_steps=2, advise=True))
    text = (tmp_path / "run" / "log.txt").read_text()
    assert "advice: 10 images" in text and "advice: --max_steps" in text
    assert "no other project trains" in text  # the micro model
    assert "WARNING advice: start_learning_rate with adamw is 1e-05" in text


def test_images_whose_files_vanish_meanwhile_are_passed_over(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "b.png")
    (tmp_path / "img_txt.csv").write_text("dir,text\na.png,one\nb.png,two\n")
    settings = TrainSettings(data_path=str(tmp_path), image_size=16)
    data, _ = prepare_data(read_listing(settings), settings, load_model_config(MICRO))
    (tmp_path / "a.png").write_bytes(b"")
    assert look_at(data).shorter_side == 64
