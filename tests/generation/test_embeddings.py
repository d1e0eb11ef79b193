"""Learned tokens in prompts: their vectors are what the text encoder takes, and nothing else changes."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import mindspore as ms
import numpy as np
import pytest
from PIL import Image

from ldm.diffusion.sampling import Sampling
from ldm.errors import UserError
from ldm.generation.generate import generate
from ldm.generation.pipeline import Pipeline
from ldm.generation.plan import plan_generation
from ldm.lora.lora import LoRA, LoRALayer
from ldm.lora.merged import MergedLoRA
from ldm.lora.strength import Strength
from ldm.models.stable_diffusion import build_model
from ldm.settings.generate import GenerateSettings
from ldm.textual_inversion.embedding import Embedding
from ldm.textual_inversion.formats import write_embeddings
from ldm.textual_inversion.inject import make_tokenizer
from ldm.tokenizer import AddedToken, Tokenizer
from ldm.weights.added_tokens import TOKEN_EMBEDDING
from ldm.weights.checkpoint import open_checkpoint
from tests.conftest import ROOT

MICRO = ROOT / "tests" / "training" / "micro.yaml"
FEW = Sampling(num_inference_steps=2, guidance_scale=2.0, batch_size=1)
OUT_PROJ = "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.out_proj"


@pytest.fixture(scope="module")
def pipeline(tiny_config):
    ms.set_context(mode=ms.GRAPH_MODE)
    np.random.seed(0)
    yield Pipeline(build_model(tiny_config))
    ms.set_context(mode=ms.PYNATIVE_MODE)


@pytest.fixture(autouse=True)
def unloaded(pipeline):
    pipeline.unload_lora()
    pipeline.unload_embedding()


@pytest.fixture(scope="module")
def table(pipeline):
    return {p.name: p for p in pipeline.model.get_parameters()}[TOKEN_EMBEDDING].asnumpy()


def rows_of(table, words):
    return table[Tokenizer().tokenize(words)]


def write(path, *tokens, form="diffusers"):
    write_embeddings(path, [Embedding(token, vectors) for token, vectors in tokens], form)
    return path


def latents(pipeline, prompt, negative=""):
    (batch,) = pipeline.generate([prompt], FEW, 7, [negative], progress=False)
    return batch.latents


def test_the_row_of_a_word_draws_that_word_s_image(pipeline, table, tmp_path):
    """Bit for bit, in prompts and negative prompts, with one vector and several, before and after other tokens."""
    expected, plain = latents(pipeline, "a red apple on snow", "a green tree"), pipeline.encode_prompts(["a cat"])
    path = write(tmp_path / "x.safetensors", ("<f>", rows_of(table, "red apple")), ("<t>", rows_of(table, "tree")))
    assert [embedding.token for embedding in pipeline.load_embedding(path)] == ["<f>", "<t>"]
    np.testing.assert_array_equal(latents(pipeline, "a <f> on snow", "a green <T>"), expected)
    np.testing.assert_array_equal(pipeline.encode_prompts(["a cat"]), plain)
    assert not np.array_equal(latents(pipeline, "a <t> on snow", "a green <f>"), expected)
    pipeline.unload_embedding("<f>")
    other = write(tmp_path / "easy.pt", ("", rows_of(table, "apple")), form="a1111")
    pipeline.load_embedding(other)
    np.testing.assert_array_equal(latents(pipeline, "a red easy on snow", "a green <t>"), expected)
    pipeline.unload_embedding()
    np.testing.assert_array_equal(latents(pipeline, "a red apple on snow", "a green tree"), expected)
    assert pipeline.tokenizer.tokenize("<f> easy") == Tokenizer().tokenize("<f> easy") and pipeline.embeddings == ()


def test_tokens_are_exchanged_without_compiling_until_there_are_many_more(pipeline, table, tmp_path):
    path = write(tmp_path / "x.safetensors", ("<x>", rows_of(table, "red apple")))
    pipeline.load_embedding(path)
    first = pipeline.encode_prompts(["<x>"])
    graphs = set(pipeline.text_encoder.compile_cache)
    pipeline.unload_embedding()
    pipeline.load_embedding(write(tmp_path / "y.safetensors", ("<x>", rows_of(table, "a green tree"))))
    assert not np.array_equal(pipeline.encode_prompts(["<x>"]), first)
    assert set(pipeline.text_encoder.compile_cache) == graphs
    many = np.repeat(rows_of(table, "tree"), 40, 0)
    pipeline.load_embedding(write(tmp_path / "many.safetensors", ("<many>", many)))
    np.testing.assert_array_equal(
        pipeline.encode_prompts(["<many>"]), pipeline.encode_prompts([" ".join(["tree"] * 40)])
    )


def test_a_token_of_many_vectors_is_cut_at_the_limit(pipeline, table, tmp_path, caplog):
    pipeline.load_embedding(write(tmp_path / "x.safetensors", ("<x>", np.repeat(rows_of(table, "tree"), 4, 0))))
    cut, whole = pipeline.encode_prompts(["a " * 73 + "<x>", "a " * 73 + "tree tree"])
    np.testing.assert_array_equal(cut, whole)
    with caplog.at_level(logging.WARNING):
        latents(pipeline, "a " * 73 + "<x> hat")
    assert 'the first loses "<x> hat"' in caplog.text


def test_the_tokens_of_a_lora_come_and_go_with_it(pipeline, table, caplog):
    width = table.shape[1]
    layer = LoRALayer(np.zeros((1, width), np.float32), np.zeros((width, 1), np.float32), 1.0)

    def merged(name, **embeddings):
        named = {f"<{token}>": vectors for token, vectors in embeddings.items()}
        return MergedLoRA(name, LoRA({OUT_PROJ: layer}, {}, named), Strength(1.0, 1.0))

    a, b = merged("a", s1=rows_of(table, "red"), s2=rows_of(table, "apple")), merged("b", s1=rows_of(table, "tree"))
    pipeline.merge_loras([a])
    np.testing.assert_array_equal(pipeline.encode_prompts(["<s1> <s2>"]), pipeline.encode_prompts(["red apple"]))
    with caplog.at_level(logging.WARNING):
        pipeline.merge_loras([a, b])
    assert "b: its token <s1> is not used, another one is loaded" in caplog.text
    np.testing.assert_array_equal(pipeline.encode_prompts(["<s1> <s2>"]), pipeline.encode_prompts(["red apple"]))
    pipeline.merge_loras([b])
    np.testing.assert_array_equal(pipeline.encode_prompts(["<s1>"]), pipeline.encode_prompts(["tree"]))
    assert [embedding.token for embedding in pipeline.embeddings] == ["<s1>"]
    pipeline.add_embeddings([Embedding("<S1>", rows_of(table, "apple"))], "own")  # what was asked for by itself wins
    np.testing.assert_array_equal(pipeline.encode_prompts(["<s1>"]), pipeline.encode_prompts(["apple"]))
    with pytest.raises(UserError, match="c: the vectors of <s3> have 5 numbers"):
        pipeline.merge_loras([merged("c", s3=np.ones((1, 5), np.float32))])
    assert [merged.name for merged in pipeline.loras] == ["b"]
    pipeline.unload_lora()
    assert [embedding.token for embedding in pipeline.embeddings] == ["<S1>"]


def test_what_does_not_fit_is_refused_and_changes_nothing(pipeline, table, tmp_path, caplog):
    path = write(tmp_path / "x.safetensors", ("<x>", rows_of(table, "tree")))
    pipeline.load_embedding(path)
    wide = write(tmp_path / "wide.safetensors", ("<y>", np.ones((1, 768), np.float32)))
    with pytest.raises(UserError, match="wide.* the vectors of <y> have 768 numbers, the model's tokens have .*SD1.x"):
        pipeline.load_embedding(wide)
    for token in (None, "<X>"):
        with pytest.raises(UserError, match="(?i)a token <x> is there already: give this one another name"):
            pipeline.load_embedding(path, token)
    with pytest.raises(UserError, match="no token <z> is loaded: choose one of <x>"):
        pipeline.unload_embedding("<z>")
    assert [embedding.token for embedding in pipeline.embeddings] == ["<x>"]
    with caplog.at_level(logging.WARNING):
        pipeline.load_embedding(path, "cat")
    assert "cat is a word, which means what was learned from now on" in caplog.text


def test_a_token_of_the_checkpoint_is_not_replaced(tiny_config, graph_mode):
    model = build_model(replace(tiny_config, added_tokens=(AddedToken("!", 0),)))
    with pytest.raises(UserError, match="a token ! is there already"):
        Pipeline(model).add_embeddings([Embedding("!", np.ones((1, 32), np.float32))], "x")
    assert make_tokenizer(model).tokenize("!") == [0]


@pytest.mark.parametrize("form, suffix, token", [("diffusers", ".bin", "<x>"), ("kohya", ".safetensors", "my:x")])
def test_ti_ckpt_path_names_files_and_tokens(tmp_path, form, suffix, token):
    path = write(tmp_path / f"my:x{suffix}", ("<x>", np.ones((2, 96), np.float32)), form=form)
    settings = GenerateSettings(prompt="a", ti_ckpt_path=[str(path), f"{path}:<my word>"])
    files = plan_generation(settings).embeddings
    assert [[e.token for e in file.embeddings] for file in files] == [[token], ["<my word>"]]
    assert [file.path for file in files] == [path, path]


@pytest.mark.parametrize(
    "name, words",
    [("missing.pt", "ti_ckpt_path .*missing.pt does not exist"), ("missing.pt:<x>", "missing.pt does not exist"),
     ("x.pt:", "a token is a text"), ("wide.pt", "have 768 numbers, the model's tokens have 96"), ("", "ti_ckpt_path")],
)  # fmt: skip
def test_a_wrong_ti_ckpt_path_is_answered_before_a_network_is_loaded(tmp_path, name, words):
    write(tmp_path / "x.pt", ("", np.ones((1, 96), np.float32)), form="a1111")
    write(tmp_path / "wide.pt", ("", np.ones((1, 768), np.float32)), form="a1111")
    with pytest.raises(UserError, match=words):
        plan_generation(GenerateSettings(prompt="a", ti_ckpt_path=[f"{tmp_path}/{name}"]))


def test_the_script_draws_with_a_token_and_writes_it_down(micro_base_model, tmp_path, graph_mode):
    vectors = open_checkpoint(micro_base_model)[TOKEN_EMBEDDING][Tokenizer().tokenize("apple")]
    path = write(tmp_path / "fruit.safetensors", ("<x>", vectors))
    (tmp_path / "prompts.txt").write_text("a red apple\na red <x>\na red pear\n")
    np.save(tmp_path / "start.npy", np.repeat(np.random.randn(1, 4, 8, 8).astype(np.float32), 3, 0))
    generate(GenerateSettings(
        data_path=str(tmp_path / "prompts.txt"), init_latents=str(tmp_path / "start.npy"), batch_size=1,
        ckpt_path=str(micro_base_model), config=str(MICRO), output_path=str(tmp_path / "out"), sampling_steps=2,
        device_target="CPU", skip_grid=True, ti_ckpt_path=[str(path)],
    ))  # fmt: skip
    images = []
    for file in sorted((tmp_path / "out" / "samples").glob("*.png")):
        with Image.open(file) as image:
            images.append(np.asarray(image))
            (entry,) = json.loads(image.info["textual_inversion"])
    assert np.array_equal(images[0], images[1]) and not np.array_equal(images[0], images[2])
    assert entry["file"] == "fruit.safetensors" and entry["tokens"] == ["<x>"] and len(entry["sha256"]) == 64
