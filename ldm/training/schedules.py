"""The learning rate and the decay of the moving average, as functions of the step alone."""

from __future__ import annotations

import math


def learning_rate(step: int, *, scheduler: str, start: float, end: float, warmup_steps: int, decay_steps: int) -> float:
    """Return the learning rate of a step.

    Args:
        step: Number of the step, from 0.
        scheduler: "constant" stays at `start`. "linear" and "cosine" go to `end`, in a line or in half a cosine.
        start: Rate after the warm-up, which rises linearly from start / warmup_steps.
        end: Rate at the end of the decay and after it.
        warmup_steps: Steps of the warm-up.
        decay_steps: Steps from `start` to `end`.
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
    """Return the decay of the moving average at a step, from 0. As in LDM's LitEma, it starts at 0.1 and rises."""
    return min(decay, (1.0 + step) / (10.0 + step))
