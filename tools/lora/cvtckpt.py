"""Put a LoRA beside a base model's weights, take it out again, or merge it, with the flags of lora_wrapper's cvtckpt.

    python tools/lora/cvtckpt.py --mode embed   --model_ckpt BASE --lora_ckpt LORA [LORA:0.5 ...] --out_ckpt BOTH.ckpt
    python tools/lora/cvtckpt.py --mode extract --model_ckpt BOTH.ckpt --out_ckpt LORA.ckpt [--out_base BASE.ckpt]
    python tools/lora/cvtckpt.py --mode merge   --model_ckpt BASE --lora_ckpt LORA [LORA:0.5 ...] --out_ckpt MERGED

modes:
  embed    write the base model's weights and the LoRA's factors to one file; several LoRAs are joined exactly
  extract  take the LoRA out of such a file (also lora_wrapper's and mindone's), and with --out_base the base model
  merge    add the LoRAs, and one that is embedded already, to the weights: W + strength * alpha / rank * up @ down,
           summed in fp32 and written in the form and types of the base model

A base model is a file of any kind that this project reads, or a diffusers folder. FILE:0.7 is a LoRA at strength 0.7,
FILE:0.7:0.3 one at strength 0.3 in the text encoder. --lora_block_weights multiplies the strengths block by block
(docs/lora_toolbox.md).
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

from ldm.errors import UserError  # noqa: E402
from ldm.files.outputs import claim_all  # noqa: E402
from ldm.files.paths import path_and_strengths  # noqa: E402
from ldm.lora.algebra import check_sum, weighted_sum  # noqa: E402
from ldm.lora.checkpoints import EmbeddedArrays, MergedArrays, split_embedded  # noqa: E402
from ldm.lora.claims import claim_base, claim_checkpoint, claim_lora  # noqa: E402
from ldm.lora.formats import DTYPES, FORMATS, read_lora, write_lora  # noqa: E402
from ldm.lora.formats.factors import warn_of_left_out_tokens  # noqa: E402
from ldm.lora.lora import LoRA  # noqa: E402
from ldm.lora.strength import Strength  # noqa: E402
from ldm.settings.block_weights import block_weights_of_each, block_weights_setting  # noqa: E402
from ldm.settings.declare import REQUIRED, setting  # noqa: E402
from ldm.settings.read import read_settings  # noqa: E402
from ldm.weights.base_model import map_base_model, open_base_model  # noqa: E402
from ldm.weights.checkpoint import write_checkpoint  # noqa: E402
from ldm.weights.names import KeyMap  # noqa: E402
from ldm.weights.rewrite import open_as_single_file, write_base_model  # noqa: E402


@dataclass
class Settings:
    """The command line."""

    mode: str = setting(REQUIRED, "see above", choices=("embed", "extract", "merge"))
    model_ckpt: Path = setting(REQUIRED, "the base model, or for extract the file with LoRA in it", path=True)
    lora_ckpt: list[str] = setting([], "LoRAs of any format: FILE, FILE:STRENGTH or FILE:STRENGTH:TEXT_STRENGTH")
    lora_block_weights: list[str] = block_weights_setting()
    out_ckpt: Path = setting(REQUIRED, "what to write", path=True)
    out_base: Optional[Path] = setting(
        None, "extract: write the base model without the LoRA to this file too", path=True
    )
    to: Optional[str] = setting(
        None, "extract: format of the LoRA; None for mindone, this project's own", choices=tuple(FORMATS)
    )
    dtype: Optional[str] = setting(None, "extract: type of the LoRA's factors; None for fp32", choices=DTYPES)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tool."""
    settings = read_settings(Settings, argv, description=__doc__)
    if settings.mode != "extract":
        for flag in ("out_base", "to", "dtype"):
            if getattr(settings, flag) is not None:
                raise UserError(f"--{flag} belongs to --mode extract: leave it out of {settings.mode}")
    if settings.out_base and settings.out_base.resolve() == settings.out_ckpt.resolve():
        raise UserError(f"--out_ckpt and --out_base are both {settings.out_ckpt}: give each a name of its own")
    {"embed": embed, "extract": extract, "merge": merge}[settings.mode](settings)


