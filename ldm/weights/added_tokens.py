"""Tokens that a checkpoint adds to CLIP's vocabulary, as textual inversion does.

A diffusers folder names them in the files of its tokenizer, a single file of this project in its metadata. They belong
to the checkpoint, not to the architecture: its token embedding has one more row for each.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm.errors import UserError, plain
from ldm.files.documents import parse_json
from ldm.settings.model import ModelConfig
from ldm.tokenizer import VOCABULARY_SIZE, AddedToken
from ldm.tokenizer.tokenizer import END_TEXT, START_TEXT, vocabulary
from ldm.weights.arrays import Checkpoint
from ldm.weights.names import CanonicalArrays, KeyMap
from ldm.weights.names.tables import TEXT_PREFIX

METADATA = "added_tokens"  # key of the metadata
TOKEN_EMBEDDING = f"{TEXT_PREFIX}embeddings.token_embedding.weight"
MAX_TOKENS = 100_000
LONGEST_TEXT = 500
# transformers can pad the embedding with rows of no token to a multiple that suits a device (8, 64, 128).
ROWS_MULTIPLE, MAX_PADDING = 8, 128
# transformers lists these among the added tokens. SD2's tokenizer pads with "!".
_OWN_TEXTS = (START_TEXT, END_TEXT, "!")


def read_tokenizer_tokens(read_json: Callable[[str], Mapping[str, Any]], path: Path) -> tuple[AddedToken, ...]:
    """Read the tokens that the tokenizer of a diffusers folder adds.

    Args:
        read_json: Reads a file of the folder. Empty if it is missing.
        path: The folder, for errors.

    Returns:
        The tokens in the order of their ids.

    Raises:
        UserError: The files contradict each other or CLIP's vocabulary, or the vocabulary is another one.
    """
    where = path / "tokenizer"
    names = ("tokenizer_config.json", "tokenizer.json", "added_tokens.json", "vocab.json")
    files = {name: read_json(f"tokenizer/{name}") for name in names}
    tokens: dict[str, AddedToken] = {}
    for file, entries in _listed(files, where).items():
        for text, token, flags in entries:
            added = _added_token(text, token, flags, f"{where / file}")
            other = tokens.setdefault(added.text, added)
            if other.token != added.token:
                raise UserError(
                    f"{where / file} gives {plain(text, 60)} the id {added.token}, another file beside it "
                    f"{other.token}: save the tokenizer again"
                )
    _check_vocabulary(files, where)
    return _checked([added for added in tokens.values() if added.text not in _OWN_TEXTS], str(where))


def read_added_tokens(checkpoint: Checkpoint) -> tuple[AddedToken, ...]:
    """Read the tokens that a checkpoint adds from its metadata, in the order of their ids.

    Raises UserError if the metadata names tokens that cannot be.
    """
    text = checkpoint.metadata.get(METADATA)
    if text is None:
        return ()
    where = f"{checkpoint.path}, {METADATA} in its metadata,"
    entries = parse_json(text, where)
    if not isinstance(entries, list) or not all(isinstance(entry, list) and len(entry) == 4 for entry in entries):
        raise UserError(f"{where} is not a list of tokens: convert the checkpoint again")
    tokens = [
        _added_token(text, token, {"normalized": normalized, "single_word": single_word}, where)
        for text, token, normalized, single_word in entries
    ]
    return _checked(tokens, where)


def tokens_metadata(tokens: tuple[AddedToken, ...]) -> dict[str, str]:
    """Return the tokens as metadata for read_added_tokens. Empty if there are none."""
    return {METADATA: json.dumps(tokens, ensure_ascii=False)} if tokens else {}


def with_added_tokens(config: ModelConfig, checkpoint: Checkpoint, key_map: KeyMap) -> ModelConfig:
    """Add the tokens of a checkpoint to a configuration, and their rows to the text encoder.

    Raises:
        UserError: The token embedding has neither one row for each token nor is padded to a multiple of ROWS_MULTIPLE.
    """
    if TOKEN_EMBEDDING not in key_map.sources:
        return config
    tokens = read_added_tokens(checkpoint)
    shape = CanonicalArrays(checkpoint, key_map).shape(TOKEN_EMBEDDING)
    rows = shape[0] if shape else 0
    learned = [added for added in tokens if added.token >= VOCABULARY_SIZE]
    if not learned and rows <= config.text.get("vocab_size", VOCABULARY_SIZE):
        return replace(config, added_tokens=tokens)  # fewer rows are reported by the comparison of shapes
    expected = VOCABULARY_SIZE + len(learned)
    is_padded = learned and rows % ROWS_MULTIPLE == 0 and expected < rows < expected + MAX_PADDING
    if rows != expected and not is_padded:
        texts = [*(plain(added.text, 60) for added in learned[:3]), *["..."] * (len(learned) > 3)]
        shown = f" ({', '.join(texts)})" if texts else ""
        raise UserError(
            f"{checkpoint.path} adds {len(learned)} token{'s' * (len(learned) != 1)} to CLIP's {VOCABULARY_SIZE:,}"
            f"{shown}, but its text encoder's token embedding has {rows:,} rows: take tokenizer/ and "
            "text_encoder/ of one run, the embedding resized to the tokenizer's length"
        )
    return replace(config, text={**config.text, "vocab_size": rows}, added_tokens=tokens)


def without_added_tokens(config: ModelConfig) -> ModelConfig:
    """Remove the added tokens, the reverse of with_added_tokens."""
    text = {key: value for key, value in config.text.items() if key != "vocab_size"}
    return replace(config, text=text, added_tokens=()) if config.added_tokens else config


def _listed(files: Mapping[str, Mapping[str, Any]], where: Path) -> dict[str, list[tuple[Any, Any, dict]]]:
    """Return file -> (text, id, flags) of each token that it lists. Raises UserError for lists of another form."""
    decoder = files["tokenizer_config.json"].get("added_tokens_decoder") or {}
    whole = files["tokenizer.json"].get("added_tokens") or []
    by_id = list(decoder.values()) if isinstance(decoder, dict) else None
    for file, key, entries in (
        ("tokenizer_config.json", "added_tokens_decoder", by_id),
        ("tokenizer.json", "added_tokens", whole),
    ):
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f"{where / file}: {key} is not a list of tokens: save the tokenizer again")
    return {
        "tokenizer_config.json": [
            (entry.get("content"), int(token) if token.isdecimal() and len(token) < 10 else token, entry)
            for token, entry in decoder.items()
        ],
        "tokenizer.json": [(entry.get("content"), entry.get("id"), entry) for entry in whole],
        "added_tokens.json": [(text, token, {}) for text, token in files["added_tokens.json"].items()],
    }


def _added_token(text: Any, token: Any, flags: Mapping[str, Any], where: str) -> AddedToken:
    normalized, single_word = flags.get("normalized", True), flags.get("single_word", False)
    if not isinstance(text, str) or not 0 < len(text) <= LONGEST_TEXT or not text.strip():
        raise UserError(
            f"{where} adds a token whose text is {plain(repr(text), 60)}: it must be a text of 1 to "
            f"{LONGEST_TEXT} characters"
        )
    if type(token) is not int or not 0 <= token < VOCABULARY_SIZE + MAX_TOKENS:
        raise UserError(
            f"{where} gives {plain(text, 60)} the id {plain(repr(token), 60)}: it must be a whole number "
            f"below {VOCABULARY_SIZE + MAX_TOKENS:,}"
        )
    if type(normalized) is not bool or type(single_word) is not bool:
        raise UserError(f"{where}: normalized and single_word of {plain(text, 60)} must be true or false")
    return AddedToken(text, token, normalized, single_word)


def _checked(tokens: list[AddedToken], where: str) -> tuple[AddedToken, ...]:
    """Sort tokens by id. Raises UserError for ids that are used twice, missing, or CLIP's for another text."""
    tokens = sorted(tokens, key=lambda added: added.token)
    symbols = vocabulary().symbols
    expected = VOCABULARY_SIZE
    for added in tokens:
        if added.token < VOCABULARY_SIZE:
            if symbols[added.token] != added.text:
                raise UserError(
                    f"{where} gives {plain(added.text, 60)} the id {added.token}, which is "
                    f"{symbols[added.token]} in CLIP's vocabulary: only CLIP's tokenizer is supported"
                )
        elif added.token != expected:
            raise UserError(
                f"{where} gives {plain(added.text, 60)} the id {added.token}, where {expected} is next: "
                "the ids of added tokens must follow each other"
            )
        else:
            expected += 1
    return tuple(tokens)


def _check_vocabulary(files: Mapping[str, Mapping[str, Any]], where: Path) -> None:
    """Raise UserError for a vocabulary other than CLIP's, with which every prompt would have another meaning."""
    file = "vocab.json"
    ids: Any = files[file]
    if not ids:
        file = "tokenizer.json"
        model = files[file].get("model")
        ids = model.get("vocab") if isinstance(model, dict) else None
    if not ids:
        return
    ours = vocabulary().ids
    differing = [text for text, token in ours.items() if ids.get(text) != token] if isinstance(ids, dict) else ours
    if differing:
        raise UserError(
            f"{where / file} is not CLIP's vocabulary, {len(differing):,} of {len(ours):,} entries differ: "
            "only CLIP's tokenizer is supported"
        )
