"""Scores of image files: memory, saved statistics, and the pairing of images and prompts."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
from mindspore import Tensor
from PIL import Image

from ldm.errors import UserError
from ldm.metrics.evaluate import distances, encode_images, measure_images, prompt_scores, read_image_set
from ldm.metrics.frechet import frechet_of_features
from ldm.metrics.kernel import kernel_distance
from ldm.metrics.networks import ClipNetwork, ImageNetwork, nano_clip


def mean_colours(images: Tensor) -> Tensor:
    return Tensor(images.asnumpy().mean(axis=(2, 3)))


def colours(name: str = "colours", sha256: str = "ab" * 32) -> ImageNetwork:
    """Mean colours as features."""
    return ImageNetwork(name, sha256, "none", 3, False, lambda image: np.asarray(image, np.float32).transpose(2, 0, 1),
                        mean_colours)  # fmt: skip


def draw(folder: Path, values: list[int]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for i, value in enumerate(values):
        Image.new("RGB", (4, 4), (value, 2 * value % 256, 7 * value % 256)).save(folder / f"{i}.png")
    return sorted(folder.glob("*.png"))


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="the system does not say what a process holds")
@pytest.mark.usefixtures("graph_mode")
def test_memory_does_not_grow_with_the_images(tmp_path):
    """Keeping the network's inputs, 49 kB each, would take 31 MB for the second half."""
    network = nano_clip()
    resident = []

    def watched(images: Tensor) -> Tensor:
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6)
        return network.image_encoder(images)

    paths = draw(tmp_path, [100]) * 1280
    (tmp_path / "broken.png").write_bytes(b"")
    paths.append(tmp_path / "broken.png")
    found = measure_images(paths, dataclasses.replace(network, image_encoder=watched), 32)
    assert found.count == 1280 and [path.name for path, _ in found.broken] == ["broken.png"]
    assert max(resident[20:]) - max(resident[:20]) < 15


def test_saved_statistics_give_the_distance_of_their_images(tmp_path):
    real, made = draw(tmp_path / "real", [10, 40, 90, 120, 200]), draw(tmp_path / "made", [15, 60, 80, 190])
    network = colours()
    measured = measure_images(real, network, 2, save_to=tmp_path / "real.npz")
    saved, generated = read_image_set(tmp_path / "real.npz", network), measure_images(made, network, 2)
    assert saved.count == 5
    assert distances(saved, generated).fid == distances(measured, generated).fid > 0
    assert distances(saved, generated).kid is None and distances(measured, generated).kid_std > 0


def test_distances_are_those_of_the_features_of_both_sets(tmp_path):
    files = draw(tmp_path / "real", [10, 40, 90, 120, 200]), draw(tmp_path / "made", [15, 60, 80, 190])
    real, made = (np.array([np.asarray(Image.open(path))[0, 0] for path in paths], np.float64) for paths in files)
    found = distances(*(measure_images(paths, colours(), 2) for paths in files))
    assert found.fid == pytest.approx(frechet_of_features(real, made), rel=1e-6)
    assert (found.kid, found.kid_std) == pytest.approx(kernel_distance(real, made), rel=1e-6)


def test_statistics_of_other_weights_are_refused(tmp_path):
    np.savez(tmp_path / "other.npz", mu=np.zeros(4), sigma=np.eye(4))
    with pytest.raises(UserError, match="4 features, colours has 3"):
        read_image_set(tmp_path / "other.npz", colours())
    measure_images(draw(tmp_path / "real", [1, 2]), colours(), 2, save_to=tmp_path / "real.npz")
    with pytest.raises(UserError, match="make it again"):
        read_image_set(tmp_path / "real.npz", colours(sha256="cd" * 32))


def test_statistics_of_the_same_weights_under_an_earlier_name_are_read(tmp_path):
    measured = measure_images(draw(tmp_path / "real", [1, 2]), colours(), 2)
    identity = colours().identity.replace(colours().name, "the embedded colours")
    np.savez(tmp_path / "real.npz", mu=measured.mean, sigma=measured.covariance, count=2, network=identity)
    assert read_image_set(tmp_path / "real.npz", colours()).count == 2


def test_three_images_have_a_frechet_distance_but_no_kernel_distance(tmp_path):
    sets = [measure_images(draw(tmp_path / str(i), [5, 50, 100 + i]), colours(), 2) for i in range(2)]
    found = distances(*sets)
    assert found.fid > 0 and found.kid is None and found.kid_std is None


def test_one_image_that_can_be_read_is_too_few(tmp_path):
    paths = draw(tmp_path, [5, 6])
    paths[1].write_bytes(b"no image")
    with pytest.raises(UserError, match="only one of the real images"):
        measure_images(paths, colours(), 2, "real images")


def test_an_image_keeps_its_prompt_where_another_is_broken(tmp_path):
    """Each prompt is the colour of its image."""
    paths = draw(tmp_path, [20, 70, 130, 250])
    prompts = [" ".join(map(str, np.asarray(Image.open(path))[0, 0])) for path in paths]
    paths[1].write_bytes(b"")
    network = colours()
    made = encode_images(paths, network, 2)
    assert made.indices.tolist() == [0, 2, 3] and [path.name for path, _ in made.broken] == ["1.png"]

    class Texts(ClipNetwork):
        def encode_texts(self, texts, batch_size=32):
            return np.array([[float(word) for word in text.split()] for text in texts])

    fields = {field.name: getattr(network, field.name) for field in dataclasses.fields(network)}
    np.testing.assert_allclose(prompt_scores(made, prompts, Texts(**fields, text_encoder=mean_colours), 2), 100)
