"""CLIP's tokenizer: text to token ids by byte-level byte-pair encoding (Radford et al. 2021).

All models share one vocabulary: 256 byte symbols, the same 256 at the end of a word, 48,894 merges, and the start and
end tokens. SD1.x (OpenAI CLIP) pads with the end token, SD2.x (OpenCLIP) with zeros.
"""

from __future__ import annotations

import copy
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
from ldm.settings.model import AddedToken

CONTEXT_LENGTH = 77
VOCABULARY_SIZE = 49408
START_TOKEN = 49406
END_TOKEN = 49407

VOCABULARY_FILE = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
MERGES = VOCABULARY_SIZE - 2 - 2 * 256

START_TEXT, END_TEXT = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
# Contractions, runs of letters, single digits, runs of other characters. Merges never cross their borders. IGNORECASE
# matters although the text is in lower case: a long s (U+017F), which has no lower case, ends a contraction.
WORDS = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)


class LearnedToken(NamedTuple):
    """A text that stands for vectors of a textual inversion, each of which is a token of its own.

    Attributes:
        text: The text in a prompt, in any case. If it begins or ends with a letter, digit or underscore, it is not
            matched beside another one, as A1111's names are whole words. `<cat-toy>` is matched anywhere.
        token: The id of its first vector. The others follow.
        length: Number of vectors.
    """

    text: str
    token: int
    length: int

    @property
    def added(self) -> AddedToken:
        """The text with the id of the first vector."""
        is_word = any(letter.isalnum() or letter == "_" for letter in (self.text[0], self.text[-1]))
        return AddedToken(self.text, self.token, single_word=is_word)


def clean_text(text: str) -> str:
    """Clean a text like CLIPTokenizer with ftfy: encoding, HTML entities, white space and case.

    ftfy repairs wrong encodings, composes accents (NFC), straightens quotes, narrows full-width letters and removes
    control characters. It unescapes nested entities too (`&amp;amp;lt;`), but not in a line with a `<`, and not those
    without a semicolon. OpenAI's and OpenCLIP's own code unescapes these as well. This function follows CLIPTokenizer,
    which pipelines use.
    """
    return " ".join(ftfy.fix_text(text).split()).lower()


