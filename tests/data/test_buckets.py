"""Images are sorted into sizes of similar shape, nothing is stretched, and every batch is of one size."""

import math

import numpy as np
import pytest

from ldm.data.buckets import bucket_sizes, crop_box, make_buckets
from ldm.errors import UserError
from ldm.settings.data import BucketSettings
from ldm.settings.declare import names_of


def settings(**others):
    return BucketSettings(enable_bucket=True, **others)


def both(*sizes):
    """The sizes and their transposes, sorted."""
    return sorted({*sizes, *((height, width) for width, height in sizes)})


SMALL = {"min_bucket_reso": 32, "max_bucket_reso": 128, "bucket_reso_steps": 16}

# The list


def test_names_and_defaults_are_those_of_sd_scripts():
    assert BucketSettings() == BucketSettings(
        enable_bucket=False, min_bucket_reso=256, max_bucket_reso=1024, bucket_reso_steps=64, bucket_no_upscale=False,
        max_buckets=None,
    )  # fmt: skip
    assert len(names_of(BucketSettings, resume="fixed")) == 6


def test_the_buckets_of_512_pixels_are_those_of_sd_scripts():
    sizes = bucket_sizes((512, 512), settings(), 64)
    assert sizes == both(
        (512, 512), (256, 832), (256, 896), (256, 960), (256, 1024), (320, 704), (320, 768), (384, 640), (448, 576)
    )
    assert len(sizes) == 17


def test_the_buckets_of_768_pixels_are_those_of_sd_scripts():
    sizes = bucket_sizes((768, 768), settings(), 64)
    assert len(sizes) == 19 and (768, 768) in sizes and sizes == both(*sizes)


def test_the_buckets_of_64_pixels_are_those_of_sd_scripts():
    assert bucket_sizes((64, 64), settings(**SMALL), 16) == both((64, 64), (32, 96), (32, 112), (32, 128), (48, 80))


@pytest.mark.parametrize("resolution", [(512, 512), (512, 768), (700, 333), (1000, 1000)])
def test_a_bucket_has_at_most_the_area_of_the_resolution_and_sides_of_whole_steps(resolution):
    sizes = np.array(bucket_sizes(resolution, settings(), 64))
    assert (sizes.prod(axis=1) <= math.prod(resolution)).all() and (sizes % 64 == 0).all()
    assert sizes.min() >= 256 and sizes.max() <= 1024


def test_limits_are_rounded_to_whole_steps_and_that_is_said():
    rough, exact = settings(min_bucket_reso=300, max_bucket_reso=1000), settings(min_bucket_reso=256)
    assert bucket_sizes((512, 512), rough, 64) == bucket_sizes((512, 512), exact, 64)
    changes = make_buckets([(1, 1)], (512, 512), rough, 64).changes
    assert changes == [
        "min_bucket_reso 300 counts as 256, a multiple of bucket_reso_steps 64",
        "max_bucket_reso 1000 counts as 1024, a multiple of bucket_reso_steps 64",
    ]


def test_a_minimum_below_a_step_is_a_step():
    low = settings(min_bucket_reso=8, max_bucket_reso=64, bucket_reso_steps=32)
    assert bucket_sizes((64, 64), low, 8) == [(32, 64), (64, 32), (64, 64)]


@pytest.mark.parametrize(
    ("resolution", "others", "message"),
    [
        (
            (512, 512),
            {"bucket_reso_steps": 32},
            "bucket_reso_steps is 32: .* multiples of 64 pixels .*; 64 is the next",
        ),
        ((512, 512), {"bucket_reso_steps": 96}, "128 is the next"),
        ((512, 512), {"min_bucket_reso": 576}, "min_bucket_reso 576 is above the resolution 512x512"),
        ((512, 768), {"max_bucket_reso": 640}, "max_bucket_reso 640 is below the resolution 512x768"),
        ((48, 48), {"min_bucket_reso": 8}, "48x48 is below bucket_reso_steps 64"),
    ],
)
def test_settings_that_do_not_fit_are_named_with_the_way_out(resolution, others, message):
    with pytest.raises(UserError, match=message):
        bucket_sizes(resolution, settings(**others), 64)


