"""The architecture of a model, read from a YAML of the published Stable Diffusion form.

`target:` names are looked up in a closed table and never imported; a published YAML (CompVis's v1-inference.yaml,
Stability AI's v2-inference*.yaml) reads unchanged. Two keys are this project's own, both under `model:`:
`architecture` (a name that LoRA files carry; derived where it is absent) and `pad_token`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from ldm.errors import UserError, plain
from ldm.files.documents import read_yaml
from ldm.settings.model_size import check_parameters
from ldm.settings.model_yaml import (
    ARCHITECTURES,
    DIFFUSION_TARGET,
    IDENTITY_TARGET,
    INPAINT_TARGET,
    MAX_SIDE,
    OPENCLIP_TARGET,
    PARAMETERIZATIONS,
    TEXT_TARGET,
    TEXT_TARGETS,
    UNET_TARGETS,
    VAE_TARGET,
    ModelDocument,
    TextParams,
    VAEParams,
)
from ldm.settings.read import read_mapping

# Input channels of UNets that take more than noisy latents, and the models that have them.
OTHER_TASKS = {5: "a depth-to-image", 7: "an upscaling", 8: "an InstructPix2Pix"}
# Of an inpainting model: 4 noisy latents, the mask, and the 4 latents of the masked image. The UNet returns 4.
INPAINTING_CHANNELS = (9, 4)
PREDICTION_TYPES = tuple(PARAMETERIZATIONS.values())
MIN_ALPHA_CUMPROD = 1e-16  # the image's share of the variance at the last time step; Stable Diffusion has 5e-3
NUM_GROUPS = 32  # of UNetModel and AutoencoderKL where the YAML names no other
PIXEL_CHANNELS = (1, 3)  # of a model in pixel space: grey or RGB


class AddedToken(NamedTuple):
    """A text with its own token, such as the `<cat-toy>` that a textual inversion learns.

    The flags are those of transformers' AddedToken. Its `lstrip` and `rstrip` remove white space, which has no token
    here.

    Attributes:
        text: The text in a prompt.
        token: Its id.
        normalized: Whether upper and lower case are the same.
        single_word: Whether a letter, digit or underscore beside the text prevents a match.
    """

    text: str
    token: int
    normalized: bool = True
    single_word: bool = False


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
    scale_factor: float  # the latents are the autoencoder's output times this
    image_size: int  # pixels
    latent_channels: int
    vae_factor: int  # pixels per latent pixel along a side
    context_dim: int
    pad_token: str  # "end": texts are padded with the end token; "zero": with token 0
    unet: dict[str, Any]  # arguments of UNetModel
    vae: dict[str, Any]  # arguments of AutoencoderKL, none in pixel space
    text: dict[str, Any]  # arguments of CLIPTextEncoder
    added_tokens: tuple[AddedToken, ...] = ()  # of the checkpoint, see ldm.weights.added_tokens; a YAML has none

    @property
    def in_pixel_space(self) -> bool:
        """Whether the latents are the pixels, because the model has no autoencoder."""
        return not self.vae

    @property
    def image_channels(self) -> int:
        """Channels of the images: 3 for RGB, 1 for grey, which only a model in pixel space may have."""
        return self.latent_channels if self.in_pixel_space else 3

    @property
    def moment_channels(self) -> int:
        """Channels that an image is encoded to: mean and log variance of the latents, or the pixels."""
        return self.latent_channels if self.in_pixel_space else 2 * self.latent_channels

    @property
    def is_inpainting(self) -> bool:
        """Whether the UNet takes, after the noisy latents, a mask and the latents of the masked image."""
        return is_inpainting(self.unet["in_channels"], self.unet["out_channels"])

    @property
    def size_multiple(self) -> int:
        """Height and width in pixels must be multiples of this: the VAE's factor times the UNet's halvings."""
        return self.vae_factor * 2 ** (len(self.unet["channel_mult"]) - 1)

    def content(self) -> dict[str, Any]:
        """Return everything that makes the model what it is, for hashes.

        The path is left out, and added_tokens if it is empty: training states from before added tokens were supported
        still match.
        """
        content = {**asdict(self), "path": ""}
        if not self.added_tokens:
            del content["added_tokens"]
        return content


def is_inpainting(in_channels: int, out_channels: int) -> bool:
    """Whether a UNet of these channels is an inpainting model's."""
    return (in_channels, out_channels) == INPAINTING_CHANNELS


