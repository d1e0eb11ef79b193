"""Write tests/golden/adamw.npz: 20 updates of torch.optim.AdamW on known gradients, the rate changing every step.

python tests/golden/make_adamw.py        (torch 2.13.0)
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

SHAPES = ((4, 3, 3, 3), (5,), (7, 2), (1,))
UPDATES, BETAS, EPSILON, WEIGHT_DECAY = 20, (0.9, 0.98), 1e-8, 0.01


def main() -> None:
    rng = np.random.default_rng(0)
    arrays = {f"start{i}": rng.standard_normal(shape).astype(np.float32) for i, shape in enumerate(SHAPES)}
    # small gradients too, where epsilon counts
    for i, shape in enumerate(SHAPES):
        size = 10.0 ** rng.uniform(-8, 1, (UPDATES, *[1] * len(shape)))
        arrays[f"gradients{i}"] = (rng.standard_normal((UPDATES, *shape)) * size).astype(np.float32)
    arrays["rates"] = 1e-2 * np.cos(np.linspace(0, 1.5, UPDATES))
    parameters = [torch.nn.Parameter(torch.tensor(arrays[f"start{i}"])) for i in range(len(SHAPES))]
    optimizer = torch.optim.AdamW(parameters, betas=BETAS, eps=EPSILON, weight_decay=WEIGHT_DECAY)
    for update in range(UPDATES):
        for group in optimizer.param_groups:
            group["lr"] = float(arrays["rates"][update])
        for i, parameter in enumerate(parameters):
            parameter.grad = torch.tensor(arrays[f"gradients{i}"][update])
        optimizer.step()
        for i, parameter in enumerate(parameters):
            arrays[f"after{update}_{i}"] = parameter.detach().numpy().copy()
    np.savez_compressed(Path(__file__).with_name("adamw.npz"), **arrays)


if __name__ == "__main__":
    main()
