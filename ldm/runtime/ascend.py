"""What differs between the generations of Ascend devices, and how CANN and MindSpore are asked about them.

The first Ascend 910 and the Atlas A2 and A3 series differ in what decides how a network must be run:

| | first 910 | A2, A3 |
| --- | --- | --- |
| a number above fp16's largest | becomes the largest | becomes infinity (INFNAN mode) |
| fp32 matrix products and convolutions | do not exist | exist |
| flash attention | does not exist | exists |

"Ascend910B" alone is a first 910; the A2 series is "Ascend910B1" to "Ascend910B4". MindSpore's own table of names
(`SetContextSocVersion` in its Ascend plugin) says the same.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import mindspore as ms

from ldm.errors import UserError, plain
from ldm.files.documents import read_json

logger = logging.getLogger(__name__)

FIRST_910 = frozenset(("Ascend910", "Ascend910A", "Ascend910B", "Ascend910PremiumA", "Ascend910ProA", "Ascend910ProB"))

# MindSpore's names, see mindspore.device_context.ascend.op_precision. On the first 910, must_keep_origin_dtype would
# leave the fp32 convolutions of the VAE without a kernel, and MindSpore's own default there is force_fp16, which
# computes norms and softmax in fp16 too.
PRECISION_MODE_FIRST_910 = "allow_fp32_to_fp16"
PRECISION_MODE_A2 = "must_keep_origin_dtype"

# MindSpore's default is 5 threads, and not more than there are cores. With 2 or fewer (measured in a dry run of 2.8.0)
# a graph with an `if` fails: "Can not build a sub graph which contains ConditionSwitch". 6 threads avoid that, however
# many cores there are.
DISPATCH_THREADS = 6

DRIVER_VERSION = Path("/usr/local/Ascend/driver/version.info")
# MindSpore 2.8.0's own default on both generations (compiled in a dry run), set explicitly for the other versions.
DEFAULT_JIT_LEVEL = "O0"


def device_name() -> str:
    """Return the device's name as CANN reports it, such as "Ascend910B3", or "" where CANN is not there.

    `mindspore.hal.get_device_name` calls the same function. In MindSpore's dry run, it returns the name of no device,
    while CANN's own function still answers.
    """
    try:
        function = ctypes.CDLL("libascendcl.so").aclrtGetSocName
    except (OSError, AttributeError):
        return ""
    function.restype = ctypes.c_char_p
    return (function() or b"").decode("ascii", "replace")


def is_first_910(name: str) -> bool:
    """Whether a device is one of the first generation of Ascend 910."""
    return name in FIRST_910


def is_a2_or_later(name: str) -> bool:
    """Whether a device is of the Atlas A2 or A3 series ("Ascend910B1", "Ascend910_9391")."""
    return name.startswith("Ascend910") and name not in FIRST_910


def overflow_mode(name: str) -> str:
    """Return what a number above fp16's largest becomes: "INFNAN" (infinity) or "saturation" (the largest)."""
    saturates = is_first_910(name) or os.environ.get("MS_ASCEND_CHECK_OVERFLOW_MODE") == "SATURATION_MODE"
    return "saturation" if saturates else "INFNAN"


def set_precision_mode(name: str) -> str:
    """Set how Ascend's compiler treats fp32 operators, before the first graph is compiled, and return the mode.

    Returns "" for an unknown device, where MindSpore's default remains, and where the program has set a mode before.
    """
    mode = PRECISION_MODE_FIRST_910 if is_first_910(name) else PRECISION_MODE_A2 if is_a2_or_later(name) else ""
    if mode:
        try:
            ms.device_context.ascend.op_precision.precision_mode(mode)
        except RuntimeError:  # "can not be set repeatedly": to another mode
            return ""
    return mode


def rank_table() -> str:
    """Return the RANK_TABLE_FILE that starts this process, or "" where there is none or msrun started the process."""
    return "" if "MS_ROLE" in os.environ else os.environ.get("RANK_TABLE_FILE", "")


def jit_level_in_force(given: str | None) -> str:
    """Return the jit_level that graphs are compiled with: `given`, or DEFAULT_JIT_LEVEL for None.

    Where a rank table starts the process, MindSpore 2.8.0 takes O2 whatever is set ("Set jit level to O2 for rank table
    startup method").
    """
    return "O2" if rank_table() else given or DEFAULT_JIT_LEVEL


