"""Keeps the compiled graph of the step on disk, so that a resumed run need not compile it (nano: 6 s instead of 30 s).

MindSpore's compile cache numbers the graphs in the order in which a process compiles them, and does not compare all
that a graph depends on: with one more graph compiled before, it returns the wrong one. So it is enabled only while the
step compiles, in a folder named by a hash of everything that the graph depends on. The folder gets its name after the
first step has run, so a process that is killed while MindSpore writes leaves nothing that is read later. The checksums
of its files are kept in the folder and are compared before MindSpore reads them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import platform
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mindspore as ms

from ldm.errors import UserError, system_reason
from ldm.files.atomic import remove_path
from ldm.files.documents import read_json
from ldm.files.inputs import content_hash
from ldm.ops import kernels_in_use

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).resolve().parents[1]
CHECKSUMS = "checksums.json"


def graph_key(*parts: object) -> str:
    """Return a hash of this project's source, its kernels, the versions of MindSpore and Python, and `parts`."""
    versions = ms.__version__, platform.python_version(), platform.machine(), kernels_in_use()
    digest = hashlib.sha256(repr((versions, parts)).encode())
    for path in sorted(SOURCE.rglob("*.py")):
        digest.update(str(path.relative_to(SOURCE)).encode() + path.read_bytes())
    return digest.hexdigest()[:32]


@contextmanager
def cached_graphs(folder: Path, key: str) -> Iterator[bool]:
    """Read what is compiled within the block from `folder`/`key`, or write it there.

    The block must compile and run the same graphs in the same order every time. Graphs with other keys are removed, and
    so are these if the block fails. If the folder cannot be written, a warning says so and nothing is kept.
    Yields whether the graphs are read.
    """
    final = folder / key
    found = _is_intact(final)
    writing = folder / f"{key}.{os.getpid()}.partial"
    try:
        if not found:
            remove_path(final)
            writing.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logger.warning("compile_cache: %s cannot be made (%s): the graph is not kept", writing, system_reason(error))
        yield False
        return
    ms.set_context(enable_compile_cache=True, compile_cache_path=str(final if found else writing))
    kept = False
    try:
        yield found
        kept = found or _keep(writing, final)
    finally:
        ms.set_context(enable_compile_cache=False)
        for path in folder.iterdir():
            if path != final or not kept:
                with contextlib.suppress(OSError):
                    remove_path(path)


def _keep(writing: Path, final: Path) -> bool:
    try:
        (writing / CHECKSUMS).write_text(json.dumps(_checksums(writing), indent=1), encoding="utf-8")
        os.replace(writing, final)
    except OSError as error:
        logger.warning("compile_cache: %s cannot be written (%s): the graph is not kept", final, system_reason(error))
        return False
    return True


def _is_intact(final: Path) -> bool:
    """Whether the folder holds compiled graphs, and all their files as they were written.

    MindSpore does not check them, and a changed bit would change the loss. A warning names what is damaged.
    """
    if not os.path.lexists(final):
        return False
    try:
        if read_json(final / CHECKSUMS) == _checksums(final):
            return True
        fault = "its files are not those that were written"
    except UserError as error:
        fault = str(error)
    except OSError as error:
        fault = system_reason(error)
    logger.warning("the compiled graph %s is damaged (%s); compiling it again", final, fault)
    return False


def _checksums(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file in a folder by relative path. Raises OSError, also for pipes and links."""
    sums = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place) / name
            kind = path.lstat().st_mode
            if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
                raise OSError(errno.EINVAL, "it is no regular file", str(path))
        for name in files:
            path = Path(place) / name
            if path != folder / CHECKSUMS:
                sums[str(path.relative_to(folder))] = content_hash(path)
    return sums
