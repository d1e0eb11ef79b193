"""Prompts of any length as chunks of 75 tokens, and the weights of their tokens.

The text encoder reads 77 tokens: start, 75 tokens of the text, end. A longer text is divided into chunks, each of which
is encoded by itself. The UNet attends to the text embeddings of all of them, (N, 77 k, D) for k chunks. Rules and
arithmetic are those of AUTOMATIC1111's stable-diffusion-webui (modules/sd_hijack_clip.py, sd_emphasis.py "Original").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ldm.prompts.syntax import Piece, parse_prompt
from ldm.tokenizer import CONTEXT_LENGTH, END_TOKEN, START_TOKEN, Tokenizer
from ldm.tokenizer.tokenizer import WORD_END, vocabulary

CHUNK_TOKENS = CONTEXT_LENGTH - 2  # without the start and the end token
COMMA_BACKTRACK = 20  # tokens; A1111's comma_padding_backtrack


class PromptChunks(NamedTuple):
    """A prompt of k chunks."""

    tokens: np.ndarray  # (k, 77) int32, with start, end and padding
    weights: np.ndarray  # (k, 77) float32, 1 for start, end and padding

    @property
    def chunk_count(self) -> int:
        """The number of chunks."""
        return len(self.tokens)


def prompt_chunks(text: str, tokenizer: Tokenizer, syntax: str = "plain", long: bool = False) -> PromptChunks:
    """Return the chunks of a prompt.

    Args:
        text: The prompt, without LoRA tags and wildcards.
        tokenizer: The model's, with its learned tokens.
        syntax: See ldm.prompts.syntax.parse_prompt.
        long: Whether a text of more than 75 tokens has several chunks. Otherwise it is cut, as Tokenizer.encode does.
    """
    if syntax == "plain" and not long:
        tokens = tokenizer.encode([text])
        return PromptChunks(tokens, np.ones(tokens.shape, np.float32))
    chunks = divide(parse_prompt(text, syntax), tokenizer)
    tokens = tokenizer.encode([""] * len(chunks))  # start, end and padding
    weights = np.ones(tokens.shape, np.float32)
    for row, row_weights, chunk in zip(tokens, weights, chunks):
        ids = [START_TOKEN, *(token for token, _ in chunk), END_TOKEN]
        row[: len(ids)] = ids
        row_weights[1 : 1 + len(chunk)] = [weight for _, weight in chunk]
    return PromptChunks(tokens, weights)


def divide(sections: Sequence[Sequence[Piece]], tokenizer: Tokenizer) -> list[list[tuple[int, float]]]:
    """Return (token, weight) of each chunk, at most 75.

    A chunk ends at a BREAK, or where it is full. If there is a comma among its last 20 tokens, what follows the last
    one moves to the next chunk. The vectors of a learned token stay together if a chunk can hold them. Nothing behind a
    final BREAK makes no chunk, nothing before the first one makes an empty one.
    """
    comma = vocabulary().ids["," + WORD_END]
    chunks: list[list[tuple[int, float]]] = []
    chunk: list[tuple[int, float]] = []
    behind_comma = 0  # the number of tokens in the chunk up to its last comma, 0 without one
    for number, section in enumerate(sections):
        if number:
            chunks.append(chunk)
            chunk, behind_comma = [], 0
        for text, weight in section:
            tokens = tokenizer.tokenize(text)
            position = 0
            while position < len(tokens):
                token = tokens[position]
                if token == comma:
                    behind_comma = len(chunk) + 1
                elif len(chunk) == CHUNK_TOKENS and behind_comma and len(chunk) - behind_comma < COMMA_BACKTRACK:
                    chunks.append(chunk[:behind_comma])
                    chunk, behind_comma = chunk[behind_comma:], 0
                length = min(tokenizer.vector_count(token), CHUNK_TOKENS)
                if len(chunk) + length > CHUNK_TOKENS:
                    chunks.append(chunk)
                    chunk, behind_comma = [], 0
                chunk += [(part, weight) for part in tokens[position : position + length]]
                position += length
    if chunk or not chunks:
        chunks.append(chunk)
    return chunks


def fill_chunks(prompt: PromptChunks, count: int, tokenizer: Tokenizer) -> PromptChunks:
    """Append empty chunks until there are `count`."""
    missing = count - prompt.chunk_count
    if missing <= 0:
        return prompt
    tokens = tokenizer.encode([""] * missing)
    weights = np.ones(tokens.shape, np.float32)
    return PromptChunks(np.concatenate([prompt.tokens, tokens]), np.concatenate([prompt.weights, weights]))


def weight_embeddings(embeddings: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Multiply the text embeddings of each token by its weight, and restore the mean of each chunk.

    z' = z w, z'' = z' mean(z) / mean(z'), where the means are those of the whole chunk. A chunk whose weights are all 1
    is returned bit for bit.

    Args:
        embeddings: Of k chunks, (k, 77, D) float32.
        weights: (k, 77) float32.
    """
    weighted = np.array(embeddings, np.float32)
    for chunk, row in zip(weighted, weights):
        if (row != 1).any():
            mean = chunk.mean(dtype=np.float64)
            chunk *= row[:, None]
            with np.errstate(divide="ignore", invalid="ignore"):  # a mean of 0, which the caller reports
                chunk *= np.float32(mean / chunk.mean(dtype=np.float64))
    return weighted
