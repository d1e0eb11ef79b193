"""kernels.cc as operators of MindSpore's graphs: compiled by this machine's C++ compiler, once.

MindSpore has such operators on Linux only, and a machine may have no C++ compiler. `available()` is False then, and
ldm.models.device_forms takes MindSpore's own operators: the same numbers, slower and in more memory.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import subprocess
import sys
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


def available() -> bool:
    return library() is not None


@cache
def library() -> Path | None:
    """kernels.cc compiled for this processor; None, and a warning that says why, where that cannot be had.

    $CXX is the compiler, or else c++. The result stays in $XDG_CACHE_HOME (or ~/.cache), under a name that changes with
    the source, the compiler, MindSpore and the processor.
    """
    if sys.platform != "linux":
        return None
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    try:
        version = subprocess.run([*compiler, "--version"], capture_output=True, check=True).stdout
        made_of = (SOURCE.read_bytes(), compiler, version, COMPILE, LINK, ms.__version__, processor())
        folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
        name = f"kernels-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:32]}.so"
        path = folder.absolute() / "mindspore-stable-diffusion-lora" / name
        if not path.exists():
            _compile(compiler, path)
        return path
    except subprocess.CalledProcessError as error:
        reason = error.stderr.decode(errors="replace").strip() or error
    except OSError as error:
        reason = error
    logger.warning("slower operators that take more memory are used: %s could not be compiled with %s (install g++, or "
                   "name another compiler in CXX): %s", SOURCE, shlex.join(compiler), reason)  # fmt: skip
    return None


def _compile(compiler: list[str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    writing = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        subprocess.run([*compiler, *COMPILE, str(SOURCE), *LINK, "-o", str(writing)], capture_output=True, check=True)
        os.replace(writing, path)
    finally:
        writing.unlink(missing_ok=True)


def processor() -> str:
    """The processor's kind and abilities, for which -march=native compiles."""
    for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
        if line.startswith(("flags", "Features")):
            return f"{platform.machine()} {line}"
    return platform.machine()
