"""Files of learned tokens: what is written is read again, and what is no learned token is refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.textual_inversion.embedding import Embedding
from ldm.textual_inversion.formats import FORMATS, learned_tokens, read_embeddings, write_embeddings
from ldm.weights.checkpoint import open_checkpoint, write_checkpoint
from ldm.weights.file_formats.torch_writer import write_torch

REAL = Path(__file__).resolve().parents[3] / "shared" / "lora_more"
ROWS = np.random.RandomState(0).randn(3, 8).astype(np.float32)
PATHS = [(form, suffix) for form, suffixes in FORMATS.items() for suffix in suffixes]


def content(embeddings):
    return [(embedding.token, embedding.vectors.tolist()) for embedding in embeddings]


@pytest.mark.parametrize("form, suffix", PATHS)
def test_every_form_is_read_as_it_was_written(tmp_path, form, suffix):
    path = tmp_path / f"<cat>{suffix}"  # where a form has no token, the file's name is it
    vectors = ROWS[:1] if form == "cloneofsimo" else ROWS
    write_embeddings(path, [Embedding("<cat>", vectors)], form)
    assert content(read_embeddings(path)) == [("<cat>", vectors.tolist())]
    assert read_embeddings(path)[0].vectors.dtype == np.float32
    assert content(read_embeddings(path, "dog")) == [("dog", vectors.tolist())]


def test_the_file_s_name_is_the_token_of_the_forms_without_one(tmp_path):
    for form, name in (("a1111", "easy.pt"), ("kohya", "my dog.safetensors")):
        write_embeddings(tmp_path / name, [Embedding("<cat>", ROWS)], form)
        assert read_embeddings(tmp_path / name)[0].token == Path(name).stem


@pytest.mark.parametrize("form, suffix", [("diffusers", ".bin"), ("cloneofsimo", ".safetensors")])
def test_several_tokens_of_a_file(tmp_path, form, suffix):
    tokens = [Embedding("<s1>", ROWS[:1]), Embedding("<s2>", ROWS[1:2])]
    write_embeddings(tmp_path / f"x{suffix}", tokens, form)
    assert content(read_embeddings(tmp_path / f"x{suffix}")) == content(tokens)
    with pytest.raises(UserError, match=r"holds 2 tokens \(<s1>, <s2>\): .* leave out :cat"):
        read_embeddings(tmp_path / f"x{suffix}", "cat")


def test_other_shapes_and_types_that_files_have(tmp_path):
    write_torch(tmp_path / "vector.bin", {"<cat>": ROWS[0]})
    write_checkpoint(tmp_path / "half.safetensors", {"emb_params": ROWS.astype(np.float16)})
    write_checkpoint(tmp_path / "one_of_several.safetensors", {"clip_l": ROWS})
    assert read_embeddings(tmp_path / "vector.bin")[0].vectors.tolist() == ROWS[:1].tolist()
    half = read_embeddings(tmp_path / "half.safetensors")[0].vectors
    assert half.dtype == np.float32 and half.tolist() == ROWS.astype(np.float16).tolist()
    assert read_embeddings(tmp_path / "one_of_several.safetensors")[0].token == "one_of_several"


def test_the_tokens_beside_a_lora(tmp_path):
    arrays = {"unet:0:up": ROWS, "unet:0:down": ROWS, "text_encoder:0:up": ROWS, "text_encoder:0:down": ROWS}
    path = tmp_path / "x.safetensors"
    write_checkpoint(path, {**arrays, "<s2>": ROWS[1], "<s1>": ROWS[0]})
    assert content(read_embeddings(path)) == [("<s1>", ROWS[:1].tolist()), ("<s2>", ROWS[1:2].tolist())]
    assert list(learned_tokens(open_checkpoint(path))) == ["<s1>", "<s2>"]
    write_checkpoint(path, arrays)
    with pytest.raises(UserError, match="is a LoRA without learned tokens of its own: give it as --lora_ckpt_path"):
        read_embeddings(path)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real files are not here")
def test_files_of_other_projects():
    (birb,) = read_embeddings(REAL / "textual-inversion_fastai.bin")
    assert birb.token == "<birb-style>" and birb.vectors.shape == (1, 768) and 0.01 < birb.vectors.std() < 1
    both = read_embeddings(REAL / "cloneofsimo-rank1-fp16_TedLee109.safetensors")
    assert [embedding.token for embedding in both] == ["<s1>", "<s2>"] and both[1].vectors.shape == (1, 768)


NAN = np.full((1, 8), np.nan, np.float32)


@pytest.mark.parametrize(
    "arrays, words",
    [
        ({}, "checkpoint without any arrays"),
        ({"<x>": np.zeros((), np.float32)}, "no learned token"),
        ({"<x>": np.zeros((1, 2, 3), np.float32)}, "a file of 1 arrays, no learned token"),
        ({"<x>": np.zeros((0, 8), np.float32)}, r"<x> is no vector .* shape \(0, 8\)"),
        ({"<x>": np.zeros((1, 8), np.int64)}, "<x> is no vector .* type int64"),
        ({"<x>": NAN}, "<x> is no vector of finite numbers"),
        ({"<x>": np.full(8, 1e30, np.float64) * 1e30}, "<x> is no vector of finite numbers"),
        ({"<x>": np.zeros((76, 8), np.float32)}, "<x> has 76 vectors of 8 numbers, a prompt holds 75"),
        ({"<x>": np.zeros(70_000, np.float32)}, "1 vectors of 70,000 numbers"),
        ({"<x>": ROWS, "<y>": ROWS[:, :4]}, r"its tokens \(<x>, <y>\) have different widths"),
        ({f"<{i}>": ROWS[0] for i in range(101)}, "a file of 101 arrays, no learned token"),
        ({"<x>": ROWS, "unet:0:up": ROWS, "unet:0:down": ROWS, "unet:1:up": ROWS}, "<x> is no vector"),
        ({"clip_g": ROWS, "clip_l": ROWS}, "for SDXL: only those for SD1.x and SD2.x"),
        ({"emb_params": np.zeros((2, 2, 2), np.float32)}, r"the learned token bad is no vector .* \(2, 2, 2\)"),
        ({"string_to_param.*": ROWS, "string_to_param.a": ROWS}, "an embedding of 2 parameters"),
        ({" <x>": ROWS}, r"a token is a text of 1 to 500 printable characters .* not ' <x>'"),
        ({"a\nb": ROWS}, "a token is a text"),
        ({"x" * 501: ROWS}, "a token is a text"),
        ({"<|EndOfText|>": ROWS}, "begins or ends every prompt"),
        ({"model.diffusion_model.out.0.bias": ROWS[0]}, "is a base model, no learned token"),
        ({"text_model.final_layer_norm.bias": ROWS[0]}, "alone, no learned token"),
        (
            {"lora_unet_a.lora_up.weight": ROWS, "lora_unet_a.lora_down.weight": ROWS},
            "is a LoRA without learned tokens",
        ),
    ],
)
def test_what_is_no_learned_token_is_refused(tmp_path, arrays, words):
    path = tmp_path / "bad.safetensors"
    write_checkpoint(path, arrays)
    with pytest.raises(UserError, match=words) as caught:
        read_embeddings(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "raw", [b"", b"PK\x03\x04", b"\x80\x02", b"hello", b"\x89PNG\r\n", b"\x08\0\0\0\0\0\0\0{}      "]
)
def test_what_is_no_file_of_arrays_is_refused(tmp_path, raw):
    (tmp_path / "bad.pt").write_bytes(raw)
    with pytest.raises(UserError, match="bad.pt"):
        read_embeddings(tmp_path / "bad.pt")


@pytest.mark.parametrize(
    "name, tokens, form, words",
    [
        ("x.pt", ["<a>"], "diffusers", "diffusers is written as .safetensors or .ckpt or .bin"),
        ("x.safetensors", ["<a>"], "a1111", "a1111 is written as .pt"),
        ("x.safetensors", ["<a>", "<b>"], "kohya", r"holds one token, not 2 \(<a>, <b>\)"),
        ("x.pt", [], "a1111", "holds one token, not 0"),
        ("x.safetensors", ["a"], "cloneofsimo", "one vector and a name such as <s1>, a has 3"),
        ("x.safetensors", ["<a>"], "cloneofsimo", "<a> has 3: write another form"),
    ],
)
def test_what_a_form_does_not_hold_is_not_written(tmp_path, name, tokens, form, words):
    with pytest.raises(UserError, match=words):
        write_embeddings(tmp_path / name, [Embedding(token, ROWS) for token in tokens], form)
    assert not list(tmp_path.iterdir())
