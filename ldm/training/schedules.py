"""The learning rate and the decay of the moving average, as functions of the step alone."""

from __future__ import annotations

import math


def learning_rate(
    step: int,
    *,
    scheduler: str,
    start: float,
    end: float,
    warmup_steps: int,
    decay_steps: int,
    cycles: int = 1,
    power: float = 1.0,
) -> float:
    """Return the learning rate of a step.

    Args:
        step: Number of the step, from 0.
        scheduler: "constant" stays at `start`. The others go to `end`: "linear" in a line, "cosine" in half a cosine,
            "cosine_with_restarts" in `cycles` halves of a cosine, each from `start`, and "polynomial" by the share of
            steps that is left, to a power.
        start: Rate after the warm-up, which rises linearly from start / warmup_steps.
        end: Rate at the end of the decay and after it.
        warmup_steps: Steps of the warm-up.
        decay_steps: Steps from `start` to `end`.
        cycles: See "cosine_with_restarts".
        power: See "polynomial".
    """
    if step < warmup_steps:
        return start * (step + 1) / warmup_steps
    if scheduler == "constant":
        return start
    done = min(1.0, (step - warmup_steps) / max(1, decay_steps))
    if scheduler == "linear":
        return start + (end - start) * done
    if scheduler == "polynomial":
        return end + (start - end) * (1.0 - done) ** power
    if scheduler == "cosine":
        return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * done))
    if scheduler == "cosine_with_restarts":
        # Not cycles * done, which for 49 cycles is below 1 where the second begins.
        done_of_cycle = 1.0 if done == 1.0 else cycles * (step - warmup_steps) / max(1, decay_steps) % 1.0
        return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * done_of_cycle))
    raise ValueError(f"unknown scheduler {scheduler!r}")


def ema_decay_at(step: int, decay: float) -> float:
    """Return the decay of the moving average at a step, from 0. As in LDM's LitEma, it starts at 0.1 and rises."""
    return min(decay, (1.0 + step) / (10.0 + step))
