"""What test_parallel.py starts twice under msrun, each process with its own batch.

Two steps of a linear model, and three steps of several arrays with the optimizer's state divided and not.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from mindspore import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ldm.runtime import peers  # noqa: E402
from ldm.runtime.device import setup_runtime  # noqa: E402
from ldm.training.step import TrainStep  # noqa: E402
from tests.training.toy import Linear, Product, batch, numbers, scalars  # noqa: E402

folder = Path(sys.argv[1])
runtime = setup_runtime("CPU", use_parallel=True)

loss = Linear()
step = TrainStep(loss, [loss.w], clip=True, skip_overflow=True, process_count=runtime.process_count)
latents, noise = numbers(rows=8)
half = slice(4 * runtime.process_index, 4 * runtime.process_index + 4)
results = [step([batch(latents[half], noise[half])], scalars(t)).read() for t in (1, 2)]
spoilt = latents[half].copy()
if runtime.process_index == 1:
    spoilt[0, 0] = np.inf
before = step.state()["p.w"]
overflow = step([batch(spoilt, noise[half])], scalars(3)).read()
assert not overflow.finite and np.array_equal(step.state()["p.w"], before)
np.savez(folder / f"process{runtime.process_index}.npz", norm=results[-1].gradient_norm, **step.state())


def several_arrays(sharded, steps, resume=None, in_fp16=0, copies=0):
    """Train steps (first, last) and write the parameters, and as the first process the training state.

    The first `in_fp16` arrays are computed with in fp16. Of the first `copies`, the small ones are fp16 copies.
    """
    rng = np.random.default_rng(0)
    starts = [rng.standard_normal(shape).astype(np.float32) for shape in ((4, 5), (3,), (6, 6), (2, 2), (5, 7))]
    loss = Product(starts, in_fp16)
    shard_of = runtime.process_index if sharded else None
    step = TrainStep(
        loss, list(loss.parameters), clip=True, use_ema=True, skip_overflow=True, large=20,
        process_count=runtime.process_count, shard_of=shard_of, read_in_fp16=loss.parameters[:copies],
    )  # fmt: skip
    if resume is not None:
        step.load_state(dict(np.load(folder / f"{resume}-state.npz")))
    empty = Tensor(np.zeros(1, np.float32))
    for t in range(steps[0], steps[1] + 1):
        gradients = np.random.default_rng((t, runtime.process_index)).standard_normal(sum(s.size for s in starts))
        step([(Tensor(gradients.astype(np.float32)), empty, empty, empty)], scalars(t, norm=5.0, decay=0.01))
    name = f"{'sharded' if sharded else 'whole'}{'-fp16' * (in_fp16 > 0)}{steps[0]}to{steps[1]}"
    np.savez(
        folder / f"{name}-process{runtime.process_index}.npz",
        moments=sum(m.size for m in step.whole.update.optimizer.m),
        **{parameter.name: parameter.asnumpy() for parameter in loss.parameters},
    )
    state = step.state()
    if runtime.process_index == 0:
        np.savez(folder / f"{name}-state.npz", **state)
    assert sharded is False or bool(state) == (runtime.process_index == 0)
    peers.gather()  # the others wait until the state is written


several_arrays(False, (1, 3))
several_arrays(True, (1, 3))
several_arrays(False, (1, 1))
several_arrays(True, (1, 1))
several_arrays(True, (2, 3), resume="whole1to1")
several_arrays(False, (2, 3), resume="sharded1to1")
several_arrays(False, (1, 3), in_fp16=3)
several_arrays(True, (1, 3), in_fp16=3, copies=3)
