"""The memory and the time of a training step, from measured tables and the settings. Nothing is loaded or computed.

TABLE holds what was measured. Between its shapes, memory and time follow straight lines, over the batch and over the
number of pixels. What follows from numbers of parameters is added, and everything else is said not to be known.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ldm.runtime.launcher import is_scheduler, process_index
from ldm.runtime.precision import automatic_precision, kernels_are_expected_to_multiply_bf16
from ldm.settings.model import ModelConfig
from ldm.settings.model_size import (
    LoRASize,
    text_lora_sizes,
    text_parameters,
    unet_lora_sizes,
    unet_parameters,
    vae_parameters,
)
from ldm.settings.optimizer import AdafactorOptions
from ldm.settings.train import TrainSettings
from ldm.training.checks import (
    check_settings,
    image_size,
    keeps_text_encoder_in_fp32,
    read_model_config,
    trains_base_model,
)

GB = 2**30
FP32, BF16 = 4, 2  # bytes


class Row(NamedTuple):
    """A measured training step of the UNet alone: fp32 on the CPU, AdamW, one micro-batch, clip_grad."""

    model: str  # architecture
    training: str  # "LoRA" (of MEASURED_RANK on "attention") or "full"
    pixels: int  # width and height of the images
    batch: int
    gb: float  # largest resident size of the process, in GB of 2**30 bytes
    seconds: float  # of the processor with one thread, of the clock with two
    gradient_checkpointing: bool = False
    threads: int = 1


# Measured on an AMD EPYC with AVX-512 and 24 GB. docs/performance.md has the same figures, and says when each was.
# A shape with checkpointing may stand alone. Without it, each size needs two batches for a line between them.
PROCESSOR = "AMD EPYC with AVX-512"
MEASURED_RANK = 4
TABLE = (
    Row("sd1", "LoRA", 512, 1, 5.44, 10.3),
    Row("sd1", "LoRA", 512, 2, 7.27, 21.7),
    Row("sd1", "LoRA", 512, 4, 9.24, 39.1),
    Row("sd1", "LoRA", 512, 8, 14.20, 71.1),
    Row("sd1", "LoRA", 256, 1, 4.47, 2.4),
    Row("sd1", "LoRA", 256, 2, 4.78, 4.3),
    Row("sd1", "LoRA", 256, 4, 5.32, 7.9),
    Row("sd1", "LoRA", 256, 8, 7.17, 17.1),
    Row("sd1", "LoRA", 256, 16, 9.12, 28.1),
    Row("sd1", "LoRA", 256, 32, 14.06, 51.7),
    Row("sd1", "LoRA", 128, 1, 4.17, 1.0),
    Row("sd1", "LoRA", 128, 2, 4.25, 1.7),
    Row("sd1", "LoRA", 128, 4, 4.41, 3.1),
    Row("sd1", "LoRA", 128, 8, 4.72, 5.8),
    Row("sd1", "LoRA", 128, 16, 5.36, 10.6),
    Row("sd1", "LoRA", 128, 32, 7.13, 20.6),
    Row("sd1", "full", 512, 1, 15.98, 18.7),
    Row("sd1", "full", 512, 2, 16.97, 32.8),
    Row("sd1", "full", 512, 4, 18.89, 55.0),
    Row("sd1", "full", 256, 1, 14.91, 9.0),
    Row("sd1", "full", 256, 2, 14.39, 9.8),
    Row("sd1", "full", 256, 4, 14.85, 16.7),
    Row("sd1", "full", 256, 8, 15.88, 29.9),
    Row("sd1", "full", 256, 16, 17.85, 47.6),
    Row("sd1", "full", 128, 1, 14.60, 6.2),
    Row("sd1", "full", 128, 2, 14.60, 7.3),
    Row("sd1", "full", 128, 4, 14.57, 9.6),
    Row("sd1", "full", 128, 8, 14.13, 11.4),
    Row("sd1", "full", 128, 16, 14.59, 18.6),
    Row("sd1", "full", 128, 32, 15.63, 35.5),
    Row("sd1", "LoRA", 512, 4, 6.00, 50.0, gradient_checkpointing=True),  # 1.28 times the time without
    Row("nano", "LoRA", 64, 1, 0.80, 0.056),
    Row("nano", "LoRA", 64, 16, 0.93, 0.284),
    Row("sd1", "LoRA", 512, 1, 5.34, 4.95, threads=2),
    Row("sd1", "LoRA", 256, 1, 4.44, 1.25, threads=2),
    Row("nano", "LoRA", 64, 16, 0.91, 0.158, threads=2),
)
# Parameters of the UNets that were measured: a model with another number has other figures.
UNET_PARAMETERS = {"sd1": 859_520_964, "nano": 11_073_604}
NAMES = {"sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x", "nano": "the nano model"}
# Arrays of the optimizer for each trained one. AdamW's are in the measured figures.
OPTIMIZER_ARRAYS = {"adamw": 2, "lion": 1, "adafactor": 0, "adamwschedulefree": 2, "prodigy": 4}
ARRAYS_OF_LORA = 4  # for each LoRA parameter: itself, its gradient and AdamW's two moments

Points = Mapping[tuple[int, int], float]  # (pixels of a side, batch) -> what was measured


class Part(NamedTuple):
    """What a part of the memory is for."""

    gb: float  # negative where a setting needs less than what was measured
    what: str


@dataclass(frozen=True)
class Estimate:
    """What a training step takes.

    Attributes:
        title: What is estimated.
        parts: The memory, the step of TABLE first. Empty if nothing like it was measured.
        seconds: A whole step with all its micro-batches, on one core. None if nothing like it was measured.
        two_cores: Time on two cores as a share of that on one, None if it was not measured.
        steps: Of the whole run, None if only the data says it.
        notes: What the figures are taken from, and what is not in them.
    """

    title: str
    parts: tuple[Part, ...]
    seconds: float | None
    two_cores: float | None
    steps: int | None
    notes: tuple[str, ...]

    @property
    def memory_gb(self) -> float | None:
        """The largest resident size of a training's process, in GB of 2**30 bytes."""
        return sum(part.gb for part in self.parts) if self.parts else None


