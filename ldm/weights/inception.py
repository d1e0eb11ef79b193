"""Read the published weights of the Inception network for the FID, PyTorch's file or mindone's, and load them."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
from mindspore import Tensor

from ldm.errors import UserError
from ldm.models.inception import BLOCKS, STEM, Conv, Convolution, InceptionFeatures, out_channels
from ldm.weights.arrays import RenamedCheckpoint, require_arrays
from ldm.weights.checkpoint import open_checkpoint

EPSILON = 1e-3  # of the batch normalization in the published network
UNUSED = ("fc.", "AuxLogits.")  # layers after the pooled features

# First eight digits of the SHA-256, which are in the names of the published files -> names.
PUBLISHED = {
    "6726825d": "pt_inception-2015-12-05-6726825d.pth",
    "9ec6dfe4": "inception_v3_fid-9ec6dfe4.ckpt",
}
# PyTorch's parameters of a convolution and its normalization -> mindone's.
_KINDS = {
    "conv.weight": "conv.weight", "bn.weight": "bn.gamma", "bn.bias": "bn.beta",
    "bn.running_mean": "bn.moving_mean", "bn.running_var": "bn.moving_variance",
}  # fmt: skip


def published_modules() -> dict[str, tuple[str, tuple[int, int, int, int]]]:
    """List the convolutions of the published network.

    Returns:
        PyTorch's name of the convolution with its normalization -> (mindone's name, shape of the kernel).
    """
    modules, channels = {}, 3

    def shape(conv: Conv, in_channels: int) -> tuple[int, int, int, int]:
        return conv.channels, in_channels, conv.height, conv.width

    for conv in STEM:
        modules[conv.name] = (conv.name[: -len("_3x3")], shape(conv, channels))
        channels = conv.channels
    for block in BLOCKS:
        for number, branch in enumerate(block.branches):
            width = channels
            for position, conv in enumerate(branch.chain):
                mindone = f"branch{number}" + (f".{position}" if len(branch.chain) > 1 else "")
                modules[f"{block.name}.{conv.name}"] = (f"{block.name}.{mindone}", shape(conv, width))
                width = conv.channels
            for letter, conv in zip("ab", branch.fork):
                modules[f"{block.name}.{conv.name}"] = (f"{block.name}.branch{number}_{letter}", shape(conv, width))
        if block.pool_channels:
            name = f"{block.name}.branch_pool"
            modules[name] = (f"{name}.1", (block.pool_channels, channels, 1, 1))
        channels = out_channels(block, channels)
    return modules


def read_inception(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Read the arrays that the features need, under PyTorch's names.

    Raises:
        UserError: The file does not hold the network: names are missing or unknown, shapes are wrong, or values are
            not finite.
    """
    checkpoint = open_checkpoint(path)
    modules = published_modules()
    mindone = {
        f"{module}.{kind}": f"{name}.{torch_kind}"
        for name, (module, _) in modules.items()
        for torch_kind, kind in _KINDS.items()
    }
    wanted = {
        f"{name}.{kind}": shape if kind == "conv.weight" else shape[:1]
        for name, (_, shape) in modules.items()
        for kind in _KINDS
    }
    used = [name for name in checkpoint if not name.startswith(UNUSED) and not name.endswith("num_batches_tracked")]
    renamed = RenamedCheckpoint(checkpoint, {mindone.get(name, name): name for name in used})
    network = f"the Inception network of the FID ({' or '.join(PUBLISHED.values())})"
    arrays = require_arrays(renamed, wanted, checkpoint.path, network)
    for name, array in arrays.items():
        if name.endswith("running_var") and (array < 0).any():
            raise UserError(f"{path}: {name} is a negative variance: fetch the file again")
    return arrays


def fold(arrays: Mapping[str, np.ndarray], module: str) -> tuple[np.ndarray, np.ndarray]:
    """Fold a published convolution and the normalization after it into one convolution.

    Args:
        arrays: Arrays under PyTorch's names.
        module: Name of the convolution.

    Returns:
        Weight and bias, float64.
    """
    parts = {kind: arrays[f"{module}.{kind}"].astype(np.float64) for kind in _KINDS}
    scale = parts["bn.weight"] / np.sqrt(parts["bn.running_var"] + EPSILON)
    weight = parts["conv.weight"] * scale[:, None, None, None]
    return weight, parts["bn.bias"] - parts["bn.running_mean"] * scale


def load_inception(network: InceptionFeatures, arrays: Mapping[str, np.ndarray]) -> None:
    """Load the arrays that read_inception returns into a network."""
    for _, cell in network.cells_and_names():
        if isinstance(cell, Convolution):
            weights, biases = zip(*(fold(arrays, module) for module in cell.published))
            cell.weight.set_data(Tensor(np.concatenate(weights).astype(np.float32)))
            cell.bias.set_data(Tensor(np.concatenate(biases).astype(np.float32)))
