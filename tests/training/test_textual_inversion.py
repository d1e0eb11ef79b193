"""Textual inversion: the new rows alone change, and a run keeps, resumes and writes them like everything it trains."""

from __future__ import annotations

import logging
from dataclasses import replace

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn
from PIL import Image

from ldm.errors import UserError
from ldm.generation.loading import select_lora
from ldm.generation.pipeline import Pipeline
from ldm.lora.lora import LoRA
from ldm.models.layers import hold_frozen_weights, set_compute_dtype
from ldm.settings.train import TrainSettings
from ldm.textual_inversion.formats import read_embeddings
from ldm.textual_inversion.inject import NAME, make_tokenizer
from ldm.textual_inversion.templates import TEMPLATES
from ldm.tokenizer import AddedToken
from ldm.training.checkpoints import Checkpoints
from ldm.training.checks import check_settings
from ldm.training.rates import make_rates
from ldm.training.samples import _merged
from ldm.training.setup import inject_token, make_lora_spec, set_token
from ldm.training.step import StepScalars, TrainStep
from ldm.training.trainer import run_steps, train
from ldm.training.training_state import load_state
from ldm.weights.added_tokens import TOKEN_EMBEDDING
from ldm.weights.checkpoint import read_checkpoint
from tests.training.micro import MICRO, prepare

TI = {
    "placeholder_token": "<cat>", "initializer_token": "toy", "num_vectors": 2, "max_steps": 4, "ckpt_save_interval": 2,
    "ckpt_max_keep": 1, "weight_decay": 0.5, "start_learning_rate": 1e-2,
}  # fmt: skip
# With LoRA, at rates of their own, and all else that the state of a run consists of.
PIVOTAL = {
    **TI, "use_lora": True, "lora_rank": 2, "lora_targets": ["attn2.to_k", "q_proj"], "lora_ft_text_encoder": True,
    "ti_lr": 5e-2, "use_ema": True, "clip_grad": True, "random_flip": True, "cache_text": False,
}  # fmt: skip
WAYS = {"alone": TI, "pivotal": PIVOTAL}


def log_of(output) -> str:
    return (output / "log.txt").read_text()


@pytest.fixture(params=WAYS)
def way(request):
    return request.param


def test_only_new_rows_change_and_a_resumed_run_ends_with_the_same(settings, micro_base_model, tmp_path, way):
    given = WAYS[way]
    run = prepare(settings(tmp_path / "whole", **given, sample_prompts=["a <cat>"] if way == "alone" else None))
    (rows,) = [p for p in run.step.parameters if p.name == NAME]
    table = {p.name: p for p in run.model.get_parameters()}[TOKEN_EMBEDDING]
    toy = make_tokenizer(run.model).tokenize("toy")[0]
    start = table.asnumpy()[[toy, toy]]
    np.testing.assert_array_equal(rows.asnumpy(), start)
    before, _ = read_checkpoint(micro_base_model)
    newest = run_steps(run)
    for parameter in run.model.get_parameters():
        if parameter.name in before:
            np.testing.assert_array_equal(parameter.asnumpy(), before[parameter.name], err_msg=parameter.name)
    assert (np.abs(rows.asnumpy() - start).max(1) > 1e-3).all()
    trained = {p.name for p in run.step.parameters}
    assert trained == {NAME} if way == "alone" else NAME in trained and len(trained) == 11
    state = load_state(tmp_path / "whole" / "ckpt" / "state-00000004.safetensors")
    assert {name for name in state.arrays if name.endswith(NAME)} == {
        f"{group}.{NAME}" for group in ("p", "m", "v", *(("ema",) if way == "pivotal" else ()))
    }
    assert TOKEN_EMBEDDING not in "".join(state.arrays)

    folder = tmp_path / "whole" / "ckpt"
    kinds = ("ti",) if way == "alone" else ("lora", "ti")
    suffixes = {"ti": ".safetensors", "lora": ".ckpt"}
    assert newest == folder / f"{kinds[0]}{suffixes[kinds[0]]}"
    assert sorted(path.name for path in folder.iterdir()) == sorted([
        "files.json", "state-00000002.safetensors", "state-00000004.safetensors",
        *(f"{kind}{number}{suffixes[kind]}" for kind in kinds for number in ("", "-00000004")),
        *(["lora-step00000004.safetensors", "lora.safetensors"] if way == "pivotal" else []),
    ])  # fmt: skip
    (saved,) = read_embeddings(folder / "ti.safetensors")
    sampled = state.arrays[f"{'ema' if way == 'pivotal' else 'p'}.{NAME}"]
    assert saved.token == "<cat>" and saved.vectors.tolist() == sampled.tolist()

    resumed = train(settings(tmp_path / "half", **given, resume=str(folder / "state-00000002.safetensors")))
    for path in folder.glob("*-00000004.*"):
        assert (resumed.parent / path.name).read_bytes() == path.read_bytes(), path.name
    with pytest.raises(UserError, match="num_vectors was 2, is 3"):
        prepare(settings(tmp_path / "half", **{**given, "num_vectors": 3}, resume=True))
    for name in ("lora.ckpt", "lora.safetensors") if way == "pivotal" else ():
        lora = select_lora(run.model.config, folder / name)  # what a Pipeline loads
        np.testing.assert_array_equal(lora.embeddings["<cat>"], sampled)
        assert not _merged(lora).lora.embeddings  # samples find them in the text encoder
    if way == "alone":
        check_sample(tmp_path / "whole", micro_base_model)


