"""Sampling whose latents stay on the device computes what NumPy does. The CPU is the device here."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from ldm.diffusion.guidance import GuidedDenoiser
from ldm.diffusion.on_device import MOST_TERMS, DeviceArray, DeviceSampling
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import NoiseSchedule
from ldm.generation.denoising import SourceLatents

SHAPE = (2, 4, 6, 5)


class Network(nn.Cell):
    """Something smooth that depends on all of its inputs."""

    def construct(self, latents: Tensor, timesteps: Tensor, text_embeddings: Tensor) -> Tensor:
        shift = text_embeddings.mean(axis=(1, 2)) + timesteps.astype(ms.float32) / 1000.0
        return latents * 0.7 + 0.3 * (latents + shift[:, None, None, None]).tanh()


@pytest.fixture(scope="module")
def device():
    ms.set_context(mode=ms.GRAPH_MODE)
    yield DeviceSampling(Network())
    ms.set_context(mode=ms.PYNATIVE_MODE)


def embeddings():
    rng = np.random.default_rng(3)
    return rng.standard_normal((2, 7, 3), np.float32), rng.standard_normal((2, 7, 3), np.float32)


def noises():
    rng = np.random.default_rng(5)
    return lambda: rng.standard_normal(SHAPE, np.float32)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", list(SAMPLERS))
def test_every_sampler_gives_the_latents_that_it_gives_with_numpy(device, name, prediction_type):
    guidance = (*embeddings(), 3.0, 0.5)
    start = np.random.default_rng(0).standard_normal(SHAPE, np.float32)
    rest = (6, NoiseSchedule(), prediction_type)
    expected = SAMPLERS[name](GuidedDenoiser(device.unet, *guidance), start, *rest, draw_noise=noises())
    found = SAMPLERS[name](device.denoiser(*guidance), device.array(start), *rest, draw_noise=device.drawn(noises()))
    assert isinstance(found, DeviceArray)
    np.testing.assert_allclose(found.asnumpy(), expected, atol=1e-5 * np.abs(expected).max())


def test_nothing_is_copied_to_the_host_before_the_end(device, monkeypatch):
    denoise = device.denoiser(*embeddings(), 3.0)
    start = device.array(np.ones(SHAPE, np.float32))
    SAMPLERS["dpm_solver_pp"](denoise, start, 4, NoiseSchedule(), "epsilon")  # compiles, which reads constants

    def copied(*_):
        raise AssertionError("a copy to the host")

    monkeypatch.setattr(Tensor, "asnumpy", copied)
    latents = SAMPLERS["dpm_solver_pp"](denoise, start, 4, NoiseSchedule(), "epsilon")
    monkeypatch.undo()
    assert np.isfinite(latents.asnumpy()).all()


@pytest.mark.parametrize("extra_channels", [0, 5])
@pytest.mark.parametrize("scale, rescale", [(0.0, 0.0), (1.0, 0.0), (3.0, 0.0), (3.0, 0.7)])
def test_guidance_is_that_of_numpy(device, scale, rescale, extra_channels):
    rng = np.random.default_rng(1)
    latents = rng.standard_normal(SHAPE, np.float32)
    extra = rng.standard_normal((2, extra_channels, *SHAPE[2:]), np.float32) if extra_channels else None
    expected = GuidedDenoiser(device.unet, *embeddings(), scale, rescale, extra)(latents, 500)
    found = device.denoiser(*embeddings(), scale, rescale, extra)(device.array(latents), 500).asnumpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_part_of_an_image_is_kept_as_with_numpy(device):
    rng = np.random.default_rng(2)
    noise, image = (rng.standard_normal(SHAPE, np.float32) for _ in range(2))
    mask = (rng.random((2, 1, *SHAPE[2:])) < 0.5).astype(np.float32)
    source = SourceLatents(clean_latents=image, first_step=2, kept_latents=image, mask=mask)
    rest = (6, NoiseSchedule(), "epsilon")
    guidance = (*embeddings(), 3.0)
    expected = SAMPLERS["dpm_solver_pp"](
        GuidedDenoiser(device.unet, *guidance), noise, *rest, first_step=2, clean_latents=image,
        constrain=source.constrain(noise, None),
    )  # fmt: skip
    found = SAMPLERS["dpm_solver_pp"](
        device.denoiser(*guidance), device.array(noise), *rest, first_step=2, clean_latents=device.array(image),
        constrain=source.constrain(noise, device),
    ).asnumpy()  # fmt: skip
    kept = np.broadcast_to(mask == 0.0, SHAPE)
    np.testing.assert_array_equal(expected[kept], image[kept])
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_another_scale_compiles_nothing(device):
    latents = device.array(np.ones(SHAPE, np.float32))
    device.denoiser(*embeddings(), 3.0)(latents, 500)
    compiled = len(device.guided_unet.compile_cache)
    device.denoiser(*embeddings(), 5.0)(latents, 400)
    assert len(device.guided_unet.compile_cache) == compiled


def test_guidance_needs_negative_embeddings(device):
    with pytest.raises(ValueError, match="negative text embeddings"):
        device.denoiser(embeddings()[0], None, 3.0)


def test_arithmetic_is_collected_and_a_long_sum_is_computed_at_once(device):
    arrays = [np.random.default_rng(i).standard_normal(SHAPE).astype(np.float32) for i in range(MOST_TERMS + 2)]
    a, b, *_ = on_device = [device.array(array) for array in arrays]
    found = 2.0 * a - b / np.float64(4.0) + -a * 0.5
    np.testing.assert_allclose(found.asnumpy(), 1.5 * arrays[0] - 0.25 * arrays[1], atol=1e-6)
    total = on_device[0]
    for other in on_device[1:]:
        total = total + other
        assert len(total._terms) <= MOST_TERMS
    np.testing.assert_allclose(total.asnumpy(), sum(arrays), atol=1e-5)


def test_a_mask_multiplies_on_the_device(device):
    latents, mask = np.ones(SHAPE, np.float32), np.zeros((1, 1, *SHAPE[2:]), np.float32)
    mask[..., :2] = 1.0
    found = device.array(latents) * mask + device.array(latents) * 3.0 * (1.0 - mask)
    np.testing.assert_array_equal(found.asnumpy(), latents * mask + 3.0 * latents * (1.0 - mask))
