"""A diffusers folder in each of its published shapes is one checkpoint; any other folder is called what it is."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.weights.base import base_hash, open_base, plan_base
from ldm.weights.diffusers_folder import open_folder
from ldm.weights.read import write_checkpoint
from tests.weights.torch_files import write_torch

UNET = {
    "conv_in.weight": np.arange(4, dtype=np.float32),
    "down_blocks.0.resnets.0.norm1.bias": np.ones(3, np.float32),
}
VAE = {"quant_conv.bias": np.arange(3, dtype=np.float32)}
TEXT = {"text_model.final_layer_norm.bias": np.full(2, 5, np.float32)}
NAMES = sorted(f"{part}/{name}" for part, arrays in (("unet", UNET), ("vae", VAE), ("text_encoder", TEXT))
               for name in arrays)


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def folder(path, **files):
    """A diffusers folder of .safetensors files; `files`: component -> another writer of its weights."""
    writers = {
        "unet": lambda place: write_checkpoint(place / "diffusion_pytorch_model.safetensors", UNET),
        "vae": lambda place: write_checkpoint(place / "diffusion_pytorch_model.safetensors", VAE),
        "text_encoder": lambda place: write_checkpoint(place / "model.safetensors", TEXT),
        **files,
    }
    for component, write in writers.items():
        (path / component).mkdir(parents=True)
        write(path / component)
    write_json(path / "model_index.json", {"_class_name": "StableDiffusionPipeline"})
    return path


def sharded(place, suffix=".safetensors", variant=""):
    """UNET in two files and their index."""
    files = [f"diffusion_pytorch_model{variant}-0000{i}-of-00002{suffix}" for i in (1, 2)]
    for file, (name, array) in zip(files, UNET.items()):
        if suffix == ".safetensors":
            write_checkpoint(place / file, {name: array})
        else:
            write_torch(place / file, {name: array})
    index = {"metadata": {"total_size": 28}, "weight_map": dict(zip(UNET, files))}
    write_json(place / f"diffusion_pytorch_model{suffix}.index{variant}.json", index)


class TestForms:
    @pytest.mark.parametrize(
        "write",
        [
            lambda place: write_checkpoint(place / "diffusion_pytorch_model.safetensors", UNET),
            lambda place: write_checkpoint(place / "diffusion_pytorch_model.fp16.safetensors", UNET),
            lambda place: write_torch(place / "diffusion_pytorch_model.bin", UNET),
            lambda place: write_torch(place / "diffusion_pytorch_model.fp16.bin", UNET),
            sharded,
            lambda place: sharded(place, ".bin"),
            lambda place: sharded(place, variant=".fp16"),
        ],
    )
    def test_the_unets_files(self, tmp_path, write):
        checkpoint = open_base(folder(tmp_path / "sd", unet=write))
        assert sorted(checkpoint) == NAMES and checkpoint.format == "diffusers"
        for name, array in UNET.items():
            np.testing.assert_array_equal(checkpoint[f"unet/{name}"], array)
            assert checkpoint.spec(f"unet/{name}") == (array.dtype, array.shape)

    def test_the_text_encoder_as_bin(self, tmp_path):
        path = folder(tmp_path / "sd", text_encoder=lambda place: write_torch(place / "pytorch_model.bin", TEXT))
        assert sorted(open_base(path)) == NAMES

    def test_full_precision_comes_first_then_safetensors(self, tmp_path):
        def write_all(place):
            for number, name in enumerate(("fp16.safetensors", "fp16.bin", "bin", "safetensors")):
                write = write_checkpoint if name.endswith("safetensors") else write_torch
                write(place / f"diffusion_pytorch_model.{name}", {"conv_in.weight": np.full(1, number, np.float32)})

        path = folder(tmp_path / "sd", unet=write_all)
        for taken in (3, 2, 0, 1):
            checkpoint = open_folder(path)
            assert checkpoint["unet/conv_in.weight"] == taken
            checkpoint.files[0].unlink()
        with pytest.raises(UserError, match="holds no weights .*but nothing"):
            open_folder(path)

    def test_one_component_alone(self, tmp_path):
        path = folder(tmp_path / "sd") / "unet"
        write_json(path / "config.json", {"_class_name": "UNet2DConditionModel"})
        checkpoint = open_base(path)
        assert sorted(checkpoint) == sorted(f"unet/{name}" for name in UNET)
        assert set(plan_base(checkpoint).sources) == {
            "model.diffusion_model.input_blocks.0.0.weight",
            "model.diffusion_model.input_blocks.1.0.in_layers.0.bias",
        }

    def test_the_prediction_type_comes_from_the_scheduler(self, tmp_path):
        path = folder(tmp_path / "sd")
        assert open_folder(path).metadata == {}
        write_json(path / "scheduler" / "scheduler_config.json", {"prediction_type": "v_prediction"})
        assert open_folder(path).metadata == {"prediction_type": "v_prediction"}

    def test_its_identity_is_that_of_all_its_weights(self, tmp_path):
        a, b, c = (folder(tmp_path / name) for name in "abc")
        write_checkpoint(c / "vae" / "diffusion_pytorch_model.safetensors", {"quant_conv.bias": np.zeros(3)})
        assert base_hash(a) == base_hash(b) != base_hash(c)


class TestOtherFolders:
    @pytest.mark.parametrize(
        "files, words",
        [
            ({}, "is an empty folder: a diffusers folder has unet/"),
            ({"notes.txt": "x"}, "holds no checkpoint"),
            ({"model.safetensors": "x"}, "no diffusers folder .*name the file, such as .*model.safetensors"),
            ({"pytorch_lora_weights.safetensors": "x"}, "holds a LoRA"),
            ({"adapter_config.json": "{}", "adapter_model.safetensors": "x"}, "holds a LoRA"),
            ({"model_index.json": '{"_class_name": "StableDiffusionXLPipeline"}'}, "is an SDXL folder"),
            ({"text_encoder_2/config.json": "{}"}, "is an SDXL folder"),
            ({"model_index.json": '{"_class_name": "StableDiffusionInpaintPipeline"}'}, "inpainting model's folder"),
            ({"model_index.json": '{"_class_name": "StableDiffusion3Pipeline"}', "transformer/x": ""}, "transformer"),
            ({"model_index.json": '{"_class_name": "StableDiffusion3Pipeline"}', "transformer/x": "",
              "text_encoder_2/x": "", "text_encoder/x": ""}, r"diffusion transformer \(StableDiffusion3Pipeline\)"),
            ({"text_encoder_2/x": "", "unet/x": ""}, "is an SDXL folder"),
            ({"model_index.json": '{"_class_name": "StableDiffusionXLPipeline"}', "unet/x": ""}, "is an SDXL folder"),
            ({"config.json": '{"architectures": 5, "_class_name": ["UNet2DConditionModel"]}'}, "holds no checkpoint"),
            ({"model_index.json": "[" * 100_000}, "model_index.json .*is not valid JSON"),
            ({"model_index.json": "<html>"}, "model_index.json .*is not valid JSON"),
            ({"model_index.json": "[]"}, "model_index.json holds list"),
            ({"unet/config.json": "{}"}, "unet holds no weights .*but config.json"),
            ({"unet/diffusion_pytorch_model.safetensors": "<html>401"}, "is an HTML page"),
            ({"unet/diffusion_pytorch_model.safetensors.index.json": "{}"}, "has no weight_map"),
            ({"unet/diffusion_pytorch_model.safetensors.index.json": '{"weight_map": {"a": "../x"}}'},
             "names '../x', which is no file beside it"),
            ({"unet/diffusion_pytorch_model.safetensors.index.json": '{"weight_map": {"a": "gone.safetensors"}}'},
             "gone.safetensors does not exist"),
        ],
    )
    def test_is_called_what_it_is(self, tmp_path, files, words):
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=words) as caught:
            open_base(tmp_path)
        assert "\n" not in str(caught.value)

    def test_a_shard_with_other_arrays_than_its_index_says(self, tmp_path):
        path = folder(tmp_path / "sd", unet=sharded)
        write_checkpoint(path / "unet" / "diffusion_pytorch_model-00002-of-00002.safetensors", {"x": np.zeros(1)})
        with pytest.raises(UserError, match="do not agree on 2 arrays, such as down_blocks.0"):
            open_folder(path)

    def test_a_component_of_a_malicious_pickle(self, tmp_path):
        from tests.weights.torch_files import Call

        evil = {"w": Call("os", "system", ("true",))}
        path = folder(tmp_path / "sd", unet=lambda place: write_torch(place / "diffusion_pytorch_model.bin", evil))
        with pytest.raises(UserError, match="wants to run os.system"):
            open_folder(path)
