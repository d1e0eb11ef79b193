"""Training from Python: the example of the README, run on a model of 16 pixels."""

from __future__ import annotations

import re
import signal

import pytest

from ldm.errors import UserError
from ldm.lora.formats import read_lora
from ldm.training.trainer import train_lora
from tests.training.micro import ROOT, SETTINGS

PATHS = ("datasets/emoji_noto/train", "models/nano/nano.safetensors", "output/emoji")


def readme_example() -> str:
    """The block of the README that calls train_lora."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    examples = [block for block in blocks if "train_lora(" in block]
    assert len(examples) == 1
    return examples[0]


def test_the_example_of_the_readme_trains_a_lora(micro_base_model, micro_data, tmp_path, monkeypatch, capsys):
    example = readme_example()
    for path, replacement in zip(PATHS, (micro_data, micro_base_model, tmp_path / "run")):
        assert path in example
        example = example.replace(path, str(replacement))
    small = {**SETTINGS, "max_steps": 2}
    monkeypatch.setattr(
        "ldm.training.trainer.train_lora", lambda *paths, **settings: train_lora(*paths, **{**settings, **small})
    )
    exec(compile(example, "README.md", "exec"), {"__name__": "__main__"})
    path = tmp_path / "run" / "ckpt" / "lora.ckpt"
    assert read_lora(path).layers
    printed = capsys.readouterr()
    assert str(path) in printed.out and "step 2/2" in printed.err


@pytest.mark.parametrize(
    ("change", "error"), [(dict(image_size=15), "multiple of 2"), (dict(lora_rank=0), "lora_rank")]
)
def test_a_mistake_is_raised_to_the_caller(micro_base_model, micro_data, tmp_path, change, error):
    with pytest.raises(UserError, match=error):
        train_lora(micro_data, micro_base_model, tmp_path / "run", **{**SETTINGS, **change})


def test_signals_stay_with_the_caller(micro_base_model, micro_data, tmp_path):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    train_lora(micro_data, micro_base_model, tmp_path / "run", **SETTINGS, max_steps=1)
    assert {number: signal.getsignal(number) for number in before} == before
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == blocked
