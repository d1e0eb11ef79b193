"""This project's side of a workload, started by run.py.

python -m tools.benchmark.ours NAME
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from tools.benchmark.worker import Turns

turns = Turns() if __name__ == "__main__" else None  # the tests import this

import numpy as np  # noqa: E402

from ldm.runtime.device import current_runtime, setup_runtime  # noqa: E402  isort: skip

import mindspore as ms  # noqa: E402
from mindspore import Tensor, nn  # noqa: E402

from ldm.data.batches import BatchOrder  # noqa: E402
from ldm.data.dataset import read_image_text_csv  # noqa: E402
from ldm.data.preparation import data_of_rows  # noqa: E402
from ldm.diffusion.loss import DiffusionLoss  # noqa: E402
from ldm.diffusion.sampling import Sampling  # noqa: E402
from ldm.diffusion.schedule import NoiseSchedule  # noqa: E402
from ldm.generation.loading import set_up_sampling  # noqa: E402
from ldm.generation.pipeline import Pipeline  # noqa: E402
from ldm.generation.source_image import HiresFix  # noqa: E402
from ldm.generation.tiling import run_tiled  # noqa: E402
from ldm.lora.inject import get_lora, inject_lora  # noqa: E402
from ldm.lora.merge import merge_lora  # noqa: E402
from ldm.lora.spec import LoRASpec  # noqa: E402
from ldm.models.autoencoder import AutoencoderKL, VAEDecode  # noqa: E402
from ldm.models.stable_diffusion import DiffusionWrapper, StableDiffusion, build_model  # noqa: E402
from ldm.models.text_encoder import CLIPTextEncoder  # noqa: E402
from ldm.models.unet import UNetModel  # noqa: E402
from ldm.settings.model import ModelConfig, load_model_config  # noqa: E402
from ldm.settings.train import TrainSettings  # noqa: E402
from ldm.training.graph_cache import cached_graphs, graph_key  # noqa: E402
from ldm.training.inputs import Inputs  # noqa: E402
from ldm.training.optimizers import adamw_scalars  # noqa: E402
from ldm.training.step import StepScalars, TrainStep  # noqa: E402
from ldm.weights.load import load_base_model  # noqa: E402
from tools.benchmark import works  # noqa: E402
from tools.benchmark.inputs import PROMPT, draw_images, draw_inputs, draw_mask, long_texts, write_images  # noqa: E402
from tools.benchmark.works import WORKS, Work  # noqa: E402


class UNetAlone(nn.Cell):
    """The UNet with its full parameter names, which LoRA targets use."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.model = DiffusionWrapper(UNetModel(**config.unet))


def frozen(net: nn.Cell) -> nn.Cell:
    net.set_train(False)
    for parameter in net.get_parameters():
        parameter.requires_grad = False
    return net


def in_precision(net: nn.Cell) -> nn.Cell:
    """Hold the frozen weights of a network in the type of --precision, as both scripts do, and return it."""
    runtime = current_runtime()
    # set_up_sampling sets up the UNet and the text encoder of a whole model. This may be either, or both.
    networks = SimpleNamespace(model=net, cond_stage_model=net)
    set_up_sampling(networks, runtime.compute_dtype if runtime else ms.float32, flash_attention=False)
    return net


def built_model(config: ModelConfig, random: bool = True) -> StableDiffusion:
    """Build a whole model as it generates: the VAE computes in fp32 in every precision."""
    model = build_model(config, random=random)
    in_precision(model.model)
    in_precision(model.cond_stage_model)
    return model


def train_step(config: ModelConfig, unet: UNetModel, full: bool, checkpointing: bool = False) -> TrainStep:
    """Build the step of train_text_to_image.py for this workload."""
    if full:
        trainable = list(unet.get_parameters())
    else:
        inject_lora(unet, LoRASpec(rank=works.RANK))
        trainable = list(unet.trainable_params())
    schedule = NoiseSchedule.from_config(config)
    loss = DiffusionLoss(unet, schedule, config.prediction_type)
    return TrainStep(loss, trainable, clip=True, gradient_checkpointing=checkpointing)


def scalars(step: int) -> StepScalars:
    return StepScalars(1.0, 1.0, 1.0, adamw_scalars(step, 1e-4, (0.9, 0.999), 1e-8, 0.01), 0.0)


def unet(work: Work, config: ModelConfig) -> Callable:
    net, given = in_precision(frozen(UNetModel(**config.unet))), draw_inputs(config, work)
    inputs = [Tensor(given[name]) for name in ("latents", "timesteps", "text_embeddings")]
    return lambda: net(*inputs).asnumpy()


def lora(work: Work, config: ModelConfig, full: bool = False, checkpointing: bool = False) -> Callable:
    unet = frozen(UNetAlone(config)).model.diffusion_model
    if not full:
        in_precision(unet)
    step, given = train_step(config, unet, full, checkpointing), draw_inputs(config, work)
    batch = tuple(Tensor(given[name]) for name in ("latents", "noise", "timesteps", "text_embeddings"))
    numbers = itertools.count(1)
    return lambda: step([batch], scalars(next(numbers))).read()


def first_step_cached(work: Work, config: ModelConfig, folder: Path) -> Callable:
    """Build the first step, whose graph is written to a cache or read from it."""
    call = lora(work, config)

    def cached() -> None:
        with cached_graphs(folder, graph_key(work.name)):
            call()

    return cached


