"""tools/benchmark/load_checkpoint.py: its measurements, and the memory of loading (the weights once) and converting."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml

from tests.conftest import ROOT
from tools.benchmark import load_checkpoint

TINY = ROOT / "tests" / "tiny.yaml"
TAKEN = 200_000_000  # bytes


def test_every_format_is_loaded_and_converted_and_gets_a_row(tmp_path, monkeypatch, capsys):
    done = []

    def here(kind, *arguments):
        done.append((kind, [word.rpartition("/")[2] for word in arguments]))
        return load_checkpoint.MEASURES[kind](*arguments)

    monkeypatch.setattr(load_checkpoint, "in_a_process", here)
    monkeypatch.setattr(sys, "argv", ["load_checkpoint", "--model_config", str(TINY), "--folder", str(tmp_path)])
    load_checkpoint.main()
    assert [kind for kind, _ in done] == ["load", "load", "convert"] + ["load", "convert"] * 2 + ["load", "load"]
    assert done[1][1] == ["tiny.yaml", "base.safetensors", "bf16"]
    assert done[6][1] == ["folder", "half.safetensors", "fp16"]
    printed = capsys.readouterr().out
    assert "tiny.yaml: 0.01 GB of weights in fp32" in printed
    for row in (
        "load half.safetensors for bf16",
        "load base.safetensors",
        "convert mindone.ckpt to folder",
        "convert folder to half.safetensors, fp16",
    ):
        assert f"| {row} | " in printed
    assert not list(tmp_path.iterdir())


def test_memory_that_is_taken_and_given_back_is_counted():
    # In a new process, because this one may free memory meanwhile, which would be subtracted.
    program = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import numpy as np
from tools.benchmark import load_checkpoint
def work():
    held = np.ones({TAKEN} // 8)
    time.sleep(0.3)  # memory is sampled every few milliseconds
    del held
print(load_checkpoint.measured(work)["RssAnon"])
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 0.8 * TAKEN < int(result.stdout) < 1.2 * TAKEN


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """The YAML of a model of 130 MB, much more than MindSpore itself takes, with a checkpoint beside it."""
    document = yaml.safe_load(TINY.read_text())
    params = document["model"]["params"]
    params["unet_config"]["params"]["model_channels"] = 160
    path = tmp_path_factory.mktemp("larger") / "base.yaml"
    path.write_text(yaml.safe_dump(document))
    load_checkpoint.write_random(str(path), path.with_suffix(".safetensors"))
    return path


def test_loading_takes_no_more_than_1_25_times_the_weights(larger):
    found = load_checkpoint.in_a_process("load", str(larger), str(larger.with_suffix(".safetensors")))
    assert found["weights"] > 100e6
    # The lower bound shows that memory was measured. Some weights use memory that the imports have freed.
    assert found["weights"] * 0.8 < found["RssAnon"] < found["weights"] * 1.25
    assert found["VmRSS"] < found["weights"] * 1.25


def test_loading_for_bf16_never_holds_all_weights_in_fp32(larger):
    found = load_checkpoint.in_a_process("load", str(larger), str(larger.with_suffix(".safetensors")), "bf16")
    assert found["RssAnon"] < found["weights"] * 0.85  # of the weights in fp32


def test_converting_takes_a_fraction_of_the_weights(larger):
    size = larger.with_suffix(".safetensors").stat().st_size
    found = load_checkpoint.in_a_process(
        "convert", str(larger.with_suffix(".safetensors")), str(larger.parent / "x.ckpt"), "fp16"
    )
    assert found["RssAnon"] < size / 4 and found["VmRSS"] < size / 2
