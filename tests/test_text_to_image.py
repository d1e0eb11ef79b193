"""text_to_image.py as a user runs it, on a small random model: images, LoRAs and errors."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from PIL import Image

import ldm.generation.generate
import ldm.generation.loading
import ldm.generation.pipeline
import text_to_image
from ldm.errors import UserError
from ldm.files.outputs import claim_file, claim_folder
from ldm.generation.pipeline import Pipeline
from ldm.lora.formats import read_lora, write_lora
from ldm.lora.inject import get_lora, inject_lora
from ldm.lora.lora import LoRA
from ldm.lora.spec import LoRASpec
from ldm.models.stable_diffusion import build_model
from ldm.ops import multiplies_bf16
from ldm.runtime.device import setup_runtime
from ldm.runtime.precision import automatic_precision
from ldm.settings.model import load_model_config
from ldm.weights.checkpoint import write_checkpoint
from ldm.weights.convert import convert

ROOT = Path(__file__).parents[1]
TINY = ROOT / "tests" / "tiny.yaml"
PROMPTS = ["a red cat", "a dog, 犬"]


@pytest.fixture(scope="module", autouse=True)
def restored_mode():
    yield
    ms.set_context(mode=ms.PYNATIVE_MODE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base checkpoint, LoRA files for the UNet and for both networks, a file of prompts, and unsuitable files."""
    folder = tmp_path_factory.mktemp("files")
    config = load_model_config(TINY)
    np.random.seed(0)
    model = build_model(config)
    arrays = {parameter.name: parameter.asnumpy().copy() for parameter in model.get_parameters()}
    write_checkpoint(folder / "base.ckpt", arrays)
    write_checkpoint(folder / "velocity.ckpt", arrays, {"prediction_type": "v_prediction"})
    write_checkpoint(folder / "nano.safetensors", arrays, {"architecture": "nano"})
    unet = {name: array for name, array in arrays.items() if name.startswith("model.diffusion_model.")}
    write_checkpoint(folder / "unet.safetensors", {name: 0.9 * array for name, array in unet.items()})
    write_checkpoint(folder / "novae.ckpt", {name: a for name, a in arrays.items() if "first_stage" not in name})

    inject_lora(model, LoRASpec(rank=2, text_encoder=True))
    rng = np.random.default_rng(0)
    for parameter in model.get_parameters():
        if parameter.name.endswith("lora_up.weight"):
            values = 0.2 * rng.standard_normal(parameter.shape)
            parameter.set_data(ms.Tensor(values.astype(np.float32)))
    both = get_lora(model, config)
    write_lora(folder / "both.ckpt", both)
    write_lora(folder / "unet_lora.ckpt", both.only("unet"))
    write_lora(folder / "text_lora.ckpt", both.only("text_encoder"))
    write_lora(folder / "velocity_lora.ckpt", LoRA(both.layers, {"prediction_type": "v_prediction"}))
    write_lora(folder / "sd1_lora.ckpt", LoRA(both.layers, {"architecture": "sd1"}))
    elsewhere = {name.replace("input_blocks.1.", "input_blocks.77."): both.layers[name] for name in both.layers}
    write_lora(folder / "elsewhere_lora.ckpt", LoRA(elsewhere))
    wide = {name: replace(layer, down=np.ones((2, 5), np.float32)) for name, layer in both.only("unet").layers.items()}
    write_lora(folder / "wide_lora.ckpt", LoRA(wide))
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    (folder / "cut.ckpt").write_bytes((folder / "base.ckpt").read_bytes()[:100_000])
    (folder / "empty.txt").write_text("")
    np.save(folder / "nan.npy", np.full((1, 4, 8, 8), np.nan, np.float32))
    np.save(folder / "shape.npy", np.ones((1, 4, 8, 9), np.float32))
    return folder


