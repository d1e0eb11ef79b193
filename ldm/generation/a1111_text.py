"""The text that AUTOMATIC1111's web UI writes into its images under `parameters`, and that many programs read.

    a red apple, (glossy:1.2)
    Negative prompt: blurry
    Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1, Size: 512x512, Model: "a, b"

The prompts may have several lines. The last line holds the values. A value with a comma, a colon or a line break is a
JSON text. Older versions wrote the schedule behind the sampler ("DPM++ 2M Karras"), and extensions add lines below.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ldm.errors import UserError
from ldm.prompts.lora_tags import LORA_TAG

MAX_CHARACTERS = 200_000  # of a whole text; ldm.files.prompts reads prompts of at most 10,000
MAX_VALUES = 1000
LONGEST_KEY = 100
NEGATIVE = "Negative prompt:"
LEAST_VALUES = 3  # on a last line that does not begin with the steps, as in A1111: fewer are a part of the prompt

# The schedules that A1111 names, by the words behind a sampler or of `Schedule type`.
SCHEDULES = (
    "Automatic", "Uniform", "Karras", "Exponential", "Polyexponential", "SGM Uniform", "KL Optimal", "Align Your Steps",
    "Simple", "Normal", "DDIM", "Beta", "Turbo",
)  # fmt: skip

_FIRST_VALUE = re.compile(r"Steps: ?\d+(?:,|$)")
_GAP = re.compile(r"[\s,]*")  # apart from _KEY, which would try each of its characters as a beginning
_KEY = re.compile(rf"(\w[^:,\"\n]{{0,{LONGEST_KEY - 1}}}):")
_SIZE = re.compile(r"(\d{1,6}) ?x ?(\d{1,6})")


@dataclass(frozen=True)
class A1111Text:
    """A text's parts.

    Attributes:
        prompt: With its line breaks.
        negative_prompt: The same.
        values: What the last line says, by its names, in its order. A quoted value is without its quotes.
        rest: Lines below the values, which extensions write.
    """

    prompt: str
    negative_prompt: str = ""
    values: Mapping[str, str] = field(default_factory=dict)
    rest: str = ""


class SamplerName(NamedTuple):
    """A sampler's name and its schedule's, "" where the text names none."""

    sampler: str
    schedule: str


def write(prompt: str, negative_prompt: str, values: Mapping[str, object]) -> str:
    """Return the text. Values that are None or "" are left out; numbers are written without a useless fraction."""
    written = ", ".join(f"{key}: {_quoted(_shown(value))}" for key, value in values.items() if value not in (None, ""))
    negative = f"{NEGATIVE} {negative_prompt}" if negative_prompt else ""
    return "\n".join(part for part in (prompt, negative, written) if part).strip()


def parse(text: str) -> A1111Text:
    """Return the parts of a text. A text without values is a prompt.

    Raises:
        UserError: It has more than MAX_CHARACTERS, or more than MAX_VALUES values.
    """
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"its parameters have {len(text):,} characters, at most {MAX_CHARACTERS:,} are read")
    lines = text.replace("\r\n", "\n").replace("\r", "\n").strip().split("\n")
    place = _line_of_values(lines)
    values = {} if place == len(lines) else _values(lines[place])
    prompt: list[str] = []
    negative: list[str] = []
    of_negative = False
    for line in lines[:place]:
        if not of_negative and line.lstrip().startswith(NEGATIVE):
            of_negative, line = True, line.lstrip()[len(NEGATIVE) :].lstrip(" ")
        (negative if of_negative else prompt).append(line)
    return A1111Text(
        "\n".join(prompt).strip(), "\n".join(negative).strip(), values, "\n".join(lines[place + 1 :]).strip()
    )


def sampler_name(values: Mapping[str, str]) -> SamplerName:
    """Return the names of sampler and schedule, in the form of either version: "DPM++ 2M Karras", or two values."""
    sampler, schedule = values.get("Sampler", "").strip(), values.get("Schedule type", "").strip()
    # "SGM Uniform" also ends with "Uniform". The space before it leaves "DDIM" alone, which is a sampler.
    at_end = [known for known in SCHEDULES if sampler.lower().endswith(f" {known.lower()}")]
    if at_end and not schedule:
        schedule = max(at_end, key=len)
        sampler = sampler[: -len(schedule)].rstrip()
    return SamplerName(sampler, schedule)


def size(values: Mapping[str, str]) -> tuple[int, int] | None:
    """Return width and height in pixels, None where the text does not name them."""
    match = _SIZE.fullmatch(values.get("Size", "").strip())
    return None if match is None else (int(match.group(1)), int(match.group(2)))


def loras_named(prompt: str) -> list[str]:
    """Return the LoRAs that a prompt names, each as it stands there: "<lora:style:0.8>"."""
    return [match.group() for match in LORA_TAG.finditer(prompt)]


def _line_of_values(lines: list[str]) -> int:
    """Return the index of the line that holds the values, the number of lines if there is none."""
    for place in reversed(range(len(lines))):
        if _FIRST_VALUE.match(lines[place].strip()):
            return place
    if lines[-1].lstrip().startswith(NEGATIVE):  # whose words may have colons
        return len(lines)
    return len(lines) - 1 if len(_values(lines[-1])) >= LEAST_VALUES else len(lines)


def _values(line: str) -> dict[str, str]:
    """Return the values of a line. Words between commas that are none are passed over."""
    values: dict[str, str] = {}
    place = found = 0
    while place < len(line):
        gap = _GAP.match(line, place)
        place = place if gap is None else gap.end()
        match = _KEY.match(line, place)
        if match is None:
            comma = line.find(",", place)
            place = len(line) if comma < 0 else comma
            continue
        values[match.group(1).strip()], place = _value(line, match.end())
        found += 1
        if found > MAX_VALUES:
            raise UserError(f"its parameters have more than {MAX_VALUES:,} values")
    return values


def _value(line: str, place: int) -> tuple[str, int]:
    """Return the value that begins at `place`, and where it ends."""
    start = place + (line[place : place + 1] == " ")
    if line[start : start + 1] == '"':
        try:
            value, end = json.JSONDecoder().raw_decode(line, start)
            return str(value), end
        except ValueError:  # a quote that does not end, or an escape that JSON does not have
            pass
    end = line.find(",", start)
    end = len(line) if end < 0 else end
    return line[start:end].strip(), end


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:\n\r]|^[\s"]|\s$', value) else value


def _shown(value: object) -> str:
    return f"{value:.10g}" if isinstance(value, float) else str(value)