def check_sample(output, base_model) -> None:
    """The sample of the last step is the image that the token's file and the base model give."""
    pipeline = Pipeline.from_checkpoint(base_model, config=MICRO, device="CPU")
    pipeline.load_embedding(output / "ckpt" / "ti-00000004.safetensors")
    (image,) = pipeline("a <cat>", seed=42, num_inference_steps=20, batch_size=1).images
    with Image.open(output / "samples" / "prompt-01" / "step-00000004.png") as sample:
        np.testing.assert_array_equal(np.asarray(sample.convert("RGB")), np.asarray(image))


def test_the_lora_of_a_pivotal_run_has_the_rows_and_another_run_continues_them(settings, tmp_path):
    run = prepare(settings(tmp_path / "run", **PIVOTAL))
    assert isinstance(run.checkpoints, Checkpoints)
    arrays = run.step.state()
    arrays[f"ema.{NAME}"] = np.full((2, 32), 3.0, np.float32)
    lora = run.checkpoints.lora(arrays)
    assert {token: rows.tolist() for token, rows in lora.embeddings.items()} == {"<cat>": [[3.0] * 32] * 2}
    (rows,) = [p for p in run.step.parameters if p.name == NAME]
    set_token(run.settings, run.model, LoRA({}, {}, {"<dog>": np.ones((5, 32), np.float32)}))
    assert not (rows.asnumpy() == 1).any()
    set_token(run.settings, run.model, LoRA({}, {}, {"<cat>": np.ones((2, 32), np.float32)}))
    assert (rows.asnumpy() == 1).all()
    with pytest.raises(UserError, match="has vectors .1, 32., here they are .2, 32.: set num_vectors 1"):
        set_token(run.settings, run.model, LoRA({}, {}, {"<cat>": np.ones((1, 32), np.float32)}))


class SumOfTexts(nn.Cell):
    """Stands for the loss: the text embeddings of a batch, weighted and added."""

    def __init__(self, text_encoder, weights):
        super().__init__(auto_prefix=False)
        self.text_encoder, self.weights = text_encoder, weights

    def construct(self, tokens):
        return (self.text_encoder(tokens) * self.weights).sum()


def test_in_fp16_the_rows_stay_fp32_and_a_step_that_overflows_leaves_them(settings, tmp_path, tiny_model):
    given = settings(tmp_path / "run", **TI, precision="fp16")
    inject_token(given, tiny_model)
    encoder = tiny_model.cond_stage_model
    (rows,) = trained = [p for p in encoder.get_parameters() if p.requires_grad]
    set_compute_dtype(encoder, ms.float16)
    assert rows.name == NAME and hold_frozen_weights(encoder, ms.float16) > 0
    tokens = make_tokenizer(tiny_model).encode(["a <cat>", "a cat"])
    weights = np.random.default_rng(0).standard_normal((2, 77, rows.shape[1]), np.float32)
    step = TrainStep(SumOfTexts(encoder, ms.Tensor(weights)), trained, skip_overflow=True)
    start = rows.asnumpy().copy()
    for scale, applied in ((1e38, False), (2.0**10, True)):
        scalars = StepScalars(scale, 1 / scale, 1.0, step.optimizer.numbers(1, 1e-2), 0.0)
        result = step([(ms.Tensor(tokens),)], scalars).read()
        assert result.finite == applied
        moved = np.abs(rows.asnumpy() - start)
        assert moved.min() > 5e-3 if applied else not moved.any()  # one update of AdamW
    assert rows.dtype == ms.float32


