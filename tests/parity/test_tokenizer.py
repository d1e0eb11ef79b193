"""The tokenizer equals the installed CLIPTokenizer, which does not clean with ftfy from transformers 5 on."""

from __future__ import annotations

import pytest
from transformers import CLIPTokenizer

from ldm.tokenizer import Tokenizer, clean_text
from tests.golden.make_tokenizer import clip_tokenizer, texts

# A tokenizer in Rust refuses lone surrogates.
TEXTS = [text for _, text in texts() if text.encode("utf-8", "ignore").decode() == text]
# A long s ends a contraction only if case is ignored. transformers 5 does not ignore it.
LONG_S = "i'ſ a long s"


@pytest.fixture(scope="module")
def reference() -> CLIPTokenizer:
    return clip_tokenizer()


def rows(tokenizer: CLIPTokenizer, given: list[str]) -> list[list[int]]:
    return tokenizer(given, padding="max_length", truncation=True, max_length=77)["input_ids"]


def test_cleaned_texts_are_encoded_alike(reference):
    expected = rows(reference, [clean_text(text) for text in TEXTS])
    differing = [text for text, ours, row in zip(TEXTS, Tokenizer().encode(TEXTS).tolist(), expected) if ours != row]
    assert differing == [LONG_S]


def test_texts_that_need_no_cleaning_are_encoded_alike_as_they_are(reference):
    expected = rows(reference, TEXTS)
    equal = [ours == row for ours, row in zip(Tokenizer().encode(TEXTS).tolist(), expected)]
    assert sum(equal) >= 600
    bare = [clean_text(text) == " ".join(text.split()).lower() for text in TEXTS]
    differing = [text for text, is_equal, is_bare in zip(TEXTS, equal, bare) if is_bare and not is_equal]
    assert differing == [LONG_S, "ΟΔΟΣ ΣΟΦΟΣ", "<|ENDOFTEXT|>"]
