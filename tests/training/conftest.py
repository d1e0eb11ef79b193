"""Settings and folders of runs of the micro model, and graph mode for every test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ldm.settings.train import TrainSettings
from ldm.training.own_files import find_states
from tests.training.micro import SETTINGS


@pytest.fixture(autouse=True)
def in_graph_mode(graph_mode):
    """Training is tested in graph mode."""


@pytest.fixture
def settings(micro_base_model, micro_data) -> Callable[..., TrainSettings]:
    """Makes the settings of a run that saves into a folder."""

    def make(output: Path, **others: object) -> TrainSettings:
        paths = {"pretrained_model_path": micro_base_model, "data_path": micro_data, "output_path": output}
        return TrainSettings(**{**SETTINGS, **paths, **others})

    return make


@pytest.fixture
def empty_run(full_run, tmp_path) -> Path:
    """An output folder without a run, but with the cache of one."""
    output = tmp_path / "run"
    output.mkdir()
    (output / "cache").symlink_to(full_run / "cache")
    return output


@pytest.fixture
def saved_run(full_run, empty_run) -> Path:
    """An output folder with the training states of the uninterrupted run, after step 9 and 12."""
    (empty_run / "ckpt").mkdir()
    for path in find_states(full_run / "ckpt"):
        (empty_run / "ckpt" / path.name).write_bytes(path.read_bytes())
    return empty_run
