"""Recognise what a file or folder holds: a base model, one of its networks, a LoRA, or something not supported.

Every reader that refuses a file asks this module, so that one thing has one name in all errors. A checkpoint is judged
by its keys, its metadata and the shapes of its arrays, a folder by its entries, any other file by its first bytes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ldm.errors import UserError, plain
from ldm.settings.model import OTHER_TASKS
from ldm.weights.arrays import Checkpoint
from ldm.weights.names import COMPONENTS, detect_family

SUPPORTED = "only SD1.x and SD2.x are supported"
TEXTUAL_INVERSION = "a textual-inversion embedding, neither a base model nor a LoRA"
# Width of the text embeddings that a model's cross-attention takes.
VERSION_OF_WIDTH = {768: "SD1.x", 1024: "SD2.x", 2048: "SDXL"}

Kind = Literal["base model", "component", "LoRA", "base model with LoRA", "other"]


@dataclass(frozen=True)
class Content:
    """What a checkpoint holds.

    Attributes:
        kind: Which of the cases that callers treat differently.
        name: What it is, for "<path> is <name>" in an error.
        prefix: For a component, what its keys lack to be those of a whole model.
    """

    kind: Kind
    name: str
    prefix: str = ""


@dataclass(frozen=True)
class _OtherModel:
    """A kind of model that is not supported: its name with the article, and what tells it.

    Attributes:
        keys: Pattern of the beginning of a key in its checkpoints.
        entry: Name of an entry in its diffusers folder.
        pipeline: Part of the pipeline's class name in model_index.json.
    """

    name: str
    keys: str | None = None
    entry: str | None = None
    pipeline: str | None = None


# The first match counts. The folders of Stable Diffusion 3 have several text encoders, as those of SDXL.
_OTHER_MODELS = (
    _OtherModel("a diffusion transformer's", entry="transformer"),
    _OtherModel("a ControlNet", keys=r"control_model\.|controlnet_cond_embedding\."),
    _OtherModel("an unCLIP", keys=r"noise_augmentor\."),
    _OtherModel("an upscaler's", keys=r"low_scale_model\."),
    _OtherModel(
        "an SDXL",
        keys=r"conditioner\.embedders\.|model\.diffusion_model\.label_emb\.|unet/add_embedding\.",
        entry="text_encoder_2",
        pipeline="XL",
    ),
    _OtherModel("a Stable Diffusion 3", keys=r"model\.diffusion_model\.joint_blocks\."),
    _OtherModel("a Flux", keys=r"(model\.diffusion_model\.)?double_blocks\."),
)
_LORA_MARKS = (
    ".lora_down.", ".lora_up.", "lora_unet_", "lora_te", ".lora_A.", ".lora_B.", "_lora.", ".lora.up.", ".lora.down.",
    ".lora_linear_layer.", ".hada_w", ".lokr_w", ".oft_", "oft_unet_", "oft_te_", ".ia3_l", "lycoris_", "unet:",
    "text_encoder:", "bundle_emb.",
)  # fmt: skip
_LORA_FACTOR = re.compile(r"\.(lora_down\.weight|lora_up\.weight|lora_[AB])$")
# Patterns of keys in LoRAs of kinds that cannot be read, and what the files are.
_OTHER_LORAS = (
    (r"\.oft_(?!blocks$)\w+|\.boft_\w+", "an OFT in another form than LyCORIS's `oft_blocks`: not supported"),
    (r"^lora_.*\.[ab][12]\.weight$|glora_[AB]", "a GLoRA, which multiplies the weights too: not supported"),
    (r"\.(lambda_layer|[pq]_layer\.weight)$", "a T-LoRA, whose rank depends on the time step: not supported"),
    (r"\.ia3_l", "an IA3 in PEFT's form, which multiplies biases too: not supported"),
    (r"\.scalar$", "a LyCORIS file with a scalar beside the factors: let LyCORIS save it, which multiplies it in"),
    (r"(lora_B|lora_up|lora\.up)(\.\w+)?\.bias$", "a LoRA with biases: biases are not supported"),
    (r"lora_embedding_[AB]", "a LoRA of an embedding table: only linear layers and convolutions are supported"),
)  # fmt: skip
SDXL_LORA = f"an SDXL LoRA; {SUPPORTED}"
_SDXL_LORA_KEY = re.compile(r"lora_te2_|text_encoder_2\.|text_encoders\.clip_g\.|label_emb[._]|conditioner\.")
# SDXL's transformers have up to ten blocks, those of SD1.x and SD2.x have one.
_SDXL_LAYER = re.compile(r"\d[._]transformer_blocks[._][1-9]")
_CROSS_ATTENTION = re.compile(r"attn2[._]to_[kv]$")
# Keys of textual-inversion files of A1111 ("string_to_..."), InvokeAI, diffusers ("<token>") and SDXL ("clip_g").
_TEXTUAL_INVERSION_KEY = re.compile(r"<|emb_params|string_to_|clip_[lg]$")
# How the keys of one network in a file of its own begin, what it is, and the prefix that its keys lack.
_COMPONENTS = {
    "down_blocks.": ("the UNet of a diffusers folder", "unet/"),
    "encoder.down_blocks.": ("the VAE of a diffusers folder", "vae/"),
    "text_model.": ("the text encoder of a diffusers folder", "text_encoder/"),
    "embeddings.token_embedding.": ("the text encoder of a diffusers folder", "text_encoder/"),
    "encoder.down.": ("the VAE of a single file", COMPONENTS["vae"]),
    "input_blocks.": ("the UNet of a single file", COMPONENTS["unet"]),
}
# First bytes of files that are not checkpoints, and what the files are.
_MAGIC: tuple[tuple[bytes | tuple[bytes, ...], str], ...] = (
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself: run `git lfs pull` or download it again"),
    (b"\x89PNG", "a PNG image, not a checkpoint"),
    (b"\xff\xd8\xff", "a JPEG image, not a checkpoint"),
    (b"GIF8", "a GIF image, not a checkpoint"),
    (b"\x93NUMPY", "a numpy .npy file, not a checkpoint"),
    (b"\x89HDF", "an HDF5 file (Keras?), not a checkpoint"),
    (b"GGUF", "a GGUF file, not a checkpoint"),
    (b"%PDF", "a PDF, not a checkpoint"),
    (b"\x1f\x8b", "a gzip archive: unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it first"),
    (b"Rar!", "a RAR archive: unpack it first"),
    (b"PK", "a zip archive: unpack it first"),
    (
        (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"),
        "a Python pickle, which could run code: convert it to .safetensors",
    ),
)


def recognise(checkpoint: Checkpoint) -> Content:
    """Say what an opened checkpoint holds, by its keys and metadata."""
    keys = list(checkpoint)
    if not keys:
        return Content("other", "a checkpoint without any arrays")
    if all(_TEXTUAL_INVERSION_KEY.match(key) for key in keys):
        return Content("other", TEXTUAL_INVERSION)
    if 2 * sum(any(mark in key for mark in _LORA_MARKS) for key in keys) > len(keys):
        unsupported = unsupported_lora(keys, checkpoint.metadata)
        return Content("LoRA", "a LoRA") if unsupported is None else Content("other", unsupported)
    if any(_LORA_FACTOR.search(key) for key in keys):
        return Content("base model with LoRA", "a base model with a LoRA beside its weights")
    for model in _OTHER_MODELS:
        if model.keys is not None and any(re.match(model.keys, key) for key in keys):
            return Content("other", f"{model.name} checkpoint; {SUPPORTED}")
    if detect_family(keys) is not None:
        return Content("base model", "a base model")
    for start, (name, prefix) in _COMPONENTS.items():
        if any(key.startswith(start) for key in keys):
            return Content("component", f"{name} alone", prefix)
    names = f"{len(keys)} unknown names ({plain(', '.join(keys[:2]))}, ...)"
    return Content("other", f"neither a Stable Diffusion checkpoint nor a LoRA: {names}")


def check_base_model(checkpoint: Checkpoint) -> None:
    """Raise UserError, with the way out, unless `checkpoint` holds the weights of a base model."""
    content = recognise(checkpoint)
    ways_out = {
        "LoRA": ", not a base model: give it as --lora_ckpt_path",
        "base model with LoRA": ": merge it with tools/lora/cvtckpt.py --mode merge, or separate the two with "
        "--mode extract --out_base",
        "component": ", not a whole model: give the folder or the file that holds the whole model",
    }
    if content.kind != "base model":
        raise UserError(f"{checkpoint.path} is {content.name}{ways_out.get(content.kind, '')}")


def describe_non_lora(checkpoint: Checkpoint) -> str:
    """Say what a checkpoint is whose keys are those of no LoRA format, for "<path> is ..."."""
    content = recognise(checkpoint)
    if content.kind in ("base model", "component"):
        return "base weights, not a LoRA: give it as --ckpt_path (generating) or --pretrained_model_path (training)"
    if content.kind == "LoRA":
        key = plain(next(iter(checkpoint)))
        return f"a LoRA with unknown names, such as {key}: is it for another kind of model?"
    return content.name


def unsupported_lora(keys: Iterable[str], metadata: Mapping[str, str]) -> str | None:
    """Say what a LoRA is that cannot be used, by its keys and kohya's metadata. None if neither tells."""
    keys = list(keys)
    is_sdxl = metadata.get("ss_base_model_version", "").startswith("sdxl")
    if is_sdxl or any(_SDXL_LORA_KEY.search(key) for key in keys):
        return SDXL_LORA
    return next((name for pattern, name in _OTHER_LORAS if any(re.search(pattern, key) for key in keys)), None)


