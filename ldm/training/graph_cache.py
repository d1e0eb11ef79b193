"""The step's compiled graph on disk, so that a resumed run does not compile it again (nano: 6 s instead of 30 s).

MindSpore's compile cache numbers graphs in the order in which a process compiles them and does not look at everything
that a graph depends on: with one more graph compiled before, it serves the wrong one. So it is on only while the step
compiles, in a folder named by a hash of all that the step's graph comes from, and that folder gets its name only after
the first step has run: a process killed while MindSpore writes leaves nothing that would be read. The checksums of its
files lie in it and are compared before MindSpore reads them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import platform
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mindspore as ms

from ldm.errors import UserError, system_reason
from ldm.files.documents import read_json
from ldm.ops import kernels_in_use
from ldm.weights.checkpoint import content_hash

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).resolve().parents[1]
SEAL = "checksums.json"  # of all files beside it


def graph_key(*parts: object) -> str:
    """A hash of this project's source, the compiled kernels, the versions of MindSpore and Python, and `parts`."""
    versions = ms.__version__, platform.python_version(), platform.machine(), kernels_in_use()
    digest = hashlib.sha256(repr((versions, parts)).encode())
    for path in sorted(SOURCE.rglob("*.py")):
        digest.update(str(path.relative_to(SOURCE)).encode() + path.read_bytes())
    return digest.hexdigest()[:32]


@contextmanager
def cached_graphs(folder: Path, key: str) -> Iterator[bool]:
    """Within the block, take what is compiled from `folder`/`key`, or put it there; yields whether it was there.

    The block must compile and run the same graphs in the same order every time. Graphs under other keys are removed,
    and these too if the block fails: the next start then compiles anew. Where the folder cannot be written, a warning
    says so and the block compiles without.
    """
    final = folder / key
    found = _is_sound(final)
    writing = folder / f"{key}.{os.getpid()}.partial"
    try:
        if not found:
            _remove(final)
            writing.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logger.warning("compile_cache: %s cannot be made (%s): the graph is not kept", writing, system_reason(error))
        yield False
        return
    ms.set_context(enable_compile_cache=True, compile_cache_path=str(final if found else writing))
    sound = False
    try:
        yield found
        sound = found or _keep(writing, final)
    finally:
        ms.set_context(enable_compile_cache=False)
        for path in folder.iterdir():
            if path != final or not sound:
                _remove(path)


def _remove(path: Path) -> None:
    """Remove a folder, or a file in its place, as far as the system lets."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _keep(writing: Path, final: Path) -> bool:
    try:
        (writing / SEAL).write_text(json.dumps(_checksums(writing), indent=1), encoding="utf-8")
        os.replace(writing, final)
    except OSError as error:
        logger.warning("compile_cache: %s cannot be written (%s): the graph is not kept", final, system_reason(error))
        return False
    return True


def _is_sound(final: Path) -> bool:
    """Whether the folder holds compiled graphs, and all their files as they were written.

    MindSpore does not check them, and a changed bit would change the loss. A warning names what is damaged.
    """
    if not os.path.lexists(final):
        return False
    try:
        if read_json(final / SEAL) == _checksums(final):
            return True
        fault = "its files are not those that were written"
    except UserError as error:
        fault = str(error)
    except OSError as error:
        fault = system_reason(error)
    logger.warning("the compiled graph %s is damaged (%s); compiling it again", final, fault)
    return False


def _checksums(folder: Path) -> dict[str, str]:
    """The sha256 of every file below a folder, by its path there. Raises OSError, also for what is no file."""
    sums = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place) / name
            kind = path.lstat().st_mode
            if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
                raise OSError(errno.EINVAL, "it is no regular file", str(path))
        for name in files:
            path = Path(place) / name
            if path != folder / SEAL:
                sums[str(path.relative_to(folder))] = content_hash(path)
    return sums
