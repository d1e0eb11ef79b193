"""What a checkpoint, a LoRA or a folder holds is recognised by its names, and errors give the way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldm.errors import UserError
from ldm.weights.arrays import Checkpoint
from ldm.weights.recognise import (
    check_base_model,
    describe_non_lora,
    other_task,
    recognise,
    sdxl_lora,
    unsupported_folder,
    unsupported_lora,
    version_of_width,
)

TO_K = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k"


class Keys(Checkpoint):
    """A checkpoint that has only keys and metadata."""

    def __init__(self, *keys, metadata=None):
        self.path, self.format, self.metadata = Path("some.safetensors"), "safetensors", metadata or {}
        self.keys_in_order = keys

    def spec(self, name):
        raise AssertionError("recognising reads no shape")

    __getitem__ = spec

    def __iter__(self):
        return iter(self.keys_in_order)

    def __len__(self):
        return len(self.keys_in_order)


def base_model_error(*keys):
    with pytest.raises(UserError) as caught:
        check_base_model(Keys(*keys))
    assert str(caught.value).startswith("some.safetensors is ") and "\n" not in str(caught.value)
    return str(caught.value)


class TestBaseModels:
    @pytest.mark.parametrize(
        "keys",
        [
            [f"{TO_K}.weight"],
            ["first_stage_model.quant_conv.bias", "cond_stage_model.transformer.ln_final.gamma"],
            ["unet/conv_in.weight", "vae/quant_conv.weight"],
            [f"{TO_K}.weight", "model_ema.decay", "optimizer.state.0", "refiner.step"],
        ],
    )
    def test_are_recognised_in_every_family_of_names(self, keys):
        assert recognise(Keys(*keys)).kind == "base model"
        check_base_model(Keys(*keys))
        assert "base weights, not a LoRA: give it as --ckpt_path" in describe_non_lora(Keys(*keys))

    @pytest.mark.parametrize(
        "key, name, prefix",
        [
            ("down_blocks.0.resnets.0.conv1.weight", "the UNet of a diffusers folder", "unet/"),
            ("encoder.down_blocks.0.resnets.0.conv1.weight", "the VAE of a diffusers folder", "vae/"),
            ("text_model.encoder.layers.0.layer_norm1.bias", "the text encoder of a diffusers folder", "text_encoder/"),
            ("embeddings.token_embedding.weight", "the text encoder of a diffusers folder", "text_encoder/"),
            ("encoder.down.0.block.0.conv1.bias", "the VAE of a single file", "first_stage_model."),
            ("input_blocks.0.0.weight", "the UNet of a single file", "model.diffusion_model."),
        ],
    )
    def test_a_component_alone(self, key, name, prefix):
        content = recognise(Keys(key, "other"))
        assert content.kind == "component" and content.prefix == prefix
        assert f"is {name} alone, not a whole model: give the folder or the file" in base_model_error(key, "other")

    @pytest.mark.parametrize(
        "keys, name",
        [
            (["model.diffusion_model.joint_blocks.0.x.weight"], "a Stable Diffusion 3"),
            (["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"], "a Flux"),
            (["double_blocks.0.img_attn.qkv.weight"], "a Flux"),
            (["model.diffusion_model.label_emb.0.0.weight", "noise_augmentor.betas"], "an unCLIP"),
            (["model.diffusion_model.label_emb.weight", "low_scale_model.betas"], "an upscaler's"),
            (["control_model.input_blocks.0.0.weight"], "a ControlNet"),
            (["down_blocks.0.resnets.0.conv1.weight", "controlnet_cond_embedding.conv_in.bias"], "a ControlNet"),
            (["conditioner.embedders.0.x", f"{TO_K}.weight"], "an SDXL"),
            (["model.diffusion_model.label_emb.0.0.weight"], "an SDXL"),
            (["unet/conv_in.weight", "unet/add_embedding.linear_1.weight"], "an SDXL"),
        ],
    )
    def test_other_models(self, keys, name):
        assert f"is {name} checkpoint; only SD1.x and SD2.x are supported" in base_model_error(*keys)
        assert f"{name} checkpoint; only" in describe_non_lora(Keys(*keys))

    @pytest.mark.parametrize(
        "channels, name",
        [(5, "a depth-to-image"), (7, "an upscaling"), (8, "an InstructPix2Pix")],
    )
    def test_models_of_other_tasks(self, channels, name):
        assert other_task(channels, 4) == f"{name} checkpoint ({channels} input channels), which is not supported"
        assert other_task(4, 4) is None and other_task(9, 4) is None and other_task(channels, channels) is None

    def test_versions_by_the_width_of_their_text_embeddings(self):
        assert [version_of_width(width) for width in (768, 1024, 2048)] == ["SD1.x", "SD2.x", "SDXL"]
        assert "width 64" in version_of_width(64)


class TestOtherCheckpoints:
    @pytest.mark.parametrize(
        "keys", [["emb_params"], ["string_to_param.*"], ["<cat>"], ["<s1>", "<s2>"], ["clip_g", "clip_l"]]
    )
    def test_textual_inversion(self, keys):
        assert "textual-inversion embedding, neither a base model nor a LoRA" in base_model_error(*keys)
        assert "textual-inversion" in describe_non_lora(Keys(*keys))

    def test_unknown_names(self):
        assert "neither a Stable Diffusion checkpoint nor a LoRA: 2 unknown names (fc1.weight, fc1.bias" in (
            base_model_error("fc1.weight", "fc1.bias")
        )

    def test_no_arrays(self):
        assert "without any arrays" in base_model_error()


class TestLoRAs:
    @pytest.mark.parametrize(
        "keys",
        [
            [f"{TO_K}.lora_down.weight", f"{TO_K}.lora_up.weight"],
            ["lora_unet_a.lora_down.weight", "lora_unet_a.lora_up.weight", "lora_unet_a.alpha"],
            ["unet.down_blocks.0.attn1.to_q.lora_A.weight", "unet.down_blocks.0.attn1.to_q.lora_B.weight"],
            [f"down_blocks.0.attn1.processor.to_q_lora.{half}.weight" for half in ("down", "up")],
            [f"text_encoder.layers.0.q_proj.lora_linear_layer.{half}.weight" for half in ("down", "up")],
            ["unet:0:up", "unet:0:down", "<s1>"],
        ],
    )
    def test_are_recognised_in_every_format(self, keys):
        assert recognise(Keys(*keys)).kind == "LoRA"
        assert "is a LoRA, not a base model: give it as --lora_ckpt_path" in base_model_error(*keys)
        assert unsupported_lora(keys, {}) is None

    def test_a_base_model_with_a_lora_beside_its_weights(self):
        keys = [f"{TO_K}.weight", "first_stage_model.quant_conv.bias", f"{TO_K}.lora_down.weight"]
        assert "cvtckpt.py --mode merge" in base_model_error(*keys)

    @pytest.mark.parametrize(
        "key, words",
        [
            ("lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "an SDXL LoRA"),
            ("lora_unet_label_emb_0_0.lora_down.weight", "an SDXL LoRA"),
            ("lora_unet_a.oft_R.weight", "an OFT in another form"),
            ("lora_unet_a.boft_R", "an OFT in another form"),
            ("lora_unet_a.a1.weight", "GLoRA"),
            ("unet.a.lora_B.bias", "a LoRA with biases"),
            ("text_model.embeddings.token_embedding.lora_embedding_A", "embedding table"),
        ],
    )
    def test_unsupported_ones(self, key, words):
        assert words in unsupported_lora(["lora_unet_a.lora_down.weight", key], {})
        assert "support" in unsupported_lora([key], {})

    def test_sdxl_by_metadata(self):
        assert "an SDXL LoRA" in unsupported_lora(["a"], {"ss_base_model_version": "sdxl_base_v1-0"})
        assert unsupported_lora(["a"], {"ss_base_model_version": "sd_v1"}) is None

    def test_sdxl_by_layers_and_shapes(self):
        assert "an SDXL LoRA" in sdxl_lora({"down_blocks_2_attentions_0_transformer_blocks_7_attn1_to_q": ()})
        assert "an SDXL LoRA" in sdxl_lora({"down_blocks.1.attentions.0.attn2.to_k": (4, 2048)})
        assert sdxl_lora({"down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": (4, 768), "x": ()}) is None


@pytest.mark.parametrize(
    "entries, pipeline, name",
    [
        (["unet", "text_encoder_2"], "", "an SDXL folder (text_encoder_2/)"),
        (["unet"], "StableDiffusionXLPipeline", "an SDXL folder (StableDiffusionXLPipeline)"),
        (["transformer", "text_encoder_2"], "FluxPipeline", "a diffusion transformer's folder (FluxPipeline)"),
        (["unet"], "StableDiffusionXLInpaintPipeline", "an SDXL folder (StableDiffusionXLInpaintPipeline)"),
    ],
)
def test_unsupported_folders(entries, pipeline, name):
    assert unsupported_folder(entries, pipeline) == f"{name}; only SD1.x and SD2.x are supported"
    assert unsupported_folder(["unet", "vae"], "StableDiffusionPipeline") is None
    assert unsupported_folder(["unet", "vae"], "StableDiffusionInpaintPipeline") is None
