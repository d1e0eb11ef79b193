"""The settings of images while training."""

from __future__ import annotations

import pytest

from ldm.errors import UserError
from ldm.settings.read import read_settings
from ldm.settings.train import TrainSettings


def test_prompts_are_a_file_or_a_list(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text("sample_prompts: prompts.txt\nsample_every_n_steps: 100\n")
    settings = read_settings(TrainSettings, [f"--train_config={path}"], yaml_flag="train_config")
    assert (settings.sample_prompts, settings.sample_every_n_steps) == ("prompts.txt", 100)
    path.write_text('sample_prompts: ["a cat --w 64", a dog]\n')
    settings = read_settings(TrainSettings, [f"--train_config={path}"], yaml_flag="train_config")
    assert settings.sample_prompts == ["a cat --w 64", "a dog"]
    settings = read_settings(TrainSettings, ["--sample_prompts", "a cat --w 64", "a dog"])
    assert settings.sample_prompts == ["a cat --w 64", "a dog"]


@pytest.mark.parametrize("name", ["sample_every_n_steps", "sample_every_n_epochs"])
def test_an_interval_needs_prompts(name):
    with pytest.raises(UserError, match=f"{name} has no effect without sample_prompts"):
        TrainSettings(**{name: 5})
