"""CLIP score: how well images fit their prompts, 100 max(cos, 0) between the features of both, averaged.

    python tools/eval/eval_clip_score.py --image_path_or_dir I --prompt_or_path P --ckpt_path C
    python tools/eval/eval_clip_score.py --image_path_or_dir I --real_image_path_or_dir R --ckpt_path C

I: an image or a folder of them, sorted by name. P: a prompt, or a text file with one a line; k images a prompt are
paired in order. Left out, it is the prompts.txt beside this project's samples. C: a Hugging Face folder, or OpenAI's,
OpenCLIP's or mindone's file; left out, the embedded nano CLIP scores. With R the images are compared with real ones,
in pairs and all with all: the CLIP image-to-image score. tools/eval/README.md says what the scores can and cannot say.
"""

# ruff: noqa: UP007, UP045 (the annotations are read when it runs, on Python 3.9 too)
from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ldm.runtime.script import describe_progress, run_script, start_script  # noqa: E402

if __name__ == "__main__":
    start_script()

from ldm.errors import UserError, plain  # noqa: E402
from ldm.files.documents import valid_text  # noqa: E402
from ldm.files.inputs import is_there  # noqa: E402
from ldm.files.outputs import claim_file  # noqa: E402
from ldm.files.paths import expanded  # noqa: E402
from ldm.files.prompts import read_prompts  # noqa: E402
from ldm.metrics.clip_score import clip_scores, mean_of_all_pairs, paired_prompts  # noqa: E402
from ldm.metrics.image_files import find_images  # noqa: E402
from ldm.metrics.preprocessing import CLIP_PREPROCESSING  # noqa: E402
from ldm.metrics.report import (  # noqa: E402
    ENOUGH_IMAGES,
    describe_broken,
    describe_network,
    print_broken,
    print_network,
    write_json,
)
from ldm.settings.declare import MOST_NETWORK_BATCH, REQUIRED, setting  # noqa: E402
from ldm.settings.read import read_settings  # noqa: E402

LONGEST_PATH, LONGEST_NAME = 4095, 255  # bytes, on Linux


@dataclass
class Settings:
    """The command line."""

    image_path_or_dir: str = setting(
        REQUIRED, "an image, or a folder of images", path=True, aliases=("gen_image_path_or_dir",)
    )
    prompt_or_path: Optional[str] = setting(None, "a prompt, or a text file with one in each line")
    real_image_path_or_dir: Optional[str] = setting(
        None, "compare with these images instead of with prompts", path=True
    )
    ckpt_path: Optional[str] = setting(
        None,
        "CLIP weights: a Hugging Face folder, or a .safetensors, .bin, .pt or .ckpt file; None for the embedded nano "
        "CLIP",
        path=True,
    )
    config: Optional[str] = setting(
        None, "the model's config.json or mindone's YAML, where the weights are none of the published models", path=True
    )
    model_name: Optional[str] = setting(
        None, "refuse other weights: ViT-B/32, ViT-B/16, ViT-L/14 or ViT-H/14, or Hugging Face's names of them"
    )
    preprocessing: str = setting(
        "openai",
        "openai: shorter side to 224, centre crop; squash: to 224x224 whatever the shape, as mindone does. The "
        "embedded CLIP always squashes, to 64x64",
        choices=CLIP_PREPROCESSING,
    )
    output: Optional[Path] = setting(
        None, "write the score and each image's to this JSON", path=True, aliases=("result_path",)
    )
    batch_size: int = setting(32, "images in a call of the network", low=1, high=MOST_NETWORK_BATCH)
    backend: str = setting("ms", "ms (MindSpore), the only one here")
    device_target: Optional[str] = setting(None, "Ascend or CPU; None: Ascend where there is one")


def find_prompts(given: str | None, images: Sequence[Path]) -> list[str]:
    """One prompt for each image. Raises UserError where there are none, or they do not divide."""
    if given is None:
        beside = images[0].parent / "prompts.txt"
        if not is_there(beside):
            raise UserError(
                f"--prompt_or_path is missing, and {plain(images[0].parent)} has no prompts.txt: give a "
                "prompt, or a text file with one a line"
            )
        return paired_prompts(read_prompts(beside, "prompts"), len(images))
    path = expanded(given)
    return paired_prompts(read_prompts(path, "prompt_or_path") if _names_file(path) else [given], len(images))


