"""The tokenizer encodes 903 texts as the published tokenizers do (tests/golden/tokenizer.json.gz).

Up to transformers 4, CLIPTokenizer cleans with ftfy, and this tokenizer equals it on every text. From transformers 5 on
it neither repairs nor unescapes: this tokenizer equals it on texts that cleaning does not change, and on all others
after cleaning. OpenCLIP's tokenizer, which SD2 was trained with, unescapes a little more.
"""

import gzip
import json
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.tokenizer import CONTEXT_LENGTH, END_TOKEN, START_TOKEN, VOCABULARY_SIZE, Tokenizer, clean_text, tokenizer

with gzip.open(Path(__file__).parents[1] / "golden" / "tokenizer.json.gz", "rt", encoding="utf-8") as file:
    GOLDEN = json.load(file)["texts"]
KINDS = sorted({entry["kind"] for entry in GOLDEN})

# Only OpenCLIP unescapes entities in lines with a `<` and entities without a semicolon.
OPEN_CLIP_UNESCAPES = {
    "&amp",
    "&ampersand",
    "&lt",
    "&ltb",
    "fish &amp chips",
    "a < b &amp; c",
    "<p>a &amp; b</p>",
    "x &lt; y < z",
    "<br/>line &nbsp; two",
}
# OpenCLIP's start and end tokens have other spellings, so these are plain text.
SPECIAL = re.compile(r"<\|(startoftext|endoftext)\|>", re.IGNORECASE)
# A long s ends a contraction only if case is ignored. transformers 5 does not ignore it.
LONG_S = "i'ſ a long s"
# transformers 5 has one lower-case sigma, and matches its end token before lower-casing.
CASE_5 = {"ΟΔΟΣ ΣΟΦΟΣ", "<|ENDOFTEXT|>"}


def ids(text: str) -> list:
    row = Tokenizer().encode([text])[0].tolist()
    length = min(CONTEXT_LENGTH, len(Tokenizer().tokenize(text)) + 2)
    assert row[length:] == [END_TOKEN] * (CONTEXT_LENGTH - length)
    return row[:length]


def test_the_golden_file_has_all_kinds_of_texts():
    assert len(GOLDEN) >= 500
    assert {"emoji", "accents", "cjk", "control", "entities", "long", "space", "contractions"} <= set(KINDS)
    assert any(entry["text"] == "" for entry in GOLDEN)
    assert any(len(entry["text"].split()) == 200 for entry in GOLDEN)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_clip_tokenizer_with_ftfy_on_every_text(kind):
    differing = [entry["text"] for entry in GOLDEN if entry["kind"] == kind and ids(entry["text"]) != entry["clip4"]]
    assert differing == []


@pytest.mark.parametrize("kind", KINDS)
def test_cleans_as_clip_tokenizer_does_with_ftfy(kind):
    of_kind = [entry for entry in GOLDEN if entry["kind"] == kind]
    assert [clean_text(entry["text"]) for entry in of_kind] == [entry["cleaned"] for entry in of_kind]


def test_equals_clip_tokenizer_of_transformers_5_on_every_cleaned_text():
    differing = {entry["text"] for entry in GOLDEN if ids(entry["text"]) != entry["clip5_of_cleaned"]}
    assert differing == {LONG_S}


def test_differs_from_clip_tokenizer_of_transformers_5_only_where_ftfy_changes_the_text():
    equal = [entry for entry in GOLDEN if ids(entry["text"]) == entry["clip5"]]
    assert len(equal) >= 500
    unexplained = set()
    for entry in GOLDEN:
        # All the cleaning that transformers 5 does.
        plain = re.sub(r"\s+", " ", unicodedata.normalize("NFC", entry["text"])).strip().lower()
        if ids(entry["text"]) != entry["clip5"] and plain == entry["cleaned"]:
            unexplained.add(entry["text"])
    assert unexplained == {LONG_S} | CASE_5


def test_differs_from_openclip_only_in_a_few_entities_and_typed_special_tokens():
    differing = {entry["text"] for entry in GOLDEN if ids(entry["text"]) != entry["open_clip"]}
    assert differing == OPEN_CLIP_UNESCAPES | {e["text"] for e in GOLDEN if SPECIAL.search(e["text"])}


