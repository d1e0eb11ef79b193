"""Files of learned tokens: four forms are read and written, and what a file holds tells its form.

| form | arrays | the token |
| --- | --- | --- |
| diffusers | `<token>` (count, width) or (width,), one or several; .safetensors, .bin | the key |
| a1111 | .pt with string_to_param {"*": (count, width)} and string_to_token {"*": 265} | the file's name |
| kohya | .safetensors with `emb_params` (count, width), which A1111's web UI reads too | the file's name |
| cloneofsimo | `<token>` (width,), beside the factors of a LoRA or alone | the key |

`clip_l` of the files for several text encoders is read as well. Nothing here imports MindSpore.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ldm.errors import UserError, plain
from ldm.textual_inversion.embedding import MAX_VECTORS, Embedding, check_token
from ldm.weights.checkpoint import Checkpoint, open_checkpoint, write_checkpoint
from ldm.weights.file_formats.torch_writer import write_torch
from ldm.weights.recognise import TEXTUAL_INVERSION, recognise

MAX_TOKENS = 100  # of one file
MAX_WIDTH = 1 << 16
STAR = 265  # the id of "*" in CLIP's vocabulary, under which the first textual inversions were trained
KOHYA, STRING_TO_PARAM, CLIP_L, CLIP_G = "emb_params", "string_to_param.", "clip_l", "clip_g"

# Form -> suffixes of its files.
FORMATS: Mapping[str, tuple[str, ...]] = {
    "diffusers": (".safetensors", ".ckpt", ".bin"),
    "a1111": (".pt",),
    "kohya": (".safetensors",),
    "cloneofsimo": (".safetensors",),
}


def read_embeddings(path: str | os.PathLike, token: str | None = None) -> list[Embedding]:
    """Read the learned tokens of a file, in the order of the file.

    Args:
        path: A file of any form above.
        token: What prompts call the file's only token. None: the token in the file, or the file's name without its
            suffix where the form has no token.

    Raises:
        UserError: The file cannot be read, or is something else; vectors are too many, of no numbers that are finite,
            or of several widths; a token cannot be one; or `token` is given for several.
    """
    path = Path(path)
    checkpoint = open_checkpoint(path)
    found = _read(checkpoint, path)
    if token is not None:
        if len(found) > 1:
            raise UserError(
                f"{path} holds {len(found)} tokens ({_names(found)}): one name cannot be given to all, leave out "
                f":{plain(token, 60)}"
            )
        found = [Embedding(token, embedding.vectors) for embedding in found]
    for embedding in found:
        check_token(embedding.token, str(path))
    if len({embedding.vectors.shape[1] for embedding in found}) > 1:
        raise UserError(f"{path}: its tokens ({_names(found)}) have different widths: they are of several models")
    return found


def learned_tokens(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Return cloneofsimo's tokens in an opened file, token -> (width,) fp32, sorted by token. There may be none.

    Raises:
        UserError: One is no vector of finite numbers.
    """
    tokens = {}
    for token in sorted(filter(is_cloneofsimo_token, checkpoint)):
        if len(checkpoint.shape(token)) != 1:
            raise UserError(
                f"{checkpoint.path}: the learned token {plain(token)} is no vector of finite numbers: it is damaged"
            )
        tokens[token] = read_vectors(checkpoint, token, token)[0]
    return tokens


def is_cloneofsimo_token(key: str) -> bool:
    """Whether a key beside the factors of a LoRA is a learned token."""
    return key.startswith("<") and key.endswith(">")


