"""Fitting an image and its mask to the size that is generated, and the mistakes that people make with them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from ldm.diffusion.sampling import Sampling
from ldm.errors import UserError
from ldm.generation.comparison import plan_cells
from ldm.generation.plan import plan_generation
from ldm.generation.requests import ImageRequest, in_batches
from ldm.generation.run import images_of
from ldm.generation.source_image import (
    FittedSource,
    HiresFix,
    Origin,
    SourceImage,
    first_step,
    fit,
    keep_unmasked,
    slerp,
    source_fields,
)
from ldm.settings.generate import GenerateSettings

RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.fixture
def files(tmp_path):
    """A folder with images and masks of 40 x 20 pixels: the left half is red and kept, the right one blue."""
    image, mask = Image.new("RGB", (40, 20), RED), Image.new("L", (40, 20), 0)
    image.paste(BLUE, (20, 0, 40, 20))
    mask.paste(255, (20, 0, 40, 20))
    for name in "ba":
        image.save(tmp_path / f"{name}.png")
    mask.save(tmp_path / "mask.png")
    return tmp_path


class TestFitting:
    def test_an_image_of_the_size_stays_as_it_is(self, files):
        fitted = fit(SourceImage(files / "a.png", files / "mask.png"), 40, 20)
        assert fitted.pixels.shape == (3, 20, 40) and fitted.mask.shape == (1, 20, 40)
        assert fitted.pixels[:, 0, 0].tolist() == [1, -1, -1] and fitted.pixels[:, 19, 39].tolist() == [-1, -1, 1]
        assert set(np.unique(fitted.mask)) == {0, 1} and fitted.mask.mean() == 0.5
        assert fitted.repainted_latents(8).tolist() == [[[0, 0, 0, 1, 1]] * 3]

    @pytest.mark.parametrize("mode", ["crop", "resize", "pad"])
    def test_the_mask_goes_with_its_image(self, files, mode):
        fitted = fit(SourceImage(files / "a.png", files / "mask.png", mode), 32, 32)
        blue = fitted.pixels[2] > 0
        assert np.array_equal(blue, fitted.repainted[0] == 1) and blue.mean() == 0.5

    def test_crop_takes_the_middle_and_pad_the_whole(self, tmp_path):
        image = Image.new("RGB", (60, 20), RED)
        image.paste(BLUE, (20, 0, 40, 20))
        crop, resize, pad = (fit(SourceImage(image, None, mode), 20, 20) for mode in ("crop", "resize", "pad"))
        assert (crop.pixels[2, 5:15, 5:15] > 0.9).all() and (crop.pixels[0] > 0).mean() < 0.1
        assert (resize.pixels[0] > 0).mean() == pytest.approx(2 / 3, abs=0.1)
        assert np.array_equal(pad.pixels[:, :6], np.repeat(pad.pixels[:, 6:7], 6, axis=1))

    def test_a_photograph_is_turned_by_its_orientation(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new("RGB", (40, 20), RED).save(tmp_path / "turned.jpg", exif=exif)
        mask = Image.new("L", (20, 40), 255)
        assert fit(SourceImage(tmp_path / "turned.jpg", mask), 20, 40).pixels.shape == (3, 40, 20)
        with pytest.raises(UserError, match="in memory has 40 x 20 pixels and init_image .*turned.jpg has 20 x 40"):
            SourceImage(tmp_path / "turned.jpg", Image.new("L", (40, 20), 255)).check()

    def test_a_grey_model_gets_grey(self, files):
        assert fit(SourceImage(files / "a.png"), 40, 20, channels=1).pixels.shape == (1, 20, 40)

    def test_a_blurred_mask_keeps_its_middle(self, files):
        mask = fit(SourceImage(files / "a.png", files / "mask.png", mask_blur=2), 40, 20).mask
        assert mask[0, 5, 0] == 0 and mask[0, 5, 39] == 1 and 0.3 < mask[0, 5, 19] < 0.7

    def test_kept_pixels_are_those_of_the_file(self, files):
        fitted = fit(SourceImage(files / "a.png", files / "mask.png"), 40, 20)
        image = np.full((1, 20, 40, 3), 7, np.uint8)
        mixed = keep_unmasked(image, [fitted])
        assert (mixed[0, :, :20] == RED).all() and (mixed[0, :, 20:] == 7).all() and (image == 7).all()
        assert (keep_unmasked(image, [FittedSource(fitted.pixels, None)]) == 7).all()

    def test_every_value_of_a_pixel_survives(self):
        values = np.arange(256, dtype=np.uint8).reshape(16, 16)
        image, black = Image.fromarray(np.stack([values] * 3, 2)), np.zeros((1, 16, 16), np.float32)
        kept = keep_unmasked(np.zeros((1, 16, 16, 3), np.uint8), [replace(fit(SourceImage(image), 16, 16), mask=black)])
        assert np.array_equal(kept[0, :, :, 0], values)


class TestArithmetic:
    @pytest.mark.parametrize(
        "steps, strength, first", [(20, 0.75, 5), (20, 1.0, 0), (50, 0.58, 22), (10, 0.3, 7), (1, 1.0, 0), (7, 0.99, 1)]
    )
    def test_the_last_share_of_the_steps_is_taken(self, steps, strength, first):
        assert first_step(steps, strength) == steps - min(int(steps * strength), steps) == first

    def test_slerp(self):
        a, b = (np.random.default_rng(i).standard_normal((4, 8, 8)).astype(np.float32) for i in (1, 2))
        assert np.array_equal(slerp(a, b, 0.0), a) and np.array_equal(slerp(a, b, 1.0), b)
        assert slerp(a, b, 0.5).dtype == np.float32
        np.testing.assert_allclose(slerp(a, a, 0.3), a, rtol=1e-6)
        axes = np.eye(2, dtype=np.float32).reshape(2, 2, 1, 1)
        np.testing.assert_allclose(slerp(axes[0], axes[1], 1 / 3).ravel(), [np.cos(np.pi / 6), 0.5], rtol=1e-6)


def plan(files, *, prompts=1, **settings):
    (files / "prompts.txt").write_text("a\n" * prompts)
    return plan_generation(GenerateSettings(data_path=str(files / "prompts.txt"), **settings))


class TestSettings:
    def test_without_an_image_nothing_changes(self, files):
        assert plan(files).origins == [Origin()]

    def test_images_pair_with_prompts(self, files):
        for names in ([files / "b.png", files / "a.png"], [files]):
            (files / "c.txt").write_text("no image")
            given = [str(name) for name in names]
            if names == [files]:
                (files / "mask.png").rename(files / "mask.keep")
            origins = plan(files, prompts=2, n_samples=2, init_image=given).origins
            found = [origin.source.image.name for origin in origins]
            assert found == (["b.png"] * 2 + ["a.png"] * 2 if len(names) == 2 else ["a.png"] * 2 + ["b.png"] * 2)

    def test_one_image_is_for_all_prompts(self, files):
        origins = plan(files, prompts=3, init_image=[str(files / "a.png")], strength=0.5).origins
        assert [origin.source for origin in origins] == [origins[0].source] * 3 and origins[0].strength == 0.5

    def test_the_files_are_named_in_the_images(self, files):
        mask = str(files / "mask.png")
        origin = plan(files, init_image=[str(files / "a.png")], mask_image=[mask]).origins[0]
        fields = source_fields(origin)
        assert (fields["init_image"], fields["mask_image"]) == ("a.png", "mask.png")
        assert len(fields["init_image_sha256"]) == 64 and source_fields(Origin()) == {}
        settings = GenerateSettings(prompt="a", init_image=["a"], mask_image=["b"], strength=0.5)
        expected = {"strength": 0.5, "resize_mode": "crop", "mask_blur": 0.0, "paste_original": True}
        assert settings.used_source_settings() == expected
        assert GenerateSettings(prompt="a", strength=0.5).used_source_settings() == {}

    @pytest.mark.parametrize(
        "settings, words",
        [
            (dict(init_image=["missing.png"]), "init_image .*missing.png does not exist"),
            (dict(init_image=["text.png"]), "init_image: the image .*text.png is no image in a known format"),
            (dict(init_image=["cut.png"], mask_image=["mask.png"]), "cut.png is broken|cut off"),
            (dict(init_image=["empty"]), "init_image .*empty is a folder without images"),
            (dict(init_image=["a.png", "b.png", "a.png"]), "names 3 images for 2 prompts: give one for all"),
            (dict(init_image=["a.png"], mask_image=["mask.png"] * 2), "names 2 masks for 1 images"),
            (dict(init_image=["a.png"], mask_image=["small.png"]), "has 4 x 2 pixels and init_image .*40 x 20"),
            (dict(mask_image=["mask.png"]), "--mask_image is given without --init_image"),
            (dict(variation_strength=0.5), "--variation_strength is given without --variation_seed"),
            (dict(init_image=["a.png"], hires_scale=2), "--hires_scale and --init_image are both given"),
            (dict(init_image=["a.png"], strength=0), "strength"),
            (dict(init_image=["a.png"], strength=1.1), "strength"),
            (dict(init_image=["a.png"], strength=0.01), "strength 0.01 of 20 sampling steps leaves no step"),
            (dict(init_image=["a.png"], resize_mode="cut"), 'one of "crop", "resize", "pad"'),
            (dict(hires_scale=1), "hires_scale"),
            (dict(hires_scale=2, hires_strength=0.01), "hires_strength 0.01 of 20"),
            (dict(hires_scale=2, hires_steps=5000), "sampling_steps is 5000"),
            (dict(vae_tile_size=8), "vae_tile_size"),
        ],
    )  # fmt: skip
    def test_mistakes_are_named_before_a_network_is_loaded(self, files, settings, words):
        (files / "text.png").write_text("no image")
        (files / "empty").mkdir()
        (files / "cut.png").write_bytes((files / "a.png").read_bytes()[:30])
        Image.new("L", (4, 2), 255).save(files / "small.png")
        for name in ("init_image", "mask_image"):
            if name in settings:
                settings = {**settings, name: [str(files / path) for path in settings[name]]}
        with pytest.raises(UserError, match=words):
            plan(files, prompts=2, **settings)

    def test_a_mask_without_white_is_named(self, files):
        with pytest.raises(UserError, match="has nothing to repaint at 40 x 20 pixels: white is repainted"):
            fit(SourceImage(files / "a.png", Image.new("L", (40, 20), 0)), 40, 20)

    def test_a_setting_without_its_switch_is_warned_of(self, files, caplog):
        plan(files, strength=0.5, mask_blur=4, hires_steps=3)
        assert "no init_image is given: strength has no effect" in caplog.text
        assert "no mask_image is given: mask_blur" in caplog.text and "no hires_scale is given" in caplog.text

    def test_the_requests_of_a_run_carry_what_they_begin_from(self, files):
        (files / "prompts.txt").write_text("a\nb\n")
        images = [str(files / "a.png"), str(files / "b.png")]
        settings = GenerateSettings(
            data_path=str(files / "prompts.txt"), init_image=images, variation_seed=3, variation_strength=0.5
        )
        requests = [image.request for image in images_of(plan_cells(settings))]
        assert [request.origin.source.image.name for request in requests] == ["a.png", "b.png"]
        assert {(request.origin.variation_seed, request.origin.variation_strength) for request in requests} == {
            (3, 0.5)
        }
        assert len(in_batches(requests)) == 1  # other images, but the same steps

    def test_only_images_of_the_same_kind_are_generated_together(self, files):
        source = SourceImage(files / "a.png")
        masked = SourceImage(files / "a.png", files / "mask.png")
        origins = [Origin(), Origin(source), Origin(source, 0.5), Origin(masked), Origin(hires=HiresFix(2.0)), Origin()]
        requests = [ImageRequest(i, "", "", 0, i, Sampling(), None, origin) for i, origin in enumerate(origins)]
        found = [[request.index for request in batch.requests] for batch in in_batches(requests)]
        assert found == [[0, 5], [1], [2], [3], [4]]


def test_the_strength_that_an_error_suggests_is_enough():
    for steps in range(1, 1000):
        with pytest.raises(UserError, match="leaves no step") as raised:
            first_step(steps, 0.0005)
        suggested = float(str(raised.value).split("at least ")[1].split(",")[0])
        assert first_step(steps, suggested) <= steps - 1


@pytest.mark.parametrize(
    "wrong",
    [{"scale": 0.5}, {"scale": 2, "upscaler": "Latent"}, {"scale": 2, "strength": 0.0}, {"scale": 2, "steps": 0}],
)
def test_a_hires_fix_of_wrong_values_is_refused(wrong):
    with pytest.raises(ValueError, match="hires fix|upscaler"):
        HiresFix(**wrong)
