"""The inputs of the workloads, the same for both sides."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.settings.model import ModelConfig
from tools.benchmark.works import EPOCH_IMAGES, LONG_PROMPT_CHUNKS, SEED, Work

PROMPT = "an image of the number"


def draw_inputs(config: ModelConfig, work: Work) -> dict[str, np.ndarray]:
    """Return latents and noise (N, C, h, w), text embeddings (N, 77, D), timesteps (N,) and tokens (N, 77), int32."""
    random = np.random.default_rng(SEED)
    shape = (work.batch, config.latent_channels, work.size, work.size)
    return {
        "latents": random.standard_normal(shape, np.float32),
        "noise": random.standard_normal(shape, np.float32),
        "text_embeddings": random.standard_normal((work.batch, 77, config.context_dim), np.float32),
        "timesteps": random.integers(0, config.timesteps, work.batch, np.int32),
        "tokens": draw_tokens(work.batch),
    }


def draw_tokens(count: int) -> np.ndarray:
    """Return tokens (count, 77), int32. The end token is last, where transformers looks for it."""
    tokens = np.random.default_rng(SEED).integers(0, 49000, (count, 77), np.int32)
    tokens[:, 0], tokens[:, -1] = 49406, 49407
    return tokens


def long_texts(prompts: list[str]) -> list[str]:
    """Return prompts of LONG_PROMPT_CHUNKS chunks, whose last chunk is half full. PROMPT has five tokens."""
    words = " ".join([PROMPT] * ((75 * LONG_PROMPT_CHUNKS - 37) // 5))
    return [f"{words} {prompt}" for prompt in prompts]


def draw_images(config: ModelConfig, work: Work) -> list[Image.Image]:
    """Return one image of noise for each of the batch."""
    random, side = np.random.default_rng(SEED), work.size * config.vae_factor
    return [Image.fromarray(random.integers(0, 256, (side, side, 3), np.uint8)) for _ in range(work.batch)]


def draw_mask(config: ModelConfig, work: Work) -> Image.Image:
    """Return a mask whose right half is painted anew."""
    side = work.size * config.vae_factor
    mask = np.zeros((side, side), np.uint8)
    mask[:, side // 2 :] = 255
    return Image.fromarray(mask)


def write_images(folder: Path, size: int) -> None:
    """Write a data set of EPOCH_IMAGES PNG files of noise, each with its own caption."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(SEED)
    with open(folder / "img_txt.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("dir", "text"))
        for i in range(EPOCH_IMAGES):
            Image.fromarray(random.integers(0, 256, (size, size, 3), np.uint8)).save(folder / f"{i}.png")
            writer.writerow((f"{i}.png", f"{PROMPT} {i}"))
