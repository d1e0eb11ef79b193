"""Every common kind of image becomes what a viewer shows: upright, in sRGB, on the given colour."""

import threading

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from ldm.data import upright
from ldm.data.decoding import BrokenImage
from ldm.data.transforms import load_image
from ldm.data.upright import ImageNotes, open_rgb, parse_color
from ldm.errors import UserError
from tests.data.icc_profiles import adobe_in_srgb, cmyk_profile, grey_profile, power_in_srgb, rgb_profile
from tests.data.image_bytes import (
    BLUE,
    GREEN,
    NOISE,
    RED,
    TURNED,
    WHITE,
    exif_block,
    needs_avif,
    part_of,
    pixel,
    rgb_at,
    saved,
)

pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")  # pytest puts its own filters in place of the module's


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
    monkeypatch.setattr(upright, "STRIP_PIXELS", 50)
    assert (np.asarray(open_rgb(path)) == whole).all()


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
    monkeypatch.setattr(upright, "STRIP_PIXELS", 50)
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


def test_a_note_of_a_part_names_its_file(tmp_path):
    path, notes = animation(tmp_path, "a.gif"), ImageNotes()
    part = part_of(tmp_path, path.read_bytes(), "cat.gif")
    open_rgb(part, notes=notes)
    assert notes.lines() == [f"1 image has several frames, of which the first is used: cat.gif in {part.file}"]
