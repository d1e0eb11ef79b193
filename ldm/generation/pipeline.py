"""From prompts to images: prompts -> text embeddings -> sampler -> latents -> VAE -> images.

from ldm.generation.pipeline import Pipeline

pipe = Pipeline.from_checkpoint("models/nano/nano.safetensors")
pipe.load_lora("output/demo/lora/ckpt/lora.ckpt", 0.8)
image = pipe("a red apple", num_inference_steps=20, seed=42).images[0]
image.save("apple.png")
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import mindspore as ms
import numpy as np
from PIL import Image
from tqdm import tqdm

from ldm.diffusion.on_device import DeviceSampling
from ldm.diffusion.sampling import Sampling, default_batch_size, latent_shape
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError, plain
from ldm.generation.decoding import decode
from ldm.generation.denoising import denoise_batch, draw_starting_latents, fresh_noise, samples_from_noise_alone
from ldm.generation.image_files import as_image
from ldm.generation.loading import load_model, select_lora, set_up_sampling
from ldm.generation.plan import find_model
from ldm.generation.requests import ImageRequest, RequestBatch, in_batches
from ldm.generation.text_encoding import encode_prompts, warn_of_cut_prompts
from ldm.lora.lora import LoRA
from ldm.lora.merged import MergedLoRA, MergedLoRAs, SamplingRange
from ldm.lora.strength import Strength
from ldm.models.autoencoder import VAEDecode
from ldm.models.stable_diffusion import StableDiffusion
from ldm.ops import free_graphs
from ldm.runtime.batches import fill_batch
from ldm.runtime.device import current_runtime, decide_flash_attention, failed_allocations_as, setup_runtime
from ldm.settings.block_weights import BlockWeights
from ldm.settings.model import ModelConfig
from ldm.settings.versions import default_guidance_scale
from ldm.textual_inversion.embedding import Embedding, check_width, is_word
from ldm.textual_inversion.formats import read_embeddings
from ldm.textual_inversion.inject import get_embeddings, learned_tokens_of, put_embeddings, token_width
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


class Pipeline:
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
        self.model = model
        self.config: ModelConfig = model.config
        self.schedule = NoiseSchedule.from_config(self.config)
        self._plain_tokenizer = tokenizer or Tokenizer(self.config.pad_token, self.config.added_tokens)
        self.tokenizer = self._plain_tokenizer.with_learned_tokens(learned_tokens_of(model))
        self.unet = model.model.diffusion_model
        self.text_encoder = model.cond_stage_model
        self.decoder = VAEDecode(model.first_stage_model)
        self._merged = MergedLoRAs(model, None if base_weights is None else base_weights.open)
        runtime = current_runtime()
        # On the CPU the arrays are in the same memory, and NumPy computes as fast.
        self.keeps_latents_on_device = runtime is not None and runtime.device != "CPU"
        self._device_sampling: DeviceSampling | None = None
        self._named: dict[str, LoRA] = {}  # the LoRAs that load_lora gave a name
        self._own_embeddings = get_embeddings(model)  # those that no LoRA brings
        self.embeddings: tuple[Embedding, ...] = tuple(self._own_embeddings)  # all that prompts may name

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

    @property
    def loras(self) -> tuple[MergedLoRA, ...]:
        """The LoRAs that are merged into the weights, each with its name, its strength and its factors, in order."""
        return self._merged.loras

    @property
    def holds_base_weights(self) -> bool:
        """Whether the weights are those of the base model, also after an error while LoRAs were merged."""
        return self._merged.holds_base_weights

    @property
    def samples_from_noise_alone(self) -> bool:
        """Whether images are sampled on the schedule of zero_terminal_snr. See ldm.generation.denoising."""
        return samples_from_noise_alone(self.config, self.loras)

    def load_lora(
        self,
        path: str | Path,
        strength: float | Strength = 1.0,
        *,
        name: str | None = None,
        unet: bool | None = None,
        text_encoder: bool | None = None,
        start: float | None = None,
        end: float | None = None,
        block_weights: str | None = None,
    ) -> LoRA:
        """Merge a LoRA into the model's weights, in addition to those that are merged already.

        Args:
            path: A file or folder in any known format (see ldm.lora.formats).
            strength: How much of the LoRA is applied, or a Strength with one number for each network and block weights.
                0 leaves the weights as they are, bit for bit.
            name: Keeps the LoRA in memory under this name, for set_loras and unload_lora. None calls it by its path.
            unet: Whether to apply its UNet part: None if it has one, True requires it, False leaves it out.
            text_encoder: The same for its text encoder part.
            start: The share of the sampling steps after which the UNet part is applied, 0 to 1.
            end: The share of the sampling steps up to which it is applied. None for both: at the time steps that the
                LoRA was trained on, which are all of them if its file names none.
            block_weights: Factors of the strength by block, such as "MID=0.5,OUT*=0" (see docs/lora_toolbox.md).

        Returns:
            What was merged.

        Raises:
            UserError: The file is not a LoRA or was made for another model, a required part is missing, no part
                remains, block weights do not suit the model, a merged weight would be out of range, or the name is
                taken. The pipeline is unchanged then.
        """
        if name in self._named:
            raise UserError(
                f"a LoRA with the name {plain(name)} is loaded: choose another name, or change it by set_loras or "
                "unload_lora"
            )
        strength = Strength.from_value(strength)
        if block_weights is not None:
            strength = replace(strength, blocks=BlockWeights.parse(block_weights, "block_weights"))
        lora = select_lora(self.config, path, unet, text_encoder)
        merged = MergedLoRA(name or str(path), lora, strength, SamplingRange.from_ends(start, end))
        self.merge_loras([*self.loras, merged])
        if name is not None:
            self._named[name] = lora
        return lora

    def set_loras(self, loras: Iterable[str | Path | tuple]) -> None:
        """Replace the LoRAs that are merged into the weights by these, in this order.

        The result is that of a pipeline that is loaded anew with these LoRAs, bit for bit. No network is compiled
        again, and only the weights that change are written.

            pipe.set_loras([("style", 0.8), ("output/demo/lora/ckpt/lora.ckpt", 0.4)])

        Args:
            loras: The name of a LoRA that load_lora gave it, or the path of a file, which is read at every call; alone
                for strength 1, or a tuple (name, strength) or (name, strength, start, end) as in load_lora. None at all
                gives the base model.

        Raises:
            UserError: As load_lora. The pipeline is unchanged then.
        """
        if isinstance(loras, (str, Path)):
            raise ValueError(f"set_loras takes a list of LoRAs: [({str(loras)!r}, 1.0)]")
        wanted = []
        for entry in loras:
            name, strength, *ends = entry if isinstance(entry, (tuple, list)) else (entry, 1.0)
            lora = self._named.get(str(name)) or select_lora(self.config, name)
            sampling_range = SamplingRange.from_ends(*ends) if ends else None
            wanted.append(MergedLoRA(str(name), lora, Strength.from_value(strength), sampling_range))
        self.merge_loras(wanted)

    def unload_lora(self, name: str | Path | None = None) -> None:
        """Take a LoRA out of the weights and forget it. Without any, the weights are the base model's, bit for bit.

        Args:
            name: Its name, or its path if it has none: all LoRAs of that path are taken out. None for all LoRAs.

        Raises:
            UserError: There is no such LoRA, or a file of the base model cannot be read any more. The pipeline is
                unchanged then.
        """
        known = dict.fromkeys([*self._named, *(merged.name for merged in self.loras)])
        if name is not None and str(name) not in known:
            raise UserError(f"no LoRA {plain(name)} is loaded: choose one of {plain(', '.join(known)) or 'none'}")
        self.merge_loras([] if name is None else [merged for merged in self.loras if merged.name != str(name)])
        for forgotten in known if name is None else [str(name)]:
            self._named.pop(forgotten, None)

    def merge_loras(self, loras: Sequence[MergedLoRA]) -> None:
        """Replace the LoRAs that are merged into the weights by LoRAs in memory. Errors are those of set_loras."""
        for merged in loras:
            check_width(of_lora(merged.lora), token_width(self.model), merged.name)
        present = set(map(id, self.loras))
        for merged, match in zip(loras, self._merged.set(loras)):
            if id(merged) not in present:
                logger.info("%s: %s; strength %s%s", merged.name, match, merged.strength, merged.applied_at())
        self._put_embeddings(self._own_embeddings)

    def load_embedding(self, path: str | Path, token: str | None = None) -> list[Embedding]:
        """Load learned tokens (textual inversion). Prompts and negative prompts may name them from now on.

        Args:
            path: A file of diffusers, A1111, kohya or cloneofsimo (see ldm.textual_inversion.formats).
            token: What prompts call the file's only token. None: the token in the file, or else the file's name
                without its suffix.

        Returns:
            The tokens. Those that a LoRA brings are loaded with the LoRA.

        Raises:
            UserError: The file cannot be read or was made for another model, or a token is there already. The pipeline
                is unchanged then.
        """
        found = read_embeddings(path, token)
        self.add_embeddings(found, str(path))
        return found

    def add_embeddings(self, embeddings: Sequence[Embedding], path: str) -> None:
        """Do as load_embedding with tokens in memory. `path` names their file in errors."""
        check_width(embeddings, token_width(self.model), path)
        known = {added.text.lower() for added in self.config.added_tokens}
        known.update(embedding.token.lower() for embedding in self._own_embeddings)
        for embedding in embeddings:
            name = plain(embedding.token, 60)
            if embedding.token.lower() in known:
                raise UserError(
                    f"{path}: a token {name} is there already: give this one another name (--ti_ckpt_path file:<name>)"
                )
            known.add(embedding.token.lower())
            if is_word(embedding.token):
                logger.warning("%s: %s is a word, which means what was learned from now on", path, name)
            logger.info("%s: %s", path, embedding)
        self._put_embeddings([*self._own_embeddings, *embeddings])

    def unload_embedding(self, token: str | None = None) -> None:
        """Forget a token that load_embedding loaded, or all of them.

        Raises:
            UserError: There is no such token.
        """
        known = [embedding.token for embedding in self._own_embeddings]
        if token is not None and token not in known:
            raise UserError(f"no token {plain(token)} is loaded: choose one of {plain(', '.join(known)) or 'none'}")
        kept = [embedding for embedding in self._own_embeddings if token is not None and embedding.token != token]
        self._put_embeddings(kept)

    def _put_embeddings(self, own: Sequence[Embedding]) -> None:
        """Let prompts name these tokens, and those of the LoRAs that are merged."""
        wanted = list(own)
        known = {embedding.token.lower(): embedding for embedding in own}
        for merged in self.loras:
            for embedding in of_lora(merged.lora):
                other = known.setdefault(embedding.token.lower(), embedding)
                if other is embedding:
                    wanted.append(embedding)
                elif not np.array_equal(other.vectors, embedding.vectors):
                    logger.warning(
                        "%s: its token %s is not used, another one is loaded: give the file as --ti_ckpt_path "
                        "file:<name> too, with another name",
                        merged.name, plain(embedding.token, 60),
                    )  # fmt: skip
        self._own_embeddings = list(own)
        if [(e.token, id(e.vectors)) for e in wanted] == [(e.token, id(e.vectors)) for e in self.embeddings]:
            return
        if put_embeddings(self.model, wanted, spare=True) and self.text_encoder.compile_cache:
            free_graphs(self.text_encoder)
        self.embeddings = tuple(wanted)
        self.tokenizer = self._plain_tokenizer.with_learned_tokens(learned_tokens_of(self.model))

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

        Raises:
            UserError: The size or the steps do not fit the model, or memory does not suffice.
            ValueError: There is no prompt, the sampler is unknown, or prompts, negative prompts and latents differ in
                number.
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
        batch_size = batch_size or default_batch_size(num_images_per_prompt, height or side, width or side)
        sampling = Sampling(
            sampler, num_inference_steps, guidance_scale, eta, height, width, batch_size, guidance_rescale, schedule
        )
        prompts, negative_prompts = (
            [text for text in texts for _ in range(num_images_per_prompt)] for texts in (prompts, negative_prompts)
        )
        batches = list(self.generate(prompts, sampling, seed, negative_prompts, latents, progress))
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

        Raises:
            UserError: The size or the steps do not fit the model, or memory does not suffice.
            ValueError: Prompts, negative prompts and latents differ in number.
        """
        sampling.check(self.config)
        shape = latent_shape(self.config, sampling.height, sampling.width)
        count = len(prompts)
        negative_prompts = [""] * count if negative_prompts is None else negative_prompts
        if len(negative_prompts) != count:
            raise ValueError(f"{count} prompts, but {len(negative_prompts)} negative prompts")
        if starting_latents is not None and starting_latents.shape != (count, *shape):
            raise ValueError(f"starting latents are {starting_latents.shape}, expected {(count, *shape)}")
        requests = [
            ImageRequest(i, prompt, negative_prompt, seed, i, sampling)
            for i, (prompt, negative_prompt) in enumerate(zip(prompts, negative_prompts))
        ]
        batches = self.batches_of(requests)
        return self.generate_batches(batches[process_index::process_count], starting_latents, progress, batches)

    def batches_of(self, requests: Sequence[ImageRequest]) -> list[RequestBatch]:
        """Divide images into batches that can be generated together."""
        return in_batches(requests)

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
        for sampling in {batch.sampling: None for batch in all_batches}:
            sampling.check(self.config)
        warn_of_cut_prompts(self.tokenizer, (text for batch in all_batches for text in batch.texts))
        # One batch size for all, so that the text encoder too is compiled once.
        text_batch_size = max((len(set(batch.texts)) for batch in all_batches), default=1)
        return self._generate_batches(batches, starting_latents, progress, text_batch_size)

    def _generate_batches(
        self,
        batches: Sequence[RequestBatch],
        starting_latents: np.ndarray | None,
        progress: bool,
        text_batch_size: int,
    ) -> Iterator[ImageBatch]:
        merged_before = self.loras
        total = sum(batch.sampling.num_inference_steps for batch in batches)
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
        embeddings = self.encode_prompts(batch.texts, text_batch_size)
        latents = self.sample(
            fill_batch(embeddings[:size], batch.batch_size),
            fill_batch(embeddings[size:], batch.batch_size) if sampling.is_guided else None,
            start,
            sampling,
            draw_noise=fresh_noise(filled, shape),
            callback=callback,
        )
        images = self.decode(latents, batch.batch_size)
        indices = np.array([request.index for request in batch.requests])
        return ImageBatch(indices, start[:size], latents[:size], images[:size], batch.requests)

    def encode_prompts(self, texts: Sequence[str], batch_size: int | None = None) -> np.ndarray:
        """Compute text embeddings (N, 77, D) float32. See ldm.generation.text_encoding."""
        return encode_prompts(self.tokenizer, self.text_encoder, texts, batch_size)

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
    ) -> np.ndarray:
        """Denoise one batch with the LoRAs that are merged. See ldm.generation.denoising.denoise_batch."""
        return denoise_batch(
            self.unet, self.config, self._merged, text_embeddings, negative_text_embeddings, latents, sampling,
            draw_noise, callback, self._on_device(),
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
        graphs = [self.unet, self.text_encoder, self.decoder]
        if self._device_sampling is not None:
            graphs += [self._device_sampling.guided_unet, self._device_sampling.weighted_sum]
        for graph in graphs:
            free_graphs(graph)

    def decode(self, latents: np.ndarray, batch_size: int | None = None) -> np.ndarray:
        """Decode scaled latents (N, C, h, w) to images (N, H, W, C) uint8. See ldm.generation.decoding."""
        return decode(self.decoder, self.config, latents, batch_size)


def of_lora(lora: LoRA) -> list[Embedding]:
    """Return the learned tokens that a LoRA brings."""
    return [Embedding(token, vectors) for token, vectors in lora.embeddings.items()]