def test_encode_gives_int32_rows_of_77():
    tokens = Tokenizer().encode(["a photo of a cat", "", "a " * 200])
    assert tokens.dtype == np.int32 and tokens.shape == (3, CONTEXT_LENGTH)
    assert tokens[0, :7].tolist() == [START_TOKEN, 320, 1125, 539, 320, 2368, END_TOKEN]
    assert (tokens[:, 0] == START_TOKEN).all()
    assert tokens.max() < VOCABULARY_SIZE


def test_no_texts_give_no_rows():
    assert Tokenizer().encode([]).shape == (0, CONTEXT_LENGTH)


def test_a_single_text_instead_of_a_list_is_refused():
    with pytest.raises(TypeError):
        Tokenizer().encode("a cat")


@pytest.mark.parametrize(("pad", "padding"), [("end", END_TOKEN), ("zero", 0)])
def test_padding_follows_the_end_token(pad, padding):
    row = Tokenizer(pad).encode(["a cat"])[0]
    assert row[:4].tolist() == [START_TOKEN, 320, 2368, END_TOKEN]
    assert set(row[4:].tolist()) == {padding}


@pytest.mark.parametrize("pad", ["end", "zero"])
@pytest.mark.parametrize("words", [74, 75, 76, 200])
def test_a_long_text_is_cut_and_keeps_its_end_token(pad, words):
    row = Tokenizer(pad).encode(["cat " * words])[0]
    kept = min(words, CONTEXT_LENGTH - 2)
    assert (row[1 : kept + 1] == 2368).all()
    assert row[kept + 1] == END_TOKEN


def test_cut_off_gives_the_lost_part_of_each_text_that_is_cut():
    texts = ["a cat", "word " * 75, "word " * 75 + "in the END", "", "word " * 74 + "fox hen"]
    assert Tokenizer().cut_off(texts) == ["in the end", "hen"]


@pytest.mark.parametrize("pad", ["", "End", "77", "none"])
def test_another_padding_rule_is_refused(pad):
    with pytest.raises(UserError, match="pad_token.*'end'.*'zero'"):
        Tokenizer(pad)


@pytest.mark.parametrize(
    ("text", "decoded"),
    [
        ("a photo of a cat", "a photo of a cat"),
        ("  A  Photo ", "a photo"),
        ("", ""),
        ("你好", "你好"),
        ("a 😀 café", "a 😀 café"),
        ("cat, dog", "cat , dog"),
    ],
)
@pytest.mark.parametrize("pad", ["end", "zero"])
def test_decode_gives_the_words_back(pad, text, decoded):
    encoder = Tokenizer(pad)
    assert encoder.decode(encoder.encode([text])[0]) == decoded


def test_tokenizing_again_gives_the_same_ids():
    tokenizer = Tokenizer()
    assert tokenizer.tokenize("some uncommonword here") == tokenizer.tokenize("some uncommonword here")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (None, "cannot be read"),
        (b"", "not CLIP's vocabulary"),
        (b"not gzip at all", "cannot be read"),
        (gzip.compress(b"#version: 0.2\na b\nc d\n", mtime=0), "not CLIP's vocabulary"),
        (gzip.compress(b"#version\n" + b"one two three\n" * 49000, mtime=0), "not CLIP's vocabulary"),
        (tokenizer.VOCABULARY_FILE.read_bytes()[:100_000], "cannot be read"),
        (tokenizer.VOCABULARY_FILE.read_bytes()[:1000] + b"\0" * 1000, "cannot be read"),
    ],
)
def test_a_broken_vocabulary_is_named(tmp_path, monkeypatch, content, fault):
    path = tmp_path / "vocabulary.txt.gz"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(tokenizer, "VOCABULARY_FILE", path)
    tokenizer.vocabulary.cache_clear()
    try:
        with pytest.raises(UserError, match=fault) as caught:
            Tokenizer()
        assert str(path) in str(caught.value)
    finally:
        tokenizer.vocabulary.cache_clear()
