"""Block weights: factors of a LoRA's strength for the blocks of the UNet and for the text encoder.

The forms and names are those of LoRA Block Weight, an extension of A1111's web UI (hako-mikan): BASE is the text
encoder, IN00 to IN11 are `input_blocks.0` to 11 of the published checkpoints, MID (or M00) is `middle_block`, and OUT00
to OUT11 are `output_blocks.0` to 11. kohya's sd-scripts number their blocks in the same order.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

from ldm.errors import UserError, plain
from ldm.files.paths import MAX_STRENGTH
from ldm.settings.declare import setting
from ldm.settings.values import nearest

LONGEST_TEXT = 1000  # characters; 26 numbers with all their digits have about 500
BASE, MIDDLE, EVERY = "BASE", "MID", "*"


def block_names(inputs: int, outputs: int) -> tuple[str, ...]:
    """Return the names of a UNet's blocks in their order, given how many there are before and after the middle."""
    return (*(f"IN{i:02}" for i in range(inputs)), MIDDLE, *(f"OUT{i:02}" for i in range(outputs)))


SD_BLOCKS = block_names(12, 12)
# The blocks with attention. A LoRA of attention, such as kohya's without conv_dim, has layers in these alone.
SD_ATTENTION_BLOCKS = ("IN01", "IN02", "IN04", "IN05", "IN07", "IN08", MIDDLE, *SD_BLOCKS[-9:])
# What numbers without names are for, by how many there are: the extension's forms for LoRAs of attention and for all
# others, and kohya's block_lr_weight, which has no text encoder.
FORMS = {17: (BASE, *SD_ATTENTION_BLOCKS), 25: SD_BLOCKS, 26: (BASE, *SD_BLOCKS)}
_OTHER_MODELS = {12: "SDXL", 20: "SDXL", 61: "Flux"}  # the extension's further forms

# The extension's own presets, in 17 numbers (DEF_WEIGHT_PRESET in its scripts/lora_block_weight.py).
PRESETS = {
    "NONE": "0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0",
    "ALL": "1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1",
    "INS": "1,1,1,1,0,0,0,0,0,0,0,0,0,0,0,0,0",
    "IND": "1,0,0,0,1,1,1,0,0,0,0,0,0,0,0,0,0",
    "INALL": "1,1,1,1,1,1,1,0,0,0,0,0,0,0,0,0,0",
    "MIDD": "1,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0,0",
    "OUTD": "1,0,0,0,0,0,0,0,1,1,1,1,0,0,0,0,0",
    "OUTS": "1,0,0,0,0,0,0,0,0,0,0,0,1,1,1,1,1",
    "OUTALL": "1,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1",
    "ALL0.5": ",".join(["0.5"] * 17),
}


def block_weights_setting(**rules: Any) -> Any:
    """Return the setting `lora_block_weights`. It is no Optional, because "none" is a preset."""
    return setting(
        [],
        "factors of the strength by block, one text for all LoRAs or one for each: MID=0.5,OUT*=0 names blocks (BASE "
        "for the text encoder; those without a name keep 1); or 17 or 26 numbers, or OUTALL and other presets, as in "
        "A1111's LoRA Block Weight, or 25 as in kohya's",
        **rules,
    )


@dataclass(frozen=True)
class BlockWeights:
    """Factors of a LoRA's strength by block. `parse` makes them of a text.

    Attributes:
        factors: Pairs of a name and its factor. A name is that of a block, BASE, `IN*`, `OUT*` or `*`.
        rest: The factor of blocks that `factors` does not name.
        count: How many numbers the text has. None for a text with names.
        text: The text in upper case and without spaces, for logs and metadata.
    """

    factors: tuple[tuple[str, float], ...]
    rest: float = 1.0
    count: Optional[int] = None
    text: str = field(default="", compare=False)

    @classmethod
    def parse(cls, text: str, where: str = "block weights") -> BlockWeights:
        """Read names with factors, 17, 25 or 26 numbers, or the name of a preset.

        17 numbers give 0 to the blocks that they do not name, as in the extension.

        Raises:
            UserError: The text is of none of these forms. `where` names the setting in the error.
        """
        if not isinstance(text, str):
            raise UserError(f"{where} {plain(text, 60)}: give a text, such as MID=0.5,OUT*=0 or OUTALL")
        if len(text) > LONGEST_TEXT:
            raise UserError(f"{where} has {len(text):,} characters, at most {LONGEST_TEXT:,} are read: {_HINT}")
        short = "".join(text.split()).upper()
        if short.startswith("[") and short.endswith("]"):  # kohya's JSON list
            short = short[1:-1]
        where = f'{where} "{plain(text, 60)}"'
        if not short:
            raise UserError(f"{where} is empty: {_HINT}, or leave it out")
        if "=" in short:
            return cls(_named_factors(short, where), text=short)
        if "," not in short and short[0].isalpha() and short not in PRESETS:
            raise UserError(f"{where} is no preset: did you mean {nearest(short, list(PRESETS))}? {_HINT}")
        numbers = [_number(word, where) for word in PRESETS.get(short, short).split(",")]
        if len(numbers) not in FORMS:
            model = _OTHER_MODELS.get(len(numbers))
            count = f"{len(numbers)} numbers are for {model}" if model else f"has {len(numbers)} numbers"
            raise UserError(f"{where} {count}: {_HINT}")
        rest = 0.0 if len(numbers) == 17 else 1.0
        return cls(tuple(zip(FORMS[len(numbers)], numbers)), rest, len(numbers), short)

    def of_block(self, block: str | None) -> float:
        """Return the factor of a block or BASE, and 1 for None, outside of the blocks, as the extension does."""
        if block is None:
            return 1.0
        factors = dict(self.factors)
        return next((factors[name] for name in _names_for(block) if name in factors), self.rest)

    def names_of(self, blocks: Iterable[str]) -> dict[str, list[str]]:
        """Return, for each name in `factors`, which of the blocks (BASE may be one) it means."""
        blocks = list(blocks)
        return {name: [block for block in blocks if name in _names_for(block)] for name, _ in self.factors}

    def check_model(self, blocks: Sequence[str], model: str, where: str = "block weights") -> None:
        """Raise UserError for block weights that do not suit a model.

        Args:
            blocks: The names of its UNet's blocks.
            model: Stands for it in the error.
            where: Names the setting in the error.
        """
        where = f'{where} "{plain(self.text, 60)}"'
        own = spans(blocks) or "no blocks"
        if self.count and set(blocks) != set(SD_BLOCKS):
            raise UserError(
                f"{where}: {self.count} numbers are for the blocks of Stable Diffusion ({spans(SD_BLOCKS)}), {model} "
                f"has {own}: name its blocks instead, such as {MIDDLE}=0.5,OUT*=0"
            )
        unknown = next((name for name, found in self.names_of((BASE, *blocks)).items() if not found), None)
        if unknown is not None:
            raise UserError(f"{where}: {model} has no block {unknown}. It has {own}, and {BASE} is the text encoder")


