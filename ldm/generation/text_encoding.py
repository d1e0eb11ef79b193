"""From prompts to text embeddings."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

import mindspore as ms
import numpy as np

from ldm.runtime.batches import run_in_batches
from ldm.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


def encode_prompts(
    tokenizer: Tokenizer,
    text_encoder: Callable[[ms.Tensor], ms.Tensor],
    texts: Sequence[str],
    batch_size: int | None = None,
) -> np.ndarray:
    """Compute text embeddings (N, 77, D) float32. Equal texts are encoded once.

    `batch_size`: texts in a call of the text encoder, None for all of them but at most 16.
    """
    distinct = list(dict.fromkeys(texts))
    tokens = tokenizer.encode(distinct)
    embeddings = run_in_batches(text_encoder, tokens, batch_size or min(len(distinct), 16))
    place = {text: i for i, text in enumerate(distinct)}
    return embeddings[[place[text] for text in texts]]


def warn_of_cut_prompts(tokenizer: Tokenizer, texts: Iterable[str]) -> None:
    """Log a warning if texts are longer than the text encoder reads."""
    cut_off = tokenizer.cut_off(dict.fromkeys(texts))
    if cut_off:
        message = '%d prompts are longer than 75 tokens and are cut there; the first loses "%s"'
        logger.warning(message, len(cut_off), cut_off[0])
