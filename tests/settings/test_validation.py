"""The settings of the validation loss: contradictions, and what they need."""

from __future__ import annotations

import pytest

from ldm.errors import UserError
from ldm.settings.train import TrainSettings


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(validate_every_n_steps=0), "validate_every_n_steps: 0 is not allowed: at least 1"),
        (dict(validate_every_n_epochs=-1), "validate_every_n_epochs: -1 is not allowed: at least 0"),
        (dict(max_validation_steps=0), "max_validation_steps: 0 is not allowed: at least 1"),
        (dict(validation_timesteps=[]), "validation_timesteps"),
        (dict(validation_timesteps=[200, -1]), "validation_timesteps"),
        (dict(validation_timesteps=[200, 400, 200]), "has a time step twice"),
        (dict(keep_best=True, validate_every_n_epochs=0), "keep_best needs a validation loss"),
        (dict(max_validation_steps=2, validate_every_n_epochs=0), "max_validation_steps needs a validation loss"),
    ],
)
def test_contradictions_are_named(change, says):
    with pytest.raises(UserError, match=says):
        TrainSettings(**change)


def test_images_that_are_held_out_are_validated_unless_it_is_turned_off():
    assert TrainSettings().validates
    assert not TrainSettings(validate_every_n_epochs=0).validates
    assert TrainSettings(validate_every_n_epochs=0, validate_every_n_steps=10).validates


@pytest.mark.parametrize(
    "given",
    [
        dict(validate_every_n_steps=10),
        dict(validate_every_n_epochs=2),
        dict(max_validation_steps=3),
        dict(keep_best=True),
    ],
)
def test_a_setting_that_has_no_images_says_what_gives_them(given):
    settings = TrainSettings(**given)
    settings.check_held_out(True)
    with pytest.raises(
        UserError, match=f"{next(iter(given))} needs images .* validation_split .* validation_data_path"
    ):
        settings.check_held_out(False)
    TrainSettings(validate_every_n_epochs=0).check_held_out(False)


def test_only_time_steps_that_are_trained_are_measured():
    settings = TrainSettings(validation_timesteps=[800, 200, 500])
    assert settings.timesteps_within(range(0, 1000)) == [800, 200, 500]
    assert settings.timesteps_within(range(200, 800)) == [200, 500]
    with pytest.raises(UserError, match="none of 800, 200, 500 is trained, which are 0 to 99: .* such as 50"):
        settings.timesteps_within(range(0, 100))