# ---- the published command -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(folder, tmp_path_factory):
    """The output of the published command in graph mode. Only its paths and sizes are changed."""
    out = tmp_path_factory.mktemp("published")
    text_to_image.main(
        ["--version", "2.0", "--config", str(TINY), "--n_iter", "1", "--n_samples", "2", "--scale", "9.0"]
        + ["--W", "32", "--H", "32", "--use_lora", "True", "--lora_ft_text_encoder", "False"]
        + ["--lora_ckpt_path", str(folder / "both.ckpt"), "--dpm_solver", "--sampling_steps", "3"]
        + ["--data_path", str(folder / "prompts.txt"), "--ckpt_path", str(folder / "base.ckpt")]
        + ["--output_path", str(out), "--save_latents", str(out / "final.npy")]
    )
    return out


def test_the_published_command_writes_its_images_in_graph_mode(published):
    assert ms.get_context("mode") == ms.GRAPH_MODE
    assert sorted(path.name for path in published.iterdir()) == ["final.init.npy", "final.npy", "grid.png", "samples"]
    names = [path.name for path in (published / "samples").iterdir()]
    assert sorted(names) == ["00000.png", "00001.png", "00002.png", "00003.png", "prompts.txt", "run.json"]
    assert Image.open(published / "samples" / "00003.png").size == (32, 32)
    assert Image.open(published / "grid.png").size == (66, 66)


def test_the_pngs_are_in_the_order_of_the_prompts(published):
    lines = (published / "samples" / "prompts.txt").read_text(encoding="utf-8").splitlines()
    assert lines == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    assert [Image.open(path).text["prompt"] for path in sorted((published / "samples").glob("*.png"))] == lines


def test_a_png_holds_what_is_needed_to_make_it_again(published, folder):
    texts = Image.open(published / "samples" / "00002.png").text
    digest = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("base.ckpt", "both.ckpt")}
    assert texts["seed"] == "42" and texts["index"] == "2" and texts["negative_prompt"] == ""
    assert texts["model"] == "2.0" and texts["model_config"] == "tiny.yaml"
    assert texts["checkpoint"] == "base.ckpt" and texts["checkpoint_sha256"] == digest["base.ckpt"]
    (lora,) = json.loads(texts["lora"])
    assert (lora["file"], lora["sha256"], lora["weight"]) == ("both.ckpt", digest["both.ckpt"], 1.0)
    assert lora["lora_ft_text_encoder"] is False
    assert json.loads(texts["settings"]) == {
        "sampler": "dpm_solver",
        "sampling_steps": 3,
        "scale": 9.0,
        "ddim_eta": 0.0,
        "H": 32,
        "W": 32,
        "precision": automatic_precision(multiplies_bf16),
        "prediction_type": "epsilon",
        "batch_size": 4,
    }
    assert str(folder) not in "".join(texts.values())  # the folders of its maker are private


def test_starting_and_final_latents_are_saved_in_the_order_of_the_images(published):
    start, final = np.load(published / "final.init.npy"), np.load(published / "final.npy")
    assert start.shape == final.shape == (4, 4, 8, 8) and start.dtype == final.dtype == np.float32
    assert np.isfinite(final).all() and np.abs(final - start).max() > 0.1
    assert start.std() == pytest.approx(1, abs=0.1) and len(np.unique(start[:, 0, 0, 0])) == 4


def test_the_pipeline_generates_the_same_images(published, folder):
    setup_runtime("CPU", automatic=lambda: automatic_precision(multiplies_bf16))
    pipeline = Pipeline.from_checkpoint(folder / "base.ckpt", config=TINY)
    pipeline.load_lora(folder / "both.ckpt", text_encoder=False)
    output = pipeline(
        PROMPTS, num_images_per_prompt=2, num_inference_steps=3, guidance_scale=9.0, sampler="dpm_solver", seed=42
    )
    np.testing.assert_array_equal(output.latents, np.load(published / "final.npy"))
    assert [np.asarray(image).tolist() for image in output.images] == [
        np.asarray(Image.open(path)).tolist() for path in sorted((published / "samples").glob("*.png"))
    ]


# ---- one image at a time, in pynative mode, which compiles nothing -------------------------------------------------


