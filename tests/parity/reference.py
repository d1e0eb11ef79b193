"""diffusers' UNet2DConditionModel and AutoencoderKL and transformers' CLIPTextModel, built from this project's model
configuration and filled with the same weights. For the environment that has torch (`make test-parity`)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.settings.model import ModelConfig
from tests.weight_names import to_diffusers


class Reference:
    """The three networks of `config` in PyTorch, with the arrays of `weights` (canonical names; complete)."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, np.ndarray], text_layers_unused: int = 0):
        unet, vae, text = to_diffusers(weights, config)
        with torch.device("meta"):  # no weights are drawn that are replaced at once
            self.unet = reference_unet(config) if unet else None
            self.vae = reference_vae(config) if vae else None
        self.text = reference_text_encoder(config, text_layers_unused) if text else None
        self.text_layers_unused = text_layers_unused
        for network, arrays in ((self.unet, unet), (self.vae, vae)):
            if network is not None:
                network.load_state_dict(_tensors(arrays), strict=True, assign=True)
                network.eval()
        if self.text is not None:
            self._load_text(text, config.text["num_layers"])

    def _load_text(self, text: Mapping[str, np.ndarray], layers_used: int) -> None:
        # transformers 5 has no `text_model.` in front of the names any more.
        if not any(name.startswith("text_model.") for name, _ in self.text.named_parameters()):
            text = {name[len("text_model.") :]: array for name, array in text.items()}
        missing, unexpected = self.text.load_state_dict(_tensors(text), strict=False)
        may_miss = ["position_ids"] + [f"layers.{layers_used + i}." for i in range(self.text_layers_unused)]
        missing = [name for name in missing if not any(part in name for part in may_miss)]
        assert not missing and not unexpected, (missing, unexpected)
        self.text.eval()

    def run(self, network: str, given: Mapping[str, np.ndarray]) -> np.ndarray:
        """The counterpart of tests.network_cases.run_network."""
        if network == "unet":
            return self.denoise(given["latents"], given["timesteps"], given["context"])
        if network == "text":
            return self.text_states(given["tokens"])
        return self.encode(given["images"]) if network == "encode" else self.decode(given["vae_latents"])

    @torch.no_grad()
    def denoise(self, latents: np.ndarray, timesteps: np.ndarray, context: np.ndarray) -> np.ndarray:
        return self.unet(
            torch.from_numpy(latents), torch.from_numpy(timesteps), encoder_hidden_states=torch.from_numpy(context)
        ).sample.numpy()

    @torch.no_grad()
    def encode(self, images: np.ndarray) -> np.ndarray:
        """Mean and log variance as they leave quant_conv: diffusers' distribution clamps the log variance later."""
        vae = self.vae
        return vae.quant_conv(vae.encoder(torch.from_numpy(images))).numpy()

    @torch.no_grad()
    def decode(self, latents: np.ndarray) -> np.ndarray:
        return self.vae.decode(torch.from_numpy(latents)).sample.numpy()

    @torch.no_grad()
    def text_states(self, tokens: np.ndarray) -> np.ndarray:
        """States of the last layer that is used, after the final LayerNorm."""
        tokens = torch.from_numpy(tokens.astype(np.int64))
        if not self.text_layers_unused:
            return self.text(tokens).last_hidden_state.numpy()
        states = self.text(tokens, output_hidden_states=True).hidden_states[-1 - self.text_layers_unused]
        return getattr(self.text, "text_model", self.text).final_layer_norm(states).numpy()


def reference_unet(config: ModelConfig) -> UNet2DConditionModel:
    unet = config.unet
    channels = [unet["model_channels"] * mult for mult in unet["channel_mult"]]
    attends = [2**level in unet["attention_resolutions"] for level in range(len(channels))]
    head_dim = unet.get("num_head_channels", -1)
    # diffusers' `attention_head_dim` counts heads, for historical reasons.
    heads = [c // head_dim for c in channels] if head_dim > 0 else unet["num_heads"]
    return UNet2DConditionModel(
        sample_size=config.image_size // config.vae_factor,
        in_channels=unet["in_channels"],
        out_channels=unet["out_channels"],
        down_block_types=["CrossAttnDownBlock2D" if here else "DownBlock2D" for here in attends],
        up_block_types=["CrossAttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attends)],
        block_out_channels=channels,
        layers_per_block=unet["num_res_blocks"],
        cross_attention_dim=unet["context_dim"],
        attention_head_dim=heads,
        use_linear_projection=unet.get("use_linear_in_transformer", False),
        transformer_layers_per_block=unet.get("transformer_depth", 1),
        norm_num_groups=unet.get("num_groups", 32),
    )


def reference_vae(config: ModelConfig) -> AutoencoderKL:
    vae = config.vae
    channels = [vae["ch"] * mult for mult in vae["ch_mult"]]
    return AutoencoderKL(
        in_channels=vae["in_channels"],
        out_channels=vae["out_ch"],
        down_block_types=["DownEncoderBlock2D"] * len(channels),
        up_block_types=["UpDecoderBlock2D"] * len(channels),
        block_out_channels=channels,
        layers_per_block=vae["num_res_blocks"],
        latent_channels=vae["embed_dim"],
        norm_num_groups=vae.get("num_groups", 32),
    )


def reference_text_encoder(config: ModelConfig, layers_unused: int = 0) -> CLIPTextModel:
    text = config.text
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=text.get("vocab_size", 49408),
            hidden_size=text["width"],
            intermediate_size=4 * text["width"],
            num_hidden_layers=text["num_layers"] + layers_unused,
            num_attention_heads=text["num_heads"],
            max_position_embeddings=text.get("length", 77),
            hidden_act=text["activation"],
        )
    )


def _tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
