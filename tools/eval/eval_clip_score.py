"""CLIP score: how well images fit their prompts, the mean of 100 max(cos, 0) between their features.

    python tools/eval/eval_clip_score.py --image_path_or_dir I --prompt_or_path P --ckpt_path C
    python tools/eval/eval_clip_score.py --image_path_or_dir I --real_image_path_or_dir R --ckpt_path C

I is an image or a folder of images, sorted by name. P is a prompt, or a text file with one prompt per line, each for
the same number of images in order. Without P, the prompts.txt in the folder of the images is used. C is a Hugging Face
folder, or a file of OpenAI, OpenCLIP or mindone. Without C, the nano CLIP scores. With R, the images are
compared with real images, in pairs and all with all: the CLIP image-to-image score. tools/eval/README.md explains what
the scores show.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ldm.runtime.script import describe_progress, run_script, start_script  # noqa: E402

if __name__ == "__main__":
    start_script()

import numpy as np  # noqa: E402

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
    print_idle_processes,
    print_network,
    write_json,
)
from ldm.runtime.logs import set_up_logging  # noqa: E402
from ldm.runtime.parallel import first_process_prints, is_scheduler, process_index  # noqa: E402
from ldm.settings.declare import MAX_NETWORK_BATCH, REQUIRED, setting  # noqa: E402
from ldm.settings.read import read_settings  # noqa: E402

LONGEST_PATH, LONGEST_NAME = 4095, 255  # bytes, on Linux


@dataclass
class Settings:
    """The command line."""

    image_path_or_dir: str = setting(
        REQUIRED, "an image, or a folder of images", path=True, aliases=("gen_image_path_or_dir",)
    )
    # A text, not Optional: "none" may be a prompt.
    prompt_or_path: str = setting(
        "", "a prompt, or a text file with one in each line; empty: the prompts.txt beside the images"
    )
    real_image_path_or_dir: Optional[str] = setting(
        None, "compare with these images instead of with prompts", path=True
    )
    ckpt_path: Optional[str] = setting(
        None,
        "CLIP weights: a Hugging Face folder, or a .safetensors, .bin, .pt or .ckpt file; None for the nano CLIP",
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
        "nano CLIP always squashes, to 64x64",
        choices=CLIP_PREPROCESSING,
    )
    output: Optional[Path] = setting(
        None, "write the score and each image's to this JSON", path=True, aliases=("result_path",)
    )
    batch_size: int = setting(32, "images in a call of the network", low=1, high=MAX_NETWORK_BATCH)
    use_parallel: bool = setting(
        False, "divide the batches between the processes that msrun started; the first one prints and writes the scores"
    )
    backend: str = setting("ms", "ms is MindSpore, the only backend here", choices=("ms",))
    device_target: Optional[str] = setting(None, "Ascend or CPU; None: Ascend where there is one")


def find_prompts(prompt_or_path: str, images: Sequence[Path]) -> list[str]:
    """Return the prompt of each image. Raises UserError if there are no prompts or their number does not fit."""
    if not prompt_or_path:
        beside = images[0].parent / "prompts.txt"
        if not is_there(beside):
            raise UserError(
                f"--prompt_or_path is missing, and {plain(images[0].parent)} has no prompts.txt: give a prompt, or a "
                "text file with one per line"
            )
        return paired_prompts(read_prompts(beside, "prompts"), len(images))
    path = expanded(prompt_or_path)
    prompts = read_prompts(path, "prompt_or_path") if _names_file(path) else [prompt_or_path]
    return paired_prompts(prompts, len(images))


def _names_file(text: str) -> bool:
    """Return whether a text is the path of a file. A prompt may be longer than a path can be."""
    raw = os.fsencode(text)
    if len(raw) > LONGEST_PATH or any(len(name) > LONGEST_NAME for name in raw.split(b"/")):
        return False
    return text.endswith(".txt") or is_there(text, "prompt_or_path")


@first_process_prints()
def main(argv: Sequence[str] | None = None) -> None:
    """Check the settings and the files, then score."""
    settings = read_settings(Settings, argv, description=__doc__)
    is_other = settings.use_parallel and (is_scheduler() or process_index() > 0)
    if is_other:
        set_up_logging("ERROR")  # the other processes would repeat the warnings of the first one
    if settings.real_image_path_or_dir is not None and settings.prompt_or_path:
        raise UserError("--prompt_or_path and --real_image_path_or_dir are two scores: give one of them")
    images = find_images(settings.image_path_or_dir)
    real = find_images(settings.real_image_path_or_dir) if settings.real_image_path_or_dir is not None else []
    prompts = [] if real else find_prompts(settings.prompt_or_path, images)
    if any(valid_text(prompt) != prompt for prompt in prompts):
        raise UserError(
            f"--prompt_or_path {plain(settings.prompt_or_path)} is not UTF-8 text: type it again, or set the terminal "
            "to UTF-8"
        )
    if is_other:  # it claims no files
        score(settings, images, real, prompts)
        return
    with claim_file(settings.output, "--output"):
        score(settings, images, real, prompts)


def score(settings: Settings, images: list[Path], real: list[Path], prompts: list[str]) -> None:
    """Score the images against the real images, or else against their prompts.

    Prints and writes the scores, in the first process of several.
    """
    describe_progress(lambda: "before there was a score")
    most_images = max(len(images), len(real))
    batch_size = min(settings.batch_size, most_images)

    # MindSpore is imported after the settings are checked, so that a wrong flag is reported at once.
    from ldm.runtime.device import setup_runtime

    runtime = setup_runtime(settings.device_target, use_parallel=settings.use_parallel)
    from ldm.metrics.evaluate import encode_images, prompt_scores, send_features
    from ldm.metrics.networks import clip, nano_clip

    if settings.ckpt_path is None:
        network = nano_clip()
    else:
        network = clip(settings.ckpt_path, settings.preprocessing, settings.config, settings.model_name)
    if runtime.process_index:
        for paths in (images, real):
            if paths:
                send_features(paths, network, batch_size, runtime.process_index, runtime.process_count)
        return
    print_network(network)
    print_idle_processes(most_images, batch_size, runtime.process_count)
    generated = encode_images(images, network, batch_size, process_count=runtime.process_count)
    print_broken(generated.broken, "images")
    result: dict[str, Any] = {"images": len(generated.indices), "broken": describe_broken(generated.broken)}
    indices, scores, label = generated.indices, None, "CLIP score"
    if real:
        encoded = encode_images(real, network, batch_size, "real images", runtime.process_count)
        print_broken(encoded.broken, "real images")
        result.update(
            real_images=len(encoded.indices),
            real_broken=describe_broken(encoded.broken),
            mean_of_all_pairs=mean_of_all_pairs(generated.features, encoded.features),
        )
        if len(images) == len(real):
            indices, ours, theirs = np.intersect1d(generated.indices, encoded.indices, return_indices=True)
            scores = clip_scores(generated.features[ours], encoded.features[theirs])
            label = "CLIP image-to-image score, in pairs"
        print(f"images: {len(generated.indices)} generated, {len(encoded.indices)} real")
    else:
        scores = prompt_scores(generated, prompts, network, batch_size)
        print(f"images: {len(generated.indices)} with {len(set(prompts))} different prompts")
    if len(generated.indices) < ENOUGH_IMAGES:
        print(
            f"warning: {len(generated.indices):,} images are fewer than {ENOUGH_IMAGES:,}: note the mean's standard "
            "deviation"
        )
    if real:
        print(f"CLIP image-to-image score, all with all: {result['mean_of_all_pairs']:.4f}")
    if scores is not None:
        std = float(scores.std(ddof=1) / len(scores) ** 0.5) if len(scores) > 1 else None
        result.update(
            score=float(scores.mean()),
            score_std=std,
            scores=[
                {
                    "image": str(images[i]),
                    **({"real": str(real[i])} if real else {"prompt": prompts[i]}),
                    "score": float(value),
                }
                for i, value in zip(indices, scores)
            ],
        )
        print(f"{label}: {scores.mean():.4f}" + (f" +- {std:.4f}" if std is not None else ""))
    if settings.output is not None:
        write_json(settings.output, {**result, **describe_network(network)})


if __name__ == "__main__":
    run_script(main)
