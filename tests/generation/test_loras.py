"""A loaded pipeline changes its LoRAs: the weights of a fresh start, in the same compiled graphs."""

from __future__ import annotations

from dataclasses import replace

import mindspore as ms
import numpy as np
import pytest

from ldm.diffusion.guidance import GuidedDenoiser
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.sampling import Sampling, latent_shape
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError
from ldm.generation.pipeline import Pipeline
from ldm.lora.formats import read_lora, write_lora
from ldm.lora.inject import get_lora, inject_lora
from ldm.lora.lora import LoRA, timesteps_metadata
from ldm.lora.spec import LoRASpec
from ldm.lora.strength import Strength
from ldm.models.stable_diffusion import build_model
from ldm.weights.checkpoint import write_checkpoint
from tests.conftest import ROOT

TINY = ROOT / "tests" / "tiny.yaml"
FEW = Sampling(num_inference_steps=2, guidance_scale=2.0, batch_size=1)


@pytest.fixture(scope="module")
def folder(tiny_config, tmp_path_factory):
    """A base model, LoRAs a and b of both networks, and a LoRA for another model."""
    folder = tmp_path_factory.mktemp("files")
    np.random.seed(0)
    model = build_model(tiny_config)
    write_checkpoint(folder / "base.ckpt", {p.name: p.asnumpy().copy() for p in model.get_parameters()})
    inject_lora(model, LoRASpec(rank=2, text_encoder=True, targets="all"))
    for name in ("a", "b"):
        for parameter in model.trainable_params():
            values = 0.2 * np.random.standard_normal(parameter.shape)
            parameter.set_data(ms.Tensor(values.astype(np.float32)))
        write_lora(folder / f"{name}.ckpt", get_lora(model, tiny_config))
    lora = get_lora(model, tiny_config)
    wide = {name: replace(layer, down=np.ones((2, 5), np.float32)) for name, layer in lora.only("unet").layers.items()}
    write_lora(folder / "wrong.ckpt", LoRA(wide))
    return folder


@pytest.fixture(scope="module")
def pipeline(folder):
    ms.set_context(mode=ms.GRAPH_MODE)
    yield Pipeline.from_checkpoint(folder / "base.ckpt", config=TINY, device="CPU")
    ms.set_context(mode=ms.PYNATIVE_MODE)


@pytest.fixture(autouse=True)
def unloaded(pipeline):
    pipeline.unload_lora()


def weights(pipeline):
    return {parameter.name: parameter.asnumpy().tobytes() for parameter in pipeline.model.get_parameters()}


def generated(pipeline):
    (batch,) = pipeline.generate(["a red cat"], FEW, 7, progress=False)
    return batch.latents.tobytes()


def fresh(folder, *loras):
    """Returns the weights of a new pipeline with these (file, strength)."""
    pipeline = Pipeline.from_checkpoint(folder / "base.ckpt", config=TINY)
    for file, strength in loras:
        pipeline.load_lora(folder / f"{file}.ckpt", strength)
    return weights(pipeline)


def test_a_switch_gives_the_latents_of_a_fresh_start_in_the_same_compiled_graphs(pipeline, folder):
    networks = (pipeline.unet, pipeline.text_encoder, pipeline.decoder)
    base = generated(pipeline)
    pipeline.load_lora(folder / "a.ckpt", 0.8)
    pipeline.set_loras([(folder / "b.ckpt", 0.5), (folder / "a.ckpt", -0.3)])
    switched = generated(pipeline)
    pipeline.unload_lora()
    assert generated(pipeline) == base != switched
    assert [len(network.compile_cache) for network in networks] == [1, 1, 1]

    other = Pipeline.from_checkpoint(folder / "base.ckpt", config=TINY)
    other.load_lora(folder / "b.ckpt", 0.5)
    other.load_lora(folder / "a.ckpt", -0.3)
    assert generated(other) == switched


