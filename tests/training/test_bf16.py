"""Training and generation with frozen weights in bf16, in graph mode: what is held, what is saved, and refusals."""

from __future__ import annotations

import json
import shutil

import mindspore as ms
import numpy as np
import pytest
from safetensors import safe_open

from ldm import ops
from ldm.errors import UserError
from ldm.generation.pipeline import Pipeline
from ldm.lora.formats import read_lora
from ldm.lora.formats.mindone import write
from ldm.lora.lora import LoRA
from ldm.lora.updates import LoRALayer
from ldm.models.layers import Conv2d, Linear
from ldm.runtime.device import setup_runtime
from ldm.settings.model import load_model_config
from ldm.training import setup
from ldm.training.inputs import caches
from ldm.training.loss_scale import LossScaler
from ldm.training.setup import begin
from ldm.training.trainer import run_steps, train
from ldm.training.training_state import TrainingState, save_state
from ldm.weights.arrays import to_bfloat16, widen
from ldm.weights.checkpoint import read_checkpoint, write_checkpoint
from tests.training.micro import MICRO, UNET, prepare

TEXT = "cond_stage_model."
TO_Q = "attn1.to_q.weight"
MIDDLE = "middle_block.1."
# A kind of LoRA for each layer of a transformer, and convolutions. Few layers compile in less time.
MODULES = {
    f"{MIDDLE}transformer_blocks.0.attn1.to_q": {"r": 2},
    f"{MIDDLE}transformer_blocks.0.attn1.to_k": {"r": 2, "algo": "dora"},
    f"{MIDDLE}transformer_blocks.0.attn1.to_v": {"r": 2, "algo": "loha"},
    f"{MIDDLE}transformer_blocks.0.attn2.to_k": {"r": 2, "algo": "lokr", "dora_wd": 1},
    f"{MIDDLE}proj_out": {"r": 2, "hard": 1},
    "middle_block.2.in_layers.2": {"r": 1, "algo": "dora"},
    "text_model.encoder.layers.0.mlp.fc1": {"r": 1, "algo": "dora"},
}
RECIPE = {
    "precision": "bf16", "use_lora": True, "lora_ft_text_encoder": True, "start_learning_rate": 1e-2, "use_ema": True,
    "ckpt_save_interval": 1, "max_steps": 2, "output_name": "style", "placeholder_token": "<cat>",
    "initializer_token": "cat",
}  # fmt: skip


def bits(parameter) -> bytes:
    return parameter.asnumpy().tobytes()


def is_held(name: str, model) -> bool:
    """Whether a parameter of the base model is the weight of a linear layer or convolution of UNet or text encoder."""
    layers = {cell.weight.name for _, cell in model.cells_and_names() if isinstance(cell, (Linear, Conv2d))}
    return name in layers and name.startswith((UNET, TEXT))


def rounded_model(path, model, base) -> str:
    """Write a base model whose held weights are rounded by NumPy."""
    arrays, metadata = read_checkpoint(base)
    held = {
        name: widen(to_bfloat16(array)).reshape(array.shape) for name, array in arrays.items() if is_held(name, model)
    }
    write_checkpoint(path, {**arrays, **held}, metadata)
    return str(path)


@pytest.mark.processes
def test_a_killed_run_of_every_kind_resumes_bit_for_bit_and_its_base_model_stays(settings, micro_base_model, tmp_path):
    (tmp_path / "lora.json").write_text(json.dumps(MODULES))
    given = {**RECIPE, "lora_config": tmp_path / "lora.json"}
    run = prepare(settings(tmp_path / "whole", **given))
    assert (run.runtime.precision, run.scaler.is_used) == ("bf16", False)
    base, _ = read_checkpoint(micro_base_model)
    for parameter in run.model.get_parameters():
        name = parameter.name
        assert (parameter.dtype == ms.bfloat16) == is_held(name, run.model), name
        if name in base:
            expected = to_bfloat16(base[name]) if is_held(name, run.model) else base[name]
            assert bits(parameter) == expected.tobytes(), name
    run_steps(run)
    for parameter in run.model.get_parameters():
        if parameter.name in base:
            expected = to_bfloat16(base[parameter.name]) if is_held(parameter.name, run.model) else base[parameter.name]
            assert bits(parameter) == expected.tobytes(), parameter.name
    folder = tmp_path / "whole" / "ckpt"
    with safe_open(folder / "style.safetensors", framework="np") as file:
        metadata = file.metadata()
        assert all(file.get_tensor(key).dtype == np.float32 for key in file.keys())
    assert metadata["ss_mixed_precision"] == "bf16" and json.loads(metadata["passport.device"])["precision"] == "bf16"
    kinds = {type(update).__name__ for update in read_lora(folder / "lora.ckpt").layers.values()}
    assert {"LoRALayer", "DoRA", "LoHa"} <= kinds

    (tmp_path / "half" / "ckpt").mkdir(parents=True)
    shutil.copy(folder / "state-00000001.safetensors", tmp_path / "half" / "ckpt")
    train(settings(tmp_path / "half", **{**given, "precision": "auto"}, resume=True))  # of a run in bf16, auto is bf16
    for name in ("state-00000002.safetensors", "lora.ckpt"):
        assert (tmp_path / "half" / "ckpt" / name).read_bytes() == (folder / name).read_bytes(), name
    with pytest.raises(UserError, match=r"precision was bf16, is fp32 \(give --precision bf16\)"):
        prepare(settings(tmp_path / "half", **{**given, "precision": "fp32"}, resume=True))


