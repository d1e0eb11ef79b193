"""train_text_to_image.py from end to end, on the smallest model that has all the parts; in graph mode."""

from __future__ import annotations

import csv
import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
import yaml
from PIL import Image

from ldm.errors import UserError
from ldm.lora.formats import read_lora, write_lora
from ldm.lora.inject import get_lora, inject_lora
from ldm.lora.spec import LoRASpec
from ldm.models.stable_diffusion import build_model
from ldm.runtime.device import Runtime, setup_runtime
from ldm.settings.model import load_model_config
from ldm.settings.read import read_settings
from ldm.settings.train import TrainSettings
from ldm.training.checkpoints import load_state, save_state
from ldm.training.inputs import Inputs
from ldm.training.own_files import find_states
from ldm.training.step import StepResult
from ldm.training.trainer import Trainer, make_loss_scaler, train
from ldm.weights.checkpoint import read_checkpoint, write_checkpoint
from ldm.weights.load import load_base_model

ROOT = Path(__file__).resolve().parents[1]
MICRO = ROOT / "tests" / "training" / "micro.yaml"
UNET = "model.diffusion_model."
STEPS = 12


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A random base checkpoint of the micro model."""
    setup_runtime("CPU", seed=3)
    model = build_model(load_model_config(MICRO))
    path = tmp_path_factory.mktemp("base") / "micro.safetensors"
    write_checkpoint(path, {name: p.asnumpy() for name, p in model.parameters_dict().items()})
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Ten plain images, one of them small."""
    folder = tmp_path_factory.mktemp("data")
    rows = ["dir,text"]
    for i in range(10):
        size = 8 if i == 9 else 24
        Image.new("RGB", (size, size + 4), (25 * i, 128, 255 - 25 * i)).save(folder / f"{i}.png")
        rows.append(f"{i}.png,an image of colour {i}")
    (folder / "img_txt.csv").write_text("\n".join(rows) + "\n")
    return folder


def settings(base, data, output, **others) -> TrainSettings:
    defaults = dict(
        model_config=str(MICRO), image_size=16, train_batch_size=2, step_mode=True, ckpt_save_interval=3,
        pretrained_model_path=str(base), data_path=str(data), output_path=str(output), device_target="CPU",
    )  # fmt: skip
    return TrainSettings(**{**defaults, **others})


VANILLA = dict(
    max_steps=STEPS, use_ema=True, ema_decay=0.9, clip_grad=True, caption_dropout=0.3, scheduler="cosine",
    start_learning_rate=1e-3, warmup_steps=2, ckpt_max_keep=2,
)  # fmt: skip


def command(base, data, output, *flags) -> list[str]:
    values = {
        "model_config": MICRO, "image_size": 16, "train_batch_size": 2, "step_mode": True, "ckpt_save_interval": 3,
        "pretrained_model_path": base, "data_path": data, "output_path": output, "device_target": "CPU", **VANILLA,
    }  # fmt: skip
    arguments = [f"--{name}={value}" for name, value in values.items()]
    return [sys.executable, "train_text_to_image.py", *arguments, *flags]