def sdxl_lora(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Say that a LoRA is for SDXL if one of its layers tells. The names are otherwise those of the other versions.

    Args:
        shapes: Layer name, in any format -> shape of the factor "down", () where there is none.
    """
    for layer, shape in shapes.items():
        if _SDXL_LAYER.search(layer) or _CROSS_ATTENTION.search(layer) and shape[1:2] == (2048,):
            return SDXL_LORA
    return None


def unsupported_folder(entries: Collection[str], pipeline: str) -> str | None:
    """Say what a diffusers folder is that cannot be used. None if nothing tells.

    Args:
        entries: Names of the files and folders in it.
        pipeline: Name of the pipeline's class in its model_index.json, "" where there is none.
    """
    for model in _OTHER_MODELS:
        if model.entry in entries or (model.pipeline is not None and model.pipeline in pipeline):
            return f"{model.name} folder ({pipeline or f'{model.entry}/'}); {SUPPORTED}"
    return None


def other_task(in_channels: int, out_channels: int) -> str | None:
    """Say what a checkpoint is whose UNet takes more than noisy latents. None for other numbers of channels."""
    if in_channels not in OTHER_TASKS or in_channels == out_channels:
        return None
    return f"{OTHER_TASKS[in_channels]} checkpoint ({in_channels} input channels), which is not supported"


def version_of_width(width: int) -> str:
    """Name the version of Stable Diffusion whose text embeddings have `width` channels."""
    return VERSION_OF_WIDTH.get(width, f"a model with text embeddings of width {width}")


def describe_file(path: Path, head: bytes) -> str:
    """Say what a file is that is not a readable checkpoint, with the way out, by its first 512 bytes."""
    name = _name_file(path, head)
    return name if ":" in name else f"{name}: give a .safetensors or a .ckpt"


def looks_like_text(head: bytes) -> bool:
    """Whether the first bytes of a file could be those of a text."""
    # A .ckpt starts with a line feed (0x0a) too, but lengths and tags, which are control characters, follow soon.
    return not any(byte < 9 or 13 < byte < 32 for byte in head)


def _name_file(path: Path, head: bytes) -> str:
    for magic, name in _MAGIC:
        if head.startswith(magic):
            return name
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<head")):
        return "an HTML page, not a checkpoint: a download that needed a login? Fetch the file itself"
    if text.startswith(b"<?xml"):
        return "an XML document, not a checkpoint"
    if path.suffix == ".safetensors":
        return "not a .safetensors file, or cut off within its header: fetch or write it again"
    if looks_like_text(head):
        return "a text file, not a checkpoint"
    return f"neither a .safetensors file nor a MindSpore or PyTorch checkpoint (it begins with {head[:8].hex(' ')})"
