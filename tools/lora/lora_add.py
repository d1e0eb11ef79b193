"""Add LoRAs to each other or to a base model, with the flags of cloneofsimo's lora_add, for files of any format.

    python tools/lora/lora_add.py --path_1 BASE --path_2 LORA --mode upl --alpha 1.0 --output_path OUT
    python tools/lora/lora_add.py --path_1 A --path_2 B --mode sum --alpha 0.3 --output_path OUT.ckpt
    python tools/lora/lora_add.py --paths A:0.7 B:0.5:0 C:-0.2 --output_path OUT.safetensors --to kohya --rank 8

modes:
  lpl          mix the factors of two LoRAs as the original does, (a U1 + b U2)(a D1 + b D2) with a = alpha and
               b = 1 - alpha. That is not the sum of their updates. The relative error against it is printed
  sum          add the updates of any number of LoRAs exactly. The ranks add up. --rank or --energy make the result
               smaller, and the error is printed. Strengths are alpha and 1 - alpha for two, 1 for --paths
  ljl          as sum, at strength 1 each: the factors are joined side by side
  upl          add LoRAs to a base model at --path_1 of any form: base + alpha * LoRA, written in the same form (a
               diffusers folder stays one)
  upl-ckpt-v2  as upl, written as one fp16 file: .safetensors (the published names) or .ckpt (mindone's). Tokens that
               cloneofsimo's LoRAs learned go into a .pt of the same name, an embedding for A1111's web UI

FILE:0.7 is a LoRA at strength 0.7 in place of alpha, FILE:0.7:0.3 one at strength 0.3 in the text encoder.
--lora_block_weights multiplies the strengths block by block (docs/lora_toolbox.md), in all modes except lpl.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's folder, where this is run as a script

from ldm.runtime.script import run_script, start_script  # noqa: E402

if __name__ == "__main__":
    start_script()

import numpy as np  # noqa: E402

from ldm.errors import UserError, plain  # noqa: E402
from ldm.files.outputs import claim_new  # noqa: E402
from ldm.files.paths import path_and_strengths  # noqa: E402
from ldm.lora.algebra import (  # noqa: E402
    check_cut,
    check_sum,
    mix_factors,
    relative_difference,
    resize,
    weighted_sum,
)
from ldm.lora.checkpoints import MergedArrays  # noqa: E402
from ldm.lora.claims import claim_base, claim_checkpoint, claim_lora  # noqa: E402
from ldm.lora.formats import DTYPES, FORMATS, read_lora, write_lora  # noqa: E402
from ldm.lora.formats.factors import warn_of_left_out_tokens  # noqa: E402
from ldm.lora.lora import LoRA  # noqa: E402
from ldm.lora.strength import Strength  # noqa: E402
from ldm.settings.block_weights import block_weights_of_each, block_weights_setting  # noqa: E402
from ldm.settings.declare import setting  # noqa: E402
from ldm.settings.read import read_settings  # noqa: E402
from ldm.textual_inversion.embedding import Embedding  # noqa: E402
from ldm.textual_inversion.formats import write_embeddings  # noqa: E402
from ldm.weights.base_model import map_base_model, open_base_model  # noqa: E402
from ldm.weights.names.tables import TEXT_PREFIX  # noqa: E402
from ldm.weights.rewrite import write_base_model, write_fp16_file  # noqa: E402

TOKEN_EMBEDDING = f"{TEXT_PREFIX}embeddings.token_embedding.weight"
BASE_MODES = ("upl", "upl-ckpt-v2")  # write a base model
MODES = ("lpl", "sum", "ljl", *BASE_MODES)
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
    lora_block_weights: list[str] = block_weights_setting()
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
    """Run the tool."""
    settings = parse(argv)
    to_base = settings.mode in BASE_MODES
    if to_base:
        for flag in ("rank", "energy", "to", "dtype"):
            if getattr(settings, flag) is not None:
                raise UserError(f"--{flag} is for a LoRA: leave it out, mode {settings.mode} writes a base model")
    elif settings.rank is not None or settings.energy is not None:
        check_cut(settings.rank, settings.energy)
    paths = [path for path in (None if to_base else settings.path_1, settings.path_2, *settings.paths) if path]
    if not paths or (settings.mode == "lpl" and len(paths) != 2):
        wanted = "two" if settings.mode == "lpl" else "at least one"
        raise UserError(
            f"mode {settings.mode} takes {wanted}, {len(paths)} LoRAs are given: --path_1, --path_2, --paths"
        )
    if settings.mode == "lpl" and settings.lora_block_weights:
        raise UserError("mode lpl has one strength for all layers: take --mode sum for --lora_block_weights")
    with claim_output(settings):
        loras = read_loras(paths, settings)
        if to_base:
            add_to_base(settings, loras, paths)
        else:
            add_loras(settings, loras)


def claim_output(settings: Settings) -> AbstractContextManager[None]:
    """Claim what the mode writes."""
    if settings.mode == "upl":
        return claim_base(settings.output_path, Path(settings.path_1), "--output_path")
    if settings.mode == "upl-ckpt-v2":
        return claim_checkpoint(settings.output_path, "--output_path")
    return claim_lora(settings.output_path, lora_format(settings), "--output_path")


def lora_format(settings: Settings) -> str:
    """Return the format of the LoRA that is written, given by --to or the suffix."""
    return settings.to or ("cloneofsimo-pt" if settings.output_path.suffix == ".pt" else "mindone")


def read_loras(paths: list[str], settings: Settings) -> list[tuple[LoRA, Strength]]:
    """Read the LoRAs and print what they hold. Returns each with its strength."""
    loras = []
    blocks = block_weights_of_each(settings.lora_block_weights, len(paths), "--lora_block_weights")
    for text, default, weights in zip(paths, _default_strengths(len(paths), settings), blocks):
        path, numbers = path_and_strengths(text, "LoRA")
        lora = read_lora(path)
        lora = lora if settings.with_text_lora else replace(lora.only("unet"), embeddings=lora.embeddings)
        loras.append((lora, Strength.from_numbers(numbers, default, weights)))
    for text, (lora, strength) in zip(paths, loras):
        print(f"{text}: {lora}; strength {strength}")
        strength.check_lora(lora, text)
        strength.warn_of_layers(lora, text)
    return loras


def add_loras(settings: Settings, loras: list[tuple[LoRA, Strength]]) -> None:
    """Write the sum of LoRAs."""
    if settings.mode == "lpl":
        (first, strength1), (second, strength2) = loras
        if any(strength.unet != strength.text_encoder for strength in (strength1, strength2)):
            raise UserError("mode lpl has one strength for both networks: take --mode sum for two different ones")
        result = mix_factors(first, second, strength1.unet, strength2.unet)
        error = relative_difference(result, weighted_sum(loras))
        print(f"mixed factors: relative error {error:.2g} against the exact weighted sum (--mode sum)")
    else:
        result = weighted_sum(loras)
    if settings.rank is not None or settings.energy is not None:
        result, truncation = resize(result, settings.rank, settings.energy)
        print(truncation)
    write_lora(settings.output_path, result, lora_format(settings), dtype=settings.dtype or "fp32")
    print(f"{settings.output_path}: {result}")


def add_to_base(settings: Settings, loras: list[tuple[LoRA, Strength]], paths: list[str]) -> None:
    """Write the base model with LoRAs, given with their paths, added to its weights."""
    base = open_base_model(settings.path_1)
    key_map = map_base_model(base)
    for text, (_, strength) in zip(paths, loras):
        strength.check_model(key_map.sources, text, settings.path_1)
    check_sum(loras)
    merged = MergedArrays(base, key_map, loras)
    one_file = settings.mode == "upl-ckpt-v2"
    tokens = []
    if one_file:
        width = base.shape(key_map.sources[TOKEN_EMBEDDING].name)[1]
        tokens = read_tokens([lora for lora, _ in loras], paths, width)
    else:
        for lora, _ in loras:
            warn_of_left_out_tokens(settings.output_path, lora, "a base model")
    embedding = settings.output_path.with_suffix(".pt")
    with claim_new(embedding, "--output_path") if tokens else nullcontext():
        write = write_fp16_file if one_file else write_base_model
        write(settings.output_path, merged, base)
        print(f"{settings.output_path}: {settings.path_1} with {len(loras)} LoRA{'s' * (len(loras) > 1)} in it")
        if tokens:
            write_embeddings(embedding, [Embedding("", np.concatenate([vectors for _, vectors in tokens]))], "a1111")
            names = ", ".join(token for token, _ in tokens)
            print(f"{embedding}: {names}, in this order, as one embedding: its file name is its word in a prompt")


def read_tokens(loras: list[LoRA], paths: list[str], width: int) -> list[tuple[str, np.ndarray]]:
    """Return (token, vectors (count, width)) for the learned tokens of LoRAs, given with their paths, in order."""
    tokens = []
    for path, lora in zip(paths, loras):
        for token, vectors in lora.embeddings.items():
            if vectors.shape[1] != width:
                raise UserError(
                    f"{path}: the learned token {plain(token)} has {vectors.shape[1]} numbers, the base model's tokens "
                    f"have {width}: it was made for another model (--mode upl leaves tokens out)"
                )
            tokens.append((token, vectors))
    return tokens


def _default_strengths(count: int, settings: Settings) -> list[float]:
    """Return the strength of each of `count` LoRAs without one after its path."""
    first = settings.alpha if settings.alpha_1 is None else settings.alpha_1
    second = 1 - settings.alpha if settings.alpha_2 is None else settings.alpha_2
    if settings.mode in BASE_MODES:
        strengths = [first] if settings.path_2 else []
    elif settings.mode == "ljl" or not settings.path_1:
        strengths = []
    else:
        strengths = [first, second] if settings.path_2 else [1.0]
    return strengths + [1.0] * (count - len(strengths))


def parse(argv: Sequence[str] | None) -> Settings:
    """Read the command line, with values that are given without their flags."""
    argv = sys.argv[1:] if argv is None else argv
    settings = read_settings(Settings, argv, description=__doc__)
    if len(settings.places) > len(PLACES):
        raise UserError(
            f"{len(settings.places)} values without a flag are given, at most {len(PLACES)} are read: give further "
            "LoRAs as --paths"
        )
    if settings.places:
        flags = [f"--{name}={text}" for name, text in zip(PLACES, settings.places)]
        settings = read_settings(Settings, [*argv, *flags], description=__doc__)
    if settings.output_path is None:
        raise UserError("--output_path is needed: what to write")
    if settings.mode is None:
        settings.mode = "sum" if settings.paths else "lpl"
    if settings.mode in BASE_MODES and not settings.path_1:
        raise UserError(f"--path_1 is needed: the base model that mode {settings.mode} adds to")
    return settings


if __name__ == "__main__":
    run_script(main)
