"""The workloads of the benchmark: the shapes that both sides run, and the targets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SD1, NANO = ROOT / "configs" / "v1-inference.yaml", ROOT / "configs" / "nano.yaml"

SEED = 0
STEPS, SCALE = 20, 7.5  # of the generation
STRENGTH = 0.75  # of image-to-image and of the hires fix's second pass: 15 of the 20 steps
HIRES_SCALE = 2.0
LONG_PROMPT_CHUNKS = 3  # of 75 tokens
TILE = 512  # side of a tile of the VAE in pixels, as in diffusers
RANK = 4
EPOCH_IMAGES = 64
PUBLISHED_SIZES, PUBLISHED_BATCHES = (64, 32, 16), (1, 2, 4, 8, 16, 32)  # 512, 256 and 128 pixels


@dataclass(frozen=True)
class Work:
    """A workload, which is a row of the table.

    Attributes:
        name: for the command line.
        title: for the table.
        kind: what a worker does (KINDS in `ours.py` and `reference.py`).
        config: the model's YAML.
        batch: batch size.
        size: height and width of the latents.
        time: (required, goal) as a ratio to the peer, or in seconds without a peer.
        memory: (required, goal) as a ratio to the peer.
        peer: what this project is compared with: "reference": diffusers. "none": nothing. Otherwise this project, with
            the kind of work of that name.
        calls: in addition to run.py's --calls. For workloads below a second, because MindSpore's kernels try numbers
            of threads during the first five calls.
    """

    name: str
    title: str
    kind: str
    config: Path
    batch: int
    size: int
    time: tuple[float, float] | None = None
    memory: tuple[float, float] | None = None
    peer: str = "reference"
    calls: int = 0


def _named(*works: Work) -> dict[str, Work]:
    return {work.name: work for work in works}


TABLE = _named(
    Work("unet_512", "SD1.5 UNet forward, batch 2, 64x64 latents", "unet", SD1, 2, 64, (1.1, 0.8), (1.1, 1.0)),
    Work("unet_256", "SD1.5 UNet forward, batch 2, 32x32 latents", "unet", SD1, 2, 32),
    Work("lora_512", "SD1.5 LoRA step, rank 4, batch 1, 64x64 latents", "lora", SD1, 1, 64, (1.0, 0.7), (1.1, 0.9)),
    Work("checkpointed_512_b4", "the same with gradient checkpointing, batch 4, against that without it",
         "checkpointed", SD1, 4, 64, (1.35, 1.2), (0.71, 0.65), peer="lora"),
    Work("lora_256", "SD1.5 LoRA step, rank 4, batch 1, 32x32 latents", "lora", SD1, 1, 32, (1.0, 0.7), (1.1, 0.9)),
    Work("lora_nano", "nano LoRA step, rank 4, batch 16", "lora", NANO, 16, 16, (1.0, 0.6), calls=15),
    Work("epoch_256", "SD1.5 LoRA epoch, 64 images of 256 px, batch 1", "epoch", SD1, 1, 32, (0.7, 0.5)),
    Work("generate_nano", "nano generation, 20 steps of DPM-Solver++, guidance, batch 16", "generate", NANO, 16, 16,
         (1.0, 0.6)),
    Work("merged_nano", "the same with a merged LoRA, against the base", "merged", NANO, 16, 16, peer="generate"),
    Work("euler_a_nano", "nano generation with Euler ancestral, batch 16", "euler_a", NANO, 16, 16, (1.0, 0.6)),
    Work("image_to_image_nano", "nano image-to-image, strength 0.75, batch 16", "image_to_image", NANO, 16, 16,
         (1.0, 0.6)),
    Work("inpainting_nano", "nano inpainting, four channels, strength 0.75, batch 16", "inpainting", NANO, 16, 16,
         (1.0, 0.6)),
    Work("hires_nano", "nano hires fix, 64 to 128 px, strength 0.75, batch 4", "hires", NANO, 4, 16, (1.0, 0.6)),
    Work("long_prompts_nano", "nano generation from prompts of 225 tokens, batch 16", "long_prompts", NANO, 16, 16,
         (1.0, 0.6)),
    Work("tiled_1024", "SD1.5 VAE decode of 1,024 px in tiles of 512", "tiled", SD1, 1, 128, (1.1, 0.8), (1.1, 1.0)),
    Work("decode_512", "SD1.5 VAE decode, 512 px", "decode", SD1, 1, 64, (1.1, 0.8)),
    Work("text", "SD1.5 text encoding, batch 2", "text", SD1, 2, 64, (1.1, 0.8), calls=15),
    Work("first_step", "first step of the SD1.5 LoRA graph, compile included, 64x64", "first_step", SD1, 1, 64,
         (25.0, 10.0), peer="none"),
    Work("first_step_256", "the same, 32x32", "first_step", SD1, 1, 32, (25.0, 10.0), peer="none"),
    Work("first_step_cached", "the same, 64x64, from the compile cache", "first_step_cached", SD1, 1, 64, (25.0, 5.0),
         peer="none"),
    Work("script_nano", "text_to_image.py nano, process start to PNG", "script", NANO, 1, 16, (20.0, 8.0), peer="none"),
)  # fmt: skip
MEMORY_TABLE = _named(
    *(
        Work(f"{kind}_{8 * size}_b{batch}", f"SD1.5 {label} step, {8 * size} px, batch {batch}", kind, SD1, batch, size)
        for kind, label in (("lora", "LoRA"), ("full", "full fine-tuning"))
        for size in PUBLISHED_SIZES
        for batch in PUBLISHED_BATCHES
    )
)
# The rows of run.py --peers. Scripts and loading read a folder with random weights.
PEERS_TABLE = _named(
    *(TABLE[name] for name in ("unet_512", "unet_256", "lora_512", "lora_256", "epoch_256")),
    Work("script_512", "SD1.5 generation, 512 px, 20 steps, batch 1, process start to PNG", "script", SD1, 1, 64),
    *(TABLE[name] for name in ("lora_nano", "generate_nano", "decode_512")),
    Work("load", "loading SD1.5 from a folder in fp32", "load", SD1, 1, 64),
)
WORKS = {**TABLE, **PEERS_TABLE, **MEMORY_TABLE}