def print_estimate(settings: TrainSettings) -> None:
    """Print the estimate for a run. Only the first process of several prints.

    Raises:
        UserError: As check_settings and read_model_config.
    """
    check_settings(settings)
    config = read_model_config(settings)
    if is_scheduler() or process_index():
        return
    machine_gb = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GB
    for line in report(estimate(settings, config), settings, machine_gb, len(os.sched_getaffinity(0))):
        print(line)


def estimate(settings: TrainSettings, config: ModelConfig) -> Estimate:
    """Return what a step of these settings takes, without looking at the machine or the data.

    Raises:
        UserError: The model does not take this image size.
    """
    size, batch = image_size(settings, config), settings.train_batch_size
    model, training = NAMES.get(config.architecture, "this model"), "LoRA" if settings.use_lora else "full"
    count = settings.gradient_accumulation_steps
    accumulated = f", {count} micro-batches a step" if count > 1 else ""
    checkpointed = ", with gradient_checkpointing" if settings.gradient_checkpointing else ""
    way = f"LoRA of rank {settings.lora_rank}" if settings.use_lora else "full fine-tuning"
    title = f"{way} of {model}, {size} x {size} pixels, batch {batch}{accumulated}{checkpointed}"
    reason = _not_measured(settings, config, training)
    if reason:
        return Estimate(title, (), None, None, settings.max_steps, (f"not measured: {reason}",))

    source = "sd1" if config.architecture == "sd2" else config.architecture
    gb, seconds = _step(source, training, settings.gradient_checkpointing, size, batch)
    notes = list(_notes_on_shape(source, training, settings.gradient_checkpointing, size, batch))
    what = "a step of the UNet alone, from the table in docs/performance.md"
    if config.architecture == "sd2":
        scale = unet_parameters(**config.unet) / UNET_PARAMETERS["sd1"]
        gb, what = gb * scale, f"a step of the UNet alone: that of Stable Diffusion 1.x, scaled by {scale:.3f}"
        notes.append(
            "not measured: Stable Diffusion 2.x. The memory is scaled by the number of the UNet's parameters, and the "
            "time is not known"
        )
    parts = (Part(gb, what), *_added_memory(settings, config))
    return Estimate(
        title,
        parts,
        None if config.architecture == "sd2" else seconds * count,
        _two_cores(source, size),
        settings.max_steps,
        (*notes, *_notes_on_settings(settings)),
    )


