"""Print what a LoRA file holds, and convert it to another format.

    python tools/lora/convert_lora.py --source style.safetensors                                   # only print
    python tools/lora/convert_lora.py --source style.safetensors --target style.ckpt --to mindone
    python tools/lora/convert_lora.py --source loha.safetensors --target lora.safetensors --to kohya --bake_energy 0.99

--bake_rank and --bake_energy make pairs of low-rank factors of all other kinds (LoHa, LoKr, DoRA, ...), by the SVD of
each layer's update, and print what is kept. docs/lora_files.md says what each format keeps.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ldm.runtime.script import run_script, start_script  # noqa: E402

if __name__ == "__main__":
    start_script()

from ldm.errors import UserError  # noqa: E402
from ldm.files.paths import under_root  # noqa: E402
from ldm.lora.bake import bake  # noqa: E402
from ldm.lora.claims import claim_lora  # noqa: E402
from ldm.lora.formats import DTYPES, FORMATS, base_of, detect_format, read_lora, write_lora  # noqa: E402
from ldm.lora.formats.modules import BaseModules, fitting_bases, known_bases  # noqa: E402
from ldm.lora.lora import LoRA  # noqa: E402
from ldm.lora.merge import check_compatible, match_shapes  # noqa: E402
from ldm.lora.products import Product  # noqa: E402
from ldm.lora.updates import LayerUpdate, LoRALayer, direction_of  # noqa: E402
from ldm.settings.declare import MAX_RANK, REQUIRED, input_path, setting  # noqa: E402
from ldm.settings.model import ModelConfig, load_model_config  # noqa: E402
from ldm.settings.read import read_settings  # noqa: E402
from ldm.weights.names import LABELS  # noqa: E402

# What a layer is for: the first pattern that matches diffusers' name.
KINDS = (
    (r"\.attn[12]\.|\.self_attn\.", "attention"),
    (r"norm", "normalisations"),
    (r"\.ff\.|\.mlp\.", "feed-forward"),
    (r"\.proj_(in|out)$", "projections"),
    (r"\.resnets\.", "residual blocks"),
    (r"samplers\.", "resampling"),
    (r"", "first, last, time"),
)
HEADER = ("component", "layers", "kind", "number", "rank", "alpha", "fit the base model", "all zero")


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
        "model YAML of the base model, for models other than SD1.x, SD2.x and nano, and where shapes do "
        "not tell SD1.x from SD2.x",
        path=True,
    )
    bake_rank: Optional[int] = setting(
        None, "make pairs of low-rank factors of other kinds of layers, of at most this rank", low=1, high=MAX_RANK
    )
    bake_energy: Optional[float] = setting(
        None,
        "make pairs of low-rank factors of other kinds of layers, each of the smallest rank that keeps this share of "
        "the squared norm of its update",
        above=0,
        high=1,
    )
    ckpt_path: Optional[str] = input_path("base model, for baking DoRA, IA3 and OFT, which depend on its weights")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tool."""
    settings = read_settings(Settings, argv, description=__doc__)
    logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stderr, force=True)
    if (settings.target is None) != (settings.to is None):
        raise UserError("--target and --to go together: what to write, and its format. Leave out both to only print")
    if settings.target is None:
        inspect_lora(settings)
    else:
        with claim_lora(settings.target, settings.to, "--target"):
            convert(settings)


def convert(settings: Settings) -> None:
    """Print what the LoRA holds and write it in the other format."""
    config, lora = inspect_lora(settings)
    if settings.bake_rank is not None or settings.bake_energy is not None:
        baked = bake(lora, settings.bake_rank, settings.bake_energy, settings.ckpt_path, config)
        print(baked)
        lora = baked.lora
    write_lora(settings.target, lora, settings.to, config, settings.dtype)
    print(f"{settings.target}: {settings.to} ({FORMATS[settings.to].about}), {settings.dtype}")


def inspect_lora(settings: Settings) -> tuple[ModelConfig | None, LoRA]:
    """Read the LoRA and print what it holds. Returns the configuration of --base, and the LoRA."""
    config = load_model_config(under_root(settings.base)) if settings.base else None
    format = detect_format(settings.source)
    lora = read_lora(settings.source, config)
    if config:
        check_compatible(lora, config, settings.source)
    bases = fitting_bases(lora, (BaseModules(config),) if config else known_bases())
    print(f"{settings.source}: {format} ({FORMATS[format].about})")
    for key, value in lora.metadata.items():
        print(f"  {key}: {value}")
    print(table(lora, base_of(lora, config, settings.source)))
    print(f"  made for {' or '.join(base.label for base in bases)}, by the shapes")
    return config, lora


def table(lora: LoRA, base: BaseModules) -> str:
    """Return a table with a line for each kind of layer of each component."""
    zeros, matched = set(lora.zero_layers()), set(match_shapes(base.shapes, lora).matched)
    rows: dict[tuple[str, str, str], dict[str, LayerUpdate]] = {}
    for module in (*base.modules, *base.norms):
        place = next(label for pattern, label in KINDS if re.search(pattern, module.path))
        if module.name in lora.layers:
            update = lora.layers[module.name]
            rows.setdefault((LABELS[module.component], place, update.label), {})[module.name] = update
        if module.name in lora.biases:
            name = f"{module.name}.bias"
            rows.setdefault((LABELS[module.component], place, "bias"), {})[name] = lora.biases[module.name]
    lines = [HEADER]
    for (component, place, kind), layers in rows.items():
        alphas = [
            layer.alpha for layer in map(direction_of, layers.values()) if isinstance(layer, (LoRALayer, Product))
        ]
        lines.append((
            component, place, kind, str(len(layers)),
            _span(layer.rank for layer in layers.values() if layer.rank is not None), _span(alphas),
            f"{len(matched & layers.keys())} of {len(layers)}", str(len(zeros & layers.keys()) or "-"),
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  " + "  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _span(values: Iterable[float]) -> str:
    distinct = sorted(set(values))
    if not distinct:
        return "-"
    return f"{distinct[0]:g}" if len(distinct) == 1 else f"{distinct[0]:g} to {distinct[-1]:g}"


if __name__ == "__main__":
    run_script(main)
