"""Compile graphs for Ascend without a device, and count their kernels, launches and memory.

    python -m tools.ascend.dry_run --train_batch_size 4 --image_size 512
    python -m tools.ascend.dry_run --graphs text encode decode unet step --model_config tests/tiny.yaml --image_size 32
    python -m tools.ascend.dry_run --soc Ascend910A --enable_flash_attention False --jit_level O1

MindSpore's own Ascend back end compiles the graphs, selects a kernel for each operator and plans the memory, against
empty CANN libraries (tools/ascend/stub_cann.py). Nothing is computed: it says nothing about results or speed. CANN's
own checks of shapes and types do not run either. It needs Linux on x86-64, gcc, binutils and MindSpore 2.8.0.

All settings of train_text_to_image.py can be given. --train_config is configs/train/train_config_lora_v1.yaml if it is
not given. Batch and image size hold for the other graphs too. An SD1.5 step at 512 pixels takes about 12 minutes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ldm.errors import UserError  # noqa: E402
from ldm.files.documents import json_text  # noqa: E402
from ldm.files.paths import under_root  # noqa: E402
from ldm.runtime.script import run_script, start_script  # noqa: E402
from ldm.settings.declare import setting  # noqa: E402
from ldm.settings.read import read_settings, split_flags  # noqa: E402
from ldm.settings.train import TrainSettings  # noqa: E402
from tools.ascend.simulation import Graph, Simulated, simulate  # noqa: E402
from tools.ascend.stub_cann import DEFAULT_SOC  # noqa: E402

GRAPHS = ("text", "encode", "decode", "unet", "guided", "sampler", "step")
RECIPE = ROOT / "configs" / "train" / "train_config_lora_v1.yaml"


@dataclass
class Settings:
    """The command line."""

    graphs: list[str] = setting(["step"], f"what to compile, some of {' '.join(GRAPHS)}", choices=GRAPHS)
    soc: str = setting(DEFAULT_SOC, "name of the device that is simulated, such as Ascend910B3 (A2) or Ascend910A")
    processes: int = setting(1, "processes of a data-parallel run, of which the first is compiled", low=1, high=4096)
    output: Optional[Path] = setting(None, "JSON file for the counts", path=True)


class DoesNotCompile(UserError):
    """A graph does not compile for Ascend."""


def dry_run(graphs: Sequence[str], argv: Sequence[str], soc: str = DEFAULT_SOC, process_count: int = 1) -> list[Graph]:
    """Compile graphs in a process of their own.

    Args:
        graphs: Names of GRAPHS.
        argv: Settings of training, as flags.
        soc: The name of the device that is simulated.
        process_count: Processes of a data-parallel run.

    Raises:
        DoesNotCompile: With the last lines of the process.
    """
    done = simulate(["-m", "tools.ascend.graphs", ",".join(graphs), *training_flags(argv)], soc, process_count)
    check_compiled(done, graphs)
    return done.graphs


def training_flags(argv: Sequence[str]) -> list[str]:
    """Return the flags of training with what the dry run adds, and with absolute paths. Raises UserError."""
    given = split_flags(TrainSettings, argv)[0]
    flags = [*given, "--device_target=Ascend"]
    if not any(flag.split("=")[0] == "--train_config" for flag in given):
        flags.append(f"--train_config={RECIPE}")
    settings = read_settings(TrainSettings, flags, yaml_flag="train_config")
    # The process runs in a folder of its own.
    for name in ("train_config", "model_config", "lora_config"):
        path = getattr(settings, name)
        if path is not None:
            flags.append(f"--{name}={Path(under_root(path)).resolve()}")
    return flags


def check_compiled(done: Simulated, graphs: Sequence[str]) -> None:
    """Raise DoesNotCompile unless the process compiled all graphs."""
    compiled = [graph.name for graph in done.graphs]
    if done.exit_code or compiled != list(graphs):
        failed = next((name for name in graphs if name not in compiled), "the last graph")
        raise DoesNotCompile(f"{failed} does not compile for Ascend:\n{done.text[-3000:]}")


def report(graph: Graph) -> str:
    """Return a table of a graph's kernels, the most frequent first, and its totals."""
    rows = [f"## {graph.name}", "", "| operator | kernel | count |", "| --- | --- | --- |"]
    kernels = sorted(graph.kernels.items(), key=lambda item: (-item[1], item[0]))
    rows += [f"| {operator} | {kind} | {count} |" for (operator, kind), count in kernels]
    rows += [
        "",
        f"{graph.totals()}; peak memory {graph.peak_bytes / 1e9:.3f} GB; compiled in {graph.seconds:.1f} s",
        "",
    ]
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    own, rest = split_flags(Settings, argv)
    args = read_settings(Settings, own, description=__doc__)
    graphs = dry_run(args.graphs, rest, args.soc, args.processes)
    for graph in graphs:
        print(report(graph))
    if args.output is not None:
        args.output.write_text(json_text({graph.name: graph.table() for graph in graphs}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    start_script()
    run_script(main)
