"""Tokens that a diffusers folder adds are used wherever its model goes; what does not belong together is refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.files.paths import ROOT
from ldm.generation.loading import load_model
from ldm.generation.pipeline import Pipeline
from ldm.models.stable_diffusion import build_model
from ldm.settings.model import load_model_config
from ldm.tokenizer import AddedToken
from ldm.tokenizer.tokenizer import vocabulary
from ldm.weights.added_tokens import TOKEN_EMBEDDING, read_added_tokens, read_tokenizer_tokens
from ldm.weights.architecture import config_with_tokens, detect_model_config, same_config
from ldm.weights.base_model import open_base_model
from ldm.weights.checkpoint import read_checkpoint, write_checkpoint
from ldm.weights.convert import convert

SD1 = ROOT / "tests" / "golden" / "small_sd1.yaml"
TOKENS = (AddedToken("<cat-toy>", 49408), AddedToken("<cat-toy>_1", 49409))
IDS = {"<cat-toy>_1": 49409, "<cat-toy>": 49408}
SPECIAL = [{"id": 49406, "content": "<|startoftext|>", "special": True},
           {"id": 49407, "content": "<|endoftext|>", "special": True}]  # fmt: skip
LISTED = [{"id": token, "content": text, "normalized": True, "single_word": False} for text, token in IDS.items()]
DECODER = {str(entry["id"]): entry for entry in [*SPECIAL, *LISTED]}
# As transformers writes them: before 4.34, from then on, from 5 on.
FORMS = {
    "added_tokens.json": {"added_tokens.json": IDS},
    "tokenizer_config.json": {"added_tokens.json": IDS, "tokenizer_config.json": {"added_tokens_decoder": DECODER}},
    "tokenizer.json": {
        "tokenizer.json": {"added_tokens": [*SPECIAL, *LISTED], "model": {"vocab": vocabulary().ids}},
        "vocab.json": None,
        "merges.txt": None,
    },
}


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory):
    """A small model of SD1.x's form as a diffusers folder, without added tokens."""
    np.random.seed(5)
    arrays = {p.name: p.asnumpy() for p in build_model(load_model_config(SD1)).get_parameters()}
    place = tmp_path_factory.mktemp("plain")
    write_checkpoint(place / "base.safetensors", arrays)
    convert(place / "base.safetensors", place / "sd", model_config=SD1)
    (place / "sd.yaml").unlink()
    return place / "sd"


def write_tokenizer(folder, files):
    for name, content in files.items():
        if content is None:
            (folder / "tokenizer" / name).unlink()
        else:
            (folder / "tokenizer" / name).write_text(json.dumps(content), encoding="utf-8")


def make_folder(plain_folder, path, files=FORMS["added_tokens.json"], rows=2):
    """A folder with two learned tokens: `rows` more in the text encoder, and the tokenizer's `files`."""
    shutil.copytree(plain_folder, path)
    weights = path / "text_encoder" / "model.safetensors"
    arrays, metadata = read_checkpoint(weights)
    name = "text_model.embeddings.token_embedding.weight"
    learned = np.random.RandomState(6).randn(max(rows, 0), arrays[name].shape[1]).astype(np.float32)
    arrays = {key: np.array(array) for key, array in arrays.items()}
    arrays[name] = np.concatenate([arrays[name], learned]) if rows >= 0 else arrays[name][:rows]
    weights.unlink()
    write_checkpoint(weights, arrays, metadata)
    write_tokenizer(path, files)
    return path


