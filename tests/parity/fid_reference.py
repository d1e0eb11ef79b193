"""pytorch-fid, with weights that are given instead of downloaded."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch


def import_torchvision() -> None:
    """Import torchvision; one that was built for CUDA fails beside a torch without it, at two operators that no network
    here uses: with those declared it imports."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        declared.append(library)
        import torchvision  # noqa: F401


declared: list[torch.library.Library] = []  # the declarations last as long as this


def pytorch_fid():
    """The package's modules (fid_score, inception)."""
    import_torchvision()
    from pytorch_fid import fid_score, inception

    return fid_score, inception


def reference_inception(arrays: Mapping[str, np.ndarray]) -> torch.nn.Module:
    """pytorch-fid's network with the published file's arrays; what the features do not need stays random."""
    _, inception = pytorch_fid()
    state = {name: torch.from_numpy(array) for name, array in arrays.items()}
    download = inception.load_state_dict_from_url
    found = []
    try:
        inception.load_state_dict_from_url = lambda *args, **kwargs: found[0]
        network = inception._inception_v3(num_classes=1008, aux_logits=False, weights=None)
        found.append({**network.state_dict(), **state})
        return inception.InceptionV3().eval()
    finally:
        inception.load_state_dict_from_url = download
