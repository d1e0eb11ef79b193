"""How long a run is and when it saves, worked out once from settings and data."""

from __future__ import annotations

from dataclasses import dataclass

from ldm.settings.train import TrainSettings


@dataclass(frozen=True)
class RunPlan:
    """Counts of updates (optimizer steps, each of gradient_accumulation_steps batches)."""

    updates: int
    steps_per_epoch: float  # not whole where accumulation does not divide the batches of an epoch
    decay_steps: int
    save_every: float

    def is_save_step(self, done: int) -> bool:
        """Whether to save when `done` updates are done: at every interval, and at the end."""
        passed, passed_before = (int(step / self.save_every + 1e-9) for step in (done, done - 1))
        return done == self.updates or passed > passed_before


def make_plan(config: TrainSettings, batches_per_epoch: int) -> RunPlan:
    """batches_per_epoch: micro-steps that one pass over the data takes on each rank."""
    steps_per_epoch = batches_per_epoch / config.gradient_accumulation_steps
    updates = config.max_steps or max(1, int(config.epochs * steps_per_epoch))
    interval = config.ckpt_save_interval * (1.0 if config.step_mode else steps_per_epoch)
    return RunPlan(
        updates=updates,
        steps_per_epoch=steps_per_epoch,
        decay_steps=config.decay_steps or max(1, updates - config.warmup_steps),
        save_every=max(1.0, interval),
    )