@pytest.mark.parametrize(
    "loras",
    [
        [("a", 0.8), ("b", 0.5)],
        [("b", 0.5), ("a", 0.8)],
        [("a", Strength(0.5, 0.0)), ("b", Strength(0.0, -1.5))],
        [("a", 0.0)],
    ],
)
def test_the_weights_are_those_of_a_fresh_start_with_the_same_order_and_strengths(pipeline, folder, loras):
    pipeline.load_lora(folder / "b.ckpt", 2.0)
    pipeline.set_loras([(folder / f"{file}.ckpt", strength) for file, strength in loras])
    assert weights(pipeline) == fresh(folder, *loras)


def test_a_lora_with_a_name_is_kept_in_memory_and_a_path_is_read_again(pipeline, folder, tmp_path):
    path = tmp_path / "lora.ckpt"
    path.write_bytes((folder / "a.ckpt").read_bytes())
    pipeline.load_lora(path, 0.8, name="style", text_encoder=False)
    unet_alone = weights(pipeline)
    path.write_bytes((folder / "b.ckpt").read_bytes())
    pipeline.set_loras([path])
    assert weights(pipeline) == fresh(folder, ("b", 1.0))
    pipeline.set_loras([("style", 0.8)])
    assert weights(pipeline) == unet_alone == fresh(folder, ("a", Strength(0.8, 0.0)))


def test_what_is_merged_can_be_asked_for(pipeline, folder):
    lora = pipeline.load_lora(folder / "a.ckpt", 0.8, name="style")
    pipeline.load_lora(folder / "b.ckpt", Strength(1.0, 0.5))
    style, other = pipeline.loras
    assert (style.name, style.strength, style.lora) == ("style", Strength(0.8, 0.8), lora)
    assert (other.name, other.strength) == (str(folder / "b.ckpt"), Strength(1.0, 0.5))


def test_one_lora_can_be_unloaded_by_name_or_path(pipeline, folder):
    pipeline.load_lora(folder / "a.ckpt", 0.8, name="style")
    pipeline.load_lora(folder / "b.ckpt", 0.5)
    pipeline.unload_lora("style")
    assert weights(pipeline) == fresh(folder, ("b", 0.5))
    pipeline.load_lora(folder / "a.ckpt", 0.8, name="style")  # the name is free again
    pipeline.unload_lora(folder / "b.ckpt")
    assert weights(pipeline) == fresh(folder, ("a", 0.8))


def test_a_pair_may_be_a_list_as_json_gives_it(pipeline, folder):
    pipeline.set_loras([[str(folder / "a.ckpt"), 0.8]])
    assert weights(pipeline) == fresh(folder, ("a", 0.8))


def test_all_loras_of_a_path_are_unloaded_by_it(pipeline, folder):
    pipeline.set_loras([(folder / "a.ckpt", 0.8), (folder / "b.ckpt", 0.5), (folder / "a.ckpt", -0.3)])
    pipeline.unload_lora(folder / "a.ckpt")
    assert weights(pipeline) == fresh(folder, ("b", 0.5))


def test_text_embeddings_are_those_of_the_merged_text_encoder(pipeline, folder):
    """None of an earlier text encoder are kept."""
    base = pipeline.encode_prompts(["a red cat"])
    pipeline.set_loras([(folder / "a.ckpt", Strength(0.0, 1.0))])
    assert np.abs(pipeline.encode_prompts(["a red cat"]) - base).max() > 1e-3
    pipeline.set_loras([(folder / "a.ckpt", Strength(1.0, 0.0))])
    np.testing.assert_array_equal(pipeline.encode_prompts(["a red cat"]), base)


