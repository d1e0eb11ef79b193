"""The settings in a folder written here are those of the published folders, key by key."""

from __future__ import annotations

import pytest

from ldm.files.paths import ROOT
from ldm.settings.model import load_model_config
from ldm.weights.diffusers_folder.configs import scheduler_config, text_config, unet_config, vae_config

SD1 = {
    "unet": {
        "act_fn": "silu", "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 768, "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2,
        "mid_block_scale_factor": 1, "norm_eps": 1e-5, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3, "use_linear_projection": False,
    },
    "vae": {
        "act_fn": "silu", "block_out_channels": [128, 256, 512, 512], "in_channels": 3, "latent_channels": 4,
        "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3, "scaling_factor": 0.18215,
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
    "text": {
        "hidden_act": "quick_gelu", "hidden_size": 768, "intermediate_size": 3072, "layer_norm_eps": 1e-5,
        "max_position_embeddings": 77, "num_attention_heads": 12, "num_hidden_layers": 12, "vocab_size": 49408,
        "bos_token_id": 49406, "eos_token_id": 49407,
    },
    "scheduler": {
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
        "num_train_timesteps": 1000, "prediction_type": "epsilon", "set_alpha_to_one": False, "skip_prk_steps": True,
        "steps_offset": 1, "trained_betas": None,
    },
}  # fmt: skip
SD2 = {
    "unet": {**SD1["unet"], "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024,
             "use_linear_projection": True},
    "vae": SD1["vae"],
    "text": {**SD1["text"], "hidden_act": "gelu", "hidden_size": 1024, "intermediate_size": 4096,
             "num_attention_heads": 16, "num_hidden_layers": 23},
    "scheduler": SD1["scheduler"],
}  # fmt: skip
SD2_V = {**SD2, "unet": {**SD2["unet"], "sample_size": 96},
         "scheduler": {**SD2["scheduler"], "prediction_type": "v_prediction"}}  # fmt: skip
MODELS = {"v1-inference": SD1, "v2-inference": SD2, "v2-vpred-inference": SD2_V}
WRITTEN = {"unet": unet_config, "vae": vae_config, "text": text_config, "scheduler": scheduler_config}


@pytest.mark.parametrize("part", WRITTEN)
@pytest.mark.parametrize("path, published", MODELS.items(), ids=MODELS)
def test_settings_are_the_published_ones(path, published, part):
    written = WRITTEN[part](load_model_config(ROOT / "configs" / f"{path}.yaml"))
    assert {key: written[key] for key in published[part]} == published[part]
