"""Settings from an image's texts: they are taken over, files are found by their hashes, and no text does harm."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.generation.from_image import complete_from_image, differences, read_recipe
from ldm.generation.image_files import write_png
from ldm.settings.generate import GenerateSettings

A1111 = """a red apple <lora:style:0.8>
Negative prompt: blurry
Steps: 25, Sampler: DDIM, CFG scale: 6.5, Seed: 7, Size: 64x128, Model hash: 5d62954129, Model: nano, Denoising \
strength: 0.5, Hires upscale: 2, ENSD: 31337, RNG: NV"""
SETTINGS = {"sampler": "ddim", "sampling_steps": 30, "scale": 3.5, "ddim_eta": 0.25, "H": 64, "W": 64, "batch_size": 4}


def own(**changed):
    """The text fields of an image of this project."""
    fields = {
        "prompt": "a cat", "negative_prompt": "", "index": "3", "seed": "5", "model": "nano",
        "checkpoint": "nano.safetensors", "checkpoint_sha256": "0" * 64, "settings": SETTINGS,
    }  # fmt: skip
    return {key: value for key, value in {**fields, **changed}.items() if value is not None}


def image(folder, fields):
    write_png(folder / "a.png", np.zeros((4, 4, 3), np.uint8), fields)
    return str(folder / "a.png")


def test_the_settings_of_an_image_of_this_project(tmp_path):
    values = complete_from_image({"from_image": image(tmp_path, own())})
    assert values == {
        "prompt": "a cat", "negative_prompt": "", "seed": 5, "first_index": 3, "sampler": "ddim",
        "sampling_steps": 30, "scale": 3.5, "ddim_eta": 0.25, "H": 64, "W": 64, "batch_size": 4, "full_batches": True,
        "version": "nano",
    }  # fmt: skip
    GenerateSettings(**values)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_an_image_is_made_again_in_its_precision(tmp_path, precision):
    """What `auto` stood for is recorded since the first version."""
    path = image(tmp_path, own(settings={**SETTINGS, "precision": precision}))
    assert complete_from_image({"from_image": path})["precision"] == precision
    assert "precision" not in complete_from_image({"from_image": path, "precision": "auto"})


def test_the_settings_that_are_given_win(tmp_path):
    path = image(tmp_path, own())
    given = {"from_image": path, "data_path": "p.txt", "scale": 2.0, "dpm_solver": True, "ckpt_path": "x"}
    values = complete_from_image(given)
    assert not set(values) & {"prompt", "scale", "sampler", "ddim", "ddim_eta", "version", "ckpt_path"}
    assert values["sampling_steps"] == 30


def test_the_settings_of_an_image_of_a1111(tmp_path):
    path = image(tmp_path, {"parameters": A1111})
    with pytest.raises(
        UserError, match="names the LoRAs <lora:style:0.8>: give the folder of their files as --lora_dir"
    ):
        complete_from_image({"from_image": path})
    assert "prompt" not in complete_from_image({"from_image": path, "prompt": "a red apple"})
    values = complete_from_image({"from_image": path, "lora_dir": str(tmp_path)})
    assert values == {
        "prompt": "a red apple <lora:style:0.8>", "prompt_syntax": "a1111", "negative_prompt": "blurry",
        "seed": 7, "sampling_steps": 25, "scale": 6.5, "W": 64,
        "H": 128, "sampler": "ddim",
    }  # fmt: skip
    recipe = read_recipe(path)
    listed = "; ".join(recipe.not_repeated)
    for text in ("noise", "Denoising strength 0.5", "Hires upscale 2", "ENSD 31337"):
        assert text in listed
    settings = GenerateSettings(**values)
    assert differences(recipe, settings, {"checkpoint_sha256": "5d62954129" + "0" * 54}) == []
    settings.scale = 2.0
    assert differences(recipe, settings, {"checkpoint_sha256": "1" * 64}) == [
        "scale 2.0 (the image: 6.5)", "base model 1111111111 (the image: 5d62954129)",
    ]  # fmt: skip


SECOND_START = "a\nSteps: 20, Sampler: Euler a, Eta: 0.5, "


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("Variation seed: 7, Variation seed strength: 0.25", {"variation_seed": 7, "variation_strength": 0.25}),
        (
            "Denoising strength: 0.5, Hires upscale: 2, Hires steps: 6, Hires upscaler: Latent",
            {"hires_scale": 2.0, "hires_strength": 0.5, "hires_upscaler": "latent", "hires_steps": 12},
        ),
        (
            "Denoising strength: 0.7, Hires upscale: 1.5, Hires upscaler: Lanczos",  # all 20 steps are taken
            {"hires_scale": 1.5, "hires_strength": 0.7, "hires_upscaler": "lanczos", "hires_steps": 29},
        ),
        ("Denoising strength: 0.7, Hires upscale: 1.5, Hires upscaler: R-ESRGAN 4x+", {}),
        ("Denoising strength: 1.7, Hires upscale: 1.5, Hires upscaler: Latent", {}),
        ("Denoising strength: 0, Hires upscale: 2, Hires upscaler: Latent", {}),
        ("Denoising strength: 0.7", {}),  # of an image that is not named
        ("Variation seed strength: 0.25", {}),
    ],
)
def test_a_second_start_of_a1111_is_taken_over_as_a_whole_or_listed(tmp_path, text, settings):
    recipe = read_recipe(image(tmp_path, {"parameters": SECOND_START + text}))
    plain = {"prompt": "a", "prompt_syntax": "a1111", "negative_prompt": "", "sampling_steps": 20}
    assert recipe.settings == {**plain, "sampler": "euler_a", "eta": 0.5, **settings}
    listed = "; ".join(recipe.not_repeated)
    assert all((value.replace(": ", " ") in listed) == (not settings) for value in text.split(", "))
    GenerateSettings(**recipe.settings)


def test_a_sampler_and_a_schedule_that_are_not_known_are_listed(tmp_path):
    text = "a\nSteps: 5, Sampler: Restart Turbo, Seed: -1, CFG scale: x"
    recipe = read_recipe(image(tmp_path, {"parameters": text}))
    assert recipe.settings == {
        "prompt": "a", "prompt_syntax": "a1111", "negative_prompt": "", "sampling_steps": 5
    }  # fmt: skip
    listed = "; ".join(recipe.not_repeated)
    assert "sampler Restart" in listed and "schedule Turbo" in listed and "Seed -1" in listed and "scale x" in listed


@pytest.mark.parametrize(
    ("changed", "given", "taken"),
    [
        ({}, {}, 4),
        ({"H": 512, "W": 512, "batch_size": 8}, {}, 8),
        ({"H": 512, "W": 512, "batch_size": 9}, {}, None),
        ({"H": 8192, "W": 8192, "batch_size": 10_000}, {"H": 8192, "W": 8192}, None),
        ({"H": 8192, "W": 8192, "batch_size": 1}, {"H": 8192, "W": 8192}, 1),
        ({"H": 512, "W": 512, "batch_size": 2, "hires_scale": 2.0}, {}, 2),
        ({"H": 512, "W": 512, "batch_size": 3, "hires_scale": 2.0}, {}, None),
        ({"H": 64, "W": 64, "batch_size": 9}, {"H": 4096, "W": 4096}, None),
        ({"H": 64, "W": 64, "batch_size": 9}, {"hires_scale": 16.0}, None),
        ({"H": None, "W": None, "batch_size": 4}, {}, None),  # the model's own size is not known here
    ],
)
def test_an_image_asks_for_no_larger_batch_than_the_default(tmp_path, changed, given, taken):
    settings = {name: value for name, value in {**SETTINGS, **changed}.items() if value is not None}
    path = image(tmp_path, own(settings=settings))
    values = complete_from_image({"from_image": path, **given})
    assert values.get("batch_size") == taken and values.get("full_batches", False) == (taken is not None)
    values = complete_from_image({"from_image": path, **given, "batch_size": 10_000})
    assert values["full_batches"] and "batch_size" not in values  # the user's own number is taken
    fields = {**own(), "settings": {**settings, "batch_size": 33}}
    found = differences(read_recipe(path), GenerateSettings(prompt="a"), fields)
    assert found == [f"batch_size 33 (the image: {settings['batch_size']}), too many to be taken from an image: "
                     "--batch_size takes them"]  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "given", "flags"),
    [
        ({"H": 1024, "W": 2048}, {}, None),
        ({"H": 1032, "W": 2048}, {}, "--W 2048 --H 1032"),
        ({"H": 8192, "W": 8192}, {}, "--W 8192 --H 8192"),
        ({"H": 8192, "W": 8192}, {"W": 256}, None),
        ({"H": 8192, "W": 8192}, {"W": 512}, "--H 8192"),
        ({"H": 8192, "W": 8192}, {"W": 8192, "H": 8192}, None),
        ({"H": 512, "W": 512}, {"W": 8192, "H": 8192}, None),
        ({"H": 512, "W": 512, "hires_scale": 2.0}, {}, None),
        ({"H": 512, "W": 512, "hires_scale": 4.0}, {}, "--W 512 --H 512 --hires_scale 4.0"),
        ({"H": 512, "W": 512, "hires_scale": 16.0}, {"hires_scale": 2.0}, None),
        ({"H": 512, "W": 512, "hires_scale": 16.0}, {"H": 512, "W": 512}, "--hires_scale 16.0"),
        ({"H": 512, "W": 512}, {"hires_scale": 4.0}, "--W 512 --H 512"),
        ({"H": None, "W": None, "hires_scale": 16.0}, {}, "--hires_scale 16.0"),
        ({"H": None, "W": None}, {"hires_scale": 16.0}, None),
    ],
)
def test_an_image_asks_for_no_larger_size_than_a_default_call_takes(tmp_path, changed, given, flags):
    settings = {name: value for name, value in {**SETTINGS, **changed}.items() if value is not None}
    given = {"from_image": image(tmp_path, own(settings=settings)), **given}
    if flags is None:
        complete_from_image(given)
        return
    with pytest.raises(
        UserError, match=f"a.png asks for an image of about .* pixels, and more than 2,097,152.*: add {flags} to"
    ):
        complete_from_image(given)


def test_the_size_of_a_foreign_image_is_bounded_as_that_of_an_own_one(tmp_path):
    text = "a\nSteps: 20, Sampler: Euler, Size: 8192x8192"
    with pytest.raises(UserError, match="asks for an image of about 8192 x 8192 pixels.*--W 8192 --H 8192"):
        complete_from_image({"from_image": image(tmp_path, {"parameters": text})})
    text = "a\nSteps: 20, Size: 512x512, Denoising strength: 0.5, Hires upscale: 8, Hires upscaler: Latent"
    with pytest.raises(UserError, match="asks for an image of about 4096 x 4096 pixels.*--hires_scale 8.0"):
        complete_from_image({"from_image": image(tmp_path, {"parameters": text})})


def test_the_model_yaml_of_an_image_is_asked_for(tmp_path):
    fields = own(model_config="mine.yaml", model_config_sha256="1" * 64)
    path = image(tmp_path, fields)
    with pytest.raises(UserError, match="was made with the model YAML mine.yaml: give its path as --config"):
        complete_from_image({"from_image": path})
    assert complete_from_image({"from_image": path, "config": "other.yaml"})["version"] == "nano"
    # With another model it is not needed, and the report says that it is missing.
    for given in ({"version": "1.5"}, {"ckpt_path": "x"}):
        assert "config" not in complete_from_image({"from_image": path, **given})
    found = differences(read_recipe(path), GenerateSettings(prompt="a"), own(model_config="nano.yaml"))
    assert found == [
        "model_config nano.yaml (the image: mine.yaml)",
        f"model_config_sha256 None (the image: {'1' * 64}): its model YAML mine.yaml is given as --config",
    ]
    (other,) = differences(read_recipe(path), GenerateSettings(prompt="a"), {**fields, "model_config_sha256": "2" * 64})
    assert "--config" not in other


def test_loras_are_found_by_their_hashes_in_any_order(tmp_path):
    entries = []
    for name, strength in (("a.ckpt", 0.5), ("b.ckpt", -1.25)):
        (tmp_path / name).write_text(name)
        digest = hashlib.sha256(name.encode()).hexdigest()
        entries.append({"file": name, "sha256": digest, "weight": strength, "lora_ft_unet": None, "start": 0.25})
    entries[1]["text_encoder_weight"] = 0.75
    path = image(tmp_path, own(lora=entries))
    a, b = f"{tmp_path}/a.ckpt", f"{tmp_path}/b.ckpt"
    values = complete_from_image({"from_image": path, "lora_ckpt_path": [b, a]})
    assert values["lora_ckpt_path"] == [f"{a}:0.5:0.5", f"{b}:-1.25:0.75"] and values["lora_start"] == [0.25, 0.25]
    for given in ([a], [f"{a}:1", b], [a, path]):  # as they are given
        assert complete_from_image({"from_image": path, "lora_ckpt_path": given})["lora_ckpt_path"] == given
    with pytest.raises(UserError, match="was made with the LoRA a.ckpt: give its path as --lora_ckpt_path"):
        complete_from_image({"from_image": path})
    assert "lora_ckpt_path" not in complete_from_image({"from_image": path, "use_lora": False})


def test_loras_of_a_plain_prompt_are_found_in_lora_dir(tmp_path):
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras" / "a.ckpt").write_text("a")
    entry = {"file": "a.ckpt", "sha256": hashlib.sha256(b"a").hexdigest(), "weight": 0.5}
    given = {"from_image": image(tmp_path, own(lora=[entry])), "lora_dir": str(tmp_path / "loras")}
    settings = GenerateSettings(**given, **complete_from_image(given))
    assert settings.prompt_syntax == "plain" and settings.lora_ckpt_path == [f"{tmp_path}/loras/a.ckpt:0.5:0.5"]


def test_an_image_with_an_empty_prompt_is_repeated(tmp_path):
    for fields in (own(prompt=""), {"parameters": "Steps: 5, Sampler: DDIM, Seed: 1"}):
        given = {"from_image": image(tmp_path, fields)}
        assert GenerateSettings(**given, **complete_from_image(given)).prompt == ""


@pytest.mark.parametrize(("index", "first_index"), [("17", 17), ("-1", None), (str(2**40), None), ("x", None)])
def test_the_index_of_a1111s_text_is_that_of_the_first_image(tmp_path, index, first_index):
    recipe = read_recipe(image(tmp_path, {"parameters": f"a\nSteps: 5, Seed: 7, Index: {index}"}))
    assert recipe.settings.get("first_index") == first_index and recipe.settings["seed"] == 7
    assert (f"Index {index}" in recipe.not_repeated) == (first_index is None)


def test_what_is_not_as_in_the_image_is_listed(tmp_path):
    recipe = read_recipe(image(tmp_path, own(lora=[{"file": "a", "sha256": "0", "weight": 1}])))
    fields = {**own(checkpoint_sha256="1" * 64), "settings": {**SETTINGS, "scale": 4.0}, "parameters": "x"}
    found = differences(recipe, GenerateSettings(prompt="a"), fields)
    assert len(found) == 3 and "scale 4.0 (the image: 3.5)" in found
    assert any(text.startswith("checkpoint_sha256 1111") for text in found)
    assert any(text.startswith("lora None (the image: ") for text in found)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "has no text that says how it was made.*it has none"),
        ({"Title": "x"}, "its texts are Title"),
        ({"prompt": json.dumps({"3": {"class_type": "KSampler"}}), "workflow": "{}"}, "graph of ComfyUI"),
        ({"parameters": "Steps: 1" + ", A: 1" * 1001}, "more than 1,000 values"),
        (own(settings="{"), "settings is not valid JSON"),
        (own(settings="[1]"), "settings is not a mapping"),
        (own(settings="[" * 5000), "settings is not valid JSON"),
        (own(settings="9" * 200_000), "more than 100,000 characters"),
        (own(settings={"scale": "x"}), 'scale: "x" is not a number'),
        (own(settings={"scale": 1e9}), "scale: .* at most 1000"),
        (own(settings={"sampling_steps": 0}), "sampling_steps: 0 is not allowed"),
        (own(settings='{"scale": NaN}'), "scale: "),
        (own(settings={"H": 10**9}), "H: .* at most"),
        (own(settings={"batch_size": 10**9}), "batch_size: .* at most"),
        (own(seed="-1"), "its seed is -1, not a whole number"),
        (own(seed="9" * 5000), "its seed is"),
        (own(seed="²"), "its seed is"),
        (own(seed=str(2**40)), "seed: .* at most"),
        (own(index="x"), "its index is x"),
        (own(index=str(2**40)), "first_index: .* at most"),
        (own(checkpoint="../../etc/passwd", model="x"), "is not the name of a file"),
        (own(checkpoint="", model="x"), "is not the name of a file"),
        (own(checkpoint="..", model="x"), "is not the name of a file"),
        (own(checkpoint=".", model="x"), "is not the name of a file"),
        (own(checkpoint="mine.ckpt", model="x"), "base model mine.ckpt: give its path as --ckpt_path"),
        (own(unet_checkpoint="u.ckpt"), "unet u.ckpt: give its path as --unet_ckpt_path"),
        (
            own(textual_inversion=[{"file": "t.pt", "sha256": "0"}]),
            "learned token t.pt: give its path as --ti_ckpt_path",
        ),
        (own(lora="{}"), "lora is not a list"),
        (own(lora=[1]), "lora is not a list"),
        (own(lora=[{"file": "a", "sha256": {}}]), "lora is not a list"),
        (own(lora=[{"file": "a", "sha256": "b"}] * 101), "a list of at most 100"),
        (own(lora=[{"file": "a/../b", "sha256": "b"}]), "a/../b is not the name of a file"),
    ],
)
def test_a_text_that_cannot_be_used_is_named(tmp_path, fields, message):
    with pytest.raises(UserError, match=f"(?s)from_image .*a.png.*{message}"):
        complete_from_image({"from_image": image(tmp_path, fields)})


def test_an_image_names_no_output_and_no_number_of_images(tmp_path):
    hostile = {"output_path": "/etc", "n_samples": 10**6, "n_iter": 9, "ckpt_path": "/etc/passwd", "resume": True,
               "device_target": "Ascend", "save_latents": "/x.npy", "grid_x": "seed=1", "__class__": 1}  # fmt: skip
    path = image(tmp_path, own(settings={**SETTINGS, **hostile}))
    assert not set(complete_from_image({"from_image": path})) & set(hostile)
    assert "output_path, which is no setting" in "; ".join(read_recipe(path).not_repeated)


def test_without_an_image_nothing_is_completed():
    assert complete_from_image({"prompt": "a"}) == {}
