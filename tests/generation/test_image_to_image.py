"""Images that begin from images: as diffusers makes them, and what must hold for any model."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from PIL import Image

from ldm.errors import UserError
from ldm.generation.decoding import VAETiling
from ldm.generation.denoising import draw_starting_latents
from ldm.generation.pipeline import Pipeline
from ldm.generation.requests import ImageRequest
from ldm.generation.source_image import HiresFix, Origin
from tests.image_to_image_cases import CASES, GOLDEN, IMAGES, source_and_mask, with_channels
from tests.named_weights import relative_error
from tests.network_cases import model_with_named_weights
from tests.pipeline_cases import NEGATIVE_PROMPTS, PROMPTS, SCALE, starting_latents

HEIGHT, WIDTH = 32, 48


@pytest.fixture(scope="module")
def pipelines():
    ms.set_context(mode=ms.GRAPH_MODE)
    yield {channels: Pipeline(model_with_named_weights(with_channels(channels))) for channels in (4, 9)}
    ms.set_context(mode=ms.PYNATIVE_MODE)


@pytest.fixture(scope="module")
def made(pipelines):
    """A function that makes the two shared prompts. Two images share each graph."""
    image, mask = source_and_mask(HEIGHT, WIDTH)

    def make(channels=4, masked=False, **options):
        settings = dict(
            height=HEIGHT, width=WIDTH, guidance_scale=SCALE, num_inference_steps=4, batch_size=2, progress=False
        )
        settings.update(mask=mask if masked else None, image=image if "strength" in options else None)
        return pipelines[channels](PROMPTS, NEGATIVE_PROMPTS, **{**settings, **options})

    return make


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN / "image_to_image.npz", allow_pickle=False)


def pixels(output) -> np.ndarray:
    return np.stack([np.asarray(image) for image in output.images]).astype(int)


@pytest.mark.parametrize("name", CASES)
def test_it_ends_where_diffusers_ends(made, golden, name):
    case = CASES[name]
    start = starting_latents(with_channels(case.channels))
    output = made(
        case.channels, case.masked, sampler=case.sampler, strength=case.strength, num_inference_steps=case.steps,
        latents=start, paste_original=False,
    )  # fmt: skip
    assert relative_error(output.latents, golden[name]) < 1e-4  # demanded: 1e-3
    if name in IMAGES:
        assert np.abs(pixels(output) - golden[f"{name}.image"]).max() <= 1  # demanded: 2


class TestMasks:
    def test_what_the_mask_keeps_is_the_original(self, made):
        image, mask = (np.asarray(part).astype(int) for part in source_and_mask(HEIGHT, WIDTH))
        kept = made(masked=True, strength=0.75, seed=1)
        for picture in pixels(kept):
            assert np.array_equal(picture[mask == 0], image[mask == 0])
            assert not np.array_equal(picture[mask == 255], image[mask == 255])
        without = made(masked=True, strength=0.75, seed=1, paste_original=False)
        assert np.array_equal(kept.latents, without.latents)
        assert np.array_equal(pixels(kept)[:, mask == 255], pixels(without)[:, mask == 255])
        assert not np.array_equal(pixels(kept), pixels(without))

    def test_a_mask_that_is_white_everywhere_repaints_everything(self, made):
        white = Image.new("L", (WIDTH, HEIGHT), 255)
        assert np.array_equal(made(mask=white, strength=0.5).latents, made(strength=0.5).latents)
        # With full strength nothing of the image is left: it is text-to-image from the same noise, bit for bit.
        assert np.array_equal(made(mask=white, strength=1.0).latents, made().latents)

    def test_an_inpainting_model_generates_without_an_image(self, made):
        assert np.isfinite(made(9).latents).all()

    def test_a_blurred_mask_mixes_at_its_edge(self, made):
        sharp, blurred = (pixels(made(masked=True, strength=0.75, mask_blur=blur)) for blur in (0, 3))
        image, mask = (np.asarray(part).astype(int) for part in source_and_mask(HEIGHT, WIDTH))
        assert (blurred[0][mask == 0] != image[mask == 0]).any() and np.array_equal(blurred[0][:2], image[:2])
        assert (sharp[0] != blurred[0]).any()


class TestVariations:
    def test_strength_goes_from_one_seed_to_the_other(self, made):
        def of(strength):
            return made(seed=3, variation_seed=8, variation_strength=strength)

        assert np.array_equal(of(0.0).latents, made(seed=3).latents)
        assert np.array_equal(of(1.0).latents, made(seed=8).latents)
        assert not np.array_equal(of(0.5).latents, made(seed=3).latents)

    def test_the_noise_keeps_its_length(self):
        def noise(strength):
            origin = Origin(variation_seed=8, variation_strength=strength)
            return draw_starting_latents([ImageRequest(0, "", "", 3, 0, None, None, origin)], (4, 64, 64))

        assert [abs(float(noise(share).std()) - 1) < 0.02 for share in (0.0, 0.25, 0.5, 0.75, 1.0)] == [True] * 5
        ends = noise(0.0).ravel(), noise(1.0).ravel()
        shares = [np.corrcoef(noise(0.25).ravel(), end)[0, 1] for end in ends]
        assert shares[0] == pytest.approx(np.cos(np.pi / 8), abs=0.02)
        assert shares[1] == pytest.approx(np.sin(np.pi / 8), abs=0.02)


class TestHiresFix:
    def test_it_repaints_the_enlarged_first_image(self, made):
        first = made(seed=5).latents
        enlarged = np.stack(
            [[np.asarray(Image.fromarray(channel).resize((24, 16), 2)) for channel in row] for row in first]
        )
        images = {}
        for upscaler in ("latent", "lanczos"):
            output = made(seed=5, hires=HiresFix(2.0, 0.05, 20, upscaler))
            assert output.images[0].size == (96, 64) and output.latents.shape == (2, 4, 16, 24)
            images[upscaler] = output.latents
        likeness = np.corrcoef(images["latent"].ravel(), enlarged.ravel())[0, 1]
        assert likeness > 0.95  # little strength changes little
        assert np.corrcoef(images["lanczos"].ravel(), images["latent"].ravel())[0, 1] < 0.9
        stronger = made(seed=5, hires=HiresFix(2.0, 0.5, 4, "latent")).latents
        assert np.corrcoef(stronger.ravel(), enlarged.ravel())[0, 1] < likeness

    def test_sizes_are_the_nearest_that_the_model_takes(self):
        assert HiresFix(1.5).size(32, 48, 16) == (48, 80)
        assert HiresFix(2.0).size(512, 768, 64) == (1024, 1536)
        assert HiresFix(1.1).size(64, 64, 64) == (64, 64)


class TestTiles:
    def test_tiles_of_the_whole_image_change_nothing(self, pipelines):
        pipeline, latents = pipelines[4], starting_latents(with_channels(4))
        whole = pipeline.decode(latents)
        pipeline.vae_tiling = VAETiling(True, 256)
        try:
            assert (
                np.array_equal(pipeline.decode(latents, 1), whole)
                or np.abs(pipeline.decode(latents, 1).astype(int) - whole).max() <= 1
            )
        finally:
            pipeline.vae_tiling = VAETiling()


class TestMistakes:
    def test_a_strength_that_leaves_no_step(self, made):
        with pytest.raises(UserError, match="strength 0.2 of 4 sampling steps leaves no step to take: .*0.25"):
            made(strength=0.2)
        with pytest.raises(UserError, match="hires_strength 0.2 of 4"):
            made(hires=HiresFix(2.0, 0.2))

    @pytest.mark.parametrize(
        "options, words",
        [
            (dict(mask=Image.new("L", (WIDTH, HEIGHT))), "a mask needs an image"),
            (dict(strength=0.5, image=[Image.new("RGB", (8, 8))] * 3), "3 images and 0 masks for 2 prompts"),
            (dict(strength=0.5, resize_mode="cut"), "one of crop, resize, pad"),
            (dict(strength=1.5), "strength must be above 0, at most 1"),
            (dict(strength=0.5, hires=HiresFix(2.0)), "a hires fix begins from noise"),
        ],
    )
    def test_arguments_that_do_not_go_together(self, made, options, words):
        with pytest.raises(ValueError, match=words):
            made(**options)


@pytest.mark.parametrize("channels", [4, 9])
def test_an_image_is_encoded_once_for_all_batches_and_anew_in_the_next_call(pipelines, channels, monkeypatch):
    pipeline, (image, mask) = pipelines[channels], source_and_mask(HEIGHT, WIDTH)
    encoded, encoder = [], pipeline._image_encoder.vae
    monkeypatch.setattr(pipeline._image_encoder, "vae", lambda images: encoded.append(1) or encoder(images))
    options = dict(
        height=HEIGHT, width=WIDTH, guidance_scale=SCALE, num_inference_steps=4, batch_size=2, progress=False,
        strength=0.5, mask=mask,
    )  # fmt: skip
    first = pipeline([PROMPTS[0]] * 4, image=image, **options)
    images = {4: 1, 9: 2}[channels]  # an inpainting model also reads the part that is kept
    assert len(encoded) == images
    image.paste((255, 0, 0), (0, 0, WIDTH, HEIGHT // 2))
    second = pipeline([PROMPTS[0]] * 4, image=image, **options)
    assert len(encoded) == 2 * images and (pixels(first) != pixels(second)).any()
