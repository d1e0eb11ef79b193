"""The small graphs that a process computes on its device: networks with fixed random weights, and no checkpoint.

The functions that the scripts call set up the networks and build the step, so that the graphs are the scripts' own.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from ldm import ops
from ldm.errors import UserError, plain
from ldm.generation.loading import set_up_sampling
from ldm.models.autoencoder import VAEDecode, VAEEncode
from ldm.models.stable_diffusion import StableDiffusion, build_model
from ldm.runtime.device import Runtime, decide_flash_attention
from ldm.settings.model import parse_model_config
from ldm.settings.train import TrainSettings
from ldm.training.optimizers import adamw_scalars
from ldm.training.setup import build_step, choose_trainable, make_lora_spec
from ldm.training.step import StepScalars
from tools.device_check.machine import describe
from tools.device_check.results import OVERFLOW, Graph

# A UNet with heads of 40 and 80 channels as in SD1.x, two levels, attention at both.
MODEL = {
    "architecture": "custom",
    "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
    "params": {
        "linear_start": 0.00085,
        "linear_end": 0.0120,
        "timesteps": 1000,
        "image_size": 8,
        "scale_factor": 0.5,
        "unet_config": {
            "target": "ldm.models.unet.UNetModel",
            "params": {
                "in_channels": 4, "out_channels": 4, "model_channels": 160, "attention_resolutions": [2, 1],
                "num_res_blocks": 1, "channel_mult": [1, 2], "num_heads": 4, "transformer_depth": 1, "context_dim": 64,
            },
        },
        "first_stage_config": {
            "target": "ldm.models.autoencoder.AutoencoderKL",
            "params": {
                "embed_dim": 4,
                "ddconfig": {
                    "double_z": True, "z_channels": 4, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 2, 2],
                    "num_res_blocks": 1,
                },
            },
        },
        "cond_stage_config": {
            "target": "ldm.models.text_encoder.CLIPTextEncoder",
            "params": {"width": 64, "num_layers": 2, "num_heads": 2, "activation": "quick_gelu"},
        },
    },
}  # fmt: skip

# The step changes parameters and averages so much that the deviation shows a wrong update, and clips the gradients.
# EPSILON is near the clipped gradients: below it AdamW's first step is their sign, which rounding can turn round.
RATE, EPSILON, MAX_NORM, EMA_RATE = 0.05, 1e-4, 0.01, 0.5

HEAD_SIZES = (40, 64, 80, 160)  # SD1.x has 40, 80 and 160, SD2.x has 64
PRECISIONS = {OVERFLOW: "fp16", "vae_encode": "fp32", "vae_decode": "fp32"}  # the others have that of the runtime

# What MindSpore and this project raise where a graph cannot be built, compiled or run.
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, OSError, MemoryError)
FAILURES += (UserError, AssertionError, ImportError, NameError)

Arrays = dict[str, np.ndarray]


def compute(names: Sequence[str], runtime: Runtime, folder: Path) -> None:
    """Compute graphs and write into `folder` what is found out about the machine, and each result when it is there."""
    graphs = Graphs(runtime)
    graphs.overflow()  # it opens the device
    describe(runtime, graphs.flash).write(folder)
    for name in names:
        graphs.run(name).write(folder)


class Graphs:
    """The graphs: a method for each name in `results.GRAPHS`, which returns what the graph computes.

    Args:
        runtime: What setup_runtime returned.
    """

    def __init__(self, runtime: Runtime):
        self.runtime = runtime
        self.flash = decide_flash_attention(None, runtime)
        self.config = parse_model_config({"model": MODEL}, "tools/check_device.py")

    def run(self, name: str) -> Graph:
        """Compute the graph `name`. An error of it is part of the result."""
        graph = Graph(name, PRECISIONS.get(name, self.runtime.precision))
        if name == "unet_flash" and self.runtime.is_ascend and not self.flash:
            graph.skipped = "flash attention does not exist here, see docs/ascend.md"
            return graph
        began = time.perf_counter()
        try:
            graph.arrays = getattr(self, name)()
        except FAILURES as error:
            lines = [line for line in str(error).splitlines() if line.strip()] or [""]
            graph.error = plain(f"{type(error).__name__}: {lines[0]}", 300)
        graph.seconds = time.perf_counter() - began
        return graph

    def overflow(self) -> Arrays:
        """Double a number near fp16's largest."""
        doubled = ms.ops.Add()(*[Tensor(np.full(16, 60000, np.float16))] * 2)
        return {"doubled": doubled.asnumpy().astype(np.float32)}

    def attention(self) -> Arrays:
        """Run the attention that the UNet uses here, with its gradients, at each size of a head."""
        arrays = {}
        for size in HEAD_SIZES:
            heads, tokens = 2, 256
            shape = (2, tokens, heads * size)
            loss = _WeightedSum(ops.attention(heads, size, flash=self.flash), draw(f"weights{size}", shape))
            inputs = [
                Tensor(draw(f"{name}{size}", shape)).astype(self.runtime.compute_dtype)
                for name in ("query", "key", "value")
            ]
            (_, out), gradients = ms.ops.value_and_grad(loss, (0, 1, 2), has_aux=True)(*inputs)
            for name, array in zip(("output", "dQ", "dK", "dV"), (out, *gradients)):
                arrays[f"{size} {name}"] = array.asnumpy().astype(np.float32)
        return arrays

    def text_encoder(self) -> Arrays:
        """Encode two texts of arbitrary tokens."""
        tokens = np.random.default_rng(0).integers(0, 49407, (2, 77)).astype(np.int32)
        return _call(self._model().cond_stage_model, tokens)

    def vae_encode(self) -> Arrays:
        """Encode an image. The VAE computes in fp32 on any device."""
        return _call(VAEEncode(self._model().first_stage_model), draw("image", (1, 3, 32, 32)))

    def vae_decode(self) -> Arrays:
        """Decode latents."""
        return _call(VAEDecode(self._model().first_stage_model), draw("latents", (1, 4, 8, 8)))

    def unet(self, flash: bool = False) -> Arrays:
        """Predict the noise, with plain attention."""
        model = self._model(flash)
        latents, timesteps = draw("latents", (2, 4, 8, 8)), np.array([10, 900], np.int32)
        return _call(model.model.diffusion_model, latents, timesteps, self._texts())

    def unet_flash(self) -> Arrays:
        """Predict the noise, with flash attention. On the CPU the reference is the network with plain attention."""
        return self.unet(self.flash)

    def lora_step(self) -> Arrays:
        """Train a LoRA for one step: loss, gradients (as AdamW's first moment), parameters and their averages."""
        settings = TrainSettings(use_lora=True, lora_rank=4, clip_grad=True, use_ema=True)
        model = self._networks()
        trainable = choose_trainable(settings, model, make_lora_spec(settings))
        for parameter in trainable:
            parameter.set_data(Tensor(0.05 * draw(parameter.name, parameter.shape)))
        step = build_step(
            settings, self.runtime, model, trainable,
            flash_attention=self.flash, skips_overflow=True, saves_base_model=False,
        )  # fmt: skip
        adamw = adamw_scalars(1, RATE, (0.9, 0.999), EPSILON, 0.01)
        scalars = StepScalars(1024.0, 1 / 1024, MAX_NORM, adamw, EMA_RATE)
        batch = draw("latents", (2, 4, 8, 8)), draw("noise", (2, 4, 8, 8)), np.array([10, 900], np.int32), self._texts()
        result = step([tuple(Tensor(array) for array in batch)], scalars).read()
        state = step.state()
        arrays = {"loss": np.array([result.loss], np.float32), "norm": np.array([result.gradient_norm], np.float32)}
        for group, label in (("m", "gradients"), ("p", "parameters"), ("ema", "averages")):
            arrays[label] = np.concatenate([state[f"{group}.{p.name}"].ravel() for p in trainable])
        return arrays

    def _model(self, flash: bool = False) -> StableDiffusion:
        """Return networks that sample."""
        model = self._networks()
        set_up_sampling(model, self.runtime.compute_dtype, flash)
        return model

    def _networks(self) -> StableDiffusion:
        """Return networks in fp32."""
        model = build_model(self.config)
        fill(model)
        return model

    def _texts(self) -> np.ndarray:
        return draw("texts", (2, 77, self.config.context_dim))