def epoch(work: Work, config: ModelConfig) -> Callable:
    """Build an epoch without loading weights: reading and encoding images and captions, compiling, and all steps."""
    model, size = built_model(config), work.size * config.vae_factor

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "data"
            write_images(data, size)
            settings = TrainSettings(output_path=f"{folder}/output", train_batch_size=work.batch, image_size=size)
            rows = read_image_text_csv(data).rows
            order = BatchOrder(len(rows), work.batch, works.SEED)
            step = train_step(config, model.model.diffusion_model, full=False)
            inputs = Inputs(settings, model, data_of_rows(rows, size, settings), order)
            for i in range(order.steps_per_epoch):
                step([tuple(Tensor(array) for array in inputs.batch(i).arrays())], scalars(i + 1)).read()

    return run


def generate(
    work: Work,
    config: ModelConfig,
    merged: bool = False,
    sampler: str = "dpm_solver_pp",
    long_prompts: bool = False,
) -> Callable:
    """Build a generation from prompts: text encoding, sampling, decoding."""
    model, size = built_model(config), work.size * config.vae_factor
    if merged:
        source = build_model(config)
        inject_lora(source, LoRASpec(rank=works.RANK))
        merge_lora(model, get_lora(source, config), 1.0, "benchmark")
    pipeline = Pipeline(model)
    sampling = Sampling(
        sampler=sampler, num_inference_steps=works.STEPS, guidance_scale=works.SCALE, batch_size=work.batch,
        height=size, width=size,
    )  # fmt: skip
    prompts = [f"{PROMPT} {i}" for i in range(work.batch)]
    if long_prompts:
        pipeline.configure_prompts(support_long_prompts=True)
        prompts = long_texts(prompts)
    return lambda: list(pipeline.generate(prompts, sampling, works.SEED, progress=False))


def from_image(work: Work, config: ModelConfig, masked: bool = False) -> Callable:
    """Build image-to-image, or inpainting with a model of four channels."""
    pipeline, images = Pipeline(built_model(config)), draw_images(config, work)
    mask = draw_mask(config, work) if masked else None
    prompts = [f"{PROMPT} {i}" for i in range(work.batch)]
    return lambda: pipeline(
        prompts, num_inference_steps=works.STEPS, guidance_scale=works.SCALE, batch_size=work.batch, seed=works.SEED,
        height=images[0].height, width=images[0].width, image=images, mask=mask, strength=works.STRENGTH,
        progress=False,
    )  # fmt: skip


def hires(work: Work, config: ModelConfig) -> Callable:
    """Build the two passes of a hires fix, whose second begins from the enlarged latents of the first."""
    pipeline, side = Pipeline(built_model(config)), work.size * config.vae_factor
    prompts = [f"{PROMPT} {i}" for i in range(work.batch)]
    second_pass = HiresFix(works.HIRES_SCALE, works.STRENGTH)
    return lambda: pipeline(
        prompts, num_inference_steps=works.STEPS, guidance_scale=works.SCALE, batch_size=work.batch, seed=works.SEED,
        height=side, width=side, hires=second_pass, progress=False,
    )  # fmt: skip


def tiled(work: Work, config: ModelConfig) -> Callable:
    """Build the decoding of a large image in tiles of the side that diffusers has."""
    net, latents = VAEDecode(frozen(AutoencoderKL(**config.vae))), draw_inputs(config, work)["latents"]
    return lambda: run_tiled(net, latents, works.TILE // config.vae_factor, into=config.vae_factor)


def decode(work: Work, config: ModelConfig) -> Callable:
    net = VAEDecode(frozen(AutoencoderKL(**config.vae)))
    latents = Tensor(draw_inputs(config, work)["latents"])
    return lambda: net(latents).asnumpy()


def text(work: Work, config: ModelConfig) -> Callable:
    net, tokens = in_precision(frozen(CLIPTextEncoder(**config.text))), Tensor(draw_inputs(config, work)["tokens"])
    return lambda: net(tokens).asnumpy()


def load(work: Work, config: ModelConfig, folder: Path) -> Callable:
    """Build what both scripts do first: make the networks and load a checkpoint into them."""

    def run() -> None:
        load_base_model(built_model(config, random=False), folder / "model")

    return run


KINDS: dict[str, Callable[..., Callable]] = {
    "unet": unet, "lora": lora, "full": partial(lora, full=True),
    "checkpointed": partial(lora, checkpointing=True), "epoch": epoch, "generate": generate,
    "merged": partial(generate, merged=True), "euler_a": partial(generate, sampler="euler_a"),
    "long_prompts": partial(generate, long_prompts=True), "hires": hires,
    "image_to_image": from_image, "inpainting": partial(from_image, masked=True), "tiled": tiled, "decode": decode,
    "text": text, "first_step": lora, "first_step_cached": first_step_cached,
    "load": load,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work")
    parser.add_argument("--kind", help="instead of the workload's")
    parser.add_argument("--folder", type=Path, help="the cache folder of first_step_cached; what run.py prepared")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    args = parser.parse_args()
    if setup_runtime("CPU", precision=args.precision, seed=works.SEED).precision != args.precision:
        sys.exit(f"this project has no precision {args.precision} on the CPU")
    work = WORKS[args.work]
    kind = args.kind or work.kind
    extra = {"folder": args.folder} if kind in ("first_step_cached", "load") else {}
    call = KINDS[kind](work, load_model_config(work.config), **extra)
    turns.serve(call, {"mindspore": ms.__version__, "numpy": np.__version__})


if __name__ == "__main__":
    main()