@pytest.mark.parametrize("name", ["min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "max_buckets"])
@pytest.mark.parametrize("value", [0, -64, 2.5, "64"])
def test_a_setting_out_of_range_is_named(name, value):
    with pytest.raises(UserError, match=name):
        BucketSettings(**{name: value})


def test_without_buckets_the_resolution_is_the_only_one_and_must_fit_the_model():
    buckets = make_buckets([(640, 480), (100, 900)], (512, 768), BucketSettings(), 64)
    assert buckets.sizes == [(512, 768)] and buckets.of_row.tolist() == [0, 0] and buckets.graphs == 1
    with pytest.raises(UserError, match="the resolution is 500: .* 512 is the next"):
        make_buckets([(640, 480)], (512, 500), BucketSettings(), 64)


# The choice


@pytest.mark.parametrize(
    ("image", "bucket"),
    [
        ((512, 512), (512, 512)),
        ((1000, 1000), (512, 512)),
        ((1, 1), (512, 512)),
        ((1920, 1080), (640, 384)),  # 1.778; 640 / 384 = 1.667, 704 / 320 = 2.2
        ((1080, 1920), (384, 640)),
        ((5000, 10), (1024, 256)),
        ((10, 5000), (256, 1024)),
        ((800, 640), (576, 448)),
        ((448, 576), (448, 576)),
    ],
)
def test_an_image_takes_the_bucket_of_the_least_difference_of_aspect(image, bucket):
    assert make_buckets([image], (512, 512), settings(), 64).sizes == [bucket]


def test_the_first_of_equals_is_taken():
    wide = settings(min_bucket_reso=32, max_bucket_reso=128, bucket_reso_steps=32)
    assert bucket_sizes((64, 64), wide, 32) == both((32, 96), (32, 128), (64, 64))
    # Halfway between 1 and 3, and between 3 and 4.
    assert make_buckets([(2, 1), (7, 2)], (64, 64), wide, 32).sizes == [(64, 64), (96, 32)]


def test_many_images_are_sorted_as_one_by_one():
    images = np.random.default_rng(0).integers(20, 3000, (300, 2))
    together = make_buckets(images, (512, 512), settings(), 64)
    for row, image in enumerate(images):
        alone = make_buckets([image], (512, 512), settings(), 64)
        assert alone.sizes == [together.size(row)] and alone.cropped[0] == together.cropped[row]
    assert set(together.of_row) == set(range(together.graphs))


def test_no_images_are_refused():
    with pytest.raises(UserError, match="no usable images"):
        make_buckets([], (512, 512), settings(), 64)


# The part of an image that is trained


def test_the_part_is_the_largest_in_the_middle():
    assert crop_box((640, 480), (512, 512)) == (80, 0, 560, 480)
    assert crop_box((480, 640), (512, 512)) == (0, 80, 480, 560)
    assert crop_box((1000, 1000), (640, 384)) == (0, 200, 1000, 800)
    assert crop_box((1000, 1000), (384, 640)) == (200, 0, 800, 1000)
    assert crop_box((448, 576), (448, 576)) == (0, 0, 448, 576)
    assert crop_box((513, 512), (256, 256)) == (0.5, 0, 512.5, 512)


def test_nothing_is_stretched_and_no_part_reaches_out_of_the_image():
    rng = np.random.default_rng(0)
    for image, target in zip(rng.integers(1, 4000, (400, 2)).tolist(), (rng.integers(1, 17, (400, 2)) * 64).tolist()):
        for scale in (None, 1.0, 0.31):
            left, top, right, bottom = crop_box(tuple(image), tuple(target), scale, rng if rng.random() < 0.5 else None)
            assert 0 <= left and 0 <= top and right <= image[0] + 1e-9 and bottom <= image[1] + 1e-9
            assert (right - left) * target[1] == pytest.approx((bottom - top) * target[0])


def test_a_random_part_lies_at_whole_pixels_anywhere_along_the_longer_side():
    rng = np.random.default_rng(0)
    boxes = {crop_box((14, 10), (64, 64), None, rng) for _ in range(200)}
    assert boxes == {(left, 0, left + 10, 10) for left in range(5)}


def test_a_scale_of_one_takes_whole_pixels_as_they_are():
    assert crop_box((701, 500), (640, 448), 1.0) == (30, 26, 670, 474)


def test_a_scale_is_raised_where_the_image_would_not_cover_the_target():
    assert crop_box((100, 200), (128, 128), 1.0) == crop_box((100, 200), (128, 128))
    assert crop_box((1000, 400), (128, 128), 0.4) == (340, 40, 660, 360)


# bucket_no_upscale


@pytest.mark.parametrize(
    ("image", "bucket", "scale"),
    [
        ((300, 400), (256, 384), 1.0),
        ((700, 300), (640, 256), 1.0),
        ((512, 512), (512, 512), 1.0),
        ((511, 513), (448, 512), 1.0),
        ((1024, 1024), (512, 512), 0.5),
        # 682.7 x 384 has the area: 640 / 320 errs by 0.22, 640 / 384 by 0.11, so the height is kept.
        ((1920, 1080), (640, 384), 384 / 1080),
        # 433.9 x 604.2: 384 / 512 errs by 0.03, 384 / 576 by 0.05, so the width is kept.
        ((1970, 2743), (384, 512), 384 / 1970),
        ((1500, 1000), (576, 384), 384 / 1000),  # both are right: the height is kept
    ],
)
def test_without_enlarging_an_image_is_cropped_to_whole_steps_of_its_own_size(image, bucket, scale):
    buckets = make_buckets([image], (512, 512), settings(bucket_no_upscale=True), 64)
    assert buckets.sizes == [bucket] and buckets.scale(0) == pytest.approx(scale) and buckets.enlarged == 0
    box = crop_box(image, bucket, buckets.scale(0))
    kept = (box[2] - box[0]) * (box[3] - box[1]) / math.prod(image)
    assert buckets.cropped[0] == pytest.approx(1 - kept, abs=1e-6)


def test_an_image_below_a_step_is_enlarged_and_that_is_said():
    buckets = make_buckets([(50, 700), (700, 700)], (512, 512), settings(bucket_no_upscale=True), 64)
    assert buckets.size(0) == (64, 640) and buckets.scale(0) == pytest.approx(64 / 50) and buckets.enlarged == 1
    assert "1 image is enlarged in spite of bucket_no_upscale" in buckets.report(str)[-1]


def test_without_enlarging_the_step_must_fit_the_model_too():
    with pytest.raises(UserError, match="bucket_reso_steps is 16"):
        make_buckets([(700, 700)], (512, 512), settings(bucket_no_upscale=True, bucket_reso_steps=16), 64)


# Merging

IMAGES = [(512, 512)] * 4 + [(640, 384)] * 3 + [(704, 320)] * 2 + [(384, 640)]


def test_the_rarest_buckets_are_merged_into_the_most_similar():
    buckets = make_buckets(IMAGES, (512, 512), settings(max_buckets=3), 64)
    assert buckets.sizes == [(512, 512), (640, 384), (704, 320)]
    assert [buckets.size(row) for row in (0, 4, 7, 9)] == [(512, 512), (640, 384), (704, 320), (512, 512)]
    assert buckets.changes == ["384x640 (1 image) is merged into 512x512, because max_buckets is 3"]
    assert buckets.cropped[9] == pytest.approx(0.4)


def test_merging_goes_on_with_the_merged_counts():
    buckets = make_buckets(IMAGES, (512, 512), settings(max_buckets=2), 64)
    assert buckets.sizes == [(512, 512), (640, 384)]
    assert buckets.changes[1] == "704x320 (2 images) is merged into 640x384, because max_buckets is 2"
    # 5 squares and 5 wide ones: the first of equals goes.
    last = make_buckets(IMAGES, (512, 512), settings(max_buckets=1), 64)
    assert last.sizes == [(640, 384)]
    assert last.changes[2] == "512x512 (5 images) is merged into 640x384, because max_buckets is 1"
    assert last.graphs == 1 and last.of_row.tolist() == [0] * 10


def test_repeats_decide_which_bucket_is_rare():
    repeats = [1] * 9 + [10]
    buckets = make_buckets(IMAGES, (512, 512), settings(max_buckets=3), 64, repeats)
    assert buckets.sizes == [(384, 640), (512, 512), (640, 384)]


def test_a_merged_bucket_has_its_images_and_those_merged_into_it_counted_with_and_without_repeats():
    repeats = [1] * 4 + [2] * 3 + [1] * 2 + [1]
    first, second, third = make_buckets(IMAGES, (512, 512), settings(max_buckets=1), 64, repeats).changes
    assert first.startswith("384x640 (1 image) is merged into 512x512")
    assert second.startswith("704x320 (2 images) is merged into 640x384")
    assert third.startswith("512x512 (5 images) is merged into 640x384")
    (line,) = make_buckets(IMAGES[6:8], (512, 512), settings(max_buckets=1), 64, [40, 50]).changes
    assert line.startswith("640x384 (1 image, 40 with repeats) is merged into 704x320")


def test_enough_buckets_are_left_as_they_are():
    assert make_buckets(IMAGES, (512, 512), settings(max_buckets=4), 64).changes == []


def test_without_enlarging_a_bucket_is_merged_into_a_smaller_one_if_there_is_one():
    no_upscale = settings(bucket_no_upscale=True, max_buckets=2)
    images = [(640, 384), (320, 192), (320, 192), (1024, 192), (1024, 192)]
    buckets = make_buckets(images, (512, 512), no_upscale, 64)
    assert buckets.size(0) == (320, 192) and buckets.scale(0) == 0.5 and buckets.enlarged == 0
    assert buckets.cropped[0] == 0
    # A larger bucket of the same aspect is no choice beside a smaller one of another.
    images = [(320, 192), (640, 384), (640, 384), (256, 192), (256, 192)]
    assert make_buckets(images, (512, 512), no_upscale, 64).size(0) == (256, 192)


def test_without_a_smaller_bucket_images_are_enlarged_and_that_is_said():
    images = [(640, 384), (640, 384), (320, 192), (1024, 192), (1024, 192)]
    buckets = make_buckets(images, (512, 512), settings(bucket_no_upscale=True, max_buckets=2), 64)
    assert buckets.size(2) == (640, 384) and buckets.scale(2) == 2.0 and buckets.enlarged == 1


@pytest.mark.parametrize("step", [8, 16, 32, 64])
def test_no_two_buckets_have_the_same_aspect(step):
    for width in range(64, 1024, 88):
        for height in range(64, 1024, 72):
            sizes = bucket_sizes((width, height), settings(min_bucket_reso=32, bucket_reso_steps=step), 8)
            assert len({side / other for side, other in sizes}) == len(sizes)


# The report


def test_the_report_says_what_falls_where_what_is_cropped_and_how_many_graphs_there_are():
    images = [(512, 512), (640, 512), (1024, 1024), (640, 384)]
    lines = make_buckets(images, (512, 512), settings(max_buckets=2), 64, [1, 1, 3, 1]).report("{}.png".format)
    assert lines == [
        "576x448 (1 image) is merged into 512x512, because max_buckets is 2",
        "4 images (6 with repeats) in 2 buckets: 2 graphs are compiled",
        "  512x512: 3 images (5 with repeats), 6.7% cropped away on average, 20.0% at most",
        "  640x384: 1 image, 0.0% cropped away on average, 0.0% at most",
        "cropped away: 5.0% of an image on average, 20.0% at most (1.png)",
    ]


def test_the_share_that_is_cropped_is_that_of_the_crop():
    images = np.random.default_rng(1).integers(20, 3000, (200, 2))
    for others in ({}, {"bucket_no_upscale": True}, {"bucket_no_upscale": True, "max_buckets": 4}, {"max_buckets": 4}):
        buckets = make_buckets(images, (512, 512), settings(**others), 64)
        for row, image in enumerate(images.tolist()):
            left, top, right, bottom = crop_box(tuple(image), buckets.size(row), buckets.scale(row))
            kept = (right - left) * (bottom - top) / math.prod(image)
            assert buckets.cropped[row] == pytest.approx(1 - kept, abs=1e-5)
