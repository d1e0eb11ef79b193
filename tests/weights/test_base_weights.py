"""Reading weights of a base model again after it was loaded."""

import os

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.generation.loading import load_model
from ldm.models.stable_diffusion import build_model
from ldm.weights.base_weights import BaseWeights
from ldm.weights.checkpoint import open_checkpoint, write_checkpoint
from ldm.weights.convert import convert
from ldm.weights.names import component_of
from ldm.weights.names.compvis import ema_name
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def base(tiny_config, tmp_path_factory):
    """A base model of random weights in one file."""
    np.random.seed(0)
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    arrays = {p.name: p.asnumpy() for p in build_model(tiny_config).get_parameters()}
    write_checkpoint(path, arrays)
    return path


def assert_read_as_loaded(model, weights):
    parameters = {p.name: p for p in model.get_parameters() if component_of(p.name) in ("unet", "text_encoder")}
    read = weights.open({name: tuple(parameter.shape) for name, parameter in parameters.items()})
    for name, parameter in parameters.items():
        array = read(name)
        assert array.dtype == np.float32 and array.shape == parameter.shape
        assert array.tobytes() == parameter.asnumpy().tobytes(), name


@pytest.mark.parametrize(
    ("name", "format", "dtype"),
    [
        ("base.ckpt", "mindone", "keep"),
        ("half.safetensors", "ldm", "fp16"),
        ("folder", "diffusers", "fp32"),
    ],
)
def test_the_weights_are_those_that_were_loaded_from_every_form(tiny_config, base, tmp_path, name, format, dtype):
    path = tmp_path / name
    convert(base, path, format, dtype, model_config=ROOT / "tests" / "tiny.yaml")
    assert_read_as_loaded(load_model(tiny_config, path), BaseWeights(path))


def test_moving_averages_are_read_where_they_were_loaded(tiny_config, base, tmp_path):
    weights = dict(open_checkpoint(base))
    averages = {ema_name(name): array + 1 for name, array in weights.items() if name.startswith("model.")}
    path = tmp_path / "averages.safetensors"
    write_checkpoint(path, {**weights, **averages})
    assert_read_as_loaded(load_model(tiny_config, path, ema=True), BaseWeights(path, ema=True))


def test_the_unet_is_read_from_the_checkpoint_that_replaces_it(tiny_config, base, tmp_path):
    np.random.seed(1)
    arrays = {p.name: p.asnumpy() for p in build_model(tiny_config).get_parameters() if component_of(p.name) == "unet"}
    unet = tmp_path / "unet.safetensors"
    write_checkpoint(unet, arrays)
    assert_read_as_loaded(load_model(tiny_config, base, unet=unet), BaseWeights(base, unet=unet))


def test_a_file_that_changed_or_is_gone_is_named(base, tmp_path):
    path = tmp_path / "copy.safetensors"
    path.write_bytes(base.read_bytes())
    weights = BaseWeights(path)
    weights.open({})
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(UserError, match="copy.safetensors has changed.*load the base model again"):
        weights.open({})
    path.unlink()
    with pytest.raises(UserError, match="copy.safetensors has changed"):
        weights.open({})
