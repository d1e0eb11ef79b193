"""kernels.cc as operators of MindSpore's graphs: compiled by this machine's C++ compiler, once.

MindSpore has such operators on Linux only, and a machine may have no C++ compiler. `library()` is None then, and
ldm.models.device_forms takes MindSpore's own operators: the same numbers, slower and in more memory.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Callable

import mindspore as ms
from mindspore import ops

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.cc")
LIBRARIES, PLUGINS = Path(ms.__file__).parent / "lib", Path(ms.__file__).parent / "lib" / "plugin"
COMPILE = ("-std=c++17", "-O3", "-march=native", "-fopenmp-simd", "-fPIC", "-shared")
# MindSpore's threads and oneDNN. What their libraries want in turn is there when MindSpore runs.
LINK = (f"-L{LIBRARIES}", f"-L{PLUGINS}", "-l:libmindspore_core.so", "-l:libmindspore_ops_cpu.so", "-l:libdnnl.so.2",
        f"-Wl,-rpath,{LIBRARIES}:{PLUGINS}", "-Wl,--no-undefined", "-Wl,--allow-shlib-undefined", "-lm")  # fmt: skip


def kernel(name: str, *out_shapes: Callable) -> ops.Custom:
    """The function `name` of kernels.cc: float32 tensors -> a tensor for each of `out_shapes`, which give its shape
    from those of the inputs."""
    if len(out_shapes) == 1:
        return ops.Custom(f"{library()}:{name}", out_shapes[0], lambda *dtypes: dtypes[0], "aot")
    return ops.Custom(f"{library()}:{name}", lambda *shapes: tuple(of(*shapes) for of in out_shapes),
                      lambda *dtypes: dtypes[:1] * len(out_shapes), "aot")  # fmt: skip


@cache
def like(i: int) -> Callable:
    """The shape of input `i`."""
    return lambda *shapes: shapes[i]


@cache
def library() -> Path | None:
    """kernels.cc compiled for this processor; None, and a warning that says why, where that cannot be had.

    $CXX is the compiler, or else c++. The result stays in $XDG_CACHE_HOME (or ~/.cache), under a name that changes with
    the source, the compiler, MindSpore and the processor.
    """
    if sys.platform != "linux":
        return None
    compiler = os.environ.get("CXX") or "c++"
    try:
        return _compiled(shlex.split(compiler))
    except subprocess.CalledProcessError as error:
        reason = error.stderr.decode(errors="replace").strip() or error
    except (OSError, RuntimeError, ValueError) as error:
        reason = error
    logger.warning("slower operators that take more memory are used: %s could not be compiled with %s (install g++, or "
                   "name another compiler in CXX, or another folder in XDG_CACHE_HOME): %s", SOURCE, compiler,
                   reason)  # fmt: skip
    return None


def _compiled(compiler: list[str]) -> Path:
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True).stdout
    made_of = (SOURCE.read_bytes(), compiler, version, COMPILE, LINK, ms.__version__, processor())
    name = f"kernels-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:32]}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute()
    folder /= "mindspore-stable-diffusion-lora"
    if ":" in str(folder):
        raise OSError(f"{folder}: MindSpore takes no library from a folder with a colon in its name")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o022:
        raise PermissionError(f"others can write to {folder}, and what is in it would run here")
    path = folder / name
    if not _loads(path):  # it is not there, or only a part of it, after a power cut
        _compile(compiler, path)
        ctypes.CDLL(str(path))
    return path


def _loads(path: Path) -> bool:
    try:
        ctypes.CDLL(str(path))
        return True
    except OSError:
        return False


def _compile(compiler: list[str], path: Path) -> None:
    handle, writing = tempfile.mkstemp(".partial", path.name, path.parent)
    os.close(handle)
    try:
        subprocess.run([*compiler, *COMPILE, str(SOURCE), *LINK, "-o", writing], capture_output=True, check=True)
        os.replace(writing, path)
    finally:
        Path(writing).unlink(missing_ok=True)


def processor() -> str:
    """The processor's kind and abilities, for which -march=native compiles."""
    for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
        if line.startswith(("flags", "Features")):
            return f"{platform.machine()} {line}"
    return platform.machine()