def test_generation_is_that_of_weights_which_numpy_rounds_and_loras_come_and_go(micro_base_model, tmp_path):
    config = load_model_config(MICRO)
    setup_runtime("CPU")
    pipeline = Pipeline.from_checkpoint(micro_base_model, config=config, dtype=ms.bfloat16)
    assert {p.dtype for p in pipeline.model.first_stage_model.get_parameters()} == {ms.float32}
    fp32 = Pipeline.from_checkpoint(
        rounded_model(tmp_path / "rounded.safetensors", pipeline.model, micro_base_model), config=config
    )
    before = {p.name: bits(p) for p in pipeline.model.get_parameters()}
    assert before == {
        p.name: to_bfloat16(p.asnumpy()).tobytes() if is_held(p.name, fp32.model) else bits(p)
        for p in fp32.model.get_parameters()
    }

    def images(pipe) -> np.ndarray:
        return pipe("a red apple", num_inference_steps=2, seed=3, progress=False).latents

    found, expected = images(pipeline), images(fp32)
    assert 0.5 < np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.05 * np.abs(expected).max())

    name = next(p.name for p in pipeline.model.get_parameters() if p.name.endswith(TO_Q))
    rng, (out, inputs) = np.random.default_rng(0), config_shape(pipeline, name)
    factors = rng.standard_normal((2, inputs)), rng.standard_normal((out, 2))
    layer = LoRALayer(*(factor.astype(np.float32) for factor in factors), 2.0)
    lora = tmp_path / "lora.ckpt"
    write(lora, LoRA({name.removesuffix(".weight"): layer}, {}))
    pipeline.load_lora(lora, 0.0)
    assert before == {p.name: bits(p) for p in pipeline.model.get_parameters()}
    pipeline.unload_lora()
    pipeline.load_lora(lora, 0.7, start=0.0, end=0.5)
    base, _ = read_checkpoint(micro_base_model)
    weight = pipeline.model.parameters_dict()[name]
    expected = to_bfloat16(base[name] + layer.update(0.7, base[name]))  # of the file's fp32 weight, rounded once
    assert bits(weight) == expected.tobytes() != before[name]
    assert not np.array_equal(images(pipeline), found)
    pipeline.unload_lora()
    assert before == {p.name: bits(p) for p in pipeline.model.get_parameters()}
    np.testing.assert_array_equal(images(pipeline), found)


def config_shape(pipeline, name) -> tuple[int, ...]:
    return tuple(pipeline.model.parameters_dict()[name].shape)


def test_a_text_encoder_that_is_computed_twice_stays_fp32_and_is_trained(settings, tmp_path):
    run = prepare(settings(tmp_path / "run", **RECIPE, gradient_checkpointing=True))
    for parameter in run.model.get_parameters():
        held = is_held(parameter.name, run.model) and parameter.name.startswith(UNET)
        assert (parameter.dtype == ms.bfloat16) == held, parameter.name
    run_steps(run)
    layers = read_lora(tmp_path / "run" / "ckpt" / "lora.ckpt").layers
    trained = {name.startswith(UNET) for name, layer in layers.items() if np.abs(layer.up).max() > 0}
    assert trained == {True, False} and all(np.isfinite(layer.up).all() for layer in layers.values())


