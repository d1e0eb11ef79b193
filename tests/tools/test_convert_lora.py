"""tools/lora/convert_lora.py as it is run: the table, every format, and mistakes in one line with exit code 2."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.lora.formats import FORMATS, detect_format, read_lora, write_lora
from ldm.lora.formats.modules import known_bases
from ldm.lora.lora import LoRA
from ldm.lora.products import LoKr
from tests.lora.formats.files import assert_same_updates, random_lora
from tools.lora.convert_lora import main

ROOT = Path(__file__).parents[2]
SD1, SD2, NANO = known_bases()


@pytest.fixture
def source(tmp_path):
    """A LoRA on the attention of the nano model, both networks."""
    layers = {
        **random_lora(NANO, rank=2, alpha=1.0, only="to_q").layers,
        **random_lora(NANO, rank=3, only="q_proj").layers,
    }
    write_lora(tmp_path / "source.ckpt", LoRA(layers, {"architecture": "nano", "prediction_type": "v_prediction"}))
    return tmp_path / "source.ckpt"


def test_as_a_script_from_anywhere_with_names_of_any_bytes_on_a_strict_terminal(source, tmp_path):
    name = os.fsdecode(b"\xb7\xe7\xb8\xf1.ckpt")  # GBK, as archives from Chinese Windows have it
    source.rename(tmp_path / name)
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "lora" / "convert_lora.py", "--source", name, "--to", "kohya", "--target",
         "风格.safetensors"], cwd=tmp_path, capture_output=True, timeout=300,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(b"\\u98ce\\u683c.safetensors: kohya")
    assert detect_format(tmp_path / "风格.safetensors") == "kohya"


def test_looking_alone_prints_the_table(source, capsys):
    before = sorted(source.parent.iterdir())
    main(["--source", str(source)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("source.ckpt: mindone (this project's own, and mindone's)")
    assert "  architecture: nano" in lines and "  prediction_type: v_prediction" in lines
    rows = [line.split("  ") for line in lines]
    rows = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert ["UNet", "attention", "LoRA", "20", "2", "1", "20 of 20", "-"] in rows
    assert ["text encoder", "attention", "LoRA", "3", "3", "3", "3 of 3", "-"] in rows
    assert lines[-1] == "  made for the nano model, by the shapes"
    assert sorted(source.parent.iterdir()) == before


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "diffusers-oldest"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_format(source, tmp_path, capsys, name, dtype):
    target = tmp_path / ("out" + (FORMATS[name].suffixes or ("",))[-1])
    main(["--source", str(source), "--target", str(target), "--to", name, "--dtype", dtype])
    assert f"{target.name}: {name} (" in capsys.readouterr().out
    assert detect_format(target if target.exists() else tmp_path / "out.text_encoder.pt") == name
    assert_same_updates(read_lora(target), read_lora(source), rtol=1e-5 if dtype == "fp32" else 0.03)


def test_a_file_in_kohyas_form_keeps_what_the_source_says_of_its_training(source, tmp_path):
    lora = read_lora(source)
    lora.file_metadata = {"ss_seed": "7", "modelspec.author": "me", "passport.base": "0" * 64}
    write_lora(tmp_path / "source.safetensors", lora, "kohya")
    target = tmp_path / "out.safetensors"
    main(
        ["--source", str(tmp_path / "source.safetensors"), "--target", str(target), "--to", "kohya", "--dtype", "bf16"]
    )
    assert read_lora(target).file_metadata.items() >= lora.file_metadata.items()


def test_the_text_encoder_has_no_place_in_the_oldest(source, tmp_path):
    with pytest.raises(UserError, match="diffusers-oldest holds only the UNet's attention"):
        main(["--source", str(source), "--target", str(tmp_path / "x.safetensors"), "--to", "diffusers-oldest"])


def test_shapes_that_fit_two_bases(tmp_path, capsys):
    write_lora(tmp_path / "lora.safetensors", random_lora(SD1, rank=1, only="attn1.to_q"), "kohya")
    main(["--source", str(tmp_path / "lora.safetensors")])
    assert "made for SD1.x or SD2.x, by the shapes" in capsys.readouterr().out


def test_zero_layers_are_counted(tmp_path, capsys):
    lora = random_lora(NANO, rank=1, only="to_q")
    for layer in list(lora.layers.values())[:5]:
        layer.up[:] = 0
    write_lora(tmp_path / "lora.ckpt", lora)
    main(["--source", str(tmp_path / "lora.ckpt")])
    assert re.search("20 of 20 +5", capsys.readouterr().out)


@pytest.mark.parametrize(
    "flags, pattern",
    [
        (["--target", "x.ckpt"], "go together"),
        (["--to", "kohya"], "go together"),
        (["--to", "kohya", "--target", "x.ckpt", "--source", "nothing.ckpt"], "kohya is written as .safetensors"),
        (["--to", "mindone", "--target", "SOURCE"], "exists: choose another name, or remove it first"),
        (["--base", str(ROOT / "configs" / "v1-inference.yaml")], "its architecture is nano, that of .* is sd1"),
        (["--base", "nothing.yaml"], "nothing.yaml"),
        (["--source", "nothing.ckpt"], "nothing.ckpt does not exist"),
    ],
)
def test_mistakes(source, tmp_path, monkeypatch, flags, pattern):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=pattern):
        main(["--source", str(source), *(flag.replace("SOURCE", str(source)) for flag in flags)])


def test_a_lora_of_another_base_is_named(tmp_path):
    write_lora(tmp_path / "lora.safetensors", random_lora(SD1, rank=1, only="0.attn2.to_k"), "kohya")
    with pytest.raises(UserError, match="does not fit SD2.x: .*attn2.to_k is .320, 768., there it is .320, 1024."):
        main(["--source", str(tmp_path / "lora.safetensors"), "--base", str(ROOT / "configs" / "v2-inference.yaml")])


def test_a_flag_that_is_not_there_names_the_nearest():
    with pytest.raises(UserError, match="unknown setting --tarket: did you mean --target"):
        main(["--source", "x", "--tarket", "y"])


def test_other_kinds_are_baked_on_request_alone(tmp_path, capsys):
    layer = LoKr({"lokr_w1": np.eye(2, dtype=np.float32), "lokr_w2": np.ones((32, 48), np.float32)}, 1.0)
    name = next(module.name for module in known_bases()[2].modules if module.shape == (64, 96))
    write_lora(tmp_path / "lokr.ckpt", LoRA({name: layer}))
    arguments = ["--source", str(tmp_path / "lokr.ckpt"), "--target", str(tmp_path / "out.safetensors"), "--to"]
    with pytest.raises(UserError, match="holds more than pairs .*1 LoKr.*--bake_energy"):
        main([*arguments, "diffusers"])
    assert not (tmp_path / "out.safetensors").exists()
    main([*arguments, "diffusers", "--bake_energy", "1"])
    printed = capsys.readouterr().out
    assert "LoKr" in printed and "energy kept: 100.0000%" in printed
    (baked,) = read_lora(tmp_path / "out.safetensors").layers.values()
    assert baked.rank == 2
    np.testing.assert_allclose(baked.update(), layer.delta(), atol=1e-5)
