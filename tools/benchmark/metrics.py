"""Measure images per second of the FID's features: this project, pytorch-fid and torchmetrics on the same CPU.

    python -m venv /somewhere && /somewhere/bin/pip install torch torchvision pytorch-fid 'torchmetrics[image]'
    python tools/benchmark/metrics.py --reference_python /somewhere/bin/python

Each runs in its own process on the same PNG files, from the file to the 2,048 features, with random weights, which cost
the same. Images have the memory layout of torchvision's transforms and PyTorch's loader. With channels_last, which
users may choose, both references were 1.3 to 1.4 times as fast when this was written. The three take turns, so that
other programs on the machine slow all of them. CPU seconds are measured too, which other programs affect less. The
first round, which compiles graphs, is not counted. taskset chooses the cores.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ldm.errors import UserError  # noqa: E402
from ldm.files.atomic import temporary_folder  # noqa: E402
from ldm.runtime.script import run_script  # noqa: E402
from ldm.settings.declare import MAX_NETWORK_BATCH, setting  # noqa: E402
from ldm.settings.read import read_settings  # noqa: E402
from tools.benchmark.worker import Measurement, take_turns  # noqa: E402


@dataclass
class Settings:
    """The command line."""

    reference_python: Optional[str] = setting(
        None, "a Python with torch, pytorch-fid, torchmetrics and torch-fidelity", path=True
    )
    images: int = setting(64, "images in a round", low=1, high=100_000)
    size: int = setting(256, "width and height in pixels", low=1, high=8192)
    batch_size: int = setting(32, "images in a call of the network", low=1, high=MAX_NETWORK_BATCH)
    rounds: int = setting(3, "counted rounds", low=1)


def main(argv: Sequence[str] | None = None) -> None:
    args = read_settings(Settings, argv, description=__doc__)
    pythons = {"this project": sys.executable}
    if args.reference_python:
        pythons.update({"pytorch-fid": args.reference_python, "torchmetrics": args.reference_python})
    cores = os.sched_getaffinity(0)
    with temporary_folder(Path(tempfile.gettempdir()) / "metrics") as folder:
        rng = np.random.default_rng(0)
        for i in range(args.images):
            coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
            coarse.resize((args.size, args.size), Image.Resampling.BICUBIC).save(folder / f"{i:05d}.png")
        rest = [str(folder), str(args.batch_size)]
        commands = {
            name: [python, "-m", "tools.benchmark.metrics_worker", name, *rest] for name, python in pythons.items()
        }
        print(f"measuring {', '.join(commands)} ...", file=sys.stderr, flush=True)
        measured = take_turns(commands, 1 + args.rounds, cores, limit_gb=float("inf"))
    sides = {name: side for name, side in measured.items() if isinstance(side, Measurement)}
    for name in measured.keys() - sides.keys():
        raise UserError(f"{name} {measured[name]}: check that {pythons[name]} has the packages that -h names")
    print(
        f"{args.images} PNG files of {args.size}x{args.size}, batches of {args.batch_size}, {len(cores)} core(s), "
        f"best and median of {args.rounds} rounds in turns"
    )
    print("| | images/s, best | images/s, median | images per processor second, best | first round, s | peak MB |")
    print("|---|---|---|---|---|---|")
    for name, side in sides.items():
        print(
            f"| {name} | {args.images / min(side.seconds):.2f} | {args.images / float(np.median(side.seconds)):.2f} | "
            f"{args.images / min(side.cpu_seconds):.2f} | {side.first:.1f} | {side.memory_gb * 1024:.0f} |"
        )


if __name__ == "__main__":
    run_script(main)
