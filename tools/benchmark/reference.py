"""diffusers' side of a workload, started by run.py in an environment with torch, diffusers and transformers.

    python -m tools.benchmark.reference NAME [--precision bf16] [--compile] [--folder FOLDER] [--image IMAGE]

Prompts are given as tokens, because tokenizing takes no time worth measuring. LoRA is PEFT's arithmetic without its
wrappers: x W^T + b + (x A^T) B^T * scale.

In bf16, the networks are in bf16 as from_pretrained(torch_dtype=torch.bfloat16) has them. Training does as diffusers'
LoRA script with mixed_precision bf16: frozen networks in bf16, the LoRA and AdamW in fp32, under autocast. With
--compile, the network that computes is torch.compile's in its default mode.
"""

from __future__ import annotations

import argparse
import csv
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tools.benchmark.worker import Turns

turns = Turns() if __name__ == "__main__" else None  # the tests import this

import diffusers  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler  # noqa: E402
from PIL import Image  # noqa: E402
from torch import nn  # noqa: E402

from ldm.settings.model import ModelConfig, load_model_config  # noqa: E402
from tests.parity.reference import reference_text_encoder, reference_unet, reference_vae  # noqa: E402
from tools.benchmark import works  # noqa: E402
from tools.benchmark.inputs import PROMPT, draw_images, draw_inputs, draw_mask, draw_tokens, write_images  # noqa: E402
from tools.benchmark.works import WORKS, Work  # noqa: E402

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
MODEL = "model"  # in --folder: the diffusers folder that scripts and loading read
LORA_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class Variant:
    """How PyTorch computes."""

    dtype: torch.dtype = torch.float32
    compiled: bool = False

    def frozen(self, net: nn.Module) -> nn.Module:
        """Return a network without gradients, in this type."""
        net.requires_grad_(False)
        return net.eval().to(self.dtype)

    def compile(self, call: Any) -> Any:
        """Return a network or a function with torch.compile, or as it is."""
        return torch.compile(call) if self.compiled else call

    def autocast(self) -> torch.autocast:
        """Return what the forward pass of a training runs under."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16)


class LoRALinear(nn.Module):
    """A linear layer with a LoRA."""

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x)) * 1.0


def inject_lora(unet: nn.Module) -> list[nn.Parameter]:
    """Replace the attention projections by LoRA layers, and return their parameters."""
    names = [
        name
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(LORA_LAYERS) and "transformer_blocks" in name
    ]
    for name in names:
        parent, _, last = name.rpartition(".")
        layer = LoRALinear(unet.get_submodule(name), works.RANK)
        setattr(unet.get_submodule(parent), last, layer)
    return [p for p in unet.parameters() if p.requires_grad]


def scheduler(cls: type, config: ModelConfig, **settings: Any) -> Any:
    return cls(
        num_train_timesteps=config.timesteps,
        beta_start=config.linear_start,
        beta_end=config.linear_end,
        beta_schedule=config.beta_schedule,
        prediction_type=config.prediction_type,
        **settings,
    )


class TrainStep:
    """The step of diffusers' train_text_to_image(_lora).py: noise, prediction, loss, clipping, AdamW."""

    def __init__(self, config: ModelConfig, variant: Variant, full: bool):
        unet = reference_unet(config).requires_grad_(full)
        if not full:
            unet.to(variant.dtype)  # before the LoRA, which stays in fp32
        self.trained = list(unet.parameters()) if full else inject_lora(unet)
        self.unet = variant.compile(unet.train())
        self.variant = variant
        self.noise = scheduler(DDPMScheduler, config)
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, weight_decay=0.01)

    def __call__(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, text_embeddings: torch.Tensor
    ) -> float:
        noisy_latents = self.noise.add_noise(latents, noise, timesteps)
        target = noise
        if self.noise.config.prediction_type == "v_prediction":
            target = self.noise.get_velocity(latents, noise, timesteps)
        with self.variant.autocast():
            prediction = self.unet(noisy_latents, timesteps, text_embeddings, return_dict=False)[0]
        loss = nn.functional.mse_loss(prediction.float(), target.float(), reduction="mean")
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def given(config: ModelConfig, work: Work, variant: Variant, *names: str) -> list[torch.Tensor]:
    """Return the named inputs. Integers are int64, as PyTorch's embeddings need them."""
    inputs = {name: torch.from_numpy(array) for name, array in draw_inputs(config, work).items()}
    return [inputs[name].to(torch.int64 if name in ("timesteps", "tokens") else variant.dtype) for name in names]


