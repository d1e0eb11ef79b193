"""Text to token ids, as CLIP's text encoders were trained on them: byte-level BPE (Radford et al., 2021).

One vocabulary serves every model: 256 byte symbols, the same 256 closing a word, 48,894 merges, start and end. SD1.x
(OpenAI CLIP) fills up with the end token, SD2.x (OpenCLIP) with zeros.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import ftfy
import numpy as np
import regex

from ldm.errors import UserError

CONTEXT_LENGTH = 77
VOCABULARY_SIZE = 49408
START_TOKEN = 49406
END_TOKEN = 49407

VOCABULARY_FILE = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
MERGES = VOCABULARY_SIZE - 2 - 2 * 256

START_TEXT, END_TEXT = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
# Contractions, runs of letters, single digits, runs of anything else: a merge never crosses these. IGNORECASE although
# the text is lower-cased by now, since it also lets a long s (U+017F), which has no lower case, close a contraction.
WORDS = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)


def clean_text(text: str) -> str:
    """Clean a text as CLIPTokenizer does with ftfy: mended, html entities unescaped, white space folded, lower case.

    ftfy mends encodings gone wrong, composes accents (NFC), straightens quotes, narrows full-width letters and takes
    out control characters. It unescapes entities to the last (`&amp;amp;lt;` too), except in a line that holds a `<`
    and those without their semicolon. OpenAI's and OpenCLIP's own code unescapes these as well; CLIPTokenizer, which is
    what pipelines run, does not, and is followed here.
    """
    return " ".join(ftfy.fix_text(text).split()).lower()


class Tokenizer:
    """Texts to (N, 77) int32 ids: start, up to 75 tokens, end, then padding.

    Args:
        pad: "end" fills up with the end token (SD1.x), "zero" with 0 (SD2.x).

    Raises:
        UserError: another padding rule, or a vocabulary file that is missing or not CLIP's.
    """

    def __init__(self, pad: str = "end"):
        if pad not in ("end", "zero"):
            raise UserError(f"pad_token '{pad}' is unknown: it is 'end' (SD1.x and nano) or 'zero' (SD2.x)")
        self.pad_id = END_TOKEN if pad == "end" else 0
        self._vocabulary = vocabulary()
        self._words: dict[str, tuple[int, ...]] = {START_TEXT: (START_TOKEN,), END_TEXT: (END_TOKEN,)}

    def encode(self, texts: Iterable[str]) -> np.ndarray:
        """Token ids (N, 77) int32 of N texts; a text of more than 75 tokens is cut and keeps its end token."""
        if isinstance(texts, str):
            raise TypeError("encode takes a list of texts, not one text")
        texts = list(texts)
        tokens = np.full((len(texts), CONTEXT_LENGTH), self.pad_id, dtype=np.int32)
        for row, text in zip(tokens, texts):
            ids = [START_TOKEN, *self.tokenize(text)[: CONTEXT_LENGTH - 2], END_TOKEN]
            row[: len(ids)] = ids
        return tokens

    def cut_off(self, texts: Iterable[str]) -> list[str]:
        """Of each text that `encode` cuts, what it leaves out, cleaned."""
        ids = (self.tokenize(text) for text in texts)
        return [self.decode(tokens[CONTEXT_LENGTH - 2 :]) for tokens in ids if len(tokens) > CONTEXT_LENGTH - 2]

    def tokenize(self, text: str) -> list[int]:
        """The ids of a whole text, however long, without start, end and padding."""
        return [token for word in WORDS.findall(clean_text(text)) for token in self._encode_word(word)]

    def decode(self, tokens: Iterable[int]) -> str:
        """The cleaned text of one row of ids, up to its end token; words come back parted by single spaces."""
        symbols = self._vocabulary.symbols
        letters = []
        for token in tokens:
            if token == END_TOKEN:
                break
            if token != START_TOKEN:
                letters.append(symbols[int(token)].replace(WORD_END, " "))
        byte_of = {symbol: byte for byte, symbol in _byte_symbols().items()}
        # A space is no byte symbol: it stands for a word's end only.
        raw = bytes(byte_of.get(letter, ord(" ")) for letter in "".join(letters))
        return raw.decode("utf-8", errors="replace").strip()

    def _encode_word(self, word: str) -> tuple[int, ...]:
        known = self._words.get(word)
        if known is None:
            known = self._words[word] = tuple(self._vocabulary.ids[part] for part in self._merge(word))
        return known

    def _merge(self, word: str) -> list[str]:
        """Join neighbouring symbols, the earliest learned merge first, until no pair is in the vocabulary."""
        byte_symbols = _byte_symbols()
        parts = [byte_symbols[byte] for byte in word.encode("utf-8")]
        parts[-1] += WORD_END
        ranks = self._vocabulary.ranks
        last = len(ranks)
        while len(parts) > 1:
            rank, pair = min((ranks.get(pair, last), pair) for pair in zip(parts, parts[1:]))
            if rank == last:
                break
            joined, place = [], 0
            while place < len(parts):
                if tuple(parts[place : place + 2]) == pair:
                    joined.append(parts[place] + parts[place + 1])
                    place += 2
                else:
                    joined.append(parts[place])
                    place += 1
            parts = joined
        return parts


@lru_cache(maxsize=1)
def _byte_symbols() -> dict[int, str]:
    """A printable character for every byte, so that merges are lines of text: its own where it has one (GPT-2's table).

    The others, controls and spaces, take the characters from U+0100 on. The order is that of the vocabulary.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable}
    symbols.update({byte: chr(256 + index) for index, byte in enumerate(others)})
    return symbols


class Vocabulary(NamedTuple):
    symbols: list[str]  # by token id
    ids: dict[str, int]  # by symbol
    ranks: dict[tuple[str, str], int]  # place of every merge in the order it was learned


@lru_cache(maxsize=1)
def vocabulary() -> Vocabulary:
    """CLIP's vocabulary: byte symbols, byte symbols that close a word, what each merge makes, start and end.

    Raises:
        UserError: the vocabulary file is missing, broken or another one.
    """
    try:
        with gzip.open(VOCABULARY_FILE, "rt", encoding="utf-8") as file:
            lines = file.read().split("\n")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(
            f"the CLIP vocabulary {VOCABULARY_FILE} cannot be read ({error}): restore it from the repository"
        ) from None
    # The file lists more merges than CLIP uses; its first line names its version.
    merges = [tuple(line.split()) for line in lines[1 : 1 + MERGES]]
    if len(merges) != MERGES or any(len(merge) != 2 for merge in merges):
        raise UserError(
            f"{VOCABULARY_FILE} is not CLIP's vocabulary ({MERGES} merges of two): restore it from the repository"
        )
    letters = list(_byte_symbols().values())
    closing = [letter + WORD_END for letter in letters]
    symbols = [*letters, *closing, *(first + second for first, second in merges), START_TEXT, END_TEXT]
    ids = {symbol: token for token, symbol in enumerate(symbols)}
    return Vocabulary(symbols, ids, {merge: rank for rank, merge in enumerate(merges)})