def test_block_weights_are_the_strengths_of_the_layers_in_these_blocks(pipeline, folder):
    lora = pipeline.load_lora(folder / "a.ckpt", 0.8, name="style", block_weights="MID=0.5,OUT*=0,BASE=0")
    (merged,) = pipeline.loras
    assert str(merged.strength) == "0.8, blocks MID=0.5,OUT*=0,BASE=0"
    blocks = weights(pipeline)

    unet = "model.diffusion_model."
    middle = {name: layer for name, layer in lora.layers.items() if name.startswith(f"{unet}middle_block.")}
    zero = (f"{unet}output_blocks.", "cond_stage_model.")
    others = {name: layer for name, layer in lora.layers.items() if name not in middle and not name.startswith(zero)}
    assert len(middle) > 5 and len(others) > 5
    write_lora(folder / "middle.ckpt", LoRA(middle, lora.metadata))
    write_lora(folder / "others.ckpt", LoRA(others, lora.metadata))
    assert blocks == fresh(folder, ("middle", 0.4), ("others", 0.8))
    pipeline.set_loras([("style", replace(merged.strength, blocks=None))])
    assert weights(pipeline) == fresh(folder, ("a", 0.8)) != blocks
    pipeline.set_loras([("style", merged.strength)])
    assert weights(pipeline) == blocks
    for wrong, words in (("OUTALL", "has IN00 to IN03"), ("MID", "is no preset")):
        with pytest.raises(UserError, match=words):
            pipeline.load_lora(folder / "b.ckpt", block_weights=wrong)
    assert weights(pipeline) == blocks and len(pipeline.loras) == 1


@pytest.mark.parametrize("mode", ["load", "set"])
def test_a_second_lora_that_does_not_fit_leaves_the_pipeline_as_it_was(pipeline, folder, mode):
    pipeline.load_lora(folder / "a.ckpt", 0.8, name="style")
    before, loras = weights(pipeline), pipeline.loras
    with pytest.raises(UserError, match="wrong.ckpt"):
        if mode == "load":
            pipeline.load_lora(folder / "wrong.ckpt", name="wrong")
        else:
            pipeline.set_loras([(folder / "b.ckpt", 1.0), (folder / "wrong.ckpt", 1.0)])
    with pytest.raises(UserError, match="lower the strength"):
        pipeline.load_lora(folder / "b.ckpt", 1e300, name="wrong")
    assert weights(pipeline) == before and pipeline.loras == loras
    pipeline.load_lora(folder / "b.ckpt", name="wrong")  # the name was not taken


def test_a_name_that_is_taken_or_unknown_is_refused(pipeline, folder):
    pipeline.load_lora(folder / "a.ckpt", 0.8, name="style")
    before = weights(pipeline)
    with pytest.raises(UserError, match="the name style is loaded.*set_loras"):
        pipeline.load_lora(folder / "b.ckpt", name="style")
    with pytest.raises(UserError, match="stile does not exist"):
        pipeline.set_loras([("stile", 1.0)])
    with pytest.raises(UserError, match="no LoRA stile is loaded: choose one of style"):
        pipeline.unload_lora("stile")
    with pytest.raises(ValueError, match="takes a list"):
        pipeline.set_loras("style")
    assert weights(pipeline) == before


def test_a_model_in_memory_is_its_own_base(tiny_config, folder):
    np.random.seed(1)
    pipeline = Pipeline(build_model(tiny_config))
    base = weights(pipeline)
    pipeline.load_lora(folder / "a.ckpt", 0.8)
    pipeline.set_loras([(folder / "b.ckpt", 0.5)])
    assert weights(pipeline) != base
    pipeline.unload_lora()
    assert weights(pipeline) == base


def test_a_base_model_that_changed_on_disk_is_not_mixed_with_the_loaded_one(folder, tmp_path):
    path = tmp_path / "base.ckpt"
    path.write_bytes((folder / "base.ckpt").read_bytes())
    pipeline = Pipeline.from_checkpoint(path, config=TINY)
    pipeline.load_lora(folder / "a.ckpt")
    before = weights(pipeline)
    path.write_bytes((folder / "base.ckpt").read_bytes()[:-1])
    with pytest.raises(UserError, match="base.ckpt has changed"):
        pipeline.unload_lora()
    assert weights(pipeline) == before and len(pipeline.loras) == 1


