"""kernels.cc as operators of MindSpore's graphs: compiled by this machine's C++ compiler, once.

MindSpore has such operators on Linux only, and a machine may have no C++ compiler. `library()` is None then, and
ldm.models.device_forms takes MindSpore's own operators: the same numbers, slower and in more memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Callable

import mindspore as ms
from mindspore import ops

from ldm.files.atomic import atomic_path

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.cc")
LIBRARIES, PLUGINS = Path(ms.__file__).parent / "lib", Path(ms.__file__).parent / "lib" / "plugin"
COMPILE = ("-std=c++17", "-O3", "-march=native", "-fopenmp-simd", "-fPIC", "-shared")
# MindSpore's threads and oneDNN. What their libraries want in turn is there when MindSpore runs.
LINK = (f"-L{LIBRARIES}", f"-L{PLUGINS}", "-l:libmindspore_core.so", "-l:libmindspore_ops_cpu.so", "-l:libdnnl.so.2",
        f"-Wl,-rpath,{LIBRARIES}:{PLUGINS}", "-Wl,--no-undefined", "-Wl,--allow-shlib-undefined", "-lm")  # fmt: skip
SEAL_BYTES = 32
WORKSHOP = ".compiling-"  # begins the names of the folders that are compiled in
STALE_SECONDS = 3600.0
PATIENCE = 0.1  # seconds until an interrupt is noticed


def kernel(name: str, *out_shapes: Callable) -> ops.Custom:
    """The function `name` of kernels.cc: float32 tensors -> a tensor for each of `out_shapes`, which give its shape
    from those of the inputs.
    """
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
    the source, the compiler, MindSpore and the processor; it ends in a checksum, and one that does not match is
    compiled again.
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
    version = _output([*compiler, "--version"])
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
    if not _is_sound(path):
        _compile(compiler, path)
    ctypes.CDLL(str(path))
    return path


def _is_sound(path: Path) -> bool:
    """Whether the library is there and whole. It is asked before the library is loaded: a file that is cut off or full
    of zeros ends the process with SIGBUS, and one with a changed bit computes something else.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return False
    if raw[-SEAL_BYTES:] == _seal(path.name, raw[:-SEAL_BYTES]):
        return True
    logger.warning("the compiled library %s is damaged; compiling it again", path)
    return False


def _seal(name: str, body: bytes) -> bytes:
    """Follows the library in its file, where the loader does not look."""
    return hashlib.sha256(name.encode() + body).digest()


def _compile(compiler: list[str], path: Path) -> None:
    """Compile kernels.cc to `path`. The compiler's temporary files lie in a folder beside it, which is removed."""
    for left in path.parent.glob(f"{WORKSHOP}*"):  # of killed processes; younger ones may be at work
        with contextlib.suppress(OSError):  # its process has just removed it
            if time.time() - left.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=WORKSHOP, dir=path.parent) as workshop:
        made = Path(workshop) / path.name
        _output([*compiler, *COMPILE, str(SOURCE), *LINK, "-o", str(made)], {**os.environ, "TMPDIR": workshop})
        body = made.read_bytes()
    with atomic_path(path) as temporary:
        temporary.write_bytes(body + _seal(path.name, body))


def _output(command: list[str], environment: dict[str, str] | None = None) -> bytes:
    """What a command prints. Its processes are killed where Python is interrupted meanwhile.

    They are a session of their own, so that all can be killed: the compiler starts others. Ctrl-C reaches Python alone.
    """
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=environment, start_new_session=True)  # fmt: skip
    try:
        while True:
            try:
                out, err = process.communicate(timeout=PATIENCE)
                break
            except subprocess.TimeoutExpired:  # Python takes notice of an interrupt between two waits only
                continue
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, out, err)
    return out


def processor() -> str:
    """The processor's kind and abilities, for which -march=native compiles."""
    for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
        if line.startswith(("flags", "Features")):
            return f"{platform.machine()} {line}"
    return platform.machine()
