"""What is not a LoRA that can be read is called by its name."""

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.lora.formats import read_lora
from ldm.weights.read import write_checkpoint

UNET = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q"
THEIRS = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
UNDERSCORED = THEIRS.replace(".", "_")

OTHERS = {
    "kohya": (["lora_unet_X.lora_down.weight", "lora_unet_X.lora_up.weight", "lora_unet_X.alpha"], "kohya"),
    "kohya's text encoder": (["lora_te_X.lora_down.weight", "lora_te_X.lora_up.weight"], "kohya"),
    "diffusers, oldest": ([f"{THEIRS}.processor.to_q_lora.{half}.weight" for half in ("down", "up")], "diffusers"),
    "diffusers, middle": ([f"text_encoder.layers.0.q_proj.lora_linear_layer.{half}.weight" for half in ("down", "up")],
                          "diffusers"),
    "diffusers, newer": ([f"unet.{THEIRS}.to_q.lora.{half}.weight" for half in ("down", "up")], "diffusers"),
    "diffusers, newest": ([f"unet.{THEIRS}.to_q.lora_{half}.weight" for half in "AB"], "diffusers"),
    "PEFT": ([f"base_model.model.{THEIRS}.to_q.lora_{half}.weight" for half in "AB"], "PEFT"),
    "cloneofsimo": (["unet:0:up", "unet:0:down", "text_encoder:0:up", "text_encoder:0:down"], "cloneofsimo"),
    "cloneofsimo with a token": (["unet:0:up", "unet:0:down", "<s1>", "<s2>"], "cloneofsimo"),
    "LoHa": ([f"lora_unet_X.hada_w{i}_{half}" for i in (1, 2) for half in "ab"], "LyCORIS"),
    "LoKr": (["lora_unet_X.lokr_w1", "lora_unet_X.lokr_w2", "lora_unet_X.alpha"], "LyCORIS"),
    "textual inversion": (["emb_params"], "textual-inversion"),
    "textual inversion of diffusers": (["<cat-toy>"], "textual-inversion"),
    "SDXL base": (["conditioner.embedders.0.x", f"{UNET}.weight"], "SDXL base"),
    "base": ([f"{UNET}.weight", "first_stage_model.quant_conv.bias"], "base weights"),
    "mindone base": (["cond_stage_model.transformer.ln_final.gamma"], "base weights"),
    "diffusers UNet": ([f"{THEIRS}.to_q.weight"], "base weights"),
    "transformers text encoder": (["text_model.encoder.layers.0.self_attn.q_proj.weight"], "base weights"),
    "half a LoRA": ([f"{UNET}.lora_up.weight"], "half a LoRA"),
    "something else": (["fc1.weight", "fc1.bias"], "2 unknown names"),
    "nothing": ([], "without any arrays"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_checkpoints(tmp_path, kind):
    names, pattern = OTHERS[kind]
    path = tmp_path / "lora.safetensors"
    write_checkpoint(path, {name.replace("X", UNDERSCORED): np.zeros((2, 2), np.float32) for name in names})
    with pytest.raises(UserError, match=pattern) as caught:
        read_lora(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content, pattern",
    [
        (b"", "empty file"),
        (b"<!doctype html><html></html>", "HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs"),
        (b"\x80\x02}q\x00.", "pickle"),
        (b"PK\x03\x04" + b"archive/data.pkl", "PyTorch file"),
        (b"\x89PNG\r\n\x1a\n", "PNG"),
    ],
)
def test_files_that_are_no_checkpoints(tmp_path, content, pattern):
    path = tmp_path / "lora.ckpt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=pattern):
        read_lora(path)


def test_a_folder_and_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        read_lora(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        read_lora(tmp_path / "lora.ckpt")
