"""The figures of a run that stand at the top of its page and in a comparison."""

from __future__ import annotations

from typing import NamedTuple, Optional

import numpy as np

from ldm.training.report.records import RunRecord, overflows, smoothed, smoothing_span


class Figures(NamedTuple):
    """What a run came to. None where it is not known."""

    steps_done: int
    steps: Optional[int]  # planned
    loss: Optional[float]  # mean of the last steps
    span: int  # steps that the mean is over
    best: Optional[tuple[int, float]]  # step and validation loss
    last_validation: Optional[float]
    seconds: Optional[float]  # of all steps, with compilation
    step_seconds: Optional[float]  # median, without those that compile
    compile_seconds: Optional[float]  # of the first steps of all sessions, beyond the median
    memory: Optional[float]  # bytes, the largest of the process
    device_memory: Optional[float]  # bytes, the largest on the device
    overflows: int


def figures(record: RunRecord) -> Figures:
    """Return the figures of a run."""
    metrics, steps = record.metrics, record.steps
    planned = _number(record.section("run").get("steps"))
    span = smoothing_span(len(steps))
    loss = smoothed(metrics["loss"], span) if "loss" in metrics and len(steps) else np.zeros(0)
    seconds = metrics.get("seconds", np.zeros(0))
    first = compiles(record)
    later = seconds[~first & np.isfinite(seconds)] if len(seconds) else seconds
    median = float(np.median(later)) if len(later) else None
    compiling = float(np.sum(np.maximum(seconds[first] - median, 0))) if median is not None and first.any() else None
    validation = record.validation.get("validation")
    return Figures(
        steps_done=int(steps[-1]) if len(steps) else 0,
        steps=None if planned is None else int(planned),
        loss=float(loss[-1]) if len(loss) and np.isfinite(loss[-1]) else None,
        span=span,
        best=record.best,
        last_validation=float(validation.mean[-1]) if validation is not None and len(validation.mean) else None,
        seconds=float(np.nansum(seconds)) if len(seconds) else None,
        step_seconds=median,
        compile_seconds=compiling,
        memory=_largest(record, "peak_memory"),
        device_memory=_largest(record, "device_peak_memory"),
        overflows=int(overflows(metrics).sum()),
    )


def compiles(record: RunRecord) -> np.ndarray:
    """Return which steps (N,) bool of metrics.csv are the first of a start, whose time has the compilation in it."""
    known = (_number(session.get("first_step")) for session in record.sessions)
    return np.isin(record.steps, [step for step in known if step is not None] or [1])


def _largest(record: RunRecord, name: str) -> Optional[float]:
    values = [value for session in record.sessions if (value := _number(session.get(name))) is not None]
    return max(values, default=None)


def _number(value: object) -> Optional[float]:
    """Return a number of run.json, None if it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value):
        return None
    return float(value)
