"""From prompts to images: prompts -> text embeddings -> sampler -> latents -> VAE -> images.

from ldm.generation.pipeline import Pipeline

pipe = Pipeline.from_checkpoint("models/nano/nano.safetensors")
pipe.load_lora("output/demo/lora/ckpt/lora.ckpt")
image = pipe("a red apple", num_inference_steps=20, seed=42).images[0]
image.save("apple.png")
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mindspore as ms
import numpy as np
from PIL import Image

from ldm.diffusion.sampling import Sampling, default_batch_size, latent_shape
from ldm.generation.batch_generator import BatchGenerator, ImageBatch
from ldm.generation.image_files import as_image
from ldm.generation.loading import load_model, set_up_sampling
from ldm.generation.model_choice import find_model
from ldm.generation.requests import ImageRequest
from ldm.generation.source_image import NOISE_ALONE, HiresFix, Origin, forget_sources, source_images
from ldm.ops import multiplies_bf16
from ldm.runtime.device import current_runtime, decide_flash_attention, setup_runtime
from ldm.runtime.precision import automatic_precision
from ldm.settings.model import ModelConfig
from ldm.settings.versions import default_guidance_scale
from ldm.weights.architecture import config_with_tokens
from ldm.weights.base_weights import BaseWeights


@dataclass(frozen=True)
class PipelineOutput:
    """The images of a call, in the order of the prompts, and their final latents (N, C, h, w) float32."""

    images: list[Image.Image]
    latents: np.ndarray


class Pipeline(BatchGenerator):
    """Generates images with a Stable Diffusion model.

    Each network is compiled once for each shape and batch size. The weights are read at every call, so a network that
    is trained between two calls is sampled with its weights of that moment.

    LoRAs are merged into the weights, so they cost nothing while images are made, and they can be exchanged between two
    calls without compiling a network again. What is merged is always computed from the weights of the base model.

    Learned tokens (textual inversion) are rows beside the text encoder's table of tokens: those of load_embedding, and
    those that the merged LoRAs bring.

    The arguments are those of ldm.generation.adapted_model.AdaptedModel.
    """

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: str | Path | None = None,
        *,
        version: str | None = None,
        config: str | Path | ModelConfig | None = None,
        dtype: ms.Type | None = None,
        unet: str | Path | None = None,
        vae: str | Path | None = None,
        ema: bool = False,
        flash_attention: bool | None = None,
        device: str | None = None,
    ) -> Pipeline:
        """Load a base model.

        MindSpore is set up in graph mode, unless ldm.runtime.device.setup_runtime was called before.

        Args:
            checkpoint: A .safetensors file, a .ckpt of MindSpore or PyTorch, or a diffusers folder. None for the
                version's published file under models/, or for the nano model that comes with this project.
            version: A key of ldm.settings.versions.VERSIONS. None detects the model from the checkpoint.
            config: A model YAML, or a configuration, instead of the version's.
            dtype: ms.float32, ms.float16, or ms.bfloat16 on the CPU, for UNet and text encoder. None for the precision
                that MindSpore was set up with, or else for fp16 on Ascend, bf16 on a CPU whose kernels multiply it, and
                fp32 on others.
            unet: A checkpoint whose UNet replaces the base checkpoint's.
            vae: A checkpoint whose VAE replaces the base checkpoint's.
            ema: Load the moving averages of the UNet's weights that the checkpoint holds.
            flash_attention: Use Ascend's fused attention in the UNet. None for yes in fp16 on an Atlas A2 and later.
            device: "Ascend" or "CPU". None for Ascend if this machine has one, else the CPU.

        Raises:
            UserError: A file is missing, cannot be read or does not fit the model, the model cannot be detected, or the
                device does not have the type.
        """
        if isinstance(config, ModelConfig):
            if checkpoint is None:
                raise ValueError("a configuration without a checkpoint: give both")
            path, model_config = Path(checkpoint), config
        else:
            _, path, model_config = find_model(checkpoint, version, config)
        runtime = current_runtime()
        if runtime is None or device not in (None, runtime.device):
            runtime = setup_runtime(device, seed=None, automatic=lambda: automatic_precision(multiplies_bf16))
        runtime_of_dtype = runtime if dtype is None else runtime.with_compute_dtype(dtype)
        use_flash = decide_flash_attention(flash_attention, runtime_of_dtype)
        base_weights = BaseWeights(path, unet, ema)
        model = load_model(
            config_with_tokens(model_config, path),
            path,
            unet=unet,
            vae=vae,
            ema=ema,
            prepare=lambda model: set_up_sampling(model, runtime_of_dtype.compute_dtype, use_flash),
        )
        return cls(model, base_weights=base_weights)

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        seed: int = 42,
        sampler: str = "dpm_solver_pp",
        eta: float | None = None,
        latents: np.ndarray | None = None,
        batch_size: int | None = None,
        guidance_rescale: float | None = None,
        schedule: str = "as_trained",
        progress: bool = True,
        image: str | Path | Image.Image | Sequence[str | Path | Image.Image] | None = None,
        mask: str | Path | Image.Image | Sequence[str | Path | Image.Image] | None = None,
        strength: float = 0.75,
        resize_mode: str = "crop",
        mask_blur: float = 0.0,
        paste_original: bool = True,
        variation_seed: int = 0,
        variation_strength: float = 0.0,
        hires: HiresFix | None = None,
    ) -> PipelineOutput:
        """Generate images: the same ones as text_to_image.py with the same settings.

        Args:
            prompt: One prompt or several.
            negative_prompt: What the images should not show: one for all prompts, or as many as prompts.
            height: In pixels, None for the model's own.
            width: In pixels, None for the model's own.
            num_inference_steps: Steps of the sampler. Some call the UNet twice a step (docs/sampling.md).
            guidance_scale: The scale of classifier-free guidance, 1 for none. None for the model's default.
            num_images_per_prompt: Images of each prompt. All images of the first prompt come first.
            seed: Image i depends on (seed, i) alone.
            sampler: A name in ldm.diffusion.samplers.SAMPLERS, such as "dpm_solver_pp", "euler_a" or "ddim".
            eta: Share of fresh noise in the samplers that have one, 0 to 1. None for 0 in DDIM and 1 in the others.
            latents: Starting latents (N, C, h, w), one for each image, instead of those of the seed.
            batch_size: Images in a call of the network, None for as many as memory is likely to hold.
            guidance_rescale: Share of the guided output that gets the standard deviation of the positive one, 0 to 1.
                None for 0.7 with a LoRA that was trained with zero_terminal_snr, else 0.
            schedule: The noise levels of the steps: "as_trained", "karras", "exponential", "sgm_uniform" or "linspace".
            progress: Show a progress bar.
            image: An image to begin from, or one for each prompt: a file or an image in memory.
            mask: Which part of it is repainted, white, and which is kept, black: as many as images.
            strength: How much of the image is repainted, above 0, at most 1: the share of the steps that are taken.
            resize_mode: How image and mask are fitted to the size: "crop", "resize" or "pad".
            mask_blur: Standard deviation in pixels of a blur of the mask.
            paste_original: Put the pixels that the mask keeps back into the images.
            variation_seed: Of the noise that the seed's is turned towards.
            variation_strength: How far it is turned, 0 to 1.
            hires: A second pass at a larger size.

        Raises:
            UserError: The size or the steps do not fit the model, an image cannot be used, or memory does not suffice.
            ValueError: There is no prompt, the sampler is unknown, prompts, negative prompts, images and latents differ
                in number, or a share is out of range.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or num_images_per_prompt < 1:
            raise ValueError("nothing to generate: give at least one prompt, and num_images_per_prompt of at least 1")
        if negative_prompt is None or isinstance(negative_prompt, str):
            negative_prompts = [negative_prompt or ""] * len(prompts)
        else:
            negative_prompts = list(negative_prompt)
        if guidance_scale is None:
            guidance_scale = default_guidance_scale(self.config.architecture)
        side = self.config.image_size
        size = height or side, width or side
        largest = size if hires is None else hires.size(*size, self.config.size_multiple)
        batch_size = batch_size or default_batch_size(num_images_per_prompt, *largest)
        sampling = Sampling(
            sampler, num_inference_steps, guidance_scale, eta, height, width, batch_size, guidance_rescale, schedule
        )
        forget_sources()
        sources = source_images(image, mask, len(prompts), resize_mode, mask_blur)
        if not 0.0 < strength <= 1.0 or not 0.0 <= variation_strength <= 1.0:
            raise ValueError("strength must be above 0, at most 1, and variation_strength from 0 to 1")
        if hires is not None and image is not None:
            raise ValueError("a hires fix begins from noise: leave out image, or give its height and width")
        if latents is not None and variation_strength:
            raise ValueError("latents are the starting noise, which variation_strength changes: leave out one of them")
        origins = [
            Origin(source, strength, paste_original, variation_seed, variation_strength, hires) for source in sources
        ]
        prompts, negative_prompts = (
            [text for text in texts for _ in range(num_images_per_prompt)] for texts in (prompts, negative_prompts)
        )
        origins = [origin for origin in origins for _ in range(num_images_per_prompt)]
        batches = list(self.generate(prompts, sampling, seed, negative_prompts, latents, progress, origins=origins))
        return PipelineOutput(
            [as_image(image) for batch in batches for image in batch.images],
            np.concatenate([batch.latents for batch in batches]),
        )

    def generate(
        self,
        prompts: Sequence[str],
        sampling: Sampling,
        seed: int,
        negative_prompts: Sequence[str] | None = None,
        starting_latents: np.ndarray | None = None,
        progress: bool = True,
        process_index: int = 0,
        process_count: int = 1,
        origins: Sequence[Origin] | None = None,
    ) -> Iterator[ImageBatch]:
        """Generate one image for each prompt, batch after batch.

        Args:
            prompts: One for each image.
            sampling: How the images are sampled.
            seed: Image i depends on (seed, i) alone.
            negative_prompts: One for each prompt, None for empty ones. They are not used at guidance scale 1.
            starting_latents: (N, C, h, w), None for those of the seed.
            progress: Show a progress bar.
            process_index: Of this process among those that divide the batches.
            process_count: Number of these processes. Of every process_count batches, each generates one.
            origins: What each image begins from, None for noise alone.

        Raises:
            UserError: The size or the steps do not fit the model, or memory does not suffice.
            ValueError: Prompts, negative prompts, latents and origins differ in number.
        """
        sampling.check(self.config)
        shape = latent_shape(self.config, sampling.height, sampling.width)
        count = len(prompts)
        negative_prompts = [""] * count if negative_prompts is None else negative_prompts
        if len(negative_prompts) != count:
            raise ValueError(f"{count} prompts, but {len(negative_prompts)} negative prompts")
        if starting_latents is not None and starting_latents.shape != (count, *shape):
            raise ValueError(f"starting latents are {starting_latents.shape}, expected {(count, *shape)}")
        origins = [NOISE_ALONE] * count if origins is None else origins
        if len(origins) != count:
            raise ValueError(f"{count} prompts, but {len(origins)} origins")
        requests = [
            ImageRequest(i, prompt, negative_prompt, seed, i, sampling, None, origin)
            for i, (prompt, negative_prompt, origin) in enumerate(zip(prompts, negative_prompts, origins))
        ]
        batches = self.batches_of(requests)
        return self.generate_batches(batches[process_index::process_count], starting_latents, progress, batches)
