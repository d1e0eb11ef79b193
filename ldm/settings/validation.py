"""The settings of the validation loss: the loss on images that are not trained.

Names are those of kohya's sd-scripts. TrainSettings holds them all. ldm.settings.data has those that hold images out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Optional

from ldm.errors import UserError, plain
from ldm.settings.declare import MAX_COUNT, setting
from ldm.settings.model_yaml import MAX_TIMESTEPS

MAX_VALIDATION_TIMESTEPS = 100

# No weight of a run depends on these, so a resumed run may have others.
_validation_setting = partial(setting, not_in_diffusers="diffusers' script has no validation")


@dataclass
class ValidationSettings:
    """When the loss on held-out images is computed, and at which time steps."""

    validate_every_n_steps: Optional[int] = _validation_setting(
        None,
        "steps between two validation losses, those of the images of validation_split or validation_data_path. It is "
        "the plain mean squared error of the prediction: min-SNR, huber and other losses, noise_offset and the like, "
        "masks, dropout, augmentation and class images do not count. Before the first step and after the last one it "
        "is computed as well",
        group="validation loss",
        low=1,
        high=MAX_COUNT,
    )
    validate_every_n_epochs: Optional[int] = _validation_setting(
        None,
        "epochs between two validation losses; None: 1, unless validate_every_n_steps is given; 0: no validation loss",
        low=0,
        high=MAX_COUNT,
    )
    max_validation_steps: Optional[int] = _validation_setting(
        None,
        "use as many held-out images as so many batches hold, always the same ones; None: all",
        low=1,
        high=MAX_COUNT,
    )
    validation_timesteps: list[int] = _validation_setting(
        [200, 400, 600, 800],
        "time steps of the validation loss; those that are not trained (min_timestep, max_timestep) are left out",
        low=0,
        high=MAX_TIMESTEPS - 1,
        length=(1, MAX_VALIDATION_TIMESTEPS),
    )
    keep_best: bool = _validation_setting(
        False, "keep the weights of the step with the lowest validation loss as ckpt/best.ckpt"
    )

    @property
    def validates(self) -> bool:
        """Whether there is a validation loss, where images are held out."""
        return self.validate_every_n_steps is not None or self.validate_every_n_epochs != 0

    def check_validation(self) -> None:
        """Check the settings against each other. Raises UserError."""
        if len(set(self.validation_timesteps)) < len(self.validation_timesteps):
            raise UserError(
                f"validation_timesteps {plain(self.validation_timesteps)} has a time step twice: give each once"
            )
        if not self.validates:
            for name in ("keep_best", "max_validation_steps"):
                if getattr(self, name):
                    raise UserError(
                        f"{name} needs a validation loss, and validate_every_n_epochs 0 turns it off: leave one of "
                        "them out"
                    )

    def check_held_out(self, any_held_out: bool) -> None:
        """Raise UserError if a setting needs images that are held out, and there are none."""
        if any_held_out:
            return
        for name in ("validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps", "keep_best"):
            if getattr(self, name):
                raise UserError(
                    f"{name} needs images that are not trained, and none are held out: give validation_split (such as "
                    "0.1, of enough images) or validation_data_path, or leave it out"
                )

    def timesteps_within(self, trained: range) -> list[int]:
        """Return those of validation_timesteps that are trained. Raises UserError if none is."""
        used = [timestep for timestep in self.validation_timesteps if timestep in trained]
        if not used:
            raise UserError(
                f"validation_timesteps: none of {', '.join(map(str, self.validation_timesteps))} is trained, which are "
                f"{trained.start} to {trained.stop - 1}: give some of them, such as "
                f"{trained[len(trained) // 2]}, or turn the validation loss off by validate_every_n_epochs 0"
            )
        return used
