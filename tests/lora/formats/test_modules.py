"""The list of a base's layers is the published one: names, order and shapes."""

import gzip
import json
from pathlib import Path

import pytest

from ldm.lora.formats.modules import KNOWN, BaseModules, fitting_bases, known_bases
from ldm.lora.lora import LoRA
from ldm.models.stable_diffusion import build_model
from ldm.settings.model import load_model_config
from tests.lora.formats.files import random_lora

TESTS = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def published():
    with gzip.open(TESTS / "weights" / "published_names.json.gz", "rt") as file:
        return json.load(file)


@pytest.mark.parametrize("number, version", [(0, 1), (1, 2)])
class TestPublished:
    def layers(self, names):
        """(name, shape) of dense layers and convolutions, in the file's order: diffusers' own."""
        return [
            (name[: -len(".weight")], tuple(shape))
            for name, shape in names.items()
            if name.endswith(".weight") and len(shape) in (2, 4) and "embeddings" not in name
        ]

    def test_the_unet_in_diffusers_order(self, published, number, version):
        found = [(module.path, module.shape) for module in known_bases()[number].of_component("unet")]
        assert found == self.layers(published[f"diffusers_unet_sd{version}"])

    def test_the_text_encoder_in_transformers_order(self, published, number, version):
        found = [(module.path, module.shape) for module in known_bases()[number].of_component("text_encoder")]
        assert found == self.layers(published[f"transformers_text_encoder_sd{version}"])

    def test_the_canonical_names_of_the_unet(self, published, number, version):
        keys = published[f"sd{version}_ldm_ckpt_keys"]
        found = {f"{module.name}.weight": module.shape for module in known_bases()[number].of_component("unet")}
        unet = {name: shape for name, shape in keys.items() if name.startswith("model.diffusion_model.")}
        assert found == {f"{name}.weight": shape for name, shape in self.layers(unet)}


def test_a_network_of_another_size(tiny_config):
    base = BaseModules(tiny_config)
    shapes = {p.name: tuple(p.shape) for p in build_model(tiny_config).get_parameters()}
    layers = {name: shape for name, shape in shapes.items() if "first_stage" not in name and "embeddings" not in name}
    assert base.shapes == layers
    assert {module.name for module in base.norms} == {
        name[: -len(".weight")] for name in layers if len(layers[name]) == 1 and name.endswith(".weight")
    }
    assert len({module.path for module in base.modules}) == len(base.modules)


def test_the_known_ones_are_told_apart_by_their_shapes():
    for base in known_bases():
        assert fitting_bases(random_lora(base, rank=1), known_bases()) == [base]
    assert [base.config.architecture for base in known_bases()] == ["sd1", "sd2", "nano"] and len(KNOWN) == 3


def test_what_fits_two_is_told_apart_by_what_it_says():
    sd1, sd2, _ = known_bases()
    lora = random_lora(sd1, rank=1, only="attn1.to_q")
    assert fitting_bases(lora, known_bases()) == [sd1, sd2]
    assert fitting_bases(LoRA(lora.layers, {"architecture": "sd2"}), known_bases()) == [sd2]


def test_what_does_not_fit_is_said():
    sd1, sd2, nano = known_bases()
    lora = random_lora(sd1, rank=1, only="attn2.to_k")
    assert "attn2.to_k is (320, 768), there it is (320, 1024)" in sd2.mismatch(lora)
    assert "there it is (64, 96)" in nano.mismatch(lora)
    assert sd1.mismatch(lora) == ""
    assert load_model_config(sd1.config.path).architecture == "sd1"
