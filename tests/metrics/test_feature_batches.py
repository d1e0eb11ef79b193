"""The features of images, divided between two processes: those of one process, in its order and its batches.

The processes run here one after the other, and what the second one sends is given to the first.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mindspore import Tensor
from PIL import Image

from ldm.errors import UserError
from ldm.metrics.feature_batches import FeatureBatches
from ldm.metrics.networks import ImageNetwork
from ldm.runtime import peers


def colours() -> ImageNetwork:
    """Mean colours as features."""
    return ImageNetwork("colours", "ab" * 32, "none", 3, False, lambda image: np.float32(image).transpose(2, 0, 1),
                        lambda images: Tensor(images.asnumpy().mean(axis=(2, 3))))  # fmt: skip


def draw(folder: Path, count: int, broken: tuple[int, ...] = ()) -> list[Path]:
    folder.mkdir()
    paths = [folder / f"{i}.png" for i in range(count)]
    for i, path in enumerate(paths):
        Image.new("RGB", (4, 4), (i, 2 * i, 3 * i)).save(path)
    for i in broken:
        paths[i].write_bytes(b"")
    return paths


def of_two_processes(paths, others, monkeypatch) -> tuple[list, FeatureBatches]:
    """Return the batches of the first process, which finds `paths`. The second process finds `others`."""
    sent: list[bytes] = []
    with monkeypatch.context() as patched:
        patched.setattr(peers, "gather", lambda data: sent.append(data) or [])
        second = FeatureBatches(others, colours(), 2, process_index=1, process_count=2)
        assert not list(second) and not second.broken
    with monkeypatch.context() as patched:
        patched.setattr(peers, "gather", lambda data: [data, sent.pop(0)])
        first = FeatureBatches(paths, colours(), 2, process_count=2)
        batches = list(first)
    assert not sent
    return batches, first


@pytest.mark.parametrize(
    ("count", "broken"),
    [(9, ()), (9, (1, 2, 6)), (9, (0, 1)), (9, (2, 3, 8)), (8, (6, 7)), (5, (0, 1, 2, 3)), (4, (0, 1)), (1, ())],
)
def test_two_processes_have_the_batches_of_one(tmp_path, monkeypatch, count, broken):
    """Whole blocks are broken: of the first process, of the second one, at the end, all that a process has."""
    paths = draw(tmp_path / "images", count, broken)
    one = FeatureBatches(paths, colours(), 2)
    expected = list(one)
    batches, first = of_two_processes(paths, paths, monkeypatch)
    assert len(batches) == len(expected)
    for batch, of_one in zip(batches, expected):
        for array, of_one_array in zip(batch, of_one):
            assert array.dtype == of_one_array.dtype
            np.testing.assert_array_equal(array, of_one_array)
    assert first.broken == one.broken and [paths.index(path) for path, _ in one.broken] == list(broken)


def test_an_error_names_a_broken_image_only_if_those_of_all_processes_are_broken(tmp_path, monkeypatch):
    paths = draw(tmp_path / "images", 4, (0, 1, 2, 3))
    with pytest.raises(UserError, match="not one of 4 images.*0.png.*: give other images"):
        list(FeatureBatches(paths, colours(), 2))
    with pytest.raises(UserError, match="not one of 4 images.*0.png.*: give other images"):
        of_two_processes(paths, paths, monkeypatch)


@pytest.mark.parametrize("change", ["fewer", "another"])
def test_a_process_that_finds_other_images_is_named(tmp_path, monkeypatch, change):
    paths, others = draw(tmp_path / "images", 4), draw(tmp_path / "copy", 4)
    batches, _ = of_two_processes(paths, others, monkeypatch)
    assert len(batches) == 2  # the hosts may have them in different folders
    others = others[:3] if change == "fewer" else [*others[:3], others[3].rename(tmp_path / "copy" / "4.png")]
    with pytest.raises(UserError, match="images: process 1 does not find the images that process 0 finds: let all"):
        of_two_processes(paths, others, monkeypatch)
