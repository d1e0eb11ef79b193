"""Write a diffusers folder that StableDiffusionPipeline.from_pretrained loads without a network connection."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.files.atomic import atomic_folder
from ldm.files.paths import writing
from ldm.settings.model import NUM_GROUPS, ModelConfig
from ldm.tokenizer import CONTEXT_LENGTH, END_TOKEN, START_TOKEN, VOCABULARY_SIZE
from ldm.tokenizer.tokenizer import END_TEXT, START_TEXT, vocabulary
from ldm.weights.arrays import Arrays
from ldm.weights.file_formats.safetensors_file import write_safetensors

FILES = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
VERSION = "0.42.1"  # of diffusers, whose settings these are


def write_folder(path: Path, model: ModelConfig, parts: Mapping[str, Arrays]) -> None:
    """Write `path` with the arrays of "unet", "vae" and "text_encoder" under diffusers' names, beside it and then
    renamed. Raises UserError where the disk refuses.
    """
    texts = {
        "model_index.json": _index(),
        "unet/config.json": unet_config(model),
        "vae/config.json": vae_config(model),
        "text_encoder/config.json": text_config(model),
        "scheduler/scheduler_config.json": scheduler_config(model),
        **_tokenizer(model),
    }
    with writing(path), atomic_folder(path) as folder:
        for name, content in texts.items():
            (folder / name).parent.mkdir(exist_ok=True)
            text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (folder / name).write_text(text, encoding="utf-8")
        for component, arrays in parts.items():
            write_safetensors(folder / component / FILES[component], arrays, {"format": "pt"})


def _index() -> dict[str, Any]:
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": VERSION,
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


def unet_config(model: ModelConfig) -> dict[str, Any]:
    """config.json of UNet2DConditionModel."""
    unet = model.unet
    channels = [unet["model_channels"] * mult for mult in unet["channel_mult"]]
    attends = [2**level in unet["attention_resolutions"] for level in range(len(channels))]
    head_channels = unet.get("num_head_channels", -1)
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": VERSION,
        "act_fn": "silu",
        # The number of heads, in spite of its name.
        "attention_head_dim": [c // head_channels for c in channels] if head_channels > 0 else unet["num_heads"],
        "block_out_channels": channels,
        "center_input_sample": False,
        "cross_attention_dim": unet["context_dim"],
        "down_block_types": ["CrossAttnDownBlock2D" if here else "DownBlock2D" for here in attends],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": unet["in_channels"],
        "layers_per_block": unet["num_res_blocks"],
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": unet.get("num_groups", NUM_GROUPS),
        "out_channels": unet["out_channels"],
        "sample_size": model.image_size // model.vae_factor,
        "transformer_layers_per_block": unet.get("transformer_depth", 1),
        "up_block_types": ["CrossAttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attends)],
        "use_linear_projection": unet.get("use_linear_in_transformer", False),
    }


def vae_config(model: ModelConfig) -> dict[str, Any]:
    """config.json of AutoencoderKL."""
    vae = model.vae
    channels = [vae["ch"] * mult for mult in vae["ch_mult"]]
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": VERSION,
        "act_fn": "silu",
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "in_channels": vae["in_channels"],
        "latent_channels": vae["embed_dim"],
        "layers_per_block": vae["num_res_blocks"],
        "norm_num_groups": vae.get("num_groups", NUM_GROUPS),
        "out_channels": vae["out_ch"],
        "sample_size": model.image_size,
        "scaling_factor": model.scale_factor,
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
    }


def text_config(model: ModelConfig) -> dict[str, Any]:
    """config.json of CLIPTextModel; SD2's with the 23 layers that are used, so that the last one is taken."""
    text = model.text
    return {
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": START_TOKEN,
        "eos_token_id": END_TOKEN,
        "hidden_act": text["activation"],
        "hidden_size": text["width"],
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 4 * text["width"],
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": text.get("length", CONTEXT_LENGTH),
        "model_type": "clip_text_model",
        "num_attention_heads": text["num_heads"],
        "num_hidden_layers": text["num_layers"],
        "pad_token_id": 1,
        "projection_dim": text["width"],
        "vocab_size": text.get("vocab_size", VOCABULARY_SIZE),
    }


def scheduler_config(model: ModelConfig) -> dict[str, Any]:
    """scheduler_config.json of the sampler that is the default here, with what the others of diffusers need to be
    made from it (DDIM clips its predictions otherwise).
    """
    return {
        "_class_name": "DPMSolverMultistepScheduler",
        "_diffusers_version": VERSION,
        "algorithm_type": "dpmsolver++",
        "beta_end": model.linear_end,
        "beta_schedule": model.beta_schedule,
        "beta_start": model.linear_start,
        "clip_sample": False,
        "num_train_timesteps": model.timesteps,
        "prediction_type": model.prediction_type,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "solver_order": 2,
        "solver_type": "midpoint",
        "steps_offset": 1,
        "timestep_spacing": "linspace",
        "trained_betas": None,
    }


def _tokenizer(model: ModelConfig) -> dict[str, Any]:
    words = vocabulary()
    pad = END_TEXT if model.pad_token == "end" else words.symbols[0]

    def special(text: str, normalized: bool = True, single_word: bool = False) -> dict[str, Any]:
        return {
            "content": text, "lstrip": False, "normalized": normalized, "rstrip": False, "single_word": single_word,
        }  # fmt: skip

    added, listed = {}, {}
    if model.added_tokens:
        added["tokenizer/added_tokens.json"] = {text: token for text, token, *_ in model.added_tokens}
        listed["added_tokens_decoder"] = {
            str(START_TOKEN): {**special(START_TEXT), "special": True},
            str(END_TOKEN): {**special(END_TEXT), "special": True},
            **{str(token): {**special(text, *flags), "special": False} for text, token, *flags in model.added_tokens},
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
