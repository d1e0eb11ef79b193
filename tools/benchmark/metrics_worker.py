"""A side of metrics.py, which starts it: the FID's features of a folder of PNG files, with random weights.

    python -m tools.benchmark.metrics_worker NAME FOLDER BATCH_SIZE

The environment of pytorch-fid and torchmetrics needs no package of this project.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.benchmark.worker import Turns

turns = Turns() if __name__ == "__main__" else None

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402


def this_project(paths: list[Path], batch_size: int) -> Callable[[], Any]:
    from ldm.runtime.device import setup_runtime

    setup_runtime("CPU")
    from ldm.metrics.evaluate import measure_images
    from ldm.metrics.networks import ImageNetwork
    from ldm.metrics.preprocessing import inception_input
    from ldm.models.inception import FEATURES, InceptionFeatures

    network = InceptionFeatures()
    network.set_train(False)
    scoring = ImageNetwork("random", "", "", FEATURES, False, inception_input, network)
    return lambda: measure_images(paths, scoring, batch_size)


def import_pytorch_fid() -> tuple[Any, Any, Any, dict[str, Any]]:
    """Import torch and two modules of pytorch-fid, whose weights become random. Returns the weights too."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        # A torchvision built for CUDA lacks two operators beside a CPU build of torch. No network here uses them.
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import_pytorch_fid.library = library  # the operators end with it
    from pytorch_fid import fid_score, inception

    weights = inception._inception_v3(num_classes=1008, aux_logits=False, weights=None).state_dict()
    inception.load_state_dict_from_url = lambda *args, **kwargs: weights
    return torch, fid_score, inception, weights


def pytorch_fid(paths: list[Path], batch_size: int) -> Callable[[], Any]:
    _, fid_score, inception, _ = import_pytorch_fid()
    network = inception.InceptionV3()
    return lambda: fid_score.calculate_activation_statistics(paths, network, batch_size, num_workers=1)


def torchmetrics(paths: list[Path], batch_size: int) -> Callable[[], Any]:
    torch, _, _, weights = import_pytorch_fid()
    from torchmetrics.image.fid import FrechetInceptionDistance

    with tempfile.TemporaryDirectory() as folder:
        torch.save(weights, f"{folder}/weights.pth")
        metric = FrechetInceptionDistance(feature_extractor_weights_path=f"{folder}/weights.pth")

    def run() -> None:
        metric.reset()
        for start in range(0, len(paths), batch_size):
            batch = [np.asarray(Image.open(path).convert("RGB")) for path in paths[start : start + batch_size]]
            # The memory layout of torchvision's transforms and PyTorch's loader.
            metric.update(torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).contiguous(), real=True)

    return run


SIDES = {"this project": this_project, "pytorch-fid": pytorch_fid, "torchmetrics": torchmetrics}


def main() -> None:
    name, folder, batch_size = sys.argv[1:]
    turns.serve(SIDES[name](sorted(Path(folder).glob("*.png")), int(batch_size)), {})


if __name__ == "__main__":
    main()
