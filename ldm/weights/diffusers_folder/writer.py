"""Write a diffusers folder that the from_pretrained of diffusers' pipeline loads without a network connection."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.files.atomic import atomic_folder
from ldm.files.paths import writing
from ldm.settings.model import ModelConfig
from ldm.tokenizer import CONTEXT_LENGTH, END_TOKEN, START_TOKEN
from ldm.tokenizer.tokenizer import END_TEXT, START_TEXT, vocabulary
from ldm.weights.arrays import Arrays
from ldm.weights.diffusers_folder.configs import (
    DIFFUSERS_VERSION,
    scheduler_config,
    text_config,
    unet_config,
    vae_config,
)
from ldm.weights.diffusers_folder.reader import STEMS
from ldm.weights.file_formats.safetensors_file import write_safetensors


def write_folder(path: Path, config: ModelConfig, arrays: Mapping[str, Arrays]) -> None:
    """Write a diffusers folder under a temporary name and rename it to `path`.

    Args:
        path: The folder, which does not exist or is empty.
        config: Configuration of the model.
        arrays: "unet", "vae" and "text_encoder" -> arrays under diffusers' names.

    Raises:
        UserError: The disk refuses.
    """
    files = {
        "model_index.json": _index(config),
        "unet/config.json": unet_config(config),
        "vae/config.json": vae_config(config),
        "text_encoder/config.json": text_config(config),
        "scheduler/scheduler_config.json": scheduler_config(config),
        **_tokenizer(config),
    }
    with writing(path), atomic_folder(path) as folder:
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (folder / name).write_text(text, encoding="utf-8")
        for component, component_arrays in arrays.items():
            file = folder / component / f"{STEMS[component][0]}.safetensors"
            write_safetensors(file, component_arrays, {"format": "pt"})


def _index(config: ModelConfig) -> dict[str, Any]:
    return {
        "_class_name": "StableDiffusionInpaintPipeline" if config.is_inpainting else "StableDiffusionPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _tokenizer(config: ModelConfig) -> dict[str, Any]:
    """Return the files of the tokenizer: path -> JSON content, or a text."""
    words = vocabulary()
    pad = END_TEXT if config.pad_token == "end" else words.symbols[0]

    def special(text: str, normalized: bool = True, single_word: bool = False) -> dict[str, Any]:
        return {
            "content": text, "lstrip": False, "normalized": normalized, "rstrip": False, "single_word": single_word,
        }  # fmt: skip

    added: dict[str, Any] = {}
    listed: dict[str, Any] = {}
    if config.added_tokens:
        added["tokenizer/added_tokens.json"] = {text: token for text, token, *_ in config.added_tokens}
        listed["added_tokens_decoder"] = {
            str(START_TOKEN): {**special(START_TEXT), "special": True},
            str(END_TOKEN): {**special(END_TEXT), "special": True},
            **{str(token): {**special(text, *flags), "special": False} for text, token, *flags in config.added_tokens},
        }
    return {
        **added,
        "tokenizer/vocab.json": json.dumps(words.ids, ensure_ascii=False),
        "tokenizer/merges.txt": "".join(["#version: 0.2\n", *(f"{a} {b}\n" for a, b in words.ranks)]),
        "tokenizer/special_tokens_map.json": {
            "bos_token": special(START_TEXT),
            "eos_token": special(END_TEXT),
            "pad_token": pad,
            "unk_token": special(END_TEXT),
        },
        "tokenizer/tokenizer_config.json": {
            "add_prefix_space": False,
            **listed,
            "bos_token": START_TEXT,
            "do_lower_case": True,
            "eos_token": END_TEXT,
            "errors": "replace",
            "model_max_length": CONTEXT_LENGTH,
            "pad_token": pad,
            "tokenizer_class": "CLIPTokenizer",
            "unk_token": END_TEXT,
        },
    }