def report(found: Estimate, settings: TrainSettings, machine_gb: float, cores: int) -> list[str]:
    """Return the lines to print for an estimate, on a machine with this memory and so many cores."""
    lines = [f"estimate: {found.title}"]
    memory = found.memory_gb
    if memory is not None:
        lines.append(f"memory: about {memory:.3g} GB, the largest resident size; this machine has {machine_gb:.3g} GB")
        lines += [f"  {part.gb:.2f} GB: {part.what}" for part in found.parts]
    if found.seconds is not None:
        lines.append(
            f"time: about {_duration(found.seconds)} a step on one core of the processor that was measured "
            f"({PROCESSOR}); this machine has {_count(cores, 'core')}"
        )
        if found.two_cores is not None:
            lines.append(f"  on two cores of it, a LoRA step took {found.two_cores:.2f} of its time on one")
        if found.steps is None:
            lines.append("  the whole run: the number of steps follows from the data, unless max_steps is given")
        else:
            whole = _duration(found.steps * found.seconds)
            lines.append(f"  the whole run, {_count(found.steps, 'step')}: about {whole} on one core")
    lines += [f"note: {note}" for note in found.notes]
    if memory is not None and memory > machine_gb:
        lines.append(
            f"warning: {memory:.3g} GB are more than the {machine_gb:.3g} GB of this machine: {_way_out(settings)}"
        )
    return lines


def _not_measured(settings: TrainSettings, config: ModelConfig, training: str) -> str:
    """Return what keeps a training from having figures, "" if it has."""
    on_ascend = settings.device_target == "Ascend" or (
        settings.device_target is None and bool(glob.glob("/dev/davinci[0-9]*"))
    )
    if on_ascend or settings.precision == "fp16":
        where = "training on Ascend" if on_ascend else "training in fp16"
        return f"{where}. `python -m tools.ascend.dry_run` counts the memory of a step on Ascend (docs/ascend.md)"
    if config.architecture not in NAMES:
        return f"the architecture {config.architecture}. There are figures of {', '.join(NAMES)}"
    if settings.use_lora and not settings.lora_ft_unet:
        return "a LoRA of the text encoder alone"
    if settings.trains_token_alone:
        return "textual inversion without a LoRA"
    if config.architecture == "sd2":
        return ""
    count = unet_parameters(**config.unet)
    if count != UNET_PARAMETERS[config.architecture]:
        return (
            f"a UNet of {count:,} parameters. That of {NAMES[config.architecture]} which was measured has "
            f"{UNET_PARAMETERS[config.architecture]:,}"
        )
    if not _rows(config.architecture, training, False):
        return f"full fine-tuning of {NAMES[config.architecture]}"
    return ""


def _rows(model: str, training: str, checkpointing: bool, threads: int = 1) -> list[Row]:
    wanted = (model, training, checkpointing, threads)
    return [row for row in TABLE if (row.model, row.training, row.gradient_checkpointing, row.threads) == wanted]


def _step(model: str, training: str, checkpointing: bool, size: int, batch: int) -> tuple[float, float]:
    """Return the GB and the seconds of a micro-batch, as those of the rows where there are some of this shape.

    Checkpointing is measured at few shapes. Between and beyond them, it keeps its share of the memory that grows with
    the images, and its factor of the time.
    """
    rows = _rows(model, training, False)
    gb_of = {(row.pixels, row.batch): row.gb for row in rows}
    seconds_of = {(row.pixels, row.batch): row.seconds for row in rows}
    gb, seconds = _at(gb_of, size, batch), _at(seconds_of, size, batch)
    checkpointed = _rows(model, training, True)
    if not (checkpointing and checkpointed):
        return gb, seconds
    without_images = _at(gb_of, min(row.pixels for row in rows), 0)
    shares, factors = {}, {}
    for row in checkpointed:
        shape = row.pixels, row.batch
        shares[shape] = (row.gb - without_images) / (_at(gb_of, *shape) - without_images)
        factors[shape] = row.seconds / _at(seconds_of, *shape)
    share, factor = _at(shares, size, batch, held=True), _at(factors, size, batch, held=True)
    return without_images + share * (gb - without_images), factor * seconds


