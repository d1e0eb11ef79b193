"""The work of text_to_image.py: plan, load the models and the LoRAs, generate images and write them."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm.diffusion.sampling import latent_shape
from ldm.errors import UserError, plain
from ldm.files.outputs import claim_file, claim_folder
from ldm.generation.comparison import Cell, plan_cells, sheet_of
from ldm.generation.from_image import Recipe, differences, read_recipe
from ldm.generation.image_files import ImageWriter, LatentsWriter, read_latents, starting_latents_path
from ldm.generation.image_metadata import metadata_of_images
from ldm.generation.parameters import parameters_text
from ldm.generation.resume import precision_to_continue
from ldm.generation.source_image import forget_sources, source_fields
from ldm.runtime import peers
from ldm.runtime.logs import set_up_logging
from ldm.runtime.parallel import is_scheduler, output_to_file, process_index
from ldm.runtime.precision import automatic_precision
from ldm.runtime.roll_call import ReportedError
from ldm.runtime.script import describe_progress
from ldm.settings.generate import GenerateSettings
from ldm.weights.architecture import config_with_tokens

if TYPE_CHECKING:
    from ldm.generation.pipeline import ImageBatch, Pipeline
    from ldm.generation.requests import RequestBatch
    from ldm.generation.run import RunImage
    from ldm.runtime.device import Runtime

    OpenModel = Callable[..., Pipeline]

logger = logging.getLogger(__name__)


def generate(settings: GenerateSettings, open_model: OpenModel | None = None) -> None:
    """Generate the images that the settings describe, and write them to `settings.output_path`.

    Everything that needs no network is checked first, without MindSpore, and the outputs are claimed. With
    use_parallel, every process calls this, and the first one alone claims and writes the outputs.

    Args:
        settings: See GenerateSettings.
        open_model: Takes the arguments of Pipeline.from_checkpoint, and may return the pipeline of an earlier call,
            without learned tokens. None for Pipeline.from_checkpoint.

    Raises:
        UserError: A setting, a file or an output does not fit. Nothing is written then.
    """
    forget_sources()
    cells = plan_cells(settings)
    if not settings.resume:
        _check_sources(settings, cells)
    if settings.use_parallel and (is_scheduler() or process_index() > 0):
        generate_cells(settings, cells, open_model)
        return
    latents = settings.save_latents
    starting_latents = None if latents is None else starting_latents_path(latents)
    with (
        claim_folder(settings.output_path, "output_path"),
        claim_file(latents, "save_latents"),
        claim_file(starting_latents, "save_latents"),
    ):
        generate_cells(settings, cells, open_model)


def _check_sources(settings: GenerateSettings, cells: Sequence[Cell]) -> None:
    """Raise UserError for an image to begin from that this run would rename before it is read."""
    output = Path(settings.output_path)
    for origin in dict.fromkeys(origin for cell in cells for origin in cell.plan.origins):
        source = origin.source
        for name, path in () if source is None else (("init_image", source.image), ("mask_image", source.mask)):
            if not isinstance(path, Path):
                continue
            real = path.resolve()
            if real == (output / "grid.png").resolve() or (output / "samples").resolve() in real.parents:
                raise UserError(
                    f"{name} {plain(path)} is of the last run in {plain(output)}, which this run renames: give another "
                    "--output_path, or move the image"
                )


def generate_cells(settings: GenerateSettings, cells: Sequence[Cell], open_model: OpenModel | None = None) -> None:
    """Load the models and the LoRAs of a run, generate its images and write them."""
    describe_progress(lambda: "before the first image")
    # MindSpore takes seconds to import, so these modules are imported when the settings are known to be right.
    from ldm.runtime.device import setup_runtime

    starting_latents = None
    if settings.init_latents is not None:
        plan = cells[0].plan
        config = config_with_tokens(plan.config, plan.checkpoint)
        sampling = plan.images[0].sampling  # all images have one size here
        shape = (len(plan.prompts), *latent_shape(config, sampling.height, sampling.width))
        starting_latents = read_latents(settings.init_latents, shape)

    runtime = setup_runtime(
        settings.device_target,
        settings.mode,
        settings.jit_level,
        settings.precision,
        settings.seed,
        settings.use_parallel,
        lambda: _automatic_precision(settings),
    )
    check_same_precision(runtime.precision, settings.resume)
    process = runtime.process_index
    with nullcontext() if process == 0 else output_to_file(Path(settings.output_path) / f"log-{process}.txt"):
        if process:
            set_up_logging("WARNING")  # the other processes would repeat the first one
            describe_progress(None)
        _generate_images(settings, cells, starting_latents, runtime, open_model)


def _automatic_precision(settings: GenerateSettings) -> str:
    """Return what precision "auto" stands for on the CPU. A run that is continued keeps what it was begun in."""
    from ldm.ops import multiplies_bf16

    begun_in = precision_to_continue(Path(settings.output_path) / "samples") if settings.resume else None
    return begun_in or automatic_precision(multiplies_bf16)


def check_same_precision(precision: str, resumes: bool) -> None:
    """Raise UserError in process 0 if another process has another precision: the images' texts name one.

    Where the run `resumes` images, process 0 has the precision that they were begun in.
    """
    found = [data.decode() for data in peers.gather(precision.encode())] if peers.are_connected() else []
    other = next((process for process, name in enumerate(found) if name != found[0]), None)
    if other is not None:
        raise ReportedError(
            f"process {other} computes in {plain(found[other], 60)} and process 0 in {found[0]}, because their "
            f"processors{' or folders' * resumes} differ: give --precision {found[0] if resumes else 'fp32'}"
        )


def _generate_images(
    settings: GenerateSettings,
    cells: Sequence[Cell],
    starting_latents: np.ndarray | None,
    runtime: Runtime,
    open_model: OpenModel | None,
) -> None:
    """Load the models and generate this process's share of the images. The first process writes all."""
    from ldm.generation.pipeline import Pipeline
    from ldm.generation.run import by_model, images_of, load_pipeline
    from ldm.ops import bf16_unit
    from ldm.runtime.device import decide_flash_attention, describe_runtime

    flash_attention = decide_flash_attention(settings.enable_flash_attention, runtime)
    logger.info("%s", describe_runtime(runtime, flash_attention, bf16_unit))
    # The LoRAs are read before the base model, which takes longer, so that a wrong file is reported early.
    images = images_of(cells)
    # Before samples/ is renamed, where the image may be.
    recipe = None if settings.from_image is None else read_recipe(settings.from_image)
    writer = _writer(settings, cells, images, runtime.precision)
    if runtime.process_index == 0:
        if settings.resume:
            writer.begin()
        describe_progress(writer.progress)
    saves_latents = settings.save_latents is not None and runtime.process_index == 0
    with LatentsWriter(str(settings.save_latents), len(images)) if saves_latents else nullcontext() as latents:
        for of_model in by_model(images):
            pipeline = load_pipeline(of_model[0][0], flash_attention, open_model or Pipeline.from_checkpoint)
            for alike in of_model:
                syntax, long, clip_skip = alike[0].cell.prompt_settings
                pipeline.configure_prompts(syntax=syntax, support_long_prompts=long, clip_skip=clip_skip)
                _generate_with(pipeline, settings, alike, starting_latents, runtime, writer, latents, recipe)
                recipe = None  # what differs is said once
            del pipeline  # before the next one is loaded
    if runtime.process_index:
        return
    writer.finish()
    for path in writer.renamed:
        logger.info("kept from an earlier run: %s", path)
    if not settings.skip_save:
        logger.info("%d images: %s", len(images), writer.samples)
    if writer.grid:
        logger.info("grid: %s", writer.grid_path)
    if settings.save_latents is not None:
        logger.info("latents: %s, starting: %s", settings.save_latents, starting_latents_path(settings.save_latents))


