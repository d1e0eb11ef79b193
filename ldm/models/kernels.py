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
LIBRARIES = Path(ms.__file__).parent / "lib"
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp-simd", "-fPIC", "-shared", str(SOURCE),
         f"-L{LIBRARIES}", f"-L{LIBRARIES / 'plugin'}", "-l:libmindspore_core.so", "-l:libmindspore_ops_cpu.so",
         "-l:libdnnl.so.2", f"-Wl,-rpath,{LIBRARIES}:{LIBRARIES / 'plugin'}", "-Wl,--no-undefined",
         "-Wl,--allow-shlib-undefined", "-lm")  # fmt: skip


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
    the source, the compiler and the processor.
    """
    if sys.platform != "linux":
        return None
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    try:
        version = subprocess.run([*compiler, "--version"], capture_output=True, check=True).stdout
        made_of = (SOURCE.read_bytes(), compiler, version, FLAGS, ms.__version__, processor())
        name = hashlib.sha256(repr(made_of).encode()).hexdigest()[:32]
        path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "mindspore-stable-diffusion-lora",
                    f"kernels-{name}.so")  # fmt: skip
        if not path.exists():
            compile_to(path, compiler)
        return path
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", b"").decode(errors="replace").strip() or error
        logger.warning("MindSpore's own operators are used, which are slower and take more memory: the C++ compiler %s "
                       "is missing or fails (install g++, or name another in CXX): %s", shlex.join(compiler), reason)
        return None


def compile_to(path: Path, compiler: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    writing = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        subprocess.run([*compiler, *FLAGS, "-o", str(writing)], capture_output=True, check=True)
        os.replace(writing, path)
    finally:
        writing.unlink(missing_ok=True)


def processor() -> str:
    """The processor's kind and abilities, for which -march=native compiles."""
    for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
        if line.startswith(("flags", "Features")):
            return f"{platform.machine()} {line}"
    return platform.machine()