def warning_of_jit_level(level: str) -> str:
    """Return what is to be said about O2 and the way out, or "" for the other levels."""
    if level != "O2":
        return ""
    cause, way_out = "", "use --jit_level O0"
    if rank_table():
        cause = " (MindSpore takes it whatever is set, because RANK_TABLE_FILE is set)"
        way_out = f"unset RANK_TABLE_FILE, and start several processes with {msrun_command()}"
    return (
        f"jit_level O2{cause} gives each whole graph to CANN's graph engine. This was never compiled, and it may not "
        f"compile, because MindSpore 2.8.0 has no adapter to that engine for several operators used here: {way_out}"
    )


def msrun_command() -> str:
    """Return the command that starts the running script with msrun, on the 8 devices of a host."""
    script = sys.argv[0] if sys.argv[0] not in ("", "-c") else "train_text_to_image.py"  # in a console of Python
    return f"msrun --worker_num=8 --local_worker_num=8 --join=True {shlex.quote(plain(script))} --use_parallel True ..."


def give_enough_threads() -> None:
    """Give MindSpore's runtime DISPATCH_THREADS threads where this process has fewer cores."""
    if len(os.sched_getaffinity(0)) >= DISPATCH_THREADS:
        return
    try:
        ms.runtime.dispatch_threads_num(DISPATCH_THREADS)
    except RuntimeError:  # it was set before, which MindSpore allows once
        logger.debug("dispatch_threads_num was set before")


def device_id() -> int | None:
    """Return the number of the device that this process takes, or None where MindSpore chooses it.

    msrun gives each process its device. Otherwise it is DEVICE_ID, or what RANK_TABLE_FILE says of the process RANK_ID.
    MindSpore itself takes device 0 in every process that msrun did not start.

    Raises:
        UserError: A variable is no number, or the table does not name the process or contradicts DEVICE_ID.
    """
    if "MS_ROLE" in os.environ:
        return None
    given, process, table = _number("DEVICE_ID"), _number("RANK_ID"), rank_table()
    if not table or (process is None and given is not None):
        return given
    if process is None:
        raise UserError(
            "RANK_TABLE_FILE is set without RANK_ID and DEVICE_ID, so every process would take the same device: "
            f"set both for each process, or start with {msrun_command()} (it needs no table)"
        )
    in_table = _device_of(process, table)
    if given not in (None, in_table):
        raise UserError(
            f"DEVICE_ID is {given}, but {plain(table)} gives process {process} (RANK_ID) device {in_table}: "
            f"leave DEVICE_ID out, or start with {msrun_command()} (it needs no table)"
        )
    return in_table


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if not text:
        return None
    if not (text.isascii() and text.isdigit()):
        raise UserError(f'{name} is "{plain(text)}", not the number of a device or process: set it to 0, 1, ...')
    return int(text)


def _device_of(process: int, table: str) -> int:
    """Return the device that a rank table gives a process (`server_list[].device[]`, with rank_id and device_id)."""
    try:
        devices = [device for server in read_json(table)["server_list"] for device in server["device"]]
        found = {int(device["rank_id"]): int(device["device_id"]) for device in devices}
        return found[process]
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{plain(table)} (RANK_TABLE_FILE) does not name the device of process {process} (RANK_ID): "
            f"correct it, or start with {msrun_command()} (it needs no table)"
        ) from None


def cann_version() -> str:
    """Return the version of CANN, such as "8.5", or "" if it is unknown: MindSpore reads the same file."""
    home = os.environ.get("ASCEND_HOME_PATH")
    return ".".join(_version_in(Path(home) / "compiler" / "version.info").split(".")[:2]) if home else ""


def driver_version() -> str:
    """Return the version of the NPU's driver, or "" if it is unknown."""
    return _version_in(DRIVER_VERSION)


def _version_in(path: Path) -> str:
    """Return what follows "Version=" in a file of CANN, or ""."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition("=")[2].strip() for line in lines if line.startswith("Version=")), "")


def accepted_cann_versions() -> tuple[str, ...]:
    """Return the versions of CANN that this MindSpore accepts, as it lists them itself, or () if it has no list."""
    try:
        from mindspore.run_check._check_version import AscendEnvChecker

        return tuple(AscendEnvChecker(None).version)
    except (ImportError, AttributeError):  # neither is part of MindSpore's public interface
        return ()


def cann_fault(version: str, accepted: Sequence[str]) -> str:
    """Return what is wrong with this version of CANN and the way out, or "" if MindSpore accepts it or it is unknown.

    MindSpore warns of the same, but at a log level that this project hides (see ldm/__init__.py).
    """
    if not version or not accepted or version in accepted:
        return ""
    return (
        f"CANN {version} does not fit MindSpore {ms.__version__}, which accepts CANN {', '.join(accepted)}: install a "
        "pair that fits (https://www.mindspore.cn/install). Otherwise errors and wrong values may follow"
    )
