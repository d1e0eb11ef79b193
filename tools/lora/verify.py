"""Tell whether a LoRA was trained from a base model, data and settings, by the digests in its file.

    python tools/lora/verify.py output/pokemon/ckpt/lora.safetensors
        --base models/sd_v1.5.safetensors --data datasets/pokemon --train_config output/pokemon/train_args.yaml

With --repeat and --state, the last steps are trained again, and the resulting factors are compared bit for bit:

    ... --repeat 100 --state output/pokemon/ckpt

Exit code 0: all that was compared matches; 1: something does not; 2: something cannot be read. docs/sharing.md explains
the lines.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's folder, where this is run as a script

from ldm.runtime.script import run_script, start_script  # noqa: E402

if __name__ == "__main__":
    start_script()

from ldm.errors import UserError, plain  # noqa: E402
from ldm.files.inputs import check_file, is_folder, is_there  # noqa: E402
from ldm.runtime.logs import set_up_logging  # noqa: E402
from ldm.settings.declare import MAX_COUNT, REQUIRED, input_path, setting  # noqa: E402
from ldm.settings.read import check_values, read_settings  # noqa: E402
from ldm.settings.train import TrainSettings  # noqa: E402


@dataclass
class Settings:
    """The command line."""

    lora: list[str] = setting(REQUIRED, "the LoRA's .safetensors", positional=True, path=True, length=1)
    data: Optional[str] = input_path("the data set, in any layout")
    base: Optional[str] = input_path("the base model: a file, or a diffusers folder")
    train_config: Optional[str] = input_path("YAML with the settings, such as train_args.yaml in the run's output_path")
    repeat: Optional[int] = setting(
        None,
        "train so many of the last steps again and compare the factors, or those since the oldest state that is kept",
        low=1,
        high=MAX_COUNT,
    )
    state: Optional[str] = setting(None, "a training state of the run, or the folder that holds them", path=True)

    def __post_init__(self) -> None:
        """Check that one LoRA is given. Raises UserError."""
        check_values(self)


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for each thing that is compared, and return the exit code."""
    settings = read_settings(Settings, argv, prog="tools/lora/verify.py", description=__doc__)
    set_up_logging("WARNING")
    check(settings)
    train_settings = None
    if settings.train_config is not None:
        train_settings = read_settings(
            TrainSettings, [f"--train_config={settings.train_config}"], yaml_flag="train_config"
        )
    from ldm.training.verification import MISMATCH, read_passport, verify, verify_by_repeating

    path = Path(settings.lora[0])
    metadata = read_passport(path)
    findings = verify(path, metadata, settings.data, settings.base, train_settings)
    if settings.repeat is not None:
        assert train_settings is not None and settings.state is not None
        complete = replace(train_settings, data_path=settings.data, pretrained_model_path=settings.base)
        findings.append(verify_by_repeating(path, metadata, complete, settings.state, settings.repeat))
    for finding in findings:
        print(f"{finding.what:9}  {finding.result:11}  {finding.text}")
    return int(any(finding.result == MISMATCH for finding in findings))


def check(settings: Settings) -> None:
    """Check the paths. Raises UserError."""
    check_file(settings.lora[0], way="give the .safetensors that a training wrote")
    for name in ("data", "base", "state"):
        path = getattr(settings, name)
        if path is not None and not is_there(path, f"--{name}"):
            raise UserError(f"--{name} {plain(path)} does not exist: check the path")
    if settings.base is not None and not is_folder(settings.base, "--base"):
        check_file(settings.base, "--base")
    if (settings.repeat is None) != (settings.state is None):
        raise UserError("--repeat and --state go together: how many steps to train again, and from where")
    if settings.repeat is not None:
        for name in ("data", "base", "train_config"):
            if getattr(settings, name) is None:
                raise UserError(f"--repeat needs --{name}: it trains again")


if __name__ == "__main__":
    run_script(main)
