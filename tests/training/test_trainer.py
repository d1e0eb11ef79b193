"""The training loop: what is trained, the loss scale, interrupts and failures."""

from __future__ import annotations

import itertools

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from ldm.errors import UserError
from ldm.lora.formats import read_lora
from ldm.settings.read import read_settings
from ldm.settings.train import TrainSettings
from ldm.training.inputs import Inputs, latents
from ldm.training.own_files import find_states
from ldm.training.status import Status
from ldm.training.trainer import run_steps
from ldm.training.training_state import load_state
from ldm.weights.arrays import to_bfloat16
from ldm.weights.checkpoint import read_checkpoint
from tests.training.micro import FULL, MICRO, ROOT, UNET, metrics, prepare, unread


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_lora_in_unet_and_text_encoder_trains_the_factors_alone(micro_base_model, micro_data, empty_run):
    """By the published recipe for SD1.x, with the micro model."""
    argv = [
        "--train_config", str(ROOT / "configs" / "train" / "train_config_lora_v1.yaml"), "--data_path", str(micro_data),
        "--output_path", str(empty_run), "--pretrained_model_path", str(micro_base_model), "--model_config", str(MICRO),
        "--image_size", "16", "--train_batch_size", "2", "--max_steps", "2", "--lora_ft_text_encoder", "True",
        "--lora_rank", "2", "--lora_alpha", "4", "--start_learning_rate", "1e-2", "--device_target", "CPU",
    ]  # fmt: skip
    run = prepare(read_settings(TrainSettings, argv, yaml_flag="train_config"))
    path = run_steps(run)
    assert path == empty_run / "ckpt" / "lora.ckpt" and path.stat().st_size < 100_000
    lora = read_lora(path)
    attentions = [f"attn{i}.{name}" for i in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")]
    unet = [name for name in lora.layers if name.startswith(UNET)]
    text = [name for name in lora.layers if not name.startswith(UNET)]
    assert {name.split("transformer_blocks.0.")[1] for name in unet} == set(attentions)
    assert {name.split("self_attn.")[1] for name in text} == {"q_proj", "k_proj", "v_proj", "out_proj"}
    for name, layer in lora.layers.items():
        assert layer.rank == 2 and layer.alpha == 4.0
        assert np.abs(layer.up).max() > 0, name  # 0 before the training
    assert lora.metadata == {"architecture": "custom", "prediction_type": "epsilon"}
    before, _ = read_checkpoint(micro_base_model)
    for name, parameter in run.model.parameters_dict().items():
        if name in before:
            held = to_bfloat16(before[name]) if parameter.dtype == ms.bfloat16 else before[name]
            assert parameter.asnumpy().tobytes() == held.tobytes(), name


def test_a_lora_is_trained_on_some_time_steps_and_its_file_says_so(settings, tmp_path, monkeypatch):
    seen = []

    def record(self, number):
        batch = make_batch(self, number)
        seen.extend(batch.timesteps.tolist())
        return batch

    make_batch = Inputs.batch
    monkeypatch.setattr(Inputs, "batch", record)
    path = run_steps(prepare(settings(tmp_path / "late", use_lora=True, max_steps=4, max_timestep=550)))
    assert len(seen) == 8 and max(seen) < 550
    assert read_lora(path).timesteps == range(0, 550)


def test_fp16_lora_with_accumulation_augmentation_and_a_dynamic_loss_scale(settings, tmp_path):
    output = tmp_path / "run"
    run = prepare(settings(
        output, max_steps=4, use_lora=True, lora_rank=2, precision="fp16", random_flip=True, random_crop=True,
        cache_text=False, gradient_accumulation_steps=2, init_loss_scale=2.0**30, scale_window=2, image_filter_size=10,
        num_workers=2, use_ema=True, loss_scale_factor=2.0**13,
    ))  # fmt: skip
    assert len(run.inputs.data) == 9  # image_filter_size leaves the small one out
    up = next(p for p in run.step.parameters if p.name.endswith("lora_up.weight"))
    run_steps(run)
    # 2^30 overflows fp16: the step is skipped and the scale falls. After two good steps it rises, to its upper limit.
    assert [float(row["loss_scale"]) for row in metrics(output)] == [2.0**30, 2.0**17, 2.0**17, 2.0**24]
    assert run.scaler.overflows == 2 and run.scaler.updates == 2
    assert "overflowed at loss scale" in (output / "log.txt").read_text()
    assert up.dtype == ms.float16  # a copy for the network: what is trained and saved is fp32
    saved = load_state(find_states(output / "ckpt")[0]).arrays
    trained, average = (saved[f"{group}.{up.name}"] for group in ("p", "ema"))
    assert trained.dtype == average.dtype == np.float32 and np.abs(trained).max() > 0
    assert (trained != trained.astype(np.float16)).any()
    np.testing.assert_array_equal(up.asnumpy(), trained.astype(np.float16))
    lora = read_lora(output / "ckpt" / "lora.ckpt")
    np.testing.assert_array_equal(lora.layers[up.name[: -len(".lora_up.weight")]].up, average)
    assert not list(output.glob("cache/*/*.npy"))


def test_a_loss_that_overflowed_is_left_out_of_the_mean(settings, empty_run, monkeypatch):
    run = prepare(settings(empty_run, **{**FULL, "max_steps": 4}, precision="fp16"))
    nan = float("nan")
    losses = [nan, 1.0, nan, 3.0]
    results = [unread(loss, loss, finite=loss == loss) for loss in losses]
    run.step = lambda *_: results.pop(0)
    monkeypatch.setattr("ldm.training.trainer.save", lambda _: None)
    run_steps(run)
    assert "step 4/4: loss 3.0000 (mean 1.0400)" in (empty_run / "log.txt").read_text()


@pytest.mark.parametrize("reads_late", [False, True])
def test_a_run_that_always_overflows_stops(settings, empty_run, monkeypatch, reads_late):
    run = prepare(settings(empty_run, **{**FULL, "max_steps": 200}, loss_scaler_type="dynamic"))
    run.reads_late = reads_late
    run.step = lambda *_: unread(1.0, np.inf, finite=False)
    monkeypatch.setattr("ldm.training.trainer.save", lambda run: None)
    with pytest.raises(UserError, match="overflowed at 50 steps in a row"):
        run_steps(run)
    assert run.status.steps_done == 50


def test_on_ascend_a_step_is_launched_before_the_result_of_the_last_is_read(settings, empty_run, monkeypatch):
    """But the first step and those that save are read at once. An interrupted run counts what was read."""
    run = prepare(settings(empty_run, **{**FULL, "max_steps": 6, "ckpt_save_interval": 4}))
    assert not run.reads_late
    run.reads_late = True
    events = []

    class Result:
        def __init__(self, step):
            self.step = step

        def read(self):
            events.append(f"read {self.step}")
            return unread(1.0, 1.0, finite=True).read()

    def step(batches, scalars, dropout_keys, after_overflow):
        number = 1 + sum(event.startswith("launch") for event in events)
        events.append(f"launch {number} after {run.status.steps_done}")
        return Result(number)

    run.step = step
    monkeypatch.setattr("ldm.training.trainer.save", lambda run: events.append(f"save {run.status.steps_done}"))
    run_steps(run)
    assert events == [
        "launch 1 after 0", "read 1",
        "launch 2 after 1", "launch 3 after 1", "read 2", "launch 4 after 2", "read 3", "read 4", "save 4",
        "launch 5 after 4", "launch 6 after 4", "read 5", "read 6", "save 6",
    ]  # fmt: skip
    assert [row["step"] for row in metrics(empty_run)] == [str(i) for i in range(1, 7)]


def overflow(run, steps):
    """Give steps, by their numbers from 1, noise that is not finite in their last micro-batch."""
    count, feed = run.settings.gradient_accumulation_steps, run.feed
    numbers = itertools.count(run.status.steps_done * count + 1)

    def spoilt_feed():
        latents, noise, *others = feed()
        number = next(numbers)
        if number % count == 0 and number // count in steps:
            noise = Tensor(np.full(noise.shape, np.inf, np.float32))
        return latents, noise, *others

    run.feed = spoilt_feed


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_results_that_are_read_late_change_no_value(settings, full_run, tmp_path, micro_batches):
    """Steps overflow: the first and the second, two in a row of which the second saves, and one before the last."""
    options = dict(
        max_steps=9, use_lora=True, lora_targets=["attn2.to_q"], lora_dropout=0.1, precision="fp16", use_ema=True,
        clip_grad=True, scheduler="cosine", start_learning_rate=1e-2, init_loss_scale=256.0, scale_window=2,
        gradient_accumulation_steps=micro_batches,
    )  # fmt: skip
    shared, states, rows = None, {}, {}
    for name, reads_late, resume in (("at once", False, None), ("late", True, None), ("resumed", True, "late")):
        output = tmp_path / name
        output.mkdir()
        (output / "cache").symlink_to(full_run / "cache")
        resume_from = next(str(path) for path in states[resume] if "06" in path.name) if resume else False
        run = prepare(settings(output, **options, resume=resume_from))
        run.reads_late = reads_late
        if shared is None:
            shared = run.step
        else:  # the graphs of all runs are the same, and are compiled once
            shared.load_state(run.step.state())
            run.step = shared
        overflow(run, {1, 2, 5, 6, 8})
        run_steps(run)
        states[name] = find_states(output / "ckpt")
        rows[name] = [{**row, "seconds": ""} for row in metrics(output)]
    scales = [float(row["loss_scale"]) for row in rows["at once"]]
    assert scales == [256.0, 128.0, 64.0, 64.0, 128.0, 64.0, 32.0, 32.0, 16.0]
    assert rows["late"] == rows["at once"] and rows["resumed"] == rows["at once"][6:]
    assert [len(paths) for paths in states.values()] == [2, 2, 1]
    for name in ("late", "resumed"):
        for path, expected in zip(states[name], states["at once"]):
            state, expected = load_state(path), load_state(expected)
            assert (state.step, state.scaler) == (expected.step, expected.scaler)
            for array in expected.arrays:
                np.testing.assert_array_equal(state.arrays[array], expected.arrays[array], err_msg=array)


def test_an_interrupted_run_says_how_to_continue(settings, saved_run, tmp_path):
    newest = find_states(saved_run / "ckpt")[0]
    for output, resume in ((saved_run, True), (tmp_path / "new", str(newest))):
        run = prepare(settings(output, **{**FULL, "max_steps": 14}, resume=resume))
        descriptions = []

        def step(*_, run=run, descriptions=descriptions):
            descriptions.append(run.status.describe())
            if len(descriptions) == 2:
                raise KeyboardInterrupt
            return unread(1.0, 1.0, finite=True)

        run.step = step
        with pytest.raises(KeyboardInterrupt):
            run_steps(run)
        how_to_continue = f"--resume {resume} continues from {newest}"
        assert descriptions == [
            f"while compiling the step; {how_to_continue}",
            f"after step 13 of 14; {how_to_continue}",
        ]


def test_a_run_that_is_interrupted_while_it_encodes_says_so(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "CACHE_PIXELS", 16 * 16)  # one image at a time
    status = Status(tmp_path / "run" / "ckpt", resumes=False)
    run = prepare(settings(tmp_path / "run"), status)
    load = run.inputs.data.image
    monkeypatch.setattr(run.inputs.data, "image", lambda row: (interrupt if row == 3 else load)(row))
    with pytest.raises(KeyboardInterrupt):
        run.inputs.encode_all()
    assert status.describe() == "after encoding 3 of 10 images ahead; nothing was saved yet"


def test_another_process_than_the_first_finds_what_the_first_has_saved(saved_run):
    status = Status(saved_run / "ckpt", resumes=False, total_steps=14, steps_done=13, phase="")
    newest = find_states(saved_run / "ckpt")[0]
    assert status.describe() == f"after step 13 of 14; --resume True continues from {newest}"


@pytest.mark.parametrize("place", ["load_model", "Inputs"])
def test_a_resumed_run_that_is_interrupted_early_does_not_call_its_states_unsaved(
    settings, saved_run, monkeypatch, place
):
    newest = find_states(saved_run / "ckpt")[0]
    how_to_continue = {
        "load_model": "what was saved before is kept",
        "Inputs": f"--resume True continues from {newest}",
    }
    monkeypatch.setattr(f"ldm.training.setup.{place}", interrupt)
    status = Status(saved_run / "ckpt", resumes=True)
    with pytest.raises(KeyboardInterrupt):
        prepare(settings(saved_run, **FULL, resume=True), status)
    assert status.describe() == f"before the first step; {how_to_continue[place]}"


@pytest.mark.parametrize(
    ("message", "kind", "error"),
    [
        ("Device(id:0) memory isn't enough and alloc failed, alloc size: 512B", UserError, "train_batch_size 2"),
        ("Allocate memory failed for size: 512", UserError, "train_batch_size 2 and image_size 16"),
        ("std::bad_alloc", UserError, "train_batch_size 2"),
        ("The shapes do not fit", RuntimeError, "The shapes do not fit"),
    ],
)
def test_too_little_memory_is_told_from_other_failures(settings, empty_run, message, kind, error):
    def step(*_):
        raise RuntimeError(message)

    run = prepare(settings(empty_run, **FULL))
    run.step = step
    with pytest.raises(kind, match=error):
        run_steps(run)
