"""Colours are converted to sRGB from the profile in the file, and sRGB itself is left alone."""

import io
import threading

import numpy as np
import pytest
from PIL import Image, ImageCms

from ldm.data import colour_profiles
from ldm.data.colour_profiles import UnusableProfile, find_conversion
from tests.data.icc_profiles import SRGB, adobe_in_srgb, cmyk_profile, grey_profile, power_in_srgb, rgb_profile

SRGB_PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(colour_profiles, "_known", {})


def converted(profile, color):
    conversion = find_conversion(profile)
    return conversion.transform.apply(Image.new(conversion.mode, (1, 1), color)).getpixel((0, 0))


@pytest.mark.parametrize("color", [(100, 150, 200), (0, 255, 0), (10, 20, 30), (250, 128, 3), (255, 255, 255)])
def test_rgb_is_converted_by_the_formulas_of_the_standards(color):
    assert converted(rgb_profile(), color) == pytest.approx(adobe_in_srgb(color), abs=1)


@pytest.mark.parametrize("value", [0, 10, 128, 250])
def test_grey_is_converted_from_its_curve(value):
    assert converted(grey_profile(1.8), value) == pytest.approx([power_in_srgb(value, 1.8)] * 3, abs=1)


def test_cmyk_is_converted_from_its_table():
    assert converted(cmyk_profile(), (255, 0, 0, 0)) == pytest.approx([119] * 3, abs=1)  # L* 50
    assert converted(cmyk_profile(), (0, 255, 0, 0)) == (255, 255, 255)
    assert converted(cmyk_profile(), (0, 0, 0, 255)) == (0, 0, 0)


def test_srgb_needs_no_conversion_under_whatever_name():
    assert find_conversion(SRGB_PROFILE) is None
    assert find_conversion(SRGB_PROFILE + b"\0" * 8) is None


def test_the_primaries_of_srgb_with_another_curve_are_not_srgb():
    assert find_conversion(rgb_profile(SRGB, 2.2)) is not None
    assert find_conversion(rgb_profile(SRGB, 1.0)) is not None


@pytest.mark.parametrize(
    "profile",
    [b"x", bytes(1000), rgb_profile()[:-40], rgb_profile()[:90], rgb_profile().replace(b"RGB ", b"6CLR"), "text", 7],
    ids=["one byte", "zeros", "cut off", "cut in the header", "six inks", "a text", "a number"],
)
def test_a_damaged_or_unknown_profile_is_refused_each_time(profile):
    for _ in range(2):
        with pytest.raises(UnusableProfile):
            find_conversion(profile)


@pytest.mark.parametrize("whole", [rgb_profile(), cmyk_profile(), grey_profile(2.2), SRGB_PROFILE])
def test_random_damage_never_ends_in_another_error(whole):
    rng, refused = np.random.default_rng(0), 0
    for _ in range(60):
        damaged = bytearray(whole[: rng.integers(1, len(whole) + 1)])
        for place in rng.integers(len(damaged), size=3):
            damaged[place] = rng.integers(256)
        try:
            find_conversion(bytes(damaged))
        except UnusableProfile:
            refused += 1
    assert refused > 0


def test_a_profile_is_read_once_and_few_are_kept(monkeypatch):
    reads = []
    read = colour_profiles._read
    monkeypatch.setattr(colour_profiles, "_read", lambda profile: reads.append(profile) or read(profile))
    for _ in range(3):
        find_conversion(rgb_profile())
    assert len(reads) == 1
    monkeypatch.setattr(colour_profiles, "_MOST_KNOWN", 2)
    for gamma in (1.0, 1.2, 1.4, 1.6, 1.8):
        find_conversion(grey_profile(gamma))
        assert len(colour_profiles._known) <= 2


def test_threads_share_a_conversion():
    conversion = find_conversion(rgb_profile())
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    expected, results = conversion.transform.apply(noise).tobytes(), []
    threads = [
        threading.Thread(target=lambda: results.append(conversion.transform.apply(noise).tobytes())) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert results == [expected] * 8


def test_the_profiles_of_these_tests_are_valid():
    for profile, space in ((rgb_profile(), "RGB "), (grey_profile(2.2), "GRAY"), (cmyk_profile(), "CMYK")):
        assert ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.xcolor_space == space
