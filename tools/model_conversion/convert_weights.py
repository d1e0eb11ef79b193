"""Convert a Stable Diffusion base model from whatever form it has into another one.

    python tools/model_conversion/convert_weights.py --source v1-5-pruned.safetensors --target models/sd15
    python tools/model_conversion/convert_weights.py --source models/sd15 --target sd15.ckpt

The source is a single file (.safetensors, PyTorch's .ckpt, MindSpore's .ckpt) or a diffusers folder, and is told apart
by what is in it. The target is a .safetensors (the published single file), a .ckpt (mindone's) or a diffusers folder.
docs/checkpoints.md tells more.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ldm.runtime.script import describe_progress, run_script, start_script  # noqa: E402

if __name__ == "__main__":
    start_script()
os.environ.setdefault("GLOG_v", "3")  # MindSpore's own warnings, before its first import

from ldm.files.outputs import claim_file, claim_new  # noqa: E402
from ldm.files.paths import expanded, user_path  # noqa: E402
from ldm.settings.command_line import Parser  # noqa: E402


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--source", type=user_path, required=True, help="the base model: a file or a diffusers folder")
    parser.add_argument("--target", type=user_path, required=True, help="what to write; it must not exist yet")
    parser.add_argument(
        "--format",
        choices=("ldm", "diffusers", "mindone", "own"),
        help="of the target: ldm, the published single file (the default for .safetensors); mindone "
        "(.ckpt); diffusers (a folder); own, this project's names (.safetensors or .ckpt)",
    )
    parser.add_argument(
        "--dtype",
        choices=("keep", "fp32", "fp16"),
        default="keep",
        help="of the weights; keep leaves each as it is, bfloat16 becoming fp32 (default: keep)",
    )
    parser.add_argument("--ema", action="store_true", help="take the UNet's moving averages that the file holds")
    parser.add_argument(
        "--model_config", type=expanded, help="the model's YAML, where the source does not say which model it is"
    )
    parser.add_argument(
        "--prediction_type",
        choices=("epsilon", "v_prediction"),
        help="what the UNet predicts, where the source does not say it: shapes do not tell the base "
        "versions of SD2.x (epsilon) from the 768 versions (v_prediction)",
    )
    args = parser.parse_args(argv)
    logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stderr)

    # After the arguments are known to be right: MindSpore, which gives the shapes of the networks, takes a second.
    from ldm.weights.architecture import yaml_beside
    from ldm.weights.convert import convert, target_format

    folder = target_format(args.target, args.format) == "diffusers"
    with claim_new(args.target, "--target", folder), claim_file(yaml_beside(args.target, folder), "--target"):
        describe_progress(lambda: f"before {args.target} was whole: it is not kept")
        report = convert(
            args.source, args.target, args.format, args.dtype, args.ema, args.model_config, args.prediction_type
        )
    print(f"{args.source} ({report.family}): {report}")
    print(f"written: {args.target}")


if __name__ == "__main__":
    run_script(main)