def metrics(output) -> list[dict]:
    with open(output / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def vanilla(base, data, tmp_path_factory) -> Path:
    """The folder of one uninterrupted run of the whole UNet."""
    output = tmp_path_factory.mktemp("vanilla") / "run"
    done = subprocess.run(command(base, data, output), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"{STEPS}/{STEPS}" in done.stderr and "loss" in done.stderr
    return output


def test_a_run_leaves_its_log_metrics_arguments_and_checkpoints(vanilla):
    rows = metrics(vanilla)
    assert [int(row["step"]) for row in rows] == list(range(1, STEPS + 1))
    assert all(0 < float(row["loss"]) < 10 and float(row["seconds"]) > 0 for row in rows)
    assert float(rows[0]["learning_rate"]) == pytest.approx(5e-4) and float(rows[2]["learning_rate"]) == 1e-3
    assert f"step {STEPS}/{STEPS}" in (vanilla / "log.txt").read_text()
    arguments = yaml.safe_load((vanilla / "train_args.yaml").read_text())
    assert arguments["ema_decay"] == 0.9 and arguments["max_steps"] == STEPS
    assert sorted(path.name for path in (vanilla / "ckpt").iterdir()) == [
        "files.json", "model-00000009.ckpt", "model-00000012.ckpt", "model.ckpt",
        "state-00000009.safetensors", "state-00000012.safetensors",
    ]  # fmt: skip
    newest = (vanilla / "ckpt" / "model-00000012.ckpt").read_bytes()
    assert (vanilla / "ckpt" / "model.ckpt").read_bytes() == newest


def test_the_arguments_of_a_run_are_a_recipe(vanilla):
    config = read_settings(
        TrainSettings, ["--train_config", str(vanilla / "train_args.yaml")], yaml_flag="train_config"
    )
    assert config.betas == [0.9, 0.999] and config.use_ema


def test_the_checkpoint_is_a_whole_model_with_the_average_as_its_unet(vanilla, base):
    path = vanilla / "ckpt" / "model.ckpt"
    assert load_base_model(build_model(load_model_config(MICRO)), path).ok
    arrays, metadata = read_checkpoint(path)
    assert (metadata["architecture"], metadata["prediction_type"]) == ("custom", "epsilon")
    state = load_state(vanilla / "ckpt" / f"state-{STEPS:08d}.safetensors").arrays
    before, _ = read_checkpoint(base)
    for name, array in arrays.items():
        if name.startswith(UNET):
            np.testing.assert_array_equal(array, state[f"ema.{name}"], err_msg=name)
        elif name in before:
            np.testing.assert_array_equal(array, before[name], err_msg=name)
    changed = [name for name in before if name.startswith(UNET) and not np.array_equal(arrays[name], before[name])]
    assert len(changed) == len([name for name in before if name.startswith(UNET)])


def test_a_killed_run_ends_as_the_uninterrupted_one_bit_for_bit(vanilla, base, data, tmp_path):
    """With the compiled graph kept, which the uninterrupted run did without."""
    output = tmp_path / "run"
    moment = random.SystemRandom().choice(range(1, STEPS))
    print(f"killed after step {moment}")
    process = subprocess.Popen(
        command(base, data, output, "--compile_cache"), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 300
        while not (output / "metrics.csv").exists() or len(metrics(output)) < moment:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    left = find_states(output / "ckpt")
    done = subprocess.run(
        command(base, data, output, "--compile_cache", "--resume"),
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    if left:
        assert "going on after step" in done.stderr
    names = [f"model-{STEPS:08d}.ckpt", "model.ckpt", f"state-{STEPS:08d}.safetensors"]
    for name in names:
        (wanted, _), (found, _) = read_checkpoint(vanilla / "ckpt" / name), read_checkpoint(output / "ckpt" / name)
        assert wanted.keys() == found.keys()
        for array in wanted:
            np.testing.assert_array_equal(found[array], wanted[array], err_msg=f"{name} {array}")
    for wanted, found in zip(metrics(vanilla), metrics(output)):
        assert {**found, "seconds": 0} == {**wanted, "seconds": 0}
    assert not list(output.rglob("*.partial*"))


@pytest.fixture
def empty_run(vanilla, tmp_path) -> Path:
    """An output folder without a run, but with the cache of one."""
    output = tmp_path / "run"
    output.mkdir()
    (output / "cache").symlink_to(vanilla / "cache")
    return output


@pytest.fixture
def copy_of_vanilla(vanilla, empty_run) -> Path:
    """The same with the uninterrupted run's states."""
    (empty_run / "ckpt").mkdir()
    for path in find_states(vanilla / "ckpt"):
        (empty_run / "ckpt" / path.name).write_bytes(path.read_bytes())
    return empty_run


def test_a_broken_newest_state_is_named_and_the_one_before_it_taken(copy_of_vanilla, base, data):
    newest = find_states(copy_of_vanilla / "ckpt")[0]
    newest.write_bytes(newest.read_bytes()[:1000])
    trainer = Trainer(settings(base, data, copy_of_vanilla, **VANILLA, resume=True))
    assert trainer.done == 9
    log = (copy_of_vanilla / "log.txt").read_text()
    assert newest.name in log and "going on after step 9 of 12" in log


@pytest.mark.parametrize("where", ["", "ckpt", "ckpt/state-00000009.safetensors"])
def test_resume_takes_a_folder_or_a_file(copy_of_vanilla, base, data, tmp_path, where):
    path = str(copy_of_vanilla / where)
    trainer = Trainer(settings(base, data, tmp_path / "other", **VANILLA, resume=path))
    assert trainer.done == (9 if where.endswith("safetensors") else 12)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(train_batch_size=3), "train_batch_size was 2, is 3"),
        (dict(seed=7), "seed was 42, is 7"),
        (dict(use_ema=False), "use_ema was True, is False"),
        (dict(image_filter_size=20), "data was"),
        (dict(use_lora=True), "use_lora was False, is True"),
    ],
)
def test_resuming_another_run_is_refused_and_says_what_differs(copy_of_vanilla, base, data, change, says):
    with pytest.raises(UserError, match=says):
        Trainer(settings(base, data, copy_of_vanilla, **{**VANILLA, **change}, resume=True))


def test_resuming_another_run_is_refused_before_the_data_is_encoded(copy_of_vanilla, base, data, tmp_path):
    config = settings(base, data, tmp_path / "new", **{**VANILLA, "seed": 7}, resume=str(copy_of_vanilla))
    with pytest.raises(UserError, match="seed was 42, is 7"):
        Trainer(config)
    assert not (tmp_path / "new" / "cache").exists()


def test_a_run_that_goes_on_from_an_older_state_keeps_its_own(copy_of_vanilla, base, data):
    """Not those of the run it left: they have higher numbers than its first ones."""
    folder = copy_of_vanilla / "ckpt"
    names = [path.name for path in find_states(folder)]
    change = {**VANILLA, "max_steps": 10, "resume": str(folder / names[1])}
    train(settings(base, data, copy_of_vanilla, **change))
    assert [path.name for path in find_states(folder)] == ["state-00000010.safetensors", names[1]]
    assert (folder / "model-00000010.ckpt").exists()
    assert [path.name for path in (folder / "abandoned-after-00000009").iterdir()] == [names[0]]


def test_resuming_with_another_rate_or_length_is_said_and_done(copy_of_vanilla, base, data):
    change = {**VANILLA, "max_steps": 20, "start_learning_rate": 5e-4}
    trainer = Trainer(settings(base, data, copy_of_vanilla, **change, resume=True))
    assert (trainer.done, trainer.plan.updates) == (12, 20)
    log = (copy_of_vanilla / "log.txt").read_text()
    assert "start_learning_rate was 0.001, is 0.0005" in log and "updates was 12, is 20" in log


def test_resume_without_a_state_starts_from_the_beginning_and_says_so(base, data, empty_run):
    assert Trainer(settings(base, data, empty_run, **VANILLA, resume=True)).done == 0
    assert "holds no state yet" in (empty_run / "log.txt").read_text()


def test_resume_from_nowhere_is_an_error(base, data, empty_run):
    with pytest.raises(UserError, match="holds no training state"):
        Trainer(settings(base, data, empty_run, **VANILLA, resume=str(data)))


def test_lora_in_unet_and_text_encoder_trains_the_factors_alone(base, data, empty_run):
    """By the published recipe, with the small model in the place of SD1.5."""
    output = empty_run
    argv = [
        "--train_config", str(ROOT / "configs" / "train" / "train_config_lora_v1.yaml"), "--data_path", str(data),
        "--output_path", str(output), "--pretrained_model_path", str(base), "--model_config", str(MICRO),
        "--image_size", "16", "--train_batch_size", "2", "--max_steps", "2", "--lora_ft_text_encoder", "True",
        "--lora_rank", "2", "--lora_alpha", "4", "--start_learning_rate", "1e-2", "--device_target", "CPU",
    ]  # fmt: skip
    trainer = Trainer(read_settings(TrainSettings, argv, yaml_flag="train_config"))
    path = trainer.run()
    assert path == output / "ckpt" / "lora.ckpt" and path.stat().st_size < 100_000
    lora = read_lora(path)
    attentions = [f"attn{i}.{name}" for i in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")]
    unet = [name for name in lora.layers if name.startswith(UNET)]
    text = [name for name in lora.layers if not name.startswith(UNET)]
    assert {name.split("transformer_blocks.0.")[1] for name in unet} == set(attentions)
    assert {name.split("self_attn.")[1] for name in text} == {"q_proj", "k_proj", "v_proj", "out_proj"}
    for name, layer in lora.layers.items():
        assert layer.rank == 2 and layer.alpha == 4.0
        assert np.abs(layer.up).max() > 0, name  # zero at the start: every one was trained
    assert lora.metadata == {"architecture": "custom", "prediction_type": "epsilon"}
    before, _ = read_checkpoint(base)
    for name, parameter in trainer.model.parameters_dict().items():
        if name in before:
            np.testing.assert_array_equal(parameter.asnumpy(), before[name], err_msg=name)


def test_training_starts_from_a_given_lora_in_any_format(base, data, empty_run, tmp_path):
    model_config = load_model_config(MICRO)
    given = build_model(model_config)
    inject_lora(given, LoRASpec(rank=2, alpha=6.0, seed=5))
    for parameter in given.trainable_params():
        parameter.set_data(ms.Tensor(np.random.standard_normal(parameter.shape).astype(np.float32)))
    path = tmp_path / "pytorch_lora_weights.safetensors"
    write_lora(path, get_lora(given, model_config), "diffusers", model_config)
    trainer = Trainer(
        settings(base, data, empty_run, use_lora=True, lora_rank=2, max_steps=2, lora_init_path=str(path))
    )
    begun, wanted = get_lora(trainer.model).layers, get_lora(given).layers
    assert begun.keys() == wanted.keys()
    for name, layer in begun.items():
        assert layer.alpha == 2.0  # the run's own
        np.testing.assert_allclose(layer.update(), wanted[name].update(), rtol=1e-5, atol=1e-5)


def test_fp16_lora_with_accumulation_augmentation_and_a_dynamic_loss_scale(base, data, tmp_path):
    config = settings(
        base, data, tmp_path / "run", max_steps=4, use_lora=True, lora_rank=2, precision="fp16", random_flip=True,
        random_crop=True, cache_text=False, gradient_accumulation_steps=2, init_loss_scale=2.0**30, scale_window=2,
        image_filter_size=10, num_workers=2, use_ema=True, loss_scale_factor=2.0**13,
    )  # fmt: skip
    trainer = Trainer(config)
    assert trainer.order.n_rows == 9  # image_filter_size leaves the small one out
    up = next(p for p in trainer.step.parameters if p.name.endswith("lora_up.weight"))
    trainer.run()
    scales = [float(row["loss_scale"]) for row in metrics(tmp_path / "run")]
    # 2^30 overflows fp16: skipped, and the scale falls; two good steps, and it rises, to its upper limit
    assert scales == [2.0**30, 2.0**17, 2.0**17, 2.0**24]
    assert trainer.scaler.overflows == 2 and trainer.scaler.updates == 2
    assert "overflowed at loss scale" in (tmp_path / "run" / "log.txt").read_text()
    assert np.abs(up.asnumpy()).max() > 0 and up.asnumpy().dtype == np.float32
    assert not list((tmp_path / "run").glob("cache/*/*"))


def fake_step(monkeypatch, trainer, result):
    monkeypatch.setattr(trainer, "step", lambda batches, scalars, dropout_keys: result)
    monkeypatch.setattr(trainer, "_save", lambda: None)


def test_a_run_that_always_overflows_stops_loudly(base, data, empty_run, monkeypatch):
    config = settings(base, data, empty_run, **{**VANILLA, "max_steps": 200}, loss_scaler_type="dynamic")
    trainer = Trainer(config)
    fake_step(monkeypatch, trainer, StepResult(1.0, float("inf"), False))
    with pytest.raises(UserError, match="overflowed at 50 steps in a row"):
        trainer.run()
    assert trainer.done == 50


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_an_interrupted_run_says_how_to_go_on(base, data, copy_of_vanilla, tmp_path, monkeypatch):
    change = {**VANILLA, "max_steps": 14}
    newest = find_states(copy_of_vanilla / "ckpt")[0]
    said = []

    def interrupted(batches, scalars, dropout_keys):
        said.append(trainer.what_is_done())
        if len(said) == 2:
            raise KeyboardInterrupt
        return StepResult(1.0, 1.0, True)

    for output, resume in ((copy_of_vanilla, True), (tmp_path / "new", str(newest))):
        said.clear()
        trainer = Trainer(settings(base, data, output, **change, resume=resume))
        monkeypatch.setattr(trainer, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trainer.run()
        way = f"--resume {resume} goes on from {newest}"
        assert said == [f"while compiling the step; {way}", f"after step 13 of 14; {way}"]


def test_a_run_that_is_interrupted_while_it_encodes_says_so(base, data, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("ldm.training.trainer.progress", said.append)
    monkeypatch.setattr("ldm.training.inputs.CACHE_PIXELS", 16 * 16)  # an image at a time
    encode = Inputs._encode_images

    def interrupted(inputs, places):
        if places == [3]:
            raise KeyboardInterrupt
        return encode(inputs, places)

    monkeypatch.setattr(Inputs, "_encode_images", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Trainer(settings(base, data, tmp_path / "run"))
    assert said[0]() == "after encoding 3 of 10 images; nothing was saved yet"


def test_a_resumed_run_that_is_interrupted_early_does_not_call_its_states_unsaved(
    base, data, copy_of_vanilla, monkeypatch
):
    said = []
    monkeypatch.setattr("ldm.training.trainer.progress", said.append)
    newest = find_states(copy_of_vanilla / "ckpt")[0]
    ways = {"load_base_model": "what was saved before stays", "Inputs": f"--resume True goes on from {newest}"}
    for place, way in ways.items():
        with monkeypatch.context() as context:
            context.setattr(f"ldm.training.trainer.{place}", interrupt)
            with pytest.raises(KeyboardInterrupt):
                Trainer(settings(base, data, copy_of_vanilla, **VANILLA, resume=True))
        assert said[-1]() == f"before the first step; {way}"


@pytest.mark.parametrize("loss", [float("nan"), 1.0])
def test_a_loss_or_gradient_that_is_not_finite_stops_an_fp32_run(base, data, empty_run, monkeypatch, loss):
    trainer = Trainer(settings(base, data, empty_run, **VANILLA))
    fake_step(monkeypatch, trainer, StepResult(loss, float("nan"), False))
    with pytest.raises(UserError, match="not finite at step 1 .*: lower start_learning_rate.*; nothing was saved yet"):
        trainer.run()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("what", ["latents", "text embeddings"])
def test_inputs_that_are_not_finite_are_named_with_their_image(base, data, empty_run, monkeypatch, what, precision):
    trainer = Trainer(settings(base, data, empty_run, **VANILLA, precision=precision))
    row = trainer.order.indices(0)[1]
    (trainer.inputs.moments if what == "latents" else trainer.inputs.states)[row].flat[5] = np.nan
    trainer.inputs.config.caption_dropout = 0.0
    fake_step(monkeypatch, trainer, StepResult(float("nan"), float("nan"), False))
    with pytest.raises(UserError, match=f"the {what} of .*/{row}.png are not finite at step 1: look at that image"):
        trainer.run()


def test_weights_that_ran_away_before_are_said_with_their_state(copy_of_vanilla, base, data, monkeypatch):
    newest = find_states(copy_of_vanilla / "ckpt")[0]
    state = load_state(newest)
    name = next(name for name in state.arrays if name.startswith("p."))
    state.arrays[name] = np.full(state.arrays[name].shape, -1e10, np.float32)
    save_state(newest.parent, state)
    trainer = Trainer(settings(base, data, copy_of_vanilla, **{**VANILLA, "max_steps": 20}, resume=True))
    fake_step(monkeypatch, trainer, StepResult(1.0, float("inf"), False))
    with pytest.raises(UserError, match=f"weights were as large as 1e\\+10 in .*{newest.name} already: go on from a"):
        trainer.run()


def test_a_base_that_is_not_finite_is_said(base, data, empty_run, monkeypatch):
    trainer = Trainer(settings(base, data, empty_run, use_lora=True))
    bias = trainer.model.parameters_dict()[f"{UNET}out.2.bias"]
    bias.set_data(ms.Tensor(np.full(bias.shape, np.nan, np.float32)))
    fake_step(monkeypatch, trainer, StepResult(float("nan"), float("nan"), False))
    with pytest.raises(UserError, match=f"{UNET}out.2.bias of .*micro.safetensors holds values that are not finite"):
        trainer.run()


def test_weights_that_are_not_finite_are_never_saved_over_good_ones(copy_of_vanilla, base, data):
    trainer = Trainer(settings(base, data, copy_of_vanilla, **{**VANILLA, "max_steps": 20}, resume=True))
    parameter = trainer.step.parameters[0]
    parameter.set_data(ms.Tensor(np.full(parameter.shape, np.nan, np.float32)))
    before = contents(copy_of_vanilla / "ckpt")
    with pytest.raises(UserError, match=f"nothing is saved at step 12, .* not finite.*goes on from .*-{12:08d}.safet"):
        trainer._save()
    assert contents(copy_of_vanilla / "ckpt") == before


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def save_at(trainer, *steps) -> None:
    for trainer.done in steps:
        trainer._save()


@pytest.mark.parametrize("file", ["lora-00000003.ckpt", "state-00000003.safetensors", "lora.ckpt", "files.json"])
def test_a_full_disk_at_a_save_is_one_line_with_the_last_state(base, data, empty_run, monkeypatch, file):
    trainer = Trainer(settings(base, data, empty_run, use_lora=True, lora_rank=2, max_steps=3))
    trainer.done, trainer.last_state = 3, trainer.folder / "state-00000001.safetensors"
    replace = os.replace

    def full(old, new):
        if Path(new).name == file:
            raise OSError(28, "No space left on device", str(old))
        replace(old, new)

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UserError) as caught:
        trainer._save()
    said = str(caught.value)
    assert file in said and "No space left on device" in said and "\n" not in said
    assert said.endswith(f"--resume True goes on from {trainer.folder}/state-00000001.safetensors")
    assert not list(empty_run.rglob("*.partial*"))


def test_a_user_s_own_files_stay(base, data, empty_run):
    """Beside the run's, whatever they are named."""
    folder = empty_run / "ckpt"
    folder.mkdir()
    names = ["lora-best.ckpt", "lora-mystyle-v1.ckpt", "lora-00000001.ckpt", "lora.ckpt", "lora-00000002.ckpt"]
    for name in names:
        (folder / name).write_text(name)
    (folder / "state-00000003.safetensors").mkdir()
    trainer = Trainer(settings(base, data, empty_run, use_lora=True, lora_rank=2, max_steps=3, ckpt_max_keep=1))
    save_at(trainer, 1, 2, 3)
    assert read_lora(folder / "lora.ckpt").layers
    kept = {*names[:2], "lora-00000001-kept.ckpt", "lora-kept.ckpt", "lora-00000002-kept.ckpt"}
    assert {path.name for path in folder.iterdir()} == {
        *kept, "state-00000003-kept.safetensors", "lora.ckpt", "lora-00000003.ckpt", "state-00000002.safetensors",
        "state-00000003.safetensors", "files.json",
    }  # fmt: skip
    assert {(folder / name).read_text() for name in kept} == set(names)


def test_an_interrupted_save_is_written_again(base, data, empty_run, caplog):
    """Killed between the LoRA of step 3 and its state, which is no other run."""
    change = dict(use_lora=True, lora_rank=2, max_steps=3)
    save_at(Trainer(settings(base, data, empty_run, **change)), 1, 2, 3)
    folder = empty_run / "ckpt"
    whole = contents(folder)
    find_states(folder)[0].unlink()
    trainer = Trainer(settings(base, data, empty_run, **change, resume=True))
    assert trainer.done == 2
    save_at(trainer, 3)
    del whole["files.json"]
    assert {**contents(folder), **whole} == contents(folder)
    assert "got beyond" not in (empty_run / "log.txt").read_text()


def test_a_state_that_does_not_fit_is_named_and_the_one_before_it_taken(copy_of_vanilla, base, data):
    newest = find_states(copy_of_vanilla / "ckpt")[0]
    state = load_state(newest)
    state.arrays["p.another"] = np.zeros(3, np.float32)
    save_state(newest.parent, state)
    trainer = Trainer(settings(base, data, copy_of_vanilla, **VANILLA, resume=True))
    assert trainer.done == 9
    assert f"{newest.name} does not fit this run (1 arrays differ" in (copy_of_vanilla / "log.txt").read_text()
    with pytest.raises(UserError, match=f"{newest.name} does not fit this run"):
        Trainer(settings(base, data, copy_of_vanilla, **VANILLA, resume=str(newest)))


def test_a_state_beyond_the_last_step_is_done(copy_of_vanilla, base, data):
    train(settings(base, data, copy_of_vanilla, **{**VANILLA, "max_steps": 5}, resume=True))
    assert "all 5 updates are done already, at step 12" in (copy_of_vanilla / "log.txt").read_text()


@pytest.mark.parametrize("file", ["log.txt", "metrics.csv", "train_args.yaml", "ckpt"])
def test_what_cannot_be_written_is_found_before_the_data_is_encoded(base, data, tmp_path, file):
    output = tmp_path / "run"
    output.mkdir()
    (output / file).symlink_to("nowhere/at/all")
    with pytest.raises(UserError, match=f"output_path.* {output / file} is a link"):
        train(settings(base, data, output))
    assert not (output / "cache").exists()


def test_two_trainings_do_not_share_a_folder_and_a_killed_one_lets_it_go(base, data, tmp_path, monkeypatch):
    output = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys, time; from ldm.files.outputs import claim_folder\n"
         "with claim_folder(sys.argv[1], 'output_path'): print('held', flush=True); time.sleep(60)", str(output)],
        cwd=ROOT, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        holder.stdout.readline()
        for resume in (False, True):
            with pytest.raises(UserError, match=f"output_path {output} is in use by process {holder.pid} on"):
                train(settings(base, data, output, **VANILLA, resume=resume))
        assert [path.name for path in output.iterdir()] == [".lock"]
    finally:
        holder.kill()
        holder.wait()
    monkeypatch.setattr("ldm.training.trainer.Trainer", lambda *_: SimpleNamespace(run=lambda: "done"))
    assert train(settings(base, data, output)) == "done" and not list(output.iterdir())


@pytest.mark.parametrize(
    ("message", "kind", "says"),
    [
        ("Device(id:0) memory isn't enough and alloc failed, alloc size: 512B", UserError, "train_batch_size 2"),
        ("Allocate memory failed for size: 512", UserError, "train_batch_size 2 and image_size 16"),
        ("std::bad_alloc", UserError, "train_batch_size 2"),
        ("The shapes do not fit", RuntimeError, "The shapes do not fit"),
    ],
)
def test_too_little_memory_is_told_from_other_failures(base, data, empty_run, monkeypatch, message, kind, says):
    def step(batches, scalars, dropout_keys):
        raise RuntimeError(message)

    trainer = Trainer(settings(base, data, empty_run, **VANILLA))
    monkeypatch.setattr(trainer, "step", step)
    with pytest.raises(kind, match=says):
        trainer.run()


def test_the_states_of_an_earlier_run_are_not_overwritten(base, data, copy_of_vanilla):
    with pytest.raises(UserError, match="--resume True"):
        Trainer(settings(base, data, copy_of_vanilla, **VANILLA))
    assert len(find_states(copy_of_vanilla / "ckpt")) == 2


def test_resuming_a_run_that_is_done_only_writes_a_checkpoint_that_is_missing(base, data, vanilla, copy_of_vanilla):
    path = train(settings(base, data, copy_of_vanilla, **VANILLA, resume=True))
    assert path == copy_of_vanilla / "ckpt" / "model.ckpt"
    assert path.read_bytes() == (vanilla / "ckpt" / "model.ckpt").read_bytes()
    assert "all 12 updates are done already" in (copy_of_vanilla / "log.txt").read_text()
    saved = path.stat().st_mtime_ns
    train(settings(base, data, copy_of_vanilla, **VANILLA, resume=True))
    assert path.stat().st_mtime_ns == saved


def test_a_unet_from_nothing_needs_no_unet_in_the_checkpoint(base, data, empty_run, tmp_path):
    arrays, _ = read_checkpoint(base)
    parts = tmp_path / "parts.safetensors"
    write_checkpoint(parts, {name: array for name, array in arrays.items() if not name.startswith(UNET)})
    drawn = []
    for seed in (1, 1, 2):
        config = settings(parts, data, empty_run, unet_initialize_random=True, seed=seed)
        model = Trainer(config).model.parameters_dict()
        drawn.append(model[f"{UNET}out.2.weight"].asnumpy())
    assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])
    np.testing.assert_array_equal(
        model["first_stage_model.quant_conv.weight"].asnumpy(), arrays["first_stage_model.quant_conv.weight"]
    )
    with pytest.raises(UserError, match="UNet"):
        Trainer(settings(parts, data, empty_run))


@pytest.mark.parametrize(
    ("given", "fp16", "scale", "dynamic"),
    [
        ("auto", False, 1.0, False),
        ("auto", True, 512.0, True),
        ("dynamic", False, 512.0, True),
        ("static", True, 512.0, False),
        ("none", True, 1.0, False),
    ],
)
def test_the_loss_scaler_is_the_one_asked_for(given, fp16, scale, dynamic):
    runtime = Runtime("CPU", ms.float16 if fp16 else ms.float32, 0, 1, 0)
    config = TrainSettings(loss_scaler_type=given, init_loss_scale=512.0, scale_window=7, loss_scale_factor=3.0)
    scaler = make_loss_scaler(config, runtime)
    assert (scaler.scale, scaler.dynamic, scaler.window, scaler.factor) == (scale, dynamic, 7, 3.0)
    saved = {**scaler.state(), "scale": 64.0, "updates": 9}
    resumed = make_loss_scaler(config, runtime, saved)
    assert resumed.updates == 9 and resumed.scale == (64.0 if dynamic else scale)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(data_path=None), "--data_path is needed: give the folder"),
        (dict(pretrained_model_path=None), "--pretrained_model_path is needed"),
        (dict(pretrained_model_path="nowhere.ckpt"), "nowhere.ckpt does not exist: give"),
        (dict(output_path=str(ROOT / "README.md")), "output_path: .* cannot be a folder"),
        (dict(data_path="nowhere"), "nowhere"),
        (dict(model_config="nowhere.yaml"), "nowhere.yaml"),
        (dict(image_size=15), "image_size 15 must be a multiple of 2"),
        (dict(train_batch_size=50), "train_batch_size"),
        (dict(caption_column="caption"), "caption"),
        (dict(enable_flash_attention=True), "needs an Ascend device"),
        (dict(dataset_sink_mode=True), "needs an Ascend device"),
        (dict(use_parallel=True), "msrun"),
        (dict(use_lora=True, lora_targets=["to_nowhere"]), "to_nowhere"),
        (dict(use_lora=True, lora_rank=1000), "lora_rank 1000"),
        (dict(use_lora=True, lora_init_path="nowhere.ckpt"), "nowhere.ckpt"),
        (dict(loss_scaler_type="dynamic", drop_overflow_update=False), "drop_overflow_update False does not go"),
        (dict(precision="fp16", drop_overflow_update=False), "drop_overflow_update False does not go"),
        (dict(model_config=str(ROOT / "tests" / "tiny.yaml")), "does not fit"),
    ],
)
def test_what_cannot_be_done_is_said_with_the_setting_before_the_data_is_encoded(base, data, tmp_path, change, says):
    output = tmp_path / "run"
    with pytest.raises(UserError, match=says):
        train(settings(base, data, output, **change))
    assert not (output / "ckpt").exists() and not (output / "cache").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--lora_ranks", "4"], "error: unknown setting --lora_ranks: did you mean --lora_rank?"),
        (["--train_config", "configs/train/train_config_lora_v1.yaml"], "error: --data_path is needed"),
    ],
)
def test_errors_are_one_line_with_exit_code_2(flags, says):
    done = subprocess.run(
        [sys.executable, "train_text_to_image.py", *flags], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert says in done.stderr and "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error")]) == 1


def test_help_lists_the_settings():
    done = subprocess.run(
        [sys.executable, "train_text_to_image.py", "-h"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0
    for word in ("--use_lora", "--resume", "--loss_scaler_type", "[4]"):
        assert word in done.stdout


@pytest.fixture(autouse=True)
def restored(graph_mode):
    """The mode and the log of the other tests come back after each of these."""
    yield
    log = logging.getLogger("ldm")
    log.setLevel(logging.NOTSET)
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()


def test_a_velocity_base_is_refused_where_the_recipe_predicts_noise(base, data, tmp_path):
    arrays, _ = read_checkpoint(base)
    velocity = tmp_path / "velocity.safetensors"
    write_checkpoint(velocity, arrays, {"prediction_type": "v_prediction"})
    with pytest.raises(UserError, match="prediction_type is v_prediction, but .* has epsilon"):
        Trainer(settings(velocity, data, tmp_path / "output", **VANILLA))
