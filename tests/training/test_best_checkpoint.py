"""The files of the best step: which are kept, and what a resumed run makes of them."""

from __future__ import annotations

import json
from pathlib import Path

from ldm.training.best_checkpoint import BestCheckpoint
from ldm.training.own_files import OwnFiles


def make(folder: Path, start: int = 0) -> BestCheckpoint:
    return BestCheckpoint(folder, OwnFiles(folder, resumed=start > 0), start, states_kept=2)


def write(best: BestCheckpoint, step: int) -> None:
    best.write(step, 1.0 / (step + 1), lambda path: path.write_text(f"of step {step}"))


def kept(folder: Path) -> list[int]:
    """The steps of which there are weights."""
    return sorted(int(path.stem[5:]) for path in folder.glob("best-[0-9]*.ckpt"))


def says(folder: Path) -> tuple[int, str]:
    """The step of best.json, and the text of best.ckpt."""
    return json.loads((folder / "best.json").read_text())["step"], (folder / "best.ckpt").read_text()


def test_the_best_weights_and_those_of_each_training_state_are_kept(tmp_path):
    best = make(tmp_path)
    write(best, 1)
    write(best, 2)
    assert kept(tmp_path) == [2] and says(tmp_path) == (2, "of step 2")
    best.after_save()
    write(best, 3)
    write(best, 4)
    assert kept(tmp_path) == [2, 4]  # a resumed run needs 2 if it does not come to 4
    best.after_save()
    write(best, 5)
    assert kept(tmp_path) == [2, 4, 5]
    best.after_save()
    assert kept(tmp_path) == [4, 5] and says(tmp_path) == (5, "of step 5")
    best.after_save()
    assert kept(tmp_path) == [5]


def test_a_resumed_run_begins_with_the_best_step_of_its_training_state(tmp_path):
    best = make(tmp_path)
    write(best, 2)
    best.after_save()
    write(best, 4)  # killed here
    resumed = make(tmp_path, start=3)
    resumed.restore(2, 1.0 / 3.0, kept=True, source=tmp_path)
    assert says(tmp_path) == (2, "of step 2") and kept(tmp_path) == [2]
    assert json.loads((tmp_path / "best.json").read_text()) == {"step": 2, "loss": 1.0 / 3.0}


def test_a_run_that_resumes_in_another_folder_takes_the_weights_with_it(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    write(make(source), 2)
    other = tmp_path / "other"
    other.mkdir()
    make(other).restore(2, 0.5, kept=True, source=source)
    assert says(other) == (2, "of step 2")


def test_weights_that_were_not_kept_are_said_to_be_missing(tmp_path, caplog):
    best = make(tmp_path, start=9)
    best.restore(2, 0.5, kept=True, source=None)
    assert "the best step so far, 2, were not kept" in caplog.text
    assert [path.name for path in tmp_path.glob("best*")] == ["best.json"]
    write(best, 10)
    assert says(tmp_path) == (10, "of step 10")


def test_without_weights_only_the_record_is_written(tmp_path):
    best = make(tmp_path)
    write(best, 2)
    best.write(4, 0.1)  # resumed without keep_best
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.json", "files.json"]


def test_a_best_step_that_cannot_be_compared_is_renamed_and_stays(tmp_path, caplog):
    best = make(tmp_path)
    write(best, 2)
    best.after_save()
    for name, step in (("best-until-00000003", 2), ("best-until-00000003-2", 4)):
        best = make(tmp_path, start=3)
        best.restore(None, 0.0, kept=True, source=None)
        assert not (tmp_path / "best.json").exists() and not (tmp_path / "best.ckpt").exists()
        assert f"are kept as {tmp_path / name}.ckpt" in caplog.text
        for _ in range(3):
            best.after_save()
        write(best, 4)
        for _ in range(3):
            best.after_save()
        assert (tmp_path / f"{name}.ckpt").read_text() == f"of step {step}"
        assert json.loads((tmp_path / f"{name}.json").read_text())["step"] == step
    assert (tmp_path / "best-until-00000003.ckpt").read_text() == "of step 2"
    assert kept(tmp_path) == [4] and says(tmp_path) == (4, "of step 4")


def test_of_a_best_step_without_weights_nothing_is_kept_nor_of_a_user_s_file(tmp_path):
    make(tmp_path).write(2, 0.5)
    (tmp_path / "best.ckpt").write_text("a user's")
    make(tmp_path, start=3).restore(None, 0.0, kept=True, source=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.ckpt", "files.json"]
    assert (tmp_path / "best.ckpt").read_text() == "a user's"


def test_saves_of_a_run_without_a_validation_loss_remove_nothing(tmp_path):
    best = make(tmp_path)
    write(best, 1)
    best.after_save()
    write(best, 2)
    best.after_save()
    best = make(tmp_path, start=3)
    for _ in range(3):
        best.after_save()
    assert kept(tmp_path) == [1, 2] and says(tmp_path) == (2, "of step 2")


def test_a_users_file_of_the_same_name_is_renamed(tmp_path, caplog):
    (tmp_path / "best.ckpt").write_text("a user's")
    write(make(tmp_path), 2)
    assert says(tmp_path) == (2, "of step 2") and (tmp_path / "best-kept.ckpt").read_text() == "a user's"
    assert "was not written by this run" in caplog.text
