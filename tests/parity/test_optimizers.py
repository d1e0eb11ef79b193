"""The float64 forms of the optimizers against the packages that people use, over 200 steps; defaults and schedules.

tests/training/test_optimizers.py holds the training step to the same forms.
"""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from diffusers.optimization import get_scheduler
from lion_pytorch import Lion
from prodigyopt import Prodigy
from schedulefree import AdamWScheduleFree
from transformers import Adafactor

from ldm.training import optimizers
from ldm.training.schedules import learning_rate
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


# What differs from a package's defaults, each said in docs/optimizers.md.
OWN_DEFAULTS = {
    "Adafactor": {"scale_parameter": False, "relative_step": False},
    "AdamWScheduleFree": {"weight_decay": 0.01},
}


@pytest.mark.parametrize("name, package", {name: package for name, package, *_ in CASES.values()}.items())
def test_the_defaults_are_those_of_the_package(name, package):
    given = {key: value.default for key, value in inspect.signature(package).parameters.items()}
    own = vars(getattr(optimizers, name)())
    differ = {key: value for key, value in own.items() if given[key] != value}
    assert differ == OWN_DEFAULTS.get(name, {})


@pytest.mark.parametrize(
    "scheduler, name, options",
    [
        ("constant", "constant_with_warmup", {}),
        ("linear", "linear", {}),
        ("cosine", "cosine", {}),
        ("cosine_with_restarts", "cosine_with_restarts", {"num_cycles": 3}),
        ("polynomial", "polynomial", {"power": 2.0}),
    ],
)
@pytest.mark.parametrize("warmup", [0, 5])
def test_a_schedule_is_that_of_diffusers(scheduler, name, options, warmup):
    """Its warm-up begins at 0, at which nothing is trained. Ours is one step ahead of it."""
    start, end, steps = 2e-3, 1e-7 if scheduler == "polynomial" else 0.0, 40
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=start)
    schedule = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps, **options)
    expected = []
    for _ in range(steps + 1):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    for step in range(steps):  # its cosine rises again after the last step
        rate = learning_rate(
            step, scheduler=scheduler, start=start, end=end, warmup_steps=warmup, decay_steps=steps - warmup,
            cycles=options.get("num_cycles", 1), power=options.get("power", 1.0),
        )  # fmt: skip
        assert rate == pytest.approx(expected[step + (step < warmup)], rel=1e-9, abs=1e-15), step
