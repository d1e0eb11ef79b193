"""What a LoRA file is: its format, its kind, its base model, its words, and how it was trained."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from ldm.errors import plain
from ldm.lora.formats import FORMATS, detect_format, lora_files
from ldm.lora.formats.modules import fitting_bases, known_bases
from ldm.lora.lora import LoRA
from ldm.weights.checkpoint import Checkpoint, open_checkpoint
from ldm.weights.hashes import MODEL_HASH, data_hash

LONGEST_VALUE = 200  # characters
MOST_WORDS = 8
# kohya's keys -> what they say, in the order of the page.
TRAINING = {
    "ss_network_module": "network",
    "ss_network_dim": "rank as written",
    "ss_network_alpha": "alpha as written",
    "ss_network_args": "further arguments",
    "ss_sd_model_name": "trained on",
    "ss_num_train_images": "images",
    "ss_resolution": "resolution",
    "ss_steps": "steps",
    "ss_epoch": "epoch",
    "ss_learning_rate": "learning rate",
    "ss_unet_lr": "of the UNet",
    "ss_text_encoder_lr": "of the text encoder",
    "ss_optimizer": "optimizer",
    "ss_training_comment": "comment",
    "modelspec.title": "title",
    "modelspec.author": "author",
    "modelspec.license": "licence",
    "modelspec.date": "date",
    "modelspec.usage_hint": "usage hint",
}
_NOTHING = ("", "None", "null")


def facts(path: Path, lora: LoRA) -> list[str]:
    """Return the lines of the page that need the file alone."""
    files = lora_files(path)
    checkpoints = [open_checkpoint(file) for file in files]
    format = detect_format(path)
    size = sum(file.stat().st_size for file in files)
    bases = fitting_bases(lora, known_bases())
    lines = [
        f"file        {plain(path)}, {_size(size)}, {format} ({FORMATS[format].about}), {_types(checkpoints)}",
        f"holds       {lora}",
        f"made for    {' or '.join(base.label for base in bases) or 'no model that is known here'}, by the shapes",
    ]
    metadata = {key: text for checkpoint in checkpoints for key, text in checkpoint.metadata.items()}
    lines.append(f"its words   {_words(metadata, lora)}")
    if metadata.get(MODEL_HASH):
        matches = len(files) == 1 and data_hash(files[0]) == metadata[MODEL_HASH]
        state = "is that of its arrays" if matches else "is not that of its arrays: it was changed after it was saved"
        lines.append(f"hash        {plain(metadata[MODEL_HASH][:12])} {state}")
    for key, label in TRAINING.items():
        if metadata.get(key, "") not in _NOTHING:
            lines.append(f"            {label}: {plain(metadata[key], LONGEST_VALUE)}")
    return lines


def trigger_words(metadata: Mapping[str, str]) -> list[str]:
    """Return the words that the file says call its style: the trigger phrase, else the commonest tags."""
    phrase = metadata.get("modelspec.trigger_phrase", "").strip()
    if phrase:
        return [phrase]
    try:
        folders = json.loads(metadata.get("ss_tag_frequency", "{}"))
        counts: Counter[str] = Counter()
        for tags in folders.values():
            counts.update({str(tag).strip(): int(count) for tag, count in tags.items()})
    except (ValueError, AttributeError, TypeError, OverflowError, RecursionError):
        return []  # written by hand or damaged: words are a help, not a condition
    return [tag for tag, _ in counts.most_common(MOST_WORDS)]


def _words(metadata: Mapping[str, str], lora: LoRA) -> str:
    parts = []
    if lora.embeddings:
        tokens = (f"{name} ({len(vectors)})" for name, vectors in lora.embeddings.items())
        parts.append(f"learned tokens with their vectors: {plain(', '.join(tokens), LONGEST_VALUE)}")
    words = trigger_words(metadata)
    if words:
        parts.append(plain(", ".join(words), LONGEST_VALUE))
    return "; ".join(parts) or "the file names none: ask who made it, or try a caption of its kind"


def _types(checkpoints: list[Checkpoint]) -> str:
    types = Counter(checkpoint.stored_type(name) for checkpoint in checkpoints for name in checkpoint)
    return ", ".join(name for name, _ in types.most_common(2))


def _size(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
