"""Compare the networks of a full-size configuration with diffusers' and transformers' on the same random weights.

    python -m tests.parity.fullsize configs/v1-inference.yaml
    python -m tests.parity.fullsize configs/v2-inference.yaml --networks unet

In the environment of `make test-parity`; about 12 GB and a few minutes each. Exits with 1 if an error is above 1e-4 of
the output's largest value. docs/parity.md holds what it printed.
"""

from __future__ import annotations

import argparse
import gc
import resource
import sys
import time

import mindspore as ms
import numpy as np

from ldm.settings.model import load_model_config
from tests.named_weights import relative_error
from tests.network_cases import inputs_for, model_with_named_weights, run_network
from tests.parity.reference import Reference

BOUND = 1e-4
COMPONENT = {
    "unet": "model.",
    "encode": "first_stage_model.",
    "decode": "first_stage_model.",
    "text": "cond_stage_model.",
}
PUBLISHED_UNUSED_LAYERS = {"sd1": 0, "sd2": 1}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_config")
    parser.add_argument("--networks", nargs="+", choices=COMPONENT, default=list(COMPONENT))
    parser.add_argument("--size", type=int, default=64, help="height and width of the latents (default 64: 512 pixels)")
    arguments = parser.parse_args()

    ms.set_context(mode=ms.GRAPH_MODE)
    config = load_model_config(arguments.model_config)
    model = model_with_named_weights(config)
    given = inputs_for(config, batch=1, height=arguments.size, width=arguments.size)
    print(f"{arguments.model_config}: {arguments.size}x{arguments.size} latents, batch 1, fp32", flush=True)
    worst = 0.0
    for network in arguments.networks:
        # The arrays of ours are given to theirs, not copied.
        weights = {
            name: parameter.asnumpy()
            for name, parameter in model.parameters_dict().items()
            if name.startswith(COMPONENT[network])
        }
        reference = Reference(config, weights, PUBLISHED_UNUSED_LAYERS[config.architecture])
        start = time.time()
        theirs = reference.run(network, given)
        theirs_seconds = time.time() - start
        del reference
        gc.collect()
        start = time.time()
        ours = run_network(model, network, given)
        error = relative_error(ours, theirs)
        worst = max(worst, error)
        print(
            f"  {network:6s} {sum(array.size for array in weights.values()):>11,} weights, output {ours.shape}: "
            f"relative error {error:.1e}, largest value {np.abs(theirs).max():.3f} "
            f"(reference {theirs_seconds:.1f} s, ours {time.time() - start:.1f} s with compiling)",
            flush=True,
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"  largest relative error {worst:.1e}, bound {BOUND:.0e}; peak memory {peak:.1f} GB")
    return int(worst > BOUND)


if __name__ == "__main__":
    sys.exit(main())
