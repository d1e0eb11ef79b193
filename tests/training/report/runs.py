"""Output folders as a training writes them, without a training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.settings.read import save_settings
from ldm.settings.train import TrainSettings
from ldm.training.metrics_file import Metrics, MetricsFile

HOSTILE = "</script><script>document.title='run'</script>\"'><img src=http://example.com/x onerror=alert(1)> \u202eabc"
FACTS = {
    "run": {"steps": 120, "steps_per_epoch": 10.0},
    "model": {"architecture": "nano", "trained_parameters": 1234567},
    "data": {"layouts": ["image_text_csv"], "rows": 40, "subsets": 1, "buckets": [[64, 64, 30], [48, 80, 10]]},
    "environment": {"device": "CPU in fp32", "MindSpore": "2.8.0"},
    "sessions": [
        {"began": "2026-01-01 10:00:00 UTC", "first_step": 1, "last_step": 120, "first_step_seconds": 9.0,
         "seconds": 70.0, "peak_memory": 2_300_000_000, "ended": "finished", "written": "2026-01-01 10:01:10 UTC"},
    ],
}  # fmt: skip


def write_metrics(folder: Path, steps: int = 120, seed: int = 0, overflows: tuple[int, ...] = ()) -> list[Metrics]:
    """Write metrics.csv and return its rows. Step 1 takes 9 s, the others 0.5 s."""
    folder.mkdir(parents=True, exist_ok=True)
    noise, scale, rows = np.random.default_rng(seed).normal(0, 0.02, (steps, 2)), 1024.0, []
    for step in range(1, steps + 1):
        loss, norm = 0.2 + 0.5 * np.exp(-step / 20) + noise[step - 1, 0], 0.3 + noise[step - 1, 1]
        norm = float("inf") if step in overflows else float(norm)
        rows.append(Metrics(step, float(loss), 1e-3 * (1 - step / steps / 2), scale if overflows else 1.0,
                            9.0 if step == 1 else 0.5, norm))  # fmt: skip
        scale /= 2 if step in overflows else 1
    file = MetricsFile(folder / "metrics.csv", 0)
    for row in rows:
        file.write(row)
    file.close()
    return rows


def write_validation(folder: Path, steps: tuple[int, ...] = (0, 40, 80, 120)) -> None:
    """Write validation.csv. The best step is the last but one."""
    lines = ["step,images,loss,loss_200,loss_800"]
    for place, step in enumerate(steps):
        worse = 0.05 if place == len(steps) - 1 else 0.0
        low, high = 0.1 + 0.2 / (place + 1) + worse, 0.5 + 0.3 / (place + 1) + worse
        lines.append(f"{step},validation,{(low + high) / 2:.10g},{low:.10g},{high:.10g}")
        lines.append(f"{step},training,{(low + high) / 2 - 0.04:.10g},{low - 0.04:.10g},{high - 0.04:.10g}")
    (folder / "validation.csv").write_text("\n".join(lines) + "\n")


def write_samples(folder: Path, prompts: tuple[str, ...], steps: tuple[int, ...] = (0, 40, 80, 120)) -> None:
    """Write sample images of 16 pixels, which become brighter, and prompts.txt."""
    (folder / "samples").mkdir()
    (folder / "samples" / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    for number in range(1, len(prompts) + 1):
        of_prompt = folder / "samples" / f"prompt-{number:02d}"
        of_prompt.mkdir()
        for step in steps:
            Image.new("RGB", (16, 16), (step, 40 * number % 256, 90)).save(of_prompt / f"step-{step:08d}.png")


def write_run(folder: Path, *, seed: int = 0, prompts: tuple[str, ...] = ("a red apple",), **settings: Any) -> Path:
    """Write all that a run of 120 steps leaves for a report."""
    write_metrics(folder, seed=seed)
    write_validation(folder)
    write_samples(folder, prompts)
    save_settings(TrainSettings(**{"output_path": str(folder.name), "use_lora": True, **settings}),
                  folder / "train_args.yaml", leave_out=("train_config", "resume", "cache_only"))  # fmt: skip
    (folder / "run.json").write_text(json.dumps(FACTS))
    return folder
