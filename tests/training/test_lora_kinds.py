"""Training of every kind of LoRA: a resumed run ends as an uninterrupted one, and files hold what was trained."""

from __future__ import annotations

import json
import shutil

import numpy as np

from ldm.lora.formats import read_lora
from ldm.settings.train import TrainSettings
from ldm.training.trainer import train
from ldm.training.training_state import load_state
from tests.training.micro import SETTINGS

MODULES = {
    "middle_block.*.attn1.to_q": {"r": 2, "algo": "dora", "module_dropout": 0.3},
    "middle_block.*.attn2.to_v": {"r": 1, "algo": "lokr", "dora_wd": 1, "rank_dropout": 0.3},
    "middle_block.0.in_layers.2": {"r": 1, "algo": "loha", "use_tucker": 1, "rank_dropout": 0.3},
    "q_proj": {"r": 1, "algo": "lokr", "factor": 2},
}


def settings_of(base_model, data, output, **others) -> TrainSettings:
    path = output.parent / "lora.json"
    path.write_text(json.dumps(MODULES))
    return TrainSettings(**{
        **SETTINGS, "pretrained_model_path": base_model, "data_path": data, "output_path": output, "use_lora": True,
        "lora_ft_text_encoder": True, "start_learning_rate": 1e-2, "ckpt_save_interval": 2, "max_steps": 4,
        "use_ema": True, "ema_decay": 0.5, "lora_config": path, **others,
    })  # fmt: skip


def test_a_resumed_run_ends_as_the_uninterrupted_one_bit_for_bit(micro_base_model, micro_data, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    train(settings_of(micro_base_model, micro_data, first))
    (second / "ckpt").mkdir(parents=True)
    shutil.copy(first / "ckpt" / "state-00000002.safetensors", second / "ckpt")
    train(settings_of(micro_base_model, micro_data, second, resume=True))
    states = [load_state(folder / "ckpt" / "state-00000004.safetensors").arrays for folder in (first, second)]
    earlier = load_state(first / "ckpt" / "state-00000002.safetensors").arrays
    assert states[0].keys() == states[1].keys()
    for name, array in states[0].items():
        np.testing.assert_array_equal(states[1][name], array, err_msg=name)
        if name.startswith("p."):
            assert not np.array_equal(array, earlier[name]), name
    # The file holds the averages under the names of its kinds.
    lora = read_lora(first / "ckpt" / "lora.ckpt")
    kinds = {".".join(name.split(".")[-2:]): layer.label for name, layer in lora.layers.items()}
    assert kinds == {
        "attn1.to_q": "DoRA", "attn2.to_v": "DoRA of LoKr", "in_layers.2": "LoHa", "self_attn.q_proj": "LoKr",
    }  # fmt: skip
    for name, layer in lora.layers.items():
        for part, array in layer.arrays().items():
            if part != "alpha":
                average = states[0][f"ema.{name}.{part if part.startswith('lora_') else f'lora_{part}'}"]
                np.testing.assert_array_equal(array.reshape(average.shape), average)
