"""run.json: what a run knows beside its settings and its metrics. Model, data, environment, and each of its starts."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from typing import TYPE_CHECKING, Any, Optional

import mindspore as ms
import numpy as np
import PIL

from ldm.data.sources.row_file import RowFile
from ldm.data.training_data import TrainingData
from ldm.runtime.processor import cpuinfo
from ldm.runtime.versions import package_version
from ldm.training.checks import image_size

if TYPE_CHECKING:
    from ldm.training.setup import Run

MOST_CAPTIONS = 20_000  # that are looked at: 1 us each, and 20 us in a RowFile
MOST_BUCKETS = 100


def describe_run(run: Run) -> dict[str, Any]:
    """Return what does not change from start to start: length, model, data, environment, and what the run writes."""
    plan, config = run.plan, run.model.config
    return {
        "run": {"steps": plan.steps, "steps_per_epoch": plan.steps_per_epoch, "warmup_steps": plan.warmup_steps},
        "model": {
            "architecture": config.architecture,
            "predicts": config.prediction_type,
            "image_size": image_size(run.settings, config),
            "base_model": run.fingerprint["base"],
            "trained_parameters": sum(parameter.size for parameter in run.model.trainable_params()),
        },
        "data": {
            **describe_data(run.inputs.data, run.fingerprint["data"]),
            "validated": 0 if run.validation is None else len(run.validation.images["validation"]),
        },
        "environment": describe_environment(run),
        "parts": parts_of(run),
    }


def parts_of(run: Run) -> list[str]:
    """Return which of records.PARTS the run writes. An earlier one may have left others in the folder."""
    return ["validation"] * (run.validation is not None) + ["samples"] * bool(run.samples.prompts)


def describe_data(data: TrainingData, fingerprint: str) -> dict[str, Any]:
    """Return the figures of a data set that cost nothing."""
    buckets = data.buckets
    counts = np.bincount(buckets.of_row, minlength=len(buckets.sizes))
    looked_at = min(len(data), MOST_CAPTIONS)
    captions = [data.text(row) for row in range(looked_at)]
    class_images = 0
    if any(subset.is_reg for subset in data.subsets) and not isinstance(data.rows, RowFile):
        class_images = sum(data.subsets[row.subset].is_reg for row in data.rows)
    sizes = [[*map(int, size), int(count)] for size, count in zip(buckets.sizes, counts) if count]
    described = {
        "layouts": sorted({subset.layout for subset in data.subsets}),
        "rows": len(data),
        "class_images": class_images,
        "masks": 0 if data.masks is None else sum(mask is not None for mask in data.masks),
        "subsets": len(data.subsets),
        "samples": int(buckets.repeats.sum()),
        "captions": len(set(captions)),
        "empty_captions": sum(not caption.strip() for caption in captions),
        "buckets": sorted(sizes, key=lambda size: -size[2])[:MOST_BUCKETS],
        "hash": fingerprint,
    }
    if looked_at < len(data):
        described["captions_of"] = looked_at
    return described


def describe_environment(run: Run) -> dict[str, Any]:
    """Return versions and hardware. Neither the host's name nor the user's is among them."""
    runtime = run.runtime
    return {
        "device": f"{runtime.device} in {runtime.precision}",
        "processes": runtime.process_count,
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.machine()}",
        "version": package_version() or "a checkout, not installed",
        "MindSpore": ms.__version__,
        "Python": platform.python_version(),
        "NumPy": np.__version__,
        "Pillow": PIL.__version__,
    }


def _processor() -> str:
    """Return the processor's name, as Linux knows it."""
    info = cpuinfo()
    return info.get("model name") or info.get("Model") or platform.processor() or platform.machine()


def begin_session(step: int) -> dict[str, Any]:
    """Return the record of a start that continues after `step`."""
    return {
        "began": now(),
        "first_step": step + 1,
        "last_step": step,
        "first_step_seconds": None,
        "seconds": 0.0,
        "peak_memory": None,
        "device_peak_memory": None,
        "ended": "running",
        "written": now(),
    }


def now() -> str:
    """Return the time with its zone."""
    return time.strftime("%Y-%m-%d %H:%M:%S %Z").strip()


def peak_memory() -> int:
    """Return the most memory in bytes that this process had at once."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def device_peak_memory(is_ascend: bool) -> Optional[int]:
    """Return the most bytes that were allocated on an Ascend device at once, None on the CPU."""
    return int(ms.runtime.max_memory_allocated()) if is_ascend else None
