"""Which cause is named if a step is not finite."""

from __future__ import annotations

from dataclasses import replace

import mindspore as ms
import numpy as np
import pytest

from ldm.errors import UserError
from ldm.runtime import peers
from ldm.training.own_files import find_states
from ldm.training.trainer import run_steps
from ldm.training.training_state import load_state, save_state
from tests.training.micro import FULL, UNET, metrics, prepare, unread

NAN = float("nan")


def error_of(run, loss=NAN, norm=NAN) -> str:
    """The error of a run whose next step has this result."""
    run.step = lambda *_: unread(loss, norm, finite=False)
    with pytest.raises(UserError) as caught:
        run_steps(run)
    return str(caught.value)


@pytest.mark.parametrize("loss", [NAN, 1.0])
def test_without_another_cause_the_learning_rate(settings, empty_run, loss):
    error = error_of(prepare(settings(empty_run, **FULL)), loss)
    assert "not finite at step 1 " in error and ": lower start_learning_rate" in error
    assert error.endswith("nothing was saved yet")


def spoil(run, what, row):
    """Have the cache return an array of a row that is not finite."""
    inputs = run.inputs
    tokens = inputs.captions.tokens.tokenizer.encode([inputs.data.rows[row].caption])[0]
    cache, key = (
        (inputs.moments.cache, inputs.moments.key(row))
        if what == "latents"
        else (inputs.texts.cache, inputs.texts.key(tokens))
    )
    get = cache.get

    def spoiled(asked, shape=None):
        array = get(asked, shape)
        if asked == key and array is not None:
            array.flat[5] = np.nan
        return array

    cache.get = spoiled


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("what", ["latents", "text embeddings"])
def test_the_image_whose_inputs_are_not_finite(settings, empty_run, what, precision):
    run = prepare(settings(empty_run, **{**FULL, "caption_dropout": 0.0}, precision=precision))
    row = run.inputs.order.indices(0)[1]
    spoil(run, what, row)
    error = error_of(run)
    assert f"the {what} of " in error and f"/{row}.png are not finite at step 1" in error


@pytest.mark.parametrize("own_is_finite", [True, False])
def test_the_first_process_names_another_whose_inputs_are_not_finite(settings, empty_run, monkeypatch, own_is_finite):
    run = prepare(settings(empty_run, **FULL))
    if not own_is_finite:
        spoil(run, "latents", run.inputs.order.indices(0)[1])
    others = [b"", b"process 2 on host1: the latents of 4.png are not finite"]
    monkeypatch.setattr(peers, "gather", lambda data=b"": [data, *others])
    error = error_of(run)
    assert error == others[1].decode() if own_is_finite else error.startswith("the latents of ")


def test_another_process_than_the_first_names_itself(settings, empty_run, monkeypatch):
    run = prepare(settings(empty_run, **FULL))
    spoil(run, "latents", run.inputs.order.indices(0)[1])
    run.runtime = replace(run.runtime, process_index=3)
    monkeypatch.setenv("MS_ROLE", "MS_WORKER")
    monkeypatch.setenv("RANK_ID", "3")
    sent = []
    monkeypatch.setattr(peers, "gather", lambda data=b"": sent.append(data.decode()) or [])
    assert error_of(run).startswith("the latents of ") and sent[0].startswith("process 3 on ")


def test_the_step_whose_result_was_read_late_is_the_one_that_is_named(settings, empty_run):
    """Its own inputs are looked at, not those of the next step, which is launched already."""
    run = prepare(settings(empty_run, **{**FULL, "caption_dropout": 0.0}))
    run.reads_late = True
    row = run.inputs.order.indices(1)[0]
    assert row not in run.inputs.order.indices(2)
    spoil(run, "latents", row)
    results = [unread(1.0, 1.0, finite=True), unread(NAN, NAN, finite=False), unread(NAN, NAN, finite=False)]
    run.step = lambda *_: results.pop(0)
    with pytest.raises(UserError, match=f"/{row}.png are not finite at step 2: "):
        run_steps(run)
    assert not results and len(metrics(empty_run)) == 1


def test_weights_that_were_too_large_in_the_last_state(settings, saved_run):
    newest = find_states(saved_run / "ckpt")[0]
    state = load_state(newest)
    name = next(name for name in state.arrays if name.startswith("p."))
    state.arrays[name] = np.full(state.arrays[name].shape, -1e10, np.float32)
    save_state(newest.parent, state)
    run = prepare(settings(saved_run, **{**FULL, "max_steps": 20}, resume=True))
    error = error_of(run, loss=1.0, norm=float("inf"))
    assert "weights were as large as 1e+10 in " in error and newest.name in error


def test_a_base_model_that_is_not_finite(settings, empty_run):
    run = prepare(settings(empty_run, use_lora=True))
    bias = run.model.parameters_dict()[f"{UNET}out.2.bias"]
    bias.set_data(ms.Tensor(np.full(bias.shape, np.nan, np.float32)))
    error = error_of(run)
    assert f"{UNET}out.2.bias of " in error and "micro.safetensors holds values that are not finite" in error
