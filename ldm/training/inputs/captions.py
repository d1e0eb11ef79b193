"""The captions that the rows of a micro-batch are trained with, and their tokens.

Where a token is learned (textual inversion), a template with it replaces a caption that does not use it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ldm.data.batches import BatchOrder
from ldm.data.checked_rows import MAX_CHECKED
from ldm.data.draws import caption_draws
from ldm.data.training_data import TrainingData
from ldm.errors import plain
from ldm.models.stable_diffusion import StableDiffusion
from ldm.settings.train import TrainSettings
from ldm.textual_inversion.inject import learned_tokens_of, make_tokenizer
from ldm.textual_inversion.templates import draw_template

logger = logging.getLogger(__name__)

CAPTIONS_HELD = 4096  # captions whose tokens are kept, 0.3 KB each: tokens take 70 us
_NO_DRAWS = np.random.default_rng(0)  # where nothing is drawn


class CaptionTokens:
    """The tokens of captions, of which the newest CAPTIONS_HELD are kept.

    Args:
        model: It may have learned tokens.
    """

    def __init__(self, model: StableDiffusion):
        self.tokenizer = make_tokenizer(model)
        self._learned_ids = [learned.token for learned in learned_tokens_of(model)]
        self._of = lru_cache(CAPTIONS_HELD)(lambda caption: self.tokenizer.encode([caption])[0])

    def of(self, caption: str) -> np.ndarray:
        """Return the tokens (77,) int32 of a caption. They must not be changed."""
        return self._of(caption)

    def has_learned(self, caption: str) -> bool:
        """Whether a caption has a token that is learned."""
        return bool(np.isin(self.of(caption), self._learned_ids).any())


@dataclass
class Captions:
    """The captions of rows.

    Args:
        settings: Those of the run.
        data: The rows.
        order: Of the micro-batches.
        steps: Of the whole run. None: there is no end.
        tokens: Of captions.
    """

    settings: TrainSettings
    data: TrainingData
    order: BatchOrder
    steps: int | None
    tokens: CaptionTokens

    def of_batch(self, rows: np.ndarray, number: int) -> list[str]:
        """Return the captions of the rows of a micro-batch, before any is dropped."""
        settings, order = self.settings, self.order
        if self.data.has_one_caption and not self._become_templates:
            generators = [_NO_DRAWS] * len(rows)
        else:
            generators = caption_draws(settings.seed, number, len(rows), order.process_index)
        step = number // settings.gradient_accumulation_steps
        return [
            self._with_token(row, self.data.caption(row, rng, step, order.epoch(number), self.steps), rng)
            for row, rng in zip(rows, generators)
        ]

    def dropout(self, rows: np.ndarray) -> np.ndarray:
        """Return the probability (N,) float64 that the caption of each row is dropped."""
        return self.data.dropout[[self.data.rows[row].subset for row in rows]]

    def whole(self, row: int, rng: np.random.Generator) -> str:
        """Return the caption of a row of which nothing is dropped (see `TrainingData.whole_caption`)."""
        return self._with_token(row, self.data.whole_caption(row, rng), rng)

    def log_report(self) -> None:
        """Log which captions are cut, and how many lack the token that is learned."""
        if cut := self.data.cut_report(self.tokens.tokenizer):
            logger.warning("%s", cut)
        if self._become_templates:
            self._log_templates()

    @property
    def _become_templates(self) -> bool:
        """Whether captions that do not use the token that is learned become templates."""
        return None not in (self.settings.placeholder_token, self.settings.learnable_property)

    def _with_token(self, row: int, caption: str, rng: np.random.Generator) -> str:
        """Return a caption as it is, or a template if it says nothing of the token that is learned."""
        settings = self.settings
        if not self._become_templates or self._uses_token(caption) or self.data.is_class_image(row):
            return caption
        assert settings.learnable_property is not None and settings.placeholder_token is not None
        return draw_template(settings.learnable_property, settings.placeholder_token, rng)

    def _uses_token(self, caption: str) -> bool:
        """Whether a caption has the token and other words. Images without a caption have the token alone."""
        if caption.strip().lower() == (self.settings.placeholder_token or "").lower():  # tokens match in any case
            return False
        return self.tokens.has_learned(caption)

    def _log_templates(self) -> None:
        """Log how many captions lack the token that is learned. A large data set is looked at in part."""
        data, settings = self.data, self.settings
        rows = np.linspace(0, len(data) - 1, min(len(data), MAX_CHECKED)).round().astype(int).tolist()
        rows = [row for row in rows if not data.is_class_image(row)]
        lacking = sum(not self._uses_token(data.whole_caption(row, np.random.default_rng(0))) for row in rows)
        if lacking:
            # Beside a LoRA the captions are likely to matter.
            logger.log(
                logging.WARNING if settings.use_lora else logging.INFO,
                "%s of %s captions do not use %s: templates with it take their place "
                "(learnable_property %s)",
                f"{lacking:,}", f"{len(rows):,}", plain(settings.placeholder_token), settings.learnable_property,
            )  # fmt: skip
