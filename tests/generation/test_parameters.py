"""A1111's text of an image of this project: hashes, LoRAs and values as A1111 writes them."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest

from ldm.diffusion.sampling import Sampling
from ldm.generation.a1111_settings import a1111_settings
from ldm.generation.a1111_text import parse
from ldm.generation.parameters import parameters_text, short_lora_hash
from ldm.generation.plan import LoRAFile
from ldm.generation.prompt_plan import PlannedImage
from ldm.generation.source_image import NOISE_ALONE, HiresFix, Origin, first_step
from ldm.prompts.syntax import Piece, parse_prompt
from ldm.settings.generate import GenerateSettings
from ldm.weights.checkpoint import write_checkpoint
from ldm.weights.hashes import MODEL_HASH, data_hash


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "mine, v2.ckpt").write_bytes(b"weights")
    sampling = Sampling("euler_a", 20, 7.0, None, 512, 768, schedule="karras")
    return SimpleNamespace(
        checkpoint=tmp_path / "mine, v2.ckpt",
        loras=[],
        origins=[NOISE_ALONE],
        images=[PlannedImage("a cat, 猫", "", "a cat, 猫", (), 7, 3, sampling)],
    )


def test_the_values_of_an_image(plan):
    text = parameters_text(GenerateSettings(prompt="a", clip_skip=2), plan, 0)
    digest = hashlib.sha256(b"weights").hexdigest()[:10]
    assert text == (
        "a cat, 猫\nSteps: 20, Sampler: Euler a, Schedule type: Karras, CFG scale: 7, Seed: 7, Size: 768x512, "
        f'Model hash: {digest}, Model: "mine, v2", Clip skip: 2, RNG: CPU, Index: 3'
    )


def test_a_plain_prompt_is_written_so_that_a1111_weighs_no_word(plan):
    plain = r"a cat (1990) [x] \(y\) \\ :1.3)"
    plan.images = [plan.images[0]._replace(prompt=plain, negative_prompt="(b:2)")]
    text = parse(parameters_text(GenerateSettings(prompt="a"), plan, 0))
    assert text.prompt.startswith(r"a cat \(1990\) \[x\]")
    assert parse_prompt(text.prompt) == [[Piece(plain, 1.0)]]
    assert parse_prompt(text.negative_prompt) == [[Piece("(b:2)", 1.0)]]
    text = parse(parameters_text(GenerateSettings(prompt="a", prompt_syntax="a1111"), plan, 0))
    assert (text.prompt, text.negative_prompt) == (plain, "(b:2)")  # as it is


def test_loras_are_named_in_the_prompt_and_by_their_hashes(plan, tmp_path):
    arrays = {"a": np.ones(3, np.float32)}
    write_checkpoint(tmp_path / "style.safetensors", arrays)
    write_checkpoint(tmp_path / "kohya.safetensors", arrays, {MODEL_HASH: "0123456789abcdef"})
    (tmp_path / "old.ckpt").write_bytes(b"lora")
    (tmp_path / "a:b.ckpt").write_bytes(b"lora")
    (tmp_path / "folder").mkdir()
    style = data_hash(tmp_path / "style.safetensors")[:12]
    old = hashlib.sha256(b"lora").hexdigest()[:12]
    assert short_lora_hash(tmp_path / "kohya.safetensors") == "0123456789ab"
    assert short_lora_hash(tmp_path / "folder") == ""
    plan.loras = [
        LoRAFile(tmp_path / "style.safetensors", 0.8, 0.8),
        LoRAFile(tmp_path / "old.ckpt", 0.5, -1.0),
        LoRAFile(tmp_path / "a:b.ckpt", 1.0, 1.0),  # A1111 has no way to name it
    ]
    text = parameters_text(GenerateSettings(prompt="a"), plan, 0)
    assert text.startswith("a cat, 猫 <lora:style:0.8> <lora:old:-1:0.5>\nSteps")
    assert f'Lora hashes: "style: {style}, old: {old}, a:b: {old}"' in text and "Clip" not in text


@pytest.mark.parametrize(
    ("sampler", "eta", "written"),
    [("ddim", None, ""), ("ddim", 0.5, "Eta: 0.5"), ("euler_a", 1.0, ""), ("euler_a", 0.5, "Eta: 0.5"),
     ("euler", None, "")],
)  # fmt: skip
def test_a_share_of_noise_is_written_where_it_is_not_the_samplers_own(plan, sampler, eta, written):
    plan.images = [plan.images[0]._replace(sampling=Sampling(sampler, 20, 7.0, eta, 64, 64))]
    text = parameters_text(GenerateSettings(prompt="a"), plan, 0)
    assert (written in text) if written else ("Eta" not in text)


@pytest.mark.parametrize("steps", [None, 15])
def test_a_hires_fix_is_written_as_a1111_counts_its_steps_and_read_again(plan, steps):
    plan.origins = [Origin(hires=HiresFix(2.0, 0.3, steps, "lanczos"))]
    text = parameters_text(GenerateSettings(prompt="a"), plan, 0)
    taken = int((steps or 20) * 0.3)
    assert f"Denoising strength: 0.3, Hires upscale: 2, Hires steps: {taken}, Hires upscaler: Lanczos" in text
    settings, _ = a1111_settings(parse(text), "an image")
    again = HiresFix(*(settings[f"hires_{name}"] for name in ("scale", "strength", "steps", "upscaler")))
    assert again.steps - first_step(again.steps, again.strength) == taken and again.upscaler == "lanczos"
