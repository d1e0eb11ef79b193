"""Whole pipelines against diffusers', live: the golden file is current, and the nano form agrees at other settings."""

from __future__ import annotations

from pathlib import Path

import mindspore as ms
import numpy as np
import pytest

from ldm.diffusion.sampling import Sampling
from ldm.generation.pipeline import Pipeline
from ldm.settings.model import load_model_config
from tests.golden.make_pipelines import MORE_SCHEDULERS, SCHEDULERS, answers, draw, reference_for
from tests.named_weights import relative_error
from tests.network_cases import model_with_named_weights
from tests.pipeline_cases import NEGATIVE_PROMPTS, PROMPTS, SCALE, starting_latents

TESTS = Path(__file__).parents[1]


def test_golden_pipelines_are_up_to_date():
    stored, fresh = np.load(TESTS / "golden" / "pipelines.npz", allow_pickle=False), answers()
    assert set(stored) == set(fresh)
    assert max(relative_error(stored[name], fresh[name]) for name in fresh) < 1e-4


@pytest.fixture(scope="module")
def nano():
    ms.set_context(mode=ms.GRAPH_MODE)
    config = load_model_config(TESTS.parent / "configs" / "nano.yaml")
    # Latents are compared: diffusers has no autoencoder whose two halves differ in width, as nano's do.
    return Pipeline(model_with_named_weights(config)), reference_for(config, 0, vae=False)


@pytest.mark.parametrize(
    ("sampler", "steps"),
    [
        *((sampler, steps) for sampler in SCHEDULERS for steps in (7, 30)),
        *((sampler, 20) for sampler in MORE_SCHEDULERS),
    ],
)
def test_nano_ends_where_diffusers_ends(nano, sampler, steps):
    pipeline, reference = nano
    start = starting_latents(pipeline.config, height=16, width=16)
    theirs = draw(pipeline.config, reference, sampler, start, steps)
    sampling = Sampling(sampler, steps, SCALE, batch_size=2)
    (batch,) = pipeline.generate(PROMPTS, sampling, 0, NEGATIVE_PROMPTS, start, progress=False)
    assert relative_error(batch.latents, theirs) < 1e-4  # demanded: 1e-3
