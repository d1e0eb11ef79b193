"""The sizes that a model can draw, how it is sampled, and how many images a call of the network takes."""

from __future__ import annotations

import pytest

from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.sampling import Sampling, default_batch_size, latent_shape
from ldm.errors import UserError
from ldm.settings.sampler_names import ETA_SAMPLERS


def test_latents_have_the_size_of_the_image_over_the_vaes_factor(tiny_config):
    assert tiny_config.size_multiple == 8
    assert latent_shape(tiny_config, 40, 32) == (4, 10, 8)
    assert latent_shape(tiny_config) == (4, 8, 8)


@pytest.mark.parametrize(
    ("images_per_prompt", "side", "batch_size"),
    [(4, 512, 4), (4, 64, 16), (100, 64, 100), (1000, 512, 8), (1000, 768, 3), (1000, 4096, 1)],
)
def test_the_default_batch_size_is_the_images_of_a_prompt_within_bounds(images_per_prompt, side, batch_size):
    assert default_batch_size(images_per_prompt, side, side) == batch_size


def test_a_schedule_or_steps_that_do_not_go_with_the_sampler_are_refused_before_anything_runs(tiny_config):
    Sampling("euler", schedule="karras").check(tiny_config)
    with pytest.raises(UserError, match="schedule karras does not go with the sampler ddim: choose one of as_trained"):
        Sampling("ddim", schedule="karras").check(tiny_config)
    with pytest.raises(UserError, match="lcm takes at most 50"):
        Sampling("lcm", 60).check(tiny_config)
    for wrong in ({"schedule": "cosine"}, {"eta": 1.5}, {"eta": 0.5}, {"sampler": "Euler a"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Sampling(**wrong)


def test_the_samplers_with_an_eta_are_ddim_and_those_of_the_setting():
    assert {name for name, sampler in SAMPLERS.items() if sampler.eta is not None} == {"ddim", *ETA_SAMPLERS}
    assert all(SAMPLERS[name].eta == 1.0 for name in ETA_SAMPLERS) and SAMPLERS["ddim"].eta == 0.0


def test_an_image_tells_how_it_was_sampled():
    assert Sampling().fields() == {"sampler": "dpm_solver_pp", "sampling_steps": 20, "scale": 7.5, "ddim_eta": 0.0}
    assert list(Sampling().fields()) == ["sampler", "sampling_steps", "scale", "ddim_eta"]
    assert Sampling("ddim", eta=0.5).fields()["ddim_eta"] == 0.5
    ancestral = Sampling("euler_a", 30, schedule="karras").fields()
    assert ancestral == {
        "sampler": "euler_a", "schedule": "karras", "sampling_steps": 30, "scale": 7.5, "eta": 1.0,
    }  # fmt: skip
