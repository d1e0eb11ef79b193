"""The networks that score images, each with its preprocessing and the identity of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable

import numpy as np
from mindspore import nn
from PIL import Image

from ldm.files.inputs import content_hash
from ldm.files.paths import ROOT
from ldm.metrics.image_files import ImageBatches
from ldm.metrics.preprocessing import clip_input, inception_input, nano_input
from ldm.models.clip import CLIP_MODELS, ImageFeatures, TextFeatures
from ldm.models.inception import FEATURES, SIZE, InceptionFeatures
from ldm.runtime.batches import run_in_batches
from ldm.tokenizer import Tokenizer
from ldm.weights.checkpoint import open_checkpoint
from ldm.weights.clip import ClipWeights, build_clip, read_clip
from ldm.weights.inception import PUBLISHED, load_inception, read_inception
from ldm.weights.names.tables import TEXT_PREFIX

NANO = ROOT / "models" / "nano"


@dataclass(frozen=True)
class ImageNetwork:
    """A network that turns images into features.

    Attributes:
        name: Which network and weights.
        sha256: Hash of the weights' file. For the nano CLIP, hash of its arrays.
        preprocessing: A description of the preprocessing.
        dimensions: Number of features.
        is_nano: Whether it is this project's own small network, with which no other program scores.
        prepare: Turns an RGB image into the network's input (3, S, S).
        image_encoder: Turns inputs (N, 3, S, S) into features (N, D).
    """

    name: str
    sha256: str
    preprocessing: str
    dimensions: int
    is_nano: bool
    prepare: Callable[[Image.Image], np.ndarray]
    image_encoder: nn.Cell

    @property
    def identity(self) -> str:
        """The description that two scores must share to be comparable."""
        return f"{self.name}, sha256 {self.sha256[:16]}; {self.preprocessing}"

    def encode_batches(self, batches: ImageBatches) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (indices (n,), features (n, D) float32) for each batch."""
        for indices, images in batches:
            if len(images):
                yield indices, run_in_batches(self.image_encoder, images, batches.batch_size)
            else:
                yield indices, np.zeros((0, self.dimensions), np.float32)

    def encode_pixels(self, pixels: np.ndarray, batch_size: int = 32) -> np.ndarray:
        """Return features (N, D) of images in memory, (N, H, W, 3) uint8."""
        prepared = np.stack([self.prepare(Image.fromarray(image)) for image in pixels])
        return run_in_batches(self.image_encoder, prepared, min(batch_size, len(prepared)))


@dataclass(frozen=True)
class ClipNetwork(ImageNetwork):
    """A network that turns images and texts into unit vectors of the same space.

    Attributes:
        text_encoder: Turns tokens (N, 77) into features (N, D).
    """

    text_encoder: nn.Cell

    def encode_texts(self, texts: Sequence[str], batch_size: int = 32) -> np.ndarray:
        """Return unit vectors (N, D). Texts of more than 77 tokens are cut and keep their end token."""
        distinct = list(dict.fromkeys(texts))
        tokens = Tokenizer().encode(distinct)
        features = run_in_batches(self.text_encoder, tokens, min(batch_size, len(distinct)))
        index = {text: i for i, text in enumerate(distinct)}
        return features[[index[text] for text in texts]]


def inception(path: str | Path) -> ImageNetwork:
    """Load the FID's Inception from a PyTorch or MindSpore file. Raises UserError if it is another file."""
    weights = read_inception(path)
    network = InceptionFeatures()
    load_inception(network, weights)
    network.set_train(False)
    sha256 = content_hash(path)
    published = PUBLISHED.get(sha256[:8])
    source = f"{published}, as published" if published else f"{Path(path).name}, not one of the published files"
    name = f"Inception 2015-12-05 ({source})"
    preprocessing = f"RGB / 255, bilinear to {SIZE}x{SIZE} without smoothing, 2x - 1 (pytorch-fid's)"
    return ImageNetwork(name, sha256, preprocessing, FEATURES, False, partial(inception_input, size=SIZE), network)


def clip(
    path: str | Path, preprocessing: str = "openai", config: str | Path | None = None, model_name: str | None = None
) -> ClipNetwork:
    """Load a CLIP from a Hugging Face folder or a file. Arguments and errors as in ldm.weights.clip.read_clip."""
    weights = read_clip(path, config, model_name)
    size = weights.arguments["vision"]["image_size"]
    descriptions = {
        "openai": f"openai: RGB, shorter side to {size} bicubic, centre crop, CLIP's mean and standard deviation",
        "squash": f"squash: RGB, {size}x{size} bicubic whatever the shape, CLIP's mean and standard deviation",
    }
    prepare = partial(clip_input, size=size, preprocessing=preprocessing)
    network, dimensions = build_clip(weights), weights.arguments["projection_dim"]
    encoders = ImageFeatures(network), TextFeatures(network)
    sha256, description = content_hash(weights.path), descriptions[preprocessing]
    return ClipNetwork(weights.name, sha256, description, dimensions, False, prepare, *encoders)


def nano_clip(folder: Path = NANO) -> ClipNetwork:
    """Load the nano CLIP.

    Its image encoder and projections are in clip.safetensors. Its text encoder is that of the nano model.
    """
    arrays = dict(open_checkpoint(folder / "clip.safetensors"))
    base_model = open_checkpoint(folder / "nano.safetensors")
    prefix = TEXT_PREFIX.removesuffix("text_model.")
    arrays.update({name[len(prefix) :]: base_model[name] for name in base_model if name.startswith(prefix)})
    weights = ClipWeights(arrays, CLIP_MODELS["nano"], "nano", folder / "clip.safetensors")
    size = weights.arguments["vision"]["image_size"]
    description = f"RGB, {size}x{size} bicubic whatever the shape, [-1, 1]"
    network, dimensions = build_clip(weights), weights.arguments["projection_dim"]
    encoders = ImageFeatures(network), TextFeatures(network)
    prepare = partial(nano_input, size=size)
    return ClipNetwork("the nano CLIP", _hash(arrays), description, dimensions, True, prepare, *encoders)


def _hash(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()