class _WeightedSum(nn.Cell):
    """Returns the sum of an attention's output times fixed weights, in fp32, and the output."""

    def __init__(self, attention: nn.Cell, weights: np.ndarray):
        super().__init__()
        self.attention, self.weights = attention, Tensor(weights)

    def construct(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out = ms.ops.cast(self.attention(query, key, value, 2), ms.float32)
        return (out.reshape(self.weights.shape) * self.weights).sum(), out


def _call(network: nn.Cell, *inputs: np.ndarray) -> Arrays:
    network.set_train(False)
    return {"output": network(*(Tensor(array) for array in inputs)).asnumpy().astype(np.float32)}


def draw(name: str, shape: Sequence[int]) -> np.ndarray:
    """Return normal random numbers that depend on the name alone, in fp32."""
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(tuple(shape), np.float32)


def fill(model: nn.Cell) -> None:
    """Give a model random weights that depend on their names alone, so that no layer is without effect."""
    for parameter in model.get_parameters():
        values = draw(parameter.name, parameter.shape)
        if values.ndim > 1:
            values /= np.sqrt(np.prod(values.shape[1:], dtype=np.float32))
        else:  # of a bias, or of a norm
            values = 0.1 * values + (0.0 if parameter.name.endswith("bias") else 1.0)
        parameter.set_data(Tensor(values))
