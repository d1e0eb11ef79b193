"""tools/lora/verify.py on a LoRA that a training wrote: what matches, what does not, and mistakes."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.lora.formats import read_lora, write_lora
from ldm.lora.lora import LoRA
from ldm.lora.products import LoKr
from ldm.lora.updates import DoRA, LoRALayer
from ldm.settings.model import load_model_config
from ldm.training import repeat, verification
from ldm.weights.checkpoint import read_checkpoint, write_checkpoint
from tests.training.micro import MICRO
from tools.lora.verify import main

CONFIG = load_model_config(MICRO)


@pytest.fixture
def lora(shared_run) -> Path:
    return shared_run / "ckpt" / "style.safetensors"


@pytest.fixture
def flags(shared_run, captioned_data, micro_base_model) -> dict[str, str]:
    config = str(shared_run / "train_args.yaml")
    return {"--data": str(captioned_data), "--base": str(micro_base_model), "--train_config": config}


def words(flags: dict[str, str]) -> list[str]:
    return [word for flag in flags.items() for word in flag]


def results(out: str) -> dict[str, str]:
    """Return what is compared -> result."""
    return {line[:9].strip(): line[11:22].strip() for line in out.splitlines()}


def changed(path: Path, target: Path, **texts: str) -> Path:
    """Write a file with other texts in its metadata."""
    arrays, metadata = read_checkpoint(path)
    write_checkpoint(target, arrays, {**metadata, **{f"passport.{name}": text for name, text in texts.items()}})
    return target


def test_all_that_is_given_matches_and_the_rest_is_named(lora, flags, capsys):
    assert main([str(lora), *words(flags)]) == 0
    out = capsys.readouterr().out
    assert results(out) == dict.fromkeys(("file", "base", "data", "settings", "code", "libraries"), "match")
    assert main([str(lora)]) == 0
    out = capsys.readouterr().out
    assert [name for name, result in results(out).items() if result == "not checked"] == ["base", "data", "settings"]
    assert all(f"give {flag}" in out for flag in flags)


def test_the_last_steps_are_repeated_bit_for_bit(lora, flags, shared_run, capsys, graph_mode):
    """Also of a copy in fp16."""
    half = shared_run / "half.safetensors"
    write_lora(half, read_lora(lora, CONFIG), "kohya", CONFIG, "fp16")
    found = []
    original = verification.repeat_steps

    def once(*given):
        if not found:
            found.append(original(*given))
        return found[0]

    verification.repeat_steps = once
    try:
        for file in (lora, half):
            assert main([str(file), *words(flags), "--repeat", "2", "--state", str(shared_run)]) == 0
            out = capsys.readouterr().out
            assert results(out)["repeat"] == "match" and "steps 4 to 6, from state-00000003.safetensors" in out
    finally:
        verification.repeat_steps = original
        half.unlink()


def test_factors_that_come_out_otherwise_are_a_mismatch(lora, flags, shared_run, capsys, monkeypatch):
    other = read_lora(lora, CONFIG)
    layer = next(iter(other.layers.values()))
    layer.up[0, 0] = np.nextafter(layer.up[0, 0], np.float32(9))
    monkeypatch.setattr(verification, "repeat_steps", lambda *given: (other, CONFIG))
    assert main([str(lora), *words(flags), "--repeat", "3", "--state", str(shared_run / "ckpt")]) == 1
    out = capsys.readouterr().out
    assert results(out)["repeat"] == "MISMATCH" and f"1 of {len(other.layers)} layers and tokens differ, by" in out


@pytest.mark.parametrize("what", ["data", "base", "settings", "code", "libraries", "file"])
def test_one_thing_that_differs_is_named_and_no_other(lora, flags, tmp_path, capsys, what):
    file = lora
    if what == "data":
        shutil.copytree(flags["--data"], tmp_path / "data")
        (tmp_path / "data" / "1.txt").write_text("Blue, a circle, number 1")
        flags["--data"] = str(tmp_path / "data")
    elif what == "base":
        arrays, metadata = read_checkpoint(flags["--base"])
        name = next(iter(arrays))
        write_checkpoint(tmp_path / "base.safetensors", {**arrays, name: arrays[name] + 1}, metadata)
        flags["--base"] = str(tmp_path / "base.safetensors")
    elif what == "settings":
        text = Path(flags["--train_config"]).read_text().replace("lora_rank: 2", "lora_rank: 3")
        (tmp_path / "a.yaml").write_text(text.replace("seed: 42", "seed: 7"))
        flags["--train_config"] = str(tmp_path / "a.yaml")
    elif what == "code":
        file = changed(lora, tmp_path / "a.safetensors", code='{"version":"0.0.9","sources":"00"}')
    elif what == "libraries":
        file = changed(lora, tmp_path / "a.safetensors", libraries='{"Python":"3.9.1"}')
    else:
        arrays, metadata = read_checkpoint(lora)
        name = next(name for name in arrays if name.endswith("lora_up.weight"))
        write_checkpoint(tmp_path / "a.safetensors", {**arrays, name: arrays[name] + 1}, metadata)
        file = tmp_path / "a.safetensors"
    assert main([str(file), *words(flags)]) == 1
    out = capsys.readouterr().out
    assert [name for name, result in results(out).items() if result == "MISMATCH"] == [what], out
    if what == "settings":
        assert "2 of" in out and "differ: lora_rank, seed" in out
    if what == "code":
        assert "trained by 0.0.9" in out


def test_the_oldest_state_is_taken_where_the_wanted_one_is_not_kept(shared_run):
    folder = shared_run / "ckpt"
    assert repeat.find_state(shared_run, 6, 3) == (folder / "state-00000003.safetensors", 3)
    assert repeat.find_state(folder, 7, 1) == (folder / "state-00000006.safetensors", 6)
    assert repeat.find_state(folder, 7, 6) == (folder / "state-00000003.safetensors", 3)
    assert repeat.find_state(folder / "state-00000003.safetensors", 6, 1)[1] == 3
    with pytest.raises(UserError, match="no training state before step 3"):
        repeat.find_state(folder, 3, 1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["nowhere.safetensors"], "nowhere.safetensors does not exist"),
        ([], "lora is missing"),
        (["{lora}", "{lora}"], "lora: "),
        (["{ckpt}"], "says nothing of what it was trained from"),
        (["{lora}", "--data", "nowhere"], "--data nowhere does not exist"),
        (["{lora}", "--base", "nowhere"], "--base nowhere does not exist"),
        (["{lora}", "--train_config", "nowhere.yaml"], "nowhere.yaml"),
        (["{lora}", "--repeat", "3"], "--repeat and --state go together"),
        (["{lora}", "--state", "{folder}"], "--repeat and --state go together"),
        (["{lora}", "--repeat", "0", "--state", "{folder}"], "repeat: 0 is not allowed"),
        (["{lora}", "--repeat", "1", "--state", "{folder}"], "--repeat needs --data"),
        (["{lora}", "--repeat", "1", "--state", "nowhere"], "--state nowhere does not exist"),
        (["{first}", "--repeat", "1", "--state", "{folder}", "{flags}"], "no training state before step 3"),
    ],
)
def test_mistakes_are_one_line(lora, flags, change, says):
    places = {"lora": lora, "folder": lora.parent, "ckpt": lora.with_name("lora.ckpt"),
              "first": lora.with_name("style-step00000003.safetensors")}  # fmt: skip
    argv = [word.format(**places) for word in change if word != "{flags}"]
    with pytest.raises(UserError, match=says) as caught:
        main([*argv, *(words(flags) if "{flags}" in change else ())])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (dict(version="2"), "passport of version 2"),
        (dict(code="[]"), "passport.code is no dictionary of texts"),
        (dict(libraries='{"a": {}}'), "passport.libraries is no dictionary of texts"),
        (dict(settings="{"), "passport.settings"),
    ],
)
def test_a_damaged_passport_is_named(lora, flags, tmp_path, texts, says):
    with pytest.raises(UserError, match=says):
        main([str(changed(lora, tmp_path / "a.safetensors", **texts)), *words(flags)])


def test_how_two_loras_of_any_kind_differ_is_said():
    pair = LoRALayer(np.ones((2, 4), np.float32), np.ones((4, 2), np.float32), 2.0)
    whole = LoKr({"lokr_w1": np.ones((2, 2), np.float32), "lokr_w2": np.ones((2, 2), np.float32)}, 1.0)
    changed = LoKr({**whole.factors, "lokr_w1": whole.factors["lokr_w1"] + 0.5}, 1.0)
    tokens = {"cat": np.zeros((1, 4), np.float32)}
    lora = LoRA({"a": DoRA(pair, np.ones(4, np.float32)), "b": whole}, {}, tokens)
    assert verification._difference(lora, lora) == "0 of 3 layers and tokens differ, by 0 at most"
    other = LoRA({**lora.layers, "b": changed}, {}, {"cat": tokens["cat"] - 2})
    assert verification._difference(lora, other) == "2 of 3 layers and tokens differ, by 2 at most"
    assert "kind of b is another" in verification._difference(lora, LoRA({**lora.layers, "b": pair}, {}, tokens))
    assert verification._difference(lora, LoRA(lora.layers)) == "its layers are others"
