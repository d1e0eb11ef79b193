"""The settings of the file to share."""

from __future__ import annotations

import pytest

from ldm.errors import UserError
from ldm.settings.train import TrainSettings


def lora(**settings: object) -> TrainSettings:
    return TrainSettings(use_lora=True, **settings)


def test_a_file_to_share_is_written_under_a_plain_name_in_float():
    assert (lora().share_name, lora().share_dtype) == ("lora", "fp32")
    given = lora(output_name="水墨 style-v1.5", save_precision="bf16")
    assert (given.share_name, given.share_dtype) == ("水墨 style-v1.5", "bf16")
    assert lora(save_model_as="ckpt").share_name is None


@pytest.mark.parametrize(
    "name",
    ["", " ", " a", "a ", ".a", "..", "a/b", "/a", "a\\b", "a\nb", "a\0b", "a:b", "<a>", 'a"b', "a|b", "a?b", "a*b",
     "x" * 151, "\u6c34" * 51, "\ud800", "state-00000003", "lora-1", "best-0", "a-step00000003"],
)  # fmt: skip
def test_a_name_that_no_file_or_prompt_can_hold_or_another_file_has_is_refused(name):
    with pytest.raises(UserError, match="output_name .*: give a name such as pokemon"):
        lora(output_name=name)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(metadata_title="t", no_metadata=True), "metadata_title does not go with no_metadata"),
        (dict(training_comment="c", no_metadata=True), "training_comment does not go with no_metadata"),
        (dict(metadata_description="x" * 10_001), "metadata_description has 10,001 characters, at most 10,000"),
        (dict(save_precision="fp64"), "save_precision"),
        (dict(save_model_as="pt"), "save_model_as"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, says):
    with pytest.raises(UserError, match=says):
        lora(**settings)


@pytest.mark.parametrize("setting", [dict(output_name="a"), dict(no_metadata=True), dict(metadata_author="me")])
def test_they_need_a_lora(setting):
    with pytest.raises(UserError, match="needs use_lora"):
        TrainSettings(**setting)
