"""DreamBooth's class images: those that a folder has, and those that the base model draws because they are missing.

    {class_data_dir}/class-000017.png    the 18th image that was drawn from class_prompt

Drawn images are added to the folder. What is there already is never overwritten, and counts.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import mindspore as ms
import numpy as np
from PIL import Image
from tqdm import tqdm

from ldm.data.checked_images import check_images
from ldm.data.checked_rows import MAX_CHECKED
from ldm.data.decoding import BrokenImage
from ldm.data.prior import check_class_folder, list_class_images, with_class_images
from ldm.data.sources.names import is_image, walk
from ldm.data.sources.rows import Listing
from ldm.diffusion.sampling import Sampling, latent_shape
from ldm.errors import UserError, plain
from ldm.files.inputs import is_there, open_file
from ldm.files.outputs import claim_folder
from ldm.files.paths import writing
from ldm.generation.image_files import write_png
from ldm.generation.pipeline import Pipeline
from ldm.models.attention import set_attention
from ldm.models.layers import set_compute_dtype
from ldm.models.stable_diffusion import StableDiffusion
from ldm.runtime import peers
from ldm.runtime.device import Runtime, failed_allocations_as, give_back_memory
from ldm.runtime.launcher import process_name
from ldm.runtime.logs import warn_each
from ldm.runtime.roll_call import ReportedError
from ldm.settings.model import ModelConfig
from ldm.settings.train import TrainSettings
from ldm.settings.versions import default_guidance_scale
from ldm.training.checkpoints import remove_leftovers
from ldm.training.checks import image_size
from ldm.training.drawing import OwnGraph, model_fields, sampling_field
from ldm.training.status import Status

logger = logging.getLogger(__name__)

# As mindone's DreamBooth script draws class images, with SD1.x and SD2.x. The nano model has its own guidance scale.
SAMPLER = "ddim"
SAMPLING_STEPS = 50
GUIDANCE_SCALE = 9.0
PUBLISHED = ("sd1", "sd2")  # the architectures that it is for

_DRAWN = re.compile(r"class-(\d{6,})\.png")


@dataclass(frozen=True)
class ClassImages:
    """The class images that there are, and those that are missing."""

    folder: Path
    paths: tuple[str, ...]  # of the images that can be used, sorted
    missing: tuple[int, ...]  # numbers of the images that must be drawn


def class_images_folder(settings: TrainSettings) -> Path:
    """Return the folder of the class images: class_data_dir, or class_images in output_path."""
    if settings.class_data_dir is not None:
        return Path(settings.class_data_dir)
    return Path(settings.output_path) / "class_images"


def add_class_images(
    listing: Listing,
    settings: TrainSettings,
    config: ModelConfig,
    runtime: Runtime,
    load_base: Callable[[], StableDiffusion],
    flash_attention: bool,
    status: Status,
) -> Listing:
    """Return the rows of a data set with the class images of with_prior_preservation behind them.

    Without it, or with prior_loss_weight 0, which makes them useless, the rows are returned as they are.

    Raises:
        UserError: See `check_class_folder` and `ensure_class_images`.
    """
    if not settings.with_prior_preservation:
        return listing
    if not settings.prior_loss_weight:
        logger.info("prior_loss_weight 0: class images are neither read nor drawn")
        return listing
    check_class_folder(listing, class_images_folder(settings))
    images = ensure_class_images(settings, config, runtime, load_base, flash_attention, status)
    return with_class_images(listing, images)


def ensure_class_images(
    settings: TrainSettings,
    config: ModelConfig,
    runtime: Runtime,
    load_base: Callable[[], StableDiffusion],
    flash_attention: bool,
    status: Status,
) -> Listing:
    """Return at least `num_class_images` class images with the caption `class_prompt`. Draw those that are missing.

    Every process calls it. Each draws its share of the batches, the first one writes the files, and all wait. An image
    depends on the seed, its number, the prompt, the base model and sample_batch_size. So a run that was killed and is
    started again ends with the same files, and so does one with another number of processes.

    Args:
        settings: Those of the run.
        config: Of the base model.
        runtime: What setup_runtime returned.
        load_base: Returns the base model, without LoRA, none of whose networks has run. It is called only if images are
            drawn. Its weights, types and attention are the same afterwards.
        flash_attention: Whether the UNet uses Ascend's fused attention.
        status: Is told how far the drawing has come.

    Raises:
        UserError: The folder cannot be read or written, another run draws into it, memory does not suffice, a process
            finds other images than the first, or images must be drawn by a random UNet.
    """
    assert settings.class_prompt is not None  # TrainSettings
    found = find_class_images(settings)
    logger.info(
        "%s: %s class images found, %s of num_class_images %s are missing",
        found.folder, f"{len(found.paths):,}", f"{len(found.missing):,}", f"{settings.num_class_images:,}",
    )  # fmt: skip
    _check_same_images(found)
    if found.missing:
        if settings.unet_initialize_random:
            raise UserError(
                f"{plain(found.folder)} has {len(found.paths):,} class images, num_class_images is "
                f"{settings.num_class_images:,}: a random UNet (unet_initialize_random) cannot draw the others; add "
                "images, or lower num_class_images"
            )
        first = runtime.process_index == 0
        with claim_folder(found.folder, "class_data_dir") if first else nullcontext():
            if first:
                remove_leftovers(found.folder)
            _draw(found, settings, config, runtime, load_base(), flash_attention, status)
        peers.gather()  # the others list the folder only when all is written
        found = find_class_images(settings)
        _check_same_images(found)
    return list_class_images(found.folder, found.paths, settings.class_prompt)


def find_class_images(settings: TrainSettings) -> ClassImages:
    """Count the class images in the folder and in those below it. The log names those that are broken.

    Broken images stay where they are and do not count. Other images are drawn for them. A warning counts the images
    that were drawn from another prompt or by another base model.

    Raises:
        UserError: The folder cannot be read.
    """
    folder = class_images_folder(settings)
    images: list[str] = []
    taken: set[int] = set()
    if is_there(folder, "class_data_dir"):
        for names in walk(os.fspath(folder)):
            images += [f"{names.folder}/{name}" for name in names.files if is_image(name)]
            if names.folder == os.fspath(folder):
                taken = {int(drawn.group(1)) for drawn in map(_DRAWN.fullmatch, names.files) if drawn}
    usable, broken = _decodable(sorted(images), settings)
    warn_each(logger, "%s; it is not used as a class image", broken)
    _warn_of_other_origin(folder, usable, settings)

    missing: list[int] = []
    number = 0
    while len(usable) + len(missing) < settings.num_class_images:
        if number not in taken:
            missing.append(number)
        number += 1
    return ClassImages(folder, tuple(usable), tuple(missing))


def _decodable(paths: list[str], settings: TrainSettings) -> tuple[list[str], list[str]]:
    """Return the images that decode, in their order, and a message for each of the others."""
    checks = settings.check_images
    if not paths or not (len(paths) <= MAX_CHECKED if checks is None else checks):
        return paths, []
    # Not images.json, which prepare_data writes with the images of the data set and these.
    found, faults = check_images(paths, Path(settings.output_path) / "cache" / "class_images.json")
    return [path for path in paths if path in found], [str(BrokenImage(path, fault)) for path, fault in faults.items()]


def _warn_of_other_origin(folder: Path, paths: list[str], settings: TrainSettings) -> None:
    """Warn of drawn images whose text fields name another prompt, or another checkpoint, than the settings."""
    checkpoint = Path(settings.pretrained_model_path or "").name
    for key, now, kind in (
        ("prompt", settings.class_prompt, "from another prompt"),
        ("checkpoint", checkpoint, "by another base model"),
    ):
        others = [
            value
            for path in paths
            if _DRAWN.fullmatch(os.path.basename(path)) and (value := _text_field(path, key)) not in (None, now)
        ]
        if others:
            logger.warning(
                '%s: %s class images were drawn %s, such as "%s", and are used; give another class_data_dir for new '
                "ones",
                folder, f"{len(others):,}", kind, others[0],
            )  # fmt: skip


def _text_field(path: str, key: str) -> Optional[str]:
    """Return a text field of a PNG, None if it has none or cannot be read."""
    try:
        with open_file(path) as file, Image.open(file, formats=("PNG",)) as image:
            value = image.info.get(key)
    except (UserError, OSError, SyntaxError, ValueError):  # found again when the image is decoded
        return None
    return value if isinstance(value, str) else None


def _check_same_images(found: ClassImages) -> None:
    """Raise UserError in process 0 if another process finds other images. Every process calls it."""
    if not peers.are_connected():
        return
    names = [os.path.relpath(path, found.folder) for path in found.paths]
    digest = hashlib.sha256("\0".join(names).encode("utf-8", "surrogateescape")).hexdigest()
    given = peers.gather(f"{digest} {len(names)} {process_name()}".encode())
    others = [data.decode("utf-8", "replace").split(" ", 2) for data in given]
    for other, count, process in others[1:]:
        if other != digest:
            raise ReportedError(
                f"{plain(process)} finds {count} class images in {plain(found.folder)}, process 0 has {len(names)} "
                "there: let all hosts share the folder (class_data_dir), or copy it to each"
            )
    peers.gather()  # nobody draws before process 0 has compared


def class_sampling(settings: TrainSettings, config: ModelConfig) -> Sampling:
    """Return how class images are sampled: as mindone does, in the size of the training."""
    published = config.architecture in PUBLISHED
    size = image_size(settings, config)
    return Sampling(
        sampler=SAMPLER,
        num_inference_steps=min(SAMPLING_STEPS, config.timesteps),
        guidance_scale=GUIDANCE_SCALE if published else default_guidance_scale(config.architecture),
        height=size,
        width=size,
        batch_size=min(settings.sample_batch_size, settings.num_class_images),
    )


def _draw(
    found: ClassImages,
    settings: TrainSettings,
    config: ModelConfig,
    runtime: Runtime,
    model: StableDiffusion,
    flash_attention: bool,
    status: Status,
) -> None:
    """Draw the missing images. The first process writes them."""
    sampling = class_sampling(settings, config)
    sampling.check(config)
    size = sampling.batch_size
    batches = sorted({number // size for number in found.missing})
    rounds = math.ceil(len(batches) / runtime.process_count)
    fields = {
        "prompt": settings.class_prompt,
        "negative_prompt": "",
        "seed": str(settings.seed),
        **model_fields(settings, config),
        "settings": sampling_field(sampling, config, runtime.precision),
    }
    done = 0

    def drawn() -> Iterator[list[np.ndarray]]:
        with _pipeline(model, runtime, flash_attention) as pipeline:
            for batch in batches[runtime.process_index :: runtime.process_count]:
                numbers = np.arange(batch * size, (batch + 1) * size)
                yield [numbers, _draw_batch(pipeline, settings, sampling, numbers)]

    phase, status.phase = status.phase, "before the first class image"
    missing = frozenset(found.missing)
    with tqdm(total=len(missing), desc="drawing class images", unit="image", disable=runtime.process_index > 0) as bar:
        for numbers, images in peers.gather_batches(drawn(), rounds):
            for number, image in zip(numbers.tolist(), images):
                if number in missing:
                    path = found.folder / f"class-{number:06d}.png"
                    with writing(path):
                        write_png(path, image, {**fields, "index": str(number)})
                    done += 1
                    bar.update()
            status.phase = f"after drawing {done:,} of {len(missing):,} class images, which are kept"
    status.phase = phase
    if runtime.process_index == 0:
        logger.info('%s: %s class images drawn from "%s"', found.folder, f"{done:,}", settings.class_prompt)


def _draw_batch(pipeline: Pipeline, settings: TrainSettings, sampling: Sampling, numbers: np.ndarray) -> np.ndarray:
    """Return the images with these numbers, (N, H, W, C) uint8.

    They are those numbers of text_to_image.py with the same seed, sampler, steps and scale, within rounding. Always
    the same numbers are drawn together, because a network rounds differently with the place in its batch.
    """
    config = pipeline.config
    shape = latent_shape(config, sampling.height, sampling.width)
    with failed_allocations_as("not enough memory to draw class images: lower sample_batch_size"):
        positive, negative = pipeline.encode_prompts([settings.class_prompt or "", ""], 2)
        latents = pipeline.sample(
            np.stack([positive] * len(numbers)),
            np.stack([negative] * len(numbers)) if sampling.guidance_scale != 1 else None,
            pipeline.starting_latents(settings.seed, numbers.tolist(), shape),
            sampling,
        )
        return pipeline.decode(latents, len(numbers))


@contextmanager
def _pipeline(model: StableDiffusion, runtime: Runtime, flash_attention: bool) -> Iterator[Pipeline]:
    """Yield a pipeline of the networks that are trained later. Afterwards they are as before, and its graphs are freed.

    The UNet computes in the type of the training and keeps its weights in fp32.
    """
    unet = model.model.diffusion_model
    set_compute_dtype(unet, runtime.compute_dtype)
    if flash_attention:
        set_attention(unet, flash=True)
    pipeline = Pipeline(model)
    pipeline.unet, pipeline.text_encoder = OwnGraph(pipeline.unet), OwnGraph(pipeline.text_encoder)
    try:
        yield pipeline
    finally:
        pipeline.free_graphs()
        set_compute_dtype(unet, ms.float32)
        if flash_attention:
            set_attention(unet)
        gc.collect()
        give_back_memory()
