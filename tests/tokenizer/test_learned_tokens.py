"""A learned token stands for as many tokens as it has vectors."""

from __future__ import annotations

import numpy as np
import pytest

from ldm.tokenizer import END_TOKEN, START_TOKEN, AddedToken, LearnedToken, Tokenizer

PLAIN = Tokenizer("end")
CAT, EASY = LearnedToken("<cat>", 49408, 3), LearnedToken("EasyNegative", 49411, 2)
TOKENIZER = PLAIN.with_learned_tokens([CAT, EASY])


def test_a_token_of_several_vectors_is_several_tokens():
    assert TOKENIZER.tokenize("a <cat> x") == [320, 49408, 49409, 49410, *PLAIN.tokenize("x")]
    row = TOKENIZER.encode(["<cat>"])[0]
    assert row[:5].tolist() == [START_TOKEN, 49408, 49409, 49410, END_TOKEN] and row[5:].tolist() == [END_TOKEN] * 72


@pytest.mark.parametrize("words, left", [(71, 3), (72, 3), (73, 2), (74, 1), (75, 0)])
def test_the_limit_of_77_counts_every_vector(words, left):
    row = TOKENIZER.encode(["word " * words + "<cat>"])[0]
    assert len(row) == 77 and np.isin(row, [49408, 49409, 49410]).sum() == left
    assert row[words + 1 + left] == END_TOKEN


def test_what_is_cut_off_names_the_token_once():
    assert TOKENIZER.cut_off(["word " * 74 + "<cat> <cat> hat"]) == ["<cat> <cat> hat"]
    assert TOKENIZER.cut_off(["word " * 72 + "<cat>"]) == []
    assert TOKENIZER.decode(TOKENIZER.tokenize("a <cat><cat> EasyNegative b")) == "a <cat> <cat> EasyNegative b"


@pytest.mark.parametrize(
    "text, count",
    [("EasyNegative", 2), ("easynegative, x", 2), ("(EASYNEGATIVE)", 2), ("EasyNegatives", 0), ("my_EasyNegative", 0),
     ("<CAT>", 3), ("x<cat>s", 3)],
)  # fmt: skip
def test_a_name_of_letters_is_a_whole_word_in_any_case(text, count):
    assert sum(token >= 49408 for token in TOKENIZER.tokenize(text)) == count


def test_tokens_are_exchanged_and_those_of_the_checkpoint_stay():
    base = Tokenizer("zero", [AddedToken("<own>", 49408)])
    both = base.with_learned_tokens([LearnedToken("<cat>", 49409, 2)])
    assert both.tokenize("<own> <cat>") == [49408, 49409, 49410] and both.pad_id == 0
    other = both.with_learned_tokens([LearnedToken("<dog>", 49409, 1)])
    assert other.tokenize("<own> <dog>") == [49408, 49409] and 49409 not in other.tokenize("<cat>")
    assert base.tokenize("<own> <cat>")[0] == 49408 and 49409 not in base.tokenize("<cat>")
    texts = ["a photo of a cat", "<cats>", ""]
    assert (TOKENIZER.encode(texts) == PLAIN.encode(texts)).all()
