"""Scores against pytorch-fid and transformers: network features, preprocessing, the Fréchet distance, CLIP."""

from __future__ import annotations

import functools
import importlib.util

import mindspore as ms
import numpy as np
import pytest
import torch
from PIL import Image

from ldm.metrics.frechet import (
    FeatureStatistics,
    frechet_distance,
    frechet_of_features,
    read_statistics,
    write_statistics,
)
from ldm.metrics.networks import clip, inception
from ldm.metrics.preprocessing import clip_input, inception_input
from ldm.models.clip import CLIPModel
from ldm.tokenizer import Tokenizer
from tests.metrics.named_networks import CLIP_ARGUMENTS, clip_weights, inception_weights
from tests.metrics.odd_images import open_plain, write_odd_images
from tests.parity.fid_reference import pytorch_fid, reference_clip, reference_inception, reference_input

needs_fid = pytest.mark.skipif(importlib.util.find_spec("pytorch_fid") is None, reason="pytorch-fid is not installed")


@needs_fid
def test_every_kind_of_image_is_prepared_as_pytorch_fid_does(tmp_path):
    differences = {
        name: np.abs(inception_input(open_plain(path)) - reference_input(path)).max()
        for name, path in write_odd_images(tmp_path).items()
    }
    assert max(differences.values()) < 1e-6, differences  # of 2; a grey level is 8e-3


@needs_fid
def test_features_equal_pytorch_fids_with_the_same_weights(tmp_path):
    ms.set_context(mode=ms.GRAPH_MODE)
    arrays = inception_weights()
    network = reference_inception(arrays)
    # The published file is in the form of before 1.6.
    torch.save(
        {name: torch.from_numpy(array) for name, array in arrays.items()},
        tmp_path / "inception.pth",
        _use_new_zipfile_serialization=False,
    )
    ours = inception(tmp_path / "inception.pth")
    path = write_odd_images(tmp_path)["odd.png"]
    with torch.no_grad():
        theirs = network(torch.from_numpy(np.asarray(open_plain(path), np.float32) / 255).permute(2, 0, 1)[None])[0]
    made = ours.image_encoder(ms.Tensor(ours.prepare(open_plain(path))[None])).asnumpy()
    theirs = theirs[:, :, 0, 0].numpy()
    assert theirs.std() > 0.1
    np.testing.assert_allclose(made, theirs, atol=1e-4)


@needs_fid
@pytest.mark.parametrize("n, m, d", [(300, 200, 40), (64, 64, 64), (30, 50, 64), (12, 9, 100), (2, 3, 5)])
def test_frechet_distance_equals_pytorch_fids(n, m, d):
    fid_score, _ = pytorch_fid()
    rng = np.random.default_rng(n)
    scale = np.geomspace(1, 0.05, d)
    x, y = np.abs(rng.normal(0.3, 1, (n, d)) * scale), np.abs(rng.normal(0.5, 1.3, (m, d)) * scale)
    (mu1, sigma1), (mu2, sigma2) = ((f.mean(0), np.cov(f, rowvar=False)) for f in (x, y))
    theirs = fid_score.calculate_frechet_distance(mu1, sigma1, mu2, sigma2)
    # A singular product's square root is known to it to eight digits only.
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(theirs, rel=1e-6)
    assert frechet_of_features(x, y) == pytest.approx(theirs, rel=1e-6)


@needs_fid
def test_statistics_go_both_ways(tmp_path):
    fid_score, _ = pytorch_fid()
    features = np.random.default_rng(0).normal(size=(50, 8))
    statistics = FeatureStatistics()
    statistics.add(features)
    write_statistics(tmp_path / "ours.npz", statistics, "a network")
    mean, covariance = fid_score.compute_statistics_of_path(str(tmp_path / "ours.npz"), None, 1, 8, "cpu")
    np.testing.assert_allclose(mean, features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(features, rowvar=False), rtol=1e-12)
    np.savez_compressed(tmp_path / "theirs.npz", mu=mean, sigma=covariance)
    assert (read_statistics(tmp_path / "theirs.npz").covariance == covariance).all()


@functools.cache
def shapes() -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in CLIPModel(**CLIP_ARGUMENTS).parameters_dict().items()}


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_clip_equals_transformers(tmp_path, activation):
    ms.set_context(mode=ms.GRAPH_MODE)
    reference = reference_clip(clip_weights(shapes()), activation)
    reference.save_pretrained(tmp_path)
    network = clip(tmp_path)
    texts = ["a cat", "a photograph of an astronaut riding a horse " * 12, ""]
    images = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)
    tokens = Tokenizer().encode(texts)
    with torch.no_grad():
        found = reference(input_ids=torch.from_numpy(tokens).long(), pixel_values=torch.from_numpy(images))
    np.testing.assert_allclose(network.encode_texts(texts), found.text_embeds.numpy(), atol=2e-6)
    np.testing.assert_allclose(
        network.image_encoder(ms.Tensor(images)).asnumpy(), found.image_embeds.numpy(), atol=2e-6
    )


@needs_fid
@pytest.mark.parametrize("name", ["odd.png", "tall.png", "large.png", "grey.png", "palette.png", "alpha.png"])
def test_clip_preprocessing_equals_openais(tmp_path, name):
    """OpenAI's own: Resize, CenterCrop, RGB, ToTensor, Normalize of torchvision; RGB is made first here, as Pillow
    cannot interpolate a palette."""
    pytorch_fid()
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

    theirs = Compose(
        [
            Resize(224, interpolation=InterpolationMode.BICUBIC),
            CenterCrop(224),
            ToTensor(),
            Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ]
    )
    image = Image.open(write_odd_images(tmp_path)[name]).convert("RGB")
    np.testing.assert_allclose(clip_input(image), theirs(image).numpy(), atol=2e-6)
