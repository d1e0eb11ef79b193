"""How long a run is and when it saves."""

from __future__ import annotations

from dataclasses import dataclass

from ldm.settings.train import TrainSettings


@dataclass(frozen=True)
class RunPlan:
    """Length of a run in steps. A step is one optimizer update from gradient_accumulation_steps micro-batches."""

    steps: int
    steps_per_epoch: float  # not whole if gradient_accumulation_steps does not divide the batches of an epoch
    warmup_steps: int  # of the learning rate
    decay_steps: int  # of the learning rate
    save_every: float

    def is_save_step(self, steps_done: int) -> bool:
        """Whether a checkpoint is saved after this many steps: at every interval, and at the end."""
        return steps_done == self.steps or completes_interval(steps_done, self.save_every)


def completes_interval(steps_done: int, every: float) -> bool:
    """Whether the newest step completes an interval of `every` steps, which need not be a whole number."""
    intervals, intervals_before = (int(step / every + 1e-9) for step in (steps_done, steps_done - 1))
    return intervals > intervals_before


def make_plan(settings: TrainSettings, batches_per_epoch: int) -> RunPlan:
    """Compute the length of a run. `batches_per_epoch` counts the micro-batches of one process."""
    steps_per_epoch = batches_per_epoch / settings.gradient_accumulation_steps
    steps = settings.max_steps or max(1, int(settings.epochs * steps_per_epoch))
    interval = settings.ckpt_save_interval * (1.0 if settings.step_mode else steps_per_epoch)
    warmup = settings.warmup_steps
    warmup_steps = int(warmup * steps if warmup < 1 else warmup)
    return RunPlan(
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        warmup_steps=warmup_steps,
        decay_steps=settings.decay_steps or max(1, steps - warmup_steps),
        save_every=max(1.0, interval),
    )
