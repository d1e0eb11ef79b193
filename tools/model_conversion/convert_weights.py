"""Convert a Stable Diffusion base model into another format.

    python tools/model_conversion/convert_weights.py --source v1-5-pruned.safetensors --target models/sd15
    python tools/model_conversion/convert_weights.py --source models/sd15 --target sd15.ckpt

The source is a single file (.safetensors, PyTorch's or MindSpore's .ckpt) or a diffusers folder, as its content says.
The target is a .safetensors (the published single file), a .ckpt (mindone's) or a diffusers folder. See
docs/checkpoints.md.
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
from ldm.settings.model import PREDICTION_TYPES  # noqa: E402
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
        "type of the weights; keep changes none, except that bfloat16 becomes fp32",
        choices=("keep", "fp32", "fp16"),
    )
    ema: bool = setting(False, "use the moving averages of the UNet's weights that the file holds")
    model_config: Optional[str] = setting(
        None, "YAML of the model, if the source does not say which model it is", path=True
    )
    prediction_type: Optional[str] = setting(
        None,
        "what the UNet predicts, if the source does not say it: the base versions of SD2.x (epsilon) and the 768 "
        "versions (v_prediction) have the same shapes",
        choices=PREDICTION_TYPES,
    )


def main(argv: Sequence[str] | None = None) -> None:
    args = read_settings(Settings, argv, description=__doc__)
    logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stderr)

    # The networks give the shapes. Importing MindSpore takes a second, so the arguments are checked before.
    from ldm.weights.architecture import yaml_beside
    from ldm.weights.convert import convert, target_format

    folder = target_format(args.target, args.format) == "diffusers"
    with claim_new(args.target, "--target", folder), claim_file(yaml_beside(args.target, folder), "--target"):
        describe_progress(lambda: f"before {args.target} was complete: it is not kept")
        report = convert(
            args.source, args.target, args.format, args.dtype, args.ema, args.model_config, args.prediction_type
        )
    print(f"{args.source} ({report.family}): {report}")
    print(f"written: {args.target}")


if __name__ == "__main__":
    run_script(main)
