"""A diffusers folder in each of its published shapes is one checkpoint; any other folder is called what it is."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.weights.base_model import base_model_hash, map_base_model, open_base_model
from ldm.weights.checkpoint import write_checkpoint
from ldm.weights.diffusers_folder.reader import open_diffusers_folder
from tests.weights.file_formats.torch_files import write_torch

UNET = {
    "conv_in.weight": np.arange(4, dtype=np.float32),
    "down_blocks.0.resnets.0.norm1.bias": np.ones(3, np.float32),
}
VAE = {"quant_conv.bias": np.arange(3, dtype=np.float32)}
TEXT = {"text_model.final_layer_norm.bias": np.full(2, 5, np.float32)}
NAMES = sorted(
    f"{part}/{name}" for part, arrays in (("unet", UNET), ("vae", VAE), ("text_encoder", TEXT)) for name in arrays
)


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


def sharded(place, suffix=".safetensors", variant="", index=None):
    """UNET in two files and their index."""
    files = [f"diffusion_pytorch_model{variant}-0000{i}-of-00002{suffix}" for i in (1, 2)]
    for file, (name, array) in zip(files, UNET.items()):
        if suffix == ".safetensors":
            write_checkpoint(place / file, {name: array})
        else:
            write_torch(place / file, {name: array})
    content = {"metadata": {"total_size": 28}, "weight_map": dict(zip(UNET, files))}
    write_json(place / (index or f"diffusion_pytorch_model{suffix}.index{variant}.json"), content)


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
            lambda place: write_checkpoint(place / "diffusion_pytorch_model.non_ema.safetensors", UNET),
            lambda place: write_torch(place / "diffusion_pytorch_model.bf16.bin", UNET),
            lambda place: sharded(place, variant=".bf16"),
            lambda place: sharded(place, variant=".non_ema", index="diffusion_pytorch_model.non_ema.bin.index.json"),
        ],
    )
    def test_the_unets_files(self, tmp_path, write):
        checkpoint = open_base_model(folder(tmp_path / "sd", unet=write))
        assert sorted(checkpoint) == NAMES and checkpoint.format == "diffusers"
        for name, array in UNET.items():
            np.testing.assert_array_equal(checkpoint[f"unet/{name}"], array)
            assert checkpoint.spec(f"unet/{name}") == (array.dtype, array.shape)

    def test_the_text_encoder_as_bin(self, tmp_path):
        path = folder(tmp_path / "sd", text_encoder=lambda place: write_torch(place / "pytorch_model.bin", TEXT))
        assert sorted(open_base_model(path)) == NAMES

    def test_full_precision_comes_first_then_safetensors(self, tmp_path):
        def write_all(place):
            for number, name in enumerate(("fp16.safetensors", "fp16.bin", "bin", "safetensors")):
                write = write_checkpoint if name.endswith("safetensors") else write_torch
                write(place / f"diffusion_pytorch_model.{name}", {"conv_in.weight": np.full(1, number, np.float32)})

        path = folder(tmp_path / "sd", unet=write_all)
        for taken in (3, 2, 0, 1):
            checkpoint = open_diffusers_folder(path)
            assert checkpoint["unet/conv_in.weight"] == taken
            checkpoint.files[0].unlink()
        with pytest.raises(UserError, match="holds no weights .*but nothing"):
            open_diffusers_folder(path)

    @pytest.mark.parametrize("variant", ["non_ema", "bf16", "fp16"])
    def test_a_variant_is_taken_where_there_is_nothing_else_and_said(self, tmp_path, variant):
        def write(place):
            write_checkpoint(place / f"diffusion_pytorch_model.{variant}.safetensors", UNET)

        (note,) = open_diffusers_folder(folder(tmp_path / "sd", unet=write)).notes
        assert note == (
            f"unet/diffusion_pytorch_model.{variant}.safetensors is used, the variant {variant}, as there is no file "
            "without one"
        )

    def test_full_precision_goes_before_half_and_averages_before_what_they_are_of(self, tmp_path):
        def write(place):
            for number, variant in enumerate((".fp16", "", ".bf16", ".non_ema")):
                arrays = {"conv_in.weight": np.full(1, number, np.float32)}
                write_checkpoint(place / f"diffusion_pytorch_model{variant}.safetensors", arrays)

        path = folder(tmp_path / "sd", unet=write)
        (note,) = open_diffusers_folder(path).notes
        assert "the moving averages (EMA), and not diffusion_pytorch_model.non_ema.safetensors beside it" in note
        for taken in (1, 0, 2, 3):
            checkpoint = open_diffusers_folder(path)
            assert checkpoint["unet/conv_in.weight"] == taken
            checkpoint.files[0].unlink()

    def test_asking_for_averages_takes_what_they_are_in(self, tmp_path):
        def write(place):
            write_checkpoint(place / "diffusion_pytorch_model.non_ema.safetensors", UNET)

        path = folder(tmp_path / "sd", unet=write)
        with pytest.raises(UserError, match="its file is non_ema: leave out the flag that asks for EMA"):
            map_base_model(open_diffusers_folder(path), ema=True)
        write_checkpoint(path / "unet" / "diffusion_pytorch_model.safetensors", UNET)
        assert map_base_model(open_diffusers_folder(path), ema=True) == map_base_model(open_diffusers_folder(path))

    def test_one_component_alone(self, tmp_path):
        path = folder(tmp_path / "sd") / "unet"
        write_json(path / "config.json", {"_class_name": "UNet2DConditionModel"})
        checkpoint = open_base_model(path)
        assert sorted(checkpoint) == sorted(f"unet/{name}" for name in UNET)
        assert set(map_base_model(checkpoint).sources) == {
            "model.diffusion_model.input_blocks.0.0.weight",
            "model.diffusion_model.input_blocks.1.0.in_layers.0.bias",
        }

    def test_the_prediction_type_comes_from_the_scheduler(self, tmp_path):
        path = folder(tmp_path / "sd")
        assert open_diffusers_folder(path).metadata == {}
        write_json(path / "scheduler" / "scheduler_config.json", {"prediction_type": "v_prediction"})
        assert open_diffusers_folder(path).metadata == {"prediction_type": "v_prediction"}

    def test_its_identity_is_that_of_all_its_weights(self, tmp_path):
        a, b, c = (folder(tmp_path / name) for name in "abc")
        write_checkpoint(c / "vae" / "diffusion_pytorch_model.safetensors", {"quant_conv.bias": np.zeros(3)})
        assert base_model_hash(a) == base_model_hash(b) != base_model_hash(c)


class TestTheHubsCache:
    """models--<owner>--<name>/ with refs/, blobs/ and snapshots/, whose files are links into blobs/."""

    def cached(self, place, *revisions, main=None):
        for revision in revisions:
            path = folder(place / "snapshots" / revision)
            for file in path.rglob("*.safetensors"):
                blob = place / "blobs" / f"{revision}{file.parent.name}"
                blob.parent.mkdir(exist_ok=True)
                file.rename(blob)
                file.symlink_to(f"../../../blobs/{blob.name}")
        (place / "refs").mkdir(parents=True)
        if main is not None:
            (place / "refs" / "main").write_text(main)
        return place

    def test_the_snapshot_of_the_main_branch(self, tmp_path):
        path = self.cached(tmp_path / "models--runwayml--sd", "aaa", "bbb", main="bbb\n")
        checkpoint = open_base_model(path)
        assert checkpoint.path == path / "snapshots" / "bbb" and sorted(checkpoint) == NAMES
        assert base_model_hash(path) == base_model_hash(path / "snapshots" / "bbb")

    @pytest.mark.parametrize("main", [None, "ccc", "../../elsewhere", ""])
    def test_else_the_only_one(self, tmp_path, main):
        path = self.cached(tmp_path / "models--runwayml--sd", "aaa", main=main)
        assert open_base_model(path).path == path / "snapshots" / "aaa"

    def test_of_several_one_is_asked_for(self, tmp_path):
        path = self.cached(tmp_path / "models--runwayml--sd", "aaa", "bbb", main="ccc")
        with pytest.raises(UserError, match="2 snapshots, and refs/main names none .*/snapshots, aaa, bbb"):
            open_base_model(path)

    def test_without_a_snapshot(self, tmp_path):
        path = self.cached(tmp_path / "models--runwayml--sd")
        (path / "snapshots").mkdir()
        with pytest.raises(UserError, match="with an empty snapshots/: download it again"):
            open_base_model(path)

    def test_a_download_that_stopped(self, tmp_path):
        path = self.cached(tmp_path / "models--runwayml--sd", "aaa", main="aaa")
        (path / "blobs" / "aaaunet").unlink()
        with pytest.raises(UserError, match="unet/diffusion_pytorch_model.safetensors is a link .*Fetch it again"):
            open_base_model(path)

    def test_the_whole_cache(self, tmp_path):
        self.cached(tmp_path / "models--runwayml--sd", "aaa", main="aaa")
        with pytest.raises(UserError, match="is the cache of the Hugging Face hub.*models--runwayml--sd"):
            open_base_model(tmp_path)


class TestOtherFolders:
    @pytest.mark.parametrize(
        "files, words",
        [
            ({}, "is an empty folder: a diffusers folder has unet/"),
            ({"notes.txt": "x"}, "holds no checkpoint"),
            ({"README.md": "# A model"}, "holds no checkpoint, but README.md: a diffusers folder has unet/"),
            (
                {
                    "unet/diffusion_pytorch_model.safetensors": "version https://git-lfs.github.com/spec/v1\noid sha256:0"  # noqa: E501
                },
                "is a git-lfs pointer, not the file itself",
            ),
            ({"unet/diffusion_pytorch_model.fp8.safetensors": "x"}, "holds no weights .*but .*fp8.safetensors"),
            ({"model_index.json": '{"a": 1, "a": 2}'}, 'model_index.json is not valid JSON: "a" is given twice'),
            ({"model_index.json": "9" * 5000 + "}"}, "model_index.json is not valid JSON"),
            ({"model.safetensors": "x"}, "no diffusers folder .*name the file, such as .*model.safetensors"),
            ({"pytorch_lora_weights.safetensors": "x"}, "holds a LoRA"),
            ({"adapter_config.json": "{}", "adapter_model.safetensors": "x"}, "holds a LoRA"),
            ({"model_index.json": '{"_class_name": "StableDiffusionXLPipeline"}'}, "is an SDXL folder"),
            ({"text_encoder_2/config.json": "{}"}, "is an SDXL folder"),
            ({"model_index.json": '{"_class_name": "StableDiffusion3Pipeline"}', "transformer/x": ""}, "transformer"),
            (
                {
                    "model_index.json": '{"_class_name": "StableDiffusion3Pipeline"}',
                    "transformer/x": "",
                    "text_encoder_2/x": "",
                    "text_encoder/x": "",
                },
                r"diffusion transformer's folder \(StableDiffusion3Pipeline\)",
            ),
            ({"text_encoder_2/x": "", "unet/x": ""}, "is an SDXL folder"),
            ({"model_index.json": '{"_class_name": "StableDiffusionXLPipeline"}', "unet/x": ""}, "is an SDXL folder"),
            ({"config.json": '{"architectures": 5, "_class_name": ["UNet2DConditionModel"]}'}, "holds no checkpoint"),
            ({"model_index.json": "[" * 100_000}, "model_index.json .*is not valid JSON"),
            ({"model_index.json": "<html>"}, "model_index.json .*is not valid JSON"),
            ({"model_index.json": "[]"}, "model_index.json holds list"),
            ({"unet/config.json": "{}"}, "unet holds no weights .*but config.json"),
            ({"unet/diffusion_pytorch_model.safetensors": "<html>401"}, "is an HTML page"),
            ({"unet/diffusion_pytorch_model.safetensors.index.json": "{}"}, "has no weight_map"),
            (
                {"unet/diffusion_pytorch_model.safetensors.index.json": '{"weight_map": {"a": "../x"}}'},
                "names '../x', which is no file beside it",
            ),
            (
                {"unet/diffusion_pytorch_model.safetensors.index.json": '{"weight_map": {"a": "gone.safetensors"}}'},
                "gone.safetensors does not exist",
            ),
        ],
    )
    def test_is_called_what_it_is(self, tmp_path, files, words):
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=words) as caught:
            open_base_model(tmp_path)
        assert "\n" not in str(caught.value)

    def test_a_shard_with_other_arrays_than_its_index_says(self, tmp_path):
        path = folder(tmp_path / "sd", unet=sharded)
        write_checkpoint(path / "unet" / "diffusion_pytorch_model-00002-of-00002.safetensors", {"x": np.zeros(1)})
        with pytest.raises(UserError, match="do not agree on 2 arrays, such as down_blocks.0"):
            open_diffusers_folder(path)

    def test_a_component_of_a_malicious_pickle(self, tmp_path):
        from tests.weights.file_formats.torch_files import Call

        evil = {"w": Call("os", "system", ("true",))}
        path = folder(tmp_path / "sd", unet=lambda place: write_torch(place / "diffusion_pytorch_model.bin", evil))
        with pytest.raises(UserError, match="would execute os.system"):
            open_diffusers_folder(path)

    @pytest.mark.parametrize("part", ["", "unet", "tokenizer"])
    def test_a_folder_of_another_user(self, unprivileged, part):
        path = folder(unprivileged / "sd")
        write_json(path / "tokenizer" / "added_tokens.json", {})
        closed = path / part
        closed.chmod(0)
        try:
            with pytest.raises(UserError, match=f"{closed}.*Permission denied: give this user the permission"):
                open_base_model(path)
        finally:
            closed.chmod(0o700)

    @pytest.mark.parametrize(
        "name", ["model_index.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json",
                 "unet/diffusion_pytorch_model.safetensors"]
    )  # fmt: skip
    @pytest.mark.parametrize("kind", ["a pipe", "a folder"])
    def test_something_else_in_the_place_of_a_file(self, tmp_path, name, kind):
        path = folder(tmp_path / "sd") / name
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        os.mkfifo(path) if kind == "a pipe" else path.mkdir()
        with pytest.raises(UserError, match=f"{path} is {kind}"):
            open_base_model(tmp_path / "sd")
