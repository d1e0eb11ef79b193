"""Axes of a comparison: values have the type and the range of their setting, and bad ones are named."""

from __future__ import annotations

import pytest

from ldm.errors import UserError
from ldm.settings.axes import parse_axis, without_folders
from ldm.settings.generate import GenerateSettings
from ldm.settings.values import settings_of

SETTINGS = settings_of(GenerateSettings)
ALLOWED = ("prompt", "seed", "scale", "lora_scale", "lora_start", "ckpt_ema", "lora_ckpt_path", "sampling_steps")


def axis(text):
    return parse_axis(text, "grid_x", SETTINGS, ALLOWED)


@pytest.mark.parametrize(
    ("text", "name", "values"),
    [
        ("lora_scale=0,0.5,1", "lora_scale", [0.0, 0.5, 1.0]),
        ("seed=1, 2 ,3", "seed", [1, 2, 3]),
        ("--lora-scale=1", "lora_scale", [1.0]),
        ("scale=none,4", "scale", [None, 4.0]),
        ("ckpt_ema=True,False", "ckpt_ema", [True, False]),
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


def test_folders_do_not_stand_on_the_sheet():
    assert axis("lora_ckpt_path=/home/me/a.ckpt:0.7,b.ckpt").labels == ["a.ckpt:0.7", "b.ckpt"]
    assert axis("lora_ckpt_path=/home/me/a/,/home/me/b//:0.7").labels == ["a", "b:0.7"]


@pytest.mark.parametrize(
    ("text", "recorded"),
    [
        ("lora_ckpt_path=/home/me/a.ckpt:0.7,b.ckpt", "lora_ckpt_path=a.ckpt:0.7,b.ckpt"),
        ('--lora-ckpt-path = "/home/me/a, b.ckpt"', 'lora_ckpt_path="a, b.ckpt"'),
        ("ckpt_path=/home/me/x/y.safetensors", "ckpt_path=y.safetensors"),
        ("config=~/x.yaml", "config=x.yaml"),
        ("vae_ckpt_path=none,../vae.ckpt", "vae_ckpt_path=none,vae.ckpt"),
        ("seed=1, 2", "seed=1, 2"),
        ("prompt=/home/me,a", "prompt=/home/me,a"),
        ("prompt_sr=/home/me,a", "prompt_sr=/home/me,a"),
    ],
)
def test_folders_do_not_stand_in_the_record_of_a_run(text, recorded):
    assert without_folders(text, "grid_x", SETTINGS) == recorded
    for name in ("grid_x", "grid_y"):
        assert GenerateSettings(prompt="a", **{name: text}).of_images()[name] == recorded


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
        ("ckpt_ema=maybe", "not True or False"),
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
