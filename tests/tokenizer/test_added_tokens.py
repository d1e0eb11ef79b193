"""Added tokens against tests/golden/added_tokens.json: found as CLIPTokenizer finds them.

transformers 4 and 5 agree but for the case (5 takes any) and for what counts as a word's neighbour (5: letters, digits,
underscore), where 5 is followed; and for entities, which 5 does not unescape, where 4 is followed as everywhere.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ldm.tokenizer import CONTEXT_LENGTH, END_TOKEN, START_TOKEN, AddedToken, Tokenizer

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "added_tokens.json").read_text(encoding="utf-8"))
ADDED = [AddedToken(*entry) for entry in GOLDEN["added"]]
ANY_CASE = {"a <CAT-TOY> x", "a <gelb> <GELB>", "SKS", "(zwz) zwz, zwz-"}
UNESCAPED = {"<cat-toy> &amp; x", "&lt;cat-toy&gt;"}
CAT = AddedToken("<cat-toy>", 49408)


def ids(tokenizer, text):
    return [START_TOKEN, *tokenizer.tokenize(text)[: CONTEXT_LENGTH - 2], END_TOKEN]


@pytest.mark.parametrize("column, other", [("clip4", ANY_CASE), ("clip5", UNESCAPED)])
def test_equals_clip_tokenizer_but_for_what_its_versions_differ_in(column, other):
    tokenizer = Tokenizer("end", ADDED)
    differing = {entry["text"] for entry in GOLDEN["texts"] if ids(tokenizer, entry["text"]) != entry[column]}
    assert differing == other


def test_the_ids_of_a_usual_textual_inversion():
    tokenizer = Tokenizer("end", [CAT, AddedToken("<cat-toy>_1", 49409)])
    row = tokenizer.encode(["a photo of <cat-toy> <cat-toy>_1"])[0]
    assert row[:8].tolist() == [START_TOKEN, 320, 1125, 539, 49408, 49409, END_TOKEN, END_TOKEN]


def test_what_is_added_changes_no_other_text():
    texts = ["a photo of a cat", "cat toy", "", "<cat-toys>"]
    assert (Tokenizer("zero", [CAT]).encode(texts) == Tokenizer("zero").encode(texts)).all()


def test_what_is_cut_off_is_told_with_the_added_tokens_in_it():
    assert Tokenizer("end", [CAT]).cut_off(["word " * 75 + "a <cat-toy>s eye"]) == ["a <cat-toy> s eye"]


def test_of_two_that_differ_in_case_each_is_found_as_it_is_written():
    tokenizer = Tokenizer("end", [AddedToken("<A>", 49408), AddedToken("<a>", 49409)])
    assert tokenizer.tokenize("<A> <a>") == [49408, 49409]
