"""Compile the LoRA training graph of the tiny UNet as the CPU runs it and leave its intermediate representation behind.

    python -m tests.cpu_graph FOLDER [checkpointing]

A process of its own, as tests/ascend_graphs.py is.
"""

from __future__ import annotations

import os
import sys

os.environ["MS_DEV_DUMP_IR_PASSES"] = "validate"  # the last pass before the back end

import mindspore as ms  # noqa: E402
import numpy as np  # noqa: E402
from mindspore import Tensor  # noqa: E402

from ldm.diffusion.loss import DiffusionLoss  # noqa: E402
from ldm.diffusion.schedule import NoiseSchedule  # noqa: E402
from ldm.lora.inject import inject_lora  # noqa: E402
from ldm.lora.spec import LoRASpec  # noqa: E402
from ldm.models.stable_diffusion import build_model  # noqa: E402
from ldm.settings.model import load_model_config  # noqa: E402
from ldm.training.step import TrainStep  # noqa: E402
from tests.conftest import ROOT  # noqa: E402


def main() -> None:
    config = load_model_config(ROOT / "tests" / "tiny.yaml")
    ms.set_context(mode=ms.GRAPH_MODE, save_graphs=1, save_graphs_path=sys.argv[1])
    model = build_model(config)
    inject_lora(model, LoRASpec(rank=2))
    schedule = NoiseSchedule.from_config(config)
    step = TrainStep(
        DiffusionLoss(model.model.diffusion_model, schedule, config.prediction_type),
        list(model.trainable_params()),
        clip=True,
        gradient_checkpointing="checkpointing" in sys.argv[2:],
    )
    latents = Tensor(np.zeros((4, 4, 16, 16), np.float32))
    context = Tensor(np.zeros((4, 77, config.context_dim), np.float32))
    step.whole.compile(Tensor(np.zeros((2, 7), np.float32)), latents, latents, Tensor(np.zeros(4, np.int32)), context)


if __name__ == "__main__":
    main()
