"""Convert a Stable Diffusion base model from whatever form it has into another one.

    python tools/model_conversion/convert_weights.py --source v1-5-pruned.safetensors --target models/sd15
    python tools/model_conversion/convert_weights.py --source models/sd15 --target sd15.ckpt

The source is a single file (.safetensors, PyTorch's .ckpt, MindSpore's .ckpt) or a diffusers folder, and is told apart
by what is in it. The target is a .safetensors (the published single file), a .ckpt (mindone's) or a diffusers folder.
docs/checkpoints.md tells more.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ldm.runtime.script import describe_progress, run_script, start_script  # noqa: E402

if __name__ == "__main__":
    start_script()

from ldm.files.outputs import claim_file, claim_new  # noqa: E402
from ldm.settings.declare import REQUIRED, setting  # noqa: E402
from ldm.settings.read import read_settings  # noqa: E402


@dataclass
class Settings:
    """The command line."""

    source: Path = setting(REQUIRED, "the base model: a file or a diffusers folder", path=True)
    target: Path = setting(REQUIRED, "what to write; it must not exist yet", path=True)
    format: Optional[str] = setting(
        None,
        "format of the target: ldm, the published single file (the default for .safetensors); mindone (.ckpt); "
        "diffusers (a folder); own, this project's names (.safetensors or .ckpt)",
        choices=("ldm", "diffusers", "mindone", "own"),
    )
    dtype: str = setting(
        "keep",
        "type of the weights; keep leaves each as it is, with bfloat16 as fp32",
        choices=("keep", "fp32", "fp16"),
    )
    ema: bool = setting(False, "take the UNet's moving averages that the file holds")
    model_config: Optional[str] = setting(
        None, "the model's YAML, where the source does not tell which model it is", path=True
    )
    prediction_type: Optional[str] = setting(
        None,
        "what the UNet predicts, where the source does not tell it: shapes are the same for the base versions of "
        "SD2.x (epsilon) and the 768 versions (v_prediction)",
        choices=("epsilon", "v_prediction"),
    )


def main(argv: Sequence[str] | None = None) -> None:
    args = read_settings(Settings, argv, description=__doc__)
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
