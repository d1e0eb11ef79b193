"""Training with a lora_config: its layers are trained and saved, and dropout is the same after resuming."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.lora.formats import read_lora
from ldm.models.stable_diffusion import build_model
from ldm.settings.model import load_model_config
from ldm.settings.train import TrainSettings
from ldm.training.trainer import save, train
from ldm.training.training_state import load_state
from ldm.weights.checkpoint import read_checkpoint
from ldm.weights.load import load_base_model
from tests.training.micro import MICRO, SETTINGS, UNET, prepare

MODULES = {
    "trainable_model": 1,
    "to_q": {"r": 2, "dropout": 0.5},
    "attn2.to_q": {"r": 3, "alpha": 6, "dropout": 0.25},
    "in_layers.2": {"r": 1, "trainable_scale": 1},
}


def settings_of(base_model, data, output, modules, **others) -> TrainSettings:
    path = Path(output).parent / "lora.json"
    path.write_text(json.dumps(modules))
    return TrainSettings(**{
        **SETTINGS, "pretrained_model_path": base_model, "data_path": data, "output_path": output, "use_lora": True,
        "lora_config": path, "start_learning_rate": 1e-2, "ckpt_save_interval": 2, "max_steps": 4,
        "gradient_accumulation_steps": 2, **others,
    })  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(micro_base_model, micro_data, tmp_path_factory) -> Path:
    """The output folder of an uninterrupted run."""
    output = tmp_path_factory.mktemp("uninterrupted") / "run"
    train(settings_of(micro_base_model, micro_data, output, MODULES))
    return output


def test_the_lora_has_the_rank_of_each_module_and_the_learned_scale(uninterrupted):
    lora = read_lora(uninterrupted / "ckpt" / "lora.ckpt")
    state = load_state(uninterrupted / "ckpt" / "state-00000004.safetensors").arrays
    ranks = {".attn1.to_q": 2, ".attn2.to_q": 3, ".in_layers.2": 1}
    for name, layer in lora.layers.items():
        end = next(end for end in ranks if name.endswith(end))
        assert layer.rank == ranks[end] and layer.up.any()
        np.testing.assert_array_equal(layer.up, state[f"p.{name}.lora_up.weight"])
        if end == ".in_layers.2":
            scale = float(state[f"p.{name}.lora_scale"][0])
            assert scale != 1.0 and layer.alpha == pytest.approx(scale)
        else:
            assert layer.alpha == {2: 2.0, 3: 6.0}[layer.rank]
    assert {next(end for end in ranks if name.endswith(end)) for name in lora.layers} == set(ranks)


def test_the_base_model_that_was_trained_with_it_is_saved_beside_it(uninterrupted, micro_base_model):
    path = uninterrupted / "ckpt" / "model.ckpt"
    assert load_base_model(build_model(load_model_config(MICRO)), path).ok
    before, after = read_checkpoint(micro_base_model)[0], read_checkpoint(path)[0]
    lora = read_lora(uninterrupted / "ckpt" / "lora.ckpt")
    assert before.keys() == after.keys()
    for name, array in before.items():
        trained = name.startswith(UNET) and name.rpartition(".")[0] not in lora.layers
        assert np.array_equal(after[name], array) != trained, name


def test_the_frozen_weights_of_that_base_model_are_saved_unrounded_in_fp16(micro_base_model, micro_data, tmp_path):
    run = prepare(settings_of(micro_base_model, micro_data, tmp_path / "run", MODULES, precision="fp16"))
    save(run)  # a step is not needed: the weights get their types before the first
    trained = {parameter.name for parameter in run.model.trainable_params()}
    before, after = (
        read_checkpoint(path)[0] for path in (micro_base_model, run.checkpoints.newest.with_name("model.ckpt"))
    )
    frozen = before.keys() - trained
    assert any(name.endswith("attn1.to_q.weight") for name in frozen)  # of a layer with a LoRA
    for name in frozen:
        assert after[name].dtype == np.float32 and np.array_equal(after[name], before[name]), name


def test_a_resumed_run_ends_as_the_uninterrupted_one_bit_for_bit(uninterrupted, micro_base_model, micro_data, tmp_path):
    output = tmp_path / "run"
    (output / "ckpt").mkdir(parents=True)
    shutil.copy(uninterrupted / "ckpt" / "state-00000002.safetensors", output / "ckpt")
    train(settings_of(micro_base_model, micro_data, output, MODULES, resume=True))
    resumed, expected = (
        load_state(folder / "ckpt" / "state-00000004.safetensors").arrays for folder in (output, uninterrupted)
    )
    assert resumed.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(resumed[name], array, err_msg=name)
    # The dropout key is not saved: it is a function of the step's number.
    assert not any("dropout" in name for name in expected)


def test_another_lora_config_is_another_run(uninterrupted, micro_base_model, micro_data, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(uninterrupted, output)
    changed = {**MODULES, "to_q": {"r": 2, "dropout": 0.4}}
    with pytest.raises(UserError, match="lora_config was"):
        prepare(settings_of(micro_base_model, micro_data, output, changed, resume=True))


@pytest.mark.parametrize(
    "modules, error",
    [
        ({"qkv_proj": {"r": 8}}, "match"),
        ({"to_q": {"r": 8}, "to_qv": {"r": 8}}, "did you mean to_v, to_q"),
        ({"to_q": {"rank": 8}}, 'lora.json: unknown setting "to_q.rank"'),
        ({"to_q": {"r": 8}, "q_proj": {"r": 8}}, "lora_ft_text_encoder True"),
    ],
)
def test_a_mistake_is_found_before_the_data_is_encoded(micro_base_model, micro_data, tmp_path, modules, error):
    with pytest.raises(UserError, match=error):
        prepare(settings_of(micro_base_model, micro_data, tmp_path / "run", modules))
    assert not list((tmp_path / "run").glob("cache/*.shard"))


@pytest.mark.parametrize(
    "others, error",
    [
        (dict(use_lora=True, lora_config="a.json", lora_targets=["to_q"]), "both say which layers"),
        (dict(use_lora=False, lora_config="a.json"), "lora_config needs use_lora"),
    ],
)
def test_settings_that_contradict_a_lora_config(others, error):
    with pytest.raises(UserError, match=error):
        TrainSettings(**others)
