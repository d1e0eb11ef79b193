"""Checkpoints that PyTorch, diffusers and transformers wrote are read here, and what is written here they read."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from ldm.errors import UserError
from ldm.lora.formats import read_lora, write_lora
from ldm.models.stable_diffusion import build_model
from ldm.settings.model import load_model_config
from ldm.settings.train import TrainSettings
from ldm.tokenizer import Tokenizer
from ldm.training.trainer import train
from ldm.weights.architecture import detect_model_config, same_config
from ldm.weights.checkpoint import open_checkpoint, read_checkpoint
from ldm.weights.convert import convert
from ldm.weights.load import load_base_model
from tests.named_weights import relative_error
from tests.parity.folders import (
    draw_with_diffusers,
    draw_with_ours,
    largest_pixel_difference,
    make_pipeline,
    named_weights,
)
from tests.pipeline_cases import NEGATIVE_PROMPTS, PREDICTION_TYPES, PROMPTS, SCALE, starting_latents

TESTS = Path(__file__).parents[1]
FORMS = tuple(PREDICTION_TYPES)


def config_of(form):
    config = load_model_config(TESTS / "golden" / f"{form}.yaml")
    return dataclasses.replace(config, prediction_type=PREDICTION_TYPES[form])


@pytest.fixture(scope="module", params=FORMS)
def case(request, tmp_path_factory):
    """(configuration, weights, diffusers' pipeline) of a small model in the form of SD1.x or SD2.x."""
    ms.set_context(mode=ms.GRAPH_MODE)
    config = config_of(request.param)
    return config, named_weights(config), make_pipeline(config, tmp_path_factory.mktemp("tokenizer") / "files")


def size_flags(config, latents):
    height, width = (size * config.vae_factor for size in latents.shape[2:])
    return "--H", str(height), "--W", str(width)


def assert_loads(path, config, weights):
    model = build_model(config, random=False)
    assert load_base_model(model, path).ok
    for parameter in model.get_parameters():
        np.testing.assert_array_equal(parameter.asnumpy(), weights[parameter.name])


class TestPyTorchsFiles:
    @pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
    def test_every_tensor_as_torch_loads_it(self, tmp_path, zipped):
        base = torch.randn(6, 8)
        tensors = {
            "plain": base, "transposed": base.t(), "rows": base[2:4], "columns": base[:, 1:3], "strided": base[::2, 3],
            "half": base.half(), "bf16": base.bfloat16(), "double": base.double(), "scalar": torch.tensor(7),
            "bytes": torch.arange(5, dtype=torch.uint8), "bools": base > 0, "empty": torch.zeros(0, 3),
            "expanded": torch.ones(1, 3).expand(4, 3), "parameter": torch.nn.Parameter(base),
            "parameter with attributes": torch.nn.Parameter(base.clone()),
        }  # fmt: skip
        tensors["parameter with attributes"].tag = "kept by _rebuild_parameter_with_state"
        content = {"state_dict": tensors, "global_step": 3, "hyper_parameters": {"lr": 1e-4}}
        torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=zipped)
        theirs = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
        checkpoint = open_checkpoint(tmp_path / "x.ckpt")
        assert set(checkpoint) == set(theirs)
        for name, tensor in theirs.items():
            wanted = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()
            assert checkpoint.spec(name) == (wanted.dtype, wanted.shape)
            np.testing.assert_array_equal(checkpoint[name], wanted)

    def test_a_whole_module_is_refused(self, tmp_path):
        torch.save(torch.nn.Linear(2, 2), tmp_path / "x.pt")
        with pytest.raises(UserError, match="refers to torch.nn.modules.linear.Linear, which is unknown"):
            open_checkpoint(tmp_path / "x.pt")


class TestFoldersOfDiffusers:
    @pytest.mark.parametrize(
        "options",
        [{}, {"safe_serialization": False}, {"max_shard_size": "600KB"},
         {"max_shard_size": "600KB", "safe_serialization": False}, {"variant": "fp16"}],
        ids=str,
    )  # fmt: skip
    def test_all_weights_and_the_model_are_read(self, tmp_path, case, options):
        config, weights, pipeline = case
        pipeline.save_pretrained(tmp_path / "sd", **options)
        assert_loads(tmp_path / "sd", config, weights)
        found = detect_model_config(tmp_path / "sd")
        assert same_config(dataclasses.replace(found, image_size=config.image_size), config)

    def test_half_precision(self, tmp_path, case):
        config, weights, pipeline = case
        pipeline.save_pretrained(tmp_path / "whole")
        half = StableDiffusionPipeline.from_pretrained(tmp_path / "whole", torch_dtype=torch.bfloat16)
        half.save_pretrained(tmp_path / "sd")
        wanted = {name: torch.from_numpy(array).bfloat16().float().numpy() for name, array in weights.items()}
        assert_loads(tmp_path / "sd", config, wanted)


