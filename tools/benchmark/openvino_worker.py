"""OpenVINO's side of a workload, started by run.py in an environment with openvino, torch, diffusers and transformers.

    python -m tools.benchmark.openvino_worker NAME [--precision bf16] [--folder FOLDER] [--image IMAGE | --convert]

The networks are diffusers', converted with fixed shapes. Scripts and loading read what --convert wrote to the folder in
OpenVINO's own form, with weights in fp16, the default of its save_model. INFERENCE_PRECISION_HINT says in what it
computes: without it, a processor with AMX computes in bf16.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tools.benchmark.worker import Turns

turns = Turns() if __name__ == "__main__" else None  # the tests import this

import numpy as np  # noqa: E402
import openvino as ov  # noqa: E402
import torch  # noqa: E402
from diffusers import DPMSolverMultistepScheduler  # noqa: E402
from PIL import Image  # noqa: E402
from torch import nn  # noqa: E402

from ldm.settings.model import ModelConfig, load_model_config  # noqa: E402
from tools.benchmark import works  # noqa: E402
from tools.benchmark.inputs import PROMPT, draw_inputs, draw_tokens  # noqa: E402
from tools.benchmark.reference import (  # noqa: E402
    MODEL,
    reference_text_encoder,
    reference_unet,
    reference_vae,
    scheduler,
)
from tools.benchmark.works import WORKS, Work  # noqa: E402

HINTS = {"fp32": "f32", "bf16": "bf16"}
CONVERTED = "openvino"  # in --folder
NETWORKS = ("text_encoder", "unet", "decoder")

Network = Callable[..., np.ndarray]


class Function(nn.Module):
    """A call of a network whose arguments and result are tensors."""

    def __init__(self, net: nn.Module, call: Callable[..., torch.Tensor]):
        super().__init__()
        self.net, self.call = net, call

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.call(self.net, *inputs)


def predict(net: nn.Module, latents: torch.Tensor, timesteps: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
    return net(latents, timesteps, embeddings, return_dict=False)[0]


def decode_latents(net: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    return net.decode(latents, return_dict=False)[0]


def encode_tokens(net: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return net(tokens, return_dict=False)[0]


def convert(net: nn.Module, call: Callable[..., torch.Tensor], *inputs: np.ndarray) -> ov.Model:
    """Return OpenVINO's form of a network, for the shapes of these inputs."""
    example = tuple(torch.from_numpy(array) for array in inputs)
    with torch.no_grad():
        model = ov.convert_model(Function(net.requires_grad_(False).eval(), call), example_input=example)
    model.reshape({port: array.shape for port, array in zip(model.inputs, inputs)})
    return model


def has_bf16() -> bool:
    """Tell whether OpenVINO computes in bf16 on this processor. Elsewhere, the hint has no effect."""
    return "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def compile_network(model: ov.Model | Path, precision: str) -> Network:
    """Return a function of arrays."""
    settings = {"INFERENCE_PRECISION_HINT": HINTS[precision], "INFERENCE_NUM_THREADS": len(os.sched_getaffinity(0))}
    compiled = ov.Core().compile_model(model, "CPU", settings)
    computes = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if computes != HINTS[precision]:
        sys.exit(f"OpenVINO computes in {computes}, not in {HINTS[precision]}")
    return lambda *inputs: compiled(inputs)[0]


def converted_networks(work: Work, config: ModelConfig, nets: dict[str, nn.Module]) -> dict[str, ov.Model]:
    """Return the networks of a generation with guidance in OpenVINO's form."""
    latents, timesteps, embeddings = unet_inputs(config, work)
    pair = (np.concatenate([array, array]) for array in (latents, timesteps, embeddings))
    tokens = prompt_tokens(work)
    return {
        "text_encoder": convert(nets["text_encoder"], encode_tokens, tokens),
        "unet": convert(nets["unet"], predict, *pair),
        "decoder": convert(nets["vae"], decode_latents, latents),
    }


def unet_inputs(config: ModelConfig, work: Work) -> list[np.ndarray]:
    given = draw_inputs(config, work)
    return [given["latents"], given["timesteps"].astype(np.int64), given["text_embeddings"]]


def prompt_tokens(work: Work) -> np.ndarray:
    """Return the tokens (N + 1, 77) of the prompts and of the empty prompt."""
    return draw_tokens(work.batch + 1).astype(np.int64)


def unet(work: Work, config: ModelConfig, precision: str) -> Callable:
    inputs = unet_inputs(config, work)
    net = compile_network(convert(reference_unet(config), predict, *inputs), precision)
    return lambda: net(*inputs)