def _at(points: Points, size: int, batch: float, held: bool = False) -> float:
    """Return the value at a shape: straight lines over the batch at each size, and over the pixels between the sizes.

    Args:
        points: The measured values.
        size: Pixels of a side.
        batch: Images.
        held: Beyond the points, the outermost value holds. Otherwise the outermost lines go on, and where there is one
            size alone, an image counts by its pixels.
    """
    sizes = sorted({pixels for pixels, _ in points})
    if len(sizes) == 1 and not held:
        size, batch = sizes[0], batch * size**2 / sizes[0] ** 2
    over_pixels = []
    for pixels in sizes:
        over_batch = sorted((other, value) for (side, other), value in points.items() if side == pixels)
        over_pixels.append((pixels**2, _on_lines(over_batch, batch, held)))
    return _on_lines(over_pixels, size**2, held)


def _on_lines(points: Sequence[tuple[float, float]], x: float, held: bool) -> float:
    """Return the value at x of the straight lines between points (x, value), which are sorted."""
    if len(points) == 1:
        return points[0][1]
    if held:
        x = min(max(x, points[0][0]), points[-1][0])
    end = next((i for i in range(1, len(points)) if x <= points[i][0]), len(points) - 1)
    (x0, y0), (x1, y1) = points[end - 1], points[end]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def _two_cores(model: str, size: int) -> float | None:
    """Return the time of a LoRA step on two cores as a share of that on one, at the nearest size that was measured."""
    rows = _rows(model, "LoRA", False, threads=2)
    if not rows:
        return None
    row = min(rows, key=lambda row: abs(row.pixels - size))
    return row.seconds / _step(model, "LoRA", False, row.pixels, row.batch)[1]


def _notes_on_shape(model: str, training: str, checkpointing: bool, size: int, batch: int) -> Iterator[str]:
    rows = _rows(model, training, False)
    largest = max(row.pixels for row in rows)
    if model == "nano" and size != largest:
        yield f"nano was measured at {largest} pixels alone: other sizes are scaled by their pixels"
    elif size < min(row.pixels for row in rows) or not any(row.pixels >= size and row.batch >= batch for row in rows):
        yield "this is beyond the sizes and batches that were measured: the outermost lines go on, and may be far off"
    elif not any((row.pixels, row.batch) == (size, batch) for row in rows):
        yield "this size or batch was not measured itself: the figures lie on lines between those that were"
    if not checkpointing:
        return
    checkpointed = _rows(model, training, True)
    if not checkpointed:
        yield (
            f"not measured: gradient_checkpointing with {'a LoRA' if training == 'LoRA' else 'full fine-tuning'} of "
            f"{NAMES[model]}. The figures are those without it: it takes less memory and more time"
        )
    elif not any((row.pixels, row.batch) == (size, batch) for row in checkpointed):
        shapes = ", ".join(f"{row.pixels} pixels with batch {row.batch}" for row in checkpointed)
        yield f"gradient_checkpointing was measured at {shapes}: its share of memory and time is taken from there"


def _added_memory(settings: TrainSettings, config: ModelConfig) -> Iterator[Part]:
    """Yield what a training's process holds beside the step that was measured, from numbers of parameters."""
    beside = text_parameters(**config.text) + (vae_parameters(**config.vae) if config.vae else 0)
    yield _part(beside, 1, "weights of the autoencoder and the text encoder")
    if _holds_bf16(settings):
        # Biases and norms, which keep fp32, are less than 1 % of the others.
        held, networks = unet_parameters(**config.unet), "the UNet"
        if not keeps_text_encoder_in_fp32(settings):
            tables = text_parameters(**{**config.text, "num_layers": 0})  # of tokens and positions, which do too
            held, networks = held + text_parameters(**config.text) - tables, "UNet and text encoder"
        what = f"weights of {networks} in bf16: {held:,} numbers of {BF16} bytes in place of {FP32}"
        yield Part(held * (BF16 - FP32) / GB, what)
    trained = unet_parameters(**config.unet)
    if settings.use_lora:
        trained = lora_parameters(settings, config)
        sizes = unet_lora_sizes(**config.unet)
        measured = MEASURED_RANK * sum(size.inputs + size.outputs for size in sizes if size.in_attention)
        if trained != measured:
            yield _part(trained - measured, ARRAYS_OF_LORA, "of this LoRA beyond the measured one, with AdamW")
    options = settings.optimizer_options()
    arrays = OPTIMIZER_ARRAYS[settings.optim]
    if isinstance(options, AdafactorOptions) and options.beta1 is not None:
        arrays += 1  # its first moment
    difference = arrays - OPTIMIZER_ARRAYS["adamw"]
    if difference:
        yield _part(trained, difference, f"arrays of {settings.optim} beyond AdamW's two")
    if settings.use_ema:
        yield _part(trained, 1, "moving average (use_ema)")
    if settings.gradient_accumulation_steps > 1:
        yield _part(trained, 1, "sums of the gradients (gradient_accumulation_steps)")


