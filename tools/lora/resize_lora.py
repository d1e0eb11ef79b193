"""A LoRA of a smaller rank, by SVD of each layer's update.

    python tools/lora/resize_lora.py --source LORA --target SMALLER.ckpt --rank 4
    python tools/lora/resize_lora.py --source LORA --target SMALLER.safetensors --energy 0.9 --to kohya

What is cut off is printed; a layer that has no larger rank keeps its factors, bit for bit.
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
from ldm.lora.algebra import check_cut, resize  # noqa: E402
from ldm.lora.formats import DTYPES, FORMATS, read_lora, write_lora  # noqa: E402
from ldm.lora.targets import claim_lora  # noqa: E402
from ldm.settings.command_line import Parser, number, whole_number  # noqa: E402


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--source", required=True, type=user_path, help="a LoRA of any format")
    parser.add_argument("--target", required=True, type=user_path, help="what is written")
    parser.add_argument("--rank", type=whole_number(low=1), help="largest rank of a layer")
    parser.add_argument(
        "--energy", type=number(low=0, high=1), help="share of each layer's squared norm that is kept, such as 0.9"
    )
    parser.add_argument("--to", choices=tuple(FORMATS), default="mindone", help="format [mindone, this project's own]")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the factors [fp32]")
    args = parser.parse_args(argv)
    check_cut(args.rank, args.energy)
    with claim_lora(args.target, args.to, "--target"):
        state = read_lora(args.source)
        print(f"{args.source}: {state}")
        smaller, report = resize(state, args.rank, args.energy)
        print(report)
        write_lora(args.target, smaller, args.to, dtype=args.dtype)
    print(f"{args.target}: {smaller}")


if __name__ == "__main__":
    run_script(main)