def decode(work: Work, config: ModelConfig, precision: str) -> Callable:
    latents = draw_inputs(config, work)["latents"]
    net = compile_network(convert(reference_vae(config), decode_latents, latents), precision)
    return lambda: net(latents)


def generate(work: Work, config: ModelConfig, precision: str) -> Callable:
    """Build a generation from tokens: text encoding, sampling, decoding."""
    nets = {
        "text_encoder": reference_text_encoder(config), "unet": reference_unet(config), "vae": reference_vae(config),
    }  # fmt: skip
    models = converted_networks(work, config, nets)
    networks = {name: compile_network(model, precision) for name, model in models.items()}
    return lambda: sample(work, config, networks, prompt_tokens(work))


def sample(work: Work, config: ModelConfig, networks: dict[str, Network], tokens: np.ndarray) -> np.ndarray:
    """Return images (N, 3, H, W) from -1 to 1 of tokens (N + 1, 77), the last of which are the empty prompt's."""
    steps = scheduler(DPMSolverMultistepScheduler, config, steps_offset=1)
    steps.set_timesteps(works.STEPS)
    encoded = networks["text_encoder"](tokens)
    embeddings = np.concatenate([np.repeat(encoded[-1:], work.batch, 0), encoded[:-1]])
    latents = torch.from_numpy(draw_inputs(config, work)["latents"]) * steps.init_noise_sigma
    for timestep in steps.timesteps:
        pair = steps.scale_model_input(torch.cat([latents, latents]), timestep).numpy()
        prediction = networks["unet"](pair, np.full(len(pair), timestep, np.int64), embeddings)
        without, with_prompt = np.split(prediction, 2)
        guided = without + works.SCALE * (with_prompt - without)
        latents = steps.step(torch.from_numpy(guided), timestep, latents, return_dict=False)[0]
    return networks["decoder"](latents.numpy() / config.scale_factor)


def write_converted(work: Work, config: ModelConfig, folder: Path) -> None:
    """Convert the model that run.py wrote."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder / MODEL)
    nets = {name: getattr(pipeline, name) for name in ("text_encoder", "unet", "vae")}
    for name, model in converted_networks(work, config, nets).items():
        ov.save_model(model, folder / CONVERTED / f"{name}.xml")


def read_converted(folder: Path, precision: str) -> dict[str, Network]:
    return {name: compile_network(folder / CONVERTED / f"{name}.xml", precision) for name in NETWORKS}


def load(work: Work, config: ModelConfig, precision: str, folder: Path) -> Callable:
    return lambda: read_converted(folder, precision)


def script(work: Work, config: ModelConfig, precision: str, folder: Path, path: Path) -> None:
    """Do what text_to_image.py does: load a model, generate one image and write it."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder / MODEL / "tokenizer")
    tokens = tokenizer([PROMPT, ""], padding="max_length", truncation=True, max_length=77, return_tensors="np")
    images = sample(work, config, read_converted(folder, precision), tokens["input_ids"].astype(np.int64))
    pixels = np.clip((images[0] + 1) * 127.5 + 0.5, 0, 255).astype(np.uint8)
    Image.fromarray(pixels.transpose(1, 2, 0)).save(path)


KINDS: dict[str, Callable[..., Callable]] = {"unet": unet, "generate": generate, "decode": decode, "load": load}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work")
    parser.add_argument("--precision", choices=HINTS, default="fp32")
    parser.add_argument("--folder", type=Path, help="what run.py prepared")
    parser.add_argument("--image", type=Path, help="the PNG of a script")
    parser.add_argument("--convert", action="store_true", help="write the model of --folder in OpenVINO's form")
    args = parser.parse_args()
    if args.precision == "bf16" and not has_bf16():
        sys.exit("OpenVINO has no bf16 on this processor")
    torch.manual_seed(works.SEED)
    work = WORKS[args.work]
    config = load_model_config(work.config)
    if args.convert:
        write_converted(work, config, args.folder)
    elif work.kind == "script":
        script(work, config, args.precision, args.folder, args.image)
    else:
        extra: dict[str, Any] = {"folder": args.folder} if work.kind == "load" else {}
        call = KINDS[work.kind](work, config, args.precision, **extra)
        gc.collect()  # PyTorch's networks
        turns.serve(call, {name: version(name) for name in ("diffusers", "openvino", "torch", "transformers")})


if __name__ == "__main__":
    main()
