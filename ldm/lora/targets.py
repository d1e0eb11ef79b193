"""Claims for the LoRAs and base models that tools write, made before the work, with the files beside them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from ldm.errors import UserError, plain
from ldm.files.inputs import is_file, is_folder
from ldm.files.outputs import claim_all, claim_file, claim_new
from ldm.lora.formats import check_lora_name
from ldm.lora.formats.cloneofsimo import text_encoder_path
from ldm.runtime.script import describe_progress
from ldm.weights.architecture import yaml_beside
from ldm.weights.checkpoint import WRITERS


def claim_lora(path: Path, format: str, name: str) -> AbstractContextManager[None]:
    """Holds the new file or folder that ldm.lora.formats.write_lora writes, within the block.

    Args:
        path: The file or folder.
        format: The format of the LoRA.
        name: Name of the flag, for errors.

    Raises:
        UserError: The name is not one of the format, or the path cannot be claimed (see claim_new).
    """
    check_lora_name(path, format)
    beside = [text_encoder_path(path)] if format == "cloneofsimo-pt" else []
    return _claim([path, *beside], name)


def claim_base(path: Path, source: Path, name: str) -> AbstractContextManager[None]:
    """Holds the new base model that ldm.lora.checkpoints.write_base writes, within the block.

    It has the form of `source`, a file or a folder. A model YAML beside `source` is written too.

    Args:
        path: The file or folder to write.
        source: The base model whose form it has.
        name: Name of the flag, for errors.

    Raises:
        UserError: A file's suffix is not one of a checkpoint, or the path cannot be claimed (see claim_new).
    """
    folder = is_folder(source)
    if not folder:
        check_checkpoint_name(path, name)
    settings = [claim_file(yaml_beside(path, folder), name)] if is_file(yaml_beside(source, folder)) else []
    return claim_all(_claim([path], name, folder), *settings)


def claim_checkpoint(path: Path, name: str) -> AbstractContextManager[None]:
    """Holds the file that ldm.weights.checkpoint.write_checkpoint writes. Raises UserError as claim_base."""
    check_checkpoint_name(path, name)
    return _claim([path], name)


def check_checkpoint_name(path: Path, name: str) -> None:
    """Raises UserError for a suffix that checkpoints are not written with."""
    if path.suffix not in WRITERS:
        raise UserError(f"{name} {plain(path)}: give the base model a name that ends in {' or '.join(WRITERS)}")


@contextmanager
def _claim(paths: list[Path], name: str, folder: bool = False) -> Iterator[None]:
    with claim_all(*(claim_new(path, name, folder) for path in paths)):
        describe_progress(lambda: f"before {paths[0]} was whole: it is not kept")
        yield
        describe_progress(None)
