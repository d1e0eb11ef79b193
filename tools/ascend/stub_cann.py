"""Make empty CANN libraries, with which MindSpore's Ascend back end loads on a machine without CANN or a device.

    python -m tools.ascend.stub_cann             # prints the environment variables of the dry run

MindSpore's wheel holds its whole Ascend back end, but not CANN's libraries. With `MS_SIMULATION_LEVEL=1` it compiles,
selects kernels, plans memory and "runs" without a device, if it finds every function that it links to or looks up. This
module asks the wheel which functions these are and writes one C file in which each does nothing and returns 0, which
means success. One library is made of it, and every file name that MindSpore opens is a link to it. It contains nothing
of CANN.

It needs gcc, and nm and readelf of binutils. It is made once for each version of MindSpore and of this file, in
$XDG_CACHE_HOME (or ~/.cache), like the C++ kernels of `ldm.ops.cpu`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ldm.errors import UserError  # noqa: E402
from ldm.files.atomic import atomic_folder  # noqa: E402
from ldm.runtime.script import run_script  # noqa: E402

PROGRAMS = ("gcc", "nm", "readelf", "ldd")
# 2.7.0 fails with these libraries, and 2.10.0 does not log what it selects.
VERSIONS = ("2.8.0",)
SOC = "STUB_CANN_SOC"  # the environment variable with the name of the device that the libraries report
DEFAULT_SOC = "Ascend910B3"  # of the Atlas A2 training series

LIB64 = "latest/lib64"  # MindSpore finds CANN's folder by this ending in the path of a loaded library

# Libraries that MindSpore opens while it runs, so that no file of the wheel declares that it needs them.
OPENED = (
    "libacl_op_compiler.so", "libacl_tdt_channel.so", "libacl_tdt_queue.so", "libascendcl.so", "libhccl.so",
    "libmsprofiler.so", "libnnopbase.so", "libopapi.so", "libruntime.so",
)  # fmt: skip
# The loader, and a library of further kernels without which MindSpore uses CANN's.
NO_STUB = re.compile(r"ld-linux|libatb")
# Functions that MindSpore looks up under names that it puts together.
LOOKED_UP = (
    "aclnnInit", "aclnnFinalize", "rtDevBinaryRegister", "rtDevBinaryUnRegister", "rtFunctionRegister",
    "rtGetC2cCtrlAddr", "rtKernelLaunch", "rtLaunch",
)  # fmt: skip
# CANN's C functions: runtime, operators and communication. They stand in MindSpore's libraries as texts.
C_FUNCTION = re.compile(rb"(?<=\0)(?:acl|rt|Hccl|Hcom)[A-Za-z0-9_]{2,59}[A-Za-z0-9](?=\0)")
# Undefined symbols that are of Python, the compiler's runtime or the loader.
NOT_CANN = re.compile(r"_?Py|_ITM_|__gmon_start__|_ZTH|__cxa_|__tls_")
# A C++ function that returns an object of three pointers in memory of the caller, whose address is its first argument
# (x86-64). The rest of that object is not read.
RETURNS_OBJECT = re.compile(r"_ZN2ge15OperatorFactory14CreateOperator")
RETURNS_TRUE = re.compile(r"_ZN2ge15OperatorFactory9IsExistOp")

# The functions that must return more than "success": the device, its memory, and handles that are not null.
ANSWERS = r"""
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

#define GIB ((size_t)1 << 30)

static char objects[1 << 16];
static unsigned int used;
/* Handles differ, because MindSpore keeps streams and events in tables by their address. */
static void *handle(void) { return &objects[(used += 16) % sizeof objects]; }
static int give(void **target) { *target = handle(); return 0; }

const char *aclrtGetSocName(void) { const char *name = getenv("SOC_VARIABLE"); return name ? name : "DEFAULT_SOC"; }
int aclrtGetDeviceCount(uint32_t *count) { *count = 8; return 0; }
int aclrtGetDevice(int32_t *device) { *device = 0; return 0; }
int aclrtGetRunMode(int *mode) { *mode = 1; return 0; } /* the program runs on the host */
int aclrtGetMemInfo(int kind, size_t *unused, size_t *total) { *unused = 60 * GIB; *total = 64 * GIB; return 0; }

