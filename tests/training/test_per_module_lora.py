"""Training by a lora_config: what it names is trained and saved; a resumed run drops what an uninterrupted one did."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.errors import UserError
from ldm.lora.formats import read_lora
from ldm.models.stable_diffusion import build_model
from ldm.runtime.device import setup_runtime
from ldm.settings.model import load_model_config
from ldm.settings.train import TrainSettings
from ldm.training.checkpoints import load_state
from ldm.training.trainer import Trainer, train
from ldm.weights.checkpoint import read_checkpoint, write_checkpoint
from ldm.weights.load import load_base_model

MICRO = Path(__file__).parent / "micro.yaml"
UNET = "model.diffusion_model."
MODULES = {
    "trainable_model": 1,
    "to_q": {"r": 2, "dropout": 0.5},
    "attn2.to_q": {"r": 3, "alpha": 6, "dropout": 0.25},
    "in_layers.2": {"r": 1, "trainable_scale": 1},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A random base checkpoint of the micro model."""
    setup_runtime("CPU", seed=3)
    path = tmp_path_factory.mktemp("base") / "micro.safetensors"
    model = build_model(load_model_config(MICRO))
    write_checkpoint(path, {name: p.asnumpy() for name, p in model.parameters_dict().items()})
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for i in range(4):
        Image.new("RGB", (16, 16), (60 * i, 128, 255 - 60 * i)).save(folder / f"{i}.png")
    (folder / "img_txt.csv").write_text("dir,text\n" + "".join(f"{i}.png,colour {i}\n" for i in range(4)))
    return folder


def settings(base, data, output, modules, **others) -> TrainSettings:
    path = Path(output).parent / "lora.json"
    path.write_text(json.dumps(modules))
    return TrainSettings(
        model_config=str(MICRO), image_size=16, train_batch_size=2, step_mode=True, ckpt_save_interval=2, max_steps=4,
        gradient_accumulation_steps=2, pretrained_model_path=str(base), data_path=str(data), output_path=str(output),
        device_target="CPU", use_lora=True, lora_config=str(path), start_learning_rate=1e-2, **others,
    )  # fmt: skip


@pytest.fixture(scope="module")
def done(base, data, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run."""
    output = tmp_path_factory.mktemp("done") / "run"
    train(settings(base, data, output, MODULES))
    return output


def test_the_lora_has_each_modules_rank_and_the_scale_that_was_learned(done):
    lora = read_lora(done / "ckpt" / "lora.ckpt")
    state = load_state(done / "ckpt" / "state-00000004.safetensors").arrays
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


def test_the_base_that_was_trained_with_it_lies_beside_it(done, base):
    path = done / "ckpt" / "model.ckpt"
    assert load_base_model(build_model(load_model_config(MICRO)), path).ok
    before, after = read_checkpoint(base)[0], read_checkpoint(path)[0]
    lora = read_lora(done / "ckpt" / "lora.ckpt")
    assert before.keys() == after.keys()
    for name, array in before.items():
        trained = name.startswith(UNET) and name.rpartition(".")[0] not in lora.layers
        assert np.array_equal(after[name], array) != trained, name


def test_a_resumed_run_ends_as_the_uninterrupted_one_bit_for_bit(done, base, data, tmp_path):
    output = tmp_path / "run"
    (output / "ckpt").mkdir(parents=True)
    shutil.copy(done / "ckpt" / "state-00000002.safetensors", output / "ckpt")
    train(settings(base, data, output, MODULES, resume=True))
    ours, theirs = (load_state(folder / "ckpt" / "state-00000004.safetensors").arrays for folder in (output, done))
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)
    # lora_dropout.key is no part of it: the step's number gives it
    assert not any("dropout" in name for name in theirs)


def test_another_lora_config_is_another_run(done, base, data, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(done, output)
    changed = {**MODULES, "to_q": {"r": 2, "dropout": 0.4}}
    with pytest.raises(UserError, match="lora_config was"):
        Trainer(settings(base, data, output, changed, resume=True))


@pytest.mark.parametrize(
    "modules, says",
    [
        ({"qkv_proj": {"r": 8}}, "match"),
        ({"to_q": {"r": 8}, "to_qv": {"r": 8}}, "did you mean to_v, to_q"),
        ({"to_q": {"rank": 8}}, "lora.json: to_q: unknown setting"),
        ({"to_q": {"r": 8}, "q_proj": {"r": 8}}, "lora_ft_text_encoder True"),
    ],
)
def test_a_mistake_is_found_before_the_data_is_encoded(base, data, tmp_path, modules, says):
    with pytest.raises(UserError, match=says):
        Trainer(settings(base, data, tmp_path / "run", modules))
    assert not (tmp_path / "run" / "cache").exists()


@pytest.mark.parametrize(
    "others, says",
    [
        (dict(use_lora=True, lora_config="a.json", lora_targets=["to_q"]), "both say which layers"),
        (dict(use_lora=False, lora_config="a.json"), "lora_config needs use_lora"),
    ],
)
def test_settings_that_contradict_it(others, says):
    with pytest.raises(UserError, match=says):
        TrainSettings(**others)
