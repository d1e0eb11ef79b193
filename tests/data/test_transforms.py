"""Every common kind of picture file comes out as the picture a person sees, on white, square, in [-1, 1]."""

import io

import numpy as np
import pytest
from PIL import Image

from ldm.data import transforms
from ldm.data.transforms import BrokenImage, load_image, open_rgb
from ldm.errors import UserError

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def saved(tmp_path, image, name="picture.png", **settings):
    path = tmp_path / name
    image.save(path, **settings)
    return path


def pixel(path, x=0, y=0):
    """The RGB of one pixel of an 8x8 picture, 0 to 255."""
    picture = load_image(path, 8)
    return tuple(int(value) for value in np.rint((picture[:, y, x] + 1) * 127.5))


def test_a_picture_is_float32_channels_first_in_minus_one_to_one(tmp_path):
    values = np.zeros((8, 8, 3), np.uint8)
    values[2, 5] = (255, 0, 128)
    picture = load_image(saved(tmp_path, Image.fromarray(values)), 8)
    assert picture.dtype == np.float32 and picture.shape == (3, 8, 8) and picture.flags.c_contiguous
    assert picture[:, 2, 5] == pytest.approx([1.0, -1.0, 128 / 127.5 - 1], abs=1e-6)
    assert picture.min() == -1.0 and picture.max() == 1.0


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("1", (8, 8), 1), WHITE),
        (Image.new("L", (8, 8), 100), (100, 100, 100)),
        (Image.new("LA", (8, 8), (100, 255)), (100, 100, 100)),
        (Image.new("LA", (8, 8), (0, 0)), WHITE),
        (Image.new("RGBA", (8, 8), (255, 0, 0, 255)), RED),
        (Image.new("RGBA", (8, 8), (255, 0, 0, 0)), WHITE),
        (Image.new("RGBA", (8, 8), (0, 0, 0, 51)), (204, 204, 204)),
        (Image.new("RGB", (8, 8), GREEN).convert("P"), GREEN),
        (Image.fromarray(np.full((8, 8), 65535, np.uint16)), WHITE),
        (Image.fromarray(np.full((8, 8), 100 * 257, np.uint16)), (100, 100, 100)),
        (Image.fromarray(np.full((8, 8), 255, np.uint16)), (1, 1, 1)),
    ],
    ids=[
        "bilevel",
        "grey",
        "grey, opaque",
        "grey, transparent",
        "opaque",
        "transparent",
        "a fifth black",
        "palette",
        "16 bits, white",
        "16 bits, grey",
        "16 bits, nearly black",
    ],
)
def test_png_modes(tmp_path, image, expected):
    assert pixel(saved(tmp_path, image)) == expected


