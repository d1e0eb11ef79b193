"""The effect of a LoRA, shown: one prompt with it, without it, and reloaded from each format it could be shared in."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.errors import UserError, plain
from ldm.generation.pipeline import Pipeline
from ldm.lora.formats import FORMATS, read_lora, write_lora
from ldm.lora.lora import LoRA
from ldm.lora.merged import MergedLoRA
from ldm.lora.strength import Strength

WITHOUT, WITH = "without it", "with it"


@dataclass(frozen=True)
class Drawn:
    """An image of one prompt.

    Attributes:
        title: "with it", "without it" or the format that the LoRA was reloaded from.
        image: (H, W, 3) uint8, None where the format cannot hold the LoRA.
        why_not: The reason for that.
    """

    title: str
    image: np.ndarray | None
    why_not: str = ""

    def difference(self, other: Drawn) -> int | None:
        """Return the largest difference of two images, in levels of 0 to 255."""
        if self.image is None or other.image is None:
            return None
        return int(np.abs(self.image.astype(int) - other.image).max())


def draw(pipeline: Pipeline, lora: LoRA, prompt: str, strength: float, steps: int, seed: int) -> Iterator[Drawn]:
    """Yield the image without the LoRA, with it, and with it written to and read from each format.

    Args:
        pipeline: The base model, without a LoRA.
        lora: The LoRA.
        prompt: The prompt.
        strength: How much of the LoRA is applied.
        steps: Steps of the sampling.
        seed: The seed of the starting latents.
    """

    def image(title: str, loras: list[MergedLoRA]) -> Drawn:
        pipeline.merge_loras(loras)
        (made,) = pipeline(prompt, num_inference_steps=steps, seed=seed, progress=False).images
        return Drawn(title, np.asarray(made))

    def merged(title: str, lora: LoRA) -> list[MergedLoRA]:
        return [MergedLoRA(title, lora, Strength.from_value(strength))]

    yield image(WITHOUT, [])
    yield image(WITH, merged(WITH, lora))
    with tempfile.TemporaryDirectory() as folder:
        for number, format in enumerate(FORMATS):
            suffixes = FORMATS[format].suffixes
            path = Path(folder) / f"{number}{suffixes[0] if suffixes else ''}"
            try:
                write_lora(path, lora, format, pipeline.config)
            except UserError as error:
                yield Drawn(format, None, _reason(error, path))
                continue
            yield image(format, merged(format, read_lora(path, pipeline.config)))
    pipeline.merge_loras([])


def verdict(drawn: list[Drawn]) -> list[str]:
    """Return the lines that say whether the LoRA has an effect and works elsewhere."""
    without, with_it, *reloaded = drawn
    effect = with_it.difference(without)
    lines = [f"has an effect      {'YES' if effect else 'NO'}: up to {effect} of 255 from the image of the base model"]
    shared = [image for image in reloaded if image.image is not None]
    differing = [image for image in shared if (image.difference(with_it) or 0) > 1]
    lines.append(
        f"works elsewhere    {'NO' if differing or not shared else 'YES'}: {len(shared) - len(differing)} of "
        f"{len(reloaded)} formats give the same image"
    )
    for image in reloaded:
        difference = image.difference(with_it)
        if difference is None:
            lines.append(f"  {image.title:18} cannot hold it: {image.why_not}")
        else:
            lines.append(f"  {image.title:18} largest difference {difference} of 255")
    return lines


def save_images(drawn: list[Drawn], folder: Path) -> dict[str, Path]:
    """Write the images as PNGs and return title -> file, in order."""
    files = {}
    for image in drawn:
        if image.image is not None:
            files[image.title] = folder / f"{image.title.replace(' ', '_')}.png"
            Image.fromarray(image.image).save(files[image.title])
    return files


def _reason(error: UserError, path: Path) -> str:
    """Return an error without the temporary file's name."""
    return plain(str(error).replace(f"{path}: ", "").replace(str(path), "the file"), 160)
