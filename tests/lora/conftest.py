"""Two networks for LoRA's tests: the tiny model (names and weights), and one small enough to compile in seconds."""

from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from ldm.lora.inject import get_lora, inject_lora
from ldm.lora.spec import LoRASpec
from ldm.models.attention import SpatialTransformer
from ldm.models.layers import Conv2d, Linear
from ldm.models.stable_diffusion import build_model
from ldm.models.unet import ResBlock, TimestepBlock
from ldm.settings.model import load_model_config

TINY = Path(__file__).parent.parent / "tiny.yaml"


@pytest.fixture(autouse=True)
def graph_mode():
    ms.set_context(mode=ms.GRAPH_MODE)


@pytest.fixture(scope="session")
def tiny_config():
    return load_model_config(TINY)


@pytest.fixture
def tiny_model(tiny_config):
    np.random.seed(0)
    return build_model(tiny_config)


class _Diffusion(nn.Cell):
    def __init__(self):
        super().__init__()
        transformer = SpatialTransformer(8, 2, 4, 1, 6, num_groups=4)
        self.input_blocks = nn.CellList([TimestepBlock(ResBlock(8, 16, 8, num_groups=4), transformer)])
        self.out = nn.SequentialCell([Conv2d(8, 4, 3, stride=2, padding=1)])


class _Text(nn.Cell):
    def __init__(self):
        super().__init__()
        self.q_proj, self.fc1 = Linear(6, 6), Linear(6, 6)


class SmallNet(nn.Cell):
    """A residual block, a transformer and a strided convolution over (N, 8, 4, 4), under canonical names."""

    def __init__(self):
        super().__init__()
        self.model = nn.Cell()
        self.model.diffusion_model = _Diffusion()
        self.model.update_parameters_name("model.")
        self.cond_stage_model = _Text()
        self.mean = ops.ReduceMean()

    def construct(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        context = self.cond_stage_model.q_proj(context).reshape(-1, context.shape[-1])
        for cell in self.model.diffusion_model.input_blocks:
            x = cell(x, emb, context)
        return self.model.diffusion_model.out(x).astype(ms.float32)


def _small_net(seed):
    np.random.seed(seed)
    net = SmallNet()
    for parameter in net.get_parameters():
        parameter.requires_grad = False
    return net


@pytest.fixture
def small_net():
    return _small_net(0)


@pytest.fixture
def fresh_net():
    """The same network with other weights."""
    return _small_net(1)


@pytest.fixture
def small_inputs():
    random = np.random.RandomState(0)
    return tuple(
        Tensor(random.standard_normal(shape).astype(np.float32)) for shape in ((2, 8, 4, 4), (2, 16), (2, 5, 6))
    )


@pytest.fixture
def randomise():
    """Give every `up` of an injected network values other than zero."""

    def fill(net, strength=0.1, seed=0):
        random = np.random.RandomState(seed)
        for parameter in net.trainable_params():
            if ".lora_up." in parameter.name:
                values = strength * random.standard_normal(parameter.shape)
                parameter.set_data(Tensor(values.astype(np.float32)))

    return fill


@pytest.fixture
def trained(small_net, randomise):
    """(network with LoRA layers of random values, their LoRA)."""
    inject_lora(small_net, LoRASpec(rank=2, alpha=3.0, scale=0.5, targets="all"))
    randomise(small_net)
    return small_net, get_lora(small_net)