def embed(settings: Settings) -> None:
    """Write the base model with the LoRA beside its weights."""
    with claim_checkpoint(settings.out_ckpt, "--out_ckpt"):
        loras = read_loras(settings)
        # One LoRA as it is may be of any kind. Only pairs of low-rank factors have a sum and a strength in a file.
        lora = loras[0][0] if len(loras) == 1 and loras[0][1] == Strength() else weighted_sum(loras)
        with open_as_single_file(settings.model_ckpt, settings.out_ckpt) as base:
            if split_embedded(base)[1] is not None:
                raise UserError(f"{settings.model_ckpt} has a LoRA in it: merge adds to it, extract takes it out")
            key_map = map_base_model(base)
            check_block_weights(loras, key_map, settings)
            warn_of_left_out_tokens(settings.out_ckpt, lora, "a base model")
            embedded = EmbeddedArrays(base, key_map, lora)
            write_checkpoint(settings.out_ckpt, embedded, {**base.metadata, **lora.metadata})
        print(f"{settings.out_ckpt}: {settings.model_ckpt} and beside it {lora}")


def extract(settings: Settings) -> None:
    """Write the LoRA beside a base model's weights to a file of its own, and the base model if --out_base is given."""
    format = settings.to or "mindone"
    claims = [claim_lora(settings.out_ckpt, format, "--out_ckpt")]
    if settings.out_base:
        claims.append(claim_checkpoint(settings.out_base, "--out_base"))
    with claim_all(*claims):
        for flag in ("lora_ckpt", "lora_block_weights"):
            if getattr(settings, flag):
                raise UserError(f"--mode extract takes the LoRA out of --model_ckpt: leave out --{flag}")
        checkpoint = open_base_model(settings.model_ckpt)
        base, lora = split_embedded(checkpoint)
        if lora is None:
            raise UserError(
                f"{settings.model_ckpt} has no LoRA beside its weights. tools/lora/extract_lora.py finds one that was "
                "merged into them, given the base model without it"
            )
        write_lora(settings.out_ckpt, lora, format, dtype=settings.dtype or "fp32")
        print(f"{settings.out_ckpt}: {lora}")
        if settings.out_base:
            write_checkpoint(settings.out_base, base, checkpoint.metadata)
            print(f"{settings.out_base}: {len(base)} arrays without LoRA")


def merge(settings: Settings) -> None:
    """Write the base model with the LoRAs, and one that is beside its weights, added to the weights."""
    with claim_base(settings.out_ckpt, settings.model_ckpt, "--out_ckpt"):
        checkpoint = open_base_model(settings.model_ckpt)
        base, embedded = split_embedded(checkpoint)
        if embedded is None and not settings.lora_ckpt:
            raise UserError(
                f"{settings.model_ckpt} has no LoRA in it, and no --lora_ckpt is given: there is nothing to merge"
            )
        if settings.lora_block_weights and not settings.lora_ckpt:
            raise UserError("--lora_block_weights is for LoRAs of --lora_ckpt, not for the one in --model_ckpt")
        key_map = map_base_model(base)
        loras = [(embedded, Strength())] if embedded is not None else []
        if settings.lora_ckpt:
            added = read_loras(settings)
            check_block_weights(added, key_map, settings)
            loras += added
        check_sum(loras)
        for lora, _ in loras:
            warn_of_left_out_tokens(settings.out_ckpt, lora, "a base model")
        write_base_model(settings.out_ckpt, MergedArrays(base, key_map, loras), checkpoint)
        sources = f"{'the LoRA inside it and ' if embedded is not None else ''}{len(settings.lora_ckpt)} LoRA files"
        print(f"{settings.out_ckpt}: {settings.model_ckpt} with {sources} merged")


def read_loras(settings: Settings) -> list[tuple[LoRA, Strength]]:
    """Read LoRAs with the strengths after their paths and their block weights, and print what they hold."""
    paths = settings.lora_ckpt
    if not paths:
        raise UserError("--lora_ckpt is needed: one or several LoRAs")
    loras = []
    blocks = block_weights_of_each(settings.lora_block_weights, len(paths), "--lora_block_weights")
    for path_and_strength, weights in zip(paths, blocks):
        path, numbers = path_and_strengths(path_and_strength, "lora_ckpt")
        lora, strength = read_lora(path), Strength.from_numbers(numbers, blocks=weights)
        print(f"{path}: {lora}; strength {strength}")
        strength.check_lora(lora, str(path))
        strength.warn_of_layers(lora, str(path))
        loras.append((lora, strength))
    return loras


def check_block_weights(loras: Sequence[tuple[LoRA, Strength]], key_map: KeyMap, settings: Settings) -> None:
    """Raise UserError for block weights that do not suit the base model."""
    for path, (_, strength) in zip(settings.lora_ckpt, loras):
        strength.check_model(key_map.sources, path, str(settings.model_ckpt))


if __name__ == "__main__":
    run_script(main)
