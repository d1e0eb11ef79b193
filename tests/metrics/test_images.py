"""Images to networks: found in order, opened as pytorch-fid opens them, streamed in batches; broken ones named."""

from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image

from ldm.data.transforms import BrokenImage
from ldm.errors import UserError
from ldm.metrics import images
from ldm.metrics.images import ImageBatches, clip_input, find_images, inception_input, nano_input, open_plain
from tests.metrics.odd_images import write_odd_images

pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")  # pytest puts its own filters in place of the module's

CLIP_MEAN, CLIP_DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def save(path, value=0, size=(4, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)
    return path


def test_images_are_found_sorted_by_name_whatever_their_kind(tmp_path):
    for name in ("b.JPG", "a.png", "00010.webp", "00009.bmp", ".a.12.partial.png"):
        save(tmp_path / name)
    Image.new("L", (4, 4)).save(tmp_path / "c.pgm")
    (tmp_path / "prompts.txt").write_text("a\n")
    assert [path.name for path in find_images(tmp_path)] == ["00009.bmp", "00010.webp", "a.png", "b.JPG", "c.pgm"]


@pytest.mark.parametrize("beginning", ["", "img_v2_"])
def test_names_that_count_are_in_the_order_of_their_numbers_and_that_is_said_once(tmp_path, caplog, beginning):
    names = [f"{beginning}{number}.png" for number in range(12)]
    for name in names:
        save(tmp_path / name)
    assert [path.name for path in find_images(tmp_path)] == names
    [record] = caplog.records
    assert f"{beginning}9.png before {beginning}10.png" in record.getMessage()


@pytest.mark.parametrize(
    "names",
    [
        ["00000.png", "00001.png", "00010.png"],
        ["a.png", "a1.png", "b.png"],
        ["0a1f.png", "0b2.png"],
        ["1.png", "2.png"],
        ["1f9d1-200d-1f37c.png", "1f9d1-200d-1f9b1.png", "1f9d1.png"],  # emoji's code points, which are hexadecimal
        ["a1_10.png", "a1_9.png", "b1_2.png"],
        ["1.png", "10.png", "2.png", "cover.png"],
    ],
)
def test_other_names_are_in_the_order_of_text_without_a_word(tmp_path, caplog, names):
    for name in names:
        save(tmp_path / name)
    assert [path.name for path in find_images(tmp_path)] == names
    assert caplog.text == ""


@pytest.mark.parametrize("target", ["fifo", "/dev/zero", "link"])
def test_what_is_no_image_and_no_folder_is_not_waited_for(tmp_path, target):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("fifo")
    with pytest.raises(UserError, match="is a (pipe|device).*: give an image or a folder of images"):
        find_images(tmp_path / target)


@pytest.mark.parametrize("closed", [".", "images", "images/samples"])
def test_a_folder_of_another_user_is_named_with_its_permission(unprivileged, closed):
    save(unprivileged / "images" / "samples" / "a.png")
    (unprivileged / closed).chmod(0)
    with pytest.raises(UserError, match="Permission denied: give this user the permission"):
        find_images(unprivileged / "images")


def test_a_image_alone_is_one(tmp_path):
    assert find_images(save(tmp_path / "a.png")) == [tmp_path / "a.png"]


def test_of_an_output_folder_the_samples_are_taken_not_the_grid(tmp_path):
    save(tmp_path / "grid.png")
    save(tmp_path / "samples" / "00000.png")
    (tmp_path / "samples" / "prompts.txt").write_text("a\n")
    assert find_images(tmp_path) == [tmp_path / "samples" / "00000.png"]


def test_where_there_are_none_the_folder_that_has_some_is_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        find_images(tmp_path / "none")
    with pytest.raises(UserError, match="has no images"):
        find_images(tmp_path)
    save(tmp_path / "train" / "a.png")
    with pytest.raises(UserError, match="there are some in .*train"):
        find_images(tmp_path)


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


def test_exif_orientation_is_not_looked_at(tmp_path):
    paths = write_odd_images(tmp_path)
    assert open_plain(paths["turned.jpg"]).size == open_plain(paths["photo.jpg"]).size


def test_bilinear_scaling_takes_two_neighbours_and_half_pixel_centres():
    image = Image.fromarray(np.array([[0, 255]], np.uint8)).convert("RGB")
    row = inception_input(image, 4)[0, 0]
    np.testing.assert_allclose((row + 1) / 2, [0, 0.25, 0.75, 1], atol=1e-6)
    # made smaller it takes two of the nine pixels, not their mean
    image = Image.fromarray(np.arange(9, dtype=np.uint8)[None] * 20).convert("RGB")
    np.testing.assert_allclose((inception_input(image, 1)[0, 0] + 1) / 2, [80 / 255], atol=1e-6)


def test_a_image_of_the_right_size_stays_as_it_is():
    pixels = np.random.default_rng(0).integers(0, 256, (299, 299, 3), np.uint8)
    prepared = inception_input(Image.fromarray(pixels))
    np.testing.assert_allclose(prepared, pixels.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)


def clip_pixels(prepared):
    return prepared * np.array(CLIP_DEVIATION).reshape(3, 1, 1) + np.array(CLIP_MEAN).reshape(3, 1, 1)


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
    """Which overshoots at an edge; bilinear scaling does not."""
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


def test_formats_that_start_a_program_are_not_opened(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n")
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "EPS"
    with pytest.raises(BrokenImage, match="no image in a known format"):
        open_plain(tmp_path / "a.png")


@pytest.mark.parametrize("size", [(224, 224), (300, 200), (31, 977), (1, 1), (5000, 3)])
def test_clips_input_has_its_size_from_any_shape(size):
    for how in images.CLIP_PREPROCESSING:
        assert clip_input(Image.new("RGB", size), 24, how).shape == (3, 24, 24)


def test_an_unknown_preprocessing_is_refused():
    with pytest.raises(UserError, match="openai, squash"):
        clip_input(Image.new("RGB", (4, 4)), 4, "stretch")


def test_the_embedded_clips_input_is_what_it_was_trained_on():
    from tools.nano.images import to_network

    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    np.testing.assert_allclose(nano_input(Image.fromarray(pixels)), to_network(pixels[None])[0], atol=1e-6)


def values(batches):
    return [(places.tolist(), images.mean(axis=(1, 2, 3)).tolist()) for places, images in batches]


def plain(image):
    return np.asarray(image, np.float32).transpose(2, 0, 1)


def test_batches_come_in_order_the_last_may_be_short(tmp_path):
    paths = [save(tmp_path / f"{i}.png", i) for i in range(7)]
    assert values(ImageBatches(paths, plain, 3)) == [([0, 1, 2], [0, 1, 2]), ([3, 4, 5], [3, 4, 5]), ([6], [6])]


def test_broken_images_are_named_and_left_out(tmp_path):
    paths = [save(tmp_path / f"{i}.png", i) for i in range(6)]
    paths[0].write_bytes(b"")
    paths[3].write_bytes(paths[2].read_bytes()[:40])
    paths[5].unlink()
    batches = ImageBatches(paths, plain, 2)
    assert values(batches) == [([1, 2], [1, 2]), ([4], [4])]
    assert [path.name for path, _ in batches.broken] == ["0.png", "3.png", "5.png"]
    assert "empty" in batches.broken[0][1] and "does not exist" in batches.broken[2][1]


def test_what_is_no_file_and_what_is_too_large_is_left_out_too(tmp_path):
    paths = [save(tmp_path / f"{i}.png", i) for i in range(4)]
    paths[0].unlink()
    os.mkfifo(paths[0])
    paths[1].unlink()
    paths[1].symlink_to("/dev/zero")
    paths[2].write_bytes(b"P6 13300 13300 255\n")
    batches = ImageBatches(find_images(tmp_path), plain, 2)
    assert values(batches) == [([3], [3])]
    assert [fault[:13] for _, fault in batches.broken] == ["is a pipe (FI", "is a device, ", "has 13,300 x "]


def test_where_all_are_broken_one_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="not one of 1 images.*a.png.*: give other images"):
        list(ImageBatches([tmp_path / "a.png"], plain, 2))


def test_no_more_than_two_batches_are_opened_ahead(tmp_path):
    paths = [save(tmp_path / f"{i:03d}.png", i) for i in range(100)]
    opened = []

    def prepare(image):
        opened.append(1)
        return plain(image)

    for number, _ in enumerate(ImageBatches(paths, prepare, 5), 1):
        assert len(opened) <= (number + 2) * 5
