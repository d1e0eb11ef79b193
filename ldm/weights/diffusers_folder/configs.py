"""The config.json files of a diffusers folder: what they say about a model, and what is written for one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from ldm.errors import UserError, plain
from ldm.settings.model import NUM_GROUPS, PREDICTION_TYPES, ModelConfig, model_document, parse_model_config
from ldm.settings.model_yaml import MAX_SIDE, MAX_TIMESTEPS
from ldm.tokenizer import CONTEXT_LENGTH, END_TOKEN, START_TOKEN, VOCABULARY_SIZE
from ldm.tokenizer.tokenizer import END_TEXT
from ldm.weights.added_tokens import read_added_tokens
from ldm.weights.diffusers_folder.reader import DiffusersFolder

DIFFUSERS_VERSION = "0.42.1"  # whose settings these are
# The largest numbers that are read, beside those of a model YAML.
MAX_HEADS = 1024
MAX_GROUPS = 65_536

UNET, VAE, TEXT = "unet/config.json", "vae/config.json", "text_encoder/config.json"
SCHEDULER = "scheduler/scheduler_config.json"
# File -> setting -> values that the networks and samplers here support. The first is the default.
SUPPORTED: dict[str, dict[str, tuple[Any, ...]]] = {
    UNET: {
        "act_fn": ("silu", "swish"),
        "norm_eps": (1e-5,),
        "dual_cross_attention": (False,),
        "only_cross_attention": (False,),
        "class_embed_type": (None,),
        "addition_embed_type": (None,),
    },
    VAE: {"act_fn": ("silu", "swish"), "shift_factor": (None,)},
    SCHEDULER: {
        "beta_schedule": ("scaled_linear",),
        "trained_betas": (None,),
        "rescale_betas_zero_snr": (False,),
        "prediction_type": PREDICTION_TYPES,
    },
}


def read_model_config(
    folder: DiffusersFolder, sizes: Mapping[str, Mapping[str, Any]], prediction_type: str | None
) -> ModelConfig | None:
    """Read the configuration of a model from its diffusers folder.

    Args:
        folder: The folder.
        sizes: Arguments of the networks that follow from the shapes, under "unet", "vae" and "text".
        prediction_type: A key of the scheduler's configuration that may have been given elsewhere.

    Returns:
        The configuration, or None if the config.json of a network is missing.

    Raises:
        UserError: The networks or samplers here do not support a setting.
    """
    unet, vae, text = (folder.config(component) for component in ("unet", "vae", "text_encoder"))
    if not (unet and vae and text):
        return None
    scheduler = folder.read_json(SCHEDULER)
    files = {UNET: unet, VAE: vae, TEXT: text, SCHEDULER: scheduler}

    def refuse(file: str, key: str, value: Any, wanted: str) -> NoReturn:
        raise UserError(f"{folder.path}: {key} in {file} is {plain(repr(value), 60)}{wanted}")

    def integer(file: str, key: str, default: int, most: int, least: int = 1) -> int:
        value = files[file].get(key, default)
        if type(value) is not int or not least <= value <= most:
            refuse(file, key, value, f"; it must be a whole number from {least} to {most:,}")
        return value

    for file, settings in SUPPORTED.items():
        for key, allowed in settings.items():
            value = files[file].get(key, allowed[0])
            if value not in allowed:
                refuse(file, key, value, f", which is not supported (only {' or '.join(map(str, allowed))})")

    channels = [sizes["unet"]["model_channels"] * mult for mult in sizes["unet"]["channel_mult"]]
    # For historical reasons diffusers' `attention_head_dim` is the number of heads.
    key = "attention_head_dim" if unet.get("num_attention_heads") is None else "num_attention_heads"
    heads = unet.get(key, 8)
    per_level = heads if isinstance(heads, list) else [heads] * len(channels)
    if len(per_level) != len(channels) or any(
        type(count) is not int or not 1 <= count <= MAX_HEADS for count in per_level
    ):
        wanted = f"a number from 1 to {MAX_HEADS:,}, or one for each of the {len(channels)} levels"
        refuse(UNET, key, heads, f"; it must be {wanted}")
    head_channels = {width // count for width, count in zip(channels, per_level)}
    if len(set(per_level)) == 1:
        attention = {"num_heads": per_level[0]}
    elif len(head_channels) == 1:
        attention = {"num_head_channels": head_channels.pop()}
    else:
        refuse(UNET, key, heads, "; all levels must have the same number of heads, or of channels per head")
    vae_factor = 2 ** (len(sizes["vae"]["ch_mult"]) - 1)
    unet = files[UNET] = {**unet, "sample_size": unet.get("sample_size") or 64}
    if isinstance(unet["sample_size"], list):
        unet["sample_size"] = unet["sample_size"][0]
    config = ModelConfig(
        path=str(folder.path),
        architecture="custom",
        prediction_type=prediction_type or "epsilon",
        linear_start=scheduler.get("beta_start", 0.00085),
        linear_end=scheduler.get("beta_end", 0.012),
        timesteps=integer(SCHEDULER, "num_train_timesteps", 1000, MAX_TIMESTEPS, least=2),
        beta_schedule="scaled_linear",
        scale_factor=vae.get("scaling_factor", 0.18215),
        image_size=integer(UNET, "sample_size", 64, MAX_SIDE // vae_factor) * vae_factor,
        latent_channels=sizes["vae"]["embed_dim"],
        vae_factor=vae_factor,
        context_dim=sizes["unet"]["context_dim"],
        pad_token=_pad_token(folder, text),
        unet={**sizes["unet"], "num_groups": integer(UNET, "norm_num_groups", NUM_GROUPS, MAX_GROUPS), **attention},
        vae={**sizes["vae"], "double_z": True, "num_groups": integer(VAE, "norm_num_groups", NUM_GROUPS, MAX_GROUPS)},
        text={
            **sizes["text"],
            "vocab_size": VOCABULARY_SIZE,
            "num_heads": integer(TEXT, "num_attention_heads", 8, MAX_HEADS),
            "activation": text.get("hidden_act", "quick_gelu"),
        },
    )
    document = model_document(config)
    del document["model"]["architecture"]  # parse_model_config then derives it from the sizes
    return parse_model_config(document, folder.path)


def _pad_token(folder: DiffusersFolder, text: Mapping[str, Any]) -> str:
    """Return "zero" if the tokenizer pads with token 0 ("!"), as SD2's does, else "end".

    Without a tokenizer the activation of the text encoder decides: OpenCLIP's is gelu. Raises UserError if the
    tokenizer pads with an added token.
    """
    added = {token.text for token in read_added_tokens(folder)}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        token = folder.read_json(f"tokenizer/{file}").get("pad_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            if token in added:
                raise UserError(
                    f"{folder.path}: pad_token in tokenizer/{file} is {plain(token, 60)}, an added token; "
                    f"only {END_TEXT} and ! are supported"
                )
            return "zero" if token == "!" else "end"
    return "zero" if text.get("hidden_act") == "gelu" else "end"


def unet_config(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of UNet2DConditionModel."""
    unet = config.unet
    channels = [unet["model_channels"] * mult for mult in unet["channel_mult"]]
    attends = [2**level in unet["attention_resolutions"] for level in range(len(channels))]
    head_channels = unet.get("num_head_channels", -1)
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "act_fn": "silu",
        # In spite of its name this is the number of heads.
        "attention_head_dim": [c // head_channels for c in channels] if head_channels > 0 else unet["num_heads"],
        "block_out_channels": channels,
        "center_input_sample": False,
        "cross_attention_dim": unet["context_dim"],
        "down_block_types": ["CrossAttnDownBlock2D" if here else "DownBlock2D" for here in attends],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": unet["in_channels"],
        "layers_per_block": unet["num_res_blocks"],
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": unet.get("num_groups", NUM_GROUPS),
        "out_channels": unet["out_channels"],
        "sample_size": config.image_size // config.vae_factor,
        "transformer_layers_per_block": unet.get("transformer_depth", 1),
        "up_block_types": ["CrossAttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attends)],
        "use_linear_projection": unet.get("use_linear_in_transformer", False),
    }


def vae_config(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of AutoencoderKL."""
    vae = config.vae
    channels = [vae["ch"] * mult for mult in vae["ch_mult"]]
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": DIFFUSERS_VERSION,
        "act_fn": "silu",
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "in_channels": vae["in_channels"],
        "latent_channels": vae["embed_dim"],
        "layers_per_block": vae["num_res_blocks"],
        "norm_num_groups": vae.get("num_groups", NUM_GROUPS),
        "out_channels": vae["out_ch"],
        "sample_size": config.image_size,
        "scaling_factor": config.scale_factor,
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
    }


def text_config(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of CLIPTextModel. For SD2 it has the 23 layers that are used."""
    text = config.text
    return {
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": START_TOKEN,
        "eos_token_id": END_TOKEN,
        "hidden_act": text["activation"],
        "hidden_size": text["width"],
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 4 * text["width"],
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": text.get("length", CONTEXT_LENGTH),
        "model_type": "clip_text_model",
        "num_attention_heads": text["num_heads"],
        "num_hidden_layers": text["num_layers"],
        "pad_token_id": 1,
        "projection_dim": text["width"],
        "vocab_size": text.get("vocab_size", VOCABULARY_SIZE),
    }


def scheduler_config(config: ModelConfig) -> dict[str, Any]:
    """Return the scheduler_config.json of the default sampler.

    It has the settings that diffusers' other schedulers need when they are made from it. Without `clip_sample` DDIM
    would clip its predictions.
    """
    return {
        "_class_name": "DPMSolverMultistepScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        "algorithm_type": "dpmsolver++",
        "beta_end": config.linear_end,
        "beta_schedule": config.beta_schedule,
        "beta_start": config.linear_start,
        "clip_sample": False,
        "num_train_timesteps": config.timesteps,
        "prediction_type": config.prediction_type,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "solver_order": 2,
        "solver_type": "midpoint",
        "steps_offset": 1,
        "timestep_spacing": "linspace",
        "trained_betas": None,
    }
