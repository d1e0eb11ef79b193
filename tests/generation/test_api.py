"""The Python example of the README: a base model, a LoRA, an image, in graph mode on the nano model."""

from __future__ import annotations

import re

import mindspore as ms
import numpy as np
import pytest
from PIL import Image

from ldm.errors import UserError
from ldm.generation.pipeline import Pipeline
from ldm.lora.formats import read_lora, write_lora
from ldm.lora.inject import get_lora, inject_lora
from ldm.lora.spec import LoRASpec
from ldm.models.stable_diffusion import build_model
from ldm.runtime import device
from ldm.settings.model import load_model_config
from ldm.weights.names import CanonicalArrays
from tests.conftest import ROOT

NANO = ROOT / "models" / "nano" / "nano.safetensors"


@pytest.fixture
def fresh_runtime(graph_mode, monkeypatch):
    """Nobody has set up MindSpore, and it is in its own default mode."""
    monkeypatch.setattr(device, "_current", None)
    ms.set_context(mode=ms.PYNATIVE_MODE)


def readme_example() -> str:
    """Returns the README's block of Python code that generates an image."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (example,) = (block for block in blocks if "Pipeline.from_checkpoint" in block)
    return example


@pytest.fixture
def example(fresh_runtime, tmp_path, monkeypatch):
    """The README's example, run with fewer steps in a folder with a LoRA: its variables."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(ROOT / "models")
    example = readme_example()
    config = load_model_config(ROOT / "configs" / "nano.yaml")
    model = build_model(config, random=False)
    inject_lora(model, LoRASpec(rank=2))
    for parameter in model.trainable_params():
        values = 0.2 * np.random.standard_normal(parameter.shape)
        parameter.set_data(ms.Tensor(values.astype(np.float32)))
    (lora_path,) = re.findall(r'load_lora\("(.*?)"', example)
    (tmp_path / lora_path).parent.mkdir(parents=True)
    write_lora(tmp_path / lora_path, get_lora(model, config))
    variables = {"lora_path": lora_path}
    exec(re.sub(r"num_inference_steps=\d+", "num_inference_steps=2", example), variables)
    return variables


def test_the_example_of_the_readme_saves_an_image_and_switches_without_compiling_or_loading_the_model(
    example, tmp_path, monkeypatch
):
    pipe, image = example["pipe"], example["image"]
    assert image.size == (pipe.config.image_size, pipe.config.image_size) and np.asarray(image).std() > 1
    (image_path,) = re.findall(r'\.save\("(.*?)"\)', readme_example())
    with Image.open(tmp_path / image_path) as saved:
        np.testing.assert_array_equal(np.asarray(saved), np.asarray(image))
    assert (np.asarray(example["less"]) != np.asarray(image)).any()
    assert ms.get_context("mode") == ms.GRAPH_MODE

    networks = pipe.unet, pipe.text_encoder, pipe.decoder
    compiled = [set(network.compile_cache) for network in networks]
    assert [len(graphs) for graphs in compiled] == [1, 1, 1]
    pipe.set_loras([(example["lora_path"], 0.4)])
    read, read_one = [], CanonicalArrays.__getitem__
    monkeypatch.setattr(
        CanonicalArrays, "__getitem__", lambda arrays, name: read.append(name) or read_one(arrays, name)
    )
    pipe.set_loras([(example["lora_path"], 1.0)])
    of_lora = [f"{layer}.weight" for layer in read_lora(example["lora_path"]).layers]
    # Each weight that the LoRA changes once, and no other.
    assert sorted(read) == sorted(of_lora) and len(of_lora) < len(pipe.model.parameters_dict()) / 2
    again = pipe("a red apple", num_inference_steps=2, seed=42, progress=False).images[0]
    np.testing.assert_array_equal(np.asarray(again), np.asarray(image))
    assert [set(network.compile_cache) for network in networks] == compiled


def test_a_pipeline_without_a_checkpoint_is_the_nano_model(monkeypatch):
    loaded = []

    def load_model(config, checkpoint, **options):
        loaded.append((config.architecture, checkpoint.resolve()))
        return build_model(config, random=False)

    monkeypatch.setattr("ldm.generation.pipeline.load_model", load_model)
    assert Pipeline.from_checkpoint().config.architecture == "nano"
    assert loaded == [("nano", NANO)]


def test_a_checkpoint_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(UserError, match="none.ckpt does not exist"):
        Pipeline.from_checkpoint(tmp_path / "none.ckpt")
