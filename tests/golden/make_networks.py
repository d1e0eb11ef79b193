"""Write networks.npz: what diffusers and transformers answer for small_sd1.yaml and small_sd2.yaml.

Weights and inputs are functions of their names (tests/named_weights.py), so the file holds the answers alone. Run in
the environment of `make test-parity`: python -m tests.golden.make_networks
"""

from __future__ import annotations

from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers

from ldm.models.stable_diffusion import build_model
from ldm.settings.model import load_model_config
from tests.named_weights import named_weight
from tests.network_cases import FORMS, NETWORKS, inputs_for
from tests.parity.reference import Reference


def answers() -> dict[str, np.ndarray]:
    """ "form.network" -> the reference's output."""
    found = {}
    for form, unused in FORMS.items():
        config = load_model_config(Path(__file__).with_name(f"{form}.yaml"))
        shapes = {name: tuple(p.shape) for name, p in build_model(config).parameters_dict().items()}
        reference = Reference(config, {name: named_weight(name, shape) for name, shape in shapes.items()}, unused)
        found.update({f"{form}.{network}": reference.run(network, inputs_for(config)) for network in NETWORKS})
    return found


def main() -> None:
    found = answers()
    np.savez_compressed(Path(__file__).with_name("networks.npz"), **found)
    print(f"torch {torch.__version__}, diffusers {diffusers.__version__}, transformers {transformers.__version__}:")
    for name, answer in found.items():
        print(f"  {name} {answer.shape}, largest {np.abs(answer).max():.3f}, deviation {answer.std():.3f}")


if __name__ == "__main__":
    main()
