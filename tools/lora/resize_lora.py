"""Reduce the rank of a LoRA, by the SVD of each layer's update.

    python tools/lora/resize_lora.py --source LORA --target SMALLER.ckpt --rank 4
    python tools/lora/resize_lora.py --source LORA --target SMALLER.safetensors --energy 0.9 --to kohya

The relative error is printed. A layer of no larger rank keeps its factors, bit for bit.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's folder, where this is run as a script

from ldm.runtime.script import run_script, start_script  # noqa: E402

if __name__ == "__main__":
    start_script()

from ldm.lora.algebra import check_cut, resize  # noqa: E402
from ldm.lora.claims import claim_lora  # noqa: E402
from ldm.lora.formats import DTYPES, FORMATS, read_lora, write_lora  # noqa: E402
from ldm.settings.declare import REQUIRED, setting  # noqa: E402
from ldm.settings.read import read_settings  # noqa: E402


@dataclass
class Settings:
    """The command line."""

    source: Path = setting(REQUIRED, "a LoRA of any format", path=True)
    target: Path = setting(REQUIRED, "the LoRA to write", path=True)
    rank: Optional[int] = setting(None, "largest rank of a layer", low=1)
    energy: Optional[float] = setting(None, "share of each layer's squared norm to keep, such as 0.9", low=0, high=1)
    to: str = setting("mindone", "format to write; mindone is this project's own", choices=tuple(FORMATS))
    dtype: str = setting("fp32", "type of the factors", choices=DTYPES)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tool."""
    settings = read_settings(Settings, argv, description=__doc__)
    check_cut(settings.rank, settings.energy)
    with claim_lora(settings.target, settings.to, "--target"):
        lora = read_lora(settings.source)
        print(f"{settings.source}: {lora}")
        smaller, truncation = resize(lora, settings.rank, settings.energy)
        print(truncation)
        write_lora(settings.target, smaller, settings.to, dtype=settings.dtype)
    print(f"{settings.target}: {smaller}")


if __name__ == "__main__":
    run_script(main)