def unet(work: Work, config: ModelConfig, variant: Variant) -> Callable:
    net = variant.compile(variant.frozen(reference_unet(config)))
    inputs = given(config, work, variant, "latents", "timesteps", "text_embeddings")
    return torch.no_grad()(lambda: net(*inputs).sample)


def lora(work: Work, config: ModelConfig, variant: Variant, full: bool = False) -> Callable:
    step = TrainStep(config, variant, full)
    inputs = given(config, work, variant, "latents", "noise", "timesteps", "text_embeddings")
    return lambda: step(*inputs)


def epoch(work: Work, config: ModelConfig, variant: Variant) -> Callable:
    """Build the loop of train_text_to_image_lora.py, where every step encodes its images and captions."""
    vae, encoder = variant.frozen(reference_vae(config)), variant.frozen(reference_text_encoder(config))
    step, size = TrainStep(config, variant, full=False), work.size * config.vae_factor

    def image(path: Path) -> torch.Tensor:
        with Image.open(path) as image:
            return torch.from_numpy(np.asarray(image.convert("RGB"), np.float32) / 127.5 - 1).permute(2, 0, 1)

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "data"
            write_images(data, size)
            with open(data / "img_txt.csv", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            tokens = torch.from_numpy(draw_tokens(len(rows))).long()
            for batch in torch.randperm(len(rows)).split(work.batch):
                pixels = torch.stack([image(data / rows[i]["dir"]) for i in batch]).to(variant.dtype)
                with torch.no_grad():
                    latents = vae.encode(pixels).latent_dist.sample() * config.scale_factor
                    text_embeddings = encoder(tokens[batch], return_dict=False)[0]
                timesteps = torch.randint(0, config.timesteps, (len(batch),))
                step(latents, torch.randn_like(latents), timesteps, text_embeddings)

    return run


def generate(work: Work, config: ModelConfig, variant: Variant, ancestral: bool = False, chunks: int = 1) -> Callable:
    from diffusers import StableDiffusionPipeline  # imports much that the other workloads do not need

    size = work.size * config.vae_factor
    scheduler_class = EulerAncestralDiscreteScheduler if ancestral else DPMSolverMultistepScheduler
    pipeline = _pipeline(StableDiffusionPipeline, config, variant, scheduler_class)
    return torch.no_grad()(lambda: pipeline(**_arguments(work, pipeline, chunks), height=size, width=size))


def hires(work: Work, config: ModelConfig, variant: Variant) -> Callable:
    """Build the two passes from diffusers' parts, which has no pipeline of that kind."""
    from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

    size = work.size * config.vae_factor
    first = _pipeline(StableDiffusionPipeline, config, variant, DPMSolverMultistepScheduler)
    second = StableDiffusionImg2ImgPipeline(**first.components, requires_safety_checker=False)
    second.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def run() -> None:
        arguments = _arguments(work, first)
        latents = first(**{**arguments, "output_type": "latent"}, height=size, width=size).images
        larger = nn.functional.interpolate(latents, scale_factor=works.HIRES_SCALE, mode="bilinear")
        second(**arguments, image=larger, strength=works.STRENGTH)

    return run


def from_image(work: Work, config: ModelConfig, variant: Variant, masked: bool = False) -> Callable:
    from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline

    images = draw_images(config, work)
    inputs: dict[str, Any] = {"image": images, "strength": works.STRENGTH}
    if masked:
        inputs.update(mask_image=draw_mask(config, work), height=images[0].height, width=images[0].width)
    pipeline_class = StableDiffusionInpaintPipeline if masked else StableDiffusionImg2ImgPipeline
    pipeline = _pipeline(pipeline_class, config, variant, DPMSolverMultistepScheduler)
    return torch.no_grad()(lambda: pipeline(**_arguments(work, pipeline), **inputs))


def _pipeline(pipeline_class: type, config: ModelConfig, variant: Variant, scheduler_class: type) -> Any:
    pipeline = pipeline_class(
        vae=variant.frozen(reference_vae(config)),
        text_encoder=variant.frozen(reference_text_encoder(config)),
        tokenizer=None,
        unet=variant.compile(variant.frozen(reference_unet(config))),
        scheduler=scheduler(scheduler_class, config, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _arguments(work: Work, pipeline: Any, chunks: int = 1) -> dict[str, Any]:
    """Encode the prompts, each of so many chunks, and return the arguments of a call.

    The empty prompt is encoded once, as in this project. diffusers itself encodes it for every prompt.
    """
    tokens = torch.from_numpy(draw_tokens(work.batch * chunks + 1)).long()
    embeddings = pipeline.text_encoder(tokens, return_dict=False)[0]
    return {
        "prompt_embeds": embeddings[:-1].reshape(work.batch, -1, embeddings.shape[-1]),
        "negative_prompt_embeds": embeddings[-1:].repeat(work.batch, chunks, 1),
        "num_inference_steps": works.STEPS,
        "guidance_scale": works.SCALE,
        "output_type": "np",
    }


def tiled(work: Work, config: ModelConfig, variant: Variant) -> Callable:
    net, (latents,) = variant.frozen(reference_vae(config)), given(config, work, variant, "latents")
    net.enable_tiling()
    net.tile_sample_min_size, net.tile_latent_min_size = works.TILE, works.TILE // config.vae_factor
    decode = variant.compile(net.decode)
    return torch.no_grad()(lambda: decode(latents).sample)


def decode(work: Work, config: ModelConfig, variant: Variant) -> Callable:
    net, (latents,) = variant.frozen(reference_vae(config)), given(config, work, variant, "latents")
    decode = variant.compile(net.decode)
    return torch.no_grad()(lambda: decode(latents).sample)


def text(work: Work, config: ModelConfig, variant: Variant) -> Callable:
    net = variant.compile(variant.frozen(reference_text_encoder(config)))
    (tokens,) = given(config, work, variant, "tokens")
    return torch.no_grad()(lambda: net(tokens).last_hidden_state)


def load(work: Work, config: ModelConfig, variant: Variant, folder: Path) -> Callable:
    from diffusers import StableDiffusionPipeline

    return lambda: StableDiffusionPipeline.from_pretrained(folder / MODEL, torch_dtype=variant.dtype)


def script(work: Work, config: ModelConfig, variant: Variant, folder: Path, image: Path) -> None:
    """Do what text_to_image.py does: load a model, generate one image and write it."""
    pipeline = load(work, config, variant, folder)()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet = variant.compile(pipeline.unet)
    generator = torch.Generator().manual_seed(works.SEED)
    side = work.size * config.vae_factor
    arguments = {"num_inference_steps": works.STEPS, "guidance_scale": works.SCALE, "generator": generator}
    pipeline(PROMPT, height=side, width=side, **arguments).images[0].save(image)


KINDS = {
    "unet": unet, "lora": lora, "full": partial(lora, full=True), "epoch": epoch, "generate": generate,
    "euler_a": partial(generate, ancestral=True),
    "long_prompts": partial(generate, chunks=works.LONG_PROMPT_CHUNKS), "hires": hires, "image_to_image": from_image,
    "inpainting": partial(from_image, masked=True), "tiled": tiled, "decode": decode, "text": text,
    "load": load,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--folder", type=Path, help="what run.py prepared, and where torch.compile keeps its code")
    parser.add_argument("--image", type=Path, help="the PNG of a script")
    args = parser.parse_args()
    if args.folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(args.folder / f"inductor-{args.precision}")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(works.SEED)
    work, variant = WORKS[args.work], Variant(PRECISIONS[args.precision], args.compile)
    config = load_model_config(work.config)
    if work.kind == "script":
        script(work, config, variant, args.folder, args.image)
        return
    extra = {"folder": args.folder} if work.kind == "load" else {}
    call = KINDS[work.kind](work, config, variant, **extra)
    turns.serve(
        call, {"torch": torch.__version__, "diffusers": diffusers.__version__, "transformers": transformers.__version__}
    )


if __name__ == "__main__":
    main()
