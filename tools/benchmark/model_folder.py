"""Write a base model with random weights as a diffusers folder, which all sides read: for run.py.

python -m tools.benchmark.model_folder NAME FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

from ldm.models.stable_diffusion import build_model
from ldm.runtime.device import setup_runtime
from ldm.settings.model import ModelConfig, load_model_config
from ldm.weights.arrays import ArraysInMemory
from ldm.weights.convert import write_diffusers_folder
from tools.benchmark.works import SEED, WORKS


def write_model(folder: Path, config: ModelConfig) -> None:
    """Write the three networks in fp32, with the weights that a new model has, and the tokenizer."""
    model = build_model(config)
    arrays = ArraysInMemory({parameter.name: parameter.asnumpy() for parameter in model.get_parameters()})
    shapes = {name: array.shape for name, array in arrays.items()}
    write_diffusers_folder(folder, arrays, shapes, config, "keep")


def main() -> None:
    name, folder = sys.argv[1:]
    setup_runtime("CPU", precision="fp32", seed=SEED)
    write_model(Path(folder), load_model_config(WORKS[name].config))


if __name__ == "__main__":
    main()