def _holds_bf16(settings: TrainSettings) -> bool:
    """Whether the frozen weights are held in bf16 on the CPU, or are expected to be with precision "auto"."""
    if settings.precision != "auto":
        return settings.precision == "bf16"
    keeps_fp32 = settings.mode == 1 or trains_base_model(settings)
    return automatic_precision(kernels_are_expected_to_multiply_bf16, keeps_fp32) == "bf16"


def _part(parameters: int, arrays: int, what: str) -> Part:
    copies = "" if arrays == 1 else f" x {arrays}"
    return Part(parameters * arrays * FP32 / GB, f"{what}: {parameters:,}{copies} numbers of {FP32} bytes")


def lora_parameters(settings: TrainSettings, config: ModelConfig) -> int:
    """Return the parameters of the LoRA that is trained. lora_config and patterns with `*` are not looked at."""
    sizes: list[LoRASize] = list(unet_lora_sizes(**config.unet)) if settings.lora_ft_unet else []
    if settings.lora_ft_text_encoder:
        sizes += text_lora_sizes(**config.text)
    algo = settings.algo if settings.algo in ("loha", "lokr") else "lora"
    count = 0
    for size in sizes:
        added = settings.conv_dim is not None and size.in_residual
        if added or any(_is_target(size, target) for target in settings.lora_targets):
            rank = settings.lora_rank if size.kernel_size == 1 or settings.conv_dim is None else settings.conv_dim
            count += size.parameters(algo, rank, settings.factor, settings.use_tucker)
            count += size.outputs if settings.dora_wd or settings.algo == "dora" else 0
    return count


def _is_target(size: LoRASize, target: str) -> bool:
    return target == "all" or (target == "attention" and size.in_attention) or f".{size.name}".endswith(f".{target}")


def _notes_on_settings(settings: TrainSettings) -> Iterator[str]:
    """Yield what the settings change that no figure is known of."""
    missing = []
    if _holds_bf16(settings):
        if settings.precision == "auto":
            yield "precision auto is expected to be bf16 here, by the processor's flags and the name of a C++ compiler"
        yield (
            "bf16: the memory is that of fp32 without half of the weights that are held in bf16, and the time is that "
            "of fp32. Measured by AVX512-BF16, a LoRA step of SD1.5 took 0.7 to 0.8 of that (docs/performance.md)"
        )
    if settings.lora_config is not None:
        missing.append("the layers and ranks of lora_config")
    elif settings.use_lora and (settings.lora_targets != ["attention"] or settings.conv_dim is not None):
        missing.append("the time, and what is kept for the gradients, of layers other than all of attention")
    if settings.use_lora and (settings.algo not in ("lora", "rslora") or settings.dora_wd):
        missing.append("the time and what is kept for the gradients that LoHa, LoKr and DoRA take beyond a plain LoRA")
    if settings.trains_text_encoder:
        missing.append("the text encoder's own forward and backward pass")
    if settings.mode == 1:
        missing.append("what pynative mode changes")
    if settings.shard_optimizer:
        missing.append("what shard_optimizer saves")
    if settings.sample_prompts is not None:
        missing.append("drawing samples")
    missing.append("compiling, loading, encoding of images and captions, validation and saving")
    yield f"not in the figures: {'; '.join(missing)}"
    if settings.gradient_accumulation_steps > 1 and not settings.use_lora:
        yield "the time counts the optimizer's share with each micro-batch, though it runs once a step"
    if settings.enable_bucket:
        yield "buckets are taken to have the pixels of image_size squared"
    if settings.use_parallel:
        yield "the figures are of one process, and each of a data-parallel run takes as much"


def _way_out(settings: TrainSettings) -> str:
    ways = [] if settings.gradient_checkpointing else ["add --gradient_checkpointing True"]
    if not settings.use_lora:
        ways.append("train a LoRA (use_lora)")
    if settings.train_batch_size > 1:
        ways.append("take a smaller train_batch_size with more gradient_accumulation_steps, which trains the same")
    ways.append("take a smaller image_size")
    return ", or ".join(ways)


def _duration(seconds: float) -> str:
    for name, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {name}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
