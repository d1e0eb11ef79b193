"""From settings to the optimizer."""

from __future__ import annotations

import math

import pytest

from ldm.settings.train import TrainSettings
from ldm.training.optimizers import (
    Adafactor,
    AdamW,
    AdamWScheduleFree,
    Lion,
    Prodigy,
    make_optimizer,
)


@pytest.mark.parametrize("cls", [AdamW, Lion, Adafactor, AdamWScheduleFree, Prodigy])
def test_the_settings_have_the_defaults_of_the_optimizers(cls):
    settings = TrainSettings(optim=cls.__name__.lower(), start_learning_rate=1.0)
    assert make_optimizer(settings) == cls()


def test_options_reach_the_optimizer():
    settings = TrainSettings(optim="Prodigy", start_learning_rate=1.0, optimizer_args=["d_coef=2", "decouple=True"])
    assert make_optimizer(settings) == Prodigy(d_coef=2.0)
    assert make_optimizer(settings).growth_rate == math.inf
    assert make_optimizer(TrainSettings(betas=[0.9, 0.98], weight_decay=0.1)) == AdamW((0.9, 0.98), weight_decay=0.1)