def run(folder, out, *flags, prompt="a red cat"):
    """Run the script on the tiny model. FILES in the flags stands for the folder of the files."""
    flags = [str(flag).replace("FILES", str(folder)) for flag in flags]
    prompts = ["--prompt", prompt] if prompt else []
    text_to_image.main(
        ["--config", str(TINY), "--ckpt_path", str(folder / "base.ckpt"), "--mode", "1", "--sampling_steps", "1"]
        + ["--scale", "1", "--output_path", str(out), *prompts, *flags]
    )


def final_latents(folder, out, *flags):
    """Returns the final latents (N, 4, 8, 8) of a run without images."""
    run(folder, out, "--skip_save", "--skip_grid", "--save_latents", out / "latents.npy", *flags)
    return np.load(out / "latents.npy")


@pytest.fixture(scope="module")
def base_output(folder, tmp_path_factory):
    """The folder of a run without a LoRA."""
    out = tmp_path_factory.mktemp("base")
    final_latents(folder, out)
    return out


@pytest.fixture(scope="module")
def base(base_output):
    """The final latents of the run without a LoRA."""
    return np.load(base_output / "latents.npy")


@pytest.fixture(scope="module")
def with_lora(folder, tmp_path_factory):
    """The final latents of the run with both.ckpt."""
    return final_latents(folder, tmp_path_factory.mktemp("lora"), "--use_lora", "--lora_ckpt_path", "FILES/both.ckpt")


def test_a_diffusers_folder_is_a_checkpoint(folder, base, tmp_path):
    convert(folder / "base.ckpt", tmp_path / "sd", model_config=TINY)
    (tmp_path / "sd.yaml").unlink()  # the folder itself says which model it is
    text_to_image.main(
        ["--prompt", "a red cat", "--ckpt_path", str(tmp_path / "sd"), "--mode", "1", "--sampling_steps", "1"]
        + ["--scale", "1", "--output_path", str(tmp_path), "--skip_grid", "--save_latents", str(tmp_path / "final.npy")]
    )
    np.testing.assert_array_equal(np.load(tmp_path / "final.npy"), base)
    texts = Image.open(tmp_path / "samples" / "00000.png").text
    assert texts["checkpoint"] == "sd" and len(texts["checkpoint_sha256"]) == 64


@pytest.mark.parametrize(
    "flags",
    [
        ["FILES/both.ckpt", "--lora_scale", "0"],
        ["FILES/both.ckpt:0", "FILES/unet_lora.ckpt:0"],
        ["FILES/both.ckpt", "--lora_block_weights", "*=0"],
    ],
)
def test_a_lora_at_strength_0_changes_nothing(folder, base, tmp_path, flags):
    np.testing.assert_array_equal(final_latents(folder, tmp_path, "--lora_ckpt_path", *flags), base)


def test_a_lora_changes_the_image_and_strengths_add_up(folder, base, with_lora, tmp_path):
    assert np.abs(with_lora - base).max() > 1e-3
    parts = final_latents(
        folder, tmp_path, "--lora_ckpt_path", "FILES/both.ckpt:0.75", "FILES/both.ckpt:0.25", "--lora_rank", "4"
    )
    np.testing.assert_allclose(parts, with_lora, atol=1e-4 * np.abs(with_lora).max())


@pytest.mark.parametrize("format, name", [("peft", "folder"), ("kohya", "lora.safetensors")])
def test_a_lora_in_another_format_gives_the_same_image(folder, tiny_config, with_lora, tmp_path, format, name):
    write_lora(tmp_path / name, read_lora(folder / "both.ckpt"), format, tiny_config)
    latents = tmp_path / "latents.npy"
    run(folder, tmp_path, "--skip_grid", "--save_latents", latents, "--lora_ckpt_path", tmp_path / name)
    np.testing.assert_allclose(np.load(latents), with_lora, atol=1e-5 * np.abs(with_lora).max())
    (lora,) = json.loads(Image.open(next((tmp_path / "samples").glob("*.png"))).text["lora"])
    assert lora["file"] == name and {len(digest) for digest in lora["sha256"].split()} == {64}


