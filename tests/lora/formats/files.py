"""LoRAs with random values for the tests of the formats."""

import numpy as np

from ldm.lora.lora import LoRA
from ldm.lora.updates import LoRALayer


def random_lora(base, rank=2, alpha=None, only="", component="", seed=0, **metadata):
    """A LoRA on every module of `base` whose name ends with `only`; `rank` and `alpha` are numbers, or functions of
    the module's place in the row."""
    random = np.random.RandomState(seed)
    layers = {}
    for i, module in enumerate(base.modules):
        if not module.path.endswith(only) or (component and module.component != component):
            continue
        r = rank(i) if callable(rank) else rank
        a = r if alpha is None else alpha(i) if callable(alpha) else alpha
        outgoing, incoming = module.shape[:2]
        kernel = module.shape[2:]
        layers[module.name] = LoRALayer(
            random.standard_normal((r, incoming, *kernel)).astype(np.float32),
            random.standard_normal((outgoing, r, *(1 for _ in kernel))).astype(np.float32),
            float(a),
        )
    return LoRA(layers, metadata)


def assert_same_updates(found, wanted, rtol=1e-5):
    """Whether two LoRAs change a base alike; a layer that only one of them has must be zero."""
    for name in found.layers.keys() | wanted.layers.keys():
        updates = [lora.layers[name].update() if name in lora.layers else 0.0 for lora in (found, wanted)]
        one, two = updates
        if not np.isscalar(one) and not np.isscalar(two):
            assert one.size == two.size, name
            one, two = one.reshape(-1), two.reshape(-1)
        np.testing.assert_allclose(one, two, rtol=0, atol=rtol * max(np.abs(two).max(), 1e-30), err_msg=name)
