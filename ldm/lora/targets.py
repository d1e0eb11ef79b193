"""What the tools write of LoRAs and base models, claimed before the work with everything that lies beside it."""

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
    """Hold what ldm.lora.formats.write_lora writes to `path`, a new file or folder, within the block.

    name: of the flag, for errors. Raises UserError for a name that is not the format's, and as claim_new.
    """
    check_lora_name(path, format)
    beside = [text_encoder_path(path)] if format == "cloneofsimo-pt" else []
    return _claim([path, *beside], name)


def claim_base(path: Path, source: Path, name: str) -> AbstractContextManager[None]:
    """Hold what ldm.lora.checkpoints.write_base writes to `path` in the form of the base `source`: a file or a folder, and
    the model YAML where one lies beside `source`. Raises UserError as claim_new, and for another suffix.
    """
    folder = is_folder(source)
    if not folder:
        check_checkpoint_name(path, name)
    settings = [claim_file(yaml_beside(path, folder), name)] if is_file(yaml_beside(source, folder)) else []
    return claim_all(_claim([path], name, folder), *settings)


def claim_checkpoint(path: Path, name: str) -> AbstractContextManager[None]:
    """Hold the single file that ldm.weights.checkpoint.write_checkpoint writes. Raises UserError as claim_base."""
    check_checkpoint_name(path, name)
    return _claim([path], name)


def check_checkpoint_name(path: Path, name: str) -> None:
    """Raise UserError for a suffix that no checkpoint is written with."""
    if path.suffix not in WRITERS:
        raise UserError(f"{name} {plain(path)}: a base model is written as {' or '.join(WRITERS)}: name it so")


@contextmanager
def _claim(paths: list[Path], name: str, folder: bool = False) -> Iterator[None]:
    with claim_all(*(claim_new(path, name, folder) for path in paths)):
        describe_progress(lambda: f"before {paths[0]} was whole: it is not kept")
        yield
        describe_progress(None)