def test_use_lora_false_leaves_the_lora_out(folder, base, tmp_path):
    off = final_latents(folder, tmp_path, "--use_lora", "False", "--lora_ckpt_path", "FILES/both.ckpt")
    np.testing.assert_array_equal(off, base)


def test_saved_starting_latents_give_the_image_again(folder, base, base_output, tmp_path):
    start = base_output / "latents.init.npy"
    again = final_latents(folder, tmp_path, "--seed", "7", "--init_latents", start)
    np.testing.assert_array_equal(again, base)
    assert np.abs(final_latents(folder, tmp_path, "--seed", "7") - base).max() > 1e-3


def test_unet_ckpt_path_replaces_the_checkpoints_unet(folder, base, tmp_path):
    assert np.abs(final_latents(folder, tmp_path, "--unet_ckpt_path", "FILES/unet.safetensors") - base).max() > 1e-3


def test_fp16_is_close_to_fp32_and_the_vae_stays_in_fp32(folder, base, tmp_path, monkeypatch):
    networks = []

    def built(config, **options):
        networks.append(build_model(config, **options))
        return networks[0]

    monkeypatch.setattr(ldm.generation.loading, "build_model", built)
    half = final_latents(folder, tmp_path, "--precision", "fp16")
    assert 0 < np.abs(half - base).max() < 0.02 * np.abs(base).max()
    (model,) = networks
    dtypes = {
        part: {cell.dtype for _, cell in getattr(model, part).cells_and_names() if hasattr(cell, "dtype")}
        for part in ("model", "cond_stage_model", "first_stage_model")
    }
    assert dtypes == {"model": {ms.float16}, "cond_stage_model": {ms.float16}, "first_stage_model": {ms.float32}}


def test_ddims_fresh_noise_changes_the_image(folder, tmp_path):
    plain = final_latents(folder, tmp_path, "--ddim", "--sampling_steps", "2")
    noisy = final_latents(folder, tmp_path, "--ddim", "--sampling_steps", "2", "--ddim_eta", "1")
    assert np.abs(plain - noisy).max() > 1e-3


def test_a_second_run_renames_the_images_of_the_first(folder, tmp_path, caplog):
    run(folder, tmp_path)
    first = (tmp_path / "samples" / "00000.png").read_bytes()
    run(folder, tmp_path, "--seed", "7")
    assert (tmp_path / "samples.old1" / "00000.png").read_bytes() == first
    assert (tmp_path / "samples" / "00000.png").read_bytes() != first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.old1.png", "grid.png", "samples", "samples.old1"]


# ---- which part of a LoRA is applied ---------------------------------------------------------------------------------


@pytest.fixture
def model(tiny_config):
    return build_model(tiny_config)


def changed(model, before):
    """Returns the networks whose weights differ from `before`."""
    names = {p.name.split(".")[0] for p in model.get_parameters() if not np.array_equal(p.asnumpy(), before[p.name])}
    short = {"model": "unet", "cond_stage_model": "text", "first_stage_model": "vae"}
    return "both" if names == {"model", "cond_stage_model"} else "".join(short[name] for name in names)


@pytest.mark.parametrize(
    ("file", "unet", "text_encoder", "applied", "words"),
    [
        ("both", None, None, "both", ""),
        ("both", True, True, "both", ""),
        ("both", True, False, "unet", "text encoder part, 8 layers, is left out"),
        ("both", None, False, "unet", "text encoder part, 8 layers, is left out"),
        ("both", False, None, "text", "UNet part, 56 layers, is left out"),
        ("unet_lora", None, None, "unet", ""),
        ("unet_lora", True, False, "unet", ""),
        ("text_lora", None, True, "text", ""),
    ],
)
def test_a_part_is_applied_unless_it_is_left_out(
    model, tiny_config, folder, caplog, file, unet, text_encoder, applied, words
):
    before = {parameter.name: parameter.asnumpy().copy() for parameter in model.get_parameters()}
    Pipeline(model).load_lora(folder / f"{file}.ckpt", unet=unet, text_encoder=text_encoder)
    assert changed(model, before) == applied
    assert words in caplog.text and bool(words) == ("left out" in caplog.text)
    assert len(list(model.get_parameters())) == len(before)  # merged: no layers are added


