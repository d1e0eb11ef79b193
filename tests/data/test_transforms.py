"""The part of an image that is trained: cropped, scaled, mirrored, in [-1, 1]."""

import numpy as np
import pytest
from PIL import Image, ImageOps

from ldm.data.buckets import crop_box
from ldm.data.transforms import load_image
from tests.data.image_bytes import GREEN, NOISE, RED, saved

pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")  # pytest puts its own filters in place of the module's


def test_an_image_is_float32_channels_first_in_minus_one_to_one(tmp_path):
    values = np.zeros((8, 8, 3), np.uint8)
    values[2, 5] = (255, 0, 128)
    image = load_image(saved(tmp_path, Image.fromarray(values)), 8)
    assert image.dtype == np.float32 and image.shape == (3, 8, 8) and image.flags.c_contiguous
    assert image[:, 2, 5] == pytest.approx([1.0, -1.0, 128 / 127.5 - 1], abs=1e-6)
    assert image.min() == -1.0 and image.max() == 1.0


@pytest.mark.parametrize("size", [8, 4])
def test_one_channel_is_the_luma_and_grey_stays_as_it_is(tmp_path, size):
    values = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    grey = saved(tmp_path, Image.fromarray(values))
    image = load_image(grey, size, channels=1)
    assert image.shape == (1, size, size) and image.dtype == np.float32 and image.flags.c_contiguous
    np.testing.assert_array_equal(image[0], load_image(grey, size)[0])
    green = load_image(saved(tmp_path, Image.new("RGB", (8, 8), GREEN)), size, channels=1)
    np.testing.assert_allclose(green, 150 / 127.5 - 1.0, rtol=1e-6)  # 0.587 of 255


def test_a_wide_image_gives_its_middle(tmp_path):
    values = np.full((8, 24, 3), 255, np.uint8)
    values[:, 8:16] = RED
    assert (load_image(saved(tmp_path, Image.fromarray(values)), 8) == np.array([1, -1, -1]).reshape(3, 1, 1)).all()


def test_a_tall_image_gives_its_middle(tmp_path):
    values = np.full((24, 8, 3), 255, np.uint8)
    values[8:16] = RED
    assert (load_image(saved(tmp_path, Image.fromarray(values)), 8) == np.array([1, -1, -1]).reshape(3, 1, 1)).all()


@pytest.mark.parametrize("shape", [(16, 16), (4, 4), (30, 20), (1, 1), (1, 4000), (4000, 1)])
def test_any_shape_is_scaled_to_the_size(tmp_path, shape):
    image = load_image(saved(tmp_path, Image.new("RGB", shape, (10, 200, 30))), 8)
    assert image.shape == (3, 8, 8)
    assert (image[:, 4, 4] + 1) * 127.5 == pytest.approx([10, 200, 30], abs=1)


def test_shrinking_averages_instead_of_skipping(tmp_path):
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    image = load_image(saved(tmp_path, Image.fromarray(board)), 8)
    assert np.abs(image).max() < 0.02


def test_random_crops_stay_inside_and_move(tmp_path):
    # The red channel counts the columns, so its first value is where the crop starts.
    values = np.zeros((8, 40, 3), np.uint8)
    values[:, :, 0] = np.arange(40)
    path = saved(tmp_path, Image.fromarray(values))
    rng = np.random.default_rng(0)
    starts = {round((load_image(path, 8, random_crop=True, rng=rng)[0, 0, 0] + 1) * 127.5) for _ in range(300)}
    assert starts == set(range(33))


def test_random_flips_mirror_half_of_the_time(tmp_path):
    values = np.zeros((8, 8, 3), np.uint8)
    values[:, :4] = 255
    path = saved(tmp_path, Image.fromarray(values))
    rng = np.random.default_rng(0)
    flipped = [load_image(path, 8, random_flip=True, rng=rng)[0, 0, 0] < 0 for _ in range(400)]
    assert 160 < sum(flipped) < 240


