"""Find the configuration of the model that a checkpoint is for.

Shapes do not show the number of attention heads, the activation, the groups of a normalization, the noise schedule, or
what the UNet predicts. If the shapes are those of a known model (configs/*.yaml), its YAML says the rest. A diffusers
folder says it in its config.json files. For any other checkpoint a model YAML beside it says it, which `convert`
writes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.files.inputs import is_file, is_folder
from ldm.files.paths import ROOT
from ldm.settings.model import NUM_GROUPS, ModelConfig, load_model_config, model_metadata
from ldm.tokenizer import CONTEXT_LENGTH, VOCABULARY_SIZE
from ldm.weights.added_tokens import with_added_tokens
from ldm.weights.arrays import Checkpoint
from ldm.weights.base_model import map_base_model, open_base_model
from ldm.weights.diffusers_folder.configs import read_model_config
from ldm.weights.diffusers_folder.reader import DiffusersFolder
from ldm.weights.names import COMPONENTS, LABELS, CanonicalArrays, KeyMap, component_of
from ldm.weights.names.tables import NUMBER, TEXT_PREFIX, count_numbers
from ldm.weights.recognise import other_task

KNOWN_NAMES = (
    "v1-inference", "v2-inference", "v2-vpred-inference", "nano", "mnist", "mnist_rgb", "v1-inpainting-inference",
    "v2-inpainting-inference",
)  # fmt: skip
KNOWN_CONFIGS = tuple(f"configs/{name}.yaml" for name in KNOWN_NAMES)
# Arguments of the networks that a configuration may leave out.
DEFAULTS = {
    "unet": {
        "num_heads": -1,
        "num_head_channels": -1,
        "num_groups": NUM_GROUPS,
        "transformer_depth": 1,
        "use_linear_in_transformer": False,
    },
    "vae": {"double_z": True, "num_groups": NUM_GROUPS},
    "text": {"vocab_size": VOCABULARY_SIZE, "length": CONTEXT_LENGTH},
}


def detect_model_config(path: str | Path, way_out: str = "") -> ModelConfig:
    """Find the configuration of a base model, a file or a diffusers folder.

    Raises:
        UserError: It is not a base model, or it does not say which model it is. `way_out` ends the message.
    """
    checkpoint = open_base_model(path)
    key_map = map_base_model(checkpoint)
    configs = candidate_configs(checkpoint, key_map)
    if len(configs) == 1:
        return configs[0]
    raise UserError(f"which model is {path}? {missing_information(checkpoint, key_map, way_out)}")


def config_with_tokens(config: ModelConfig, path: str | Path) -> ModelConfig:
    """Add the tokens of the base model at `path` to a configuration that was read from a YAML.

    Raises:
        UserError: It is not a base model, or its tokens do not fit it.
    """
    checkpoint = open_base_model(path)
    return with_added_tokens(config, checkpoint, map_base_model(checkpoint))


def candidate_configs(checkpoint: Checkpoint, key_map: KeyMap, prediction_type: str | None = None) -> list[ModelConfig]:
    """Find all configurations that fit a base model.

    Args:
        checkpoint: The opened base model.
        key_map: Its keys.
        prediction_type: What the UNet predicts, if it is known from elsewhere. A YAML beside the checkpoint takes
            precedence.

    Returns:
        One configuration, several if only the prediction type is unknown, or none if the shapes are not those of a
        known model and the checkpoint does not say the rest.

    Raises:
        UserError: The model is for another task, or the networks here do not support a setting of it.
    """
    return [
        with_added_tokens(config, checkpoint, key_map)
        for config in _candidates_without_tokens(checkpoint, key_map, prediction_type)
    ]


def _candidates_without_tokens(
    checkpoint: Checkpoint, key_map: KeyMap, prediction_type: str | None
) -> list[ModelConfig]:
    beside = yaml_beside(checkpoint.path)
    if is_file(beside):
        return [load_model_config(beside)]
    canonical = CanonicalArrays(checkpoint, key_map)
    shapes = {name: canonical.shape(name) for name in canonical}
    sizes = {"unet": _unet_sizes(shapes), "vae": _vae_sizes(shapes), "text": _text_sizes(shapes)}
    task = other_task(sizes["unet"].get("in_channels", 0), sizes["unet"].get("out_channels", 0))
    if task is not None:
        raise UserError(f"{checkpoint.path} is {task}")
    stated = model_metadata(checkpoint.metadata)
    if prediction_type is not None:
        stated["prediction_type"] = prediction_type
    known = [load_model_config(ROOT / path) for path in KNOWN_CONFIGS]
    if isinstance(checkpoint, DiffusersFolder) and all(sizes.values()) and "channel_mult" in sizes["unet"]:
        config = read_model_config(checkpoint, sizes, stated.get("prediction_type"))
        if config is not None:
            return [next((other for other in known if same_config(config, other)), config)]
    if not any(sizes.values()) and "architecture" not in stated:
        return []
    if "in_channels" not in sizes["unet"]:  # nothing says that the UNet is an inpainting model's
        known = [config for config in known if not config.is_inpainting]
    known = [config for config in known if _has_sizes(config, sizes)]
    fitting = [config for config in known if all(getattr(config, key) == value for key, value in stated.items())]
    if not fitting and prediction_type is not None:  # a known model that was trained to predict the other quantity
        fitting = [replace(config, prediction_type=prediction_type) for config in known[:1]]
    return fitting


def missing_information(checkpoint: Checkpoint, key_map: KeyMap, way_out: str) -> str:
    """Say in one sentence, which `way_out` ends, why candidate_configs does not find exactly one configuration."""
    absent = [LABELS[part] for part in COMPONENTS if part not in map(component_of, key_map.sources)]
    # A training may start without a UNet, and the VAE may come from another file.
    if absent and absent not in ([LABELS["unet"]], [LABELS["vae"]]):
        return f"It holds no {' and no '.join(absent)}: give the whole model"
    stated = [f"says {key} {value}" for key, value in model_metadata(checkpoint.metadata).items()]
    stated += [f"holds no {part}" for part in absent if stated]
    if isinstance(checkpoint, DiffusersFolder):
        stated += [f"has no {part}/config.json" for part in COMPONENTS if not checkpoint.config(part)]
    if stated:
        return f"It {' and '.join(stated)}, and its shapes do not show the rest: {way_out}"
    if len(candidate_configs(checkpoint, key_map)) > 1:
        return f"Its shapes do not show whether it predicts noise or velocity: {way_out}"
    return f"Its shapes are not those of a known model: {way_out}"


def same_config(a: ModelConfig, b: ModelConfig) -> bool:
    """Whether two configurations describe the same model. Names and paths do not count."""
    return _complete(a) == _complete(b)


def known_config_path(config: ModelConfig) -> str | None:
    """Return the path, below the project's folder, of the YAML that describes the same model. None if there is none."""
    return next((path for path in KNOWN_CONFIGS if same_config(config, load_model_config(ROOT / path))), None)


