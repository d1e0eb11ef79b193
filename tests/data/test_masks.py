"""Masks go where their images go, and are averaged to the latents' size."""

from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image

from ldm.data.masks import ALPHA, MaskFinder, MaskReport, load_image_and_mask, load_mask, loss_weights
from ldm.data.sources.rows import FilePart, Row, Subset
from ldm.data.transforms import load_image
from ldm.errors import UserError
from tests.data.icc_profiles import rgb_profile

RNG = np.random.default_rng(3)
MASK = RNG.integers(0, 256, (37, 53), dtype=np.uint8)
IMAGE = RNG.integers(0, 256, (37, 53, 3), dtype=np.uint8)


def saved(tmp_path, pixels, name, **settings):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(path, **settings)
    return str(path)


def averaged(pixels, factor):
    """The mean of each block of factor x factor, over 255."""
    height, width = pixels.shape
    return pixels.reshape(height // factor, factor, width // factor, factor).mean((1, 3)) / 255


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


# Values


@pytest.mark.parametrize("factor", [1, 4, 8])
def test_a_mask_of_the_trained_size_is_the_mean_of_each_latent_pixels_area(tmp_path, factor):
    values = RNG.integers(0, 256, (32, 48), dtype=np.uint8)
    image, mask = saved(tmp_path, np.zeros((32, 48, 3), np.uint8), "a.png"), saved(tmp_path, values, "m.png")
    result = load_mask(mask, image, (48, 32), factor)
    assert result.dtype == np.float32 and result.shape == (1, 32 // factor, 48 // factor)
    np.testing.assert_allclose(result[0], averaged(values, factor), atol=1e-6)


@pytest.mark.parametrize("value", [0, 255])
@pytest.mark.parametrize("shape", [(53, 37), (500, 333), (17, 640), (8, 8)])
def test_white_is_exactly_one_and_black_exactly_zero(tmp_path, shape, value):
    image = saved(tmp_path, Image.new("RGB", shape), "a.png")
    mask = saved(tmp_path, Image.new("L", shape, value), "m.png")
    for size in (64, (96, 32), (32, 96)):
        for rng in range(3):
            _, result = load_image_and_mask(
                image, mask, size, 8, random_crop=True, random_flip=True, rng=np.random.default_rng(rng)
            )
            assert (result == value / 255).all()


@pytest.mark.parametrize(
    ("mask", "red"),
    [
        (Image.new("1", (8, 8), 1), 255),
        (Image.new("L", (8, 8), 51), 51),
        (Image.new("LA", (8, 8), (51, 0)), 51),
        (Image.new("RGB", (8, 8), (51, 200, 255)), 51),
        (Image.new("RGBA", (8, 8), (51, 200, 255, 0)), 51),
        (Image.new("RGB", (8, 8), (255, 0, 0)).quantize(2), 255),
        (Image.fromarray(np.full((8, 8), 51 * 257, np.uint16)), 51),
    ],
    ids=["bilevel", "grey", "grey, transparent", "colour", "colour, transparent", "palette", "16 bits"],
)
def test_the_red_channel_counts_whatever_the_alpha_channel_is(tmp_path, mask, red):
    image = saved(tmp_path, Image.new("RGB", (8, 8)), "a.png")
    assert load_mask(saved(tmp_path, mask, "m.png"), image, 8, 8) == pytest.approx(red / 255, abs=1e-6)


def test_a_colour_profile_changes_nothing_of_a_mask(tmp_path):
    image = saved(tmp_path, Image.new("RGB", (8, 8)), "a.png")
    mask = saved(tmp_path, Image.new("RGB", (8, 8), (51, 51, 51)), "m.png", icc_profile=rgb_profile())
    assert load_mask(mask, image, 8, 8) == pytest.approx(0.2, abs=1e-6)


# Where a mask lies


def image_of_mask(tmp_path):
    """An image whose channels are its mask, so that its pixels say which part of the mask goes with them."""
    return saved(tmp_path, np.stack([MASK] * 3, -1), "a.png"), saved(tmp_path, MASK, "m.png")


@pytest.mark.parametrize("size", [(32, 16), (16, 32), (24, 24)])
def test_a_mask_has_the_random_crop_and_the_mirroring_of_its_image(tmp_path, size):
    image, mask = image_of_mask(tmp_path)
    seen = set()
    for seed in range(8):
        options = dict(scale=1.0, random_crop=True, random_flip=True)
        rng, other = np.random.default_rng(seed), np.random.default_rng(seed)
        pixels, result = load_image_and_mask(image, mask, size, 1, rng=rng, **options)
        np.testing.assert_allclose(result[0], (pixels[0] + 1) / 2, atol=1e-6)
        assert (pixels == load_image(image, size, rng=other, **options)).all()
        assert rng.random() == other.random()  # as many draws
        seen.add(result.tobytes())
    assert len(seen) > 4


@pytest.mark.parametrize("size", [(32, 16), (16, 32), (16, 16)])
def test_a_mask_without_augmentation_is_that_of_the_image_in_the_middle(tmp_path, size):
    image, mask = image_of_mask(tmp_path)
    for scale in (None, 0.7):
        pixels, result = load_image_and_mask(image, mask, size, 8, scale=scale)
        assert (result == load_mask(mask, image, size, 8, scale=scale)).all()
        # The image is scaled with a wider filter.
        np.testing.assert_allclose(result[0], averaged((pixels[0] + 1) * 127.5, 8), atol=0.06)


def test_a_mask_of_another_size_is_scaled_to_its_image(tmp_path):
    whole = np.zeros((64, 96), np.uint8)
    whole[:, 48:] = 255
    image = saved(tmp_path, np.zeros((64, 96, 3), np.uint8), "a.png")
    results = [
        load_mask(saved(tmp_path, Image.fromarray(whole).resize(size, Image.Resampling.NEAREST), "m.png"), image, 64, 8)
        for size in [(96, 64), (48, 32), (192, 128), (48, 33), (95, 64)]
    ]
    assert (results[0][0] == [[0] * 4 + [1] * 4] * 8).all()
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], atol=0.1)


