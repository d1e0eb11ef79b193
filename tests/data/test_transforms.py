"""Every common kind of image file decodes as a viewer shows it: upright, in sRGB, on white, in [-1, 1]."""

import io
import os
import struct
import threading
import time
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from ldm.data import transforms
from ldm.data.buckets import crop_box
from ldm.data.sources.rows import FilePart
from ldm.data.transforms import BrokenImage, ImageNotes, load_image, open_rgb, parse_color, read_size
from ldm.errors import UserError
from tests.data.icc_profiles import adobe_in_srgb, cmyk_profile, grey_profile, power_in_srgb, rgb_profile

pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")  # pytest puts its own filters in place of the module's

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def saved(tmp_path, image, name="image.png", **settings):
    path = tmp_path / name
    image.save(path, **settings)
    return path


def pixel(path, x=0, y=0):
    """The RGB of one pixel of an 8x8 image, 0 to 255."""
    image = load_image(path, 8)
    return tuple(int(value) for value in np.rint((image[:, y, x] + 1) * 127.5))


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


@pytest.mark.parametrize("name", ["a.jpg", "a.mpo", "a.png", "a.webp", "a.tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_followed_as_pillow_does_it(tmp_path, name, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    values = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    settings = {"a.mpo": {"save_all": True, "append_images": [Image.new("RGB", (9, 6))]}, "a.webp": {"lossless": True}}
    path = saved(tmp_path, Image.fromarray(values), name, exif=exif, **settings.get(name, {}))
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert (np.asarray(open_rgb(path)) == expected).all()


def exif_block(*entries):
    """An EXIF block of (tag, type, count, 4 bytes of value or offset)."""
    tags = b"".join(struct.pack("<HHL", *entry[:3]) + entry[3] for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<LH", 8, len(entries)) + tags + bytes(4)


TURNED = (0x0112, 3, 1, b"\6\0\0\0")


@pytest.mark.parametrize(
    ("block", "turned"),
    [
        (exif_block(TURNED, (0x010F, 5, 1, b"\x1a\0\0\0")), True),  # the maker as a fraction
        (exif_block(TURNED, (0x0100, 1, 1, bytes(4))), True),  # the width as bytes
        (exif_block(TURNED, (0x0128, 4, 1, b"\xff\xff\xff\xff")), True),
        (exif_block(TURNED, (0x011A, 11, 1, b"\xff\xff\xff\xff")), True),  # the resolution is no number
        (exif_block(TURNED, (0x8769, 6, 1, b"\xff\xff\xff\xff")), True),  # more tags, at -1
        (exif_block(TURNED, (0x8825, 4, 1, b"\xff\xff\xff\xff")), True),
        (exif_block(TURNED, (0x9C9C, 99, 1 << 31, bytes(4))), True),
        (exif_block((0x0112, 2, 4, b"six\0")), False),
        (exif_block((0x0112, 3, 1, b"\x63\0\0\0")), False),
        (exif_block((0x0112, 3, 900, b"\x08\0\0\0")), False),
        (exif_block(TURNED)[:20], False),
        (b"Exif\0\0II*\0\xff\xff\xff\xff", False),
        (b"Exif\0\0no tags at all", False),
        (b"Exif\0\0", False),
    ],
)
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_only_the_orientation_of_an_exif_block_is_used(tmp_path, name, block, turned):
    path = saved(tmp_path, Image.new("RGB", (9, 6)), name, exif=block)
    assert open_rgb(path).size == ((6, 9) if turned else (9, 6))


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


def encoded(suffix):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, suffix)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "fault"),
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
def test_a_broken_image_is_named_with_its_fault(tmp_path, content, fault):
    path = tmp_path / "cat.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match=fault) as caught:
        load_image(path, 8)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, *chunks, rows=None):
    """A grey PNG that says it has this size; black where `rows` are not given."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    content = zlib.compress(bytes(width * height + height) if rows is None else rows)
    parts = (chunk(b"IHDR", header), *chunks, chunk(b"IDAT", content), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def bmp(width, height):
    content = bytearray(encoded("BMP"))
    content[18:26] = struct.pack("<ii", width, height)
    return bytes(content)


def gif(width, height):
    """Its screen is of one pixel, its first frame is larger."""
    content = bytearray(encoded("GIF"))
    content[6:10] = struct.pack("<HH", 1, 1)
    place = content.index(b"\x2c\0\0\0\0\x20\0\x20\0")
    content[place + 5 : place + 9] = struct.pack("<HH", width, height)
    return bytes(content)


def webp(width, height):
    """A canvas of this size around an image of another one."""
    image = encoded("WEBP")[12:]
    canvas = b"VP8X\x0a\0\0\0" + bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", 4 + len(canvas) + len(image)) + b"WEBP" + canvas + image


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (bmp(60_000, 60_000), "too many pixels, at most 120,000,000"),
        (bmp(13_300, 13_300), "13,300 x 13,300 pixels, at most 120,000,000 are read: scale it down"),
        (png(13_300, 13_300, rows=b""), "13,300 x 13,300 pixels, at most 120,000,000 are read"),
        (gif(60_000, 60_000), "too many pixels, at most 120,000,000"),
        (gif(13_300, 13_300), "13,300 x 13,300 pixels"),
        (webp(13_300, 13_300), "13,300 x 13,300 pixels, at most 90,000,000 of a WebP|is broken"),
        (png(1, 100_000_000, rows=b""), "1 x 100,000,000 pixels, at most 100,000 a side"),
        (png(100_000_000, 1, rows=b""), "100,000,000 x 1 pixels, at most 100,000 a side"),
        (b"P6 13300 13300 255\n", "13,300 x 13,300 pixels"),
    ],
    ids=["bmp", "below Pillow's bound", "png", "gif", "gif below", "webp", "column", "row", "ppm"],
)
def test_an_image_of_too_many_pixels_is_not_decoded_and_the_bound_is_named(tmp_path, content, fault):
    path = tmp_path / "bomb.bmp"
    path.write_bytes(content)
    with pytest.raises(UserError, match=fault) as caught:
        load_image(path, 8)
    assert str(path) in str(caught.value)


def test_an_image_of_a_hundred_megapixels_is_within_the_bounds():
    assert transforms.MAX_MEMORY // transforms.BYTES_A_PIXEL > 11_648 * 8_736 < transforms.MAX_BYTES // 6


def test_the_memory_of_a_large_image_goes_back_to_the_system():
    assert Image.core.get_block_size() > 32 << 20  # glibc keeps what is smaller


def test_a_file_of_many_gigabytes_is_not_read(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded("PNG"))
    os.truncate(path, 100 << 30)  # sparse
    with pytest.raises(UserError, match="has 107,374,182,400 bytes, at most 720,000,000 are read"):
        load_image(path, 8)


def test_threads_share_a_bound_and_a_larger_request_runs_alone():
    budget, inside, seen = transforms._Budget(10), [], []

    def work(units):
        with budget.hold(units):
            inside.append(units)
            seen.append(tuple(inside))
            time.sleep(0.001)
            inside.remove(units)

    threads = [threading.Thread(target=work, args=(units,)) for units in (4, 30, 5, 6, 30, 1, 9) * 20]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(seen) == len(threads)
    assert all(sum(units) <= 10 or len(units) == 1 for units in seen)


def test_an_image_reserves_its_memory_while_it_is_decoded(tmp_path, monkeypatch):
    held = []
    monkeypatch.setattr(transforms._memory, "hold", lambda units: held.append(units) or transforms._Budget(1).hold(1))
    for suffix in ("PNG", "WEBP"):
        (tmp_path / suffix).write_bytes(encoded(suffix))
        load_image(tmp_path / suffix, 8)
    assert held == [32 * 32 * 12, 32 * 32 * 16]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16", "F"])
def test_conversion_in_strips_gives_the_same_image(tmp_path, monkeypatch, mode):
    values = np.random.default_rng(0).integers(0, 256, (23, 17, 4), dtype=np.uint8)
    image = {
        "RGBA": lambda: Image.fromarray(values),
        "LA": lambda: Image.merge("LA", [Image.fromarray(values[..., 0]), Image.fromarray(values[..., 1])]),
        "P": lambda: Image.fromarray(values[..., :3]).quantize(40),
        "I;16": lambda: Image.fromarray(values[..., 0].astype(np.uint16) * 200),
        "F": lambda: Image.fromarray(values[..., 0].astype(np.float32)),
    }[mode]()
    settings = {"transparency": bytes(range(100, 140))} if mode == "P" else {}
    path = saved(tmp_path, image, "a.tif" if mode == "F" else "a.png", **settings)
    whole = np.asarray(open_rgb(path))
    monkeypatch.setattr(transforms, "STRIP_PIXELS", 50)
    assert (np.asarray(open_rgb(path)) == whole).all()


def colour_profile(size):
    return chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(size)))


@pytest.mark.parametrize(
    "chunks",
    [
        [colour_profile(3_000_000)],
        [chunk(b"zTXt", b"note\0\0" + zlib.compress(b"x" * 3_000_000))],
        [chunk(b"iTXt", b"note\0\1\0\0\0" + zlib.compress(b"x" * 3_000_000))],
        [chunk(b"tEXt", b"note\0" + b"x" * 3_000_000)],
    ],
    ids=["colour profile", "compressed", "international", "plain"],
)
def test_a_png_with_much_beside_its_pixels_is_read(tmp_path, chunks):
    path = tmp_path / "a.png"
    path.write_bytes(png(8, 8, *chunks, rows=(b"\0" + b"\x64" * 8) * 8))
    assert pixel(path) == (100, 100, 100)


@pytest.mark.parametrize(
    "chunks",
    [
        [colour_profile(300_000_000)],
        [chunk(b"iTXt", b"%d\0\1\0\0\0" % k + zlib.compress(b"x" * 15_000_000)) for k in range(20)],
    ],
    ids=["colour profile", "texts"],
)
def test_a_png_that_inflates_beside_its_pixels_is_refused(tmp_path, chunks):
    path = tmp_path / "a.png"
    path.write_bytes(png(8, 8, *chunks))
    with pytest.raises(UserError, match="is broken.*save it without"):
        load_image(path, 8)


@pytest.mark.parametrize("place", ["/dev/zero", "/dev/null", "fifo", "link to a fifo", "link to nothing"])
def test_only_a_regular_file_is_read_and_others_are_refused_at_once(tmp_path, place):
    os.mkfifo(tmp_path / "fifo")
    path = tmp_path / "a.png"
    path.symlink_to({"link to a fifo": tmp_path / "fifo", "link to nothing": "gone"}.get(place, place))
    path = tmp_path / place if place == "fifo" else path
    kind = "does not exist" if place == "link to nothing" else "is a device|is a pipe"
    with pytest.raises(UserError, match=f"{path} ({kind})"):
        load_image(path, 8)


def test_an_image_of_another_user_is_named_with_its_permission(unprivileged):
    path = saved(unprivileged, Image.new("RGB", (8, 8)))
    path.chmod(0)
    with pytest.raises(UserError, match="image.png.*Permission denied: give this user the permission"):
        load_image(path, 8)


@pytest.mark.parametrize("name", ["gone.png", "folder.png"])
def test_a_missing_image_and_a_folder_are_named_as_such(tmp_path, name):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match="does not exist" if name == "gone.png" else "is a folder"):
        load_image(tmp_path / name, 8)


@pytest.mark.parametrize("suffix", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
def test_a_damaged_image_never_ends_in_an_unforeseen_error(tmp_path, monkeypatch, suffix):
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


# The part of an image that is trained


NOISE = np.random.default_rng(7).integers(0, 256, (37, 53, 3), dtype=np.uint8)


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


# The size without decoding


@pytest.mark.parametrize("name", ["a.jpg", "a.mpo", "a.png", "a.webp", "a.tif", "a.avif"])
@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
def test_the_size_is_that_of_the_upright_image_and_nothing_is_decoded(tmp_path, monkeypatch, name, orientation):
    if name.endswith("avif"):
        needs_avif()
    exif = Image.Exif()
    exif[0x0112] = orientation
    settings = {"a.mpo": {"save_all": True, "append_images": [Image.new("RGB", (9, 6))]}}
    path = saved(tmp_path, Image.new("RGB", (19, 6)), name, exif=exif, **settings.get(name, {}))
    expected = open_rgb(path).size
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail("decoded"))
    assert read_size(path) == expected == ((6, 19) if orientation > 4 else (19, 6))


@pytest.mark.parametrize("name", ["a.png", "a.gif", "a.bmp", "a.ppm"])
def test_the_size_of_an_image_without_exif(tmp_path, monkeypatch, name):
    path = saved(tmp_path, Image.new("RGB", (19, 6)), name)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail("decoded"))
    assert read_size(path) == (19, 6)


def test_the_orientation_behind_the_pixels_of_a_png_counts(tmp_path, monkeypatch):
    held = []
    monkeypatch.setattr(transforms._memory, "hold", lambda units: held.append(units) or transforms._Budget(1).hold(1))
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded("PNG")
    end = content.index(b"IEND") - 4
    path = tmp_path / "a.png"
    for late in (chunk(b"eXIf", exif.tobytes()[6:]), chunk(b"iTXt", XMP)):
        path.write_bytes(png(19, 6)[:-12] + late + content[end:])
        assert read_size(path) == open_rgb(path).size == (6, 19)
    assert held == [19 * 6 * 12] * 4  # the size takes as much as the image
    path.write_bytes(png(19, 6))
    assert read_size(path) == open_rgb(path).size == (19, 6)


XMP = b'XML:com.adobe.xmp\0\0\0\0\0<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


@pytest.mark.parametrize("content", [b"", b"text", encoded("PNG")[:20], bmp(13_300, 13_300)])
def test_a_file_without_a_usable_size_is_named(tmp_path, content):
    path = tmp_path / "cat.png"
    path.write_bytes(content)
    with pytest.raises(BrokenImage, match="cat.png"):
        read_size(path)


# Transparency


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_are_laid_on_the_given_colour(tmp_path, mode):
    image = Image.new("RGBA", (8, 8), (100, 100, 100, 0))
    image.putpixel((3, 3), (100, 100, 100, 255))
    if mode == "P":
        image = image.convert("RGB").quantize(2)
        path = saved(tmp_path, image, transparency=image.getpixel((0, 0)))
        image = Image.open(path).convert("RGBA")
    else:
        path = saved(tmp_path, image.convert(mode))
    result = np.asarray(open_rgb(path, alpha_color=(10, 20, 30)))
    assert tuple(result[0, 0]) == (10, 20, 30)
    assert load_image(path, 8, alpha_color=(10, 20, 30))[:, 0, 0] == pytest.approx(np.array([10, 20, 30]) / 127.5 - 1)
    if mode != "P":
        assert tuple(result[3, 3]) == (100, 100, 100)


def test_half_transparent_parts_are_mixed_with_the_colour(tmp_path):
    path = saved(tmp_path, Image.new("RGBA", (8, 8), (200, 100, 0, 51)))
    assert tuple(np.asarray(open_rgb(path, alpha_color=(0, 0, 250)))[0, 0]) == pytest.approx((40, 20, 200), abs=1)


@pytest.mark.parametrize("text", ["white", "#fff", "#FFFFFF", "rgb(255, 255, 255)"])
def test_a_colour_is_read_from_a_setting(text):
    assert parse_color("alpha_color", text) == WHITE


@pytest.mark.parametrize("text", ["", "whitish", "255", "#12345", "#ffffff00", "rgb(1,2)", "x" * 500])
def test_what_is_no_colour_is_named_with_the_setting(text):
    with pytest.raises(UserError, match="alpha_color: .*give a colour such as white"):
        parse_color("alpha_color", text)


# Colour profiles


def rgb_at(path, x=0, y=0, **settings):
    return tuple(int(value) for value in np.asarray(open_rgb(path, **settings))[y, x])


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tif", "a.avif"])
def test_an_image_with_another_profile_is_converted_to_srgb(tmp_path, name):
    if name.endswith("avif"):
        needs_avif()
    image = Image.new("RGB", (16, 16), (100, 150, 200))
    path = saved(tmp_path, image, name, icc_profile=rgb_profile())
    assert rgb_at(path) == pytest.approx(adobe_in_srgb((100, 150, 200)), abs=4)
    assert rgb_at(path) != pytest.approx((100, 150, 200), abs=12)


def test_an_image_in_srgb_keeps_its_values(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    path = saved(tmp_path, Image.fromarray(NOISE), icc_profile=srgb)
    assert (np.asarray(open_rgb(path)) == NOISE).all()


def test_transparent_parts_are_laid_on_the_colour_after_the_conversion(tmp_path):
    image = Image.new("RGBA", (8, 8), (100, 150, 200, 255))
    image.putpixel((0, 0), (100, 150, 200, 0))
    image.putpixel((1, 0), (100, 150, 200, 128))
    path = saved(tmp_path, image, icc_profile=rgb_profile())
    full = adobe_in_srgb((100, 150, 200))
    assert rgb_at(path, 3, 3) == pytest.approx(full, abs=1)
    assert rgb_at(path, 0, 0, alpha_color=(10, 20, 30)) == (10, 20, 30)
    assert rgb_at(path, 1, 0, alpha_color=(0, 0, 0)) == pytest.approx(full / 2, abs=2)


def test_a_palette_and_a_grey_image_take_an_rgb_profile_too(tmp_path):
    palette = Image.new("RGB", (8, 8), (100, 150, 200)).quantize(2)
    path = saved(tmp_path, palette, "p.png", icc_profile=rgb_profile())
    assert rgb_at(path) == pytest.approx(adobe_in_srgb((100, 150, 200)), abs=1)
    path = saved(tmp_path, Image.new("L", (8, 8), 100), "l.png", icc_profile=rgb_profile())
    assert rgb_at(path) == pytest.approx(adobe_in_srgb((100, 100, 100)), abs=1)


@pytest.mark.parametrize(
    "image",
    [
        Image.new("L", (8, 8), 100),
        Image.new("LA", (8, 8), (100, 255)),
        Image.fromarray(np.full((8, 8), 100 * 257, np.uint16)),
    ],
    ids=["L", "LA", "16 bits"],
)
def test_grey_images_take_a_grey_profile(tmp_path, image):
    path = saved(tmp_path, image, icc_profile=grey_profile(1.8))
    assert rgb_at(path) == pytest.approx([power_in_srgb(100, 1.8)] * 3, abs=1)


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk_is_converted_by_its_profile(tmp_path, suffix):
    path = saved(tmp_path, Image.new("CMYK", (16, 16), (255, 0, 0, 0)), f"a.{suffix}", icc_profile=cmyk_profile())
    assert rgb_at(path) == pytest.approx((119, 119, 119), abs=3)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "CMYK", "L"])
def test_a_conversion_in_strips_gives_the_same_image(tmp_path, monkeypatch, mode):
    values = np.random.default_rng(0).integers(0, 256, (23, 17, 4), dtype=np.uint8)
    channels = [Image.fromarray(values[..., channel].copy()) for channel in range(4)]
    image = channels[0] if mode == "L" else Image.merge(mode, channels[: len(mode)])
    profile = {"CMYK": cmyk_profile(), "L": grey_profile(1.4), "LA": grey_profile(1.4)}.get(mode, rgb_profile())
    path = saved(tmp_path, image, "a.tif", icc_profile=profile)
    whole = np.asarray(open_rgb(path))
    monkeypatch.setattr(transforms, "STRIP_PIXELS", 50)
    assert (np.asarray(open_rgb(path)) == whole).all()


@pytest.mark.parametrize(
    ("image", "profile", "fault"),
    [
        (Image.new("RGB", (8, 8), GREEN), rgb_profile()[:-60], "a damaged or unknown colour profile"),
        (Image.new("RGB", (8, 8), GREEN), b"no profile", "a damaged or unknown colour profile"),
        (Image.new("RGB", (8, 8), GREEN), cmyk_profile(), "a colour profile of another kind of image"),
        (Image.new("RGB", (8, 8), GREEN), grey_profile(1.0), "a colour profile of another kind of image"),
        (Image.new("RGB", (8, 8), GREEN).quantize(2), grey_profile(1.0), "a colour profile of another kind of image"),
        (Image.new("RGBA", (8, 8), GREEN), cmyk_profile(), "a colour profile of another kind of image"),
        (Image.new("CMYK", (8, 8), (255, 0, 255, 0)), rgb_profile(), "a colour profile of another kind of image"),
    ],
    ids=["cut off", "no profile", "cmyk", "grey", "palette, grey", "alpha, cmyk", "rgb for cmyk"],
)
def test_a_profile_that_cannot_be_used_is_ignored_and_counted(tmp_path, image, profile, fault):
    path, notes = saved(tmp_path, image, "a.tif", icc_profile=profile), ImageNotes()
    assert rgb_at(path, notes=notes) == pytest.approx(GREEN, abs=1)
    assert notes.lines() == [f"1 image has {fault}, which is ignored: {path}"]


# Notes


def animation(tmp_path, name, **settings):
    frames = [Image.new("RGB", (8, 8), color) for color in (GREEN, BLUE)]
    return saved(tmp_path, Image.new("RGB", (8, 8), RED), name, save_all=True, append_images=frames, **settings)


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tif", "a.avif"])
def test_an_animation_is_its_first_frame_and_that_is_said(tmp_path, name):
    if name.endswith("avif"):
        needs_avif()
    path, notes = animation(tmp_path, name), ImageNotes()
    assert rgb_at(path, notes=notes) == pytest.approx(RED, abs=6)
    assert notes.lines() == [f"1 image has several frames, of which the first is used: {path}"]
    load_image(path, 8, notes=notes)
    assert len(notes.lines()) == 1 and notes.lines()[0].startswith("1 image")


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tif", "a.jpg", "a.bmp", "a.ppm", "a.mpo"])
def test_nothing_is_said_of_an_image_of_one_frame(tmp_path, name):
    # The second image of a camera's MPO is a preview.
    settings = {"save_all": True, "append_images": [Image.new("RGB", (9, 6))]} if name == "a.mpo" else {}
    path, notes = saved(tmp_path, Image.fromarray(NOISE), name, **settings), ImageNotes()
    open_rgb(path, notes=notes)
    assert notes.lines() == []


def test_a_damaged_second_frame_does_not_matter(tmp_path):
    path, notes = animation(tmp_path, "a.gif"), ImageNotes()
    content = path.read_bytes()
    for length in range(content.index(b"\x3b", 30) if b"\x3b" in content[30:] else len(content) - 1, len(content)):
        path.write_bytes(content[:length])
        try:
            assert rgb_at(path, notes=notes) == RED
        except BrokenImage:
            continue


def test_many_images_are_counted_and_the_first_are_named():
    notes = ImageNotes()
    threads = [threading.Thread(target=lambda: [notes.add("a fault", f"{i:04d}.png") for i in range(1200)])] * 1
    threads += [threading.Thread(target=lambda: [notes.add("a fault", f"{i:04d}.png") for i in range(600)])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    notes.add("another", "x\n.png")
    assert notes.lines() == [
        "1,200 images have a fault: 0000.png, 0001.png, 0002.png, ...",
        "1 image has another: x .png",
    ]


# AVIF


def needs_avif():
    if "AVIF" not in transforms.FORMATS:
        pytest.skip("this Pillow does not read AVIF")


def test_avif_is_read_with_its_transparency_and_within_its_memory(tmp_path, monkeypatch):
    needs_avif()
    path = saved(tmp_path, Image.new("RGBA", (16, 16), (200, 40, 40, 0)), "a.avif")
    assert rgb_at(path) == WHITE
    path = saved(tmp_path, Image.new("RGB", (16, 16), (200, 40, 40)), "b.avif")
    assert rgb_at(path) == pytest.approx((200, 40, 40), abs=4)
    held = []
    monkeypatch.setattr(transforms._memory, "hold", lambda units: held.append(units) or transforms._Budget(1).hold(1))
    load_image(path, 8)
    assert held == [16 * 16 * 24]


def test_an_avif_of_too_many_pixels_is_not_decoded(tmp_path, monkeypatch):
    needs_avif()
    path = saved(tmp_path, Image.new("RGB", (64, 64)), "a.avif")
    monkeypatch.setattr(transforms, "MAX_MEMORY", 24 * 4000)
    with pytest.raises(UserError, match="64 x 64 pixels, at most 4,000 of an AVIF are read"):
        load_image(path, 8)


def test_an_avif_is_decoded_by_one_thread():
    needs_avif()
    from PIL import AvifImagePlugin

    assert AvifImagePlugin._get_default_max_threads() == 1


@pytest.mark.parametrize("brand", [b"avif", b"avis"])
def test_without_avif_the_file_is_named_with_the_version_that_reads_it(tmp_path, monkeypatch, brand):
    monkeypatch.setattr(transforms, "FORMATS", ("PNG", "JPEG"))
    path = tmp_path / "a.png"
    path.write_bytes(b"\0\0\0\x20ftyp" + brand + bytes(20))
    for read in (lambda: load_image(path, 8), lambda: read_size(path)):
        with pytest.raises(UserError, match="a.png is an AVIF, .* install Pillow 11.3, or save it as PNG"):
            read()
    path.write_bytes(encoded("PNG"))
    assert read_size(path) == open_rgb(path).size == (32, 32)


# Images inside larger files


def part_of(tmp_path, content, name="a/cat.png"):
    """`content` in the middle of a larger file."""
    path = tmp_path / "shard-00.tar"
    path.write_bytes(b"\x89PNG before" + content + b"behind")
    return FilePart(str(path), len(b"\x89PNG before"), len(content), name)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tif", "ppm", "avif"])
def test_a_part_of_a_file_is_read_as_the_file_that_has_its_bytes(tmp_path, suffix):
    if suffix == "avif":
        needs_avif()
    settings = {"tif": {"compression": "tiff_lzw"}}.get(suffix, {})
    if suffix not in ("gif", "bmp", "ppm"):
        exif = Image.Exif()
        exif[0x0112] = 6
        settings["exif"] = exif
    path = saved(tmp_path, Image.fromarray(NOISE), f"a.{suffix}", **settings)
    part = part_of(tmp_path, path.read_bytes())
    assert read_size(part) == read_size(path)
    assert open_rgb(part).tobytes() == open_rgb(path).tobytes()
    first, second = (
        load_image(file, (16, 24), random_crop=True, random_flip=True, rng=np.random.default_rng(1))
        for file in (path, part)
    )
    assert (first == second).all()


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "is an empty file"),
        (b"this is text, called .png\n", "is no image in a known format"),
        (encoded("PNG")[:60], "is broken"),
        (bmp(13_300, 13_300), "has 13,300 x 13,300 pixels, at most 120,000,000 are read"),
    ],
    ids=["empty", "text", "cut off", "large"],
)
def test_a_broken_part_is_named_with_its_file(tmp_path, content, fault):
    part = part_of(tmp_path, content)
    for read in (open_rgb, lambda part: load_image(part, 8)) + ((read_size,) if fault != "is broken" else ()):
        with pytest.raises(UserError, match=f"^the image a/cat.png in {part.file} {fault}"):
            read(part)


def test_a_part_of_many_gigabytes_is_not_read(tmp_path):
    part = part_of(tmp_path, encoded("PNG"))._replace(size=100 << 30)
    with pytest.raises(BrokenImage, match=f"a/cat.png in {part.file} has 107,374,182,400 bytes, at most 720,000,000"):
        open_rgb(part)


def test_a_part_whose_file_is_cut_off_or_gone_is_named(tmp_path):
    part = part_of(tmp_path, encoded("PNG"))
    os.truncate(part.file, 100)
    with pytest.raises(BrokenImage, match=f"^the image a/cat.png in {part.file} is cut off: the file has changed"):
        open_rgb(part)
    os.unlink(part.file)
    with pytest.raises(BrokenImage, match=f"^the image a/cat.png in {part.file} cannot be read: .*does not exist"):
        open_rgb(part)


def test_a_part_reserves_its_own_bytes_and_its_memory(tmp_path, monkeypatch):
    held, part = [], part_of(tmp_path, encoded("PNG"))
    for budget in (transforms._open_bytes, transforms._memory):
        monkeypatch.setattr(budget, "hold", lambda units: held.append(units) or transforms._Budget(1).hold(1))
    load_image(part, 8)
    assert held == [part.size, 32 * 32 * 12]


def test_a_note_of_a_part_names_its_file(tmp_path):
    path, notes = animation(tmp_path, "a.gif"), ImageNotes()
    part = part_of(tmp_path, path.read_bytes(), "cat.gif")
    open_rgb(part, notes=notes)
    assert notes.lines() == [f"1 image has several frames, of which the first is used: cat.gif in {part.file}"]


def test_an_avif_in_a_part_is_named_with_the_version_that_reads_it(tmp_path, monkeypatch):
    monkeypatch.setattr(transforms, "FORMATS", ("PNG", "JPEG"))
    with pytest.raises(BrokenImage, match="a/cat.png in .* is an AVIF, .* install Pillow 11.3"):
        open_rgb(part_of(tmp_path, b"\0\0\0\x20ftypavif" + bytes(20)))
    assert open_rgb(part_of(tmp_path, encoded("PNG"))).size == (32, 32)
