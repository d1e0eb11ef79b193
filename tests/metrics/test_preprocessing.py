"""Images become the networks' inputs exactly as in pytorch-fid and OpenAI's CLIP."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ldm.data.decoding import BrokenImage
from ldm.errors import UserError
from ldm.metrics.preprocessing import CLIP_PREPROCESSING, clip_input, inception_input, nano_input
from tests.metrics.odd_images import open_plain, write_odd_images

pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")  # pytest puts its own filters in place of the module's

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def test_every_kind_of_image_becomes_rgb(tmp_path):
    for name, path in write_odd_images(tmp_path).items():
        image = open_plain(path)
        assert image.mode == "RGB", name
        prepared = inception_input(image)
        assert prepared.shape == (3, 299, 299) and prepared.dtype == np.float32, name
        assert -1 <= prepared.min() and prepared.max() <= 1, name


def test_an_alpha_channel_is_dropped_and_not_laid_on_white(tmp_path):
    Image.fromarray(np.full((2, 2, 4), (10, 20, 30, 0), np.uint8), "RGBA").save(tmp_path / "a.png")
    assert np.asarray(open_plain(tmp_path / "a.png"))[0, 0].tolist() == [10, 20, 30]


def test_the_exif_orientation_is_ignored(tmp_path):
    paths = write_odd_images(tmp_path)
    assert open_plain(paths["turned.jpg"]).size == open_plain(paths["photo.jpg"]).size


def test_bilinear_scaling_takes_two_neighbours_and_half_pixel_centres():
    image = Image.fromarray(np.array([[0, 255]], np.uint8)).convert("RGB")
    row = inception_input(image, 4)[0, 0]
    np.testing.assert_allclose((row + 1) / 2, [0, 0.25, 0.75, 1], atol=1e-6)
    # made smaller it takes two of the nine pixels, not their mean
    image = Image.fromarray(np.arange(9, dtype=np.uint8)[None] * 20).convert("RGB")
    np.testing.assert_allclose((inception_input(image, 1)[0, 0] + 1) / 2, [80 / 255], atol=1e-6)


def test_an_image_of_the_right_size_stays_as_it_is():
    pixels = np.random.default_rng(0).integers(0, 256, (299, 299, 3), np.uint8)
    prepared = inception_input(Image.fromarray(pixels))
    np.testing.assert_allclose(prepared, pixels.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)


def clip_pixels(prepared):
    return prepared * np.array(CLIP_STD).reshape(3, 1, 1) + np.array(CLIP_MEAN).reshape(3, 1, 1)


def test_openais_preprocessing_cuts_the_middle_out_and_squash_keeps_all():
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 255
    image = Image.fromarray(pixels)
    np.testing.assert_allclose(clip_pixels(clip_input(image, 8))[:, :, 2:-2], 1, atol=0.01)
    squashed = clip_pixels(clip_input(image, 9, "squash"))
    np.testing.assert_allclose(squashed[:, :, [0, 8]], 0, atol=0.01)
    np.testing.assert_allclose(squashed[:, :, 4], 1, atol=0.01)


def test_the_middle_is_cut_out_of_tall_images_too_and_a_square_is_squashed_both_ways():
    pixels = np.zeros((30, 10, 3), np.uint8)
    pixels[10:20] = 255
    image = Image.fromarray(pixels)
    np.testing.assert_allclose(clip_pixels(clip_input(image, 8))[:, 2:-2], 1, atol=0.01)
    squashed = clip_pixels(clip_input(image, 9, "squash"))
    np.testing.assert_allclose(squashed[:, [0, 8]], 0, atol=0.01)
    np.testing.assert_allclose(squashed[:, 4], 1, atol=0.01)


def test_clips_images_are_scaled_bicubically():
    """Bicubic scaling overshoots at an edge, bilinear scaling does not."""
    pixels = np.full((4, 4, 3), 50, np.uint8)
    pixels[:, 2:] = 200
    scaled = clip_pixels(clip_input(Image.fromarray(pixels), 32)) * 255
    assert scaled.min() < 45 and scaled.max() > 205


def test_a_strip_is_never_scaled_whole(monkeypatch):
    sizes, resize = [], Image.Image.resize

    def watched(self, size, *args, **options):
        sizes.append(size)
        return resize(self, size, *args, **options)

    monkeypatch.setattr(Image.Image, "resize", watched)
    pixels = np.random.default_rng(0).integers(0, 256, (1, 2001, 3), np.uint8)
    for strip in (pixels, np.ascontiguousarray(pixels.transpose(1, 0, 2))):
        image = Image.fromarray(strip)
        prepared = clip_pixels(clip_input(image, 8))
        assert max(map(max, sizes)) <= 20 * 8
        left, top = (4 * (side - 1) for side in image.size)
        whole = resize(image, (8 * image.width, 8 * image.height), Image.Resampling.BICUBIC)
        expected = np.asarray(whole.crop((left, top, left + 8, top + 8)), np.float32).transpose(2, 0, 1) / 255
        np.testing.assert_allclose(prepared, expected, atol=1.5 / 255)


def test_a_format_that_runs_a_program_is_not_opened(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n")
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "EPS"
    with pytest.raises(BrokenImage, match="no image in a known format"):
        open_plain(tmp_path / "a.png")


@pytest.mark.parametrize("size", [(224, 224), (300, 200), (31, 977), (1, 1), (5000, 3)])
def test_clips_input_has_its_size_from_any_shape(size):
    for preprocessing in CLIP_PREPROCESSING:
        assert clip_input(Image.new("RGB", size), 24, preprocessing).shape == (3, 24, 24)


def test_an_unknown_preprocessing_is_refused():
    with pytest.raises(UserError, match="openai, squash"):
        clip_input(Image.new("RGB", (4, 4)), 4, "stretch")


def test_the_nano_clips_input_is_what_it_was_trained_on():
    from tools.nano.images import to_network

    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    np.testing.assert_allclose(nano_input(Image.fromarray(pixels)), to_network(pixels[None])[0], atol=1e-6)
