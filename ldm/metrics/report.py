"""Print and describe how a score was made: the network, the preprocessing and the images left out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.files.atomic import atomic_path
from ldm.files.documents import json_text
from ldm.files.paths import writing

if TYPE_CHECKING:  # it imports MindSpore, which comes after a script's settings are checked
    from ldm.metrics.networks import ImageNetwork

# With fewer images the covariance of Inception's 2,048 features is singular, and the FID far from its limit.
ENOUGH_IMAGES = 2048
NANO_CLIP = (
    "no weights given, so the nano CLIP scores: these scores compare only with each other, never with published scores"
)


def print_network(network: ImageNetwork) -> None:
    """Print the network, its hash and its preprocessing, after a warning if it is the nano CLIP."""
    if network.is_nano:
        print(NANO_CLIP)
    print(f"network: {network.name}, sha256 {network.sha256[:16]}")
    print(f"preprocessing: {network.preprocessing}")


def describe_network(network: ImageNetwork) -> dict[str, Any]:
    """Return the entries of a JSON report that describe the network."""
    entries = {"network": network.name, "sha256": network.sha256, "preprocessing": network.preprocessing}
    return {**entries, "compares_only_with_itself": network.is_nano}


def print_idle_processes(images: int, batch_size: int, process_count: int) -> None:
    """Print a warning if there are fewer batches than processes."""
    batches = math.ceil(images / batch_size)
    if batches < process_count:
        print(
            f"warning: {process_count} processes, but only {batches} {'batch' if batches == 1 else 'batches'} of "
            f"{batch_size} images: the other processes have nothing to do; a smaller --batch_size gives more batches"
        )


def print_broken(broken: Sequence[tuple[Path, str]], label: str) -> None:
    """Print every image that was left out, and their number."""
    for path, fault in broken:
        print(f"left out: {path} {fault}")
    if broken:
        print(f"{label}: {len(broken)} left out")


def describe_broken(broken: Sequence[tuple[Path, str]]) -> list[dict[str, str]]:
    """Return the entries of a JSON report for images that were left out."""
    return [{"file": str(path), "fault": fault} for path, fault in broken]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON report. Raises UserError if it cannot be written."""
    with writing(path), atomic_path(path) as temporary:
        temporary.write_text(json_text(content, indent=2) + "\n", encoding="utf-8")