@pytest.mark.parametrize(
    ("file", "unet", "text_encoder", "words"),
    [
        ("unet_lora", None, True, "no text encoder part.*UNet: 56 layers.*lora_ft_text_encoder"),
        ("text_lora", True, None, "no UNet part.*text encoder: 8 layers.*lora_ft_unet"),
        ("unet_lora", False, None, "no part of it would be applied"),
        ("both", False, False, "no part of it would be applied"),
        ("sd1_lora", None, None, "architecture is sd1"),
        ("velocity_lora", None, None, "prediction_type is v_prediction"),
        ("elsewhere_lora", None, None, "does not fit.*matched.*unmatched"),
        ("wide_lora", None, None, "matches nothing.*56 of a wrong shape"),
        ("base", None, None, "not a LoRA.*--ckpt_path"),
        ("cut", None, None, "cut.ckpt"),
    ],
)
def test_a_lora_that_does_not_fit_is_refused_and_changes_nothing(
    model, tiny_config, folder, file, unet, text_encoder, words
):
    before = {parameter.name: parameter.asnumpy().copy() for parameter in model.get_parameters()}
    with pytest.raises(UserError, match=words):
        Pipeline(model).load_lora(folder / f"{file}.ckpt", unet=unet, text_encoder=text_encoder)
    assert not changed(model, before)


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data_path", "FILES/empty.txt"], "empty.txt is empty"),
        (["--prompt", "x", "--W", "36"], "W is 36.*multiples of 8"),
        (["--prompt", "x", "--H", "4000000", "--W", "4000000"], "--H: 4000000 is not allowed"),
        (["--prompt", "x", "--sampling_steps", "1000"], "sampling_steps is 1000.*1 to 999"),
        (["--prompt", "x", "--init_latents", "FILES/nan.npy"], "nan.npy holds values that are not finite"),
        (["--prompt", "x", "--init_latents", "FILES/shape.npy"], "shape.npy is 1 x 4 x 8 x 9, expected 1 x 4 x 8 x 8"),
        (["--prompt", "x", "--n_samples", "2", "--init_latents", "FILES/nan.npy"], "expected 2 x 4 x 8 x 8"),
        (["--prompt", "x", "--lora_ckpt_path", "FILES/both.ckpt:abc"], '"abc" after the colon'),
        (["--prompt", "x", "--lora_ckpt_path", "FILES/base.ckpt"], "base.ckpt is base weights, not a LoRA"),
        (["--prompt", "x", "--lora_ckpt_path", "FILES/prompts.txt"], "prompts.txt is"),
        (["--prompt", "x", "--lora_ckpt_path", "FILES"], "folder"),
        (["--prompt", "x", "--ckpt_path", "FILES/both.ckpt"], "both.ckpt is a LoRA.*--lora_ckpt_path"),
        (["--prompt", "x", "--ckpt_path", "FILES/cut.ckpt"], "cut.ckpt"),
        (["--prompt", "x", "--ckpt_path", "FILES/novae.ckpt"], "novae.ckpt does not fit.*it holds no VAE"),
        (["--prompt", "x", "--ckpt_path", "FILES/velocity.ckpt"], "is v_prediction, but.*tiny.yaml has epsilon"),
        (["--prompt", "x", "--ckpt_path", "FILES/nano.safetensors"], "architecture is nano, but.*has custom"),
        (["--prompt", "x", "--unet_ckpt_path", "FILES/velocity.ckpt"], "velocity.ckpt says.*is v_prediction"),
        (["--prompt", "x", "--unet_ckpt_path", "FILES/both.ckpt"], "both.ckpt is a LoRA"),
        (["--prompt", "x", "--enable_flash_attention"], "enable_flash_attention needs an Ascend"),
        (["--prompt", "x", "--device_target", "Ascend"], "device_target Ascend cannot be used here"),
    ],
)
def test_errors_are_named_and_nothing_is_written(folder, tmp_path, flags, words):
    with pytest.raises(UserError, match=words) as error:
        run(folder, tmp_path / "out", *flags, prompt=None)
    assert list(tmp_path.iterdir()) == []
    assert len(str(error.value).splitlines()) <= 2


