"""A model whose LoRAs and learned tokens can be exchanged while it is in memory."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ldm.errors import UserError, plain
from ldm.generation.denoising import samples_from_noise_alone
from ldm.generation.loading import select_lora
from ldm.lora.lora import LoRA
from ldm.lora.merged import MergedLoRA, MergedLoRAs, SamplingRange
from ldm.lora.strength import Strength
from ldm.models.stable_diffusion import StableDiffusion
from ldm.ops import free_graphs
from ldm.settings.block_weights import BlockWeights
from ldm.settings.model import ModelConfig
from ldm.textual_inversion.embedding import Embedding, check_width, is_word
from ldm.textual_inversion.formats import read_embeddings
from ldm.textual_inversion.inject import get_embeddings, learned_tokens_of, put_embeddings, token_width
from ldm.tokenizer import VOCABULARY_SIZE, LearnedToken, Tokenizer
from ldm.weights.base_weights import BaseWeights

logger = logging.getLogger(__name__)


class AdaptedModel:
    """The networks of a pipeline, the LoRAs that are merged into them, and the tokens that prompts may name.

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
        self._plain_tokenizer = tokenizer or Tokenizer(self.config.pad_token, self.config.added_tokens)
        self.tokenizer = self._plain_tokenizer.with_learned_tokens(learned_tokens_of(model))
        self.text_encoder = model.cond_stage_model
        self._merged = MergedLoRAs(model, None if base_weights is None else base_weights.open)
        self._named: dict[str, LoRA] = {}  # the LoRAs that load_lora gave a name
        self._own_embeddings = get_embeddings(model)  # those that no LoRA brings
        self.embeddings: tuple[Embedding, ...] = tuple(self._own_embeddings)  # all that prompts may name

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

    def _tokenizer_with(self, loras: Sequence[MergedLoRA]) -> Tokenizer:
        """Return a tokenizer that counts tokens as the one does when these LoRAs are merged. Its ids are others."""
        known = {e.token.lower(): e for merged in reversed(loras) for e in of_lora(merged.lora)}
        known.update((embedding.token.lower(), embedding) for embedding in self._own_embeddings)
        learned, token = [], 2 * VOCABULARY_SIZE
        for embedding in known.values():
            learned.append(LearnedToken(embedding.token, token, len(embedding.vectors)))
            token += len(embedding.vectors)
        return self._plain_tokenizer.with_learned_tokens(learned)


def of_lora(lora: LoRA) -> list[Embedding]:
    """Return the learned tokens that a LoRA brings."""
    return [Embedding(token, vectors) for token, vectors in lora.embeddings.items()]
