"""Training from Python: the example of the README, run on a model of 16 pixels."""

from __future__ import annotations

import re
import signal

import pytest

from ldm.errors import UserError
from ldm.lora.formats import read_lora
from ldm.training.trainer import train_lora
from tests.training.micro import ROOT, SETTINGS

PATHS = ("datasets/emoji_fluent_hc", "models/nano/nano.safetensors", "output/emoji")


def readme_example() -> str:
    """The block of the README that calls train_lora."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    examples = [block for block in blocks if "train_lora(" in block]
    assert len(examples) == 1
    return examples[0]


def handlers() -> list:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    return [*map(signal.getsignal, numbers), signal.pthread_sigmask(signal.SIG_BLOCK, [])]


def test_the_example_of_the_readme_trains_a_lora(micro_base_model, micro_data, tmp_path, monkeypatch, capsys):
    example = readme_example()
    for path, replacement in zip(PATHS, (micro_data, micro_base_model, tmp_path / "run")):
        assert path in example
        example = example.replace(path, str(replacement))
    small = {**SETTINGS, "max_steps": 2}
    monkeypatch.setattr(
        "ldm.training.trainer.train_lora", lambda *paths, **settings: train_lora(*paths, **{**settings, **small})
    )
    before = handlers()
    exec(compile(example, "README.md", "exec"), {})
    path = tmp_path / "run" / "ckpt" / "lora.ckpt"
    assert {layer.rank for layer in read_lora(path).layers.values()} == {16}  # of train_config_lora_nano.yaml
    printed = capsys.readouterr()
    assert str(path) in printed.out and "step 2/2" in printed.err
    assert handlers() == before


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (dict(image_size=15), "image_size 15"),
        (dict(lora_rank=0), "lora_rank"),
        (dict(train_config="no.yaml"), "no.yaml"),
    ],
)
def test_a_mistake_is_raised_to_the_caller(micro_base_model, micro_data, tmp_path, change, error):
    with pytest.raises(UserError, match=error):
        train_lora(micro_data, micro_base_model, tmp_path / "run", **{**SETTINGS, **change})
