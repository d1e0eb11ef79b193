"""Learned tokens give the text embeddings of transformers with the same rows, and diffusers reads their files."""

from __future__ import annotations

import dataclasses

import mindspore as ms
import numpy as np
import pytest
import torch
from diffusers.loaders.textual_inversion import load_textual_inversion_state_dicts
from mindspore import Tensor

from ldm.settings.model import load_model_config
from ldm.textual_inversion.embedding import Embedding
from ldm.textual_inversion.formats import read_embeddings, write_embeddings
from ldm.textual_inversion.inject import make_tokenizer, put_embeddings
from ldm.weights.added_tokens import TOKEN_EMBEDDING
from tests.golden.make_tokenizer import clip_tokenizer
from tests.named_weights import relative_error
from tests.network_cases import model_with_named_weights
from tests.parity.reference import Reference
from tests.parity.test_networks import ROOT

TOKENS = {"<cat>": 3, "<dog>": 1}
PROMPTS = ["a photo of <cat>", "<dog> beside a <cat>s hat", "a dog", "word " * 73 + "<cat>"]


@pytest.fixture(scope="module")
def embeddings():
    rng = np.random.default_rng(0)
    return [Embedding(token, rng.standard_normal((n, 96), np.float32)) for token, n in TOKENS.items()]


def test_text_embeddings_are_those_of_a_resized_text_encoder(embeddings):
    ms.set_context(mode=ms.GRAPH_MODE)
    config = load_model_config(ROOT / "configs" / "nano.yaml")
    model = model_with_named_weights(config)
    weights = {p.name: p.asnumpy().copy() for p in model.get_parameters() if p.name.startswith("cond_stage_model.")}
    put_embeddings(model, embeddings)
    tokens = make_tokenizer(model).encode(PROMPTS)
    ours = model.cond_stage_model(Tensor(tokens)).asnumpy()

    rows = np.concatenate([weights[TOKEN_EMBEDDING], *(embedding.vectors for embedding in embeddings)])
    wide = dataclasses.replace(config, text={**config.text, "vocab_size": len(rows)})
    theirs = Reference(wide, {**weights, TOKEN_EMBEDDING: rows})
    # diffusers gives each further vector a token of its own, `<cat>_1`, and writes all of them in place of `<cat>`.
    tokenizer = clip_tokenizer()
    names = [f"{token}_{i}" if i else token for token, n in TOKENS.items() for i in range(n)]
    assert tokenizer.add_tokens(names) == len(names)
    expanded = [prompt.replace("<cat>", "<cat> <cat>_1 <cat>_2") for prompt in PROMPTS]
    ids = tokenizer(expanded, padding="max_length", truncation=True, max_length=77)["input_ids"]
    np.testing.assert_array_equal(tokens, ids)
    assert relative_error(ours, theirs.text_states(np.array(ids))) < 5e-5


@pytest.mark.parametrize("form, name", [("diffusers", "x.safetensors"), ("diffusers", "x.bin"), ("a1111", "x.pt")])
def test_diffusers_reads_what_is_written(embeddings, tmp_path, form, name):
    cat = embeddings[0]
    write_embeddings(tmp_path / name, [cat], form)
    (state,) = load_textual_inversion_state_dicts([str(tmp_path)], weight_name=name, use_safetensors=None)
    vectors = state["string_to_param"]["*"] if form == "a1111" else state["<cat>"]
    np.testing.assert_array_equal(vectors.numpy(), cat.vectors)


def test_what_pytorch_writes_is_read(embeddings, tmp_path):
    cat = embeddings[0]
    vectors = torch.nn.Parameter(torch.from_numpy(cat.vectors))
    contents = {
        "a.bin": {"<cat>": vectors.detach()},
        "b.bin": {"<cat>": vectors},
        "c.pt": {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "x", "step": 5,
                 "sd_checkpoint": None, "sd_checkpoint_name": None},
        "d.pt": {"string_to_token": {"*": torch.tensor(265)},
                 "string_to_param": torch.nn.ParameterDict({"*": vectors})},
    }  # fmt: skip
    for name, content in contents.items():
        torch.save(content, tmp_path / name)
        (found,) = read_embeddings(tmp_path / name)
        assert found.token == (name[0] if name.endswith(".pt") else "<cat>")
        np.testing.assert_array_equal(found.vectors, cat.vectors)