@pytest.mark.parametrize("lora", ["sd1_lora", "elsewhere_lora", "wide_lora", "base", "cut"])
def test_a_lora_is_refused_before_the_base_is_read(folder, tmp_path, monkeypatch, lora):
    read = "the base was read"
    monkeypatch.setattr(ldm.generation.pipeline, "load_model", lambda *args, **options: pytest.fail(read))
    with pytest.raises(UserError, match=lora):
        run(folder, tmp_path / "out", "--lora_ckpt_path", f"FILES/{lora}.ckpt")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--output_path", "DIR/dead"], "output_path.*dead is a link to nowhere/x, which does not exist"),
        (["--output_path", "DIR/file/out"], "output_path.*out cannot be a folder, as .*file is a file"),
        (["--output_path", "DIR/" + "n" * 256], "output_path .*File name too long"),
        (["--output_path", "DIR/used"], "output_path .*used is the path of two outputs"),
        (["--save_latents", "DIR/dead.npy"], "save_latents .*dead.npy is a link to nowhere/x"),
        (
            ["--save_latents", "DIR/" + "n" * 251 + ".npy"],
            "save_latents .*init.npy cannot be accessed: File name too long",
        ),
        (["--save_latents", "DIR/x.npy"], "save_latents .*x.init.npy is a folder"),
        (["--save_latents", "DIR/used.npy"], "save_latents .*used.npy is the path of two outputs"),
    ],
)
def test_an_impossible_output_is_refused_before_the_work(folder, tmp_path, monkeypatch, flags, words):
    monkeypatch.setattr(
        ldm.generation.generate, "generate_cells", lambda *arguments: pytest.fail("images were generated")
    )
    for name in ("dead", "dead.npy"):
        (tmp_path / name).symlink_to("nowhere/x")
    (tmp_path / "file").touch()
    (tmp_path / "x.init.npy").mkdir()
    with claim_folder(tmp_path / "used", "another"), claim_file(tmp_path / "used.npy", "another"):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UserError, match=words):
            run(folder, tmp_path / "out", *(flag.replace("DIR", str(tmp_path)) for flag in flags))
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("flag", ["data_path", "negative_data_path", "config", "ckpt_path", "unet_ckpt_path",
                                  "lora_ckpt_path", "init_latents", "output_path", "save_latents"])  # fmt: skip
@pytest.mark.parametrize("mode", [0, 0o400])
def test_permission_is_what_a_closed_folder_lacks(unprivileged, flag, mode):
    (unprivileged / "closed").mkdir()
    (unprivileged / "closed").chmod(mode)
    prompt = [] if flag == "data_path" else ["--prompt", "x"]
    with pytest.raises(UserError, match="closed/x.npy.*Permission denied"):
        text_to_image.main([*prompt, "--output_path", str(unprivileged / "out"), f"--{flag}",
                            str(unprivileged / "closed" / "x.npy")])  # fmt: skip
    assert [path.name for path in unprivileged.iterdir()] == ["closed"]


def test_an_error_is_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, str(ROOT / "text_to_image.py"), "--data_path", "none.txt", "--output_path", "out"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.splitlines() == [
        "error: data_path none.txt does not exist: give a text file with one prompt a line"
    ]
    assert list(tmp_path.iterdir()) == []


def test_help_explains_every_setting(capsys):
    with pytest.raises(SystemExit) as ended:
        text_to_image.main(["-h"])
    text = capsys.readouterr().out
    assert not ended.value.code
    for flag in ("prompt", "version", "lora_ckpt_path", "dpm_solver", "ddim_eta", "save_latents", "W", "H"):
        assert f"--{flag} " in text
