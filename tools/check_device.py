"""Check that a device computes what the CPU computes, the first thing to run on a new machine.

    python tools/check_device.py                                    # the Ascend of this machine, DEVICE_ID chooses it
    python tools/check_device.py --device_target CPU                # the CPU against itself
    python tools/check_device.py --graphs attention unet            # a part of it

It takes a few minutes and needs no checkpoint. It prints versions, memory and how the device is set up, then runs one
small call of each graph on the device and on the CPU, each in a process of its own: text encoder, VAE, UNet with plain
and with flash attention, a LoRA training step, attention at the sizes of Stable Diffusion's heads, and an overflow. The
networks have fixed random weights. What it prints is Markdown to paste into a report. Exit code 0 if everything is
right, 1 if not.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's folder, where this is run as a script

from ldm.runtime.script import run_script, start_script  # noqa: E402

if __name__ == "__main__":
    start_script()

from ldm.errors import UserError, plain  # noqa: E402
from ldm.runtime import subprocesses  # noqa: E402
from ldm.settings.declare import setting  # noqa: E402
from ldm.settings.device import jit_level_setting  # noqa: E402
from ldm.settings.read import read_settings  # noqa: E402
from tools.device_check.report import compare, find_problems, report  # noqa: E402
from tools.device_check.results import GRAPHS, read_graph, read_machine  # noqa: E402


@dataclass
class Settings:
    """The command line."""

    device_target: Optional[str] = setting(
        None, "device to check; None: Ascend where there is one, else CPU", choices=("Ascend", "CPU")
    )
    precision: str = setting("auto", "auto: fp16 on Ascend, fp32 on the CPU", choices=("auto", "fp16", "fp32"))
    jit_level: Optional[str] = jit_level_setting()
    graphs: list[str] = setting(list(GRAPHS), "graphs to run", choices=GRAPHS, positional=False)
    timeout: int = setting(900, "seconds that each device has for all graphs, after which its process is ended", low=1)
    into: Optional[str] = setting(None, path=True)  # a folder: compute for the process that compares


def main(argv: Sequence[str] | None = None) -> int:
    """Run the check and return the exit code."""
    settings = read_settings(Settings, argv, description=__doc__)
    if settings.into is not None:
        compute(settings, Path(settings.into))
        return 0
    with tempfile.TemporaryDirectory(prefix="check_device-") as folder:
        print("the CPU computes ...", file=sys.stderr, flush=True)
        cpu_folder, device_folder = Path(folder) / "cpu", Path(folder) / "device"
        ended = compute_in_a_process("CPU", "fp32", settings, cpu_folder)
        cpu_graphs = [read_graph(cpu_folder, name, ended) for name in settings.graphs]
        print("the device computes ...", file=sys.stderr, flush=True)
        ended = compute_in_a_process(settings.device_target, settings.precision, settings, device_folder)
        machine = read_machine(device_folder)
        if machine is None:
            raise UserError(f"the device could not be set up ({ended}): see docs/ascend.md, or try --device_target CPU")
        device_graphs = [read_graph(device_folder, name, ended) for name in settings.graphs]
    rows = [compare(graph, cpu, machine) for graph, cpu in zip(device_graphs, cpu_graphs)]
    problems = find_problems(machine, rows)
    print(report(machine, rows, problems))
    return 1 if problems or any(row.verdict == "WRONG" for row in rows) else 0


def compute_in_a_process(device: str | None, precision: str, settings: Settings, folder: Path) -> str:
    """Let a process compute the graphs into a folder, and return how it ended, "" for well.

    A process of its own, because MindSpore has one device in a process, and an error in a kernel may end it. A device
    may also hang: the process is ended when its time is over.
    """
    folder.mkdir()
    command = [sys.executable, __file__, "--into", str(folder), "--precision", precision, "--graphs", *settings.graphs]
    command += ["--device_target", device] if device else []
    environment = dict(os.environ)
    if device == "CPU":
        environment.pop("MS_SIMULATION_LEVEL", None)  # MindSpore's dry run, which computes nothing
    elif settings.jit_level:
        command += ["--jit_level", settings.jit_level]
    log = folder / "log.txt"
    try:
        with open(log, "wb") as output:
            code = subprocesses.run(command, time_limit=settings.timeout, stdout=output, stderr=output, env=environment)
    except TimeoutError:
        return f"it did not end within {settings.timeout} s, the limit that --timeout sets for a device"
    if code == 0:
        return ""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")] or lines or [""]
    how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return f"the process {how}: {plain(errors[-1].removeprefix('error: '), 300)}"


def compute(settings: Settings, folder: Path) -> None:
    """Compute the graphs on one device and write each result into `folder`."""
    # MindSpore is imported here alone: the process that compares does not need it.
    import mindspore as ms

    from ldm.runtime.device import setup_runtime
    from tools.device_check import graphs

    runtime = setup_runtime(settings.device_target, 0, settings.jit_level, settings.precision)
    if runtime.bf16:  # what auto is on this CPU: graphs in bf16 have limits of their own, which are not set here
        runtime = runtime.with_compute_dtype(ms.float32)
    graphs.compute(settings.graphs, runtime, folder)


if __name__ == "__main__":
    run_script(main)