@pytest.mark.parametrize("size", [(64, 64), (96, 70), (64, 96)])
def test_a_mask_of_another_shape_is_refused_with_both_sizes(tmp_path, size):
    image, mask = saved(tmp_path, Image.new("RGB", (96, 64)), "a.png"), saved(tmp_path, Image.new("L", size), "m.png")
    for load in (load_mask, lambda mask, image, *rest: load_image_and_mask(image, mask, *rest)):
        with pytest.raises(UserError, match=f"m.png has {size[0]} x {size[1]} pixels.*a.png has 96 x 64"):
            load(mask, image, 64, 8)


@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
def test_a_mask_of_an_image_that_exif_turns_is_upright_itself(tmp_path, orientation):
    image = saved(tmp_path, IMAGE, "a.png", exif=turned(orientation))
    upright = MASK.T if orientation > 4 else MASK
    mask = saved(tmp_path, np.ascontiguousarray(upright), "m.png")
    top, left = (upright.shape[0] - 32) // 2, (upright.shape[1] - 32) // 2
    result = load_mask(mask, image, 32, 1, scale=1.0)
    np.testing.assert_allclose(result[0], upright[top : top + 32, left : left + 32] / 255, atol=1e-6)


def test_a_mask_is_turned_by_its_own_exif_orientation(tmp_path):
    image = saved(tmp_path, np.ascontiguousarray(IMAGE.transpose(1, 0, 2)), "a.png")
    mask = saved(tmp_path, MASK, "m.png", exif=turned(5))
    np.testing.assert_allclose(load_mask(mask, image, (37, 53), 1)[0], MASK.T / 255, atol=1e-6)


def test_a_mask_that_was_saved_before_its_image_was_turned_is_named_as_such(tmp_path):
    image = saved(tmp_path, IMAGE, "a.jpg", exif=turned(6))
    with pytest.raises(UserError, match="m.png has 53 x 37.*37 x 53: .*EXIF orientation: save the mask upright"):
        load_mask(saved(tmp_path, MASK, "m.png"), image, 32, 8)


# Alpha


@pytest.mark.parametrize("orientation", [1, 6, 7])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_an_alpha_mask_is_the_images_own_alpha_channel_turned_with_it(tmp_path, mode, orientation):
    image = Image.merge(mode, [Image.fromarray(MASK)] * len(mode))  # its colours are its alpha
    path = saved(tmp_path, image, "a.png", exif=turned(orientation))
    options = dict(scale=1.0, random_crop=True, random_flip=True, alpha_color=(0, 0, 0))
    pixels, mask = load_image_and_mask(path, ALPHA, 32, 1, rng=np.random.default_rng(1), **options)
    np.testing.assert_allclose((pixels[0] + 1) / 2, mask[0] ** 2, atol=0.01)  # a colour of its own alpha on black


def test_an_alpha_mask_takes_transparent_colours_and_works_inside_a_shard(tmp_path):
    image = Image.new("P", (16, 16), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (0, 0, 16, 8))
    path = saved(tmp_path, image, "a.png", transparency=0)
    content = open(path, "rb").read()
    (tmp_path / "shard.tar").write_bytes(b"before" + content)
    part = FilePart(str(tmp_path / "shard.tar"), 6, len(content), "a.png")
    for file in (path, part):
        assert (load_mask(ALPHA, file, 16, 8) == [[[1, 1], [0, 0]]]).all()


