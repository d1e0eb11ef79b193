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

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ldm.errors import UserError  # noqa: E402
from ldm.files.atomic import temporary_folder  # noqa: E402
from ldm.runtime.script import run_script  # noqa: E402
from ldm.settings.declare import MAX_NETWORK_BATCH, setting  # noqa: E402
from ldm.settings.read import read_settings  # noqa: E402

NAMES = ("this project", "pytorch-fid", "torchmetrics")


def this_project(paths: list[Path], batch_size: int) -> Callable[[], None]:
    """Returns a round of this project."""
    from ldm.runtime.device import setup_runtime

    setup_runtime("CPU")
    from ldm.metrics.evaluate import measure_images
    from ldm.metrics.networks import ImageNetwork
    from ldm.metrics.preprocessing import inception_input
    from ldm.models.inception import FEATURES, InceptionFeatures

    network = InceptionFeatures()
    network.set_train(False)
    scoring = ImageNetwork("random", "", "", FEATURES, False, inception_input, network)

    def work() -> None:
        measure_images(paths, scoring, batch_size)

    return work


def import_pytorch_fid():
    """Imports pytorch-fid with random Inception weights."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        # A torchvision built for CUDA lacks two operators beside a CPU build of torch. No network here uses them.
        import_pytorch_fid.library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            import_pytorch_fid.library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from pytorch_fid import fid_score, inception

    network = inception._inception_v3(num_classes=1008, aux_logits=False, weights=None)
    inception.load_state_dict_from_url = lambda *args, **kwargs: network.state_dict()
    return torch, fid_score, inception, network.state_dict()


def pytorch_fid(paths: list[Path], batch_size: int) -> Callable[[], None]:
    """Returns a round of pytorch-fid."""
    _, fid_score, inception, _ = import_pytorch_fid()
    network = inception.InceptionV3()

    def work() -> None:
        fid_score.calculate_activation_statistics(paths, network, batch_size, num_workers=1)

    return work


def torchmetrics(paths: list[Path], batch_size: int) -> Callable[[], None]:
    """Returns a round of torchmetrics."""
    torch, _, _, state = import_pytorch_fid()
    from torchmetrics.image.fid import FrechetInceptionDistance

    with tempfile.TemporaryDirectory() as folder:
        torch.save(state, Path(folder) / "weights.pth")
        metric = FrechetInceptionDistance(feature_extractor_weights_path=str(Path(folder) / "weights.pth"))

    def work() -> None:
        metric.reset()
        for start in range(0, len(paths), batch_size):
            batch = [np.asarray(Image.open(path).convert("RGB")) for path in paths[start : start + batch_size]]
            # The memory layout of torchvision's transforms and PyTorch's loader.
            metric.update(torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).contiguous(), real=True)

    return work


def serve(name: str, folder: Path, batch_size: int) -> None:
    """Answers every line of input with the seconds and CPU seconds of a round, and the peak memory so far."""
    paths = sorted(folder.glob("*.png"))
    work = dict(zip(NAMES, (this_project, pytorch_fid, torchmetrics)))[name](paths, batch_size)
    for _ in sys.stdin:
        start, processor = time.perf_counter(), processor_seconds()
        work()
        found = {
            "seconds": time.perf_counter() - start,
            "processor": processor_seconds() - processor,
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        print(json.dumps(found), flush=True)


def processor_seconds() -> float:
    """Returns the CPU seconds of this process and of its finished children."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


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
    # For the processes that are measured.
    serve: Optional[str] = setting(None, choices=NAMES)
    folder: Optional[Path] = setting(None, path=True)


def main() -> None:
    args = read_settings(Settings, description=__doc__)
    if args.serve:
        return serve(args.serve, args.folder, args.batch_size)
    names = NAMES if args.reference_python else NAMES[:1]
    cores = len(os.sched_getaffinity(0))
    environment = {**os.environ, "OMP_NUM_THREADS": str(cores)}
    with temporary_folder(Path(tempfile.gettempdir()) / "metrics") as folder:
        rng = np.random.default_rng(0)
        for i in range(args.images):
            coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
            coarse.resize((args.size, args.size), Image.Resampling.BICUBIC).save(folder / f"{i:05d}.png")
        servers, rounds = {}, {name: [] for name in names}
        try:
            for name in names:
                python = sys.executable if name == NAMES[0] else args.reference_python
                servers[name] = subprocess.Popen(
                    [python, __file__, "--serve", name, "--folder", str(folder), "--batch_size", str(args.batch_size)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    env=environment,
                )
            bar = tqdm(total=(1 + args.rounds) * len(names), desc="rounds", unit="round")
            for _ in range(1 + args.rounds):
                for name, server in servers.items():
                    server.stdin.write("\n")
                    server.stdin.flush()
                    answer = server.stdout.readline()
                    while answer and not answer.startswith("{"):
                        answer = server.stdout.readline()
                    if not answer:
                        raise UserError(
                            f"{name} ended: run {server.args[0]} {__file__} --serve '{name}' --folder FOLDER"
                        )
                    rounds[name].append(json.loads(answer))
                    bar.update()
        finally:
            for server in servers.values():
                server.kill()
    print(
        f"{args.images} PNG files of {args.size}x{args.size}, batches of {args.batch_size}, {cores} core(s), "
        f"best and median of {args.rounds} rounds in turns"
    )
    print("| | images/s, best | images/s, median | images per processor second, best | first round, s | peak MB |")
    print("|---|---|---|---|---|---|")
    for name in names:
        seconds, processor = ([found[kind] for found in rounds[name][1:]] for kind in ("seconds", "processor"))
        print(
            f"| {name} | {args.images / min(seconds):.2f} | {args.images / float(np.median(seconds)):.2f} | "
            f"{args.images / min(processor):.2f} | {rounds[name][0]['seconds']:.1f} | "
            f"{rounds[name][-1]['peak_mb']:.0f} |"
        )


if __name__ == "__main__":
    run_script(main)