class Tokenizer:
    """Turns texts into token ids: the start token, up to 75 tokens, the end token, and padding.

    Added tokens are matched as CLIPTokenizer matches them: in the text before it is cleaned, also inside words, the
    leftmost first and of several the longest. The text between them is cleaned and encoded separately.

    Args:
        pad: "end" pads with the end token (SD1.x), "zero" with 0 (SD2.x).
        added_tokens: Additional tokens, with the ids of their rows in the text encoder.

    Raises:
        UserError: The padding is unknown, or the vocabulary file is missing or is not CLIP's.
    """

    def __init__(self, pad: str = "end", added_tokens: Sequence[AddedToken] = ()):
        if pad not in ("end", "zero"):
            raise UserError(f"pad_token '{pad}' is unknown: use 'end' (SD1.x and nano) or 'zero' (SD2.x)")
        self.pad_id = END_TOKEN if pad == "end" else 0
        self._vocabulary = vocabulary()
        self._words: dict[str, tuple[int, ...]] = {START_TEXT: (START_TOKEN,), END_TEXT: (END_TOKEN,)}
        self._added_tokens = tuple(added_tokens)
        self._learned: dict[int, LearnedToken] = {}
        self._index_added()

    def with_learned_tokens(self, learned_tokens: Sequence[LearnedToken]) -> Tokenizer:
        """Return a tokenizer that knows the tokens of textual inversions too, in place of those that it knew."""
        other = copy.copy(self)
        other._learned = {learned.token: learned for learned in learned_tokens}
        other._index_added()
        return other

    def _index_added(self) -> None:
        added_tokens = [*self._added_tokens, *(learned.added for learned in self._learned.values())]
        self._added_texts = {added.token: added.text for added in added_tokens}
        for learned in self._learned.values():
            self._added_texts.update((learned.token + i, learned.text) for i in range(learned.length))
        self._added_pattern, self._added_ids = _added_pattern(added_tokens)

    def encode(self, texts: Iterable[str]) -> np.ndarray:
        """Return token ids (N, 77) int32. Texts of more than 75 tokens are cut and keep their end token."""
        if isinstance(texts, str):
            raise TypeError("encode takes a list of texts, not a single text")
        texts = list(texts)
        tokens = np.full((len(texts), CONTEXT_LENGTH), self.pad_id, dtype=np.int32)
        for row, text in zip(tokens, texts):
            ids = [START_TOKEN, *self.tokenize(text)[: CONTEXT_LENGTH - 2], END_TOKEN]
            row[: len(ids)] = ids
        return tokens

    def cut_off(self, texts: Iterable[str]) -> list[str]:
        """Return the part that `encode` cuts off, cleaned, for each text that it cuts."""
        ids = (self.tokenize(text) for text in texts)
        return [self.decode(tokens[CONTEXT_LENGTH - 2 :]) for tokens in ids if len(tokens) > CONTEXT_LENGTH - 2]

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a whole text of any length, without start, end and padding."""
        tokens: list[int] = []
        end = 0
        for match in self._added_pattern.finditer(text) if self._added_ids else ():
            tokens += self._tokenize_words(text[end : match.start()])
            token = self._added_ids[match.lastindex - 1]
            tokens += range(token, token + self._learned[token].length) if token in self._learned else [token]
            end = match.end()
        return tokens + self._tokenize_words(text[end:])

    def vector_count(self, token: int) -> int:
        """Return how many tokens belong together from this one on: the vectors of a learned token, else 1."""
        learned = self._learned.get(token)
        return 1 if learned is None else learned.length

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the cleaned text of a row of ids up to its end token, with single spaces between words."""
        symbols = self._vocabulary.symbols
        byte_of = {symbol: byte for byte, symbol in _byte_symbols().items()}
        raw, previous = b"", -1
        for token in map(int, tokens):
            if token == END_TOKEN:
                break
            follows = token == previous + 1 and token not in self._learned  # a further vector of the same text
            if token in self._added_texts:
                if not (follows and self._added_texts[token] == self._added_texts.get(previous)):
                    raw += f" {self._added_texts[token]} ".encode("utf-8", errors="replace")
            elif token != START_TOKEN:
                # A space is not a byte symbol: it can only be the end of a word.
                raw += bytes(byte_of.get(letter, ord(" ")) for letter in symbols[token].replace(WORD_END, " "))
            previous = token
        return " ".join(part for part in raw.decode("utf-8", errors="replace").split(" ") if part)

    def _tokenize_words(self, text: str) -> list[int]:
        return [token for word in WORDS.findall(clean_text(text)) for token in self._encode_word(word)]

    def _encode_word(self, word: str) -> tuple[int, ...]:
        known = self._words.get(word)
        if known is None:
            known = self._words[word] = tuple(self._vocabulary.ids[part] for part in self._merge(word))
        return known

    def _merge(self, word: str) -> list[str]:
        """Merge neighbouring symbols, in the order that the merges were learned, until no merge applies."""
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
    """Return a pattern with a group for each spelling of an added token, and the ids in the order of the groups."""
    spellings = [(added, False) for added in added_tokens] + [
        (added, True) for added in added_tokens if added.normalized
    ]
    # Alternatives are tried in order: the longest first, and the same case before any case.
    spellings.sort(key=lambda spelling: (-len(spelling[0].text), spelling[1]))
    groups = []
    for added, any_case in spellings:
        group = f"(?i:{regex.escape(added.text)})" if any_case else regex.escape(added.text)
        groups.append(rf"(?<!\w){group}(?!\w)" if added.single_word else group)
    return regex.compile("|".join(f"({group})" for group in groups)), [added.token for added, _ in spellings]


@lru_cache(maxsize=1)
def _byte_symbols() -> dict[int, str]:
    """Return a printable character for every byte, so that merges are lines of text (GPT-2's table).

    Printable bytes keep their own character. The others, controls and spaces, get those from U+0100 on. The order is
    that of the vocabulary.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable}
    symbols.update({byte: chr(256 + index) for index, byte in enumerate(others)})
    return symbols


class Vocabulary(NamedTuple):
    """CLIP's vocabulary."""

    symbols: list[str]  # by token id
    ids: dict[str, int]  # by symbol
    ranks: dict[tuple[str, str], int]  # by merge: its place in the order of learning


@lru_cache(maxsize=1)
def vocabulary() -> Vocabulary:
    """Load CLIP's vocabulary: byte symbols, byte symbols at the end of a word, merges, start and end token.

    Raises:
        UserError: The vocabulary file is missing, broken or another one.
    """
    try:
        with gzip.open(VOCABULARY_FILE, "rt", encoding="utf-8") as file:
            lines = file.read().split("\n")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(
            f"the CLIP vocabulary {VOCABULARY_FILE} cannot be read ({error}): restore it from the repository"
        ) from None
    # The first line is a version, and the file lists more merges than CLIP uses.
    pairs = [line.split() for line in lines[1 : 1 + MERGES]]
    if len(pairs) != MERGES or any(len(pair) != 2 for pair in pairs):
        raise UserError(
            f"{VOCABULARY_FILE} is not CLIP's vocabulary ({MERGES} merges of two): restore it from the repository"
        )
    merges = [(first, second) for first, second in pairs]
    letters = list(_byte_symbols().values())
    word_ends = [letter + WORD_END for letter in letters]
    symbols = [*letters, *word_ends, *(first + second for first, second in merges), START_TEXT, END_TEXT]
    ids = {symbol: token for token, symbol in enumerate(symbols)}
    return Vocabulary(symbols, ids, {merge: rank for rank, merge in enumerate(merges)})
