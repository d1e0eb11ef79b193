"""Text to token ids, as CLIP's text encoders were trained on them: byte-level BPE (Radford et al., 2021).

One vocabulary serves every model: 256 byte symbols, the same 256 closing a word, 48,894 merges, start and end. SD1.x
(OpenAI CLIP) fills up with the end token, SD2.x (OpenCLIP) with zeros.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Sequence
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


class AddedToken(NamedTuple):
    """A text that stands for one token of its own, such as the `<cat-toy>` that a textual inversion learns.

    text, token: what is found in a prompt, and its id. normalized: upper and lower case are the same. single_word: it
    is not found beside a letter, a digit or an underscore. The flags have the names of transformers' AddedToken; its
    `lstrip` and `rstrip` take white space away, which has no token here.
    """

    text: str
    token: int
    normalized: bool = True
    single_word: bool = False


class Tokenizer:
    """Texts to (N, 77) int32 ids: start, up to 75 tokens, end, then padding.

    Added tokens are found as CLIPTokenizer finds them: in the text as it is given, before it is cleaned, also within
    words, the first and among those the longest; what lies between is cleaned and encoded by itself.

    Args:
        pad: "end" fills up with the end token (SD1.x), "zero" with 0 (SD2.x).
        added_tokens: further tokens, with the ids that the text encoder's rows have.

    Raises:
        UserError: another padding rule, or a vocabulary file that is missing or not CLIP's.
    """

    def __init__(self, pad: str = "end", added_tokens: Sequence[AddedToken] = ()):
        if pad not in ("end", "zero"):
            raise UserError(f"pad_token '{pad}' is unknown: it is 'end' (SD1.x and nano) or 'zero' (SD2.x)")
        self.pad_id = END_TOKEN if pad == "end" else 0
        self._vocabulary = vocabulary()
        self._words: dict[str, tuple[int, ...]] = {START_TEXT: (START_TOKEN,), END_TEXT: (END_TOKEN,)}
        self._added_texts = {added.token: added.text for added in added_tokens}
        self._added_pattern, self._added_ids = _added_pattern(added_tokens)

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
        tokens: list[int] = []
        end = 0
        for found in self._added_pattern.finditer(text) if self._added_ids else ():
            tokens += self._tokenize_words(text[end : found.start()])
            tokens.append(self._added_ids[found.lastindex - 1])
            end = found.end()
        return tokens + self._tokenize_words(text[end:])

    def decode(self, tokens: Iterable[int]) -> str:
        """The cleaned text of one row of ids, up to its end token; words come back parted by single spaces."""
        symbols = self._vocabulary.symbols
        byte_of = {symbol: byte for byte, symbol in _byte_symbols().items()}
        raw = b""
        for token in map(int, tokens):
            if token == END_TOKEN:
                break
            if token in self._added_texts:
                raw += f" {self._added_texts[token]} ".encode("utf-8", errors="replace")
            elif token != START_TOKEN:
                # A space is no byte symbol: it stands for a word's end only.
                raw += bytes(byte_of.get(letter, ord(" ")) for letter in symbols[token].replace(WORD_END, " "))
        return " ".join(part for part in raw.decode("utf-8", errors="replace").split(" ") if part)

    def _tokenize_words(self, text: str) -> list[int]:
        return [token for word in WORDS.findall(clean_text(text)) for token in self._encode_word(word)]

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


def _added_pattern(added_tokens: Sequence[AddedToken]) -> tuple[regex.Pattern, list[int]]:
    """(a pattern with a group for each way to write an added token, the ids in the order of the groups)."""
    ways = [(added, False) for added in added_tokens] + [(added, True) for added in added_tokens if added.normalized]
    # Alternatives are tried in order: the longest first, and what is written in the same case before what is not.
    ways.sort(key=lambda way: (-len(way[0].text), way[1]))
    groups = []
    for added, any_case in ways:
        group = f"(?i:{regex.escape(added.text)})" if any_case else regex.escape(added.text)
        groups.append(rf"(?<!\w){group}(?!\w)" if added.single_word else group)
    return regex.compile("|".join(f"({group})" for group in groups)), [added.token for added, _ in ways]


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
