"""Draw with stable-diffusion.cpp and with this project, from the same weights, LoRA and noise, and compare the images.

    python -m tests.outside.stable_diffusion_cpp --library FOLDER
    python -m tests.outside.stable_diffusion_cpp --library FOLDER --size 256 --steps 4 --scale 1

FOLDER is where `pip install --target FOLDER stable-diffusion-cpp-python` has put its package, compiled for the CPU. The
base model is SD1.5 in full size with random weights in fp32, written as one .safetensors; the LoRA is random and
written in kohya's form. No test of the suite: it takes about 10 GB of memory and of disk, and some minutes.

stable-diffusion.cpp takes no latents, but its noise is a function of the seed (Philox, as on CUDA), so it is drawn here
as well. Its Euler steps at the noise levels of this project's DDIM time steps are the same steps: with x / sqrt(abar)
for x, DDIM without noise is Euler's method. It returns images of 8 bits, so pixels are compared.
docs/parity.md holds what this printed, and why the images differ as they do.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "v1-inference.yaml"
PROMPT, NEGATIVE_PROMPT = "a drawing of a blue dragon", "blurry"
SEED = 42
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
# Factors of the last layers' weights, which make the images high in contrast and the UNet's share of them large, so
# that 8 bits are fine enough.
LOUD = {"model.diffusion_model.out.2.weight": 4.0, "first_stage_model.decoder.conv_out.weight": 4.0}
# Of 255, by which pixels may differ; and the share of the LoRA's effect, as root mean squares, by which both sides may
# differ in it. Images of 8 bits that differ by rounding alone differ by about 0.3 of 255, their effects by 0.4.
PIXEL_BOUND, EFFECT_BOUND = 2, 0.1


def philox_noise(seed: int, count: int) -> np.ndarray:
    """Return (count,) float32 standard normal numbers as CUDA's generator draws them first (Salmon et al. 2011)."""
    counter = np.zeros((4, count), np.uint64)
    counter[2] = np.arange(count)
    key, low = np.array([seed & 0xFFFFFFFF, seed >> 32], np.uint64), np.uint64(0xFFFFFFFF)
    for number in range(10):
        if number:
            key = (key + np.array([0x9E3779B9, 0xBB67AE85], np.uint64)) & low
        first, second = counter[0] * np.uint64(0xD2511F53), counter[2] * np.uint64(0xCD9E8D57)
        shift = np.uint64(32)
        counter = np.stack([
            (second >> shift) ^ counter[1] ^ key[0], second & low, (first >> shift) ^ counter[3] ^ key[1], first & low
        ])  # fmt: skip
    scale = 2.0**-32
    u, v = counter[0] * scale + scale / 2, 2 * np.pi * (counter[1] * scale + scale / 2)
    return (np.sqrt(-2 * np.log(u)) * np.sin(v)).astype(np.float32)


def write_files(folder: Path, lora_size: float) -> None:
    """Write the base model and the LoRA. `lora_size`: see the command line."""
    from ldm.lora.formats import write_lora
    from ldm.lora.formats.modules import BaseModules
    from ldm.lora.lora import LoRA
    from ldm.lora.updates import LoRALayer
    from ldm.settings.model import load_model_config
    from ldm.weights.checkpoint import write_checkpoint
    from ldm.weights.convert import convert
    from tests.named_weights import named_input, named_weight
    from tests.network_cases import model_with_named_weights

    config = load_model_config(CONFIG)
    model = model_with_named_weights(config)
    arrays = {name: parameter.asnumpy() for name, parameter in model.parameters_dict().items()}
    arrays.update({name: arrays[name] * np.float32(factor) for name, factor in LOUD.items()})
    write_checkpoint(folder / "own.safetensors", arrays, {"architecture": "sd1", "prediction_type": "epsilon"})
    del model, arrays
    convert(folder / "own.safetensors", folder / "base.safetensors", format="ldm")
    (folder / "own.safetensors").unlink()
    layers = {}
    for module in BaseModules(config).modules:
        if module.path.endswith(LORA_TARGETS):
            out, inner = module.shape
            down, up = named_input(f"{module.name} down", (4, inner)), named_input(f"{module.name} up", (out, 4))
            size = lora_size * named_weight(f"{module.name}.weight", module.shape).std() / 2  # 2: of 4 products
            layers[module.name] = LoRALayer(down, (up * size).astype(np.float32), 4.0)
    lora = LoRA(layers, {"architecture": "sd1", "prediction_type": "epsilon"})
    write_lora(folder / "lora.safetensors", lora, "kohya", config)


