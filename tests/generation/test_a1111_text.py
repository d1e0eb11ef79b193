"""A1111's text: what is written is read again, both forms of its versions are read, and no text does harm."""

from __future__ import annotations

import collections
import random
import re
from dataclasses import replace

import pytest

from ldm.errors import UserError
from ldm.generation.a1111_text import MAX_CHARACTERS, A1111Text, loras_named, parse, sampler_name, size, write
from tests.growth import assert_linear, text_maker

# As A1111 1.6 and 1.10 write them.
OLD = """a (red:1.2) apple, <lora:style:0.8>
on a table
Negative prompt: blurry,
text
Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 4096745678, Size: 512x768, Model hash: 6ce0161689, \
Model: v1-5-pruned-emaonly, Clip skip: 2, Lora hashes: "style: 0123456789ab, other: ba9876543210", Version: v1.6.0"""
NEW = """a red apple
Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 1, Size: 512x512, Model: "a, \\"b\\": c", \
Hires upscale: 2, Hires upscaler: Latent, Denoising strength: 0.7, Version: v1.10.1
Template: a red {apple|pear}"""


def test_the_text_of_an_older_version():
    text = parse(OLD)
    assert text.prompt == "a (red:1.2) apple, <lora:style:0.8>\non a table"
    assert text.negative_prompt == "blurry,\ntext"
    assert list(text.values) == [
        "Steps", "Sampler", "CFG scale", "Seed", "Size", "Model hash", "Model", "Clip skip", "Lora hashes", "Version",
    ]  # fmt: skip
    assert text.values["Lora hashes"] == "style: 0123456789ab, other: ba9876543210"
    assert sampler_name(text.values) == ("DPM++ 2M", "Karras") and size(text.values) == (512, 768)
    assert loras_named(text.prompt) == ["<lora:style:0.8>"]
    assert loras_named("<lyco:old:1> <lora> <hypernet:x:1>") == ["<lyco:old:1>"]  # as prompts are read


def test_the_text_of_a_newer_version():
    text = parse(NEW)
    assert (text.prompt, text.negative_prompt) == ("a red apple", "")
    assert sampler_name(text.values) == ("DPM++ 2M", "Karras")
    assert text.values["Model"] == 'a, "b": c' and text.values["Hires upscale"] == "2"
    assert text.rest == "Template: a red {apple|pear}"


@pytest.mark.parametrize(
    ("sampler", "schedule", "expected"),
    [
        ("Euler a", None, ("Euler a", "")),
        ("DDIM", None, ("DDIM", "")),
        ("DPM++ 2M SGM Uniform", None, ("DPM++ 2M", "SGM Uniform")),
        ("DPM++ 2M SDE Exponential", None, ("DPM++ 2M SDE", "Exponential")),
        ("DPM++ 2M karras", None, ("DPM++ 2M", "Karras")),
        ("Euler", "Align Your Steps", ("Euler", "Align Your Steps")),
        (None, None, ("", "")),
    ],
)
def test_the_schedule_stands_behind_the_sampler_or_alone(sampler, schedule, expected):
    values = {"Sampler": sampler, "Schedule type": schedule}
    assert sampler_name({key: value for key, value in values.items() if value is not None}) == expected


def test_numbers_are_written_as_a1111_writes_them():
    values = {"Steps": 20, "CFG scale": 7.0, "Clip skip": None, "Denoising strength": 0.35, "Model": "a: b"}
    text = write("a cat", "", values)
    assert text == 'a cat\nSteps: 20, CFG scale: 7, Denoising strength: 0.35, Model: "a: b"'


def test_what_is_written_is_read_again():
    rng = random.Random(0)
    alphabet = 'ab ,:"\\\n<>()[]{}猫é\t0=/|-'
    for _ in range(500):
        prompt, negative = ("".join(rng.choices(alphabet, k=rng.randrange(40))).strip() for _ in range(2))
        values = {"Steps": "20", "Sampler": "DPM++ 2M"}
        for number in range(rng.randrange(6)):
            values[f"Key {number}"] = "x" + "".join(rng.choices(alphabet, k=rng.randrange(20)))
        values = {key: value.strip() if set(value).isdisjoint('",:\n') else value for key, value in values.items()}
        assert parse(write(prompt, negative, values)) == A1111Text(prompt, negative, values)


