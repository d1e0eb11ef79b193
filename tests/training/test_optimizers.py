"""Each optimizer against its float64 form over 200 steps; skipped steps, states, averages and unequal rates."""

from __future__ import annotations

import numpy as np
import pytest
from mindspore import Tensor

from ldm.runtime.device import setup_runtime
from ldm.training import optimizers
from ldm.training.step import StepScalars, TrainStep, state_shapes
from tests.training import optimizer_forms
from tests.training.toy import Product

STEPS = 200
SKIPPED = (0, 77)  # steps whose gradients overflow
# A linear layer's factors, a convolution's, a scale and a bias in the flat array, and a matrix by itself.
SHAPES = ((2, 9), (7, 2), (2, 3, 3, 3), (5, 2, 1, 1), (1,), (6,), (20, 30))
LARGE = 500
CASES = {
    "AdamW": ("AdamW", dict(weight_decay=0.1)),
    "Lion": ("Lion", dict(weight_decay=0.1)),
    "Adafactor": ("Adafactor", dict(weight_decay=0.1)),
    "Adafactor, sizes and rates of its own": (
        "Adafactor", dict(weight_decay=0.1, scale_parameter=True, relative_step=True),
    ),
    "Adafactor, a rising rate and a first moment": (
        "Adafactor", dict(beta1=0.9, clip_threshold=0.5, relative_step=True, warmup_init=True),
    ),
    "AdamWScheduleFree": ("AdamWScheduleFree", dict(weight_decay=0.1)),
    "AdamWScheduleFree, weights that grow": ("AdamWScheduleFree", dict(r=1.0, weight_lr_power=1.0, betas=(0.95, 0.99))),
    "Prodigy": ("Prodigy", dict(weight_decay=0.1)),
    "Prodigy, as in diffusers": ("Prodigy", dict(weight_decay=1e-2, use_bias_correction=True, safeguard_warmup=True)),
    "Prodigy, slower": ("Prodigy", dict(betas=(0.9, 0.99), beta3=0.9, d0=1e-4, d_coef=2.0, growth_rate=1.05)),
}  # fmt: skip
NAMES = sorted({name for name, _ in CASES.values()})
RATES = {"AdamW": 1e-2, "Lion": 1e-3, "Adafactor": 1e-2, "AdamWScheduleFree": 1e-2, "Prodigy": 1.0}


@pytest.fixture(autouse=True)
def set_up(graph_mode):
    setup_runtime("CPU")


def starts(scale=1.0):
    rng = np.random.default_rng(0)
    return [(scale * rng.standard_normal(shape)).astype(np.float32) for shape in SHAPES]


def gradients(t, points=None):
    """Random gradients of a distance from points to a target, so that Prodigy finds how far it is."""
    rng = np.random.default_rng(100 + t)
    points = starts() if points is None else points
    return [(point - 2.0 + rng.standard_normal(point.shape)).astype(np.float32) for point in points]


def make_step(name, options=None, start=1.0, **others):
    optimizer = getattr(optimizers, name)(**(options or {}))
    loss = Product(starts(start))
    step = TrainStep(
        loss, list(loss.parameters), optimizer=optimizer, skip_overflow=True, **{"large": LARGE, **others}
    )  # fmt: skip
    return step


def train_one(step, t, lr, arrays, ema_rate=0.25):
    """Train one step, the t-th that is applied, from 1."""
    empty = Tensor(np.zeros(1, np.float32))
    packed = Tensor(np.concatenate([array.ravel() for array in arrays]))
    scalars = StepScalars(1.0, 1.0, 1e9, step.optimizer.numbers(t, lr), ema_rate)
    return step([(packed, empty, empty, empty)], scalars).read()


def averaging(name):
    """Whether to train an optimizer with a moving average: all but the one that has its own."""
    return name != "AdamWScheduleFree"


def rate_at(name, step):
    return RATES[name] * min(1.0, (step + 1) / 20)  # with a warm-up


