"""Resuming: which training state is taken, and which runs are refused."""

from __future__ import annotations

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.training.own_files import find_states
from ldm.training.resume import compare_fingerprints
from ldm.training.trainer import save, train
from ldm.training.training_state import load_state, save_state
from tests.training.micro import FULL, prepare


def log_of(output) -> str:
    return (output / "log.txt").read_text()


def test_a_broken_newest_state_is_named_and_the_one_before_it_taken(settings, saved_run):
    newest = find_states(saved_run / "ckpt")[0]
    newest.write_bytes(newest.read_bytes()[:1000])
    assert prepare(settings(saved_run, **FULL, resume=True)).status.steps_done == 9
    assert newest.name in log_of(saved_run) and "continuing after step 9 of 12" in log_of(saved_run)


def test_a_state_that_does_not_fit_is_named_and_the_one_before_it_taken(settings, saved_run):
    newest = find_states(saved_run / "ckpt")[0]
    state = load_state(newest)
    state.arrays["p.another"] = np.zeros(3, np.float32)
    save_state(newest.parent, state)
    assert prepare(settings(saved_run, **FULL, resume=True)).status.steps_done == 9
    assert f"{newest.name} does not fit this run (1 arrays differ" in log_of(saved_run)
    with pytest.raises(UserError, match=f"{newest.name} does not fit this run"):
        prepare(settings(saved_run, **FULL, resume=str(newest)))


@pytest.mark.parametrize("where", ["", "ckpt", "ckpt/state-00000009.safetensors"])
def test_resume_takes_a_folder_or_a_file(settings, saved_run, tmp_path, where):
    run = prepare(settings(tmp_path / "other", **FULL, resume=str(saved_run / where)))
    assert run.status.steps_done == (9 if where.endswith("safetensors") else 12)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (dict(train_batch_size=3), "global_batch was 2, is 3 .* use --train_batch_size 2"),
        (dict(seed=7), "seed was 42, is 7"),
        (dict(use_ema=False), "use_ema was True, is False"),
        (dict(image_filter_size=20), "data was"),
        (dict(use_lora=True), "use_lora was False, is True"),
    ],
)
def test_another_run_is_refused_with_what_differs(settings, saved_run, change, difference):
    with pytest.raises(UserError, match=difference):
        prepare(settings(saved_run, **{**FULL, **change}, resume=True))


def test_another_run_is_refused_before_the_data_is_encoded(settings, saved_run, tmp_path):
    with pytest.raises(UserError, match="seed was 42, is 7"):
        prepare(settings(tmp_path / "new", **{**FULL, "seed": 7}, resume=str(saved_run)))
    assert not list((tmp_path / "new" / "cache").glob("*.shard"))


def test_another_rate_or_length_is_taken_with_a_warning(settings, saved_run):
    change = {**FULL, "max_steps": 20, "start_learning_rate": 5e-4}
    run = prepare(settings(saved_run, **change, resume=True))
    assert (run.status.steps_done, run.plan.steps) == (12, 20)
    assert "start_learning_rate was 0.001, is 0.0005" in log_of(saved_run)
    assert "updates was 12, is 20" in log_of(saved_run)


def test_a_run_from_an_older_state_keeps_its_own(settings, saved_run):
    """The states that it leaves behind have higher numbers than its first ones."""
    folder = saved_run / "ckpt"
    newest, older = (path.name for path in find_states(folder))
    run = prepare(settings(saved_run, **{**FULL, "max_steps": 10, "resume": str(folder / older)}))
    run.status.steps_done = 10
    save(run)
    assert [path.name for path in find_states(folder)] == ["state-00000010.safetensors", older]
    assert (folder / "model-00000010.ckpt").exists()
    assert [path.name for path in (folder / "abandoned-after-00000009").iterdir()] == [newest]


def test_without_a_state_the_run_starts_from_the_beginning(settings, empty_run):
    assert prepare(settings(empty_run, **FULL, resume=True)).status.steps_done == 0
    assert "holds no training state yet" in log_of(empty_run)


def test_a_named_folder_without_a_state_is_refused(settings, empty_run, micro_data):
    with pytest.raises(UserError, match="holds no training state"):
        prepare(settings(empty_run, **FULL, resume=str(micro_data)))


def test_a_state_beyond_the_last_step_ends_the_run(settings, saved_run):
    train(settings(saved_run, **{**FULL, "max_steps": 5}, resume=True))
    assert "all 5 steps are done already, at step 12" in log_of(saved_run)


def test_a_run_that_is_done_only_writes_a_checkpoint_that_is_missing(settings, full_run, saved_run):
    path = train(settings(saved_run, **FULL, resume=True))
    assert path == saved_run / "ckpt" / "model.ckpt"
    assert path.read_bytes() == (full_run / "ckpt" / "model.ckpt").read_bytes()
    assert "all 12 steps are done already" in log_of(saved_run)
    saved = path.stat().st_mtime_ns
    train(settings(saved_run, **FULL, resume=True))
    assert path.stat().st_mtime_ns == saved


def test_the_states_of_an_earlier_run_are_not_overwritten(settings, saved_run):
    with pytest.raises(UserError, match="--resume True"):
        prepare(settings(saved_run, **FULL))
    assert len(find_states(saved_run / "ckpt")) == 2


def test_states_are_compared_by_the_images_of_all_processes():
    current = {"global_batch": 8}
    earlier = {"train_batch_size": 2, "rank_size": 4}
    assert compare_fingerprints({"global_batch": 8}, current) == compare_fingerprints(earlier, current) == {}
    assert compare_fingerprints({"train_batch_size": 8, "rank_size": 1}, current) == {}
    assert compare_fingerprints({**earlier, "rank_size": 2}, current) == {"global_batch": "global_batch was 4, is 8"}


def test_differences_between_runs_are_named():
    saved = {"a": 1, "b": [1, 2], "gone": 0}
    assert compare_fingerprints(saved, {"a": 2, "b": [1, 2], "new": 3}) == {
        "a": "a was 1, is 2",
        "gone": "gone was 0, is None",
    }