def model_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return `architecture` and `prediction_type` from the metadata of a checkpoint, where they are known words.

    Training writes both. Other projects may write other words under these names, which are ignored.
    """
    known = {"architecture": ARCHITECTURES, "prediction_type": PREDICTION_TYPES}
    return {key: metadata[key] for key, words in known.items() if metadata.get(key) in words}


def load_model_config(path: str | Path) -> ModelConfig:
    """Read a model YAML.

    Raises:
        UserError: The file is missing or not YAML, a `target` is unknown, a key is missing or unknown, or a value is
            out of range or contradicts another.
    """
    try:
        document = read_yaml(path)
    except UserError as error:
        raise UserError(
            f"model configuration {error}; --model_config (or --config) wants one such as configs/v1-inference.yaml"
        ) from None
    return parse_model_config(document, path)


def parse_model_config(document: Any, path: str | Path) -> ModelConfig:
    """Return the model that the content of a YAML describes. `path` names it in errors.

    Raises:
        UserError: As load_model_config.
    """

    def refuse(problem: str) -> NoReturn:
        raise UserError(f"{source}: {problem}")

    source = f"model configuration {plain(path)}"
    section = document.get("model") if isinstance(document, Mapping) else None
    if not isinstance(section, Mapping):
        refuse("there is no section model; is this a model YAML such as configs/v1-inference.yaml?")
    model = read_mapping(ModelDocument, document, source, ignore_unknown=True)["model"]
    params = model["params"]
    unet = params["unet_config"]["params"]
    vae = _read_vae(params["first_stage_config"], source)
    text_target = params["cond_stage_config"]["target"]
    text_params = params["cond_stage_config"].get("params") or {}
    text = read_mapping(
        TextParams, {**TEXT_TARGETS[text_target], **text_params}, source, "model.params.cond_stage_config.params."
    )
    if text_params.get("layer") == "penultimate":
        text["num_layers"] -= 1
    if vae.pop("attn_resolutions", None):
        refuse(
            "attn_resolutions in ddconfig must be empty, as in every published Stable Diffusion; attention inside the "
            "levels is not supported"
        )

    problem = _unet_problem(unet) or _vae_problem(vae) or _text_problem(text, unet["context_dim"])
    if problem:
        refuse(problem)
    if not vae:
        problem = _pixel_problem(unet, params["scale_factor"], params["image_size"])
        if problem:
            refuse(problem)
    elif vae["embed_dim"] != unet["out_channels"] or not (
        unet["in_channels"] == unet["out_channels"] or is_inpainting(unet["in_channels"], unet["out_channels"])
    ):
        refuse(
            f"the UNet's in_channels {unet['in_channels']} and out_channels {unet['out_channels']} and the "
            f"autoencoder's embed_dim {vae['embed_dim']} must be the same: the latents' channels"
        )
    if model["target"] == INPAINT_TARGET and not is_inpainting(unet["in_channels"], unet["out_channels"]):
        refuse(
            f"model.target is {INPAINT_TARGET}, an inpainting model's, whose UNet has in_channels "
            f"{INPAINTING_CHANNELS[0]} and out_channels {INPAINTING_CHANNELS[1]}, not {unet['in_channels']} and "
            f"{unet['out_channels']}: choose {DIFFUSION_TARGET} for a text-to-image model"
        )
    check_parameters(unet, vae, text, source)

    linear_start, linear_end, timesteps = (params[key] for key in ("linear_start", "linear_end", "timesteps"))
    if linear_start > linear_end:
        refuse(
            f"linear_start {linear_start} is above linear_end {linear_end}; they are the first and the last beta, and "
            "betas increase"
        )
    last = _last_alpha_cumprod(linear_start, linear_end, timesteps)
    if last < MIN_ALPHA_CUMPROD:
        refuse(
            f"after timesteps {timesteps} with linear_end {linear_end} only {last:.1g} of the image's variance is "
            "left; lower one of them"
        )
    vae_factor = 2 ** (len(vae["ch_mult"]) - 1) if vae else 1
    image_size = params["image_size"] * vae_factor
    if image_size > MAX_SIDE:
        refuse(
            f"model.params.image_size: {params['image_size']} latents of {vae_factor} pixels are more than {MAX_SIDE} "
            "pixels"
        )
    context_dim = unet["context_dim"]
    derived = {768: "sd1", 1024: "sd2"}.get(context_dim, "custom") if unet["model_channels"] == 320 else "custom"
    return ModelConfig(
        path=str(path),
        architecture=model.get("architecture") or derived,
        prediction_type=PARAMETERIZATIONS[params.get("parameterization", "eps")],
        linear_start=linear_start,
        linear_end=linear_end,
        timesteps=timesteps,
        beta_schedule="scaled_linear",
        scale_factor=params["scale_factor"],
        image_size=image_size,
        latent_channels=unet["out_channels"],
        vae_factor=vae_factor,
        context_dim=context_dim,
        pad_token=model.get("pad_token") or ("zero" if text_target == OPENCLIP_TARGET else "end"),
        unet=unet,
        vae=vae,
        text=text,
    )


def model_document(config: ModelConfig) -> dict[str, Any]:
    """Return the content of a YAML that parse_model_config reads as `config`, with every size written out."""
    vae = dict(config.vae)
    first_stage: dict[str, Any] = {"target": IDENTITY_TARGET}
    if vae:
        first_stage = {"target": VAE_TARGET, "params": {"embed_dim": vae.pop("embed_dim"), "ddconfig": vae}}
    parameterization = next(key for key, value in PARAMETERIZATIONS.items() if value == config.prediction_type)
    return {
        "model": {
            "architecture": config.architecture,
            "target": INPAINT_TARGET if config.is_inpainting else DIFFUSION_TARGET,
            "pad_token": config.pad_token,
            "params": {
                "parameterization": parameterization,
                "linear_start": config.linear_start,
                "linear_end": config.linear_end,
                "timesteps": config.timesteps,
                "image_size": config.image_size // config.vae_factor,
                "scale_factor": config.scale_factor,
                "unet_config": {"target": UNET_TARGETS[0], "params": dict(config.unet)},
                "first_stage_config": first_stage,
                "cond_stage_config": {"target": TEXT_TARGET, "params": dict(config.text)},
            },
        }
    }


def _unet_problem(unet: dict[str, Any]) -> str:
    """Return what does not go together in the UNet's parameters, or ""."""
    heads, head_channels = unet.get("num_heads", -1), unet.get("num_head_channels", -1)
    if 0 in (heads, head_channels):
        return f"{'num_heads' if heads == 0 else 'num_head_channels'} in unet_config is 0; it must be above 0"
    if heads == head_channels == -1:
        return "unet_config needs num_heads (SD1.x) or num_head_channels (SD2.x)"
    if unet["in_channels"] in OTHER_TASKS and unet["in_channels"] != unet["out_channels"]:
        return (
            f"in_channels in unet_config is {unet['in_channels']}, which {OTHER_TASKS[unet['in_channels']]} model has; "
            "take the YAML and the checkpoint of a text-to-image model"
        )
    mults, width = unet["channel_mult"], unet["model_channels"]
    # Attention stands at the levels of attention_resolutions, and always in the middle block.
    attended = [mult for level, mult in enumerate(mults) if 2**level in unet["attention_resolutions"]]
    key, divisor = ("num_head_channels", head_channels) if head_channels > 0 else ("num_heads", heads)
    return _indivisible(
        (1, *mults), "model_channels", width, "num_groups", unet.get("num_groups", NUM_GROUPS), "unet_config"
    ) or _indivisible((*attended, mults[-1]), "model_channels", width, key, divisor, "unet_config")


