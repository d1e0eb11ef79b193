"""Add LoRAs to each other, or to a base model: the command line of cloneofsimo's lora_add, for any LoRA file and base.

    python tools/lora/lora_add.py --path_1 BASE --path_2 LORA --mode upl --alpha 1.0 --output_path OUT
    python tools/lora/lora_add.py --path_1 A --path_2 B --mode sum --alpha 0.3 --output_path OUT.ckpt
    python tools/lora/lora_add.py --paths A:0.7 B:0.5:0 C:-0.2 --output_path OUT.safetensors --to kohya --rank 8

modes:
  lpl          two LoRAs, as the original does it: their factors are mixed, (a U1 + b U2)(a D1 + b D2), a = alpha and
               b = 1 - alpha. That is not the mean of what they do; how far it is from it is printed
  sum          any number of LoRAs: the weighted sum of their updates, exact, with their ranks added; --rank or --energy
               make it smaller, and print what that costs. Weights alpha and 1 - alpha of two, 1 of --paths
  ljl          as sum, with weight 1 each: ranks joined side by side
  upl          path_1 is a base model in any form, the rest are LoRAs: base + alpha * LoRA, in the base's own form (a
               diffusers folder stays one)
  upl-ckpt-v2  as upl, written as one file in fp16: .safetensors (the published names) or .ckpt (mindone's). Tokens that
               cloneofsimo's LoRAs learned go into a .pt of the same name, an embedding for A1111's web UI

A weight after a path (FILE:0.7) holds in the place of alpha, a second one (FILE:0.7:0.3) is the text encoder's.
"""

# ruff: noqa: UP007, UP045 (the annotations are read when it runs, on Python 3.9 too)
from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's folder, where this is run as a script

from ldm.runtime.script import run_script, start_script  # noqa: E402

if __name__ == "__main__":
    start_script()

from ldm.errors import UserError  # noqa: E402
from ldm.files.outputs import claim_new  # noqa: E402
from ldm.files.paths import path_and_strengths  # noqa: E402
from ldm.lora.algebra import check_cut, mix_factors, relative_difference, resize, weighted_sum  # noqa: E402
from ldm.lora.checkpoints import Merged, write_base, write_published  # noqa: E402
from ldm.lora.formats import DTYPES, FORMATS, lora_files, read_lora, write_lora  # noqa: E402
from ldm.lora.formats.cloneofsimo import learned_tokens, write_embedding  # noqa: E402
from ldm.lora.lora import LoRA, Strength  # noqa: E402
from ldm.lora.targets import claim_base, claim_checkpoint, claim_lora  # noqa: E402
from ldm.settings.declare import setting  # noqa: E402
from ldm.settings.read import read_settings  # noqa: E402
from ldm.weights.base_model import map_base_model, open_base_model  # noqa: E402
from ldm.weights.checkpoint import open_checkpoint  # noqa: E402
from ldm.weights.names.tables import TEXT_PREFIX  # noqa: E402

TOKEN_EMBEDDING = f"{TEXT_PREFIX}embeddings.token_embedding.weight"
MODES = ("lpl", "sum", "ljl", "upl", "upl-ckpt-v2")
PLACES = ("path_1", "path_2", "output_path", "alpha")


@dataclass
class Settings:
    """The command line."""

    places: list[str] = setting(
        [], "values without flags are path_1, path_2, output_path and alpha, as in the original", positional=True
    )
    path_1: Optional[str] = setting(None, "a LoRA, or in the modes upl and upl-ckpt-v2 the base model", path=True)
    path_2: Optional[str] = setting(
        None, "a LoRA: a file of any format, or a folder of PEFT's or diffusers'", path=True
    )
    paths: list[str] = setting([], "more LoRAs: FILE, FILE:STRENGTH or FILE:STRENGTH:TEXT_STRENGTH")
    output_path: Optional[Path] = setting(None, "what to write", path=True)
    alpha: float = setting(0.5, "strength of the LoRA (upl), or of the first of two; the second has 1 - alpha")
    alpha_1: Optional[float] = setting(None, "strength of the first alone, as in later versions of the original")
    alpha_2: Optional[float] = setting(None, "strength of the second alone")
    mode: Optional[str] = setting(None, "see above; None: lpl for two LoRAs, sum with --paths", choices=MODES)
    with_text_lora: bool = setting(True, "take the text encoder's LoRA too, where there is one")
    rank: Optional[int] = setting(None, "sum, ljl: cut the result down to this rank by SVD", low=1)
    energy: Optional[float] = setting(
        None, "sum, ljl: cut each layer down to this share of its squared norm", low=0, high=1
    )
    to: Optional[str] = setting(
        None,
        "format of the LoRA written; None: mindone, this project's own, or cloneofsimo-pt for a .pt",
        choices=tuple(FORMATS),
    )
    dtype: Optional[str] = setting(None, "type of the LoRA written; None for fp32", choices=DTYPES)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    bases = args.mode in ("upl", "upl-ckpt-v2")
    if bases:
        for flag in ("rank", "energy", "to", "dtype"):
            if getattr(args, flag) is not None:
                raise UserError(f"--{flag} is of a LoRA: leave it out, mode {args.mode} writes a base model")
    elif args.rank is not None or args.energy is not None:
        check_cut(args.rank, args.energy)
    texts = [text for text in (None if bases else args.path_1, args.path_2, *args.paths) if text]
    if not texts or (args.mode == "lpl" and len(texts) != 2):
        wanted = "two" if args.mode == "lpl" else "at least one"
        raise UserError(f"mode {args.mode} takes {wanted}, {len(texts)} LoRAs are given: --path_1, --path_2, --paths")
    with claim(args):
        weighted = [(read(text, args.with_text_lora), weights) for text, weights in zip(texts, _weights(texts, args))]
        for text, (state, weights) in zip(texts, weighted):
            print(f"{text}: {state}; weight {weights}")
        if bases:
            add_to_base(args, weighted, texts)
        else:
            add_loras(args, weighted)


