"""Generates batches of images: text embeddings -> sampler -> latents -> VAE -> images."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from tqdm import tqdm

from ldm.diffusion.on_device import DeviceSampling
from ldm.diffusion.sampling import Sampling, latent_shape
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
from ldm.generation.requests import ImageRequest, RequestBatch, in_batches
from ldm.generation.source_image import HiresFix, first_step, keep_unmasked
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
from ldm.runtime.device import current_runtime, failed_allocations_as
from ldm.settings.prompts import SYNTAXES
from ldm.tokenizer import Tokenizer
from ldm.weights.base_weights import BaseWeights


@dataclass(frozen=True)
class ImageBatch:
    """Images that were generated together."""

    indices: np.ndarray  # their places in the list of prompts, (N,)
    starting_latents: np.ndarray  # at the first timestep, (N, C, h, w) float32
    latents: np.ndarray  # the final ones, (N, C, h, w) float32
    images: np.ndarray  # (N, H, W, C) uint8, C = 3 for RGB or 1 for grey
    requests: tuple[ImageRequest, ...]  # what was asked for, N of them


class BatchGenerator(AdaptedModel):
    """Generates the images of requests, batch after batch, with the LoRAs that each batch asks for.

    Each network is compiled once for each shape and batch size. The arguments are those of AdaptedModel.
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
                    with failed_allocations_as(self._out_of_memory_message(batch)):
                        images = self._generate_batch(batch, starting_latents, text_batch_size, advance)
                    yield images
            finally:
                if self.loras != merged_before:
                    self.merge_loras(merged_before)

    def _out_of_memory_message(self, batch: RequestBatch) -> str:
        hires, enlarged = batch.origin.hires, ""
        if hires is not None:
            larger = hires.second_pass(batch.sampling, self.config)
            enlarged = f" with hires_scale {hires.scale:g} (H {larger.height}, W {larger.width})"
        return batch.sampling.out_of_memory_message(self.config, enlarged)

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
        if batch.origin.hires is not None:
            latents = self._second_pass(batch.origin.hires, filled, sampling, latents, positive, negative, callback)
        images = self.decode(latents, batch.batch_size)
        if batch.origin.keep_unmasked and fitted:
            images = keep_unmasked(images, fitted)
        indices = np.array([request.index for request in batch.requests])
        return ImageBatch(indices, start[:size], latents[:size], images[:size], batch.requests)

    def _second_pass(
        self,
        hires: HiresFix,
        requests: Sequence[ImageRequest],
        first: Sampling,
        latents: np.ndarray,
        positive: np.ndarray,
        negative: np.ndarray | None,
        callback: Callable[[int], None],
    ) -> np.ndarray:
        """Sample again from the latents of the first pass, at the larger size of a hires fix."""
        sampling = hires.second_pass(first, self.config)
        shape = latent_shape(self.config, sampling.height, sampling.width)
        larger = enlarge(self.encoder, self.decoder, self.config, latents, sampling, hires.upscaler, self.vae_tiling)
        source, _ = encode_sources(self._image_encoder, self.config, requests, sampling, self.vae_tiling)
        source = replace(
            source or SourceLatents(),
            clean_latents=larger,
            first_step=first_step(sampling.num_inference_steps, hires.strength, "hires_strength"),
        )
        noise = draw_hires_noise(requests, shape)
        draw_noise = fresh_noise(requests, shape, "hires fresh noise")
        return self.sample(positive, negative, noise, sampling, draw_noise, callback, source)

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
