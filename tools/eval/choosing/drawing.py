"""Images of the same prompts with one pipeline and changing LoRAs, each drawn once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ldm.diffusion.sampling import Sampling, default_batch_size, latent_shape
from ldm.errors import UserError, plain
from ldm.files.atomic import remove_path
from ldm.files.inputs import is_file, is_there
from ldm.generation.image_files import write_png
from ldm.generation.pipeline import Pipeline
from ldm.metrics.report import write_json
from ldm.runtime.device import current_runtime
from tools.eval.comparison.stages import read_json_or_none

RECORD = "drawn_from.json"  # in a folder of images: everything that they depend on


@dataclass
class Drawing:
    """Draws the prompts, from the same starting latents every time.

    Args:
        pipeline: Its LoRAs are exchanged, so that no network is compiled again.
        prompts: One for each image.
        seed: Of the starting latents. Image i depends on the seed and i alone.
        sampling: How the images are sampled.
        inputs: What the images depend on beside these and the LoRA, such as the hash of the base model, for JSON.
    """

    pipeline: Pipeline
    prompts: Sequence[str]
    seed: int
    sampling: Sampling
    inputs: Mapping[str, Any]

    def draw(self, folder: Path, loras: Sequence[tuple[Path, float]], inputs: Mapping[str, Any], bar: tqdm) -> None:
        """Draw the images that are missing in a folder. Those of other inputs are removed first.

        Args:
            folder: Where the images 00000.png and so on are written.
            loras: Files with their strengths, which are merged if an image is missing.
            inputs: What identifies the LoRAs, for JSON.
            bar: Advances by each image.

        Raises:
            UserError: The folder holds something else, or a LoRA does not fit the model.
        """
        record = {**self.inputs, **inputs, **_bf16(), "prompts": list(self.prompts), "seed": self.seed}
        record = json.loads(json.dumps({**record, "sampling": repr(self.sampling)}))
        begin_folder(folder, record)
        files = self.files(folder)
        missing = np.array([i for i, file in enumerate(files) if not is_file(file)], np.int64)
        bar.update(len(files) - len(missing))
        if not len(missing):
            return
        self.pipeline.set_loras(loras)
        shape = latent_shape(self.pipeline.config, self.sampling.height, self.sampling.width)
        # At least a whole batch, so that a resumed run compiles no network for another size.
        chosen = np.resize(missing, max(len(missing), self.sampling.batch_size))
        latents = self.pipeline.starting_latents(self.seed, chosen.tolist(), shape)
        batches = self.pipeline.generate(
            [self.prompts[i] for i in chosen], self.sampling, self.seed, starting_latents=latents, progress=False
        )
        for batch in batches:
            for place, image in zip(batch.indices, batch.images):
                if place < len(missing):
                    index = int(missing[place])
                    write_png(files[index], image, {"prompt": self.prompts[index], "index": str(index)})
                    bar.update()

    def files(self, folder: Path) -> list[Path]:
        """Return the files of a folder's images, in the order of the prompts."""
        return [folder / f"{i:05d}.png" for i in range(len(self.prompts))]


def _bf16() -> dict[str, str]:
    """Return the entry of a record in bf16. There is none in fp32, so that images of earlier versions are kept."""
    runtime = current_runtime()
    return {"precision": "bf16"} if runtime is not None and runtime.bf16 else {}


def begin_folder(folder: Path, record: Mapping[str, Any]) -> None:
    """Make a folder for images with a record of their inputs. One with another record is removed.

    Raises:
        UserError: The folder holds something without a record.
    """
    if read_json_or_none(folder / RECORD) == record:
        return
    if is_there(folder) and not is_file(folder / RECORD):
        raise UserError(f"{plain(folder)} was not written by this tool: give another --output_path")
    remove_path(folder)
    write_json(folder / RECORD, record)


def make_sampling(size: int, steps: int, scale: float, count: int) -> Sampling:
    """Return the sampling of square images with DPM-Solver++, in batches of at most `count` images."""
    batch_size = min(default_batch_size(count, size, size), count)
    return Sampling("dpm_solver_pp", steps, scale, height=size, width=size, batch_size=batch_size)
