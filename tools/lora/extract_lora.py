"""Extract the LoRA between a base model and its full fine-tuning, by the SVD of the difference of each layer's weights.

    python tools/lora/extract_lora.py --base_model BASE --target_model TUNED --rank 32 --save_path LORA.ckpt

It is exact where the difference of a layer has no larger rank. What is cut off, and what no LoRA can hold (norms,
biases), is printed. The models may be checkpoints of any two forms. The flags have the names of cloneofsimo's
svd_distill, which also clamps the largest values of the factors. This tool does not.
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

from ldm.lora.algebra import check_cut  # noqa: E402
from ldm.lora.claims import claim_lora  # noqa: E402
from ldm.lora.extract import extract_lora  # noqa: E402
from ldm.lora.formats import DTYPES, FORMATS, write_lora  # noqa: E402
from ldm.settings.declare import REQUIRED, setting  # noqa: E402
from ldm.settings.read import read_settings  # noqa: E402


@dataclass
class Settings:
    """The command line."""

    base_model: Path = setting(REQUIRED, "the model that the fine-tune started from", path=True)
    target_model: Path = setting(REQUIRED, "the fine-tune", path=True)
    save_path: Path = setting(REQUIRED, "the LoRA to write", path=True)
    rank: Optional[int] = setting(None, "largest rank of a layer; None: 32, or no limit where --energy is given", low=1)
    energy: Optional[float] = setting(
        None,
        "share of each layer's squared difference to keep, such as 0.95: the smallest rank that keeps it, and no more "
        "than --rank",
        low=0,
        high=1,
    )
    targets: list[str] = setting(
        ["all"], "which layers: attention, all, or the last parts of layers' names, * standing for anything"
    )
    networks: list[str] = setting(["unet", "text_encoder"], "which networks", choices=("unet", "text_encoder"))
    to: str = setting("mindone", "format of the LoRA; mindone is this project's own", choices=tuple(FORMATS))
    dtype: str = setting("fp32", "type of the factors", choices=DTYPES)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tool."""
    settings = read_settings(Settings, argv, description=__doc__)
    rank = 32 if settings.rank is None and settings.energy is None else settings.rank
    check_cut(rank, settings.energy)
    with claim_lora(settings.save_path, settings.to, "--save_path"):
        extraction = extract_lora(
            settings.base_model, settings.target_model, rank, settings.energy, settings.targets, settings.networks
        )
        print(extraction)
        write_lora(settings.save_path, extraction.lora, settings.to, dtype=settings.dtype)
    print(f"{settings.save_path}: {extraction.lora}")


if __name__ == "__main__":
    run_script(main)