@pytest.mark.parametrize("case", CASES)
def test_an_optimizer_equals_its_form_and_a_skipped_step_changes_nothing(case):
    name, options = CASES[case]
    # Prodigy's first steps are of 1e-6. From a parameter of 1, fp32 would round them by a tenth, and with them the
    # estimate of d. LoRA's up matrices start at 0 too.
    start = 0.0 if name == "Prodigy" else 1.0
    step, form = make_step(name, options, start), getattr(optimizer_forms, name)(starts(start), **options)
    for i in range(STEPS):
        arrays, lr = gradients(i, form.p), rate_at(name, i)
        if i in SKIPPED:
            before = step.state()
            arrays[1][0, 0] = np.inf
            assert not train_one(step, form.t + 1, lr, arrays).finite
            for key, array in step.state().items():
                np.testing.assert_array_equal(array, before[key], err_msg=key)
        else:
            assert train_one(step, form.t + 1, lr, arrays).finite
            form.step(arrays, lr)
    state = step.state()
    shapes = state_shapes(step.parameters, False, step.optimizer)
    assert {key: array.shape for key, array in state.items()} == shapes
    for group in ("p", *form.groups):
        largest = max(np.abs(expected).max() for expected in getattr(form, group))
        for i, expected in enumerate(getattr(form, group)):
            array = state[f"{group}.p{i}"]
            np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-5 * largest, err_msg=f"{group}.p{i}")
    for scalar in form.scalars:
        # Terms of both signs cancel in the numerator: 2.7e-5 was measured where d itself is right to 1e-5.
        rel = 1e-4 if scalar == "d_numerator" else 1e-5
        assert state[f"optimizer.{scalar}"][0] == pytest.approx(getattr(form, scalar), rel=rel), scalar
    if name == "Prodigy":
        assert form.d > 10 * form.d0  # it has found a rate
    assert max(np.abs(p - start).max() for p, start in zip(form.p, starts(start))) > 1e-4


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_skipped_steps_leave_no_trace_whenever_results_are_read(name, micro_batches):
    """In the state, nor in what the next steps make of it: with accumulation, the totals begin again."""
    step = make_step(name, use_ema=averaging(name), micro_batches=micro_batches)
    start = step.state()
    outcomes = [True, False, False, True, False, True]

    def launch(i, t, after_overflow):
        """Launch step i: as the t-th update, or as the `after_overflow`-th if the step before it was skipped."""
        scalars, others = (
            StepScalars(1.0, 1.0 / micro_batches, 1e9, step.optimizer.numbers(count, rate_at(name, i)), 0.25)
            for count in (t, after_overflow)
        )
        batches = [np.concatenate([g.ravel() for g in gradients(10 * i + k)]) for k in range(micro_batches)]
        if not outcomes[i]:
            batches[-1][-1] = np.inf
        empty = Tensor(np.zeros(1, np.float32))
        return step([(Tensor(packed), empty, empty, empty) for packed in batches], scalars, (), others)

    t = 1
    for i, finite in enumerate(outcomes):
        before = step.state()
        assert launch(i, t, t).read().finite == finite
        if finite:
            t += 1
        else:
            assert_same(step.state(), before)
    expected = step.state()

    step.load_state(start)
    for t, i in enumerate(np.flatnonzero(outcomes), 1):
        launch(i, t, t).read()
    assert_same(step.state(), expected)

    step.load_state(start)
    results = []
    for i in range(len(outcomes)):
        known = sum(outcomes[: max(0, i - 1)])  # updates before the step whose result is not read
        results.append(launch(i, known + 1 + (i > 0), known + 1))
    assert [result.read().finite for result in results] == outcomes
    assert_same(step.state(), expected)


def assert_same(state, expected):
    assert list(state) == list(expected)
    for key, array in state.items():
        np.testing.assert_array_equal(array, expected[key], err_msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_continues_bit_for_bit(name):
    step = make_step(name)
    for t in range(1, 5):
        train_one(step, t, rate_at(name, t), gradients(t))
        if t == 2:
            half = step.state()
    other = make_step(name)
    other.load_state(half)
    for t in (3, 4):
        train_one(other, t, rate_at(name, t), gradients(t))
    for key, array in step.state().items():
        np.testing.assert_array_equal(other.state()[key], array, err_msg=key)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "AdamW"])