def test_the_same_generator_state_gives_the_same_image(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (20, 31, 3), dtype=np.uint8)
    path = saved(tmp_path, Image.fromarray(values))
    first, again = (
        load_image(path, 8, random_crop=True, random_flip=True, rng=np.random.default_rng(5)) for _ in range(2)
    )
    assert (first == again).all()


def test_random_crops_and_flips_need_a_generator(tmp_path):
    path = saved(tmp_path, Image.new("RGB", (8, 8)))
    with pytest.raises(TypeError):
        load_image(path, 8, random_flip=True)


def as_array(image):
    """What load_image returns of a Pillow image that needs no more work."""
    return np.asarray(image, np.float32).transpose(2, 0, 1) / 127.5 - 1


@pytest.mark.parametrize("shape", [(37, 53), (53, 37), (24, 24), (16, 16)])
def test_a_square_is_the_middle_of_the_longer_side_scaled_in_one_step(tmp_path, shape):
    image = Image.fromarray(NOISE[: shape[0], : shape[1]]) if shape != (53, 37) else Image.fromarray(NOISE).rotate(90)
    side = min(image.size)
    left, top = ((length - side) / 2 for length in image.size)
    expected = image.resize((16, 16), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    path = saved(tmp_path, image)
    assert (load_image(path, 16) == as_array(expected)).all()
    assert (load_image(path, (16, 16)) == as_array(expected)).all()


def test_a_random_square_takes_the_same_draws_as_ever(tmp_path):
    path, rng = saved(tmp_path, Image.fromarray(NOISE)), np.random.default_rng(3)
    left, flips = int(rng.integers(17)), rng.random() < 0.5
    expected = Image.fromarray(NOISE).resize((16, 16), Image.Resampling.BICUBIC, box=(left, 0, left + 37, 37))
    result = load_image(path, 16, random_crop=True, random_flip=True, rng=np.random.default_rng(3))
    assert (result == as_array(ImageOps.mirror(expected) if flips else expected)).all()


@pytest.mark.parametrize("target", [(32, 16), (16, 32), (24, 40), (53, 37)])
def test_another_shape_is_the_largest_part_of_it_in_the_middle(tmp_path, target):
    image = Image.fromarray(NOISE)
    result = load_image(saved(tmp_path, image), target)
    assert result.shape == (3, target[1], target[0])
    box = crop_box(image.size, target)
    assert (result == as_array(image.resize(target, Image.Resampling.BICUBIC, box=box))).all()


def test_an_image_of_the_wanted_size_is_taken_as_it_is(tmp_path):
    assert (load_image(saved(tmp_path, Image.fromarray(NOISE)), (53, 37)) == as_array(NOISE)).all()


def test_with_a_scale_of_one_pixels_are_taken_as_they_are(tmp_path):
    result = load_image(saved(tmp_path, Image.fromarray(NOISE)), (32, 16), scale=1.0)
    assert (result == as_array(NOISE[10:26, 10:42])).all()


def test_a_random_part_of_another_shape_moves(tmp_path):
    path, rng = saved(tmp_path, Image.fromarray(NOISE)), np.random.default_rng(0)
    parts = {load_image(path, (37, 37), random_crop=True, rng=rng).tobytes() for _ in range(100)}
    assert len(parts) == 17
    parts = {load_image(path, (52, 36), scale=1.0, random_crop=True, rng=rng).tobytes() for _ in range(40)}
    assert parts == {
        as_array(NOISE[top : top + 36, left : left + 52]).tobytes("C") for top in (0, 1) for left in (0, 1)
    }


def test_the_part_is_that_of_the_upright_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(tmp_path, Image.fromarray(NOISE), exif=exif)
    turned = Image.fromarray(NOISE).transpose(Image.Transpose.ROTATE_270)
    assert (load_image(path, (37, 53)) == as_array(turned)).all()