class TestAreUsed:
    @pytest.mark.parametrize("form", FORMS)
    def test_in_every_file_of_the_tokenizer(self, plain_folder, tmp_path, form):
        model = detect_model_config(make_folder(plain_folder, tmp_path / "sd", FORMS[form]))
        assert model.added_tokens == TOKENS and model.text["vocab_size"] == 49410

    def test_with_their_flags(self, plain_folder, tmp_path):
        listed = [{**LISTED[0], "normalized": False, "special": True}, {**LISTED[1], "single_word": True}]
        folder = make_folder(plain_folder, tmp_path / "sd", {"tokenizer.json": {"added_tokens": listed}})
        assert detect_model_config(folder).added_tokens == (
            AddedToken("<cat-toy>", 49408, True, True), AddedToken("<cat-toy>_1", 49409, False, False)
        )  # fmt: skip

    def test_by_a_prompt(self, plain_folder, tmp_path):
        folder = make_folder(plain_folder, tmp_path / "sd")
        model = detect_model_config(folder)
        pipeline = Pipeline(load_model(model, folder))
        assert pipeline.tokenizer.tokenize("a <cat-toy> <cat-toy>_1") == [320, 49408, 49409]
        rows = pipeline.encode_prompts(["a <cat-toy>", "a <cat-toy>_1", "a cat toy"])
        assert all(np.abs(rows[i] - rows[j]).max() > 1e-3 for i, j in ((0, 1), (0, 2), (1, 2)))

    def test_where_the_model_is_given_by_its_yaml(self, plain_folder, tmp_path):
        folder = make_folder(plain_folder, tmp_path / "sd")
        model = config_with_tokens(load_model_config(SD1), folder)
        assert model.added_tokens == TOKENS and model.text["vocab_size"] == 49410
        assert same_config(config_with_tokens(model, folder), model)

    @pytest.mark.parametrize("target", ["x.safetensors", "x.ckpt", "own.safetensors", "folder"])
    def test_survive_a_conversion_and_back(self, plain_folder, tmp_path, target, caplog):
        folder = make_folder(plain_folder, tmp_path / "sd", FORMS["tokenizer_config.json"])
        path = tmp_path / target
        convert(folder, path, "own" if target.startswith("own") else None)
        assert detect_model_config(path).added_tokens == TOKENS
        warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        if target.startswith("x"):  # what other programs read
            assert len(warned) == 1 and str(path) in warned[0] and "(<cat-toy>, <cat-toy>_1)" in warned[0]
        else:
            assert not warned
        convert(path, tmp_path / "back")
        assert read_added_tokens(open_base_model(tmp_path / "back")) == TOKENS
        before, after = open_base_model(folder), open_base_model(tmp_path / "back")
        name = "text_encoder/text_model.embeddings.token_embedding.weight"
        np.testing.assert_array_equal(after[name], before[name])
        written = json.loads((tmp_path / "back/tokenizer/added_tokens.json").read_text(encoding="utf-8"))
        assert written == {"<cat-toy>": 49408, "<cat-toy>_1": 49409}

    def test_where_the_embedding_is_filled_up_to_a_multiple(self, plain_folder, tmp_path):
        folder = make_folder(plain_folder, tmp_path / "sd", rows=64)
        convert(folder, tmp_path / "own.safetensors", "own")
        for path in (folder, tmp_path / "own.safetensors"):
            model = detect_model_config(path)
            assert model.added_tokens == TOKENS and model.text["vocab_size"] == 49472
            load_model(model, path)

    def test_without_any_the_files_are_as_ever(self, plain_folder):
        model = detect_model_config(plain_folder)
        assert model.added_tokens == () and "added_tokens" not in model.content()
        assert not (plain_folder / "tokenizer/added_tokens.json").exists()
        config = json.loads((plain_folder / "tokenizer/tokenizer_config.json").read_text(encoding="utf-8"))
        assert "added_tokens_decoder" not in config


