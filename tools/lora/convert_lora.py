"""Say what a LoRA file holds, and write it in another format.

    python tools/lora/convert_lora.py --source style.safetensors                                   # only look
    python tools/lora/convert_lora.py --source style.safetensors --target style.ckpt --to mindone

docs/lora_files.md says what each format keeps.
"""

# ruff: noqa: UP007, UP045 (the annotations are read when it runs, on Python 3.9 too)
from __future__ import annotations

import logging
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ldm.runtime.script import run_script, start_script  # noqa: E402

if __name__ == "__main__":
    start_script()

from ldm.errors import UserError  # noqa: E402
from ldm.files.paths import under_root  # noqa: E402
from ldm.lora.formats import DTYPES, FORMATS, base_of, detect_format, read_lora, write_lora, zero_layers  # noqa: E402
from ldm.lora.formats.modules import BaseModules, fitting, known_bases  # noqa: E402
from ldm.lora.lora import LoRA, LoRALayer  # noqa: E402
from ldm.lora.merge import check_compatible, match_shapes  # noqa: E402
from ldm.lora.targets import claim_lora  # noqa: E402
from ldm.settings.declare import REQUIRED, setting  # noqa: E402
from ldm.settings.model import ModelConfig, load_model_config  # noqa: E402
from ldm.settings.read import read_settings  # noqa: E402
from ldm.weights.names import LABELS  # noqa: E402

# What a layer is for, by diffusers' name: the first that fits.
KINDS = (
    (r"\.attn[12]\.|\.self_attn\.", "attention"),
    (r"\.ff\.|\.mlp\.", "feed-forward"),
    (r"\.proj_(in|out)$", "projections"),
    (r"\.resnets\.", "residual blocks"),
    (r"samplers\.", "resampling"),
    (r"", "first, last, time"),
)
HEADER = ("component", "layers", "modules", "rank", "alpha", "of the base's shape", "all zero")


@dataclass
class Settings:
    """The command line."""

    source: str = setting(REQUIRED, "a LoRA of any known format: a file, or a folder of PEFT's", path=True)
    target: Optional[Path] = setting(None, "what to write; None only prints the table", path=True)
    to: Optional[str] = setting(
        None,
        "the format to write. " + "; ".join(f"{name}: {format.about}" for name, format in FORMATS.items()),
        choices=tuple(FORMATS),
    )
    dtype: str = setting("fp32", "type of the factors written", choices=DTYPES)
    base: Optional[str] = setting(
        None,
        "model YAML of the base model, for models other than SD1.x, SD2.x and the embedded one, and where shapes do "
        "not tell SD1.x from SD2.x",
        path=True,
    )


def main(argv: Sequence[str] | None = None) -> None:
    options = read_settings(Settings, argv, description=__doc__)
    logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stderr, force=True)
    if (options.target is None) != (options.to is None):
        raise UserError("--target and --to go together: where to write, and as what; neither only looks at --source")
    if options.target is None:
        look(options)
    else:
        with claim_lora(options.target, options.to, "--target"):
            convert(options)


def convert(options: Settings) -> None:
    """Write the LoRA in the other format."""
    config, state = look(options)
    write_lora(options.target, state, options.to, config, options.dtype)
    print(f"{options.target}: {options.to} ({FORMATS[options.to].about}), {options.dtype}")


def look(options: Settings) -> tuple[ModelConfig | None, LoRA]:
    """Say what the LoRA holds; the model that it is said to be for, and the LoRA."""
    config = load_model_config(under_root(options.base)) if options.base else None
    found = detect_format(options.source)
    state = read_lora(options.source, config)
    if config:
        check_compatible(state, config, options.source)
    fits = fitting(state, (BaseModules(config),) if config else known_bases())
    print(f"{options.source}: {found} ({FORMATS[found].about})")
    for key, value in state.metadata.items():
        print(f"  {key}: {value}")
    print(table(state, base_of(state, config, options.source)))
    print(f"  made for {' or '.join(base.label for base in fits)}, by the shapes")
    return config, state


def table(state: LoRA, base: BaseModules) -> str:
    """One line for each kind of layer of each component: how many, ranks, alphas, how many have the base's shape."""
    zeros, match = set(zero_layers(state)), match_shapes(base.shapes, state)
    matched = {name for names in match.matched.values() for name in names}
    rows: dict[tuple[str, str], dict[str, LoRALayer]] = {}
    for module in base.modules:
        if module.name in state.layers:
            kind = next(label for pattern, label in KINDS if re.search(pattern, module.path))
            rows.setdefault((LABELS[module.component], kind), {})[module.name] = state.layers[module.name]
    lines = [HEADER]
    for (component, kind), layers in rows.items():
        lines.append((
            component, kind, str(len(layers)), _span(layer.rank for layer in layers.values()),
            _span(layer.alpha for layer in layers.values()), f"{len(matched & layers.keys())} of {len(layers)}",
            str(len(zeros & layers.keys()) or "-"),
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  " + "  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _span(values) -> str:
    distinct = sorted(set(values))
    return f"{distinct[0]:g}" if len(distinct) == 1 else f"{distinct[0]:g} to {distinct[-1]:g}"


if __name__ == "__main__":
    run_script(main)