def test_a_transparent_palette_entry_is_white(tmp_path):
    image = Image.new("P", (8, 8), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((3, 3), 1)
    path = saved(tmp_path, image, transparency=0)
    assert pixel(path) == WHITE
    assert pixel(path, 3, 3) == BLUE


def test_a_transparent_colour_of_an_rgb_png_is_white(tmp_path):
    image = Image.new("RGB", (8, 8), RED)
    image.putpixel((3, 3), BLUE)
    path = saved(tmp_path, image, transparency=RED)
    assert pixel(path) == WHITE
    assert pixel(path, 3, 3) == BLUE


def test_an_animation_is_its_first_frame(tmp_path):
    later = Image.new("RGB", (8, 8), BLUE)
    path = saved(tmp_path, Image.new("RGB", (8, 8), RED), "p.gif", save_all=True, append_images=[later])
    assert pixel(path) == RED


@pytest.mark.parametrize("name", ["p.jpg", "p.webp", "p.bmp", "p.gif", "p.tif", "p.ppm", "a.JPEG", "two words é.png"])
def test_formats(tmp_path, name):
    path = saved(tmp_path, Image.new("RGB", (8, 8), (200, 40, 40)), name)
    assert pixel(path) == pytest.approx((200, 40, 40), abs=4)


def test_the_content_decides_the_format_not_the_name(tmp_path):
    path = saved(tmp_path, Image.new("RGB", (8, 8), RED), "really_a_bmp.png", format="BMP")
    assert pixel(path) == RED


@pytest.mark.parametrize("ink", [(0, 255, 255, 0), (0, 0, 0, 0), (0, 0, 0, 255)])
@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk(tmp_path, suffix, ink):
    expected = {(0, 255, 255, 0): RED, (0, 0, 0, 0): WHITE, (0, 0, 0, 255): (0, 0, 0)}[ink]
    path = saved(tmp_path, Image.new("CMYK", (8, 8), ink), f"p.{suffix}")
    assert pixel(path) == pytest.approx(expected, abs=4)


@pytest.mark.parametrize("top", [1.0, 255.0])
def test_float_tiff(tmp_path, top):
    values = np.full((8, 8), top, np.float32)
    values[0, 0] = 0
    path = saved(tmp_path, Image.fromarray(values), "p.tif")
    assert pixel(path, 4, 4) == WHITE and pixel(path) == (0, 0, 0)


@pytest.mark.parametrize(("orientation", "corner"), [(1, (0, 0)), (2, (7, 0)), (3, (7, 7)), (6, (7, 0)), (8, (0, 7))])
def test_exif_orientation_is_followed(tmp_path, orientation, corner):
    image = Image.new("RGB", (8, 8), WHITE)
    image.putpixel((0, 0), (0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, image, exif=exif)
    assert pixel(path, *corner) == (0, 0, 0)


def test_a_wide_picture_gives_its_middle(tmp_path):
    values = np.full((8, 24, 3), 255, np.uint8)
    values[:, 8:16] = RED
    assert (load_image(saved(tmp_path, Image.fromarray(values)), 8) == np.array([1, -1, -1]).reshape(3, 1, 1)).all()


def test_a_tall_picture_gives_its_middle(tmp_path):
    values = np.full((24, 8, 3), 255, np.uint8)
    values[8:16] = RED
    assert (load_image(saved(tmp_path, Image.fromarray(values)), 8) == np.array([1, -1, -1]).reshape(3, 1, 1)).all()


@pytest.mark.parametrize("shape", [(16, 16), (4, 4), (30, 20), (1, 1), (1, 4000), (4000, 1)])
def test_any_shape_is_scaled_to_the_size(tmp_path, shape):
    picture = load_image(saved(tmp_path, Image.new("RGB", shape, (10, 200, 30))), 8)
    assert picture.shape == (3, 8, 8)
    assert (picture[:, 4, 4] + 1) * 127.5 == pytest.approx([10, 200, 30], abs=1)


def test_shrinking_averages_instead_of_skipping(tmp_path):
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    picture = load_image(saved(tmp_path, Image.fromarray(board)), 8)
    assert np.abs(picture).max() < 0.02


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


def test_the_same_generator_state_gives_the_same_picture(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (20, 31, 3), dtype=np.uint8)
    path = saved(tmp_path, Image.fromarray(values))
    first, again = (
        load_image(path, 8, random_crop=True, random_flip=True, rng=np.random.default_rng(5)) for _ in range(2)
    )
    assert (first == again).all()


def test_randomness_needs_a_generator(tmp_path):
    path = saved(tmp_path, Image.new("RGB", (8, 8)))
    with pytest.raises(TypeError):
        load_image(path, 8, random_flip=True)


def encoded(suffix):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, suffix)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is an empty file"),
        (b"this is text, called .png\n", "is no image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is no image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(x) print\n", "is no image"),
        (encoded("PNG")[:8], "is no image|is broken"),
        (encoded("PNG")[:60], "is broken"),
        (encoded("PNG")[: len(encoded("PNG")) // 2], "is broken"),
        (encoded("PNG")[:-200], "is broken"),
        (encoded("JPEG")[:300], "is broken|is no image"),
        (encoded("JPEG")[: len(encoded("JPEG")) // 2], "is broken"),
        (encoded("WEBP")[: len(encoded("WEBP")) // 2], "is broken"),
        (encoded("GIF")[: len(encoded("GIF")) // 2], "is broken"),
        (encoded("BMP")[: len(encoded("BMP")) // 2], "is broken"),
        (encoded("PNG")[:200] + b"\0" * 400 + encoded("PNG")[600:], "is broken"),
    ],
)
def test_a_broken_picture_is_named_with_what_is_wrong(tmp_path, content, said):
    path = tmp_path / "cat.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        load_image(path, 8)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_picture_of_a_billion_pixels_is_not_decoded(tmp_path):
    content = bytearray(encoded("BMP"))
    content[18:26] = (60_000).to_bytes(4, "little") * 2
    path = tmp_path / "bomb.bmp"
    path.write_bytes(content)
    with pytest.raises(UserError, match="too many pixels"):
        load_image(path, 8)


@pytest.mark.parametrize("name", ["gone.png", "folder.png"])
def test_a_missing_picture_and_a_folder_are_said_to_be_that(tmp_path, name):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match="does not exist" if name == "gone.png" else "is a folder"):
        load_image(tmp_path / name, 8)


@pytest.mark.parametrize("suffix", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
def test_a_damaged_picture_never_ends_in_an_unforeseen_error(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    whole, rng = encoded(suffix), np.random.default_rng(1)
    path = tmp_path / "damaged"
    for _ in range(60):
        content = bytearray(whole[: rng.integers(1, len(whole))])
        for place in rng.integers(len(content), size=3):
            content[place] = rng.integers(256)
        path.write_bytes(content)
        try:
            assert open_rgb(path).mode == "RGB"
        except BrokenImage:
            pass
