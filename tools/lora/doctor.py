"""Say in one page what a LoRA file is, and show with a base model that it has an effect and works elsewhere.

    python tools/lora/doctor.py style.safetensors
    python tools/lora/doctor.py style.safetensors --base models/sd_v1.5.safetensors --prompt "a dog"

The page names the format, the kinds of layers, the base model, the trigger words and how it was trained, then the
norm of each block's update and layers that are dead or exploding. With a base model, one prompt is drawn without
the LoRA, with it, and with it written to and read from each format that it could be shared in. The images are in
output_path.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ldm.runtime.script import run_script, start_script  # noqa: E402

if __name__ == "__main__":
    start_script()

from ldm.errors import plain  # noqa: E402
from ldm.files.outputs import claim_file, claim_folder  # noqa: E402
from ldm.files.paths import MAX_STRENGTH, under_root  # noqa: E402
from ldm.lora.formats import lora_files, read_lora  # noqa: E402
from ldm.lora.lora import LoRA  # noqa: E402
from ldm.lora.merge import match_shapes  # noqa: E402
from ldm.settings.declare import MAX_SEED, REQUIRED, input_path, setting  # noqa: E402
from ldm.settings.model import load_model_config  # noqa: E402
from ldm.settings.model_yaml import MAX_TIMESTEPS  # noqa: E402
from ldm.settings.read import read_settings  # noqa: E402
from ldm.weights.base_model import map_base_model, open_base_model  # noqa: E402
from ldm.weights.checkpoint import open_checkpoint  # noqa: E402
from ldm.weights.names import CanonicalArrays  # noqa: E402
from tools.lora.diagnosis.facts import facts, trigger_words  # noqa: E402
from tools.lora.diagnosis.update_norms import findings, norm_table, update_norms  # noqa: E402

PLAIN_PROMPT = "a photo of a dog"  # where neither the user nor the file gives words


@dataclass
class Settings:
    """The command line."""

    lora: list[str] = setting(
        REQUIRED, "a LoRA of any known format: a file, or a folder of PEFT's", positional=True, path=True, length=1
    )
    base: Optional[str] = input_path(
        "base model to draw with: a .safetensors, a .ckpt or a diffusers folder; None only reads the file"
    )
    config: Optional[str] = input_path("YAML of the base model; None: what its metadata and shapes show")
    prompt: Optional[str] = setting(None, "the prompt to draw; None: the LoRA's trigger words")
    strength: float = setting(1.0, "how much of the LoRA is applied", low=-MAX_STRENGTH, high=MAX_STRENGTH)
    sampling_steps: int = setting(10, "steps of the sampler for each image", low=1, high=MAX_TIMESTEPS)
    seed: int = setting(42, "seed of the starting latents", low=0, high=MAX_SEED)
    output_path: Path = setting(Path("output/doctor"), "folder for the images and grid.png", path=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tool."""
    settings = read_settings(Settings, argv, description=__doc__)
    config = load_model_config(under_root(settings.config)) if settings.config else None
    path = Path(settings.lora[0])
    with ExitStack() as claims:
        if settings.base is not None:
            claims.enter_context(claim_folder(settings.output_path, "--output_path"))
            claims.enter_context(claim_file(settings.output_path / "grid.png", "--output_path"))
        lora = read_lora(path, config)
        print("\n".join(facts(path, lora)))
        show_norms(str(path), lora, settings.base)
        if settings.base is not None:
            show_effect(settings, path)
        else:
            print("\ngive --base to see whether it has an effect and works elsewhere")


def show_norms(path: str, lora: LoRA, base_path: str | None) -> None:
    """Print how much each block is changed, and what is wrong with layers."""
    base = None
    if base_path is not None:
        checkpoint = open_base_model(base_path)
        base = CanonicalArrays(checkpoint, map_base_model(checkpoint))
        match_shapes({name: base.shape(name) for name in base}, lora).require(path)
    norms = update_norms(lora, base)
    print("\nhow much each block is changed, at strength 1")
    print("\n".join(norm_table(norms)))
    print("\n".join(findings(lora, norms) or ["no layer is dead or exploding"]))


def show_effect(settings: Settings, path: Path) -> None:
    """Draw the images, write them and the grid, and print the verdict."""
    from ldm.generation.loading import select_lora
    from ldm.generation.pipeline import Pipeline
    from ldm.runtime.device import setup_runtime
    from tools.grid import draw_grid
    from tools.lora.diagnosis.effect import draw, save_images, verdict

    setup_runtime()  # fp32 on the CPU: a weight rounded to bf16 may differ where two formats differ in the last bits
    pipeline = Pipeline.from_checkpoint(settings.base, config=settings.config)
    lora = select_lora(pipeline.config, path)
    metadata = open_checkpoint(lora_files(path)[0]).metadata
    prompt = settings.prompt or ", ".join([*lora.embeddings, *trigger_words(metadata)[:1]]) or PLAIN_PROMPT
    how = f"strength {settings.strength:g}, {settings.sampling_steps} steps, seed {settings.seed}"
    print(f'\ndrawing "{plain(prompt)}" at {how}')
    drawn = list(draw(pipeline, lora, prompt, settings.strength, settings.sampling_steps, settings.seed))
    files = save_images(drawn, settings.output_path)
    draw_grid([prompt], {title: [file] for title, file in files.items()}, settings.output_path / "grid.png")
    print("\n".join(verdict(drawn)))
    print(f"{settings.output_path / 'grid.png'}: the images, side by side")


if __name__ == "__main__":
    run_script(main)