def test_an_fp16_pipeline_holds_the_fp32_sums_rounded_once(folder):
    full, half = (
        Pipeline.from_checkpoint(folder / "base.ckpt", config=TINY, dtype=dtype) for dtype in (ms.float32, ms.float16)
    )
    for loras in ([("a", 0.8)], [("b", 0.5), ("a", -0.3)], []):
        for pipeline in (full, half):
            pipeline.set_loras([(folder / f"{name}.ckpt", strength) for name, strength in loras])
        held = 0
        for exact, rounded in zip(full.model.get_parameters(), half.model.get_parameters()):
            held += rounded.dtype == ms.float16
            wanted = exact.asnumpy().astype(rounded.asnumpy().dtype)
            assert rounded.asnumpy().tobytes() == wanted.tobytes(), exact.name
        assert held > 100


# ---- LoRAs that are applied at some steps of the sampling ------------------------------------------------------------

FOUR = Sampling(num_inference_steps=4, guidance_scale=2.0, batch_size=1)


def sampled(pipeline, prompts=("a red cat",), sampling=FOUR):
    return np.concatenate([batch.latents for batch in pipeline.generate(list(prompts), sampling, 7, progress=False)])


def by_hand(folder, first, rest, switch_at, lora="a"):
    """Sample with one strength of the UNet part up to a step, and with another from there on."""
    pipelines = []
    for strength in (first, rest):
        pipelines.append(Pipeline.from_checkpoint(folder / "base.ckpt", config=TINY))
        pipelines[-1].load_lora(folder / f"{lora}.ckpt", Strength(strength, 0.8))
    embeddings = pipelines[0].encode_prompts(["a red cat", ""])
    denoisers = [GuidedDenoiser(p.unet, embeddings[:1], embeddings[1:], FOUR.guidance_scale) for p in pipelines]
    calls = iter(range(4))

    def denoise(latents, timestep):
        return denoisers[next(calls) >= switch_at](latents, timestep)

    start = pipelines[0].starting_latents(7, [0], latent_shape(pipelines[0].config))
    return SAMPLERS[FOUR.sampler](denoise, start, 4, pipelines[0].schedule, pipelines[0].config.prediction_type)


@pytest.mark.parametrize(
    "start, end, first, rest, switch_at", [(0.5, None, 0.0, 0.8, 2), (None, 0.25, 0.8, 0.0, 1), (0.0, 1.0, 0.8, 0.8, 0)]
)
def test_a_lora_is_in_the_weights_at_its_steps_alone(pipeline, folder, start, end, first, rest, switch_at):
    merged = fresh(folder, ("a", 0.8))
    pipeline.load_lora(folder / "a.ckpt", 0.8, start=start, end=end)
    np.testing.assert_array_equal(sampled(pipeline), by_hand(folder, first, rest, switch_at))
    assert weights(pipeline) == merged
    pipeline.unload_lora()
    assert weights(pipeline) == fresh(folder)
    assert len(pipeline.unet.compile_cache) == 1


def test_a_lora_begins_at_its_step_where_a_sampler_calls_the_network_twice_a_step(pipeline, folder, monkeypatch):
    """PLMS takes its first step twice, so the third one is its fourth call. The progress bar counts steps too."""
    switched, told = [], []
    pipeline.load_lora(folder / "a.ckpt", 0.8, start=0.5)
    monkeypatch.setattr(pipeline._merged, "switch", switched.append)
    embeddings = pipeline.encode_prompts(["a red cat", ""])
    start = pipeline.starting_latents(7, [0], latent_shape(pipeline.config))
    plms = replace(FOUR, sampler="plms")
    pipeline.sample(embeddings[:1], embeddings[1:], start, plms, callback=told.append)
    assert switched == [[False], [False], [False], [True], [True], [True]]  # at last, all are
    assert told == [1, 2, 3, 4]


