"""The architecture of a model, read from a YAML of the published Stable Diffusion form.

`target:` names are looked up in a closed table and never imported; a published YAML (CompVis's v1-inference.yaml,
Stability AI's v2-inference*.yaml) reads unchanged. Two keys are this project's own, both under `model:`:
`architecture` (a name that LoRA files carry; derived where it is absent) and `pad_token`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import UserError, plain
from ldm.files.documents import read_yaml
from ldm.settings.model_size import check_size
from ldm.settings.read import nearest

if TYPE_CHECKING:
    from ldm.tokenizer import AddedToken

DIFFUSION_TARGETS = ("ldm.models.diffusion.ddpm.LatentDiffusion",)
INPAINT_TARGET = "ldm.models.diffusion.ddpm.LatentInpaintDiffusion"
UNET_TARGETS = ("ldm.modules.diffusionmodules.openaimodel.UNetModel", "ldm.models.unet.UNetModel")
VAE_TARGETS = ("ldm.models.autoencoder.AutoencoderKL",)
VIT_L14 = dict(width=768, num_layers=12, num_heads=12, activation="quick_gelu")
VIT_H14 = dict(width=1024, num_layers=24, num_heads=16, activation="gelu")
TEXT_TARGETS = {
    "ldm.modules.encoders.modules.FrozenCLIPEmbedder": VIT_L14,
    "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder": VIT_H14,
    "ldm.models.text_encoder.CLIPTextEncoder": {},
}

MODEL_KEYS = ("architecture", "target", "pad_token", "params")
MODEL_IGNORED = ("base_learning_rate",)
PARAMS_KEYS = (
    "linear_start",
    "linear_end",
    "timesteps",
    "image_size",
    "scale_factor",
    "parameterization",
    "unet_config",
    "first_stage_config",
    "cond_stage_config",
)
# Settings of published YAMLs that this project has no use for: they choose memory tricks, steer another training, or
# repeat the only choice.
PARAMS_IGNORED = (
    "num_timesteps_cond",
    "log_every_t",
    "first_stage_key",
    "cond_stage_key",
    "cond_stage_trainable",
    "channels",
    "conditioning_key",
    "monitor",
    "use_ema",
    "scheduler_config",
    "finetune_keys",
    "use_fp16",
    "ckpt_path",
    "ignore_keys",
    "load_only_unet",
    "clip_denoised",
)
SECTION_KEYS = ("target", "params")
UNET_IGNORED = (
    "image_size",
    "use_checkpoint",
    "legacy",
    "use_spatial_transformer",
    "use_fp16",
    "dropout",
    "conv_resample",
    "dims",
    "num_classes",
    "use_scale_shift_norm",
    "resblock_updown",
    "use_new_attention_order",
    "enable_flash_attention",
    "enable_fa_with_pad",
)
VAE_IGNORED = ("lossconfig", "monitor", "ckpt_path")
DD_IGNORED = ("resolution", "attn_resolutions", "dropout")
TEXT_IGNORED = ("freeze", "layer", "device", "max_length", "version", "arch", "use_fp16")

UNET_KEYS = {
    "in_channels": int,
    "model_channels": int,
    "out_channels": int,
    "num_res_blocks": int,
    "attention_resolutions": list,
    "channel_mult": list,
    "num_heads": int,
    "num_head_channels": int,
    "transformer_depth": int,
    "context_dim": int,
    "use_linear_in_transformer": bool,
    "num_groups": int,
}
VAE_KEYS = {"embed_dim": int, "ddconfig": dict}
DD_KEYS = {
    "double_z": bool,
    "z_channels": int,
    "in_channels": int,
    "out_ch": int,
    "ch": int,
    "ch_mult": list,
    "num_res_blocks": int,
    "num_groups": int,
}
TEXT_KEYS = {"width": int, "num_layers": int, "num_heads": int, "activation": str, "vocab_size": int, "length": int}
OPTIONAL = (
    "num_heads",
    "num_head_channels",
    "transformer_depth",
    "use_linear_in_transformer",
    "num_groups",
    "double_z",
    "vocab_size",
    "length",
)
KINDS = {
    int: "a whole number",
    bool: "true or false",
    list: "a list of whole numbers",
    str: "a word",
    dict: "a section",
}
PAD_TOKENS = ("end", "zero")
ARCHITECTURES = ("sd1", "sd2", "nano", "custom")
PARAMETERIZATIONS = {"eps": "epsilon", "v": "v_prediction"}  # `parameterization` in a YAML -> prediction type
PREDICTION_TYPES = tuple(PARAMETERIZATIONS.values())
ACTIVATIONS = ("quick_gelu", "gelu")
MOST_SIDE = 8192  # pixels
MOST_TIMESTEPS = 100_000
LEAST_BETA = 1e-8  # the first noise, its square root, is 1e-4
LEAST_LEFT = 1e-16  # of the image's variance at the last time step; Stable Diffusion leaves 5e-3
MOST_SCALE_FACTOR = 1000
NUM_GROUPS = 32  # of UNetModel and AutoencoderKL where the YAML names no other


@dataclass(frozen=True)
class ModelConfig:
    """What the networks are made of, and the numbers that training and sampling must share."""

    path: str
    architecture: str  # "sd1", "sd2", "nano" or "custom"
    prediction_type: str  # "epsilon" or "v_prediction"
    linear_start: float  # first beta
    linear_end: float  # last beta
    timesteps: int
    beta_schedule: str  # "scaled_linear": linear in the square root of beta
    scale_factor: float  # latents are the autoencoder's times this
    image_size: int  # pixels
    latent_channels: int
    vae_factor: int  # pixels a latent pixel, along one side
    context_dim: int
    pad_token: str  # "end": texts are padded with the end token; "zero": with token 0
    unet: dict[str, Any]  # arguments of UNetModel
    vae: dict[str, Any]  # arguments of AutoencoderKL
    text: dict[str, Any]  # arguments of CLIPTextEncoder
    added_tokens: tuple[AddedToken, ...] = ()  # of the checkpoint, see ldm.weights.added_tokens; a YAML has none

    @property
    def size_multiple(self) -> int:
        """Height and width in pixels must be multiples of this: the VAE's factor times the UNet's halvings."""
        return self.vae_factor * 2 ** (len(self.unet["channel_mult"]) - 1)

    def content(self) -> dict[str, Any]:
        """All that makes the model what it is, for hashes: not where it was read; the tokens only where there are any,
        so that runs from before there were such resume.
        """
        content = {**asdict(self), "path": ""}
        if not self.added_tokens:
            del content["added_tokens"]
        return content


def model_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """What the texts of a checkpoint say of its model: `architecture` and `prediction_type` as in ModelConfig, those
    that are there. Training writes both; other projects' words under these names say nothing here.
    """
    known = {"architecture": ARCHITECTURES, "prediction_type": PREDICTION_TYPES}
    return {key: metadata[key] for key, words in known.items() if metadata.get(key) in words}


def load_model_config(path: str | Path) -> ModelConfig:
    """Read a model YAML.

    Raises:
        UserError: the file is missing or not YAML, a `target` is not in the table, a key is missing or unknown, a value
            is out of range or contradicts another.
    """
    try:
        document = read_yaml(path)
    except UserError as error:
        raise UserError(
            f"model configuration {error}; --model_config (or --config) wants one such as configs/v1-inference.yaml"
        ) from None
    return parse_model_config(document, path)


def parse_model_config(document: Any, path: str | Path) -> ModelConfig:
    """The model that a YAML's content describes; `path` names it in errors, which are load_model_config's."""
    path = Path(path)
    model = _section(document, "model", path)
    params = _section(model, "params", path, "model.")
    if model.get("target") == INPAINT_TARGET:
        raise _error(
            path,
            f"model.target is {INPAINT_TARGET}: inpainting models are not supported; take the YAML and "
            "the checkpoint of a text-to-image model",
        )
    _target(model, DIFFUSION_TARGETS, path, "model")
    _known(model, MODEL_KEYS, MODEL_IGNORED, path, "model")
    _known(params, PARAMS_KEYS, PARAMS_IGNORED, path, "model.params")

    unet_section = _section(params, "unet_config", path, "model.params.")
    vae_section = _section(params, "first_stage_config", path, "model.params.")
    text_section = _section(params, "cond_stage_config", path, "model.params.")
    _target(unet_section, UNET_TARGETS, path, "unet_config")
    _target(vae_section, VAE_TARGETS, path, "first_stage_config")
    text_target = _target(text_section, TEXT_TARGETS, path, "cond_stage_config")
    for name, section in (
        ("unet_config", unet_section),
        ("first_stage_config", vae_section),
        ("cond_stage_config", text_section),
    ):
        _known(section, SECTION_KEYS, (), path, name)

    unet = _pick(_section(unet_section, "params", path, "unet_config."), UNET_KEYS, UNET_IGNORED, path, "unet_config")
    vae_params = dict(_section(vae_section, "params", path, "first_stage_config."))
    ddconfig = _section(vae_params, "ddconfig", path, "first_stage_config.params.")
    if ddconfig.get("attn_resolutions"):
        raise _error(
            path,
            "first_stage_config.params.ddconfig.attn_resolutions must be empty, as in every published "
            "Stable Diffusion; attention inside the levels is not supported",
        )
    vae = _pick(ddconfig, DD_KEYS, DD_IGNORED, path, "ddconfig")
    vae["embed_dim"] = _pick(vae_params, VAE_KEYS, VAE_IGNORED, path, "first_stage_config")["embed_dim"]
    given = text_section.get("params")
    if given is None:
        given = {}
    if not isinstance(given, dict):
        raise _error(path, f"cond_stage_config.params is {_shown(given)}; it must be a section")
    text = _pick({**TEXT_TARGETS[text_target], **given}, TEXT_KEYS, TEXT_IGNORED, path, "cond_stage_config")
    if given.get("layer") == "penultimate":
        text["num_layers"] -= 1

    _check_sizes(unet, vae, text, path)

    parameterization = _choice(params, "parameterization", "eps", tuple(PARAMETERIZATIONS), path)
    is_openclip = text_target.endswith("FrozenOpenCLIPEmbedder")
    pad_token = _choice(model, "pad_token", "zero" if is_openclip else "end", PAD_TOKENS, path)
    context_dim = unet["context_dim"]
    derived = {768: "sd1", 1024: "sd2"}.get(context_dim, "custom") if unet["model_channels"] == 320 else "custom"
    linear_start, linear_end = (
        _number(params, key, path, below=1, low=LEAST_BETA) for key in ("linear_start", "linear_end")
    )
    # Samplers leave out the last time step and want one before it.
    timesteps = _whole_number(params, "timesteps", path, low=2, high=MOST_TIMESTEPS)
    if linear_start > linear_end:
        raise _error(
            path,
            f"linear_start {linear_start} is above linear_end {linear_end}; they are the first and the "
            "last beta, which go up",
        )
    left = _left_at_the_end(linear_start, linear_end, timesteps)
    if left < LEAST_LEFT:
        raise _error(
            path,
            f"after timesteps {timesteps} with linear_end {linear_end} only {left:.1g} of the image's "
            "variance is left; lower one of them",
        )
    vae_factor = 2 ** (len(vae["ch_mult"]) - 1)
    return ModelConfig(
        path=str(path),
        architecture=_choice(model, "architecture", derived, ARCHITECTURES, path),
        prediction_type=PARAMETERIZATIONS[parameterization],
        linear_start=linear_start,
        linear_end=linear_end,
        timesteps=timesteps,
        beta_schedule="scaled_linear",
        scale_factor=_number(params, "scale_factor", path, low=1 / MOST_SCALE_FACTOR, high=MOST_SCALE_FACTOR),
        image_size=_whole_number(params, "image_size", path, high=MOST_SIDE // vae_factor) * vae_factor,
        latent_channels=vae["embed_dim"],
        vae_factor=vae_factor,
        context_dim=context_dim,
        pad_token=pad_token,
        unet=unet,
        vae=vae,
        text=text,
    )


def model_document(config: ModelConfig) -> dict[str, Any]:
    """The content of a YAML that parse_model_config reads as `config`, every size written out."""
    vae = dict(config.vae)
    embed_dim = vae.pop("embed_dim")
    parameterization = next(key for key, value in PARAMETERIZATIONS.items() if value == config.prediction_type)
    return {
        "model": {
            "architecture": config.architecture,
            "target": DIFFUSION_TARGETS[0],
            "pad_token": config.pad_token,
            "params": {
                "parameterization": parameterization,
                "linear_start": config.linear_start,
                "linear_end": config.linear_end,
                "timesteps": config.timesteps,
                "image_size": config.image_size // config.vae_factor,
                "scale_factor": config.scale_factor,
                "unet_config": {"target": UNET_TARGETS[1], "params": dict(config.unet)},
                "first_stage_config": {
                    "target": VAE_TARGETS[0],
                    "params": {"embed_dim": embed_dim, "ddconfig": vae},
                },
                "cond_stage_config": {"target": "ldm.models.text_encoder.CLIPTextEncoder", "params": dict(config.text)},
            },
        }
    }


def _check_sizes(unet: dict, vae: dict, text: dict, path: Path) -> None:
    """Raise UserError where a size is not above 0, or does not go with the others."""

    def refuse(problem: str) -> None:
        raise _error(path, problem)

    for name, params in (("unet_config", unet), ("ddconfig", vae), ("cond_stage_config", text)):
        for key, value in params.items():
            # -1 is the published way to say that the other of the two counts.
            unset = key in ("num_heads", "num_head_channels") and name == "unet_config" and value == -1
            for number in value if isinstance(value, list) else [value]:
                if type(number) is int and number < 1 and not unset:
                    refuse(f"{key} in {name} is {_shown(value)}; it must be above 0")
    check_size(unet, vae, text, f"model configuration {plain(path)}")
    if text["activation"] not in ACTIVATIONS:
        refuse(
            f"activation in cond_stage_config is {_shown(text['activation'])}; it must be {' or '.join(ACTIVATIONS)}"
        )
    if text["width"] % text["num_heads"]:
        refuse(f"the text encoder's width {text['width']} is not a multiple of its num_heads {text['num_heads']}")
    if text["width"] != unet["context_dim"]:
        refuse(f"the text encoder's width {text['width']} is not the UNet's context_dim {unet['context_dim']}")
    if unet["in_channels"] == 9:
        refuse(
            "in_channels in unet_config is 9, an inpainting model's; inpainting is not supported, "
            "take the YAML and the checkpoint of a text-to-image model"
        )
    if not unet["in_channels"] == unet["out_channels"] == vae["embed_dim"]:
        refuse(
            f"the UNet's in_channels {unet['in_channels']} and out_channels {unet['out_channels']} and the "
            f"autoencoder's embed_dim {vae['embed_dim']} must be the same: the latents' channels"
        )
    if not (vae["in_channels"] == vae["out_ch"] == 3):
        refuse(f"in_channels {vae['in_channels']} and out_ch {vae['out_ch']} in ddconfig must be 3, of an RGB image")
    if vae.get("double_z") is False:
        refuse("double_z in ddconfig is False; it must be true, as in every published Stable Diffusion")

    heads, head_channels = unet.get("num_heads", -1), unet.get("num_head_channels", -1)
    if heads == -1 and head_channels == -1:
        refuse("unet_config needs num_heads (SD1.x) or num_head_channels (SD2.x)")
    groups = unet.get("num_groups", NUM_GROUPS)
    key, divisor = ("num_head_channels", head_channels) if head_channels > 0 else ("num_heads", heads)
    for mult in (1, *unet["channel_mult"]):
        channels = mult * unet["model_channels"]
        if channels % groups:
            refuse(
                f"{channels} channels (model_channels {unet['model_channels']} x {mult}) in unet_config are not "
                f"a multiple of num_groups {groups}"
            )
    # Attention stands at the levels of attention_resolutions, and always in the middle block.
    levels = enumerate(unet["channel_mult"])
    attended = [mult for level, mult in levels if 2**level in unet["attention_resolutions"]]
    for mult in (*attended, unet["channel_mult"][-1]):
        channels = mult * unet["model_channels"]
        if channels % divisor:
            refuse(
                f"{channels} channels (model_channels {unet['model_channels']} x {mult}) in unet_config are not "
                f"a multiple of {key} {divisor}"
            )
    groups = vae.get("num_groups", NUM_GROUPS)
    for mult in (1, *vae["ch_mult"]):
        if mult * vae["ch"] % groups:
            refuse(
                f"{mult * vae['ch']} channels (ch {vae['ch']} x {mult}) in ddconfig are not a multiple of "
                f"num_groups {groups}"
            )


def _section(parent: Any, key: str, path: Path, prefix: str = "") -> dict:
    if not isinstance(parent, dict) or not isinstance(parent.get(key), dict):
        raise _error(
            path, f"there is no section {prefix}{key}; is this a model YAML such as configs/v1-inference.yaml?"
        )
    return parent[key]


def _target(section: dict, known, path: Path, name: str) -> str:
    target = section.get("target")
    if target not in tuple(known):  # not the table itself: a list in its place cannot be looked up
        raise _error(path, f"{name}.target is {_shown(target)}; known: {', '.join(known)}")
    return target


def _known(section: dict, keys, ignored, path: Path, name: str) -> None:
    """Raise UserError for a key of `section` that nothing reads, naming the nearest."""
    for key in section:
        if key not in keys and key not in ignored:
            near = nearest(str(key), (*keys, *ignored))
            raise _error(path, f"unknown key {plain(key, 60)} in {name}; did you mean {near}?")


def _choice(section: dict, key: str, default: str, choices, path: Path) -> str:
    value = section.get(key, default)
    if value not in choices:
        raise _error(path, f"{key} is {_shown(value)}; it must be {', '.join(choices[:-1])} or {choices[-1]}")
    return value


def _number(
    params: dict, key: str, path: Path, below: float = math.inf, low: float = 0.0, high: float = math.inf
) -> float:
    """A number above 0 and below `below`, from `low` to `high`."""
    if key not in params:
        raise _error(path, f"the key {key} is missing in model.params")
    try:
        # A number in quotes is a word, and true is a number to Python.
        number = math.nan if isinstance(params[key], bool) else float(params[key])
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 < number < below:
        limit = "" if below == math.inf else f" and below {below}"
        raise _error(path, f"{key} is {_shown(params[key])}; it must be a number above 0{limit}")
    if not low <= number <= high:
        bound = f"{low} at least" if number < low else f"{high} at most"
        raise _error(path, f"{key} is {_shown(params[key])}; it may be {bound}")
    return number


def _whole_number(params: dict, key: str, path: Path, low: int = 1, high: float = math.inf) -> int:
    number = _number(params, key, path, high=high)
    if number != int(number) or number < low:
        raise _error(path, f"{key} is {_shown(params[key])}; it must be a whole number, at least {low}")
    return int(number)


def _left_at_the_end(linear_start: float, linear_end: float, timesteps: int) -> float:
    """The share of the image's variance at the last time step of a scaled_linear schedule (ldm.diffusion.schedule)."""
    first, last = linear_start**0.5, linear_end**0.5
    steps = (first + (last - first) * i / (timesteps - 1) for i in range(timesteps))
    return math.exp(sum(math.log1p(-step * step) for step in steps))


def _error(path: Path, problem: str) -> UserError:
    return UserError(f"model configuration {plain(path)}: {problem}")


def _shown(value: Any) -> str:
    return plain(repr(value), 80)


def _pick(params: dict, kinds: dict[str, type], ignored, path: Path, name: str) -> dict:
    """The keys of `params` that are in `kinds`, each of its kind; all that are not OPTIONAL must be there."""
    _known(params, kinds, ignored, path, name)
    for key, kind in kinds.items():
        if key not in params:
            if key not in OPTIONAL:
                raise _error(path, f"the key {key} is missing in {name}")
            continue
        value = params[key]
        fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if kind is list:
            fits = fits and bool(value) and all(type(entry) is int for entry in value)
        if not fits:
            raise _error(path, f"{key} in {name} is {_shown(value)}; it must be {KINDS[kind]}")
    return {key: params[key] for key in kinds if key in params}
