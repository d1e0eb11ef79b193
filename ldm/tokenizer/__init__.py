"""CLIP's tokenizer and its vocabulary."""

from ldm.tokenizer.tokenizer import (
    CONTEXT_LENGTH,
    END_TOKEN,
    START_TOKEN,
    VOCABULARY_SIZE,
    AddedToken,
    LearnedToken,
    Tokenizer,
    clean_text,
)

__all__ = [
    "CONTEXT_LENGTH",
    "END_TOKEN",
    "START_TOKEN",
    "VOCABULARY_SIZE",
    "AddedToken",
    "LearnedToken",
    "Tokenizer",
    "clean_text",
]
