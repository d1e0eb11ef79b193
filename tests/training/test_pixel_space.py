"""A model in pixel space by configuration alone: its training, a LoRA on it, sampling, and what does not go with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import text_to_image
from ldm.data.transforms import load_image
from ldm.errors import UserError
from ldm.generation.loading import load_model
from ldm.generation.pipeline import Pipeline
from ldm.models.stable_diffusion import build_model
from ldm.settings.model import load_model_config
from ldm.settings.train import TrainSettings
from ldm.training.inputs import sample_latents
from ldm.training.trainer import train
from ldm.weights.checkpoint import read_checkpoint, write_checkpoint
from tests.training.micro import MICRO, ROOT, SETTINGS, prepare

PIXELS = ROOT / "tests" / "pixels.yaml"


@pytest.fixture(scope="module")
def rgb(tmp_path_factory) -> Path:
    """The configuration of the same model with three channels."""
    document = yaml.safe_load(PIXELS.read_text())
    document["model"]["params"]["unet_config"]["params"].update(in_channels=3, out_channels=3)
    path = tmp_path_factory.mktemp("configs") / "rgb.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.fixture(scope="module")
def make(micro_base_model, micro_data):
    """Makes the settings of a run from a random UNet and the text encoder of a model with an autoencoder."""

    def settings(output: Path, config: Path = PIXELS, **others: object) -> TrainSettings:
        paths = {"pretrained_model_path": micro_base_model, "data_path": micro_data, "output_path": output}
        from_scratch = {"unet_initialize_random": True, "max_steps": 2, "start_learning_rate": 1e-3, "mode": 0}
        return TrainSettings(**{**SETTINGS, "model_config": str(config), **from_scratch, **paths, **others})

    return settings


@pytest.fixture(scope="module")
def base(make, tmp_path_factory) -> Path:
    """A grey model after two steps of training in graph mode."""
    output = tmp_path_factory.mktemp("base") / "run"
    train(make(output))
    return output / "ckpt" / "model.ckpt"


@pytest.fixture(scope="module")
def lora(make, base, tmp_path_factory) -> Path:
    """A LoRA after two steps of training on `base`."""
    output = tmp_path_factory.mktemp("lora") / "run"
    train(
        make(
            output, pretrained_model_path=base, unet_initialize_random=False, use_lora=True, lora_targets=["all"],
            lora_rank=2, start_learning_rate=1e-2,
        )
    )  # fmt: skip
    return output / "ckpt" / "lora.ckpt"


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def test_a_trained_checkpoint_has_no_autoencoder_and_loads(base, micro_base_model):
    arrays, metadata = read_checkpoint(base)
    assert {name.split(".")[0] for name in arrays} == {"model", "cond_stage_model"}
    assert (metadata["architecture"], metadata["prediction_type"]) == ("custom", "v_prediction")
    text_encoder, _ = read_checkpoint(micro_base_model)
    for name, parameter in load_model(load_model_config(PIXELS), base).parameters_dict().items():
        np.testing.assert_array_equal(parameter.asnumpy(), arrays[name])
        if name.startswith("cond_stage_model."):
            np.testing.assert_array_equal(arrays[name], text_encoder[name])


def test_a_grey_model_draws_grey_images_with_and_without_its_lora(base, lora):
    pipe = Pipeline.from_checkpoint(base, config=PIXELS)

    def draw() -> list[Image.Image]:
        return pipe("an image", num_images_per_prompt=2, num_inference_steps=2, seed=1, progress=False).images

    before = draw()
    assert [(image.mode, image.size) for image in before] == [("L", (16, 16))] * 2
    pipe.load_lora(lora, name="lora")
    after = draw()
    assert not np.array_equal(pixels(after), pixels(before))
    pipe.set_loras([("lora", 0.0)])
    np.testing.assert_array_equal(pixels(draw()), pixels(before))


def test_the_command_writes_grey_pngs(base, lora, tmp_path):
    text_to_image.main(
        ["--config", str(PIXELS), "--ckpt_path", str(base), "--lora_ckpt_path", str(lora), "--sampling_steps", "2"]
        + ["--prompt", "an image", "--n_iter", "1", "--n_samples", "2", "--output_path", str(tmp_path)]
    )
    files = [*sorted((tmp_path / "samples").glob("*.png")), tmp_path / "grid.png"]
    assert [Image.open(file).mode for file in files] == ["L"] * 3


def test_three_channels_are_rgb_by_configuration_alone(rgb):
    pipe = Pipeline(build_model(load_model_config(rgb)))
    (image,) = pipe("an image", num_inference_steps=1, guidance_scale=1.0, progress=False).images
    assert (image.mode, image.size) == ("RGB", (16, 16))


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_latents_are_the_pixels_of_the_images(make, rgb, tmp_path, channels, cached):
    inputs = prepare(make(tmp_path / "run", PIXELS if channels == 1 else rgb, cache_latents=cached)).inputs
    for number in range(3):
        for latents, row in zip(inputs.batch(number).latents, inputs.order.indices(number)):
            np.testing.assert_array_equal(latents, load_image(inputs.data.rows[row].image, 16, channels=channels))


def test_a_grey_cache_is_not_read_for_rgb(make, rgb, tmp_path):
    shapes = {prepare(make(tmp_path / "run", config)).inputs.batch(0).latents.shape for config in (PIXELS, rgb)}
    assert shapes == {(2, 1, 16, 16), (2, 3, 16, 16)}


def test_pixels_are_not_drawn_from_a_distribution():
    images = np.random.default_rng(0).standard_normal((2, 1, 4, 4)).astype(np.float32)
    np.testing.assert_array_equal(sample_latents(images, np.ones_like(images), 1.0), images)


def test_the_autoencoder_of_the_starting_checkpoint_is_left_out_in_one_line(make, tmp_path, caplog):
    with caplog.at_level("INFO", logger="ldm"):
        prepare(make(tmp_path / "run"))
    (line,) = [record.getMessage() for record in caplog.records if "VAE" in record.getMessage()]
    assert "text encoder: " in line and "(VAE, not asked for)" in line


def test_an_autoencoder_for_a_model_without_one_is_refused(make, micro_base_model, tmp_path):
    with pytest.raises(UserError, match="pixels.yaml is a model in pixel space, which has no VAE: leave out vae_ckpt"):
        prepare(make(tmp_path / "run", vae_ckpt_path=micro_base_model))


def test_a_checkpoint_of_other_channels_or_with_an_autoencoder_is_refused(base, micro_base_model, rgb, tmp_path):
    grey, latents = load_model_config(PIXELS), load_model_config(MICRO)
    with pytest.raises(UserError, match="its UNet takes 1 channels, that of the model configuration 3"):
        load_model(load_model_config(rgb), base)
    with pytest.raises(UserError, match="its UNet takes 1 channels, that of the model configuration 4") as caught:
        load_model(latents, write(tmp_path / "no_metadata.ckpt", read_checkpoint(base)[0]))
    assert "vae_ckpt_path" not in str(caught.value)
    with_vae = read_checkpoint(base)[0]
    with_vae.update({name: a for name, a in read_checkpoint(micro_base_model)[0].items() if "first_stage" in name})
    with pytest.raises(UserError, match="it has a VAE, and the model configuration describes a model in pixel space"):
        load_model(grey, write(tmp_path / "with_vae.ckpt", with_vae))


def test_a_random_unet_needs_the_text_encoder_alone_whatever_the_metadata_say(micro_base_model, tmp_path):
    arrays = {name: a for name, a in read_checkpoint(micro_base_model)[0].items() if name.startswith("cond_stage")}
    path = tmp_path / "nano.ckpt"
    write_checkpoint(path, arrays, {"architecture": "nano", "prediction_type": "epsilon"})
    config = load_model_config(PIXELS)
    load_model(config, path, random_unet=True)
    with pytest.raises(UserError, match="says that its architecture is nano"):
        load_model(config, path)
    latents = load_model_config(MICRO)  # a model whose VAE comes from the checkpoint too
    with pytest.raises(UserError, match="says that its architecture is nano"):
        load_model(latents, path, random_unet=True)


def write(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    write_checkpoint(path, arrays)
    return path
