"""From prompts to images: prompts -> text embeddings -> sampler -> latents -> VAE -> images.

from ldm.generation.pipeline import Pipeline

pipe = Pipeline.from_checkpoint("models/nano/nano.safetensors")
pipe.load_lora("output/demo/lora/ckpt/lora.ckpt", 0.8)
image = pipe("a red apple", num_inference_steps=20, seed=42).images[0]
image.save("apple.png")
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import mindspore as ms
import numpy as np
from PIL import Image
from tqdm import tqdm

from ldm.diffusion.on_device import DeviceSampling
from ldm.diffusion.sampling import Sampling, default_batch_size, latent_shape
from ldm.diffusion.schedule import NoiseSchedule
from ldm.generation.adapted_model import AdaptedModel
from ldm.generation.decoding import VAETiling, decode
from ldm.generation.denoising import (
    SourceLatents,
    denoise_batch,
    draw_hires_noise,
    draw_starting_latents,
    fresh_noise,
    samples_from_noise_alone,
)
from ldm.generation.image_files import as_image
from ldm.generation.loading import load_model, set_up_sampling
from ldm.generation.model_choice import find_model
from ldm.generation.requests import ImageRequest, RequestBatch, in_batches
from ldm.generation.source_image import (
    NOISE_ALONE,
    HiresFix,
    Origin,
    first_step,
    forget_sources,
    keep_unmasked,
    source_images,
)
from ldm.generation.source_latents import ImageEncoder, encode_sources, enlarge
from ldm.generation.text_encoding import encode_prompts, rows_together, warn_of_cut_prompts
from ldm.models.autoencoder import VAEDecode, VAEEncode
from ldm.models.stable_diffusion import StableDiffusion
from ldm.models.text_encoder import run_layers
from ldm.ops import free_graphs
from ldm.prompts.chunks import prompt_chunks
from ldm.prompts.clip_skip import layers_to_run
from ldm.prompts.syntax import warn_of_unsupported
from ldm.runtime.batches import fill_batch
from ldm.runtime.device import current_runtime, decide_flash_attention, failed_allocations_as, setup_runtime
from ldm.settings.model import ModelConfig
from ldm.settings.prompts import SYNTAXES
from ldm.settings.versions import default_guidance_scale
from ldm.tokenizer import Tokenizer
from ldm.weights.architecture import config_with_tokens
from ldm.weights.base_weights import BaseWeights

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageBatch:
    """Images that were generated together."""

    indices: np.ndarray  # their places in the list of prompts, (N,)
    starting_latents: np.ndarray  # at the first timestep, (N, C, h, w) float32
    latents: np.ndarray  # the final ones, (N, C, h, w) float32
    images: np.ndarray  # (N, H, W, C) uint8, C = 3 for RGB or 1 for grey
    requests: tuple[ImageRequest, ...]  # what was asked for, N of them


@dataclass(frozen=True)
class PipelineOutput:
    """The images of a call, in the order of the prompts, and their final latents (N, C, h, w) float32."""

    images: list[Image.Image]
    latents: np.ndarray


class Pipeline(AdaptedModel):
    """Generates images with a Stable Diffusion model.

    Each network is compiled once for each shape and batch size. The weights are read at every call, so a network that
    is trained between two calls is sampled with its weights of that moment.

    LoRAs are merged into the weights, so they cost nothing while images are made, and they can be exchanged between two
    calls without compiling a network again. What is merged is always computed from the weights of the base model.

    Learned tokens (textual inversion) are rows beside the text encoder's table of tokens: those of load_embedding, and
    those that the merged LoRAs bring.

    Args:
        model: The networks. UNet and text encoder compute in the type that they are set to, the VAE should be in fp32.
        tokenizer: Replaces the tokenizer that the model's configuration describes.
        base_weights: The files that the model was loaded from: the weights of the base model are read from them when a
            LoRA is exchanged or unloaded. None keeps a copy of each weight while a LoRA is merged into it. Its weights
            of that moment are then the base model.
    """

    def __init__(
        self, model: StableDiffusion, tokenizer: Tokenizer | None = None, base_weights: BaseWeights | None = None
    ) -> None:
        super().__init__(model, tokenizer, base_weights)
        self.schedule = NoiseSchedule.from_config(self.config)
        self.unet = model.model.diffusion_model
        self.encoder, self.decoder = VAEEncode(model.first_stage_model), VAEDecode(model.first_stage_model)
        self._image_encoder = ImageEncoder(self.encoder, self.config)
        self.vae_tiling = VAETiling()  # may be replaced at any time
        runtime = current_runtime()
        # On the CPU the arrays are in the same memory, and NumPy computes as fast.
        self.keeps_latents_on_device = runtime is not None and runtime.device != "CPU"
        self._device_sampling: DeviceSampling | None = None
        self.prompt_syntax, self.support_long_prompts = "plain", False

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
            dtype: ms.float32 or ms.float16 for UNet and text encoder. None for fp16 on Ascend and fp32 on the CPU.
            unet: A checkpoint whose UNet replaces the base checkpoint's.
            vae: A checkpoint whose VAE replaces the base checkpoint's.
            ema: Load the moving averages of the UNet's weights that the checkpoint holds.
            flash_attention: Use Ascend's fused attention in the UNet. None for yes in fp16 on an Atlas A2 and later.
            device: "Ascend" or "CPU". None for Ascend if this machine has one, else the CPU.

        Raises:
            UserError: A file is missing, cannot be read or does not fit the model, or the model cannot be detected.
        """
        if isinstance(config, ModelConfig):
            if checkpoint is None:
                raise ValueError("a configuration without a checkpoint: give both")
            path, model_config = Path(checkpoint), config
        else:
            _, path, model_config = find_model(checkpoint, version, config)
        runtime = current_runtime()
        if runtime is None or device not in (None, runtime.device):
            runtime = setup_runtime(device, seed=None)
        runtime_of_dtype = runtime if dtype is None else replace(runtime, compute_dtype=dtype)
        use_flash = decide_flash_attention(flash_attention, runtime_of_dtype)
        base_weights = BaseWeights(path, unet, ema)
        model = load_model(
            config_with_tokens(model_config, path),
            path,
            unet=unet,
            vae=vae,
            ema=ema,
        )
        set_up_sampling(model, runtime_of_dtype.compute_dtype, use_flash)
        return cls(model, base_weights=base_weights)

    def configure_prompts(
        self, *, syntax: str = "plain", support_long_prompts: bool = False, clip_skip: int | None = None
    ) -> None:
        """Say how prompts and negative prompts are read from now on. The arguments are those of text_to_image.py.

            pipe.configure_prompts(syntax="a1111", clip_skip=2)
            pipe("a (red:1.3) apple, [blurry]")

        Args:
            syntax: "plain", or "a1111" for weights in brackets, escapes and BREAK.
            support_long_prompts: Whether a prompt of more than 75 tokens is encoded in chunks of 75, instead of being
                cut. In the syntax a1111 it is.
            clip_skip: From which layer of the text encoder the embeddings are, counted from the last. None for the
                model's own: 1, and 2 for SD2.x.

        Raises:
            UserError: The text encoder has no such layer.
            ValueError: The syntax is unknown.
        """
        if syntax not in SYNTAXES:
            raise ValueError(f"syntax must be one of {', '.join(SYNTAXES)}, not {syntax!r}")
        layers = layers_to_run(self.config, clip_skip)
        text_encoder = self.model.cond_stage_model
        if layers != text_encoder.transformer.text_model.encoder.depth:
            run_layers(text_encoder, layers)
            if self.text_encoder.compile_cache:
                free_graphs(self.text_encoder)
        self.prompt_syntax = syntax
        self.support_long_prompts = support_long_prompts or syntax == "a1111"

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

    def batches_of(self, requests: Sequence[ImageRequest]) -> list[RequestBatch]:
        """Divide images into batches that can be generated together."""
        counts: dict[Hashable, int] = {}

        def chunk_count(request: ImageRequest) -> int:
            loras = () if request.loras is None else tuple(map(id, request.loras))
            key = (loras, request.prompt, request.negative_prompt, request.sampling.is_guided)
            if key not in counts:
                counts[key] = self._chunk_count(request)
            return counts[key]

        return in_batches(requests, chunk_count if self.support_long_prompts else lambda request: 1)

    def _chunk_count(self, request: ImageRequest) -> int:
        """Return how many chunks of 75 tokens a prompt and its negative prompt take."""
        if not self.support_long_prompts:
            return 1
        tokenizer = self.tokenizer if request.loras is None else self._tokenizer_with(request.loras)
        texts = [request.prompt, *([request.negative_prompt] if request.sampling.is_guided else [])]
        return max(prompt_chunks(text, tokenizer, self.prompt_syntax, long=True).chunk_count for text in texts)

    def generate_batches(
        self,
        batches: Sequence[RequestBatch],
        starting_latents: np.ndarray | None = None,
        progress: bool = True,
        all_batches: Sequence[RequestBatch] | None = None,
    ) -> Iterator[ImageBatch]:
        """Generate images batch after batch. The LoRAs that are merged when it begins are merged again when it ends.

        Args:
            batches: From batches_of, all of them or some.
            starting_latents: (N, C, h, w), those of each image at its index. None for those of the seeds.
            progress: Show a progress bar.
            all_batches: Those of the run, if `batches` are this process's share. They decide how many texts are encoded
                together, on which the text embeddings depend within rounding.

        Raises:
            UserError: A size or a number of steps does not fit the model, a LoRA cannot be merged, or memory does not
                suffice.
        """
        all_batches = batches if all_batches is None else all_batches
        for batch in all_batches:
            loras = self.loras if batch.loras is None else batch.loras
            batch.sampling.check(self.config, samples_from_noise_alone(self.config, loras))
            steps_taken(batch)  # raises where there is none
            if batch.origin.hires is not None:
                batch.origin.hires.second_pass(batch.sampling, self.config).check(self.config)
        texts = dict.fromkeys(text for batch in all_batches for text in batch.texts)
        if not self.support_long_prompts:
            warn_of_cut_prompts(self.tokenizer, texts)
        elif self.prompt_syntax == "a1111":
            warn_of_unsupported(texts)
        # One batch size for all, so that the text encoder too is compiled once.
        text_batch_size = max(
            (rows_together(batch.texts, self._chunk_count(batch.requests[0])) for batch in all_batches), default=1
        )
        return self._generate_batches(batches, starting_latents, progress, text_batch_size)

    def _generate_batches(
        self,
        batches: Sequence[RequestBatch],
        starting_latents: np.ndarray | None,
        progress: bool,
        text_batch_size: int,
    ) -> Iterator[ImageBatch]:
        merged_before = self.loras
        total = sum(steps_taken(batch) for batch in batches)
        with tqdm(total=total, desc="compiling", unit="step", disable=not progress) as bar:

            def advance(step: int) -> None:
                bar.set_description("sampling", refresh=False)  # the networks are compiled in the very first step
                bar.update()

            try:
                for batch in batches:
                    loras = merged_before if batch.loras is None else batch.loras
                    if [*map(id, loras)] != [*map(id, self.loras)]:
                        self.merge_loras(loras)
                    with failed_allocations_as(batch.sampling.out_of_memory_message(self.config)):
                        images = self._generate_batch(batch, starting_latents, text_batch_size, advance)
                    yield images
            finally:
                if self.loras != merged_before:
                    self.merge_loras(merged_before)

    def _generate_batch(
        self,
        batch: RequestBatch,
        starting_latents: np.ndarray | None,
        text_batch_size: int,
        callback: Callable[[int], None],
    ) -> ImageBatch:
        sampling, size = batch.sampling, len(batch.requests)
        shape = latent_shape(self.config, sampling.height, sampling.width)
        # The last batch is filled up, or the networks would be compiled for its size too.
        filled = [batch.requests[i] for i in fill_batch(np.arange(size), batch.batch_size)]
        if starting_latents is None:
            start = draw_starting_latents(filled, shape)
        else:
            start = np.asarray(starting_latents[[request.index for request in filled]], np.float32)
        source, fitted = encode_sources(self._image_encoder, self.config, filled, sampling, self.vae_tiling)
        embeddings = self.encode_prompts(batch.texts, text_batch_size)
        positive = fill_batch(embeddings[:size], batch.batch_size)
        negative = fill_batch(embeddings[size:], batch.batch_size) if sampling.is_guided else None
        latents = self.sample(positive, negative, start, sampling, fresh_noise(filled, shape), callback, source)
        hires = batch.origin.hires
        if hires is not None:
            sampling = hires.second_pass(sampling, self.config)
            shape = latent_shape(self.config, sampling.height, sampling.width)
            larger = enlarge(
                self.encoder, self.decoder, self.config, latents, sampling, hires.upscaler, self.vae_tiling
            )
            source, _ = encode_sources(self._image_encoder, self.config, filled, sampling, self.vae_tiling)
            source = replace(
                source or SourceLatents(),
                clean_latents=larger,
                first_step=first_step(sampling.num_inference_steps, hires.strength, "hires_strength"),
            )
            noise = draw_hires_noise(filled, shape)
            draw_noise = fresh_noise(filled, shape, "hires fresh noise")
            latents = self.sample(positive, negative, noise, sampling, draw_noise, callback, source)
        images = self.decode(latents, batch.batch_size)
        if batch.origin.keep_unmasked and fitted:
            images = keep_unmasked(images, fitted)
        indices = np.array([request.index for request in batch.requests])
        return ImageBatch(indices, start[:size], latents[:size], images[:size], batch.requests)

    def encode_prompts(self, texts: Sequence[str], batch_size: int | None = None) -> np.ndarray:
        """Compute text embeddings (N, 77 k, D) float32. See ldm.generation.text_encoding."""
        return encode_prompts(
            self.tokenizer, self.text_encoder, texts, batch_size, self.prompt_syntax, self.support_long_prompts
        )

    def starting_latents(self, seed: int, indices: Sequence[int], shape: tuple[int, int, int]) -> np.ndarray:
        """Draw noise (N, *shape) float32. The noise of image i depends on the seed and i alone."""
        return draw_starting_latents([ImageRequest(i, "", "", seed, i, Sampling()) for i in indices], shape)

    def sample(
        self,
        text_embeddings: np.ndarray,
        negative_text_embeddings: np.ndarray | None,
        latents: np.ndarray,
        sampling: Sampling,
        draw_noise: Callable[[], np.ndarray] | None = None,
        callback: Callable[[int], None] | None = None,
        source: SourceLatents | None = None,
    ) -> np.ndarray:
        """Denoise one batch with the LoRAs that are merged. See ldm.generation.denoising.denoise_batch."""
        return denoise_batch(
            self.unet, self.config, self._merged, text_embeddings, negative_text_embeddings, latents, sampling,
            draw_noise, callback, source, self._on_device(),
        )  # fmt: skip

    def _on_device(self) -> DeviceSampling | None:
        """Return what keeps the latents on the device, None where NumPy computes."""
        if not self.keeps_latents_on_device:
            return None
        if self._device_sampling is None or self._device_sampling.unet is not self.unet:
            self._device_sampling = DeviceSampling(self.unet)
        return self._device_sampling

    def free_graphs(self) -> None:
        """Free the compiled graphs of a pipeline that is not used again. Its networks stay."""
        graphs = [self.unet, self.text_encoder, self.encoder, self.decoder]
        if self._device_sampling is not None:
            graphs += [self._device_sampling.guided_unet, self._device_sampling.weighted_sum]
        for graph in graphs:
            free_graphs(graph)

    def decode(self, latents: np.ndarray, batch_size: int | None = None) -> np.ndarray:
        """Decode scaled latents (N, C, h, w) to images (N, H, W, C) uint8. See ldm.generation.decoding."""
        return decode(self.decoder, self.config, latents, batch_size, self.vae_tiling)


def steps_taken(batch: RequestBatch) -> int:
    """Return the steps of a batch, both passes of a hires fix together. Raises UserError where none is left."""
    steps, origin = batch.sampling.num_inference_steps, batch.origin
    if origin.source is not None:
        return steps - first_step(steps, origin.strength)
    if origin.hires is None:
        return steps
    second = origin.hires.steps or steps
    return steps + second - first_step(second, origin.hires.strength, "hires_strength")
