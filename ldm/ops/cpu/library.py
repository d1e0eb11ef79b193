"""Compiles the C++ kernels with the machine's C++ compiler, once, into a cache in the user's home.

MindSpore has operators of this kind on Linux only, and a machine may have no C++ compiler. `kernel_library()` returns
None there, and `ldm.ops` uses MindSpore's own operators, which give the same numbers but are slower and need more
memory.
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

import mindspore as ms

from ldm.files.atomic import atomic_path
from ldm.runtime.processor import cpuinfo, instruction_sets
from ldm.runtime.versions import onednn_library

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent  # kernels.cc and the headers that it includes
LIBRARIES, PLUGINS = Path(ms.__file__).parent / "lib", Path(ms.__file__).parent / "lib" / "plugin"
# For aarch64, clang has no -march=native.
NATIVE = "-mcpu=native" if platform.machine() == "aarch64" else "-march=native"
COMPILE = ("-std=c++17", "-O3", NATIVE, "-fopenmp-simd", "-fPIC", "-shared")
# MindSpore's threads and oneDNN. MindSpore has loaded the libraries that these need.
LINK = (
    f"-L{LIBRARIES}",
    f"-L{PLUGINS}",
    "-l:libmindspore_core.so",
    "-l:libmindspore_ops_cpu.so",
    f"-l:{onednn_library()}",
    f"-Wl,-rpath,{LIBRARIES}:{PLUGINS}",
    "-Wl,--no-undefined",
    "-Wl,--allow-shlib-undefined",
    "-lm",
)
SEAL_BYTES = 32
TEMPORARY_PREFIX = ".compiling-"  # of the folders for the compiler's temporary files
STALE_SECONDS = 3600.0
UNUSED_SECONDS = 90 * 24 * 3600.0  # longer than a process runs: MindSpore looks for the file at every new graph
POLL_SECONDS = 0.1  # how often a waiting process looks for an interrupt


@cache
def kernel_library() -> Path | None:
    """Return the kernels compiled for this processor, or None, with a warning, if that is not possible.

    The compiler is $CXX, or else c++. The result is cached in $XDG_CACHE_HOME (or ~/.cache) under a name that depends
    on the sources, the compiler, MindSpore and the processor. It ends in a checksum. A file whose checksum does not
    match is compiled again. Libraries that no process has begun to use in 90 days are removed when another is compiled.
    """
    if sys.platform != "linux":
        return None
    compiler = os.environ.get("CXX") or "c++"
    try:
        return _compiled(shlex.split(compiler))
    except subprocess.CalledProcessError as error:
        reason = error.stderr.decode(errors="replace").strip() or str(error)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error)
    logger.warning(
        "slower operators that need more memory are used: the kernels in %s could not be compiled with %s "
        "(install g++, or set CXX to another compiler, or XDG_CACHE_HOME to another folder): %s",
        SOURCES,
        compiler,
        reason,
    )
    return None


@cache
def bf16_unit() -> str | None:
    """Return what multiplies bf16 in the kernels: "amx" (Intel's tiles), "avx512_bf16" (vectors), or None.

    Tiles are used if the processor has them, Linux permits it, and a first product by them is exact, unless the
    environment variable LDM_AMX is 0.
    """
    library = kernel_library()
    if library is None:
        return None
    ask = ctypes.CDLL(str(library)).bf16_unit
    ask.restype = ctypes.c_char_p
    return ask().decode() or None


def multiplies_bf16() -> bool:
    """Whether the kernels multiply bf16 by instructions of this processor."""
    return bf16_unit() is not None


def _compiled(compiler: list[str]) -> Path:
    version = _output([*compiler, "--version"])
    sources = [path.read_bytes() for path in sorted(SOURCES.glob("*.h")) + [SOURCES / "kernels.cc"]]
    key = (sources, compiler, version, COMPILE, LINK, ms.__version__, processor())
    name = f"kernels-{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute()
    folder /= "mindspore-stable-diffusion-lora"
    if ":" in str(folder):
        raise OSError(f"{folder}: MindSpore loads no library from a folder with a colon in its name")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o022:
        raise PermissionError(f"other users can write to {folder}, and its libraries would run in this process")
    path = folder / name
    with contextlib.suppress(OSError):  # there is none, or the file system is read-only
        os.utime(path)  # for _remove_what_is_left
    if not _is_sound(path):
        _remove_what_is_left(folder)
        _compile(compiler, path)
    ctypes.CDLL(str(path))
    return path


def _is_sound(path: Path) -> bool:
    """Whether the library exists and its checksum matches.

    This is checked before the library is loaded. A file that is truncated or full of zeros would end the process with
    SIGBUS, and one with a changed bit would compute something else.
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
    """Return the checksum that is appended to the library, where the loader ignores it."""
    return hashlib.sha256(name.encode() + body).digest()


def _compile(compiler: list[str], path: Path) -> None:
    """Compile the kernels to `path`. The compiler's temporary files are in a folder beside it, which is removed."""
    with tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=path.parent) as folder_name:
        compiled = Path(folder_name) / path.name
        command = [*compiler, *COMPILE, str(SOURCES / "kernels.cc"), *LINK, "-o", str(compiled)]
        _output(command, {**os.environ, "TMPDIR": folder_name})
        body = compiled.read_bytes()
    with atomic_path(path) as temporary:
        temporary.write_bytes(body + _seal(path.name, body))


def _remove_what_is_left(cache: Path) -> None:
    """Remove folders of processes that were killed while they compiled, and libraries that are no longer used.

    Other checkouts, versions and machines may share the cache, so a library's age decides, not its name. Its
    modification time is that of its last use.
    """
    kinds = ((f"{TEMPORARY_PREFIX}*", STALE_SECONDS, shutil.rmtree), ("kernels-*.so", UNUSED_SECONDS, Path.unlink))
    for pattern, seconds, remove in kinds:
        for path in cache.glob(pattern):
            with contextlib.suppress(OSError):  # another process has just removed it
                if time.time() - path.stat().st_mtime > seconds:
                    remove(path)


def _output(command: list[str], environment: dict[str, str] | None = None) -> bytes:
    """Return what a command prints. Its processes are killed if Python is interrupted.

    The command runs in a session of its own, so that the processes that a compiler starts can be killed with it. Ctrl-C
    therefore reaches Python alone.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    )
    try:
        while True:
            try:
                out, err = process.communicate(timeout=POLL_SECONDS)
                break
            except subprocess.TimeoutExpired:  # Python handles an interrupt only between two waits
                continue
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, out, err)
    return out


def processor() -> str:
    """Return the processor's architecture and instruction sets, which NATIVE compiles for."""
    return f"{platform.machine()} {instruction_sets(cpuinfo())}"
