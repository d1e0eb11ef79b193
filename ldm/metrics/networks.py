"""The networks that score images, each with the preprocessing it wants and a name that says which weights it has."""

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

from ldm.files.paths import ROOT
from ldm.metrics.images import ImageBatches, clip_input, inception_input, nano_input
from ldm.models.clip import FORMS, CLIPModel, ImageFeatures, TextFeatures
from ldm.models.inception import FEATURES, SIZE, InceptionFeatures
from ldm.runtime.batches import run_in_batches
from ldm.tokenizer import Tokenizer
from ldm.weights.checkpoint import content_hash, open_checkpoint
from ldm.weights.clip import ClipWeights, build_clip, read_clip
from ldm.weights.inception import PUBLISHED, load_inception, read_inception
from ldm.weights.names.tables import TEXT_PREFIX

NANO = ROOT / "models" / "nano"


@dataclass(frozen=True)
class ImageNetwork:
    """Images -> feature vectors.

    name, sha256: which weights; the hash is that of the file, of the embedded network that of its arrays.
    preprocessing: in words. prepare: RGB image -> (3, S, S). embedded: whether it is the one that comes with this
    project, which no other program scores with.
    """

    name: str
    sha256: str
    preprocessing: str
    dimensions: int
    embedded: bool
    prepare: Callable[[Image.Image], np.ndarray]
    image_features: nn.Cell

    @property
    def identity(self) -> str:
        """What two scores must share to be comparable."""
        return f"{self.name}, sha256 {self.sha256[:16]}; {self.preprocessing}"

    def features(self, batches: ImageBatches) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(places (n,), features (n, D) float32), batch after batch; see ImageBatches."""
        for places, images in batches:
            yield places, run_in_batches(self.image_features, images, batches.batch_size)

    def of_pixels(self, pixels: np.ndarray, batch_size: int = 32) -> np.ndarray:
        """Features (N, D) of images in memory, (N, H, W, 3) uint8."""
        prepared = np.stack([self.prepare(Image.fromarray(image)) for image in pixels])
        return run_in_batches(self.image_features, prepared, min(batch_size, len(prepared)))


@dataclass(frozen=True)
class ClipNetwork(ImageNetwork):
    """Images and texts -> unit vectors of one space."""

    text_features: nn.Cell

    def of_texts(self, texts: Sequence[str], batch_size: int = 32) -> np.ndarray:
        """Unit vectors (N, D). A text of more than 77 tokens is cut and keeps its end token."""
        distinct = list(dict.fromkeys(texts))
        tokens = Tokenizer().encode(distinct)
        found = run_in_batches(self.text_features, tokens, min(batch_size, len(distinct)))
        place = {text: i for i, text in enumerate(distinct)}
        return found[[place[text] for text in texts]]


def inception(path: str | Path) -> ImageNetwork:
    """The FID's Inception from the PyTorch or MindSpore file at `path`. Raises UserError if it is another file."""
    weights = read_inception(path)
    network = InceptionFeatures()
    load_inception(network, weights)
    network.set_train(False)
    sha256 = content_hash(path)
    published = PUBLISHED.get(sha256[:8])
    name = "Inception 2015-12-05" + (
        f" ({published}, as published)" if published else f" ({Path(path).name}, not one of the published files)"
    )
    return ImageNetwork(
        name,
        sha256,
        f"RGB / 255, bilinear to {SIZE}x{SIZE} without smoothing, 2x - 1 (pytorch-fid's)",
        FEATURES,
        False,
        partial(inception_input, size=SIZE),
        network,
    )


def clip(
    path: str | Path, preprocessing: str = "openai", config: str | Path | None = None, model_name: str | None = None
) -> ClipNetwork:
    """A CLIP from a Hugging Face folder or a file: see ldm.weights.clip.read_clip, which raises UserError."""
    weights = read_clip(path, config, model_name)
    size = weights.form["vision"]["image_size"]
    words = {
        "openai": f"openai: RGB, shorter side to {size} bicubic, centre crop, CLIP's mean and deviation",
        "squash": f"squash: RGB, {size}x{size} bicubic whatever the shape, CLIP's mean and deviation",
    }
    prepare = partial(clip_input, size=size, how=preprocessing)
    network = build_clip(weights)
    return ClipNetwork(
        weights.name,
        content_hash(weights.path),
        words[preprocessing],
        weights.form["projection_dim"],
        False,
        prepare,
        ImageFeatures(network),
        TextFeatures(network),
    )


def nano_clip(folder: Path = NANO) -> ClipNetwork:
    """The embedded CLIP: image tower and projections from clip.safetensors, text tower from nano.safetensors."""
    network, arrays = load_nano_clip(folder)
    size = FORMS["nano"]["vision"]["image_size"]
    return ClipNetwork(
        "the embedded nano CLIP",
        _hash(arrays),
        f"RGB, {size}x{size} bicubic whatever the shape, [-1, 1]",
        FORMS["nano"]["projection_dim"],
        True,
        partial(nano_input, size=size),
        ImageFeatures(network),
        TextFeatures(network),
    )


def load_nano_clip(folder: Path = NANO) -> tuple[CLIPModel, dict[str, np.ndarray]]:
    """The embedded CLIP's network and its arrays."""
    arrays = dict(open_checkpoint(folder / "clip.safetensors"))
    base = open_checkpoint(folder / "nano.safetensors")
    prefix = TEXT_PREFIX[: -len("text_model.")]
    arrays.update({name[len(prefix) :]: base[name] for name in base if name.startswith(prefix)})
    return build_clip(ClipWeights(arrays, FORMS["nano"], "nano", folder / "clip.safetensors")), arrays


def _hash(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()
