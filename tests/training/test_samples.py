"""Images while training: each is what text_to_image.py draws with the checkpoint of its step, and changes nothing."""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ldm.diffusion.samplers import SAMPLERS
from ldm.errors import UserError
from ldm.generation.generate import generate
from ldm.generation.image_files import write_png
from ldm.lora.formats import mindone
from ldm.lora.inject import inject_lora, lora_cells, without_lora
from ldm.lora.spec import LoRASpec
from ldm.settings.generate import GenerateSettings
from ldm.settings.samples import SAMPLER_NAMES
from ldm.training import samples
from ldm.training.own_files import find_states
from ldm.training.trainer import train
from ldm.training.training_state import load_state
from tests.training.micro import FULL, MICRO, SETTINGS, STEPS, prepare

PROMPTS = ["an image of colour 3 --n grey --d 7 --s 3 --l 2.5", "a dog --w 24 --h 16 --s 2 --ss ddim"]
FLAGS = [
    {"prompt": "an image of colour 3", "negative_prompt": "grey", "seed": 7, "sampling_steps": 3, "scale": 2.5},
    {"prompt": "a dog", "W": 24, "H": 16, "sampling_steps": 2, "ddim": True},
]
# The text encoder's LoRA too, odd factors, and rates at which a few steps change an image.
LORA = {
    "use_lora": True, "lora_ft_text_encoder": True, "lora_rank": 3, "lora_alpha": 2.2, "lora_scale": 0.7,
    "start_learning_rate": 0.05, "end_learning_rate": 0.05, "warmup_steps": 0, "lora_dropout": 0.2,
    "max_steps": 4, "ckpt_save_interval": 2, "caption_dropout": 0.3,
}  # fmt: skip
SAMPLED = {"sample_prompts": PROMPTS, "sample_every_n_steps": 2}


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def names(output: Path, prompt: int = 1) -> list[str]:
    return sorted(path.name for path in (output / "samples" / f"prompt-{prompt:02d}").iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def drawn(base_model: Path, out: Path, flags: dict, **files: object) -> np.ndarray:
    """What text_to_image.py draws, in fp32 as SETTINGS have it if nothing else is given."""
    given = {"ckpt_path": base_model, "config": MICRO, "device_target": "CPU", "precision": SETTINGS["precision"]}
    generate(GenerateSettings(**{**given, "output_path": out, "skip_grid": True, **flags, **files}))
    return pixels(out / "samples" / "00000.png")


@pytest.fixture(scope="module")
def trained(micro_base_model, micro_data, tmp_path_factory):
    """The output folder of a training of a LoRA that draws samples, and of the same training without."""
    import mindspore as ms

    from ldm.settings.train import TrainSettings

    ms.set_context(mode=ms.GRAPH_MODE)
    folder = tmp_path_factory.mktemp("samples")
    paths = {"pretrained_model_path": micro_base_model, "data_path": micro_data}
    for name, sampled in (("with", SAMPLED), ("without", {})):
        train(TrainSettings(**{**SETTINGS, **LORA, **sampled, **paths, "output_path": folder / name}))
    ms.set_context(mode=ms.PYNATIVE_MODE)
    return folder / "with"


@pytest.mark.parametrize(("prompt", "step"), [(1, 2), (2, 4)])
def test_a_sample_is_what_text_to_image_draws_with_the_lora_of_its_step(
    trained, micro_base_model, tmp_path, prompt, step
):
    lora = trained / "ckpt" / f"lora-{step:08d}.ckpt"
    expected = drawn(micro_base_model, tmp_path / "out", FLAGS[prompt - 1], lora_ckpt_path=[str(lora)])
    sample = trained / "samples" / f"prompt-{prompt:02d}" / f"step-{step:08d}.png"
    assert np.array_equal(pixels(sample), expected)
    assert not np.array_equal(expected, pixels(sample.with_name("step-00000000.png")))


def test_the_image_before_training_is_that_of_the_base_model(trained, micro_base_model, tmp_path):
    expected = drawn(micro_base_model, tmp_path / "out", FLAGS[0])
    assert np.array_equal(pixels(trained / "samples" / "prompt-01" / "step-00000000.png"), expected)


def test_the_training_is_that_without_samples(trained):
    for name in ("ckpt/lora.ckpt", "ckpt/lora-00000002.ckpt"):
        assert (trained / name).read_bytes() == (trained.with_name("without") / name).read_bytes()
    with_samples, without = (
        load_state(find_states(run / "ckpt")[0]) for run in (trained, trained.with_name("without"))
    )
    assert with_samples.arrays.keys() == without.arrays.keys()
    assert all(np.array_equal(with_samples.arrays[name], without.arrays[name]) for name in without.arrays)


def test_a_png_says_how_it_was_made(trained, micro_base_model):
    with Image.open(trained / "samples" / "prompt-01" / "step-00000002.png") as image:
        fields = image.info
    assert (fields["prompt"], fields["negative_prompt"], fields["seed"], fields["step"]) == (
        "an image of colour 3", "grey", "7", "2",
    )  # fmt: skip
    assert fields["checkpoint"] == micro_base_model.name
    assert json.loads(fields["settings"])["sampling_steps"] == 3
    assert (trained / "samples" / "prompts.txt").read_text().splitlines() == PROMPTS


def test_a_film_strip_has_all_images_of_its_prompt(trained):
    assert names(trained) == ["step-00000000.png", "step-00000002.png", "step-00000004.png"]
    with Image.open(trained / "samples" / "prompt-02.png") as strip:
        assert strip.width == 3 * (24 * 4 + 4) + 4  # images of 24 x 16 pixels are enlarged four times


def test_the_log_says_how_long_the_samples_took(trained):
    lines = [line for line in (trained / "log.txt").read_text().splitlines() if "samples drawn in" in line]
    assert len(lines) == 3 and "step 2: 2 samples drawn in" in lines[1]


@pytest.mark.processes
def test_a_run_that_was_killed_ends_with_the_samples_and_the_weights_of_one_that_was_not(trained, settings, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(trained, output)
    # As after a kill between the save of step 2 and its last sample, of a run that had been at step 4 before.
    for path in [*(output / "ckpt").glob("*-00000004.*"), output / "samples" / "prompt-02" / "step-00000002.png"]:
        path.unlink()
    Image.new("RGB", (16, 16)).save(output / "samples" / "prompt-01" / "step-00000004.png")
    (output / "samples" / "prompt-01" / ".step-00000002.123.partial.png").touch()
    train(settings(output, **LORA, **SAMPLED, resume=True))
    assert contents(output / "samples") == contents(trained / "samples")
    assert (output / "ckpt" / "lora.ckpt").read_bytes() == (trained / "ckpt" / "lora.ckpt").read_bytes()


def test_a_whole_unet_draws_its_moving_average(settings, full_run, saved_run, tmp_path):
    find_states(saved_run / "ckpt")[0].unlink()
    train(settings(saved_run, **FULL, sample_prompts=PROMPTS[0], sample_every_n_steps=9, resume=True))
    assert names(saved_run) == ["step-00000009.png", f"step-{STEPS:08d}.png"]
    model = saved_run / "ckpt" / "model.ckpt"
    assert model.read_bytes() == (full_run / "ckpt" / "model.ckpt").read_bytes()
    expected = drawn(model, tmp_path / "out", FLAGS[0])
    assert np.array_equal(pixels(saved_run / "samples" / "prompt-01" / f"step-{STEPS:08d}.png"), expected)


@pytest.mark.parametrize(("precision", "held"), [("fp16", "float16"), ("bf16", "bfloat16")])
def test_with_rounded_weights_the_sample_is_that_of_text_to_image_and_the_weights_are_as_before(
    settings, micro_base_model, tmp_path, precision, held
):
    # In fp16, the text encoder computes in another type than in the training.
    recipe = {**LORA, "lora_ft_text_encoder": False, "precision": precision}
    run = prepare(settings(tmp_path / "run", **recipe, sample_prompts=PROMPTS[0]))
    rng = np.random.default_rng(0)
    state = run.step.state()
    run.step.load_state({name: rng.normal(0, 0.3, array.shape).astype(np.float32) for name, array in state.items()})
    before = {parameter.name: parameter.asnumpy().copy() for parameter in run.model.get_parameters()}
    run.samples.start()
    for parameter in run.model.get_parameters():
        assert parameter.asnumpy().dtype == before[parameter.name].dtype
        assert np.array_equal(parameter.asnumpy(), before[parameter.name]), parameter.name
    assert held in {array.dtype.name for array in before.values()}
    mindone.write(tmp_path / "lora.ckpt", run.checkpoints.lora(run.step.state()))
    lora = [str(tmp_path / "lora.ckpt")]
    expected = drawn(micro_base_model, tmp_path / "out", FLAGS[0], lora_ckpt_path=lora, precision=precision)
    assert np.array_equal(pixels(run.output / "samples" / "prompt-01" / "step-00000000.png"), expected)


@pytest.fixture
def ready(settings, micro_base_model, tmp_path):
    """A run that is set up and has no graph yet, whose base model is a file of its own."""
    base_model = tmp_path / "base.safetensors"
    base_model.write_bytes(micro_base_model.read_bytes())
    return prepare(settings(tmp_path / "run", **LORA, **SAMPLED, pretrained_model_path=base_model))


def test_a_base_model_that_has_changed_ends_the_run_at_its_beginning_and_later_the_samples_alone(ready, caplog):
    os.utime(ready.settings.pretrained_model_path, ns=(0, 0))
    with pytest.raises(UserError, match="has changed since the model was loaded"):
        ready.samples.start()
    phase = ready.status.phase = "after"
    with caplog.at_level(logging.WARNING):
        ready.samples.draw(2)
    assert "step 2: not all samples are drawn" in caplog.text and "has changed" in caplog.text
    assert ready.status.phase == phase


def test_weights_that_cannot_be_put_back_end_the_run(ready, monkeypatch):
    """A file that is gone while a LoRA is merged leaves a part of it in the weights."""
    monkeypatch.setattr(samples.Samples, "_draw", lambda *_: (_ for _ in ()).throw(UserError("gone")))
    ready.samples._pipeline = SimpleNamespace(loras=(), holds_base_weights=True)
    ready.samples.draw(2)
    ready.samples._pipeline.holds_base_weights = False
    with pytest.raises(UserError, match="gone"):
        ready.samples.draw(2)


def test_a_whole_unet_is_drawn_with_what_any_optimizer_averages(ready):
    ready.samples.settings = SimpleNamespace(use_lora=False, use_ema=False, optim="another")
    for keeps_average in (False, True):
        optimizer = SimpleNamespace(keeps_average=keeps_average)
        ready.samples.step = SimpleNamespace(optimizer=optimizer, state=lambda: {"p.weight": np.zeros(1)})
        assert bool(ready.samples._trained()) == keeps_average


def test_processes_other_than_the_first_only_wait(ready, monkeypatch):
    waits = []
    monkeypatch.setattr(samples.peers, "gather", lambda: waits.append(None))
    ready.samples._first_process = False
    ready.samples.start()
    ready.samples.draw(1)
    ready.samples.draw(2)
    assert len(waits) == 2 and not ready.samples.folder.exists()


def test_samples_are_due_at_intervals_of_steps_and_epochs_and_at_the_end(ready):
    def due(**settings):
        ready.samples.settings = replace(ready.settings, **settings)
        ready.samples.plan = replace(ready.plan, steps=20, steps_per_epoch=3.5)
        return [step for step in range(21) if ready.samples.is_due(step)]

    assert due(sample_every_n_steps=8) == [0, 8, 16, 20]
    assert due(sample_every_n_steps=None, sample_every_n_epochs=2) == [0, 7, 14, 20]
    assert due(sample_every_n_steps=None, sample_at_first=False) == [20]


def test_images_of_another_prompt_and_another_run_are_kept_beside(ready):
    folder = ready.samples.folder
    (folder / "prompt-01").mkdir(parents=True)
    (folder / "other.png").touch()
    ready.samples._prepare_folder(2)
    assert (folder.with_name("samples.old1") / "other.png").exists() and not (folder / "other.png").exists()
    ready.samples._resumed_here = True
    for number, (prompt, step) in enumerate([("another", 2), (ready.samples.prompts[1].prompt, 3)], 1):
        fields = {**ready.samples._fields[number - 1], "prompt": prompt}
        write_png(folder / f"prompt-{number:02d}" / f"step-{step:08d}.png", np.zeros((16, 16, 3), np.uint8), fields)
    ready.samples._prepare_folder(2)
    assert list((folder / "prompt-01").iterdir()) == [] and (folder / "prompt-01.old1" / "step-00000002.png").exists()
    assert list((folder / "prompt-02").iterdir()) == [] and not (folder / "prompt-02.old1").exists()


def test_lora_layers_are_back_after_without_lora(tiny_model):
    inject_lora(tiny_model, LoRASpec(rank=2))
    before = lora_cells(tiny_model)
    with without_lora(tiny_model):
        assert not lora_cells(tiny_model)
    assert lora_cells(tiny_model) == before


def test_sampler_names_are_those_of_the_samplers():
    assert set(SAMPLER_NAMES.values()) == set(SAMPLERS) == {name for name in SAMPLER_NAMES if name in SAMPLERS}