@pytest.mark.parametrize(
    "text", ["", "a cat", "a cat: red, dog: blue", "Steps", "Steps: many, Sampler: x", "Negative prompt"]
)
def test_a_text_without_values_is_a_prompt(text):
    assert parse(text) == A1111Text(text)


def test_words_of_a_negative_prompt_are_no_values():
    text = "a cat\nNegative prompt: a: b, c: d, e: f"
    assert parse(text) == A1111Text("a cat", "a: b, c: d, e: f")
    assert parse(f"{text}\nSteps: 20 ") == A1111Text("a cat", "a: b, c: d, e: f", {"Steps": "20"})


def test_three_values_without_steps_are_values():
    assert parse("a cat\nSampler: Euler, Seed: 1, Size: 8x8").values == {"Sampler": "Euler", "Seed": "1", "Size": "8x8"}


HOSTILE = {
    "no end of a quote": ('Steps: 1, A: "b, C: d', {"Steps": "1", "A": '"b', "C": "d"}),
    "an escape that JSON has not": ('Steps: 1, A: "\\q", C: d', {"Steps": "1", "A": '"\\q"', "C": "d"}),
    "words without a key": ("Steps: 1, b, C: d", {"Steps": "1", "C": "d"}),
    "a key twice": ("Steps: 1, Seed: 2, Seed: 3", {"Steps": "1", "Seed": "3"}),
    "no values": ("Steps: 1, A:, B: ", {"Steps": "1", "A": "", "B": ""}),
    "colons alone": ("Steps: 1, :::,: ,::", {"Steps": "1"}),
    "a long key": (f"Steps: 1, {'k' * 500}: 2, C: d", {"Steps": "1", "C": "d"}),
    "json below": ('Steps: 1, A: {"b": 1}', {"Steps": "1", "A": '{"b": 1}'}),
    "half a character": ("Steps: 1, A: \ud800", {"Steps": "1", "A": "\ud800"}),
    "an escaped half": ('Steps: 1, A: "\\ud800"', {"Steps": "1", "A": "\ud800"}),
    "an integer of many digits": (f"Steps: {'9' * 5000}, A: b", {"Steps": "9" * 5000, "A": "b"}),
    "windows' line ends": ("Steps: 1, A: b\r\n", {"Steps": "1", "A": "b"}),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_damaged_values_are_read_as_far_as_they_go(case):
    text, expected = HOSTILE[case]
    assert parse(f"a cat\n{text}").values == expected


@pytest.mark.parametrize("values", ["512", "x", "512x", "-1x5", "512x512x3", f"{'9' * 99}x1", "512*512", "１２x３ x"])
def test_a_size_that_is_none(values):
    assert size({"Size": values}) is None


LARGE = {
    "a long text": "a" * (MAX_CHARACTERS + 1),
    "many values": "Steps: 1" + ", A: 1" * 1001,
}


@pytest.mark.parametrize("case", LARGE)
def test_a_text_is_bounded(case):
    with pytest.raises(UserError, match="at most 200,000|more than 1,000"):
        parse(LARGE[case])


@pytest.mark.parametrize(
    ("begin", "repeated", "end"),
    [
        ("Steps: 1", ",", ""),
        ("Steps: 1, ", "a ", ""),
        ('Steps: 1, A: "', "\\", ""),
        ("", "\n", "x"),
        ("Steps: 1", ", a", ""),
        ("", "Negative prompt:\n", ""),
        ("Steps: 1, ", " ", ""),
        ("", "<lora:", ""),
        ("Steps: 1, Sampler: ", "Karras ", ""),
    ],
)
def test_the_work_grows_with_the_characters_alone(begin, repeated, end):
    def read(text):
        sampler_name(parse(text).values)
        loras_named(text)

    assert_linear(read, text_maker(begin, repeated, end), MAX_CHARACTERS // 2)


PIECES = [
    "Steps: 20", "Sampler: Euler", "Size: 8x16", ", Size: 8x16, ", "Size: 1234567x8", "Seed: 7", "a", "b: c",
    ', A: "b, c", ', ', A: " b", ', ', A: "b ", ', ', A: "\\"b\\"", ', ", ", ", ", ",",
    ":", '"', "\\", "{", "\0", " ", "Negative prompt:", "<lora:x:0.5>", "\r\n", "\n",
]  # fmt: skip
RANDOM_TEXTS = 3000


def random_texts(seed):
    """Texts of prompts and values in any order, damaged everywhere."""
    rng = random.Random(seed)
    for _ in range(RANDOM_TEXTS):
        begins = rng.choices(["", "Negative prompt: ", "Steps: 20, ", "Steps: 20"], [4, 2, 2, 1], k=rng.randrange(5))
        yield "\n".join(begin + "".join(rng.choices(PIECES, k=rng.randrange(8))) for begin in begins)


def lines_of(text):
    """The lines of a text, and which of them begin with the steps."""
    lines = text.replace("\r\n", "\n").strip().split("\n")
    return lines, [number for number, line in enumerate(lines) if re.match("Steps: 20(,|$)", line.strip())]


def is_line_of_values(values):
    """Whether these values, written, are read as values: they begin with the steps, or are three and more."""
    first = next(iter(values), "Steps")
    return first != "Negative prompt" and (first == "Steps" or len(values) >= 3) and values.get("Steps", "20").isdigit()


def ends_like_values(found):
    """Whether a prompt without values ends in a line that would be read as some."""
    return f"{found.prompt}\n{found.negative_prompt}".strip().split("\n")[-1].count(":") > 2


def test_random_texts_are_read_as_they_were_written():
    counts = collections.Counter()
    for text in random_texts(1):
        found = parse(text)
        values = {key: value for key, value in found.values.items() if value}
        if not is_line_of_values(values) or (not values and ends_like_values(found)):
            continue  # no text has these values, or none
        counts["values" if values else "prompts"] += 1
        assert parse(write(found.prompt, found.negative_prompt, values)) == replace(found, values=values, rest="")
    assert min(counts["values"], counts["prompts"]) > RANDOM_TEXTS / 4


def test_every_line_of_a_random_text_is_in_one_part_of_it():
    count = 0
    for text in random_texts(2):
        found, (lines, with_steps) = parse(text), lines_of(text)
        if not with_steps and (found.values or lines[-1].count(":") > 2):
            assert found.rest == "" and len(found.values) in (0, *range(3, 20))
            continue
        place = with_steps[-1] if with_steps else len(lines)
        negative = next((n for n in range(place) if lines[n].strip().startswith("Negative prompt:")), place)
        assert found.prompt == "\n".join(lines[:negative]).strip()
        assert found.rest == "\n".join(lines[place + 1 :]).strip()
        of_negative = "\n".join(lines[negative:place]).strip()
        assert found.negative_prompt == of_negative[len("Negative prompt:") :].strip()
        assert ("Steps" in found.values) == bool(with_steps)
        count += bool(with_steps) and negative < place
    assert count > RANDOM_TEXTS / 10


def test_of_a_random_text_a_size_and_loras_are_those_that_stand_there():
    sizes = loras = 0
    for text in random_texts(3):
        found = parse(text)
        sides = size(found.values)
        assert (sides == (8, 16)) == (found.values.get("Size") == "8x16") and (sides is None or sides == (8, 16))
        assert loras_named(found.prompt) == ["<lora:x:0.5>"] * found.prompt.count("<lora:x:0.5>")
        sampler, schedule = sampler_name(found.values)
        assert schedule == "" and sampler == found.values.get("Sampler", "").strip()
        sizes, loras = sizes + (sides is not None), loras + ("<lora:x:0.5>" in found.prompt)
    assert min(sizes, loras) > RANDOM_TEXTS / 100