_HINT = (
    "give names with factors (MID=0.5,OUT*=0), 17 numbers (BASE and the blocks with attention), 25 (IN00 to OUT11), 26 "
    f"(BASE, IN00 to OUT11), or one of {', '.join(PRESETS)}"
)


def block_weights_of_each(texts: Sequence[str], count: int, name: str) -> list[BlockWeights | None]:
    """Read the setting `name` for `count` LoRAs: no text, one for all, or one for each. Raises UserError."""
    if texts and len(texts) not in (1, count):
        raise UserError(
            f"{name} has {len(texts)} texts for {count} LoRAs: give one for all, or one for each (*=1 changes nothing; "
            "numbers of one LoRA are joined by commas alone)"
        )
    weights = [BlockWeights.parse(text, name) for text in texts]
    return [*weights] * count if len(weights) == 1 else [*weights] or [None] * count


def unet_blocks(unet: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the blocks of a UNet, given its arguments as in ModelConfig.unet."""
    levels, depth = len(unet["channel_mult"]), unet["num_res_blocks"]
    # Before the middle there are the first convolution, and a downsampling between two levels.
    return block_names(1 + levels * depth + levels - 1, levels * (depth + 1))


def block_of(name: str) -> str | None:
    """Return the block of a layer or parameter, given its published name within the UNet, or None."""
    match = re.match(r"(input|output)_blocks\.(\d{1,4})\.", name)
    if match:
        return f"{'IN' if match.group(1) == 'input' else 'OUT'}{int(match.group(2)):02}"
    return MIDDLE if name.startswith("middle_block.") else None


def in_order(blocks: Iterable[str]) -> list[str]:
    """Return the distinct names in the order of the UNet, BASE before them."""
    kinds = (BASE, "IN", MIDDLE, "OUT")
    return sorted(set(blocks), key=lambda block: (kinds.index(_kind(block)), block))


def spans(blocks: Iterable[str]) -> str:
    """Return names in few words: "IN00 to IN05, MID, OUT00 to OUT05"."""
    runs: list[list[str]] = []
    for block in in_order(blocks):
        last = runs[-1][-1] if runs else ""
        if _kind(block) in ("IN", "OUT") and last == f"{_kind(block)}{int(block[len(_kind(block)) :]) - 1:02}":
            runs[-1].append(block)
        else:
            runs.append([block])
    return ", ".join(run[0] if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)


def _kind(block: str) -> str:
    return block if block in (BASE, MIDDLE) else block.rstrip("0123456789")


def _names_for(block: str) -> tuple[str, ...]:
    """Return the names that mean a block, the most particular first."""
    return (block, EVERY) if block in (BASE, MIDDLE) else (block, f"{_kind(block)}*", EVERY)


def _named_factors(text: str, where: str) -> tuple[tuple[str, float], ...]:
    """Return the pairs of a text such as MID=0.5,OUT03=0."""
    factors: dict[str, float] = {}
    for entry in text.split(","):
        word, equals, number = entry.partition("=")
        name = _block_name(word)
        if name is None or not equals:
            raise UserError(
                f'{where}: "{plain(entry, 40)}" is no block and factor: write {BASE}, {MIDDLE}, a name such as IN04 or '
                "OUT11, IN*, OUT* or * for all, then = and a number"
            )
        if name in factors:
            raise UserError(f"{where} names {name} twice: leave one out")
        factors[name] = _number(number, where)
    return tuple(factors.items())


def _block_name(word: str) -> str | None:
    if word in (BASE, MIDDLE, "IN*", "OUT*", EVERY):
        return word
    if word == "M00":  # the extension's other name
        return MIDDLE
    match = re.fullmatch(r"(IN|OUT)([0-9]{1,2})", word)
    return f"{match.group(1)}{int(match.group(2)):02}" if match else None


def _number(word: str, where: str) -> float:
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not abs(number) <= MAX_STRENGTH:
        raise UserError(f'{where}: "{plain(word, 40)}" is not a number from -{MAX_STRENGTH} to {MAX_STRENGTH}')
    return number