def test_how_arrays_are_grouped_changes_rounding_at_most(name):
    states = []
    for large in (10**6, 1):
        step = make_step(name, large=large)
        for t in (1, 2, 3):
            train_one(step, t, RATES[name], gradients(t))
        states.append(step.state())
    assert list(states[0]) == list(states[1])
    for key, array in states[0].items():
        np.testing.assert_allclose(states[1][key], array, rtol=2e-6, atol=1e-7 * np.abs(array).max(), err_msg=key)


@pytest.mark.parametrize("name", ["Lion", "Adafactor", "Prodigy"])
def test_the_moving_average_follows(name):
    step = make_step(name, use_ema=True)
    expected = starts()
    for t in (1, 2):
        train_one(step, t, RATES[name], gradients(t), ema_rate=0.25)
        state = step.state()
        expected = [x + 0.25 * (state[f"p.p{i}"] - x) for i, x in enumerate(expected)]
    for i, array in enumerate(expected):
        np.testing.assert_allclose(step.optimizer.sampled(state)[f"p{i}"], array, rtol=1e-6, atol=1e-7)


def test_schedule_free_samples_with_the_averaged_point():
    step, form = make_step("AdamWScheduleFree"), optimizer_forms.AdamWScheduleFree(starts())
    for t in range(1, 11):
        train_one(step, t, 0.01, gradients(t))
        form.step(gradients(t), 0.01)
    sampled = step.optimizer.sampled(step.state())
    for i, x in enumerate(form.x):
        assert sampled[f"p{i}"].dtype == np.float32
        np.testing.assert_allclose(sampled[f"p{i}"], x, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="averages the parameters itself"):
        make_step("AdamWScheduleFree", use_ema=True)


@pytest.mark.parametrize("name", ["AdamW", "Lion", "Adafactor", "AdamWScheduleFree"])
def test_unequal_rates_are_those_of_trainings_at_each_rate(name):
    """The optimizers look at each parameter by itself. The gradients do not depend on the parameters."""
    factors = {"p0": 0.25, "p3": 0.5, "p5": 0.0625, "p6": 0.25}
    step = make_step(name, rate_factors=factors)
    alone = {factor: make_step(name) for factor in (1.0, 0.5, 0.25, 0.0625)}
    for t in (1, 2, 3):
        train_one(step, t, RATES[name], gradients(t))
        for factor, other in alone.items():
            train_one(other, t, factor * RATES[name], gradients(t))
    assert set(step.state()) == set(alone[1.0].state())
    for i in range(len(SHAPES)):
        expected = alone[factors.get(f"p{i}", 1.0)].state()[f"p.p{i}"]
        np.testing.assert_allclose(step.state()[f"p.p{i}"], expected, rtol=1e-6, atol=1e-7)


def test_equal_rates_build_the_graph_without_factors():
    assert make_step("AdamW", rate_factors={"p0": 1.0, "p1": 1.0}).update_cell.factors is None
    with pytest.raises(ValueError, match="one learning rate"):
        make_step("Prodigy", rate_factors={"p0": 0.5})


def test_unequal_rates_with_a_moving_average_and_a_skipped_step():
    step = make_step("AdamW", rate_factors={"p0": 0.5}, use_ema=True)
    train_one(step, 1, 0.01, gradients(1), ema_rate=0.5)
    state = step.state()
    np.testing.assert_allclose(state["ema.p0"], (starts()[0] + state["p.p0"]) / 2, rtol=1e-6, atol=1e-7)
    spoilt = gradients(2)
    spoilt[0][0, 0] = np.nan
    assert not train_one(step, 2, 0.01, spoilt).finite
    for key, array in step.state().items():
        np.testing.assert_array_equal(array, state[key], err_msg=key)
