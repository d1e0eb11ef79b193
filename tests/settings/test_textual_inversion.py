"""The settings of textual inversion: names of several projects, and what has no effect is refused."""

from __future__ import annotations

import pytest

from ldm.errors import UserError
from ldm.settings.read import read_settings
from ldm.settings.train import TrainSettings


def parse(*argv):
    return read_settings(TrainSettings, list(argv), yaml_flag="train_config")


def test_nothing_is_learned_by_default():
    settings = parse()
    assert (settings.placeholder_token, settings.num_vectors, settings.learnable_property) == (None, 1, "object")
    assert not settings.trains_text_encoder and not settings.trains_token_alone


def test_alone_and_with_a_lora():
    alone = parse("--placeholder_token", "<cat>")
    assert alone.trains_text_encoder and alone.trains_token_alone
    pivotal = parse("--placeholder_token", "<cat>", "--use_lora", "True")
    assert pivotal.trains_text_encoder and not pivotal.trains_token_alone


def test_the_names_of_kohya_and_cloneofsimo_mean_the_same(tmp_path):
    settings = parse("--token_string", "<cat>", "--init_word", "toy", "--num_vectors_per_token", "3",
                     "--learning_rate_ti", "5e-4")  # fmt: skip
    assert (settings.placeholder_token, settings.initializer_token, settings.num_vectors) == ("<cat>", "toy", 3)
    assert settings.ti_lr == 5e-4
    (tmp_path / "x.yaml").write_text("placeholder_token: <cat>\nlearnable_property: null\n")
    assert parse("--train_config", str(tmp_path / "x.yaml")).learnable_property is None


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (dict(initializer_token="toy"), "initializer_token needs placeholder_token"),
        (dict(num_vectors=2), "num_vectors needs placeholder_token"),
        (dict(learnable_property="style"), "learnable_property needs placeholder_token"),
        (dict(ti_lr=1e-3), "ti_lr needs placeholder_token"),
        (dict(placeholder_token="<x>", num_vectors=0), "num_vectors: 0 is not allowed"),
        (dict(placeholder_token="<x>", num_vectors=65), "num_vectors: 65 is not allowed"),
        (dict(placeholder_token="<x>", learnable_property="thing"), '"thing"'),
        (dict(placeholder_token="<x>", ti_lr=0), "ti_lr: 0.0 is not allowed"),
        (dict(placeholder_token="<x>", unet_initialize_random=True), "a token is learned for a UNet"),
        (dict(placeholder_token="<x>", unet_lr=1e-4), "unet_lr has no effect where the token is trained alone"),
        (dict(placeholder_token="<x>", lora_ft_text_encoder=True), "lora_ft_text_encoder needs use_lora"),
        (dict(placeholder_token="<x>", shard_optimizer=True, use_parallel=True), "shard_optimizer is for training"),
        (dict(placeholder_token="<x>", ti_lr=1, optim="prodigy", start_learning_rate=1),
         "ti_lr does not go with prodigy"),
        (dict(placeholder_token="<x>", ti_lr=1, optim="adafactor", optimizer_args=["relative_step=True"]),
         "ti_lr does not go with relative_step"),
    ],
)  # fmt: skip
def test_contradictions_are_named(given, says):
    with pytest.raises(UserError, match=says):
        TrainSettings(**given)
