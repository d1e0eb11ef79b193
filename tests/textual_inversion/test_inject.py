"""Learned rows in a text encoder: looked up as if they were in the table, and the only ones that have a gradient."""

from __future__ import annotations

import numpy as np
import pytest
from mindspore import ParameterTuple, Tensor, nn, ops

from ldm.errors import UserError
from ldm.models.stable_diffusion import build_model
from ldm.settings.model import load_model_config
from ldm.textual_inversion.embedding import Embedding, is_word
from ldm.textual_inversion.inject import (
    NAME,
    extended_table,
    get_embeddings,
    initial_vectors,
    learned_tokens_of,
    make_tokenizer,
    put_embeddings,
)
from ldm.textual_inversion.templates import TEMPLATES, draw_template
from ldm.weights.added_tokens import TOKEN_EMBEDDING
from tests.conftest import ROOT

ROWS = np.random.RandomState(1).randn(3, 32).astype(np.float32)
TOKENS = [Embedding("<cat>", ROWS[:2]), Embedding("<dog>", ROWS[2:])]
PROMPTS = ["a <cat> and a <dog>", "<cat> <cat>", "a dog"]


@pytest.fixture
def model(graph_mode):
    np.random.seed(2)
    return build_model(load_model_config(ROOT / "tests" / "training" / "micro.yaml"))


class Weighted(nn.Cell):
    """A number that depends on all text embeddings."""

    def __init__(self, text_encoder, weights):
        super().__init__(auto_prefix=False)
        self.text_encoder, self.weights = text_encoder, weights

    def construct(self, tokens):
        return (self.text_encoder(tokens) * self.weights).sum()


def test_values_and_gradients_are_those_of_one_table_with_all_rows(model):
    """The reference has the rows in the table itself, and MindSpore differentiates the whole table."""
    table = {p.name: p for p in model.get_parameters()}[TOKEN_EMBEDDING]
    before = table.asnumpy().copy()
    encoder = model.cond_stage_model
    weights = Tensor(np.random.RandomState(3).randn(len(PROMPTS), 77, 32).astype(np.float32))
    assert put_embeddings(model, TOKENS)
    tokens = Tensor(make_tokenizer(model).encode(PROMPTS))
    assert 49408 + 2 in tokens.asnumpy()
    rows = extended_table(model).learned.weight
    rows.requires_grad = True
    value, (gradient,) = ops.value_and_grad(Weighted(encoder, weights), None, ParameterTuple([rows]))(tokens)

    np.random.seed(2)
    config = load_model_config(ROOT / "tests" / "training" / "micro.yaml")
    config.text["vocab_size"] = 49408 + 3
    reference = build_model(config)
    values = {p.name: p for p in reference.get_parameters()}
    for parameter in model.get_parameters():
        if parameter.name not in (TOKEN_EMBEDDING, NAME):
            values[parameter.name].set_data(parameter.value())
    whole = values[TOKEN_EMBEDDING]
    whole.set_data(Tensor(np.concatenate([before, ROWS])))
    whole.requires_grad = True
    loss = Weighted(reference.cond_stage_model, weights)
    expected, (dense,) = ops.value_and_grad(loss, None, ParameterTuple([whole]))(tokens)
    assert float(value.asnumpy()) == float(expected.asnumpy())
    assert np.abs(gradient.asnumpy()).min(1).max() > 0  # each row is used
    np.testing.assert_allclose(gradient.asnumpy(), dense.asnumpy()[49408:], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(table.asnumpy(), before)


def test_the_parameters_keep_their_names_and_stay_frozen(model):
    names = [p.name for p in model.get_parameters()]
    put_embeddings(model, TOKENS)
    parameters = list(model.get_parameters())
    assert sorted(p.name for p in parameters) == sorted([*names, NAME]) and len({id(p) for p in parameters}) == len(
        parameters
    )
    assert not model.trainable_params() and NAME.endswith("token_embedding.learned.weight")


def test_tokens_are_exchanged_in_the_same_rows(model):
    assert learned_tokens_of(model) == () and get_embeddings(model) == []
    assert not put_embeddings(model, [])
    assert put_embeddings(model, TOKENS, spare=True)
    rows = extended_table(model).learned.weight
    assert rows.shape == (8, 32) and not rows.asnumpy()[3:].any()
    assert [(t.text, t.token, t.length) for t in learned_tokens_of(model)] == [("<cat>", 49408, 2), ("<dog>", 49410, 1)]
    assert not put_embeddings(model, TOKENS[1:], spare=True) and extended_table(model).learned.weight is rows
    (dog,) = get_embeddings(model)
    assert dog.token == "<dog>" and dog.vectors.tolist() == ROWS[2:].tolist()
    averages = {NAME: np.full((8, 32), 5.0, np.float32)}
    assert get_embeddings(model, averages)[0].vectors.tolist() == np.full((1, 32), 5.0).tolist()
    assert not put_embeddings(model, [], spare=True) and get_embeddings(model) == []
    assert make_tokenizer(model).tokenize("<dog>") == make_tokenizer(model)._tokenize_words("<dog>")
    assert put_embeddings(model, [Embedding("<x>", np.ones((9, 32), np.float32))], spare=True)
    assert extended_table(model).learned.weight.shape == (16, 32)
    assert not put_embeddings(model, TOKENS, spare=True)  # never fewer rows than before


def test_vectors_begin_as_those_of_words_or_as_large_as_them(model):
    table = {p.name: p for p in model.get_parameters()}[TOKEN_EMBEDDING].asnumpy()
    tokenizer, rng = make_tokenizer(model), np.random.default_rng(4)
    cat, toy = tokenizer.tokenize("cat toy")
    vectors = initial_vectors(model, tokenizer, "cat toy", 3, rng)
    assert vectors.dtype == np.float32 and vectors.tolist() == table[[cat, toy, cat]].tolist()
    drawn = initial_vectors(model, tokenizer, None, 64, rng)
    assert drawn.dtype == np.float32 and drawn.std() == pytest.approx(table.std(), rel=0.1)
    for words, count in (("a cat toy", 2), ("", 1), (" ", 4)):
        with pytest.raises(UserError, match=f"is {len(tokenizer.tokenize(words))} of CLIP's tokens .*num_vectors is"):
            initial_vectors(model, tokenizer, words, count, rng)


def test_templates_have_the_token_and_no_other_braces():
    for kind, templates in TEMPLATES.items():
        assert len(set(templates)) == len(templates) > 9
        assert all(template.count("{}") == 1 and template.format("<x>").count("<x>") == 1 for template in templates)
        drawn = {draw_template(kind, "<x>", np.random.default_rng(seed)) for seed in range(200)}
        assert drawn == {template.format("<x>") for template in templates}


def test_words_of_the_vocabulary_are_known():
    assert is_word("cat") and is_word("CAT") and is_word("sks") and not is_word("<cat>") and not is_word("cat toy")
