"""What training takes from its base model: added tokens and a separate VAE, which resuming compares as well."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

import text_to_image
from ldm.errors import UserError
from ldm.models.stable_diffusion import build_model
from ldm.runtime.device import setup_runtime
from ldm.settings.model import load_model_config
from ldm.settings.train import TrainSettings
from ldm.tokenizer import AddedToken
from ldm.training.resume import FIXED_ON_RESUME
from ldm.training.trainer import save, train
from ldm.weights.added_tokens import TOKEN_EMBEDDING, read_added_tokens, tokens_metadata
from ldm.weights.base_model import open_base_model
from ldm.weights.checkpoint import read_checkpoint, write_checkpoint
from ldm.weights.convert import convert
from tests.training.micro import MICRO, SETTINGS, prepare

VAE = "first_stage_model."
TOKEN = AddedToken("<cat-toy>", 49408)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A diffusers folder token/ with a learned token, bare.safetensors without token and VAE, two VAEs, and data/."""
    folder = tmp_path_factory.mktemp("files")
    setup_runtime("CPU", seed=3)
    arrays = {p.name: p.asnumpy() for p in build_model(load_model_config(MICRO)).get_parameters()}
    vae = {name[len(VAE) :]: array for name, array in arrays.items() if name.startswith(VAE)}
    write_checkpoint(folder / "a.safetensors", vae)
    write_checkpoint(folder / "b.safetensors", {name: array * 1.5 for name, array in vae.items()})
    bare = {name: array for name, array in arrays.items() if not name.startswith(VAE)}
    write_checkpoint(folder / "bare.safetensors", bare)
    learned = np.concatenate([arrays[TOKEN_EMBEDDING], 3 * np.ones((1, 32), np.float32)])
    write_checkpoint(folder / "token.safetensors", {**arrays, TOKEN_EMBEDDING: learned}, tokens_metadata((TOKEN,)))
    convert(folder / "token.safetensors", folder / "token", model_config=MICRO)
    (folder / "token.yaml").unlink()
    (folder / "data").mkdir()
    rows = ["dir,text"]
    for i, text in enumerate(("a <cat-toy>", "a cat toy", "<cat-toy> in snow", "snow")):
        Image.new("RGB", (16, 16), (60 * i, 99, 9)).save(folder / "data" / f"{i}.png")
        rows.append(f"{i}.png,{text}")
    (folder / "data" / "img_txt.csv").write_text("\n".join(rows) + "\n")
    return folder


def settings(files, output, base, **others) -> TrainSettings:
    return TrainSettings(**{
        **SETTINGS, "pretrained_model_path": files / base, "data_path": files / "data", "output_path": output,
        "max_steps": 1, "mode": 1, **others,
    })  # fmt: skip


def test_the_added_tokens_of_a_folder_are_used_and_saved(files, tmp_path):
    run = prepare(settings(files, tmp_path / "run", "token", model_config=None))
    assert run.model.config.added_tokens == (TOKEN,)
    tokens = run.inputs.captions.tokens.tokenizer.encode([row.caption for row in run.inputs.data.rows])
    assert (tokens == 49408).sum(axis=1).tolist() == [1, 0, 1, 0]
    save(run)
    model = tmp_path / "run" / "ckpt" / "model.ckpt"
    assert read_added_tokens(open_base_model(model)) == (TOKEN,)
    text_to_image.main([
        "--prompt", "a <cat-toy>", "--ckpt_path", str(model), "--config", str(MICRO), "--H", "16",
        "--W", "16", "--sampling_steps", "1", "--scale", "1", "--output_path", str(tmp_path / "out"), "--skip_grid",
        "--mode", "1",
    ])  # fmt: skip


def test_a_separate_vae_is_used_and_compared_on_resume(files, tmp_path):
    runs = {
        name: prepare(settings(files, tmp_path / name, "bare.safetensors", vae_ckpt_path=str(files / name)))
        for name in ("a.safetensors", "b.safetensors")
    }
    for name, run in runs.items():
        parameters = run.model.parameters_dict()
        for array, values in read_checkpoint(files / name)[0].items():
            np.testing.assert_array_equal(parameters[VAE + array].asnumpy(), values)
    a, b = (run.fingerprint["base"] for run in runs.values())
    assert a != b and "base" in FIXED_ON_RESUME
    a, b = (run.inputs.batch(0) for run in runs.values())
    assert (a.latents != b.latents).any()


def test_a_base_model_without_a_vae_is_refused_with_the_flag_to_give(files, tmp_path):
    with pytest.raises(UserError, match="bare.safetensors does not fit .*holds no VAE .*give --vae_ckpt_path"):
        train(settings(files, tmp_path / "run", "bare.safetensors"))


def test_generation_uses_a_separate_vae_and_names_it_in_the_png(files, tmp_path):
    drawn = {}
    for name in ("a", "b"):
        text_to_image.main([
            "--prompt", "x", "--ckpt_path", str(files / "bare.safetensors"), "--config", str(MICRO), "--H", "16",
            "--W", "16", "--vae_ckpt_path", str(files / f"{name}.safetensors"), "--sampling_steps", "1", "--scale", "1",
            "--mode", "1", "--skip_grid", "--output_path", str(tmp_path / name),
        ])  # fmt: skip
        image = Image.open(tmp_path / name / "samples" / "00000.png")
        assert image.text["vae_checkpoint"] == f"{name}.safetensors" and len(image.text["vae_checkpoint_sha256"]) == 64
        drawn[name] = np.asarray(image)
    assert (drawn["a"] != drawn["b"]).any()


def test_a_folder_and_its_single_file_have_the_same_added_token(files):
    tokens = json.loads((files / "token" / "tokenizer" / "added_tokens.json").read_text())
    assert tokens == {"<cat-toy>": 49408} and read_added_tokens(open_base_model(files / "token.safetensors")) == (
        TOKEN,
    )
