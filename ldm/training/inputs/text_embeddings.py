"""From captions to text embeddings: from a cache, computed at every step, or tokens for a trained text encoder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from mindspore import Tensor, nn
from tqdm import tqdm

from ldm.data.content import content_key
from ldm.data.shards import ShardedCache
from ldm.runtime.batches import run_in_batches
from ldm.settings.model import ModelConfig
from ldm.tokenizer import CONTEXT_LENGTH
from ldm.training.inputs.caches import RecentArrays, network_hash
from ldm.training.inputs.captions import CaptionTokens

TEXTS_IN_CALL = 16  # captions that the text encoder encodes at once for the cache


def text_key(encoder: nn.Cell, config: ModelConfig) -> str:
    """Return a hash of all that text embeddings depend on, but for the tokens."""
    return content_key("text", network_hash(encoder, config.text))


@dataclass
class TextEmbeddings:
    """The text embeddings of captions.

    Args:
        encoder: The text encoder. None: the training step encodes the tokens itself, because it trains the encoder.
        tokens: Of captions.
        width: Of a text embedding.
        recent: Those of the cache that were used last.
        cache: Where text embeddings are kept. None: they are computed each time.
        common_key: Part of the keys of all text embeddings in the cache (see `text_key`).
    """

    encoder: nn.Cell | None
    tokens: CaptionTokens
    width: int
    recent: RecentArrays
    cache: ShardedCache | None = None
    common_key: str = ""

    def of(self, captions: Sequence[str]) -> np.ndarray:
        """Return the text embeddings (N, 77, D) float32 of captions, or their tokens (N, 77) int32 without an encoder.

        What the cache does not have is encoded and put into it.
        """
        tokens = np.stack([self.tokens.of(caption) for caption in captions])
        if self.encoder is None:
            return tokens
        if self.cache is None:
            return self.encoder(Tensor(tokens)).asnumpy()
        while True:
            found = self.recent.get_all(self.cache, [(self.key(row), self._shape) for row in tokens])
            if found is not None:
                return found
            self.encode(captions)  # its file has been damaged or removed since

    def encode(self, captions: Iterable[str]) -> int:
        """Put the text embeddings of captions into the cache and return how many were not there."""
        assert self.cache is not None and self.encoder is not None
        missing: dict[str, np.ndarray] = {}
        for caption in captions:
            tokens = self.tokens.of(caption)
            key = self.key(tokens)
            if key not in missing and self.recent.get(self.cache, key, self._shape) is None:
                missing[key] = tokens
        keys = list(missing)
        with tqdm(total=len(keys), desc="texts: encoding", unit="caption", delay=1, leave=False) as bar:
            for start in range(0, len(keys), TEXTS_IN_CALL):
                part = keys[start : start + TEXTS_IN_CALL]
                embeddings = run_in_batches(self.encoder, np.stack([missing[key] for key in part]), TEXTS_IN_CALL)
                for key, array in zip(part, embeddings):
                    self.cache.put(key, array)
                bar.update(len(part))
        return len(keys)

    def key(self, tokens: np.ndarray) -> str:
        """Return the key of the text embeddings of tokens (77,) in the cache."""
        return content_key(self.common_key, tokens.tobytes())

    @property
    def _shape(self) -> tuple[int, ...]:
        return CONTEXT_LENGTH, self.width