def captions_of(run, steps=30):
    return [caption for step in range(steps) for caption in run.inputs.captions.of_batch(run.inputs.rows(step), step)]


def test_captions_without_the_token_become_templates_that_change(settings, micro_data, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        run = prepare(settings(tmp_path / "a", **TI))
    assert "10 of 10 captions do not use <cat>: templates" in log_of(tmp_path / "a")
    captions = captions_of(run)
    assert set(captions) <= {text.format("<cat>") for text in TEMPLATES["object"]} and len(set(captions)) > 8
    assert captions == captions_of(run)  # a function of the step
    batch = run.inputs.batch(0)
    assert batch.text_embeddings.dtype == np.int32 and (batch.text_embeddings == 49408).any(1).all()
    style = prepare(settings(tmp_path / "b", **{**TI, "learnable_property": "style"}))
    assert set(captions_of(style)) <= {text.format("<cat>") for text in TEMPLATES["style"]}
    run.inputs.data.is_class_image = lambda row: True  # those of prior preservation keep theirs
    assert all(caption.startswith("an image of colour") for caption in captions_of(run, 3))
    kept = prepare(settings(tmp_path / "c", **{**TI, "learnable_property": None, "caption_prefix": "<cat>"}))
    assert all(caption.startswith("<cat> an image of colour") for caption in captions_of(kept, 3))
    with_token = replace(kept.settings, learnable_property="object", output_path=str(tmp_path / "d"))
    assert all(caption.startswith("<cat> an image of colour") for caption in captions_of(prepare(with_token), 3))


def test_images_without_captions_are_enough(settings, micro_data, tmp_path):
    (tmp_path / "images").mkdir()
    for path in sorted(micro_data.glob("*.png"))[:2]:
        (tmp_path / "images" / path.name).write_bytes(path.read_bytes())
    run = prepare(settings(tmp_path / "run", **{**TI, "data_path": str(tmp_path / "images")}))
    assert "2 of 2 captions do not use <cat>" in log_of(tmp_path / "run")
    assert len(set(captions_of(run, 10))) > 4


def test_the_token_has_its_own_rate():
    given = dict(placeholder_token="<cat>", start_learning_rate=1e-4)
    names = [NAME, "cond_stage_model.a.lora_up.weight", "model.diffusion_model.b.lora_up.weight"]
    settings = TrainSettings(**given, use_lora=True, lora_ft_text_encoder=True, text_encoder_lr=5e-5, ti_lr=1e-3)
    rates = make_rates(settings, names, make_lora_spec(settings))
    assert rates.largest == pytest.approx(10) and rates.shown == pytest.approx(10)
    assert [rates.factors[name] for name in names] == pytest.approx([1.0, 0.05, 0.1])
    alone = TrainSettings(**given)
    assert make_rates(alone, [NAME], make_lora_spec(alone)) == (1.0, 1.0, {NAME: 1.0})


@pytest.mark.parametrize("token", ["cat", "sks", "", " <x>", "a\nb", "<|endoftext|>", "x" * 501])
def test_a_token_that_is_a_word_or_no_text_is_refused(settings, tmp_path, token):
    with pytest.raises(UserError, match="placeholder_token"):
        check_settings(settings(tmp_path / "run", placeholder_token=token))


def test_a_token_that_the_model_has_and_a_word_of_many_tokens_are_refused(settings, tmp_path, tiny_model):
    given = settings(tmp_path / "run", **{**TI, "initializer_token": "a large toy"})
    with pytest.raises(UserError, match="initializer_token 'a large toy' is 3 of CLIP's tokens"):
        inject_token(given, tiny_model)
    tiny_model.config = replace(tiny_model.config, added_tokens=(AddedToken("<CAT>", 49408),))
    with pytest.raises(UserError, match="placeholder_token <cat> is a token of the base model already"):
        inject_token(given, tiny_model)


def test_a_lora_config_that_trains_the_base_model_is_refused(settings, tmp_path):
    path = tmp_path / "lora.yaml"
    path.write_text("trainable_model: true\nto_q: {r: 2}\n")
    with pytest.raises(UserError, match="does not go with trainable_model"):
        prepare(settings(tmp_path / "run", **TI, use_lora=True, lora_config=str(path)))
