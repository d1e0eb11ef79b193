"""Compile and run the product's graphs on a simulated Ascend device: the program that `tools.ascend.dry_run` starts.

    python -m tools.ascend.graphs GRAPHS [settings of training]      # GRAPHS: names with commas between them

The networks have the weights that `build_model` gives them, not those of a checkpoint: kernels, memory and time to
compile do not depend on them. Everything else is built by the functions that the scripts call.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from unittest.mock import patch

import mindspore as ms
import numpy as np
from mindspore import Tensor

from ldm.diffusion.on_device import DeviceSampling, WeightedSum
from ldm.diffusion.sampling import latent_shape
from ldm.files.paths import under_root
from ldm.generation import loading
from ldm.models.autoencoder import VAEDecode, VAEEncode
from ldm.models.stable_diffusion import StableDiffusion
from ldm.runtime.device import Runtime, decide_flash_attention, setup_runtime
from ldm.settings.model import ModelConfig, load_model_config
from ldm.settings.read import read_settings
from ldm.settings.train import TrainSettings
from ldm.training.checks import image_size
from ldm.training.loss_scale import make_loss_scaler
from ldm.training.optimizers import make_optimizer
from ldm.training.rates import make_rates
from ldm.training.setup import build_step, choose_trainable, make_lora_spec
from ldm.training.step import StepScalars, TrainStep
from tools.ascend.simulation import begin_graph, end_graph


def zeros(*shape: int, dtype: type = np.float32) -> Tensor:
    return Tensor(np.zeros(shape, dtype))


class Graphs:
    """The graphs of the scripts, by name.

    Args:
        settings: Those of the training. Batch and image size are those of the other graphs too.
        runtime: What setup_runtime returned.
    """

    def __init__(self, settings: TrainSettings, runtime: Runtime):
        assert settings.model_config is not None
        self.settings, self.runtime = settings, runtime
        self.config: ModelConfig = load_model_config(under_root(settings.model_config))
        self.batch, self.pixels = settings.train_batch_size, image_size(settings, self.config)
        self.flash = decide_flash_attention(settings.enable_flash_attention, runtime)

    def text(self) -> Callable[[], object]:
        """Return the call of the text encoder."""
        tokens = zeros(self.batch, 77, dtype=np.int32)
        text_encoder = self._sampling_model().cond_stage_model
        return lambda: text_encoder(tokens)

    def encode(self) -> Callable[[], object]:
        """Return the call of the VAE's encoder."""
        encoder, images = (
            VAEEncode(self._sampling_model().first_stage_model),
            zeros(1, self.config.image_channels, self.pixels, self.pixels),
        )
        return lambda: encoder(images)

    def decode(self) -> Callable[[], object]:
        """Return the call of the VAE's decoder."""
        decoder, latents = VAEDecode(self._sampling_model().first_stage_model), self._latents(1)
        return lambda: decoder(latents)

    def unet(self) -> Callable[[], object]:
        """Return the call of the UNet, as it samples."""
        unet, latents = self._sampling_model().model.diffusion_model, self._latents(self.batch)
        timesteps, text_embeddings = zeros(self.batch, dtype=np.int32), zeros(self.batch, 77, self.config.context_dim)
        return lambda: unet(latents, timesteps, text_embeddings)

    def guided(self) -> Callable[[], object]:
        """Return the call of the UNet with guidance, for half as many images, and with a guidance rescale."""
        sampling = DeviceSampling(self._sampling_model().model.diffusion_model)
        embeddings = np.zeros((self.batch // 2, 77, self.config.context_dim), np.float32)
        denoise = sampling.denoiser(embeddings, embeddings, 7.5, 0.7)
        latents = sampling.array(self._latents(self.batch // 2))
        return lambda: denoise(latents, 500).tensor

    def sampler(self) -> Callable[[], object]:
        """Return the call of the sampler's arithmetic: a sum of four arrays."""
        weighted_sum, latents = WeightedSum(), [self._latents(self.batch) for _ in range(4)]
        return lambda: weighted_sum(zeros(4), *latents)

    def step(self) -> Callable[[], object]:
        """Return the call of the training step."""
        step, scalars = self._train_step()
        latents = self._latents(self.batch)
        # With ip_noise_gamma, the noise of the input follows that of the target.
        noise = ms.ops.concat([latents] * 2, 1) if self.settings.ip_noise_gamma else latents
        text = (
            zeros(self.batch, 77, dtype=np.int32)
            if self.settings.trains_text_encoder
            else zeros(self.batch, 77, self.config.context_dim)
        )
        batch = latents, noise, zeros(self.batch, dtype=np.int32), text
        count = self.settings.gradient_accumulation_steps
        return lambda: step([batch] * count, scalars, [np.zeros(2, np.int32)] * count)

    def update(self) -> Callable[[], object]:
        """Return the call of the graph that updates from totals, which a step of several micro-batches ends with."""
        step, scalars = self._train_step()
        rows = Tensor(np.array([scalars.row()] * 2, np.float32))
        return lambda: step.finish(rows)

    def _train_step(self) -> tuple[TrainStep, StepScalars]:
        settings, runtime = self.settings, self.runtime
        model = _load(self.config)
        lora_spec = make_lora_spec(settings)
        trainable = choose_trainable(settings, model, lora_spec)
        skips_overflow = make_loss_scaler(settings, runtime.fp16).is_used and settings.drop_overflow_update
        step = build_step(
            settings, runtime, model, trainable, flash_attention=self.flash, skips_overflow=skips_overflow,
            saves_base_model=not settings.use_lora or lora_spec.trainable_model,
            rates=make_rates(settings, [p.name for p in trainable], lora_spec),
        )  # fmt: skip
        return step, StepScalars(1024.0, 1 / 1024, 1.0, make_optimizer(settings).numbers(1, 1e-4), 1e-4)

    def _latents(self, count: int) -> Tensor:
        return zeros(count, *latent_shape(self.config, self.pixels, self.pixels))

    def _sampling_model(self) -> StableDiffusion:
        model = _load(self.config)
        loading.set_up_sampling(model, self.runtime.compute_dtype, self.flash)
        return model


def _load(config: ModelConfig) -> StableDiffusion:
    """Build the networks as the scripts do, without reading a checkpoint."""
    with patch.multiple(
        loading, open_base_model=lambda *_: _NoCheckpoint, check_metadata=lambda *_: None,
        load_base_model=lambda *_, **__: "no weights, for a dry run",
    ):  # fmt: skip
        return loading.load_model(config, "")


class _NoCheckpoint:
    metadata: dict[str, str] = {}


def set_up(settings: TrainSettings) -> Runtime:
    """Set up MindSpore as `ldm.training.setup.begin` does."""
    return setup_runtime(
        settings.device_target, settings.mode, settings.jit_level, settings.precision, settings.seed,
        settings.use_parallel,
    )  # fmt: skip


def compile_graphs(graphs: Graphs, names: Sequence[str]) -> Iterator[tuple[str, int, float]]:
    """Compile and run graphs. Yields the name, the peak memory in bytes and the seconds of each."""
    for name in names:
        call = getattr(graphs, name)()
        ms.runtime.empty_cache()
        ms.runtime.reset_peak_memory_stats()
        began = time.perf_counter()
        begin_graph()
        call()
        ms.runtime.synchronize()
        yield name, ms.runtime.max_memory_allocated(), time.perf_counter() - began


def main() -> None:
    names, *argv = sys.argv[1:]
    settings = read_settings(TrainSettings, argv, yaml_flag="train_config")
    graphs = Graphs(settings, set_up(settings))
    for name, peak_bytes, seconds in compile_graphs(graphs, names.split(",")):
        end_graph(name, peak_bytes, seconds)
    sys.stdout.flush()
    os._exit(0)  # MindSpore's own end may wait for a device


if __name__ == "__main__":
    main()
