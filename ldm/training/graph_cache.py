"""The step's compiled graph on disk, so that a resumed run does not compile it again (nano: 6 s instead of 30 s).

MindSpore's compile cache numbers graphs in the order in which a process compiles them and does not look at everything
that a graph depends on: with one more graph compiled before, it serves the wrong one. So it is on only while the step
compiles, in a folder named by a hash of all that the step's graph comes from, and that folder gets its name only after
the first step has run: a process killed while MindSpore writes leaves nothing that would be read.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mindspore as ms

from ldm.models.device_forms import kernels_in_use

SOURCE = Path(__file__).resolve().parents[1]


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
    and these too if the block fails: the next start then compiles anew.
    """
    final = folder / key
    found = final.is_dir()
    writing = folder / f"{key}.{os.getpid()}.partial"
    if not found:
        writing.mkdir(parents=True, exist_ok=True)
    ms.set_context(enable_compile_cache=True, compile_cache_path=str(final if found else writing))
    sound = False
    try:
        yield found
        if not found:
            os.replace(writing, final)
        sound = True
    finally:
        ms.set_context(enable_compile_cache=False)
        for path in folder.iterdir():
            if path != final or not sound:
                shutil.rmtree(path)
