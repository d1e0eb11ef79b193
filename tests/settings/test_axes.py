"""Axes of a comparison: values have the type and the range of their setting, and bad ones are named."""

from __future__ import annotations

import pytest

from ldm.errors import UserError
from ldm.settings.axes import parse_axis
from ldm.settings.generate import GenerateSettings
from ldm.settings.values import settings_of

SETTINGS = settings_of(GenerateSettings)
ALLOWED = ("prompt", "seed", "scale", "lora_scale", "lora_start", "ddim", "lora_ckpt_path", "sampling_steps")


def axis(text):
    return parse_axis(text, "grid_x", SETTINGS, ALLOWED)


@pytest.mark.parametrize(
    ("text", "name", "values"),
    [
        ("lora_scale=0,0.5,1", "lora_scale", [0.0, 0.5, 1.0]),
        ("seed=1, 2 ,3", "seed", [1, 2, 3]),
        ("--lora-scale=1", "lora_scale", [1.0]),
        ("scale=none,4", "scale", [None, 4.0]),
        ("ddim=True,False", "ddim", [True, False]),
        ("lora_start=0.1,0.2", "lora_start", [[0.1], [0.2]]),
        ("lora_ckpt_path=a.ckpt,b.ckpt:0.7", "lora_ckpt_path", [["a.ckpt"], ["b.ckpt:0.7"]]),
        ('prompt="a cat, red",a dog,"say ""x"""', "prompt", ["a cat, red", "a dog", 'say "x"']),
        ("prompt=a=b,none", "prompt", ["a=b", "none"]),
        ("prompt_sr=cat,dog,", "prompt_sr", ["cat", "dog", ""]),
    ],
)
def test_values_have_the_type_of_their_setting(text, name, values):
    parsed = axis(text)
    assert (parsed.name, parsed.values) == (name, values)
    assert len(parsed.labels) == len(values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "give a setting and its values"),
        ("seed", "give a setting and its values"),
        ("=1", "give a setting and its values"),
        ("sead=1", "sead is unknown; .* such as seed"),
        ("output_path=a,b", "output_path cannot be compared"),
        ("seed=1,x", '"x" is not a whole number'),
        ("seed=1,,2", "an empty value"),
        ("seed=-1", "at least 0"),
        ("scale=nan", "is not a number"),
        ("lora_scale=1e9", "at most"),
        ("sampling_steps=0", "at least 1"),
        ("ddim=maybe", "not True or False"),
        ('prompt="a', "put a value with a comma"),
        ('prompt="a"b', "put a value with a comma"),
        ("prompt=a\nb", "on one line"),
        ("prompt_sr=,a", "may not be empty"),
        ("seed=", "0 values|an empty value"),
        ("seed=" + ",".join(map(str, range(101))), "101 values, wanted 1 to 100"),
        ("prompt=" + "a" * 200_000, "at most 100,000 are read"),
    ],
)
def test_a_bad_axis_is_named(text, message):
    with pytest.raises(UserError, match=f"(?s)--grid_x .*({message})"):
        axis(text)
