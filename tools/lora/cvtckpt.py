"""Base checkpoints with and without LoRA in them, as lora_wrapper's cvtckpt makes them of each other.

    python tools/lora/cvtckpt.py --mode embed   --model_ckpt BASE --lora_ckpt LORA [LORA:0.5 ...] --out_ckpt BOTH.ckpt
    python tools/lora/cvtckpt.py --mode extract --model_ckpt BOTH.ckpt --out_ckpt LORA.ckpt [--out_base BASE.ckpt]
    python tools/lora/cvtckpt.py --mode merge   --model_ckpt BASE --lora_ckpt LORA [LORA:0.5 ...] --out_ckpt MERGED

modes:
  embed    put LoRA's factors beside the base's weights in one file; several LoRAs are joined to one, exactly
  extract  take the LoRA out of such a file (also of lora_wrapper's and mindone's), and with --out_base the base
  merge    add the LoRAs to the base's weights, W + weight * alpha / rank * up @ down, summed in fp32, and what the file
           has embedded too; written in the base's own form and types

A base is a single file of any kind that this project reads or a diffusers folder. FILE:0.7 takes 0.7 of a LoRA,
FILE:0.7:0.3 0.3 of its text encoder's part.
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

from ldm.errors import UserError  # noqa: E402
from ldm.files.outputs import claim_all  # noqa: E402
from ldm.files.paths import path_and_strengths  # noqa: E402
from ldm.lora.algebra import weighted_sum  # noqa: E402
from ldm.lora.checkpoints import Embedded, Merged, as_single_file, split_embedded, write_base  # noqa: E402
from ldm.lora.formats import DTYPES, FORMATS, read_lora, write_lora  # noqa: E402
from ldm.lora.lora import LoRA, Strength  # noqa: E402
from ldm.lora.targets import claim_base, claim_checkpoint, claim_lora  # noqa: E402
from ldm.settings.declare import REQUIRED, setting  # noqa: E402
from ldm.settings.read import read_settings  # noqa: E402
from ldm.weights.base_model import map_base_model, open_base_model  # noqa: E402
from ldm.weights.checkpoint import write_checkpoint  # noqa: E402


@dataclass
class Settings:
    """The command line."""

    mode: str = setting(REQUIRED, "see above", choices=("embed", "extract", "merge"))
    model_ckpt: Path = setting(REQUIRED, "the base model, or for extract the file with LoRA in it", path=True)
    lora_ckpt: list[str] = setting([], "LoRAs of any format: FILE, FILE:STRENGTH or FILE:STRENGTH:TEXT_STRENGTH")
    out_ckpt: Path = setting(REQUIRED, "what to write", path=True)
    out_base: Optional[Path] = setting(
        None, "extract: write the base model without the LoRA to this file too", path=True
    )
    to: Optional[str] = setting(
        None, "extract: format of the LoRA; None for mindone, this project's own", choices=tuple(FORMATS)
    )
    dtype: Optional[str] = setting(None, "extract: type of the LoRA's factors; None for fp32", choices=DTYPES)


def main(argv: Sequence[str] | None = None) -> None:
    args = read_settings(Settings, argv, description=__doc__)
    if args.mode != "extract":
        for flag in ("out_base", "to", "dtype"):
            if getattr(args, flag) is not None:
                raise UserError(f"--{flag} belongs to --mode extract: leave it out of {args.mode}")
    if args.out_base and args.out_base.resolve() == args.out_ckpt.resolve():
        raise UserError(f"--out_ckpt and --out_base are both {args.out_ckpt}: give each a name of its own")
    claims = {
        "embed": lambda: claim_checkpoint(args.out_ckpt, "--out_ckpt"),
        "merge": lambda: claim_base(args.out_ckpt, args.model_ckpt, "--out_ckpt"),
        "extract": lambda: claim_all(
            claim_lora(args.out_ckpt, args.to or "mindone", "--out_ckpt"),
            *([claim_checkpoint(args.out_base, "--out_base")] if args.out_base else ()),
        ),
    }
    with claims[args.mode]():
        {"embed": embed, "extract": extract, "merge": merge}[args.mode](args)


def embed(args: Settings) -> None:
    state = read_loras(args.lora_ckpt)
    with as_single_file(args.model_ckpt, args.out_ckpt) as base:
        if split_embedded(base)[1] is not None:
            raise UserError(f"{args.model_ckpt} has LoRA in it already: merge adds to it, extract takes it out")
        embedded = Embedded(base, map_base_model(base), state)
        write_checkpoint(args.out_ckpt, embedded, {**base.metadata, **state.metadata})
    print(f"{args.out_ckpt}: {args.model_ckpt} and beside it {state}")


def extract(args: Settings) -> None:
    if args.lora_ckpt:
        raise UserError("--mode extract takes the LoRA out of --model_ckpt: leave out --lora_ckpt")
    checkpoint = open_base_model(args.model_ckpt)
    base, state = split_embedded(checkpoint)
    if state is None:
        raise UserError(
            f"{args.model_ckpt} has no LoRA beside its weights; one that was merged into them is found by "
            "tools/lora/extract_lora.py, given the base without it"
        )
    write_lora(args.out_ckpt, state, args.to or "mindone", dtype=args.dtype or "fp32")
    print(f"{args.out_ckpt}: {state}")
    if args.out_base:
        write_checkpoint(args.out_base, base, checkpoint.metadata)
        print(f"{args.out_base}: {len(base)} arrays without LoRA")


def merge(args: Settings) -> None:
    checkpoint = open_base_model(args.model_ckpt)
    base, inside = split_embedded(checkpoint)
    if inside is None and not args.lora_ckpt:
        raise UserError(f"{args.model_ckpt} has no LoRA in it, and no --lora_ckpt is given: there is nothing to merge")
    states = [(inside, Strength())] if inside is not None else []
    if args.lora_ckpt:
        states.append((read_loras(args.lora_ckpt), Strength()))
    write_base(args.out_ckpt, Merged(base, map_base_model(base), weighted_sum(states)), checkpoint)
    print(f"{args.out_ckpt}: {args.model_ckpt} with {'the LoRA inside it and ' * (inside is not None)}"
          f"{len(args.lora_ckpt)} LoRA files merged")  # fmt: skip


def read_loras(texts: Sequence[str]) -> LoRA:
    """The weighted sum of the files, each said."""
    if not texts:
        raise UserError("--lora_ckpt is needed: one or several LoRAs")
    states = []
    for text in texts:
        path, given = path_and_strengths(text, "lora_ckpt")
        weights = Strength(*given) if len(given) == 2 else Strength(*(given or (1.0,)) * 2)
        states.append((read_lora(path), weights))
        print(f"{path}: {states[-1][0]}; weight {weights}")
    return weighted_sum(states)


if __name__ == "__main__":
    run_script(main)
