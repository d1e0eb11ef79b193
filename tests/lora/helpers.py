"""Names in the small network, random arrays, and what a network's weights were."""

import numpy as np
from mindspore import nn

UNET, TEXT = "model.diffusion_model.", "cond_stage_model."
BLOCK = f"{UNET}input_blocks.0."
TO_Q = f"{BLOCK}1.transformer_blocks.0.attn1.to_q"
TO_K = f"{BLOCK}1.transformer_blocks.0.attn2.to_k"
CONV = f"{BLOCK}0.in_layers.2"
RANDOM = np.random.RandomState(0)


class Fresh(nn.Cell):
    """A network to be compiled anew, after its cells were changed."""

    def __init__(self, net):
        super().__init__(auto_prefix=False)
        self.net = net

    def construct(self, *inputs):
        return self.net(*inputs)


def normal(*shape):
    return RANDOM.standard_normal(shape).astype(np.float32)


def weights_of(net):
    return {parameter.name: parameter.asnumpy().copy() for parameter in net.get_parameters()}


def assert_unchanged(net, before):
    for name, array in weights_of(net).items():
        np.testing.assert_array_equal(array.view(np.uint8), before[name].view(np.uint8))
