"""The three networks put together: parameter names and shapes are those of the published single files."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
from mindspore.common.initializer import initializer
from mindspore.nn.utils import no_init_parameters

from ldm.models import initial_values
from ldm.models.stable_diffusion import build_model
from ldm.settings.model import load_model_config
from tests.conftest import ROOT
from tests.weight_names import to_canonical


@pytest.fixture
def without_weights(monkeypatch):
    """Full-size networks of shapes alone: their weights would be 4 GB."""
    monkeypatch.setattr(initial_values, "drawn", lambda shape, draw: initializer("zeros", shape))
    with no_init_parameters():
        yield


@pytest.mark.parametrize(
    "path, published",
    [
        ("configs/v1-inference.yaml", "sd1_ldm_ckpt_keys"),
        ("configs/v2-inference.yaml", "sd2_ldm_ckpt_keys"),
        ("configs/v2-vpred-inference.yaml", "sd2_ldm_ckpt_keys"),
    ],
)
def test_names_and_shapes_are_the_published_ones(without_weights, path, published):
    names = json.loads(gzip.decompress((ROOT / "tests/weights/published_names.json.gz").read_bytes()))[published]
    canonical = to_canonical({name: np.broadcast_to(np.float32(0), shape) for name, shape in names.items()})
    ours = build_model(load_model_config(ROOT / path)).parameters_dict()
    assert {name: tuple(p.shape) for name, p in ours.items()} == {name: a.shape for name, a in canonical.items()}


def test_a_new_model_is_frozen(tiny_model):
    assert not [parameter.name for parameter in tiny_model.get_parameters() if parameter.requires_grad]
    assert not list(tiny_model.trainable_params())


def test_random_weights_follow_numpys_seed(tiny_config):
    def weights():
        np.random.seed(3)
        return {name: parameter.asnumpy() for name, parameter in build_model(tiny_config).parameters_dict().items()}

    first, second = weights(), weights()
    assert all(np.array_equal(first[name], second[name]) for name in first)
