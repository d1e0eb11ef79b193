"""This project's version, and what differs between MindSpore's versions, in one place.

README.md says which versions were run, and with what.
"""

from __future__ import annotations

import logging
from importlib import metadata
from pathlib import Path

import mindspore as ms

logger = logging.getLogger(__name__)

PACKAGE = "mindspore-stable-diffusion-lora"
TESTED = ((2, 7), (2, 8), (2, 10))  # of 2.7, only 2.7.2
SLOW_CONVOLUTIONS = ((2, 9), (2, 10))  # their CPU build


def package_version() -> str | None:
    """Return this project's version, None in a checkout that is not installed."""
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return None


def mindspore_version() -> tuple[int, ...]:
    """Return MindSpore's version as numbers, such as (2, 8, 0). What follows them, as in "2.8.0rc1", is left out."""
    numbers: list[int] = []
    for part in ms.__version__.split(".")[:3]:
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def splits_into_views() -> bool:
    """Whether SplitWithSizeView and `mint.chunk` have a kernel on the CPU. 2.7 has them on Ascend only."""
    return mindspore_version() >= (2, 8)


def onednn_library() -> str:
    """Return the file name of MindSpore's oneDNN: libdnnl.so.2, and libdnnl.so.3 in 2.10."""
    names = sorted(path.name for path in (Path(ms.__file__).parent / "lib").glob("libdnnl.so.[0-9]"))
    return names[-1] if names else "libdnnl.so.2"


def check_version(device: str) -> None:
    """Warn of a version that the tests were not run with, or that is slow on `device`, "Ascend" or "CPU"."""
    release = mindspore_version()[:2]
    install = "pip install mindspore==2.8.0"
    if release not in TESTED or mindspore_version() < (2, 7, 2):
        logger.warning("MindSpore %s was not tested with this project, 2.8.0 was: %s", ms.__version__, install)
    elif device == "CPU" and release in SLOW_CONVOLUTIONS:
        logger.warning(
            "MindSpore %s has slow convolutions on the CPU: those that the kernels of this project do not compute take "
            "5 to 10 s, with 2.8.0 0.03 s: %s", ms.__version__, install
        )  # fmt: skip
