"""The LoRA between a full fine-tune and its base, by the SVD of the difference of each layer's weights.

    python tools/lora/extract_lora.py --base_model BASE --target_model TUNED --rank 32 --save_path LORA.ckpt

Exact where a layer's difference has no larger rank; what is cut off, and what no LoRA can hold (norms, biases), is
printed. Both models may be in any form that this project reads, and not the same one. (The names are those of
cloneofsimo's svd_distill. It cuts off the factors' largest values as well; this does not.)
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's folder, where this is run as a script

from ldm.runtime.script import run_script, start_script  # noqa: E402

if __name__ == "__main__":
    start_script()

from ldm.files.paths import user_path  # noqa: E402
from ldm.lora.algebra import check_cut  # noqa: E402
from ldm.lora.checkpoints import extract_lora  # noqa: E402
from ldm.lora.formats import DTYPES, FORMATS, write_lora  # noqa: E402
from ldm.lora.targets import claim_lora  # noqa: E402
from ldm.settings.command_line import Parser, number, whole_number  # noqa: E402


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--base_model", required=True, type=user_path, help="what the fine-tune started from")
    parser.add_argument("--target_model", required=True, type=user_path, help="the fine-tune")
    parser.add_argument("--save_path", required=True, type=user_path, help="the LoRA")
    parser.add_argument(
        "--rank", type=whole_number(low=1), help="largest rank of a layer [32, unless --energy is given]"
    )
    parser.add_argument("--energy", type=number(low=0, high=1),
                        help="share of each layer's squared difference that is kept, such as "
                        "0.95: the smallest rank that does, and no more than --rank")  # fmt: skip
    parser.add_argument("--targets", nargs="+", default=["all"], help="which layers: attention, all, or the last parts "
                        "of layers' names, * standing for anything [all]")  # fmt: skip
    parser.add_argument(
        "--networks",
        nargs="+",
        choices=("unet", "text_encoder"),
        default=["unet", "text_encoder"],
        help="of which networks [both]",
    )
    parser.add_argument("--to", choices=tuple(FORMATS), default="mindone", help="format [mindone, this project's own]")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the factors [fp32]")
    args = parser.parse_args(argv)
    rank = 32 if args.rank is None and args.energy is None else args.rank
    check_cut(rank, args.energy)
    with claim_lora(args.save_path, args.to, "--save_path"):
        found = extract_lora(args.base_model, args.target_model, rank, args.energy, args.targets, args.networks)
        print(found)
        write_lora(args.save_path, found.state, args.to, dtype=args.dtype)
    print(f"{args.save_path}: {found.state}")


if __name__ == "__main__":
    run_script(main)
