"""What a process that computes leaves in a folder for the one that compares."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

OVERFLOW = "overflow"
GRAPHS = (OVERFLOW, "attention", "text_encoder", "vae_encode", "vae_decode", "unet", "unet_flash", "lora_step")


@dataclass
class Machine:
    """Versions, memory and how the device is set up."""

    versions: str
    device: str  # the log's line about the device
    ascend: bool
    flash_attention: bool
    known: bool  # whether the project knows the Ascend device by its name
    is_first_910: bool  # whether it has products and convolutions in fp16 alone
    saturates: bool  # whether an overflow in fp16 gives the largest number
    dry_run: bool  # whether it is MindSpore's dry run, which computes nothing
    free: float = 0.0  # memory in GB, 0 if unknown
    total: float = 0.0
    cann: str = ""  # CANN's version and those that MindSpore accepts, "" on the CPU
    cann_fault: str = ""  # why CANN does not fit

    def write(self, folder: Path) -> None:
        (folder / "machine.json").write_text(json.dumps(asdict(self)))


@dataclass
class Graph:
    """What a process found out about one graph."""

    name: str
    precision: str = ""
    seconds: float = 0.0
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    error: str = ""  # why it did not run
    skipped: str = ""  # why it was left out

    def write(self, folder: Path) -> None:
        np.savez(folder / f"{self.name}.npz", **self.arrays)
        (folder / f"{self.name}.json").write_text(json.dumps({**asdict(self), "arrays": {}}))


def read_machine(folder: Path) -> Machine | None:
    """Return what a process wrote about its machine, None if it ended before."""
    file = folder / "machine.json"
    return Machine(**json.loads(file.read_text())) if file.is_file() else None


def read_graph(folder: Path, name: str, ended: str) -> Graph:
    """Return what a process wrote about a graph, or how it ended before ("" for well)."""
    if not (folder / f"{name}.json").is_file():
        return Graph(name, error=ended or "it left no result")
    with np.load(folder / f"{name}.npz") as arrays:
        graph = Graph(**json.loads((folder / f"{name}.json").read_text()))
        graph.arrays = dict(arrays)
    return graph
