"""Compile what each optimizer makes of the gradients on the simulated device, in one process.

    python -m tests.ascend.updates JIT_LEVEL

Each graph is the one that updates from totals, of a LoRA in every layer of the micro model. The last ones are whole
steps: with gradient checkpointing, and with losses that are no mean squared error.
"""

from __future__ import annotations

import os
import sys

from ldm.settings.read import read_settings
from ldm.settings.train import TrainSettings
from tests.ascend.runs import MICRO, UPDATES
from tools.ascend.dry_run import training_flags
from tools.ascend.graphs import Graphs, compile_graphs, set_up
from tools.ascend.simulation import end_graph


def main() -> None:
    common = [
        f"--model_config={MICRO}", "--image_size=16", "--train_batch_size=2", f"--jit_level={sys.argv[1]}",
        "--enable_flash_attention=True", "--lora_targets=all", "--betas=None",
    ]  # fmt: skip
    runtime = None
    for name, flags in UPDATES.items():
        settings = read_settings(TrainSettings, training_flags([*common, *flags]), yaml_flag="train_config")
        runtime = runtime or set_up(settings)
        graph = "step" if name in ("checkpointed", "losses") else "update"
        for _, peak_bytes, seconds in compile_graphs(Graphs(settings, runtime), [graph]):
            end_graph(name, peak_bytes, seconds)
    sys.stdout.flush()
    os._exit(0)  # MindSpore's own end may wait for a device


if __name__ == "__main__":
    main()