def write_embeddings(
    path: str | os.PathLike,
    embeddings: Sequence[Embedding],
    format: str = "diffusers",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write learned tokens in one of FORMATS. An existing file is replaced.

    Args:
        path: The file. Its suffix must be one of the form's.
        embeddings: The tokens. Only diffusers' and cloneofsimo's forms hold several.
        format: A key of FORMATS.
        metadata: Texts for a .safetensors or a .ckpt.

    Raises:
        UserError: The suffix is another one, the form does not hold these tokens, or the disk refuses.
    """
    path = Path(path)
    if path.suffix not in FORMATS[format]:
        raise UserError(f"{path}: {format} is written as {' or '.join(FORMATS[format])}: name it so")
    if len(embeddings) != 1 and format in ("a1111", "kohya"):
        raise UserError(
            f"{path}: a file of {format} holds one token, not {len(embeddings)} ({_names(embeddings)}): write them one "
            "by one, or in diffusers' form"
        )
    arrays = {embedding.token: np.asarray(embedding.vectors, np.float32) for embedding in embeddings}
    if format == "a1111":
        ((token, vectors),) = arrays.items()
        write_torch(path, a1111_content(vectors, token))
        return
    if format == "kohya":
        arrays = {KOHYA: next(iter(arrays.values()))}
    elif format == "cloneofsimo":
        arrays = {token: _only_vector(path, token, vectors) for token, vectors in arrays.items()}
    if path.suffix == ".bin":
        write_torch(path, arrays)
    else:
        write_checkpoint(path, arrays, metadata)


def a1111_content(vectors: np.ndarray, name: str = "") -> dict:
    """Return the content of a .pt for A1111's web UI: one token of vectors (count, width) fp32."""
    return {"string_to_token": {"*": np.array(STAR, np.int64)}, "string_to_param": {"*": vectors}, "name": name}


def _read(checkpoint: Checkpoint, path: Path) -> list[Embedding]:
    keys = list(checkpoint)
    params = [key for key in keys if key.startswith(STRING_TO_PARAM)]
    if params:
        if len(params) > 1:
            raise UserError(
                f"{path} is an embedding of {len(params)} parameters: only one is read. Save them one by one"
            )
        return [Embedding(path.stem, read_vectors(checkpoint, params[0], path.stem))]
    if KOHYA in keys:
        return [Embedding(path.stem, read_vectors(checkpoint, KOHYA, path.stem))]
    if CLIP_G in keys:
        raise UserError(f"{path} is {TEXTUAL_INVERSION}, for SDXL: only those for SD1.x and SD2.x are supported")
    if keys == [CLIP_L]:
        return [Embedding(path.stem, read_vectors(checkpoint, CLIP_L, path.stem))]
    content = recognise(checkpoint)
    if content.kind == "LoRA":
        tokens = learned_tokens(checkpoint)
        if not tokens:
            raise UserError(f"{path} is a LoRA without learned tokens of its own: give it as --lora_ckpt_path")
        return [Embedding(token, vector[None]) for token, vector in tokens.items()]
    are_vectors = all(len(checkpoint.shape(key)) in (1, 2) for key in keys)
    if content.kind != "other" or not keys or len(keys) > MAX_TOKENS or not are_vectors:
        what = content.name if content.kind != "other" or not keys else f"a file of {len(keys)} arrays"
        raise UserError(
            f"{path} is {what}, no learned token (textual inversion): give a file of diffusers, A1111 or kohya"
        )
    return [Embedding(key, read_vectors(checkpoint, key, key)) for key in keys]


def read_vectors(checkpoint: Checkpoint, key: str, token: str) -> np.ndarray:
    """Read the vectors (count, width) fp32 of a token, which are an array (count, width) or (width,).

    Args:
        checkpoint: The opened file.
        key: The name of the array.
        token: Names the token in errors.

    Raises:
        UserError: They are no finite numbers, or more than a prompt holds.
    """
    where = f"{checkpoint.path}: the learned token {plain(token, 60)}"
    dtype, shape = checkpoint.spec(key)
    if len(shape) not in (1, 2) or not all(shape) or dtype.kind != "f":
        raise UserError(
            f"{where} is no vector of finite numbers, but of type {dtype} and shape {plain(shape)}: it is damaged"
        )
    count, width = (1, *shape)[-2:]
    if count > MAX_VECTORS or width > MAX_WIDTH:
        raise UserError(
            f"{where} has {count:,} vectors of {width:,} numbers, a prompt holds {MAX_VECTORS}: it is damaged, or "
            "something else"
        )
    with np.errstate(over="ignore"):  # checked below
        vectors = np.array(checkpoint[key], np.float32).reshape(count, width)
    if not np.isfinite(vectors).all():
        raise UserError(f"{where} is no vector of finite numbers: it is damaged, or its training went wrong")
    return vectors


def _only_vector(path: Path, token: str, vectors: np.ndarray) -> np.ndarray:
    if len(vectors) != 1 or not is_cloneofsimo_token(token):
        raise UserError(
            f"{path}: cloneofsimo's tokens have one vector and a name such as <s1>, {plain(token, 60)} has "
            f"{len(vectors)}: write another form"
        )
    return vectors[0]


def _names(embeddings: Sequence[Embedding]) -> str:
    named = [plain(embedding.token, 40) for embedding in embeddings[:3]]
    return ", ".join(named + ["..."] * (len(embeddings) > 3))