/* Device memory takes space in memory only where it is written. */
int aclrtMalloc(void **target, size_t size, int policy) {
    *target = mmap(NULL, size ? size : 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return *target == MAP_FAILED;
}
int aclrtMallocAlign32(void **target, size_t size, int policy) { return aclrtMalloc(target, size, policy); }
int aclrtMallocHost(void **target, size_t size) { *target = calloc(size ? size : 1, 1); return *target == NULL; }
int aclrtFreeHost(void *memory) { free(memory); return 0; }

int aclrtCreateContext(void **context, int32_t device) { return give(context); }
int aclrtGetCurrentContext(void **context) { *context = objects; return 0; }
int aclrtCreateStream(void **stream) { return give(stream); }
int aclrtCreateStreamWithConfig(void **stream, uint32_t priority, uint32_t flag) { return give(stream); }
int aclrtCreateEvent(void **event) { return give(event); }
int aclrtCreateEventWithFlag(void **event, uint32_t flag) { return give(event); }
int aclrtCreateEventExWithFlag(void **event, uint32_t flag) { return give(event); }

void *aclCreateTensor(void) { return handle(); }
void *aclCreateTensorList(void) { return handle(); }
void *aclCreateScalar(void) { return handle(); }
void *aclCreateIntArray(void) { return handle(); }
void *aclCreateFloatArray(void) { return handle(); }
void *aclCreateBoolArray(void) { return handle(); }
"""

# MindSpore asks this package of CANN for the processes and for CANN's version.
HCCL_VERSION = "class sys_version:\n    __sys_version__ = '8.5'\n"
HCCL_FUNCTIONS = (
    "create_group", "destroy_group", "get_rank_size", "get_rank_id", "get_local_rank_size", "get_local_rank_id",
    "get_world_rank_from_group_rank", "get_group_rank_from_world_rank", "set_fusion_strategy_by_idx",
    "set_fusion_strategy_by_size",
)  # fmt: skip


def why_not_here() -> str | None:
    """Return why the dry run is not possible on this machine, or None if it is."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)} of gcc and binutils not found: install them"
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"the empty libraries are for Linux on x86-64, not {sys.platform} on {platform.machine()}"
    try:
        version = importlib.metadata.version("mindspore")
    except importlib.metadata.PackageNotFoundError:
        return "MindSpore is not installed"
    if version not in VERSIONS:
        return f"the dry run works with MindSpore {', '.join(VERSIONS)} only, and {version} is installed"
    if not list((_mindspore() / "lib" / "plugin").glob("libmindspore_ascend.so*")):
        return "this MindSpore was built without Ascend"
    return None


def stub_environment(soc: str = DEFAULT_SOC) -> dict[str, str]:
    """Return the environment variables of a dry run, and make the libraries if they are not there.

    Args:
        soc: The name of the device that the libraries report, such as Ascend910B3 (A2) or Ascend910A.

    Raises:
        UserError: The dry run is not possible on this machine.
    """
    reason = why_not_here()
    if reason is not None:
        raise UserError(f"no dry run on this machine: {reason}")
    folder = make_stub()
    return {
        "LD_LIBRARY_PATH": str(folder / LIB64),
        "PYTHONPATH": os.pathsep.join([str(folder / "python"), str(ROOT)]),
        "MS_SIMULATION_LEVEL": "1",
        SOC: soc,
    }


def make_stub() -> Path:
    """Return the folder with the libraries (LIB64) and Python package (python), and make it if it is not there."""
    version = importlib.metadata.version("mindspore")
    key = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mindspore-stable-diffusion-lora"
    folder = cache / f"empty-cann-{version}-{key}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    with atomic_folder(folder) as building:
        _make_libraries(building)
        _make_hccl(building / "python" / "hccl")
    return folder


def _make_libraries(folder: Path) -> None:
    library_names, functions = _wanted()
    source = ANSWERS.replace("SOC_VARIABLE", SOC).replace("DEFAULT_SOC", DEFAULT_SOC)
    answered = set(re.findall(r"\b(acl\w+)\(", source))
    source += "".join(map(_empty_function, sorted(functions - answered)))
    (folder / "stub.c").write_text(source)
    lib64 = folder / LIB64
    lib64.mkdir(parents=True)
    stub = lib64 / "libempty_cann.so"
    # -fno-builtin: some names are those of C's library, with other types.
    _output("gcc", "-shared", "-fPIC", "-w", "-fno-builtin", "-o", str(stub), str(folder / "stub.c"))
    for name in library_names:
        (lib64 / name).symlink_to(stub.name)


def _empty_function(name: str) -> str:
    """Return the C source of a function that does nothing."""
    if RETURNS_OBJECT.match(name):
        return f"void *{name}(void **object) {{ object[0] = object[1] = object[2] = 0; return object; }}\n"
    return f"long {name}(void) {{ return {int(bool(RETURNS_TRUE.match(name)))}; }}\n"


def _wanted() -> tuple[set[str], set[str]]:
    """Return the file names of the libraries and the names of the functions that MindSpore's Ascend plugin asks for."""
    root = _mindspore()
    libraries = root / "lib"
    wheel = [path for path in (*libraries.rglob("*.so*"), *root.glob("*.so")) if path.is_file()]
    asking = [
        path for path in wheel
        if path.name.startswith(("libmindspore_ascend", "libmindspore_ops_ascend", "libmindspore_ge_backend"))
        or ("ascend" in path.relative_to(root).parts and "cpu_kernels" not in path.name)
    ]  # fmt: skip
    system = [Path(found) for path in asking for found in re.findall(r"=> (/\S+) ", _output("ldd", str(path)))]
    defined = _symbols(wheel, "--defined-only") | _symbols(system, "--defined-only")
    undefined = {name for name in _symbols(asking, "--undefined-only") - defined if not NOT_CANN.match(name)}
    named = {name.decode() for path in asking for name in C_FUNCTION.findall(path.read_bytes())}
    # An operator of CANN is two functions: one says how much memory it needs, the other launches it.
    launched = {name for name in named if name.startswith("aclnn") and not name.endswith("GetWorkspaceSize")}
    functions = undefined | named | set(LOOKED_UP) | {f"{name}GetWorkspaceSize" for name in launched}

    present = {path.name for path in (*wheel, *system)}
    needed = {
        name for path in asking for name in re.findall(r"\(NEEDED\).*\[(.+)\]", _output("readelf", "-d", str(path)))
    }
    return {name for name in needed | set(OPENED) if name not in present and not NO_STUB.match(name)}, functions


def _symbols(libraries: Iterable[Path], kind: str) -> set[str]:
    """Return the dynamic symbols of libraries without their versions."""
    lines = [line for path in set(libraries) for line in _output("nm", "-D", kind, str(path)).splitlines()]
    return {line.split()[-1].partition("@")[0] for line in lines}


def _make_hccl(package: Path) -> None:
    """Write CANN's Python package `hccl`, whose functions return 0."""
    (package / "manage").mkdir(parents=True)
    (package / "__init__.py").write_text(HCCL_VERSION)
    (package / "manage" / "__init__.py").write_text("")
    functions = "".join(f"{name} = _zero\n" for name in HCCL_FUNCTIONS)
    (package / "manage" / "api.py").write_text(f"def _zero(*args, **kwargs):\n    return 0\n\n\n{functions}")


def _mindspore() -> Path:
    # find_spec does not import the package, which takes seconds and reads the environment.
    spec = importlib.util.find_spec("mindspore")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and command[0] == "gcc":
        raise UserError(f"gcc cannot make the empty libraries: {done.stderr.strip()[-400:]}")
    return done.stdout  # nm and ldd end with an error for files without symbols


def main() -> None:
    for name, value in stub_environment().items():
        print(f"export {name}={value}")


if __name__ == "__main__":
    run_script(main)
