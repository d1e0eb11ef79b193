"""LoRA tags: how they are read, and which file a name means."""

from __future__ import annotations

import os

import pytest

from ldm.errors import UserError
from ldm.prompts.lora_tags import LoRAFolder, LoRATag, refuse_lora_tags, take_out_lora_tags


@pytest.mark.parametrize(
    "prompt, text, tags",
    [
        ("a cat", "a cat", []),
        ("a cat <lora:style:0.8>", "a cat ", [LoRATag("style", 0.8, 0.8)]),
        ("<lora:style>", "", [LoRATag("style", 1, 1)]),
        ("a <lora:style:0.4:0.8>, b", "a , b", [LoRATag("style", 0.8, 0.4)]),
        ("<lora:s:te=0.4:unet=0.8>", "", [LoRATag("s", 0.8, 0.4)]),
        ("<lora:s:0.4:unet=0.8>", "", [LoRATag("s", 0.8, 0.4)]),
        ("<lora:s:unet=0.8>", "", [LoRATag("s", 0.8, 1)]),
        ("<lora:s:-1>", "", [LoRATag("s", -1, -1)]),
        ("<lora: my style v1.5 :.5>", "", [LoRATag("my style v1.5", 0.5, 0.5)]),
        ("<lora:people/style:1.>", "", [LoRATag("people/style", 1, 1)]),
        ("<lora:a:1><lora:b:0>x<lora:a:1>", "x", [LoRATag("a", 1, 1), LoRATag("b", 0, 0), LoRATag("a", 1, 1)]),
        ("<lyco:s:1>", "", [LoRATag("s", 1, 1)]),
        ("(x<lora:s:1>:1.2)", "(x:1.2)", [LoRATag("s", 1, 1)]),
        ("<cat-toy> <b> a < b > c", "<cat-toy> <b> a < b > c", []),
        ("<hypernet:x:1> <LORA:x:1> <lora x>", "<hypernet:x:1> <LORA:x:1> <lora x>", []),
    ],
)
def test_tags(prompt, text, tags):
    assert take_out_lora_tags(prompt) == (text, tags)


@pytest.mark.parametrize(
    "prompt, message",
    [
        ("<lora:>", "has no name"), ("<lora: :1>", "has no name"), ("<lora:s:>", "not a number"),
        ("<lora:s:x>", "not a number"), ("<lora:s:nan>", "not a number"), ("<lora:s:inf>", "not a number"),
        ("<lora:s:1e3>", "not a number"), ("<lora:s:1001>", "from -1000 to 1000"), ("<lora:s:1:2:3>", "not understood"),
        ("<lora:s:dyn=4>", "not understood"), ("<lora:s:1:te=2>", "not understood"), ("<lora:s:1,0>", "not a number"),
        ("<lora:s:1>" * 33, "names 33 LoRAs"),
    ],
)  # fmt: skip
def test_mistakes_in_tags(prompt, message):
    with pytest.raises(UserError) as error:
        take_out_lora_tags(prompt)
    assert message in str(error.value)


def test_a_negative_prompt_names_no_lora():
    refuse_lora_tags("blurry <b>")
    with pytest.raises(UserError, match="move the tag to the prompt"):
        refuse_lora_tags("blurry <lora:style:1>")


@pytest.fixture
def folder(tmp_path):
    names = [
        "style.safetensors", "old.ckpt", "older.pt", "v1.5.safetensors", "twice.safetensors", "twice.ckpt",
        "people/anna.safetensors", "people/same.safetensors", "places/same.safetensors", "same2.safetensors",
        "people/same2.safetensors", "peft/adapter_config.json", "peft/adapter_model.safetensors",
        "peft2/unet/adapter_config.json", "diffusers/pytorch_lora_weights.safetensors", "notes.txt", "style.png",
    ]  # fmt: skip
    for name in names:
        (tmp_path / "loras" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "loras" / name).touch()
    (tmp_path / "outside.safetensors").touch()
    (tmp_path / "loras" / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "far.safetensors").touch()
    (tmp_path / "loras" / "linked").symlink_to(tmp_path / "elsewhere")
    # A folder of PEFT's that is a link, whose weights are one, and whose subfolder is one, out of the folder.
    outside = tmp_path / "peft_outside"
    outside.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (outside / name).touch()
    for name in ("evil_weights", "evil_part"):
        (tmp_path / "loras" / name).mkdir()
    (tmp_path / "loras" / "evil").symlink_to(outside)
    (tmp_path / "loras" / "evil_weights" / "adapter_config.json").touch()
    weights = "evil_weights/adapter_model.safetensors"
    (tmp_path / "loras" / weights).symlink_to(outside / "adapter_model.safetensors")
    (tmp_path / "loras" / "evil_part" / "unet").symlink_to(outside)
    (tmp_path / "loras" / "alias").symlink_to(tmp_path / "loras" / "peft")  # stays inside
    return tmp_path / "loras"


@pytest.mark.parametrize(
    "name, path",
    [
        ("style", "style.safetensors"), ("style.safetensors", "style.safetensors"), ("old", "old.ckpt"),
        ("older", "older.pt"), ("v1.5", "v1.5.safetensors"), ("anna", "people/anna.safetensors"),
        ("people/anna", "people/anna.safetensors"), ("people/same", "people/same.safetensors"),
        ("same2", "same2.safetensors"), ("people/same2", "people/same2.safetensors"), ("twice.ckpt", "twice.ckpt"),
        ("peft", "peft"), ("peft2", "peft2"), ("diffusers", "diffusers"), ("alias", "alias"),
    ],
)  # fmt: skip
def test_names(name, path, folder):
    assert LoRAFolder(folder).find(name) == folder / path


@pytest.mark.parametrize(
    "name, message",
    [
        ("stile", "did you mean style"), ("Style", "did you mean style"), ("twice", "twice.ckpt, twice.safetensors"),
        ("same", "people/same.safetensors, places/same.safetensors"), ("link", "no LoRA of this name"),
        ("far", "no LoRA of this name"), ("../outside", "no LoRA of this name"), ("/etc/x", "no LoRA of this name"),
        ("people/../style", "no LoRA of this name"), ("notes", "no LoRA of this name"), ("", "no LoRA of this name"),
        ("adapter_model", "no LoRA of this name"), ("evil", "no LoRA of this name"),
        ("evil_weights", "no LoRA of this name"), ("evil_part", "no LoRA of this name"),
    ],
)  # fmt: skip
def test_names_that_mean_no_file_or_several(name, message, folder):
    with pytest.raises(UserError) as error:
        LoRAFolder(folder).find(name)
    assert message in str(error.value)


def test_a_folder_that_is_none_or_empty(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        LoRAFolder(tmp_path / "missing")
    with pytest.raises(UserError, match="there is none at all"):
        LoRAFolder(tmp_path).find("style")


def test_the_folder_may_be_a_link(folder, tmp_path):
    os.symlink(folder, tmp_path / "alias")
    assert LoRAFolder(tmp_path / "alias").find("style") == tmp_path / "alias" / "style.safetensors"