def test_each_lora_of_a_list_has_its_own_steps_and_each_batch_begins_anew(pipeline, folder):
    loras = [(folder / "a.ckpt", 0.8, 0.5, None), (folder / "b.ckpt", 0.5, None, 0.5)]
    pipeline.set_loras(loras)
    both = sampled(pipeline, ["a red cat", "a blue dog"])
    np.testing.assert_array_equal(sampled(pipeline), both[:1])
    pipeline.set_loras(loras[::-1])
    assert weights(pipeline) == fresh(folder, ("b", 0.5), ("a", 0.8))
    pipeline.set_loras([entry[:2] for entry in loras])
    assert np.abs(sampled(pipeline) - both[:1]).max() > 1e-3


def test_a_lora_is_applied_at_the_time_steps_it_was_trained_on(pipeline, folder, tmp_path):
    """The four steps are at 999, 749, 500 and 250 of 1,000."""
    lora = read_lora(folder / "a.ckpt")
    lora.metadata.update(timesteps_metadata(range(0, 600)))
    write_lora(tmp_path / "late.ckpt", lora)
    pipeline.load_lora(tmp_path / "late.ckpt", 0.8)
    np.testing.assert_array_equal(sampled(pipeline), by_hand(folder, 0.0, 0.8, 2))
    pipeline.set_loras([(tmp_path / "late.ckpt", 0.8, 0.0, 1.0)])  # what the user asks for takes precedence
    np.testing.assert_array_equal(sampled(pipeline), by_hand(folder, 0.8, 0.8, 0))


def test_a_lora_of_a_zero_terminal_training_is_sampled_from_noise_alone(pipeline, folder, tmp_path, monkeypatch):
    """With trailing spacing, and with guidance rescale. Without the LoRA, everything is as before."""
    config = replace(pipeline.config, prediction_type="v_prediction")
    monkeypatch.setattr(pipeline, "config", config)
    before = sampled(pipeline)
    lora = read_lora(folder / "a.ckpt")
    lora.metadata = {"zero_terminal_snr": "True"}
    write_lora(tmp_path / "zero.ckpt", lora)
    pipeline.load_lora(tmp_path / "zero.ckpt", 0.8)
    found = sampled(pipeline)
    embeddings = pipeline.encode_prompts(["a red cat", ""])
    denoise = GuidedDenoiser(pipeline.unet, embeddings[:1], embeddings[1:], FOUR.guidance_scale, rescale=0.7)
    start = pipeline.starting_latents(7, [0], latent_shape(config))
    schedule = NoiseSchedule.from_config(config, zero_terminal_snr=True)
    np.testing.assert_array_equal(found, SAMPLERS[FOUR.sampler](denoise, start, 4, schedule, "v_prediction"))
    assert not np.array_equal(found, sampled(pipeline, sampling=replace(FOUR, guidance_rescale=0.0)))
    pipeline.set_loras([(tmp_path / "zero.ckpt", 0.0)])
    np.testing.assert_array_equal(sampled(pipeline), before)
    monkeypatch.setattr(pipeline, "config", replace(config, prediction_type="epsilon"))
    pipeline.set_loras([(tmp_path / "zero.ckpt", 0.8)])
    assert not pipeline.samples_from_noise_alone  # noise alone says nothing to such a model


def test_an_interrupted_sampling_leaves_the_loras_in_the_weights(pipeline, folder):
    pipeline.load_lora(folder / "a.ckpt", 0.8, start=0.5)
    merged = weights(pipeline)

    def stop(step):
        raise KeyboardInterrupt

    embeddings = pipeline.encode_prompts(["a red cat", ""])
    start = pipeline.starting_latents(7, [0], latent_shape(pipeline.config))
    with pytest.raises(KeyboardInterrupt):
        pipeline.sample(embeddings[:1], embeddings[1:], start, FOUR, callback=stop)
    assert weights(pipeline) == merged