def _generate_with(
    pipeline: Pipeline,
    settings: GenerateSettings,
    images: Sequence[RunImage],
    starting_latents: np.ndarray | None,
    runtime: Runtime,
    writer: ImageWriter,
    latents: LatentsWriter | None,
    recipe: Recipe | None,
) -> None:
    """Generate and write images of one base model whose prompts are read alike."""
    batches = pipeline.batches_of([image.request for image in images])
    if settings.full_batches:
        batches = [replace(batch, batch_size=batch.requests[0].sampling.batch_size) for batch in batches]
    for batch in batches:
        writer.batch_sizes.update((request.index, batch.batch_size) for request in batch.requests)
    if recipe is not None and runtime.process_index == 0:
        _say_what_differs(recipe, settings, writer.fields(images[0].request.index))
    pending = _pending(batches, writer, runtime) if settings.resume else batches
    count = runtime.process_count
    if 0 < len(pending) < count:
        logger.warning(
            "%d processes, but only %d batches of %d images: the other processes have nothing to do; a smaller "
            "--batch_size gives more batches",
            count,
            len(pending),
            images[0].request.sampling.batch_size,
        )
    share = pending[runtime.process_index :: count]
    generated = pipeline.generate_batches(share, starting_latents, runtime.process_index == 0, batches)
    arrays = _arrays(generated, settings.save_latents is not None)
    # In the first process, these are the batches of all. The others generate theirs meanwhile and get nothing.
    for indices, pixels, *of_batch in peers.gather_batches(arrays, math.ceil(len(pending) / count)):
        writer.add(indices, pixels)
        if latents is not None:
            latents.add(indices, *of_batch)