@pytest.mark.parametrize("mode", ["RGB", "L", "I;16"])
def test_an_image_without_an_alpha_channel_has_no_alpha_mask(tmp_path, mode):
    path = saved(tmp_path, Image.new(mode, (16, 16)), "a.png")
    assert load_mask(ALPHA, path, 16, 8) is None
    assert load_image_and_mask(path, ALPHA, 16, 8)[1] is None


def test_an_image_without_a_mask_is_loaded_alone(tmp_path):
    path = saved(tmp_path, IMAGE, "a.png")
    pixels, mask = load_image_and_mask(path, None, 16, 8)
    assert mask is None and (pixels == load_image(path, 16)).all()


def test_a_broken_mask_and_a_broken_image_are_named(tmp_path):
    image, mask = saved(tmp_path, IMAGE, "a.png"), str(tmp_path / "m.png")
    (tmp_path / "m.png").write_bytes(b"text")
    with pytest.raises(UserError, match="m.png is no image.*a mask in conditioning_data_dir: replace it"):
        load_mask(mask, image, 32, 8)
    with pytest.raises(UserError, match="gone.png does not exist.*replace it or remove its row"):
        load_mask(mask, str(tmp_path / "gone.png"), 32, 8)


# Which file is the mask of an image


def finder(tmp_path, names, folder="data", masks="masks", alpha_mask=False, **settings):
    for name in names:
        path = tmp_path / masks / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    subset = Subset("caption_files", str(tmp_path / folder), "", settings=settings)
    found = MaskFinder([subset], str(tmp_path / masks) if names else None, alpha_mask)

    def find(name):
        mask = found.find(Row(str(tmp_path / folder / name), "", 0, 0))
        return os.path.relpath(mask, tmp_path) if isinstance(mask, str) else mask

    return find


@pytest.mark.parametrize(
    ("names", "image", "expected"),
    [
        (["cat.jpg"], "cat.jpg", "masks/cat.jpg"),
        (["cat.png"], "cat.jpg", "masks/cat.png"),
        (["cat.PNG"], "cat.jpg", "masks/cat.PNG"),
        (["cat.jpg", "cat.png"], "cat.jpg", "masks/cat.jpg"),
        (["a/cat.png", "b/cat.png"], "b/cat.jpg", "masks/b/cat.png"),
        (["cat.png"], "b/cat.jpg", None),
        (["b/cat.png"], "cat.jpg", None),
        (["cat.txt", "ca.png", "cat2.png"], "cat.jpg", None),
        (["a.b.png"], "a.b.jpg", "masks/a.b.png"),
        (["v1.5.png"], "v1.5", "masks/v1.5.png"),
    ],
)
def test_a_mask_has_the_name_of_its_image_or_its_stem_and_another_suffix(tmp_path, names, image, expected):
    assert finder(tmp_path, names)(image) == expected


def test_two_masks_of_one_stem_are_refused(tmp_path):
    find = finder(tmp_path, ["cat.png", "cat.bmp"])
    with pytest.raises(UserError, match="two masks for the image cat.jpg, cat.bmp and cat.png: remove one"):
        find("cat.jpg")


def test_a_folder_of_the_subsets_name_comes_first(tmp_path):
    find = finder(tmp_path, ["10_cat/a.png", "a.png", "b.png"], folder="10_cat")
    assert [find("a.png"), find("b.png")] == ["masks/10_cat/a.png", "masks/b.png"]


def test_the_settings_of_a_subset_come_first(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "a.png").write_bytes(b"")
    find = finder(tmp_path, ["a.png", "b.png"], conditioning_data_dir=str(tmp_path / "own"), alpha_mask=True)
    assert [find("a.png"), find("b.png")] == ["own/a.png", ALPHA]
    assert finder(tmp_path, ["a.png"], alpha_mask=True)("c.png") is ALPHA
    assert finder(tmp_path, [], alpha_mask=True)("a.png") is ALPHA
    assert finder(tmp_path, [])("a.png") is None


def test_the_mask_of_an_image_in_a_shard_has_its_name_in_the_shard(tmp_path):
    (tmp_path / "masks" / "a").mkdir(parents=True)
    (tmp_path / "masks" / "a" / "cat.png").write_bytes(b"")
    found = MaskFinder([Subset("tar_shards", str(tmp_path), "")], str(tmp_path / "masks"), False)
    row = Row(FilePart("shard.tar", 0, 1, "a/cat.jpg"), "", 0, 0)
    assert found.find(row) == str(tmp_path / "masks" / "a" / "cat.png")