def yaml_beside(path: Path, as_folder: bool | None = None) -> Path:
    """Return the path of a checkpoint's model YAML: `x.yaml` for `x.safetensors`, `folder.yaml` for `folder`.

    `as_folder` says whether the checkpoint is a folder, if it does not exist yet.
    """
    as_folder = is_folder(path) if as_folder is None else as_folder
    return path.parent / f"{path.name}.yaml" if as_folder else path.with_suffix(".yaml")


def _complete(config: ModelConfig) -> dict[str, Any]:
    content = {**config.content(), "architecture": ""}
    for part, defaults in DEFAULTS.items():
        content[part] = {**defaults, **content[part]}
    content["unet"]["attention_resolutions"] = sorted(content["unet"]["attention_resolutions"])
    return content


def _has_sizes(config: ModelConfig, sizes: Mapping[str, Mapping[str, Any]]) -> bool:
    content = _complete(config)
    if config.in_pixel_space and sizes["vae"]:
        return False
    return all(content[part][key] == value for part, values in sizes.items() for key, value in values.items())


def _unet_sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return the arguments of UNetModel that the shapes show, only `context_dim` if arrays are missing."""
    unet = _component_shapes(shapes, "unet")
    contexts = {shape[-1] for name, shape in unet.items() if name.endswith("attn2.to_k.weight") and shape}
    sizes: dict[str, Any] = {"context_dim": contexts.pop()} if len(contexts) == 1 else {}
    conv_in, conv_out = unet.get("input_blocks.0.0.weight", ()), unet.get("out.2.weight", ())
    proj_in = unet.get("middle_block.1.proj_in.weight")
    if len(conv_in) != 4 or len(conv_out) != 4 or not conv_in[0] or proj_in is None:
        return sizes
    widths: list[int] = []
    layers: list[int] = []
    attends: list[bool] = []
    level = 0
    for block in range(1, count_numbers(unet, rf"input_blocks\.{NUMBER}\.")):
        if f"input_blocks.{block}.0.op.weight" in unet:
            level += 1
            continue
        if len(layers) == level:
            widths.append(unet.get(f"input_blocks.{block}.0.out_layers.3.weight", (0,))[0])
            layers.append(0)
            attends.append(f"input_blocks.{block}.1.norm.weight" in unet)
        if len(layers) == level + 1:
            layers[level] += 1
    if not layers or len(set(layers)) > 1 or any(width % conv_in[0] for width in widths):
        return sizes
    sizes.update(
        in_channels=conv_in[1],
        model_channels=conv_in[0],
        out_channels=conv_out[0],
        num_res_blocks=layers[0],
        attention_resolutions=[2**i for i, attention in enumerate(attends) if attention],
        channel_mult=[width // conv_in[0] for width in widths],
        transformer_depth=max(1, count_numbers(unet, rf"middle_block\.1\.transformer_blocks\.{NUMBER}\.")),
        use_linear_in_transformer=len(proj_in) == 2,
    )
    return sizes


def _vae_sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return the arguments of AutoencoderKL that the shapes show, none if arrays are missing."""
    vae = _component_shapes(shapes, "vae")
    names = ("encoder.conv_in.weight", "decoder.conv_in.weight", "decoder.conv_out.weight", "post_quant_conv.weight")
    if any(len(vae.get(name, ())) != 4 for name in names):
        return {}
    conv_in, decoder_in, decoder_out, post_quant = (vae[name] for name in names)
    levels = range(count_numbers(vae, rf"encoder\.down\.{NUMBER}\."))
    widths = [vae.get(f"encoder.down.{level}.block.0.conv1.weight", (0,))[0] for level in levels]
    if not conv_in[0] or any(width % conv_in[0] for width in widths):
        return {}
    return dict(
        embed_dim=post_quant[1],
        z_channels=decoder_in[1],
        in_channels=conv_in[1],
        out_ch=decoder_out[0],
        ch=conv_in[0],
        ch_mult=[width // conv_in[0] for width in widths],
        num_res_blocks=count_numbers(vae, rf"encoder\.down\.0\.block\.{NUMBER}\."),
    )


def _text_sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return the arguments of CLIPTextEncoder that the shapes show, none if arrays are missing."""
    tokens = shapes.get(f"{TEXT_PREFIX}embeddings.token_embedding.weight", ())
    positions = shapes.get(f"{TEXT_PREFIX}embeddings.position_embedding.weight", ())
    if len(tokens) != 2 or len(positions) != 2:
        return {}
    layers = count_numbers(shapes, rf"{re.escape(TEXT_PREFIX)}encoder\.layers\.{NUMBER}\.")
    # The number of rows in `tokens` follows from the added tokens, see ldm.weights.added_tokens.
    return dict(width=tokens[1], num_layers=layers, length=positions[0])


def _component_shapes(shapes: Mapping[str, tuple[int, ...]], component: str) -> dict[str, tuple[int, ...]]:
    prefix = COMPONENTS[component]
    return {name[len(prefix) :]: shape for name, shape in shapes.items() if name.startswith(prefix)}
