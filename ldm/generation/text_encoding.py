"""From prompts to text embeddings."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

import mindspore as ms
import numpy as np

from ldm.errors import UserError, plain
from ldm.prompts.chunks import fill_chunks, prompt_chunks, weight_embeddings
from ldm.runtime.batches import run_in_batches
from ldm.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

MAX_ROWS = 16  # chunks in a call of the text encoder, unless more texts of one chunk are encoded together


def encode_prompts(
    tokenizer: Tokenizer,
    text_encoder: Callable[[ms.Tensor], ms.Tensor],
    texts: Sequence[str],
    batch_size: int | None = None,
    syntax: str = "plain",
    long: bool = False,
) -> np.ndarray:
    """Compute text embeddings (N, 77 k, D) float32. Equal texts are encoded once.

    Args:
        tokenizer: The model's.
        text_encoder: Tokens (M, 77) int32 -> text embeddings (M, 77, D) float32.
        texts: Prompts and negative prompts.
        batch_size: Rows of 77 tokens in a call of the text encoder, None for all of them but at most 16.
        syntax: See ldm.prompts.syntax.
        long: Whether texts of more than 75 tokens are divided into k chunks, instead of being cut. k is that of the
            longest text. The others get empty chunks.

    Raises:
        UserError: A prompt is too long, or its weights leave nothing of it.
    """
    distinct = list(dict.fromkeys(texts))
    prompts = [prompt_chunks(text, tokenizer, syntax, long) for text in distinct]
    chunk_count = max(prompt.chunk_count for prompt in prompts)
    prompts = [fill_chunks(prompt, chunk_count, tokenizer) for prompt in prompts]
    tokens = np.concatenate([prompt.tokens for prompt in prompts])
    rows = run_in_batches(text_encoder, tokens, batch_size or min(len(tokens), MAX_ROWS))
    chunks = rows.reshape(len(distinct), chunk_count, *rows.shape[1:])
    encoded = []
    for text, prompt, of_text in zip(distinct, prompts, chunks):
        weighted = weight_embeddings(of_text, prompt.weights)
        if not np.isfinite(weighted).all() and np.isfinite(of_text).all():
            raise UserError(f'prompt "{plain(text, 60)}": its weights leave nothing of it: give other weights than 0')
        encoded.append(weighted.reshape(-1, weighted.shape[-1]))
    place = {text: i for i, text in enumerate(distinct)}
    return np.stack([encoded[place[text]] for text in texts])


def rows_together(texts: Iterable[str], chunk_count: int) -> int:
    """Return how many rows of 77 tokens the prompts of a batch take in a call of the text encoder."""
    distinct = len(set(texts))
    return min(distinct * chunk_count, max(distinct, MAX_ROWS))


def warn_of_cut_prompts(tokenizer: Tokenizer, texts: Iterable[str]) -> None:
    """Log a warning if texts are longer than the text encoder reads."""
    cut_off = tokenizer.cut_off(dict.fromkeys(texts))
    if cut_off:
        message = (
            '%d prompts are longer than 75 tokens and are cut there; the first loses "%s" (--support_long_prompts '
            "reads them whole)"
        )
        logger.warning(message, len(cut_off), cut_off[0])
