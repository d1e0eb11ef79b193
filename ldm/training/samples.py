"""The images that a training draws, so that one can see what it has learned: sample_prompts.

    {output_path}/samples/prompts.txt                    the prompts as they were read, a line each
    {output_path}/samples/prompt-01/step-00000100.png    the first prompt after 100 steps; step 0 is before the training
    {output_path}/samples/prompt-01.png                  the film strip: the prompt's images, the oldest at the left

An image is the one that text_to_image.py draws with the checkpoint of that step and the flags of the line, bit for bit.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor
from PIL import Image

from ldm.errors import UserError, plain
from ldm.files.atomic import atomic_path
from ldm.files.documents import json_text, valid_text
from ldm.files.inputs import is_folder, list_folder, open_file
from ldm.files.paths import writing
from ldm.generation.image_files import rename_earlier, write_png
from ldm.generation.pipeline import Pipeline
from ldm.lora.inject import without_lora
from ldm.lora.lora import LoRA
from ldm.lora.merged import MergedLoRA
from ldm.lora.strength import Strength
from ldm.models.layers import set_compute_dtype
from ldm.models.stable_diffusion import StableDiffusion
from ldm.runtime import peers
from ldm.runtime.device import Runtime, give_back_memory
from ldm.settings.train import TrainSettings
from ldm.training.checkpoints import Checkpoints, remove_leftovers
from ldm.training.drawing import OwnGraph, model_fields, sampling_field
from ldm.training.film_strip import draw_strip, enlarged, shown
from ldm.training.plan import RunPlan, completes_interval
from ldm.training.report.records import FRAME
from ldm.training.sample_prompts import SamplePrompt
from ldm.training.status import Status
from ldm.training.step import TrainStep
from ldm.weights.base_weights import BaseWeights

logger = logging.getLogger(__name__)


class Samples:
    """Draws the images of a run. Without prompts, it does nothing.

    Every process calls `start` and `draw`. The first one draws and writes, and the others wait for it.

    The networks are those that are trained, so no weight is in memory twice. The LoRA's layers are taken out of them
    while graphs without a LoRA are compiled, the LoRA of the step is merged into the weights, as generation does it,
    and afterwards the weights of the base model are read again from its files.

    SD1.5 in fp32 at 256 pixels and batch 1 (2 cores, process time): merging and putting back take 0.6 s, and compiling
    12 s, once. The largest resident size grows from 5.63 GB to 6.41 GB at the first sampling and to 6.49 GB at the
    second. A second UNet and text encoder would be 3.9 GB of weights.

    Args:
        prompts: What to draw.
        settings: Those of the run.
        runtime: What setup_runtime returned.
        model: The networks, with a LoRA in them or trained themselves.
        base_weights: The files that the model was loaded from.
        plan: When an epoch and the run end.
        step: Knows what is trained.
        checkpoints: Knows what a checkpoint holds.
        status: Is told that images are drawn.
        resumed_here: Whether the run resumes one in the same folder, whose samples are then its own.
    """

    def __init__(
        self,
        prompts: Sequence[SamplePrompt],
        settings: TrainSettings,
        runtime: Runtime,
        model: StableDiffusion,
        base_weights: BaseWeights,
        plan: RunPlan,
        step: TrainStep,
        checkpoints: Checkpoints,
        status: Status,
        resumed_here: bool,
    ):
        self.prompts, self.settings, self.runtime, self.model = prompts, settings, runtime, model
        self.plan, self.step, self.checkpoints, self.status = plan, step, checkpoints, status
        self.folder = Path(settings.output_path) / "samples"
        digits = max(2, len(str(len(prompts))))
        self.folders = [self.folder / f"prompt-{number:0{digits}d}" for number in range(1, len(prompts) + 1)]
        self._base_weights, self._resumed_here = base_weights, resumed_here
        self._first_process = runtime.process_index == 0
        self._pipeline: Pipeline | None = None
        self._fields: list[dict[str, Any]] = []

    def is_due(self, step: int) -> bool:
        """Whether images are drawn after this many steps."""
        settings = self.settings
        if not self.prompts:
            return False
        if step == 0:
            return settings.sample_at_first
        if step == self.plan.steps:
            return True
        if settings.sample_every_n_steps is not None and completes_interval(step, settings.sample_every_n_steps):
            return True
        epochs = settings.sample_every_n_epochs
        return epochs is not None and completes_interval(step, epochs * self.plan.steps_per_epoch)

    def start(self) -> None:
        """Make the folder ready, and draw what is due now: before the first step, or what a killed run did not draw.

        Raises:
            UserError: The folder cannot be written, or a prompt cannot be drawn.
        """
        if not self.prompts:
            return
        step = self.status.steps_done
        if self._first_process:
            with writing(self.folder):
                self._prepare_folder(step)
            self._write_strips()
        if self.is_due(step):
            self._draw(step)

    def draw(self, step: int) -> None:
        """Draw the images of this step if they are due. What fails is a warning, and the training continues.

        Raises:
            UserError: The weights of the base model cannot be put back.
        """
        if not self.is_due(step):
            return
        phase = self.status.phase
        try:
            self._draw(step)
        except UserError as error:
            if self._pipeline is not None and not self._pipeline.holds_base_weights:
                raise UserError(f"{error}; {self.status.how_to_continue()}") from error
            logger.warning("step %d: not all samples are drawn: %s", step, error)
        self.status.phase = phase

    def _draw(self, step: int) -> None:
        """Draw the images of a step that are missing, and the strips. Every process calls it."""
        # With shard_optimizer, the processes gather the state together.
        arrays = self._trained() if self._first_process or self.settings.shard_optimizer else {}
        try:
            if self._first_process:
                phase, self.status.phase = self.status.phase, f"while drawing the samples of step {step}"
                self._draw_missing(step, arrays)
                self.status.phase = phase
        except UserError:
            peers.gather()
            raise
        # The others wait here, not in an operator of the next step: on Ascend, those give up after a time limit.
        peers.gather()

    def _trained(self) -> dict[str, np.ndarray]:
        """Return the arrays of TrainStep.state() if what is sampled with is made of them, else nothing."""
        settings = self.settings
        # Without averages, a UNet that is trained as a whole holds what is sampled with.
        if settings.use_lora or settings.use_ema or self.step.optimizer.keeps_average:
            return self.step.state()
        return {}

    def _draw_missing(self, step: int, arrays: dict[str, np.ndarray]) -> None:
        began = time.perf_counter()
        name = f"step-{step:08d}.png"
        missing = [i for i, folder in enumerate(self.folders) if not os.path.lexists(folder / name)]
        if missing:
            with self._weights_of(arrays) as pipeline:
                for i in missing:
                    image = self._image(pipeline, self.prompts[i])
                    path = self.folders[i] / name
                    with writing(path):
                        write_png(path, image, {**self._fields[i], "step": str(step)})
        self._write_strips()
        if missing:
            logger.info(
                "step %d: %d samples drawn in %.1f s, film strips: %s",
                step, len(missing), time.perf_counter() - began, self.folder,
            )  # fmt: skip

    def _image(self, pipeline: Pipeline, prompt: SamplePrompt) -> np.ndarray:
        """Return the image of a prompt, (H, W, C) uint8."""
        try:
            batches = pipeline.generate(
                [prompt.prompt], prompt.sampling, prompt.seed, [prompt.negative_prompt], progress=False
            )
            return next(iter(batches)).images[0]
        except UserError as error:
            raise UserError(f"{prompt.where}: {error}") from error

    # ---- the networks ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _weights_of(self, arrays: dict[str, np.ndarray]) -> Iterator[Pipeline]:
        """Yield a pipeline with the weights that a checkpoint of this moment holds. Afterwards all are as before."""
        self._base_weights.open({})  # raises UserError, before a weight is changed, if a file is not as it was
        with contextlib.ExitStack() as stack:
            stack.callback(give_back_memory)  # of weights that were read and of compiling
            replaced = self._replace_by_averages(arrays)
            stack.callback(_set_values, replaced)
            lora = self.checkpoints.lora(arrays) if self.settings.use_lora else None
            stack.enter_context(without_lora(self.model))
            text_encoder, dtype = self.model.cond_stage_model, self.runtime.compute_dtype
            if not self.settings.trains_text_encoder and dtype != ms.float32:
                # A training encodes its captions in fp32, and text_to_image.py its prompts in fp16.
                set_compute_dtype(text_encoder, dtype)
                stack.callback(set_compute_dtype, text_encoder, ms.float32)
            if self._pipeline is None:
                self._pipeline = self._make_pipeline()
            else:  # each sampling would repeat what the first one said of prompts and LoRA
                stack.enter_context(_without_messages("ldm.generation"))
            if lora is not None:
                stack.callback(self._pipeline.merge_loras, [])
                self._pipeline.merge_loras([_merged(lora)])
            yield self._pipeline

    def _make_pipeline(self) -> Pipeline:
        """Return a pipeline of the networks that are trained, with graphs of its own."""
        pipeline = Pipeline(self.model, base_weights=self._base_weights)
        pipeline.unet, pipeline.text_encoder = OwnGraph(pipeline.unet), OwnGraph(pipeline.text_encoder)
        return pipeline

    def _replace_by_averages(self, arrays: dict[str, np.ndarray]) -> list[tuple[Parameter, np.ndarray]]:
        """Give the base model's trained parameters their averages, and return what they were."""
        if not arrays:
            return []
        sampled = self.checkpoints.sampled(arrays)
        parameters = [p for p in self.step.parameters if ".lora_" not in p.name]
        replaced = [(p, p.asnumpy().copy()) for p in parameters if not np.array_equal(p.asnumpy(), sampled[p.name])]
        _set_values([(parameter, sampled[parameter.name]) for parameter, _ in replaced])
        return replaced

    # ---- the folder --------------------------------------------------------------------------------------------------

    def _prepare_folder(self, step: int) -> None:
        """Set aside what is of other runs and prompts, and remove what a killed run drew after this step."""
        if not self._resumed_here:
            for kept in rename_earlier([self.folder]):
                logger.info("kept from an earlier run: %s", kept)
        self.folder.mkdir(exist_ok=True)
        remove_leftovers(self.folder)
        self._fields = self._text_fields()
        for folder, fields in zip(self.folders, self._fields):
            remove_leftovers(folder)
            images = _images(folder)
            if images and not _has_fields(images[0][1], fields):
                for kept in rename_earlier([folder, folder.with_suffix(".png")]):
                    logger.info("kept, of another prompt: %s", kept)
            for image_step, path in _images(folder):
                if image_step > step:
                    path.unlink()
            folder.mkdir(exist_ok=True)
        with atomic_path(self.folder / "prompts.txt") as temporary:
            lines = [valid_text(prompt.line) for prompt in self.prompts]
            temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def _text_fields(self) -> list[dict[str, Any]]:
        """Return the text fields of each prompt's PNGs, those of text_to_image.py, without the step."""
        config, precision = self.model.config, self.runtime.precision
        of_model = model_fields(self.settings, config)
        return [
            {
                "prompt": prompt.prompt,
                "negative_prompt": prompt.negative_prompt,
                "seed": str(prompt.seed),
                **of_model,
                "settings": sampling_field(prompt.sampling, config, precision),
            }
            for prompt in self.prompts
        ]

    def _write_strips(self) -> None:
        """Write the film strips. An image that cannot be read is left out, with a warning."""
        for prompt, folder in zip(self.prompts, self.folders):
            size = enlarged(prompt.sampling.width or 0, prompt.sampling.height or 0)
            found, images = _images(folder), []
            for i in shown(len(found), size[0]):
                step, path = found[i]
                try:
                    with open_file(path) as file, Image.open(file, formats=("PNG",)) as image:
                        images.append((step, image.convert("RGB")))
                except (UserError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                    logger.warning("%s is not in the film strip: %s", path, plain(error))
            if images:
                draw_strip(images, size, folder.with_suffix(".png"))


def _merged(lora: LoRA) -> MergedLoRA:
    """Return a LoRA at strength 1, which text_to_image.py applies by default. Its tokens are in the text encoder."""
    return MergedLoRA("the LoRA of this step", replace(lora, embeddings={}), Strength(1.0, 1.0), None)


def _set_values(values: Sequence[tuple[Parameter, np.ndarray]]) -> None:
    for parameter, array in values:
        parameter.set_data(Tensor(np.ascontiguousarray(array)))


@contextlib.contextmanager
def _without_messages(name: str) -> Iterator[None]:
    log = logging.getLogger(name)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _images(folder: Path) -> list[tuple[int, Path]]:
    """Return the steps and paths of the images of a prompt, the oldest first."""
    if not is_folder(folder):
        return []
    matches = [(match, name) for name in list_folder(folder) if (match := FRAME.fullmatch(name))]
    return sorted((int(match[1]), folder / name) for match, name in matches)


def _has_fields(path: Path, fields: dict[str, Any]) -> bool:
    """Whether a PNG was drawn from the same prompt with the same settings."""
    try:
        with open_file(path) as file, Image.open(file, formats=("PNG",)) as image:
            found = image.info
    except (UserError, OSError, SyntaxError, ValueError):
        return False
    return all(
        found.get(key) == (valid_text(value) if isinstance(value, str) else json_text(value))
        for key, value in fields.items()
    )
