"""The float64 forms of the optimizers against the packages that people use, over 200 steps.

tests/training/test_optimizers.py holds the training step to the same forms.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lion_pytorch import Lion
from prodigyopt import Prodigy
from schedulefree import AdamWScheduleFree
from transformers import Adafactor

from tests.training import optimizer_forms

SHAPES = ((2, 9), (7, 2), (2, 3, 3, 3), (5, 2, 1, 1), (6,), (20, 30))
CASES = {
    "AdamW": ("AdamW", torch.optim.AdamW, 1e-2, dict(weight_decay=0.1)),
    "Lion": ("Lion", Lion, 1e-3, dict(betas=(0.9, 0.99), weight_decay=0.1)),
    "Adafactor": ("Adafactor", Adafactor, 1e-2, dict(weight_decay=0.1, scale_parameter=False, relative_step=False)),
    "Adafactor, rates of its own": ("Adafactor", Adafactor, None, dict(scale_parameter=True, relative_step=True)),
    "Adafactor, a first moment": (
        "Adafactor", Adafactor, None,
        dict(beta1=0.9, clip_threshold=0.5, scale_parameter=False, relative_step=True, warmup_init=True),
    ),
    "AdamWScheduleFree": ("AdamWScheduleFree", AdamWScheduleFree, 1e-2, dict(weight_decay=0.1)),
    "AdamWScheduleFree, r": ("AdamWScheduleFree", AdamWScheduleFree, 1e-2, dict(r=1.0, weight_lr_power=1.0)),
    "Prodigy": ("Prodigy", Prodigy, 1.0, dict(weight_decay=0.1)),
    "Prodigy, safeguards": ("Prodigy", Prodigy, 1.0, dict(use_bias_correction=True, safeguard_warmup=True)),
    "Prodigy, slower": ("Prodigy", Prodigy, 1.0, dict(beta3=0.9, d0=1e-4, d_coef=2.0, growth_rate=1.05)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_form_equals_the_package(case):
    name, package, lr, options = CASES[case]
    rng = np.random.default_rng(0)
    starts = [rng.standard_normal(shape) for shape in SHAPES]
    options = {"weight_decay": 0.0, **options}
    form = getattr(optimizer_forms, name)(starts, **options)
    parameters = [torch.nn.Parameter(torch.tensor(start, dtype=torch.float64)) for start in starts]
    optimizer = package(parameters, lr=lr, **options)
    if name == "AdamWScheduleFree":
        optimizer.train()
    for i in range(200):
        noise = np.random.default_rng(100 + i)
        gradients = [p - 2.0 + noise.standard_normal(p.shape) for p in form.p]
        rate = None if lr is None else lr * min(1.0, (i + 1) / 20)
        for group in optimizer.param_groups:
            group["lr"] = rate
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        form.step(gradients, rate)
    for parameter, expected in zip(parameters, form.p):
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-7, atol=1e-9)
    if name == "AdamWScheduleFree":
        optimizer.eval()
        for parameter, expected in zip(parameters, form.x):
            np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-7, atol=1e-9)
    if name == "Prodigy":
        assert optimizer.param_groups[0]["d"] == pytest.approx(form.d, rel=1e-9)
