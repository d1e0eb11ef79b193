"""Loss scaling for fp16 (Micikevicius et al. 2018), kept on the host: a few numbers that are saved with the run."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ldm.errors import UserError

OVERFLOWS_ALLOWED = 50  # in a row; from 65536 the scale has long reached 1 by then
SMALLEST_SCALE = 1.0
LARGEST_SCALE = 2.0**24  # a finite run would go on doubling, until fp32 itself overflows


@dataclass
class LossScaler:
    """Dynamic: the scale falls by `factor` at an overflow and rises by it after `window` finite steps in a row, up
    to LARGEST_SCALE. Otherwise it stays.
    """

    scale: float
    dynamic: bool
    factor: float = 2.0
    window: int = 1000
    good_steps: int = 0
    overflows_in_a_row: int = 0
    overflows: int = 0
    updates: int = 0  # applied ones: AdamW's t

    def after_step(self, finite: bool, applied: bool) -> None:
        """Note how a step went. Raises UserError after OVERFLOWS_ALLOWED overflows in a row."""
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
        if self.overflows_in_a_row >= OVERFLOWS_ALLOWED:
            raise UserError(
                f"the gradients overflowed at {self.overflows_in_a_row} steps in a row, at loss scale {self.scale:g}: "
                "nothing is being learned. Use --precision fp32, a smaller --start_learning_rate or --init_loss_scale"
            )

    def state(self) -> dict:
        return asdict(self)