class TestAreRefused:
    @pytest.mark.parametrize(
        "files, rows, words",
        [
            ({}, 1, "adds 0 tokens to CLIP's 49,408, but .* has 49,409 rows"),
            ({"added_tokens.json": IDS}, 0, r"adds 2 tokens .*\(<cat-toy>, <cat-toy>_1\), but .* has 49,408 rows"),
            ({"added_tokens.json": IDS}, 1, "adds 2 tokens .* 49,409 rows"),
            ({"added_tokens.json": IDS}, 30, "adds 2 tokens .* 49,438 rows"),
            ({"vocab.json": {**vocabulary().ids, "<cat-toy>": 49408}}, 1, "adds 0 tokens .* 49,409 rows"),
            ({}, -408, "wanted .49408, "),
        ],
    )
    def test_where_tokens_and_rows_are_not_as_many(self, plain_folder, tmp_path, files, rows, words):
        folder = make_folder(plain_folder, tmp_path / "sd", files, rows)
        with pytest.raises(UserError, match=words) as caught:
            load_model(detect_model_config(folder), folder)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)

    def test_a_single_file_without_them_in_its_metadata(self, plain_folder, tmp_path):
        convert(make_folder(plain_folder, tmp_path / "sd"), tmp_path / "own.safetensors", "own")
        arrays, _ = read_checkpoint(tmp_path / "own.safetensors")
        write_checkpoint(tmp_path / "bare.safetensors", arrays)
        with pytest.raises(UserError, match="bare.safetensors adds 0 tokens .* 49,410 rows"):
            config_with_tokens(load_model_config(SD1), tmp_path / "bare.safetensors")
        assert arrays[TOKEN_EMBEDDING].shape[0] == 49410

    @pytest.mark.parametrize(
        "files, words",
        [
            ({"added_tokens.json": {"<x>": "49408"}}, "gives <x> the id '49408': it must be a whole number"),
            ({"added_tokens.json": {"<x>": True}}, "the id True"),
            ({"added_tokens.json": {"<x>": -1}}, "the id -1"),
            ({"added_tokens.json": {"<x>": 10**12}}, "the id 1000000000000"),
            ({"added_tokens.json": {"<x>": 49410}}, "where 49408 is next"),
            ({"added_tokens.json": {"<x>": 49408, "<y>": 49408}}, "<y> the id 49408, where 49409 is next"),
            ({"added_tokens.json": {"<x>": 320}}, "the id 320, which is a</w> in CLIP's vocabulary"),
            ({"added_tokens.json": {"": 49408}}, "whose text is ''"),
            ({"added_tokens.json": {" ": 49408}}, "whose text is ' '"),
            ({"added_tokens.json": {"x" * 10_000: 49408}}, "a text of 1 to 500 characters"),
            ({"added_tokens.json": {"<\n>": 49410}}, "gives < > the id"),
            ({"added_tokens.json": {"<x>": 49408}, "tokenizer.json": {"added_tokens": LISTED[:1] + [
                {"id": 49409, "content": "<x>"}]}}, "gives <x> the id 49408, another file beside it 49409"),
            ({"tokenizer.json": {"added_tokens": 5}}, "added_tokens is not a list of tokens"),
            ({"tokenizer.json": {"added_tokens": [5]}}, "added_tokens is not a list of tokens"),
            ({"tokenizer.json": {"added_tokens": [{}]}}, "whose text is None"),
            ({"tokenizer.json": {"added_tokens": [{"id": 49408, "content": "<x>", "normalized": 1}]}},
             "must be true or false"),
            ({"tokenizer_config.json": {"added_tokens_decoder": [5]}}, "added_tokens_decoder is not a list of tokens"),
            ({"tokenizer_config.json": {"added_tokens_decoder": {"x": {"content": "<x>"}}}}, "the id 'x'"),
            ({"vocab.json": {"a": 0}}, "vocab.json is not CLIP's vocabulary, 49,408 of 49,408 entries differ"),
            ({"tokenizer.json": {"model": {"vocab": [1]}}}, "tokenizer.json is not CLIP's vocabulary"),
        ],
    )  # fmt: skip
    def test_where_they_cannot_be(self, tmp_path, files, words):
        with pytest.raises(UserError, match=words) as caught:
            read_tokenizer_tokens(lambda name: files.get(name.partition("/")[2], {}), tmp_path)
        assert "tokenizer" in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400

    @pytest.mark.parametrize(
        "text", ["", "5", "[5]", '[["<x>", 49408]]', '[["<x>", "49408", true, false]]', "[" * 99_999]
    )
    def test_impossible_tokens_in_metadata(self, tmp_path, text):
        write_checkpoint(tmp_path / "x.safetensors", {"a": np.zeros(1)}, {"added_tokens": text})
        with pytest.raises(UserError, match="x.safetensors, added_tokens in its metadata"):
            read_added_tokens(open_base_model(tmp_path / "x.safetensors"))

    def test_padding_with_an_added_token(self, plain_folder, tmp_path):
        files = {**FORMS["added_tokens.json"], "special_tokens_map.json": {"pad_token": "<cat-toy>"}}
        with pytest.raises(UserError, match="pad_token in tokenizer/special_tokens_map.json is <cat-toy>"):
            detect_model_config(make_folder(plain_folder, tmp_path / "sd", files))
