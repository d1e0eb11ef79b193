"""How long a run is and when it saves."""

from __future__ import annotations

from dataclasses import dataclass

from ldm.settings.train import TrainSettings


@dataclass(frozen=True)
class RunPlan:
    """Length of a run in steps. A step is one optimizer update from gradient_accumulation_steps micro-batches.

    Attributes:
        steps: Steps of the run.
        steps_per_epoch: Not whole where gradient_accumulation_steps does not divide the batches of an epoch.
        decay_steps: Steps over which the learning rate decays.
        save_every: Steps between two checkpoints.
    """

    steps: int
    steps_per_epoch: float
    decay_steps: int
    save_every: float

    def is_save_step(self, steps_done: int) -> bool:
        """Whether a checkpoint is saved after this many steps: at every interval, and at the end."""
        intervals, intervals_before = (int(step / self.save_every + 1e-9) for step in (steps_done, steps_done - 1))
        return steps_done == self.steps or intervals > intervals_before


def make_plan(settings: TrainSettings, batches_per_epoch: int) -> RunPlan:
    """Work out the length of a run.

    Args:
        settings: Settings of the run.
        batches_per_epoch: Micro-batches of each process in one pass over the data.
    """
    steps_per_epoch = batches_per_epoch / settings.gradient_accumulation_steps
    steps = settings.max_steps or max(1, int(settings.epochs * steps_per_epoch))
    interval = settings.ckpt_save_interval * (1.0 if settings.step_mode else steps_per_epoch)
    return RunPlan(
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        decay_steps=settings.decay_steps or max(1, steps - settings.warmup_steps),
        save_every=max(1.0, interval),
    )
