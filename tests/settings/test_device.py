"""The settings of Ascend read the same wherever they are given."""

from __future__ import annotations

import dataclasses

import pytest

from ldm.settings.generate import GenerateSettings
from ldm.settings.train import TrainSettings
from tools.check_device import Settings as CheckSettings


def declarations_of(name, *classes):
    """Return (default, help, choices) of a setting in each class."""
    fields = [field for cls in classes for field in dataclasses.fields(cls) if field.name == name]
    assert len(fields) == len(classes)
    return {(field.default, field.metadata["help"], field.metadata["choices"]) for field in fields}


def test_training_generation_and_the_check_of_a_device_explain_the_jit_level_alike():
    ((default, help, choices),) = declarations_of("jit_level", TrainSettings, GenerateSettings, CheckSettings)
    assert default is None and choices == ("O0", "O1", "O2")
    assert "None: O0" in help and "never compiled" in help and "may not compile" in help


def test_training_and_generation_explain_flash_attention_alike():
    ((default, help, _),) = declarations_of("enable_flash_attention", TrainSettings, GenerateSettings)
    assert default is None and "A2 and later" in help


@pytest.mark.parametrize("name", ["jit_level", "enable_flash_attention"])
def test_they_decide_the_compiled_training_step(name):
    (field,) = (field for field in dataclasses.fields(TrainSettings) if field.name == name)
    assert field.metadata["graph_key"]