class TestWhatIsWrittenHere:
    @pytest.fixture
    def written(self, tmp_path, case):
        config, weights, pipeline = case
        pipeline.save_pretrained(tmp_path / "theirs")
        convert(tmp_path / "theirs", tmp_path / "x.safetensors")
        convert(tmp_path / "x.safetensors", tmp_path / "ours")
        return tmp_path

    def test_a_folder_loads_in_diffusers_bit_for_bit(self, case, written):
        _, _, pipeline = case
        ours = StableDiffusionPipeline.from_pretrained(written / "ours", local_files_only=True)
        for part in ("unet", "vae", "text_encoder"):
            found, wanted = getattr(ours, part).state_dict(), getattr(pipeline, part).state_dict()
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
        for key, value in pipeline.scheduler.config.items():
            if not key.startswith("_"):
                assert ours.scheduler.config[key] == value, key
        assert ours.vae.config.scaling_factor == pipeline.vae.config.scaling_factor

    def test_its_tokenizer_gives_the_tokens_of_this_project(self, case, written):
        config, _, _ = case
        tokenizer = StableDiffusionPipeline.from_pretrained(written / "ours", local_files_only=True).tokenizer
        texts = [*PROMPTS, "", "a photo of a cat", "  Two   SPACES ", "one " * 100, "42 étoiles"]
        if config.pad_token == "end":  # with "!" for padding, as published for SD2.x, every "!" is taken for that
            texts.append("a photo of a cat!")
        theirs = tokenizer(texts, padding="max_length", max_length=77, truncation=True).input_ids
        np.testing.assert_array_equal(theirs, Tokenizer(pad=config.pad_token).encode(texts))

    def test_the_single_file_is_read_by_diffusers(self, case, written):
        _, _, pipeline = case
        ours = StableDiffusionPipeline.from_single_file(
            str(written / "x.safetensors"), config=str(written / "theirs"), local_files_only=True
        )
        for part in ("unet", "vae"):
            found, wanted = getattr(ours, part).state_dict(), getattr(pipeline, part).state_dict()
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())

    def test_there_and_back(self, case, written):
        _, weights, _ = case
        convert(written / "ours", written / "back.safetensors", "own")
        back, _ = read_checkpoint(written / "back.safetensors")
        assert back.keys() == weights.keys()
        assert all(np.array_equal(back[name], array) for name, array in weights.items())


class TestImages:
    def test_both_sides_draw_the_same(self, tmp_path, case):
        config, _, pipeline = case
        pipeline.save_pretrained(tmp_path / "sd")
        # diffusers draws multiples of 8 pixels and knows latents of another size by their shape alone
        start = starting_latents(config)
        given = (tmp_path / "sd", PROMPTS, NEGATIVE_PROMPTS, start, 8, SCALE)
        theirs = draw_with_diffusers(*given)
        ours = draw_with_ours(*given, tmp_path / "out", *size_flags(config, start))
        assert relative_error(ours[0], theirs[0]) < 1e-3
        assert largest_pixel_difference(ours[1], theirs[1]) <= 2
        assert theirs[1].std() > 5  # images, not one colour

    def test_a_lora_that_was_trained_on_the_folder_does_the_same_in_diffusers(self, tmp_path, case):
        pytest.importorskip("peft", reason="diffusers reads LoRA files through peft")
        config, _, pipeline = case
        pipeline.save_pretrained(tmp_path / "sd")
        side, rows = config.image_size, ["dir,text"]
        (tmp_path / "data").mkdir()
        for i in range(4):
            Image.new("RGB", (side, side), (60 * i, 128, 255 - 60 * i)).save(tmp_path / "data" / f"{i}.png")
            rows.append(f"{i}.png,colour {i}")
        (tmp_path / "data" / "img_txt.csv").write_text("\n".join(rows) + "\n")
        trained = train(TrainSettings(
            pretrained_model_path=str(tmp_path / "sd"), data_path=str(tmp_path / "data"), device_target="CPU",
            output_path=str(tmp_path / "run"), use_lora=True, lora_ft_text_encoder=True, lora_alpha=8.0,
            train_batch_size=2, max_steps=6, start_learning_rate=0.05, precision="fp32", log_level="WARNING",
        ))  # fmt: skip
        lora = tmp_path / "pytorch_lora_weights.safetensors"
        write_lora(lora, read_lora(trained, config), "diffusers", config)

        start = starting_latents(config)
        given = (tmp_path / "sd", PROMPTS, NEGATIVE_PROMPTS, start, 8, SCALE)
        without = draw_with_diffusers(*given)
        ours = draw_with_ours(*given, tmp_path / "out", "--lora_ckpt_path", str(trained), *size_flags(config, start))
        shared = trained.with_name("lora.safetensors")  # in kohya's form, written by the training itself
        for file in (lora, shared):
            theirs = draw_with_diffusers(*given, file)
            assert relative_error(without[0], theirs[0]) > 0.05  # it does something
            assert relative_error(ours[0], theirs[0]) < 1e-3
            assert largest_pixel_difference(ours[1], theirs[1]) <= 2