@pytest.mark.processes
def test_a_unet_that_is_computed_twice_is_trained_as_without(settings, tmp_path):
    given = {"precision": "bf16", "use_lora": True, "start_learning_rate": 1e-2, "max_steps": 2}
    loras = []
    for name, twice in (("once", False), ("twice", True)):
        run_steps(prepare(settings(tmp_path / name, **given, gradient_checkpointing=twice)))
        loras.append(read_lora(tmp_path / name / "ckpt" / "lora.ckpt").layers)
    once, twice = loras
    assert list(once) == list(twice) and len(once) > 4
    for name, layer in once.items():
        assert np.abs(layer.up).max() > 0.005, name  # two steps of AdamW at 1e-2
        np.testing.assert_allclose(twice[name].up, layer.up, rtol=0, atol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    ("begun_in", "multiplies", "found", "said"),
    [
        ("bf16", True, "bf16", ""),
        ("bf16", False, "bf16", "precision bf16, in which this run was begun. Without kernels that multiply it"),
        ("fp32", True, "fp32", "precision fp32, in which this run was begun; auto is bf16"),
        ("fp32", False, "fp32", ""),
        ("fp16", False, "fp32", ""),  # of an Ascend: refused later, as it was
        (None, True, "bf16", ""),
        (None, False, "fp32", ""),
    ],
)
def test_auto_of_a_resumed_run_is_what_it_was_begun_in(
    settings, tmp_path, monkeypatch, caplog, begun_in, multiplies, found, said
):
    monkeypatch.setattr(setup, "multiplies_bf16", lambda: multiplies)
    (tmp_path / "ckpt").mkdir()
    if begun_in:
        scaler = LossScaler(1.0, False).state()
        save_state(tmp_path / "ckpt", TrainingState(3, {}, scaler, {"precision": begun_in}))
        (tmp_path / "ckpt" / "state-00000004.safetensors").write_bytes(b"damaged")  # the one before it is taken
    with caplog.at_level("INFO", "ldm.training.setup"):
        run = settings(tmp_path, use_lora=True, resume=True, precision="auto")
        runtime = begin(run)
        setup._log_resumed_precision(run, runtime)
    assert runtime.precision == found
    assert (said in caplog.text) if said else "begun" not in caplog.text
    for given in ("fp32", "bf16"):
        assert begin(settings(tmp_path, use_lora=True, resume=True, precision=given)).precision == given
    setup_runtime("CPU")


def test_a_training_of_the_whole_unet_stays_fp32(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "multiplies_bf16", lambda: True)
    given = {"precision": "auto"}
    assert begin(settings(tmp_path / "run", **given)).precision == "fp32"
    (tmp_path / "lora.json").write_text(json.dumps({"to_q": {"r": 2}, "trainable_model": 1}))
    given["use_lora"] = True
    assert begin(settings(tmp_path / "run", **given, lora_config=tmp_path / "lora.json")).precision == "fp32"
    assert begin(settings(tmp_path / "run", **given)).precision == "bf16"
    setup_runtime("CPU")


@pytest.mark.parametrize(("library", "warnings"), [(None, 1), ("kernels.so", 0)])
def test_bf16_without_kernels_is_warned_of_once(monkeypatch, caplog, library, warnings):
    monkeypatch.setattr(ops, "kernel_library", lambda: library)
    monkeypatch.setattr(ops, "multiplies_bf16", lambda: False)
    ops._warn_of_bf16_without_kernels.cache_clear()
    for _ in range(2):
        ops.linear(has_bias=False, bf16_weight=True)
        ops.linear(has_bias=False)
    assert len(caplog.records) == warnings and ("Install g++" in caplog.text) == bool(warnings)
    ops._warn_of_bf16_without_kernels.cache_clear()


def test_a_training_of_the_base_model_beside_a_lora_is_refused(settings, tmp_path):
    (tmp_path / "lora.json").write_text(json.dumps({"to_q": {"r": 2}, "trainable_model": 1}))
    given = {"precision": "bf16", "use_lora": True, "lora_config": tmp_path / "lora.json"}
    with pytest.raises(UserError, match="trainable_model in lora_config trains them: use auto or fp32"):
        prepare(settings(tmp_path / "run", **given))
    assert not (tmp_path / "run").exists()


def test_the_key_of_cached_embeddings_says_what_multiplies_bf16(monkeypatch):
    """A folder may be continued on another processor."""
    keys = {}
    for dtype in (ms.float32, ms.bfloat16):
        layer = Linear(2, 2)
        layer.weight.set_data(ms.Tensor(np.ones((2, 2), np.float32)))
        layer.bias.set_data(ms.Tensor(np.ones(2, np.float32)))
        layer.weight.set_dtype(dtype)
        for unit in (None, "avx512_bf16", "amx"):
            monkeypatch.setattr(caches, "bf16_unit", lambda unit=unit: unit)
            keys.setdefault(dtype, set()).add(caches.network_hash(layer, ""))
    assert len(keys[ms.float32]) == 1 and len(keys[ms.bfloat16]) == 3
