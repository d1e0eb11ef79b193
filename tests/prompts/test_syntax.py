"""A1111's grammar: what its own parser made of some 70 prompts, hand-made cases, and hostile texts."""

from __future__ import annotations

import json
import logging
from contextlib import suppress

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.files.prompts import MAX_CHARACTERS
from ldm.prompts.syntax import MAX_WEIGHT, Piece, parse_prompt, warn_of_unsupported
from tests.conftest import ROOT
from tests.growth import assert_linear, text_maker

CASES = json.loads((ROOT / "tests" / "golden" / "prompts.json").read_text(encoding="utf-8"))
PARSED = {case["prompt"]: case["pieces"] for case in CASES if case["pieces"] is not None}


def sections_of(pieces: list) -> list[list[Piece]]:
    """A1111's list, divided at its BREAKs."""
    sections: list[list[Piece]] = [[]]
    for text, weight in pieces:
        if (text, weight) == ("BREAK", -1):
            sections.append([])
        elif text:
            sections[-1].append(Piece(text, weight))
    return sections


@pytest.mark.parametrize("prompt", PARSED)
def test_the_pieces_are_those_of_a1111(prompt):
    found = [[piece for piece in section if piece.text] for section in parse_prompt(prompt)]
    assert found == sections_of(PARSED[prompt])  # weights to the last bit


def test_weights_multiply_from_the_inside():
    assert parse_prompt("((x:0.5)y:2)z") == [[Piece("x", 1.0), Piece("y", 2.0), Piece("z", 1.0)]]
    assert parse_prompt("[(x)]")[0][0].weight == pytest.approx(1)


def test_neighbours_of_one_weight_are_one_piece():
    assert parse_prompt("a (b:1.0) c") == [[Piece("a b c", 1.0)]]
    assert parse_prompt(r"a \(b\) c") == [[Piece("a (b) c", 1.0)]]


def test_a_break_inside_brackets_is_a_break():
    # A1111 reads it as the word "BREAK" there.
    assert parse_prompt("(a BREAK b:1.5) c") == [[Piece("a", 1.5)], [Piece("b", 1.5), Piece(" c", 1.0)]]


@pytest.mark.parametrize("number", ["1.2.3", ".", "+", "1..", "..5"])
def test_what_is_no_number_is_text(number):
    # A1111 stops with an error.
    assert parse_prompt(f"(x:{number})")[0] == [Piece(f"x:{number}", 1.1)]


@pytest.mark.parametrize("prompt", ["(x:1.3) [y] BREAK", r"\(", "(((", "a {b|c} <lora:x:1>"])
def test_in_plain_syntax_every_character_is_text(prompt):
    assert parse_prompt(prompt, "plain") == [[Piece(prompt, 1.0)]]


@pytest.mark.parametrize(
    ("begin", "repeated", "end"),
    [
        ("", "(", ""), ("", "[", ""), ("", "([", ""), ("", "()", ""), ("", "\\", ""), ("", ":", ""), ("", " ", ""),
        ("a BREAK", " ", ""), ("", " ", "BREAK a"), ("", "BREAK ", ""), ("[", "|", ""), ("[", ":1", ""), ("", "[|", ""),
        ("", "[a:", ""), ("(a:", "1", ""), ("(a:", " ", ")"),
    ],
)  # fmt: skip
def test_the_work_grows_with_the_characters_alone(begin, repeated, end):
    def read(prompt):
        with suppress(UserError):  # of too large weights
            parse_prompt(prompt)
        warn_of_unsupported([prompt])

    assert_linear(read, text_maker(begin, repeated, end), MAX_CHARACTERS)


def test_the_work_of_nested_brackets_grows_with_the_characters_alone():
    assert parse_prompt("(" * 4999 + ")" * 5000) == [[Piece(")", 1.0)]]
    assert_linear(parse_prompt, lambda n: "(" * (n // 2) + ")" * (n // 2), MAX_CHARACTERS)


@pytest.mark.parametrize(
    "prompt", ["(" * 49 + "x", "(x:101)", "(x:-101)", "((x:20):20)", "(x:" + "9" * 400 + ")", "(" * 9999 + "x"]
)
def test_a_weight_beyond_the_limit_is_refused(prompt):
    with pytest.raises(UserError, match="at most 100"):
        parse_prompt(prompt)


def test_spaces_beside_a_break_belong_to_it():
    texts = [[piece.text for piece in section] for section in parse_prompt(" a \n BREAK\tb\u3000BREAK BREAK c BREAKS ")]
    assert texts == [[" a"], ["b"], [""], ["c BREAKS "]]


def test_the_greatest_weight_is_taken():
    assert parse_prompt("(x:100)") == [[Piece("x", MAX_WEIGHT)]]
    assert 97 < parse_prompt("(" * 48 + "x")[0][0].weight <= MAX_WEIGHT
    assert 0 < parse_prompt("[" * 1000 + "x")[0][0].weight < 1e-40


@pytest.mark.parametrize("syntax", ["plain", "a1111"])
def test_a_prompt_of_a_hundred_thousand_words_is_refused(syntax):
    with pytest.raises(UserError, match="600,000 characters, at most 10,000"):
        parse_prompt("words " * 100_000, syntax)


def test_random_texts_lose_no_word():
    rng = np.random.default_rng(0)
    for _ in range(300):
        prompt = "".join(rng.choice(list("ab ()[]:.1\\,"), 40))
        letters = "".join(piece.text for section in parse_prompt(prompt) for piece in section)
        assert [letter for letter in letters if letter in "ab,"] == [letter for letter in prompt if letter in "ab,"]


@pytest.mark.parametrize(
    "prompt, named",
    [("a [cat:dog:0.5] b", "[cat:dog:0.5]"), ("[cat|dog]", "[cat|dog]"), ("[cat:5]", "[cat:5]"), ("a AND b", "AND")],
)
def test_prompt_editing_is_named_as_not_supported(prompt, named, caplog):
    caplog.set_level(logging.WARNING)
    warn_of_unsupported(["fine [x] (y:1.2)", prompt])
    assert len(caplog.records) == 1 and named in caplog.text and "not supported" in caplog.text


def test_ordinary_prompts_are_not_named(caplog):
    caplog.set_level(logging.WARNING)
    warn_of_unsupported(["a [b] (c:1.2) {d|e} and BREAK", "SAND AND_", ""])
    assert not caplog.records