def test_an_image_outside_its_subsets_folder_is_found_by_its_last_name(tmp_path):
    find = finder(tmp_path, ["cat.png"])
    assert find("/elsewhere/cat.jpg") == find("../cat.jpg") == "masks/cat.png"


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_a_folder_of_masks_that_is_none_is_named(tmp_path, kind):
    if kind == "file":
        (tmp_path / "masks").write_bytes(b"")
    with pytest.raises(UserError, match="conditioning_data_dir .*masks is no folder"):
        MaskFinder([Subset("caption_files", str(tmp_path), "")], str(tmp_path / "masks"), False)


# Weights of the loss


def test_weights_are_at_least_the_unmasked_weight():
    mask = np.array([[[0.0, 0.05, 0.5, 1.0]]], np.float32)
    assert (loss_weights([mask], (1, 4)) == mask).all()
    assert loss_weights([mask], (1, 4), unmasked_weight=0.1)[0, 0, 0].tolist() == pytest.approx([0.1, 0.1, 0.5, 1.0])


def test_normalized_weights_are_divided_by_their_mean():
    masks = [RNG.random((1, 4, 6), dtype=np.float32) for _ in range(3)]
    weights = loss_weights(masks, (4, 6), unmasked_weight=0.1, normalize_masked_area_loss=True)
    assert weights.dtype == np.float32 and weights.shape == (3, 1, 4, 6)
    for row, mask in zip(weights, masks):
        clamped = np.clip(mask, 0.1, 1)
        np.testing.assert_allclose(row, clamped / clamped.mean(), rtol=1e-5)


def test_a_small_mask_does_not_shrink_a_normalized_loss():
    """The loss of an error of 1 everywhere is 1 for every mask but a black one."""
    mask = np.zeros((1, 8, 8), np.float32)
    mask[0, 0, 0] = 0.25
    assert loss_weights([mask], (8, 8)).mean() == pytest.approx(0.25 / 64)
    assert loss_weights([mask], (8, 8), normalize_masked_area_loss=True).mean() == pytest.approx(1.0)


@pytest.mark.parametrize("normalize", [False, True])
def test_a_black_mask_stays_zero_and_a_white_one_is_as_none_bit_for_bit(normalize):
    black, white = np.zeros((1, 3, 5), np.float32), np.ones((1, 3, 5), np.float32)
    weights = loss_weights([black, white, None], (3, 5), normalize_masked_area_loss=normalize)
    assert [(row == value).all() for row, value in zip(weights, (0.0, 1.0, 1.0))] == [True] * 3


def test_a_factor_of_a_row_multiplies_last():
    mask = np.full((1, 2, 2), 0.5, np.float32)
    weights = loss_weights([mask, None], (2, 2), normalize_masked_area_loss=True, row_factors=[0.25, 0.0])
    assert (weights[0] == 0.25).all() and (weights[1] == 0.0).all()


# The report


def test_the_report_counts_masks_and_their_cover_and_names_images_without_one():
    report = MaskReport(9)
    for row in range(2):
        report.add(row, np.full((1, 2, 2), 0.25, np.float32))
    report.add(1, np.full((1, 2, 2), 0.75, np.float32))  # with another crop
    for row in (3, 4, 5, 6):
        report.add(row, None)
    report.add(7, np.zeros((1, 2, 2), np.float32))
    assert report.lines(lambda row: f"{row}.png") == [
        "masks: 3 of 7 images have one, which show 33.3% of them on average",
        "images without a mask, which are trained everywhere: 4 (3.png, 4.png, 5.png, ...)",
        "images whose mask is black everywhere: 1 (7.png)",
    ]


def test_a_data_set_without_masks_is_said_to_have_none():
    report = MaskReport(1)
    report.add(0, None)
    assert report.lines(lambda row: "a\n.png") == [
        "masks: 0 of 1 images have one",
        "images without a mask, which are trained everywhere: 1 (a .png)",
    ]


def test_images_in_the_folder_of_masks_are_not_their_own_masks(tmp_path):
    """conditioning_data_dir is the folder above data_path."""
    (tmp_path / "photos").mkdir()
    image = tmp_path / "photos" / "a.png"
    Image.new("RGB", (8, 8)).save(image)
    for expected in (None, str(tmp_path / "a.png")):
        finder = MaskFinder([Subset("caption_files", str(tmp_path / "photos"), "")], str(tmp_path), False)
        assert finder.find(Row(str(image), "", 0, 0)) == expected
        Image.new("L", (8, 8)).save(tmp_path / "a.png")