def draw_here(folder: Path, size: int, steps: int, scale: float, half_convolutions: bool) -> None:
    """Write the images with and without the LoRA of this project, and the noise levels, to here.npz.

    Args:
        half_convolutions: Round the convolutions' weights to fp16, as stable-diffusion.cpp does.
    """
    import mindspore as ms

    from ldm.diffusion.samplers.levels import leading_timesteps
    from ldm.diffusion.sampling import Sampling
    from ldm.generation.pipeline import Pipeline

    pipeline = Pipeline.from_checkpoint(folder / "base.safetensors", config=str(CONFIG), device="CPU")
    if half_convolutions:
        for parameter in pipeline.model.get_parameters():
            if parameter.ndim == 4:
                parameter.set_data(ms.Tensor(parameter.asnumpy().astype(np.float16).astype(np.float32)))
    timesteps = leading_timesteps(steps, pipeline.schedule)
    abar = pipeline.schedule.alphas_cumprod[np.append(timesteps, 0)]
    latent = (1, 4, size // 8, size // 8)
    noise = philox_noise(SEED, int(np.prod(latent))).reshape(latent)
    start = (noise * np.sqrt(1 - abar[0])).astype(np.float32)  # sqrt(abar) sigma noise
    sampling = Sampling("ddim", steps, scale, height=size, width=size, batch_size=1)
    found = {"sigmas": np.sqrt(1 / abar - 1)}
    for name in ("base", "lora"):
        if name == "lora":
            pipeline.load_lora(folder / "lora.safetensors")
        (batch,) = pipeline.generate([PROMPT], sampling, 0, [NEGATIVE_PROMPT], start, progress=False)
        # The last step ends at time step 0, whose factor stable-diffusion.cpp does not know.
        found[name] = pipeline.decode(batch.latents / np.sqrt(abar[-1]).astype(np.float32))[0]
    np.savez(folder / f"here{int(half_convolutions)}.npz", **found)


def draw_there(folder: Path, library: Path, size: int, steps: int, scale: float) -> None:
    """Write the images of stable-diffusion.cpp to there.npz."""
    sys.path.insert(0, str(library))
    from stable_diffusion_cpp import StableDiffusion

    sigmas = np.load(folder / "here0.npz")["sigmas"]
    model = StableDiffusion(
        model_path=str(folder / "base.safetensors"), wtype="f32", rng_type="cuda", sampler_rng_type="cuda",
        lora_model_dir=str(folder), n_threads=1, vae_decode_only=True, verbose=False,
    )  # fmt: skip
    found = {}
    for name in ("base", "lora"):
        (image,) = model.generate_image(
            prompt=PROMPT + ("<lora:lora:1>" if name == "lora" else ""), negative_prompt=NEGATIVE_PROMPT, width=size,
            height=size, cfg_scale=scale, sample_method="euler", sample_steps=steps, seed=SEED,
            sigmas=",".join(f"{sigma:.9g}" for sigma in sigmas),
        )  # fmt: skip
        found[name] = np.asarray(image.convert("RGB"))
    np.savez(folder / "there.npz", **found)


def compare(here: dict[str, np.ndarray], there: dict[str, np.ndarray]) -> bool:
    """Print how far the images and the effects of the LoRA agree, and return whether they do within the bounds."""
    largest = 0
    for name in ("base", "lora"):
        difference = here[name].astype(int) - there[name]
        largest = max(largest, int(np.abs(difference).max()))
        print(
            f"  {name}: pixels differ by {np.abs(difference).max()} of 255 at most, by {_rms(difference):.2f} as root "
            f"mean square; std of the image {there[name].std():.1f}"
        )
    effects = [images["lora"].astype(float) - images["base"] for images in (here, there)]
    share = _rms(effects[0] - effects[1]) / _rms(effects[1])
    correlation = np.corrcoef(effects[0].ravel(), effects[1].ravel())[0, 1]
    print(
        f"  effect of the LoRA: root mean square {_rms(effects[0]):.2f} here, {_rms(effects[1]):.2f} there; they "
        f"differ by {share:.2%} of it, correlation {correlation:.6f}"
    )
    return largest <= PIXEL_BOUND and share <= EFFECT_BOUND


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, required=True, help="folder with the package stable_diffusion_cpp")
    parser.add_argument("--size", type=int, default=128, help="width and height in pixels")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--scale", type=float, default=3.0, help="guidance scale")
    parser.add_argument("--lora_size", type=float, default=0.5, help="std of the LoRA's updates over the weights'")
    arguments = parser.parse_args()
    drawn = (arguments.size, arguments.steps, arguments.scale)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        jobs = {
            "writing the files": (write_files, (folder, arguments.lora_size)),
            "this project": (draw_here, (folder, *drawn, False)),
            "this project with convolutions rounded to fp16": (draw_here, (folder, *drawn, True)),
            "stable-diffusion.cpp": (draw_there, (folder, arguments.library.resolve(), *drawn)),
        }
        for name, (job, given) in jobs.items():
            began = time.time()
            process = multiprocessing.get_context("spawn").Process(target=job, args=given)  # each gives its memory back
            process.start()
            process.join()
            print(f"{name}: {time.time() - began:.0f} s", flush=True)
            if process.exitcode:
                return process.exitcode
        there = dict(np.load(folder / "there.npz"))
        here = [dict(np.load(folder / f"here{half}.npz")) for half in (0, 1)]
        agree = []
        for images, text in zip(here, ("fp32", "convolutions rounded to fp16")):
            print(f"{arguments.size} pixels, {arguments.steps} steps, guidance {arguments.scale:g}, {text}:")
            agree.append(compare(images, there))
        rounded = [_rms(here[0][name].astype(int) - here[1][name]) for name in ("base", "lora")]
        print(f"this rounding changes the images here by {rounded[0]:.2f} and {rounded[1]:.2f} as root mean square")
    return int(not all(agree))


if __name__ == "__main__":
    sys.exit(main())
