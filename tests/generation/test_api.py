"""The Python example of the README: a base model, a LoRA, an image, in graph mode on the nano model."""

from __future__ import annotations

import re

import mindspore as ms
import numpy as np
import pytest
from PIL import Image

from ldm.errors import UserError
from ldm.generation.pipeline import Pipeline
from ldm.lora.formats import write_lora
from ldm.lora.inject import get_lora, inject_lora
from ldm.lora.spec import LoRASpec
from ldm.models.stable_diffusion import build_model
from ldm.runtime import device
from ldm.settings.model import load_model_config
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


def test_the_example_of_the_readme_saves_an_image(fresh_runtime, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(ROOT / "models")
    example = readme_example()
    (lora_path,) = re.findall(r'load_lora\("(.*?)"', example)
    (tmp_path / lora_path).parent.mkdir(parents=True)
    config = load_model_config(ROOT / "configs" / "nano.yaml")
    model = build_model(config, random=False)
    inject_lora(model, LoRASpec(rank=2))
    write_lora(tmp_path / lora_path, get_lora(model, config))

    exec(re.sub(r"num_inference_steps=\d+", "num_inference_steps=2", example), {})

    (image_path,) = re.findall(r'\.save\("(.*?)"\)', example)
    with Image.open(tmp_path / image_path) as image:
        assert image.size == (config.image_size, config.image_size)
        assert np.asarray(image).std() > 1
    assert ms.get_context("mode") == ms.GRAPH_MODE


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
