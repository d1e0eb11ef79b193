"""pytorch-fid with weights that are given instead of downloaded, and transformers' CLIP."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from tests.metrics.named_networks import CLIP_ARGUMENTS


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


def reference_input(path: Path) -> np.ndarray:
    """What pytorch-fid's network sees of a file: (3, 299, 299) in [-1, 1]."""
    fid_score, _ = pytorch_fid()
    pixels = fid_score.ImagePathDataset([path], fid_score.TF.ToTensor())[0][None]
    pixels = torch.nn.functional.interpolate(pixels, size=(299, 299), mode="bilinear", align_corners=False)
    return (2 * pixels - 1)[0].numpy()


def reference_clip(arrays: Mapping[str, np.ndarray], activation: str) -> torch.nn.Module:
    """transformers' CLIPModel of CLIP_ARGUMENTS with these weights."""
    from transformers import CLIPConfig, CLIPModel

    towers = {}
    for name in ("text", "vision"):
        tower = CLIP_ARGUMENTS[name]
        towers[f"{name}_config"] = dict(
            hidden_size=tower["width"],
            intermediate_size=4 * tower["width"],
            num_hidden_layers=tower["num_layers"],
            num_attention_heads=tower["num_heads"],
            hidden_act=activation,
            projection_dim=CLIP_ARGUMENTS["projection_dim"],
        )
    towers["text_config"]["eos_token_id"] = 2  # as in the published files: pooled at the largest token
    towers["vision_config"].update({key: CLIP_ARGUMENTS["vision"][key] for key in ("image_size", "patch_size")})
    network = CLIPModel(CLIPConfig(**towers, projection_dim=CLIP_ARGUMENTS["projection_dim"])).eval()
    missing, unexpected = network.load_state_dict(
        {n: torch.from_numpy(np.array(a)) for n, a in arrays.items()}, strict=False
    )
    assert not unexpected and all(name.endswith("position_ids") for name in missing), (missing, unexpected)
    return network