def _names_file(text: str) -> bool:
    """Whether a prompt_or_path is the path of a file; a prompt may be longer than a path can be."""
    raw = os.fsencode(text)
    if len(raw) > LONGEST_PATH or any(len(name) > LONGEST_NAME for name in raw.split(b"/")):
        return False
    return text.endswith(".txt") or is_there(text, "prompt_or_path")


def main(argv: Sequence[str] | None = None) -> None:
    args = read_settings(Settings, argv, description=__doc__)
    if args.backend != "ms":
        raise UserError(f"--backend {args.backend} is not here: MindSpore scores (ms)")
    if args.real_image_path_or_dir is not None and args.prompt_or_path is not None:
        raise UserError("--prompt_or_path and --real_image_path_or_dir are two scores: give one of them")
    images = find_images(args.image_path_or_dir)
    real = find_images(args.real_image_path_or_dir) if args.real_image_path_or_dir is not None else []
    prompts = [] if real else find_prompts(args.prompt_or_path, images)
    if any(valid_text(prompt) != prompt for prompt in prompts):
        raise UserError(
            f"--prompt_or_path {plain(args.prompt_or_path)} is not UTF-8 text: type it anew, or set the "
            "terminal to UTF-8"
        )
    with claim_file(args.output, "--output"):
        score(args, images, real, prompts)


def score(args: Settings, images: list[Path], real: list[Path], prompts: list[str]) -> None:
    """Score the images against the real ones, or else the prompts; print the scores and write what is wanted."""
    describe_progress(lambda: "before there was a score")
    batch_size = min(args.batch_size, max(len(images), len(real)))

    # MindSpore comes after the settings: a wrong flag is answered at once, and ldm.runtime.device quiets it.
    from ldm.runtime.device import setup_runtime

    setup_runtime(args.device_target)
    from ldm.metrics.evaluate import encode_images, prompt_scores
    from ldm.metrics.networks import clip, nano_clip

    network = (
        clip(args.ckpt_path, args.preprocessing, args.config, args.model_name)
        if args.ckpt_path is not None
        else nano_clip()
    )
    print_network(network)
    made = encode_images(images, network, batch_size)
    print_broken(made.broken, "images")
    result = {"images": len(made.indices), "broken": describe_broken(made.broken)}
    places = made.indices
    if real:
        others = encode_images(real, network, batch_size, "real images")
        print_broken(others.broken, "real images")
        result.update(
            real_images=len(others.indices),
            real_broken=describe_broken(others.broken),
            mean_of_all_pairs=mean_of_all_pairs(made.features, others.features),
        )
        scores = None
        if len(images) == len(real):
            places, ours, theirs = np.intersect1d(made.indices, others.indices, return_indices=True)
            scores = clip_scores(made.features[ours], others.features[theirs])
        print(f"images: {len(made.indices)} generated, {len(others.indices)} real")
    else:
        scores = prompt_scores(made, prompts, network, batch_size)
        print(f"images: {len(made.indices)} with {len(set(prompts))} different prompts")
    if len(made.indices) < ENOUGH_IMAGES:
        print(f"warning: {len(made.indices):,} images are fewer than {ENOUGH_IMAGES:,}: mind the mean's deviation")
    if real:
        print(f"CLIP image-to-image score, all with all: {result['mean_of_all_pairs']:.4f}")
    if scores is not None:
        deviation = scores.std(ddof=1) / len(scores) ** 0.5 if len(scores) > 1 else None
        result.update(
            score=float(scores.mean()),
            score_std=deviation and float(deviation),
            scores=[
                {
                    "image": str(images[place]),
                    **({"real": str(real[place])} if real else {"prompt": prompts[place]}),
                    "score": float(score),
                }
                for place, score in zip(places, scores)
            ],
        )
        print(
            f"CLIP {'image-to-image score, in pairs' if real else 'score'}: {scores.mean():.4f}"
            + (f" +- {deviation:.4f}" if deviation is not None else "")
        )
    if args.output is not None:
        write_json(args.output, {**result, **describe_network(network)})


if __name__ == "__main__":
    run_script(main)
