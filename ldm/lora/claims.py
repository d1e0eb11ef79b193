"""Claims for the LoRAs and base models that tools write, made before the work begins (see ldm.files.outputs).

`name` is the name of the flag, for errors, in all functions.
"""

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
    """Hold the new file or folder that write_lora writes, and cloneofsimo's second file, within the block.

    Raises:
        UserError: The format is not written under such a name, or the path cannot be claimed (see claim_new).
    """
    check_lora_name(path, format)
    beside = [text_encoder_path(path)] if format == "cloneofsimo-pt" else []
    return _claim([path, *beside], name)


def claim_base(path: Path, source: Path, name: str) -> AbstractContextManager[None]:
    """Hold what write_base_model writes, within the block: a new base model in the form of `source`.

    Raises:
        UserError: A file's suffix is not one of a checkpoint, or a path cannot be claimed (see claim_new).
    """
    folder = is_folder(source)
    if not folder:
        _check_checkpoint_name(path, name)
    model_yaml = [claim_file(yaml_beside(path, folder), name)] if is_file(yaml_beside(source, folder)) else []
    return claim_all(_claim([path], name, folder), *model_yaml)


def claim_checkpoint(path: Path, name: str) -> AbstractContextManager[None]:
    """Hold the file that write_checkpoint writes, within the block. Raises UserError as claim_base."""
    _check_checkpoint_name(path, name)
    return _claim([path], name)


def _check_checkpoint_name(path: Path, name: str) -> None:
    if path.suffix not in WRITERS:
        raise UserError(f"{name} {plain(path)}: give the base model a name that ends in {' or '.join(WRITERS)}")


@contextmanager
def _claim(paths: list[Path], name: str, folder: bool = False) -> Iterator[None]:
    with claim_all(*(claim_new(path, name, folder) for path in paths)):
        describe_progress(lambda: f"before {paths[0]} was whole: it is not kept")
        yield
        describe_progress(None)
