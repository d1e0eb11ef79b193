"""tools/lora/doctor.py: what a file is, the strength of its blocks, and its effect, shown with the nano model."""

import numpy as np
import pytest
from PIL import Image

from ldm.errors import UserError
from ldm.files.paths import ROOT
from ldm.lora.formats import FORMATS, read_lora, write_lora
from ldm.lora.formats.modules import known_bases
from ldm.lora.lora import LoRA
from ldm.lora.updates import DoRA, LoRALayer, weight_norms
from ldm.weights.checkpoint import read_checkpoint, write_checkpoint
from tests.lora.formats.files import random_lora
from tools.lora.diagnosis import effect
from tools.lora.diagnosis.facts import trigger_words
from tools.lora.diagnosis.update_norms import findings, norm_table, update_norms
from tools.lora.doctor import main

SD1, _, NANO = known_bases()
NANO_BASE = ROOT / "models" / "nano" / "nano.safetensors"


def scaled(lora, factor):
    layers = {
        name: LoRALayer(layer.down, layer.up * np.float32(factor), layer.alpha) for name, layer in lora.layers.items()
    }
    return LoRA(layers, dict(lora.metadata))


def test_the_page_of_a_file(tmp_path, capsys):
    lora = random_lora(SD1, rank=3, alpha=1.5, only="to_q")
    write_lora(tmp_path / "a.safetensors", lora, "kohya")
    arrays, metadata = read_checkpoint(tmp_path / "a.safetensors")
    metadata |= {
        "ss_tag_frequency": '{"5_zwx dog": {"zwx dog": 12, "grass": 3}, "reg": {"dog": 4}}', "ss_steps": "400",
        "ss_training_comment": "None", "ss_base_model_version": "sd_v1",
    }  # fmt: skip
    write_checkpoint(tmp_path / "b.safetensors", arrays, metadata)
    main([str(tmp_path / "b.safetensors")])
    page = capsys.readouterr().out
    for words in (
        "b.safetensors",
        "kohya",
        "float32",
        "SD1.x, by the shapes",
        "rank 3",
        "alpha 1.5",
        "zwx dog, dog, grass",
    ):
        assert words in page, words
    assert "steps: 400" in page and "comment" not in page
    assert "MID     2 layers" in page and "OUT11   2 layers" in page and "no layer is dead or exploding" in page
    assert "give --base" in page


@pytest.mark.parametrize("metadata, words", [
    ({"modelspec.trigger_phrase": " a zwx dog ", "ss_tag_frequency": '{"a": {"b": 1}}'}, ["a zwx dog"]),
    ({"ss_tag_frequency": '{"a": {"one": 1, "two": 2}, "b": {"one": 2}}'}, ["one", "two"]),
    ({"ss_tag_frequency": "{"}, []), ({"ss_tag_frequency": "[1]"}, []), ({"ss_tag_frequency": '{"a": {"b": []}}'}, []),
    ({"ss_tag_frequency": '{"a": {"b": Infinity}}'}, []),
    ({}, []),
])  # fmt: skip
def test_trigger_words(metadata, words):
    assert trigger_words(metadata) == words


def test_dead_and_exploding_layers_are_named():
    lora = scaled(random_lora(NANO, rank=2, only="to_q", component="unet"), 0.01)
    names = sorted(lora.layers)
    for name, factor in ((names[0], 0.0), (names[1], 1e6)):
        layer = lora.layers[name]
        lora.layers[name] = LoRALayer(layer.down, layer.up * np.float32(factor), layer.alpha)
    found = findings(lora, update_norms(lora))
    assert any(line.startswith("1 of the layers: dead") and names[0] in line for line in found)
    assert any(line.startswith("1 of the layers: exploding") and names[1] in line for line in found)


def test_the_norms_are_those_of_the_dense_updates():
    lora = random_lora(NANO, rank=2, alpha=1.0, only="proj_in")
    for name, strength in update_norms(lora).items():
        update = lora.updates()[name].delta()
        assert strength.update == pytest.approx(np.sqrt(np.sum(update.astype(np.float64) ** 2)), rel=1e-6)
    table = norm_table(update_norms(lora))
    assert (
        len(table) == len({line.split()[0] for line in table}) and sum(line.endswith("#" * 24) for line in table) == 1
    )


def test_the_type_in_the_file_is_named(tmp_path, capsys):
    write_lora(tmp_path / "a.safetensors", random_lora(SD1, rank=1, only="to_q"), "kohya", dtype="bf16")
    main([str(tmp_path / "a.safetensors")])
    assert "bfloat16" in capsys.readouterr().out


def test_kinds_that_need_the_base_model_say_so():
    weight = np.ones((64, 64), np.float32)
    name, pair = next(iter(random_lora(NANO, rank=1, only="attn1.to_q").layers.items()))
    pair = LoRALayer(pair.down[:, :64], pair.up[:64], 1.0)
    lora = LoRA({name: DoRA(pair, weight_norms(weight).reshape(-1))})
    assert not update_norms(lora)
    assert any("DoRA" in line and "--base" in line for line in findings(lora, {}))


def test_the_effect_is_shown(tmp_path, capsys, monkeypatch):
    """With the nano model, two steps: the LoRA changes the image, and the formats give the same one."""
    monkeypatch.setattr(effect, "FORMATS", {name: FORMATS[name] for name in ("kohya", "peft", "diffusers-oldest")})
    lora = scaled(random_lora(NANO, rank=2, only="proj_out", component="unet"), 0.05)
    write_lora(tmp_path / "a.ckpt", lora)
    main([str(tmp_path / "a.ckpt"), "--base", str(NANO_BASE), "--sampling_steps", "2", "--prompt", "a red apple",
          "--output_path", str(tmp_path / "out")])  # fmt: skip
    page = capsys.readouterr().out
    assert "of its weights" in page and 'drawing "a red apple" at strength 1, 2 steps' in page
    assert "has an effect      YES" in page
    assert "  kohya              largest difference 0 of 255" in page and "  peft               largest" in page
    assert "  diffusers-oldest   cannot hold it: diffusers-oldest holds only the UNet's attention" in page
    assert "works elsewhere    YES: 2 of 3 formats give the same image" in page
    images = [np.asarray(Image.open(tmp_path / "out" / f"{name}.png")) for name in ("without_it", "with_it", "kohya")]
    assert np.abs(images[0].astype(int) - images[1]).max() > 1 and np.abs(images[1].astype(int) - images[2]).max() <= 1
    assert Image.open(tmp_path / "out" / "grid.png").width > 700


def test_no_lora(tmp_path):
    write_checkpoint(tmp_path / "a.safetensors", {"fc1.weight": np.ones(3, np.float32)})
    with pytest.raises(UserError, match="a.safetensors is neither"):
        main([str(tmp_path / "a.safetensors")])
    with pytest.raises(UserError, match="missing.ckpt"):
        main([str(tmp_path / "missing.ckpt")])
    write_lora(tmp_path / "b.ckpt", random_lora(SD1, rank=1, only="to_q"))
    with pytest.raises(UserError, match="b.ckpt .*(was made for|does not fit|matches nothing)"):
        main([str(tmp_path / "b.ckpt"), "--base", str(NANO_BASE), "--output_path", str(tmp_path / "out")])
    assert read_lora(tmp_path / "b.ckpt").layers
