"""Every common kind of image file is opened, within bounds, and what cannot be is named with its fault."""

import os
import threading
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from ldm.data import decoding
from ldm.data.decoding import BrokenImage, read_size
from ldm.data.transforms import load_image
from ldm.data.upright import open_rgb
from ldm.errors import UserError
from tests.data.image_bytes import (
    NOISE,
    RED,
    WHITE,
    bmp,
    chunk,
    encoded,
    gif,
    needs_avif,
    part_of,
    pixel,
    png,
    rgb_at,
    saved,
    webp,
)

pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")  # pytest puts its own filters in place of the module's


@pytest.mark.parametrize("name", ["p.jpg", "p.webp", "p.bmp", "p.gif", "p.tif", "p.ppm", "a.JPEG", "two words é.png"])
def test_formats(tmp_path, name):
    path = saved(tmp_path, Image.new("RGB", (8, 8), (200, 40, 40)), name)
    assert pixel(path) == pytest.approx((200, 40, 40), abs=4)


def test_the_content_decides_the_format_not_the_name(tmp_path):
    path = saved(tmp_path, Image.new("RGB", (8, 8), RED), "really_a_bmp.png", format="BMP")
    assert pixel(path) == RED


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
    assert decoding.MAX_MEMORY // decoding.BYTES_A_PIXEL > 11_648 * 8_736 < decoding.MAX_BYTES // 6


def test_the_memory_of_a_large_image_goes_back_to_the_system():
    assert Image.core.get_block_size() > 32 << 20  # glibc keeps what is smaller


def test_a_file_of_many_gigabytes_is_not_read(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded("PNG"))
    os.truncate(path, 100 << 30)  # sparse
    with pytest.raises(UserError, match="has 107,374,182,400 bytes, at most 720,000,000 are read"):
        load_image(path, 8)


def test_threads_share_a_bound_and_a_larger_request_runs_alone():
    budget, inside, seen = decoding._Budget(10), [], []

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
    monkeypatch.setattr(decoding._memory, "hold", lambda units: held.append(units) or decoding._Budget(1).hold(1))
    for suffix in ("PNG", "WEBP"):
        (tmp_path / suffix).write_bytes(encoded(suffix))
        load_image(tmp_path / suffix, 8)
    assert held == [32 * 32 * 12, 32 * 32 * 16]


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
    monkeypatch.setattr(decoding._memory, "hold", lambda units: held.append(units) or decoding._Budget(1).hold(1))
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


def test_avif_is_read_with_its_transparency_and_within_its_memory(tmp_path, monkeypatch):
    needs_avif()
    path = saved(tmp_path, Image.new("RGBA", (16, 16), (200, 40, 40, 0)), "a.avif")
    assert rgb_at(path) == WHITE
    path = saved(tmp_path, Image.new("RGB", (16, 16), (200, 40, 40)), "b.avif")
    assert rgb_at(path) == pytest.approx((200, 40, 40), abs=4)
    held = []
    monkeypatch.setattr(decoding._memory, "hold", lambda units: held.append(units) or decoding._Budget(1).hold(1))
    load_image(path, 8)
    assert held == [16 * 16 * 24]


def test_an_avif_of_too_many_pixels_is_not_decoded(tmp_path, monkeypatch):
    needs_avif()
    path = saved(tmp_path, Image.new("RGB", (64, 64)), "a.avif")
    monkeypatch.setattr(decoding, "MAX_MEMORY", 24 * 4000)
    with pytest.raises(UserError, match="64 x 64 pixels, at most 4,000 of an AVIF are read"):
        load_image(path, 8)


def test_an_avif_is_decoded_by_one_thread():
    needs_avif()
    from PIL import AvifImagePlugin

    assert AvifImagePlugin._get_default_max_threads() == 1


@pytest.mark.parametrize("brand", [b"avif", b"avis"])
def test_without_avif_the_file_is_named_with_the_version_that_reads_it(tmp_path, monkeypatch, brand):
    monkeypatch.setattr(decoding, "FORMATS", ("PNG", "JPEG"))
    path = tmp_path / "a.png"
    path.write_bytes(b"\0\0\0\x20ftyp" + brand + bytes(20))
    for read in (lambda: load_image(path, 8), lambda: read_size(path)):
        with pytest.raises(UserError, match="a.png is an AVIF, .* install Pillow 11.3, or save it as PNG"):
            read()
    path.write_bytes(encoded("PNG"))
    assert read_size(path) == open_rgb(path).size == (32, 32)


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
    for budget in (decoding._open_bytes, decoding._memory):
        monkeypatch.setattr(budget, "hold", lambda units: held.append(units) or decoding._Budget(1).hold(1))
    load_image(part, 8)
    assert held == [part.size, 32 * 32 * 12]


def test_an_avif_in_a_part_is_named_with_the_version_that_reads_it(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "FORMATS", ("PNG", "JPEG"))
    with pytest.raises(BrokenImage, match="a/cat.png in .* is an AVIF, .* install Pillow 11.3"):
        open_rgb(part_of(tmp_path, b"\0\0\0\x20ftypavif" + bytes(20)))
    assert open_rgb(part_of(tmp_path, encoded("PNG"))).size == (32, 32)
