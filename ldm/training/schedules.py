"""The learning rate of a step, and EMA's: pure functions of the step, so that a resumed run needs nothing but it."""

from __future__ import annotations

import math


def learning_rate(step: int, *, scheduler: str, start: float, end: float, warmup_steps: int, decay_steps: int) -> float:
    """The rate of the `step`-th update, counted from 0.

    It rises linearly over `warmup_steps` updates (the first one at start / warmup_steps, the last one at `start`), then
    goes from `start` to `end` over `decay_steps` updates in a straight line or half a cosine, and stays there.
    "constant" stays at `start`.
    """
    if step < warmup_steps:
        return start * (step + 1) / warmup_steps
    if scheduler == "constant":
        return start
    done = min(1.0, (step - warmup_steps) / max(1, decay_steps))
    if scheduler == "linear":
        return start + (end - start) * done
    if scheduler == "cosine":
        return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * done))
    raise ValueError(f"unknown scheduler {scheduler!r}")


def ema_decay_at(step: int, decay: float) -> float:
    """EMA's decay at the `step`-th update (from 0): short at first, as LDM's LitEma, so that the random start fades."""
    return min(decay, (1.0 + step) / (10.0 + step))