def _read_vae(section: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the arguments of AutoencoderKL from first_stage_config, none for IdentityFirstStage."""
    where = "model.params.first_stage_config.params"
    params = section.get("params") or {}
    if section["target"] == IDENTITY_TARGET:
        if params:
            raise UserError(
                f"{source}: {where} holds {plain(', '.join(map(str, params)), 60)}, but IdentityFirstStage takes no "
                f"params: leave them out, or choose target {VAE_TARGET}"
            )
        return {}
    values = read_mapping(VAEParams, params, source, f"{where}.")
    return {**values["ddconfig"], "embed_dim": values["embed_dim"]}


def _pixel_problem(unet: dict[str, Any], scale_factor: float, image_size: int) -> str:
    """Return what does not suit a model in pixel space, or ""."""
    channels = (unet["in_channels"], unet["out_channels"])
    if channels[0] != channels[1] or channels[0] not in PIXEL_CHANNELS:
        return (
            f"with IdentityFirstStage the UNet's in_channels {channels[0]} and out_channels {channels[1]} are those of "
            "the images: both must be 1 (grey) or 3 (RGB)"
        )
    if scale_factor != 1:
        return f"scale_factor is {scale_factor}; with IdentityFirstStage it must be 1: the latents are the pixels"
    multiple = 2 ** (len(unet["channel_mult"]) - 1)
    if image_size % multiple:
        return (
            f"image_size {image_size} must be a multiple of {multiple} pixels, because the UNet halves it "
            f"{len(unet['channel_mult']) - 1} times"
        )
    return ""


def _vae_problem(vae: dict[str, Any]) -> str:
    if not vae:
        return ""
    groups = vae.get("num_groups", NUM_GROUPS)
    return _indivisible((1, *vae["ch_mult"]), "ch", vae["ch"], "num_groups", groups, "ddconfig")


def _text_problem(text: dict[str, Any], context_dim: int) -> str:
    if text["num_layers"] < 1:
        return "num_layers in cond_stage_config is 1, and its last layer is left out (layer: penultimate)"
    if text["width"] % text["num_heads"]:
        return f"the text encoder's width {text['width']} is not a multiple of its num_heads {text['num_heads']}"
    if text["width"] != context_dim:
        return f"the text encoder's width {text['width']} is not the UNet's context_dim {context_dim}"
    return ""


def _indivisible(mults: Sequence[int], name: str, width: int, key: str, divisor: int, section: str) -> str:
    """Return what is wrong where mult * width is not a multiple of `divisor`, or ""."""
    for mult in mults:
        if mult * width % divisor:
            return (
                f"{mult * width} channels ({name} {width} x {mult}) in {section} are not a multiple of {key} {divisor}"
            )
    return ""


def _last_alpha_cumprod(linear_start: float, linear_end: float, timesteps: int) -> float:
    """Return the share of the image's variance at the last time step of a scaled_linear schedule."""
    first, last = linear_start**0.5, linear_end**0.5
    steps = (first + (last - first) * i / (timesteps - 1) for i in range(timesteps))
    return math.exp(sum(math.log1p(-step * step) for step in steps))
