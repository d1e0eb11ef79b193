"""Loss scaling for fp16 (Micikevicius et al. 2018). It runs on the host and is saved with the training state."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from ldm.errors import UserError
from ldm.settings.train import TrainSettings

OVERFLOWS_ALLOWED = 50  # in a row: a scale of 65536 reaches 1 after 16
SMALLEST_SCALE = 1.0
COUNTS = ("good_steps", "overflows_in_a_row", "overflows", "updates")  # fields of LossScaler
LARGEST_SCALE = 2.0**24  # without it, the scale of a run without overflows would double until fp32 overflows


@dataclass
class LossScaler:
    """A static or dynamic loss scale.

    A dynamic scale is divided by `factor` after an overflow and multiplied by it after `window` finite steps in a row.
    """

    scale: float
    dynamic: bool
    factor: float = 2.0
    window: int = 1000
    good_steps: int = 0  # in a row, since the scale changed
    overflows_in_a_row: int = 0
    overflows: int = 0
    updates: int = 0  # steps that were not skipped: t in AdamW

    @property
    def is_used(self) -> bool:
        """Whether the loss is scaled at all."""
        return self.dynamic or self.scale != 1.0

    def after_step(self, finite: bool, applied: bool) -> None:
        """Count a step and adapt the scale. Raises UserError after OVERFLOWS_ALLOWED overflows in a row."""
        self._count(finite, applied)
        if self.overflows_in_a_row >= OVERFLOWS_ALLOWED:
            raise UserError(
                f"the gradients overflowed at {self.overflows_in_a_row} steps in a row, at loss scale {self.scale:g}: "
                "nothing is being learned. Use --precision fp32, a smaller --start_learning_rate or --init_loss_scale"
            )

    def outcomes(self) -> tuple[LossScaler, LossScaler]:
        """Return what this becomes after a finite step, and after one that overflows and is skipped."""
        after_finite, after_overflow = replace(self), replace(self)
        after_finite._count(finite=True, applied=True)
        after_overflow._count(finite=False, applied=False)
        return after_finite, after_overflow

    def _count(self, finite: bool, applied: bool) -> None:
        self.updates += applied
        if finite:
            self.overflows_in_a_row = 0
            self.good_steps += 1
            if self.dynamic and self.good_steps >= self.window:
                self.scale, self.good_steps = min(self.scale * self.factor, LARGEST_SCALE), 0
            return
        self.overflows += 1
        self.overflows_in_a_row += 1
        self.good_steps = 0
        if self.dynamic:
            self.scale = max(self.scale / self.factor, SMALLEST_SCALE)

    def state(self) -> dict[str, Any]:
        return asdict(self)

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue with the counts of another scaler's `state`, and with its scale if both are dynamic."""
        for name in COUNTS:
            setattr(self, name, state[name])
        if self.dynamic and state["dynamic"]:
            self.scale = state["scale"]


def make_loss_scaler(settings: TrainSettings, fp16: bool) -> LossScaler:
    """Build the loss scaler that the settings ask for.

    Raises UserError if the scale is dynamic, but steps that overflow are not skipped.
    """
    kind = settings.loss_scaler_type
    if kind == "auto":
        kind = "dynamic" if fp16 else "none"
    if kind == "dynamic" and not settings.drop_overflow_update:
        raise UserError(
            "drop_overflow_update False does not go with a dynamic loss scale, the default in fp16, because that "
            "depends on overflows: leave it True, or set loss_scaler_type static with a small init_loss_scale"
        )
    return LossScaler(
        scale=1.0 if kind == "none" else settings.init_loss_scale,
        dynamic=kind == "dynamic",
        factor=settings.loss_scale_factor,
        window=settings.scale_window,
    )