def _pending(batches: Sequence[RequestBatch], writer: ImageWriter, runtime: Runtime) -> list[RequestBatch]:
    """Return the batches that lack images. The first process looks for them, and tells the others."""
    missing: list[int] = []
    if runtime.process_index == 0:
        # A list, so that all images of a batch are looked at: the grid takes those that are there.
        there = [[writer.is_written(request.index) for request in batch.requests] for batch in batches]
        missing = [number for number, of_batch in enumerate(there) if not all(of_batch)]
        done = sum(map(sum, there))
        logger.info("resume: %d images are there, %d of %d batches are made", done, len(missing), len(batches))
    missing = json.loads(peers.share(json.dumps(missing).encode()))
    return [batches[number] for number in missing]


def _arrays(batches: Iterable[ImageBatch], with_latents: bool) -> Iterable[list[np.ndarray]]:
    for batch in batches:
        yield [batch.indices, batch.images, *([batch.starting_latents, batch.latents] if with_latents else [])]


def _say_what_differs(recipe: Recipe, settings: GenerateSettings, fields: Mapping[str, Any]) -> None:
    """Log what of the image that from_image names is not repeated."""
    found = differences(recipe, settings, fields)
    for text in recipe.not_repeated:
        logger.warning("from_image %s: not repeated: %s", settings.from_image, text)
    for text in found:
        logger.warning("from_image %s: other than in the image: %s", settings.from_image, text)
    if recipe.fields and not found and not recipe.not_repeated:
        logger.info("from_image %s: all its settings and files are the same", settings.from_image)


def _writer(
    settings: GenerateSettings, cells: Sequence[Cell], images: Sequence[RunImage], precision: str
) -> ImageWriter:
    """Return what writes the images. The texts of an image are made when it is written."""
    of_cell = {id(cell): metadata_of_images(cell.settings, cell.plan, precision) for cell in cells}

    def more_fields(index: int) -> dict[str, Any]:
        request, cell, place = images[index]
        text = parameters_text(cell.settings, cell.plan, place)
        return {**of_cell[id(cell)](place), **source_fields(request.origin), "parameters": text}

    sheet = sheet_of(settings, list(cells))
    grid = not settings.skip_grid
    if grid and sheet is None and not cells[0].plan.has_one_size:
        logger.warning("the prompts have several sizes (--w, --h): no grid is written")
        grid = False
    return ImageWriter(
        settings.output_path,
        [prompt for cell in cells for prompt in cell.plan.prompts],
        [prompt for cell in cells for prompt in cell.plan.negative_prompts],
        cells[0].plan.images_per_prompt,
        more_fields,
        pngs=not settings.skip_save,
        grid=grid,
        sheet=sheet,
        places=[(image.cell.column, image.cell.row) for image in images],
        labels=[image.cell.label for image in images],
        settings={**settings.of_images(), "precision": precision},
        sizes=[image.cell.plan.final_size(image.place) for image in images],
        resume=settings.resume,
    )
