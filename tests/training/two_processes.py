"""What test_parallel.py starts twice under msrun: two steps of a linear model, each process with its own batch."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ldm.runtime.device import setup_runtime  # noqa: E402
from ldm.training.step import TrainStep  # noqa: E402
from tests.training.toy import Linear, batch, numbers, scalars  # noqa: E402

runtime = setup_runtime("CPU", use_parallel=True)

loss = Linear()
step = TrainStep(loss, [loss.w], clip=True, skip_overflow=True, process_count=runtime.process_count)
latents, noise = numbers(rows=8)
half = slice(4 * runtime.process_index, 4 * runtime.process_index + 4)
results = [step([batch(latents[half], noise[half])], scalars(t)) for t in (1, 2)]
spoilt = latents[half].copy()
if runtime.process_index == 1:
    spoilt[0, 0] = np.inf
before = step.state()["p.w"]
overflow = step([batch(spoilt, noise[half])], scalars(3))
assert not overflow.finite and np.array_equal(step.state()["p.w"], before)
np.savez(Path(sys.argv[1]) / f"process{runtime.process_index}.npz", norm=results[-1].gradient_norm, **step.state())
