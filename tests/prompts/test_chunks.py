"""Chunks of 75 tokens as A1111 makes them, and the arithmetic of weights in a form of its own."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ldm.prompts.chunks import fill_chunks, prompt_chunks, weight_embeddings
from ldm.tokenizer import END_TOKEN, START_TOKEN, LearnedToken, Tokenizer
from tests.conftest import ROOT

CASES = json.loads((ROOT / "tests" / "golden" / "prompts.json").read_text(encoding="utf-8"))
END, ZERO = Tokenizer("end"), Tokenizer("zero")
WORD = END.tokenize("word")[0]
TEXTS = ["", "a red apple", "word " * 75, "(masterpiece:1.2), [bad hands], BREAK {x}", "émigré 日本 <y>"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["prompt"][:30].strip() or "empty")
@pytest.mark.parametrize("tokenizer", [END, ZERO], ids=["end", "zero"])
def test_the_chunks_are_those_of_a1111(case, tokenizer):
    chunks = prompt_chunks(case["prompt"], tokenizer, "a1111")
    assert chunks.tokens.shape == chunks.weights.shape == (len(case["chunks"]), 77)
    assert chunks.tokens.dtype == np.int32 and chunks.weights.dtype == np.float32
    for tokens, weights, runs in zip(chunks.tokens, chunks.weights, case["chunks"]):
        expected = [(token, weight) for token, weight, repeats in runs for _ in range(repeats)]
        count = len(expected)
        assert tokens[: count + 2].tolist() == [START_TOKEN, *(token for token, _ in expected), END_TOKEN]
        assert (tokens[count + 2 :] == tokenizer.pad_id).all()
        np.testing.assert_allclose(weights[1 : count + 1], [weight for _, weight in expected], rtol=1e-6)
        assert weights[0] == 1 and (weights[count + 1 :] == 1).all()


@pytest.mark.parametrize("tokenizer", [END, ZERO], ids=["end", "zero"])
@pytest.mark.parametrize("text", TEXTS)
def test_a_plain_text_of_one_chunk_is_that_of_encode(text, tokenizer):
    for long in (False, True):
        chunks = prompt_chunks(text, tokenizer, long=long)
        np.testing.assert_array_equal(chunks.tokens, tokenizer.encode([text]))
        assert (chunks.weights == 1).all()


def test_a_long_plain_text_is_cut_unless_long_prompts_are_on():
    text = "word " * 80
    np.testing.assert_array_equal(prompt_chunks(text, END).tokens, END.encode([text]))
    assert (prompt_chunks(text, END, long=True).tokens == WORD).sum(1).tolist() == [75, 5]


def test_no_token_is_lost_or_repeated():
    rng = np.random.default_rng(0)
    for _ in range(50):
        text = " ".join(rng.choice(["red", "apple,", ",", "supercalifragilistic", "日本"], rng.integers(1, 400)))
        rows = prompt_chunks(text, END, long=True).tokens
        assert [token for row in rows for token in row if token not in (START_TOKEN, END_TOKEN)] == END.tokenize(text)


@pytest.mark.parametrize("words, expected", [(72, [75]), (73, [73, 3]), (75, [75, 3]), (74, [74, 3])])
def test_the_vectors_of_a_learned_token_stay_together(words, expected):
    tokenizer = END.with_learned_tokens([LearnedToken("<cat>", 49408, 3)])
    chunks = prompt_chunks("word " * words + "(<cat>:1.5)", tokenizer, "a1111")
    counts = ((chunks.tokens == WORD) | (chunks.tokens >= 49408)).sum(1)
    assert counts.tolist() == expected
    assert (chunks.weights[chunks.tokens >= 49408] == 1.5).all()


def test_a_learned_token_of_more_than_a_chunk_is_divided():
    tokenizer = END.with_learned_tokens([LearnedToken("<cat>", 49408, 100)])
    rows = prompt_chunks("word <cat>", tokenizer, long=True).tokens
    assert [token for row in rows for token in row if token >= 49408] == list(range(49408, 49508))


def test_ten_thousand_tokens_are_134_chunks():
    assert prompt_chunks("1" * 10_000, END, "a1111").chunk_count == 134


@pytest.mark.parametrize("tokenizer", [END, ZERO], ids=["end", "zero"])
def test_a_shorter_prompt_is_filled_with_empty_chunks(tokenizer):
    prompt = prompt_chunks("(x:1.5)", tokenizer, "a1111")
    filled = fill_chunks(prompt, 3, tokenizer)
    assert filled.tokens.shape == filled.weights.shape == (3, 77)
    np.testing.assert_array_equal(filled.tokens[:1], prompt.tokens)
    np.testing.assert_array_equal(filled.tokens[1:], tokenizer.encode(["", ""]))
    assert filled.weights[0, 1] == 1.5 and (filled.weights[1:] == 1).all()
    assert fill_chunks(prompt, 1, tokenizer) is prompt


def test_weights_multiply_and_the_mean_of_a_chunk_stays():
    rng = np.random.default_rng(0)
    z = rng.normal(0.1, 1, (3, 77, 16)).astype(np.float32)
    weights = np.ones((3, 77), np.float32)
    weights[0, 1:9] = rng.uniform(0.3, 1.8, 8)
    weights[2, 5] = -1
    # The published arithmetic, number by number, in fp64.
    expected = np.empty_like(z, np.float64)
    for chunk in range(3):
        for token in range(77):
            expected[chunk, token] = z[chunk, token].astype(np.float64) * weights[chunk, token]
        expected[chunk] *= z[chunk].mean(dtype=np.float64) / expected[chunk].mean()
    weighted = weight_embeddings(z, weights)
    np.testing.assert_allclose(weighted, expected, rtol=2e-6)
    np.testing.assert_array_equal(weighted[1], z[1])  # bit for bit
    assert weighted.dtype == np.float32
    np.testing.assert_allclose(weighted.mean((1, 2)), z.mean((1, 2)), rtol=1e-4)


def test_weight_one_everywhere_changes_no_bit():
    z = np.random.default_rng(1).standard_normal((2, 77, 8)).astype(np.float32)
    weighted = weight_embeddings(z, np.ones((2, 77), np.float32))
    np.testing.assert_array_equal(weighted.view(np.int32), z.view(np.int32))
    assert weighted is not z


def test_a_mean_of_nothing_gives_no_number_and_no_warning():
    weights = np.zeros((1, 77), np.float32)
    assert not np.isfinite(weight_embeddings(np.ones((1, 77, 4), np.float32), weights)).any()
