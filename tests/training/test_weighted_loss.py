"""Training with masks: a white one changes no bit of training without, and a black one gives no gradient."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops
from PIL import Image

from ldm.data.masks import load_image_and_mask, loss_weights
from ldm.diffusion.loss import DiffusionLoss
from ldm.diffusion.schedule import NoiseSchedule
from ldm.runtime.device import setup_runtime
from ldm.training.step import TrainStep
from ldm.training.step_graphs import LossFromTokens
from tests.training.toy import scalars

N, C, SIDE, WIDTH = 3, 4, 6, 5


@pytest.fixture(autouse=True)
def set_up(graph_mode):
    setup_runtime("CPU")


class SmallUNet(nn.Cell):
    """A convolution, plus a projection of the mean of the text embeddings."""

    def __init__(self, dtype=ms.float32):
        super().__init__()
        rng = np.random.default_rng(0)
        self.w = Parameter(Tensor(rng.standard_normal((C, C, 3, 3)).astype(np.float32) / 6), name="w")
        self.p = Parameter(Tensor(rng.standard_normal((WIDTH, C)).astype(np.float32)), name="p")
        self.dtype = dtype
        self.conv, self.matmul, self.mean = ops.Conv2D(C, 3, pad_mode="same"), ops.MatMul(), ops.ReduceMean()

    def construct(self, latents, timesteps, text_embeddings):
        dtype = self.dtype
        x = self.conv(latents.astype(dtype), self.w.astype(dtype))
        shift = self.matmul(self.mean(text_embeddings, 1).astype(dtype), self.p.astype(dtype))
        return x + ops.broadcast_to(shift.reshape(N, C, 1, 1), x.shape)


class Embeddings(nn.Cell):
    """A stand-in for the text encoder: (N, tokens) -> (N, tokens, WIDTH)."""

    def __init__(self):
        super().__init__()
        self.scale = Parameter(Tensor(np.ones(WIDTH, np.float32)), name="scale")

    def construct(self, tokens):
        shape = (*tokens.shape, WIDTH)
        return ops.broadcast_to(tokens.astype(ms.float32).expand_dims(-1), shape) * ops.broadcast_to(self.scale, shape)


def batch(seed, tokens=False):
    rng = np.random.default_rng(seed)
    latents, noise = (rng.standard_normal((N, C, SIDE, SIDE)).astype(np.float32) for _ in range(2))
    text = rng.integers(0, 3, (N, 7)).astype(np.int32) if tokens else rng.standard_normal((N, 7, WIDTH))
    timesteps = rng.integers(0, 1000, N).astype(np.int32)
    return latents, noise, timesteps, text if tokens else text.astype(np.float32)


def trained(weights=None, steps=4, micro_batches=1, dtype=ms.float32, tokens=False):
    """The results and the state after some steps, and the state before. `weights` are those of every batch."""
    unet = SmallUNet(dtype)
    loss, parameters = DiffusionLoss(unet, NoiseSchedule(), "v_prediction"), [unet.w, unet.p]
    if tokens:
        encoder = Embeddings()
        loss, parameters = LossFromTokens(loss, encoder), [*parameters, encoder.scale]
    step = TrainStep(
        loss, parameters, clip=True, use_ema=True, skip_overflow=dtype == ms.float16, micro_batches=micro_batches
    )
    before, results = step.state(), []
    extra = () if weights is None else (weights,)
    for t in range(steps):
        batches = [tuple(map(Tensor, (*batch(10 * t + i, tokens), *extra))) for i in range(micro_batches)]
        scale = 8.0 if dtype == ms.float16 else 1.0
        results.append(step(batches, scalars(t + 1, scale=scale, micro=micro_batches, decay=0.01, norm=1.0)).read())
    return results, step.state(), before


def weights_of_a_mask(folder, color, **settings):
    """The weights of a micro-batch whose images have a mask of one colour."""
    Image.new("RGB", (70, 50)).save(folder / "image.png")
    Image.new("L", (70, 50), color).save(folder / "mask.png")
    rng = np.random.default_rng(0)
    masks = [
        load_image_and_mask(folder / "image.png", str(folder / "mask.png"), 8 * SIDE, 8, random_crop=True, rng=rng)[1]
        for _ in range(N)
    ]
    return loss_weights(masks, (SIDE, SIDE), **settings)


@pytest.mark.parametrize(
    "options",
    [{}, {"micro_batches": 2}, {"dtype": ms.float16}, {"tokens": True}],
    ids=["whole step", "accumulation", "fp16", "text encoder"],
)
def test_a_white_mask_trains_as_no_mask_bit_for_bit(tmp_path, options):
    results, state, before = trained(**options)
    white = weights_of_a_mask(tmp_path, "white", normalize_masked_area_loss=True)
    masked_results, masked_state, _ = trained(white, **options)
    assert masked_results == results and all(result.finite for result in results)
    for name, array in state.items():
        np.testing.assert_array_equal(masked_state[name], array, err_msg=name)
        assert not np.array_equal(array, before[name]), name


@pytest.mark.parametrize(
    "options", [{}, {"micro_batches": 2}, {"tokens": True}], ids=["whole step", "accumulation", "text encoder"]
)
def test_a_black_mask_gives_no_gradient(tmp_path, options):
    results, state, _ = trained(weights_of_a_mask(tmp_path, "black"), steps=1, **options)
    assert results[0][:2] == (0.0, 0.0)
    assert not any(array.any() for name, array in state.items() if name[0] in "mv")
