"""Folders of small images with captions, and the data that a run makes of them."""

from pathlib import Path

import numpy as np
from PIL import Image

from ldm.data.preparation import prepare_data, read_listing
from ldm.settings.model import load_model_config
from ldm.settings.train import TrainSettings
from tests.data.sources.test_tar_shards import shard

MICRO = load_model_config(Path(__file__).parents[1] / "training" / "micro.yaml")


RNG = np.random.default_rng(0)


def write(folder, sizes, captions=None):
    """Write images of different content, with caption files."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, size in enumerate(sizes):
        noise = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(captions[number] if captions else f"image {number}")
    return folder


def prepared(path, **others):
    """The data of training and of validation."""
    settings = TrainSettings(data_path=str(path), image_size=16, **others)
    return prepare_data(read_listing(settings), settings, MICRO)


def training(path, **others):
    return prepared(path, **others)[0]


def names(data):
    return [data.name(row) for row in range(len(data))]


BUCKETS = dict(enable_bucket=True, min_bucket_reso=8, max_bucket_reso=32, bucket_reso_steps=8)


def write_shards(folder, sizes):
    """Write the images of `write` into two tar shards, the first of which has the odd numbers."""
    images = write(folder / "images", sizes)
    for first in (0, 1):
        names = [f"{number:02}.{suffix}" for number in range(first, len(sizes), 2) for suffix in ("png", "txt")]
        shard(folder / f"{1 - first}.tar", [(name, (images / name).read_bytes()) for name in names])
    for path in [*images.iterdir(), images]:
        path.rmdir() if path.is_dir() else path.unlink()
    return folder
