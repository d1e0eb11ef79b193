"""Files before it is known what they are: mapped into memory, and named where they are no checkpoint."""

from __future__ import annotations

import mmap
from pathlib import Path

# What a file begins with, and what to call it. Order matters: the first that fits names the file.
_FOREIGN = (
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
)


def describe(path: Path, data: mmap.mmap) -> str:
    """What a file that is no checkpoint of ours is, by its first bytes, and the way out."""
    found = _kind(path, data[:512])
    return found if ":" in found else f"{found}: give a .safetensors or a .ckpt"


def _kind(path: Path, head: bytes) -> str:
    for magic, name in _FOREIGN:
        if head.startswith(magic):
            return name
    if head.startswith(b"PK"):
        return "a zip archive: unpack it first"
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        return "a Python pickle, which could run code: convert it to .safetensors"
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


def looks_like_text(head: bytes) -> bool:
    # A .ckpt also starts with a line feed (0x0a), but soon has control characters: lengths and tags.
    return not any(byte < 9 or 13 < byte < 32 for byte in head)
