"""The features of image files in their order, computed by one process or divided among those that msrun started."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ldm.errors import UserError, plain
from ldm.metrics.image_files import ImageBatches
from ldm.metrics.networks import ImageNetwork
from ldm.runtime import peers


@dataclass
class FeatureBatches:
    """Iterates over (indices in `paths` (n,), features (n, D)) of the images that can be read.

    Every process iterates to the end. The first one yields all features in batches of `batch_size`, as it does alone.
    The others send it theirs and yield nothing. The iteration raises UserError in the first process if no image can be
    read, or if another process finds other images.

    Attributes:
        paths: The image files, the same in every process.
        network: Computes the features.
        batch_size: Images in a call of the network.
        label: What the images are, for the progress bar.
        process_index: Of this process.
        process_count: Number of processes.
        broken: The images of all processes that were left out, as (path, fault). Known at the end, in the first one.
    """

    paths: Sequence[Path]
    network: ImageNetwork
    batch_size: int
    label: str = "images"
    process_index: int = 0
    process_count: int = 1
    broken: list[tuple[Path, str]] = field(default_factory=list)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        images = ImageBatches(
            self.paths, self.network.prepare, self.batch_size, self.label, self.process_index, self.process_count
        )
        if self.process_count == 1:
            yield from self.network.encode_batches(images)
            faults = images.faults
        else:
            self._check_paths()
            rounds = math.ceil(len(self.paths) / (self.batch_size * self.process_count))
            yield from self._whole_batches(peers.gather_batches(self.network.encode_batches(images), rounds))
            gathered = peers.gather(json.dumps(list(images.faults.items())).encode())
            faults = dict(sorted(item for data in gathered for item in json.loads(data)))
        self.broken = [(self.paths[index], fault) for index, fault in faults.items()]
        if len(self.broken) == len(self.paths):
            path, fault = self.broken[0]
            raise UserError(
                f"not one of {len(self.paths)} images can be read; {plain(path)} {fault}: give other images"
            )

    def _check_paths(self) -> None:
        """Raise UserError in the first process if another one divides other images, or in other blocks."""
        digest = hashlib.sha256(str(self.batch_size).encode())
        for path in self.paths:
            digest.update(b"/" + os.fsencode(path.name))
        for process, other in enumerate(peers.gather(digest.digest())):
            if other != digest.digest():
                raise UserError(
                    f"{plain(self.paths[0].parent)}: process {process} does not find the images that process 0 finds: "
                    "let all hosts share the folders of images, and start again when nothing writes to them"
                )

    def _whole_batches(self, parts: Iterable[tuple[np.ndarray, ...]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Join the blocks, of up to `batch_size` images, to the batches that one process would have.

        FeatureStatistics merges after whole batches, so the last bits of a covariance depend on them.
        """
        indices, features = np.zeros(0, np.int64), np.zeros((0, self.network.dimensions), np.float32)
        for more_indices, more_features in parts:
            indices, features = np.concatenate([indices, more_indices]), np.concatenate([features, more_features])
            if len(indices) >= self.batch_size:
                yield indices[: self.batch_size], features[: self.batch_size]
                indices, features = indices[self.batch_size :], features[self.batch_size :]
        if len(indices):
            yield indices, features
