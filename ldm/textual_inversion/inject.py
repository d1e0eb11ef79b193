"""Learned tokens in a text encoder: rows of their own beside its table of tokens, which stays as it is.

The rows are one parameter `<token_embedding>.learned.weight` (rows, width) fp32. Their ids follow those of the table,
so the 49,408 rows of the table are no part of what an optimizer moves, decays or remembers, and no step copies them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from ldm.errors import UserError, plain
from ldm.models.stable_diffusion import StableDiffusion
from ldm.models.text_encoder import Embedding as TokenTable
from ldm.models.text_encoder import TextEmbeddings
from ldm.ops import take_rows
from ldm.textual_inversion.embedding import Embedding
from ldm.tokenizer import LearnedToken, Tokenizer
from ldm.weights.added_tokens import TOKEN_EMBEDDING

NAME = f"{TOKEN_EMBEDDING[: -len('.weight')]}.learned.weight"
SPARE = 8  # rows are a multiple of it where tokens are exchanged, so that few exchanges need another graph


class LearnedRows(nn.Cell):
    """The learned rows as `weight`, under their full name."""

    def __init__(self, rows: np.ndarray):
        super().__init__()
        self.weight = Parameter(Tensor(np.ascontiguousarray(rows, np.float32)), name=NAME)


class ExtendedTable(nn.Cell):
    """A token table with learned rows after its own: index (...) int32 -> (..., width) fp32.

    Both are looked up, each with ids that it has, and one of the two results is selected for each place. So the
    gradient reaches the learned rows alone, from the places that have their ids.

    Attributes:
        tokens: What prompts call the rows. Rows at the end may have no token.
    """

    def __init__(self, base: TokenTable, rows: np.ndarray):
        super().__init__()
        # Assigning a child would put the attribute's name before parameter names that are complete already.
        self.insert_child_to_cell("base", base)
        self.insert_param_to_cell("weight", base.weight)  # so that its place in the model still agrees with its name
        self.insert_child_to_cell("learned", LearnedRows(rows))
        self.tokens: tuple[LearnedToken, ...] = ()
        self.first_id, self.zero = Tensor(base.weight.shape[0], ms.int32), Tensor(0, ms.int32)
        self.take_rows, self.select, self.at_least = take_rows(), ops.Select(), ops.GreaterEqual()

    def construct(self, index: Tensor) -> Tensor:
        is_learned = self.at_least(index, self.first_id)
        of_table = self.base(self.select(is_learned, self.zero, index))
        of_rows = self.take_rows(self.learned.weight, self.select(is_learned, index - self.first_id, self.zero))
        is_learned = ops.broadcast_to(is_learned.reshape(index.shape + (1,)), of_table.shape)
        return self.select(is_learned, of_rows, of_table)


def extended_table(model: StableDiffusion) -> ExtendedTable | None:
    """Return the token table with learned rows, None if a model has none."""
    cells = (cell for _, cell in model.cond_stage_model.cells_and_names())
    return next((cell for cell in cells if isinstance(cell, ExtendedTable)), None)


def learned_tokens_of(model: StableDiffusion) -> tuple[LearnedToken, ...]:
    """Return the learned tokens of a model with the ids of their rows."""
    table = extended_table(model)
    return () if table is None else table.tokens


def token_width(model: StableDiffusion) -> int:
    """Return how many numbers a vector of the text encoder's token table has."""
    return _text_embeddings(model).token_embedding.weight.shape[1]


def put_embeddings(model: StableDiffusion, embeddings: Sequence[Embedding], spare: bool = False) -> bool:
    """Put the vectors of tokens into a text encoder, in place of those that are there.

    Args:
        model: The networks. All parameters stay frozen.
        embeddings: The tokens, with vectors of the text encoder's width. There may be none, where some were before.
        spare: Whether to have a multiple of SPARE rows, the last of which are zeros, and never fewer than before.

    Returns:
        Whether the text encoder has another structure now, so that its graphs must be compiled anew.
    """
    parent, table = _text_embeddings(model), extended_table(model)
    if table is None and not embeddings:
        return False
    base = parent.token_embedding if table is None else table.base
    first, width = base.weight.shape
    tokens, count = [], 0
    for embedding in embeddings:
        tokens.append(LearnedToken(embedding.token, first + count, len(embedding.vectors)))
        count += len(embedding.vectors)
    before = 0 if table is None else table.learned.weight.shape[0]
    rows = max(before, -(-count // SPARE) * SPARE) if spare else count
    padding = np.zeros((rows - count, width), np.float32)
    values = np.concatenate([*(embedding.vectors for embedding in embeddings), padding])
    changed = table is None or rows != before
    if table is None or changed:
        table = ExtendedTable(base, values)
        table.set_train(False)
        table.learned.weight.requires_grad = False
        parent._cells["token_embedding"] = table  # assigning the attribute would prefix the parameters' names again
    else:
        table.learned.weight.set_data(Tensor(values))
    table.tokens = tuple(tokens)
    return changed


def get_embeddings(model: StableDiffusion, arrays: Mapping[str, np.ndarray] | None = None) -> list[Embedding]:
    """Copy the learned tokens out of a model.

    Args:
        model: The networks.
        arrays: Parameter name -> values to use in place of the parameters, such as their moving averages.
    """
    table = extended_table(model)
    if table is None:
        return []
    rows = table.learned.weight.asnumpy() if arrays is None else arrays[NAME]
    first = table.base.weight.shape[0]
    return [
        Embedding(token.text, np.array(rows[token.token - first :][: token.length], np.float32))
        for token in table.tokens
    ]


def make_tokenizer(model: StableDiffusion) -> Tokenizer:
    """Return the tokenizer of a model, which knows the tokens of its checkpoint and those that are learned."""
    config = model.config
    return Tokenizer(config.pad_token, config.added_tokens).with_learned_tokens(learned_tokens_of(model))


def initial_vectors(
    model: StableDiffusion, tokenizer: Tokenizer, initializer: str | None, count: int, rng: np.random.Generator
) -> np.ndarray:
    """Return the vectors (count, width) fp32 that a token is trained from.

    Args:
        model: The networks.
        tokenizer: That of the model.
        initializer: Words whose vectors are taken, in turn if there are fewer than `count`, as in kohya's sd-scripts.
            None: normal numbers with the table's standard deviation, as in diffusers' advanced scripts.
        count: Number of vectors.
        rng: Draws the normal numbers.

    Raises:
        UserError: The words have no tokens, or more than `count`.
    """
    table = _text_embeddings(model).token_embedding.weight.asnumpy()
    if initializer is None:
        return rng.standard_normal((count, table.shape[1]), np.float32) * table.std(dtype=np.float64).astype(np.float32)
    ids = tokenizer.tokenize(initializer)
    if not 0 < len(ids) <= count:
        raise UserError(
            f"initializer_token {plain(repr(initializer), 60)} is {len(ids)} of CLIP's tokens "
            f"({plain(', '.join(tokenizer.decode([token]) for token in ids[:8]), 80)}), and num_vectors is {count}: "
            "give a word that is one token, or as many vectors"
        )
    return np.stack([table[ids[i % len(ids)]] for i in range(count)])


def _text_embeddings(model: StableDiffusion) -> TextEmbeddings:
    return model.cond_stage_model.transformer.text_model.embeddings