def claim(args: Settings) -> AbstractContextManager[None]:
    """Hold what the mode writes."""
    if args.mode == "upl":
        return claim_base(args.output_path, Path(args.path_1), "--output_path")
    if args.mode == "upl-ckpt-v2":
        return claim_checkpoint(args.output_path, "--output_path")
    return claim_lora(args.output_path, lora_format(args), "--output_path")


def lora_format(args: Settings) -> str:
    """The format of the LoRA that is written: what --to says, else by the suffix."""
    return args.to or ("cloneofsimo-pt" if args.output_path.suffix == ".pt" else "mindone")


def add_loras(args: Settings, weighted: list[tuple[LoRA, Strength]]) -> None:
    """LoRA and LoRA."""
    if args.mode == "lpl":
        (first, one), (second, two) = weighted
        if one.unet != one.text_encoder or two.unet != two.text_encoder:
            raise UserError("mode lpl has one weight for both networks: take --mode sum for weights of their own")
        result = mix_factors(first, second, one.unet, two.unet)
        error = relative_difference(result, weighted_sum(weighted))
        print(f"mixed factors: relative error {error:.2g} against the exact weighted sum (--mode sum)")
    else:
        result = weighted_sum(weighted)
    if args.rank is not None or args.energy is not None:
        result, report = resize(result, args.rank, args.energy)
        print(report)
    write_lora(args.output_path, result, lora_format(args), dtype=args.dtype or "fp32")
    print(f"{args.output_path}: {result}")


def add_to_base(args: Settings, weighted: list[tuple[LoRA, Strength]], texts: list[str]) -> None:
    """Base and LoRAs; `texts` are the LoRAs' paths as given."""
    base = open_base_model(args.path_1)
    key_map = map_base_model(base)
    merged = Merged(base, key_map, weighted_sum(weighted))
    tokens, beside = [], args.output_path.with_suffix(".pt")
    if args.mode == "upl-ckpt-v2":
        tokens = tokens_of(texts, base.shape(key_map.sources[TOKEN_EMBEDDING].name)[1])
    with claim_new(beside, "--output_path") if tokens else nullcontext():
        write = write_published if args.mode == "upl-ckpt-v2" else write_base
        write(args.output_path, merged, base)
        print(f"{args.output_path}: {args.path_1} with {len(weighted)} LoRA{'s' * (len(weighted) > 1)} in it")
        if tokens:
            write_embedding(beside, np.stack([vector for _, vector in tokens]))
            print(
                f"{beside}: {', '.join(token for token, _ in tokens)}, in this order, as one embedding: its file "
                "name is its word in a prompt"
            )


def tokens_of(texts: list[str], width: int) -> list[tuple[str, np.ndarray]]:
    """The learned tokens that lie in the LoRAs' files, given by their paths, LoRA by LoRA: (token, vector (width,))."""
    tokens = []
    for file in (file for text in texts for file in lora_files(path_and_strengths(text, "LoRA")[0])):
        for token, vector in learned_tokens(open_checkpoint(file)).items():
            if vector.shape != (width,):
                raise UserError(
                    f"{file}: the learned token {token} has {len(vector)} numbers, the base's tokens have "
                    f"{width}: it was made for another model (--mode upl leaves tokens out)"
                )
            tokens.append((token, vector))
    return tokens


def read(text: str, with_text_lora: bool) -> LoRA:
    state = read_lora(path_and_strengths(text, "LoRA")[0])
    return state if with_text_lora else state.only("unet")


def _weights(texts: list[str], args: Settings) -> list[Strength]:
    """Of each LoRA: what is after its path, or else what the mode says."""
    first = args.alpha if args.alpha_1 is None else args.alpha_1
    second = (1 - args.alpha) if args.alpha_2 is None else args.alpha_2
    if args.mode in ("upl", "upl-ckpt-v2"):
        usual = [first] if args.path_2 else []
    elif args.mode == "ljl" or not args.path_1:
        usual = []
    else:
        usual = [first, second] if args.path_2 else [1.0]
    usual += [1.0] * (len(texts) - len(usual))
    weights = []
    for text, weight in zip(texts, usual):
        given = path_and_strengths(text, "LoRA")[1]
        weights.append(Strength(*given) if len(given) == 2 else Strength(*(given or (weight,)) * 2))
    return weights


def parse(argv: Sequence[str] | None) -> Settings:
    """Reads the command line, with paths that are given without their flags."""
    argv = sys.argv[1:] if argv is None else argv
    args = read_settings(Settings, argv, description=__doc__)
    if len(args.places) > len(PLACES):
        raise UserError(
            f"{len(args.places)} values without a flag are given, at most {len(PLACES)} are read: give further LoRAs "
            "as --paths"
        )
    if args.places:
        flags = [f"--{name}={text}" for name, text in zip(PLACES, args.places)]
        args = read_settings(Settings, [*argv, *flags], description=__doc__)
    if args.output_path is None:
        raise UserError("--output_path is needed: what to write")
    if args.mode is None:
        args.mode = "sum" if args.paths else "lpl"
    if args.mode in ("upl", "upl-ckpt-v2") and not args.path_1:
        raise UserError(f"--path_1 is needed: the base model that mode {args.mode} adds to")
    return args


if __name__ == "__main__":
    run_script(main)
