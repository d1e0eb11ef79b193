"""The LoRA between a full fine-tune and its base, by the SVD of the difference of each layer's weights.

    python tools/lora/extract_lora.py --base_model BASE --target_model TUNED --rank 32 --save_path LORA.ckpt

Exact where a layer's difference has no larger rank; what is cut off, and what no LoRA can hold (norms, biases), is
printed. Both models may be in any form that this project reads, and not the same one. (The names are those of
cloneofsimo's svd_distill. It cuts off the factors' largest values as well; this does not.)
"""

# ruff: noqa: UP007, UP045 (the annotations are read when it runs, on Python 3.9 too)
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
from ldm.lora.checkpoints import extract_lora  # noqa: E402
from ldm.lora.formats import DTYPES, FORMATS, write_lora  # noqa: E402
from ldm.lora.targets import claim_lora  # noqa: E402
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
    args = read_settings(Settings, argv, description=__doc__)
    rank = 32 if args.rank is None and args.energy is None else args.rank
    check_cut(rank, args.energy)
    with claim_lora(args.save_path, args.to, "--save_path"):
        found = extract_lora(args.base_model, args.target_model, rank, args.energy, args.targets, args.networks)
        print(found)
        write_lora(args.save_path, found.state, args.to, dtype=args.dtype)
    print(f"{args.save_path}: {found.state}")


if __name__ == "__main__":
    run_script(main)
