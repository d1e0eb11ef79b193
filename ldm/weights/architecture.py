"""Which model a checkpoint is: by the shapes of its arrays, what is written in it, and a diffusers folder's settings.

Shapes do not tell the number of attention heads, the activation, the groups of a normalisation, the noise schedule, nor
whether noise or velocity is predicted. Where the shapes are those of a known model (configs/*.yaml) its YAML says the
rest; a diffusers folder says it in its config.json files; a model YAML beside the checkpoint (`convert` writes one)
says it for any other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm.errors import UserError, plain
from ldm.files.inputs import is_file, is_folder
from ldm.files.paths import ROOT
from ldm.settings.model import (
    NUM_GROUPS,
    ModelConfig,
    load_model_config,
    model_document,
    model_metadata,
    parse_model_config,
)
from ldm.settings.model_yaml import MOST_SIDE, MOST_TIMESTEPS
from ldm.tokenizer import VOCABULARY_SIZE
from ldm.tokenizer.tokenizer import END_TEXT
from ldm.weights.added_tokens import read_added_tokens, with_added_tokens
from ldm.weights.arrays import Checkpoint
from ldm.weights.base_model import map_base_model, open_base_model
from ldm.weights.diffusers_folder.reader import DiffusersFolder
from ldm.weights.names import COMPONENTS, LABELS, CanonicalArrays, KeyMap, component_of
from ldm.weights.recognise import other_task

KNOWN = tuple(f"configs/{name}.yaml" for name in ("v1-inference", "v2-inference", "v2-vpred-inference", "nano"))
DEFAULTS = {
    "unet": {
        "num_heads": -1,
        "num_head_channels": -1,
        "num_groups": NUM_GROUPS,
        "transformer_depth": 1,
        "use_linear_in_transformer": False,
    },
    "vae": {"double_z": True, "num_groups": NUM_GROUPS},
    "text": {"vocab_size": VOCABULARY_SIZE, "length": 77},
}
# The largest numbers that a folder's config.json files may give, beside those of a model YAML.
MOST_HEADS = 1024
MOST_GROUPS = 65_536


def detect_model_config(path: str | Path, way_out: str = "") -> ModelConfig:
    """The model that a checkpoint file or a diffusers folder is made for.

    way_out: what to do about a checkpoint that does not say enough, for the error.

    Raises UserError where it is no base checkpoint or does not say which model it is.
    """
    checkpoint = open_base_model(path)
    key_map = map_base_model(checkpoint)
    found = candidate_configs(checkpoint, key_map)
    if len(found) == 1:
        return found[0]
    raise UserError(f"which model is {path}? {missing_information(checkpoint, key_map, way_out)}")


def config_with_tokens(model: ModelConfig, path: str | Path) -> ModelConfig:
    """A model that is given by its YAML, with the tokens that the checkpoint at `path` adds. Raises UserError where it
    is no base checkpoint, or its tokens do not fit it.
    """
    checkpoint = open_base_model(path)
    return with_added_tokens(model, checkpoint, map_base_model(checkpoint))


def candidate_configs(checkpoint: Checkpoint, key_map: KeyMap, prediction_type: str | None = None) -> list[ModelConfig]:
    """The models that a checkpoint can be of: one; several where it does not say what it predicts; none where it is no
    known one and does not say what its shapes leave open.

    prediction_type: "epsilon" or "v_prediction", where it is known from elsewhere; a YAML beside the checkpoint goes
    before it. Raises UserError for models of another task, and for settings that the networks here do not have.
    """
    return [
        with_added_tokens(model, checkpoint, key_map) for model in _architectures(checkpoint, key_map, prediction_type)
    ]


def _architectures(checkpoint: Checkpoint, key_map: KeyMap, prediction_type: str | None) -> list[ModelConfig]:
    """What candidate_configs gives, without the tokens that the checkpoint adds."""
    beside = yaml_beside(checkpoint.path)
    if is_file(beside):
        return [load_model_config(beside)]
    shapes = {name: CanonicalArrays(checkpoint, key_map).shape(name) for name in key_map.sources}
    sizes = {"unet": _unet_sizes(shapes), "vae": _vae_sizes(shapes), "text": _text_sizes(shapes)}
    task = other_task(sizes["unet"].get("in_channels", 0))
    if task is not None and sizes["unet"]["in_channels"] != sizes["unet"]["out_channels"]:
        raise UserError(f"{checkpoint.path} is {task}")
    said = model_metadata(checkpoint.metadata)
    if prediction_type is not None:
        said["prediction_type"] = prediction_type
    known = [load_model_config(ROOT / path) for path in KNOWN]
    if isinstance(checkpoint, DiffusersFolder) and all(sizes.values()):
        model = _from_folder(checkpoint, sizes, said.get("prediction_type"))
        if model is not None:
            return [next((other for other in known if same_config(model, other)), model)]
    if not any(sizes.values()) and "architecture" not in said:
        return []
    known = [model for model in known if _has_sizes(model, sizes)]
    fitting = [model for model in known if all(getattr(model, key) == value for key, value in said.items())]
    if not fitting and prediction_type is not None:  # a known model that was trained to predict the other thing
        fitting = [replace(model, prediction_type=prediction_type) for model in known[:1]]
    return fitting


def missing_information(checkpoint: Checkpoint, key_map: KeyMap, way_out: str) -> str:
    """One sentence for a checkpoint of which candidate_configs does not find a single model; it ends with the way out, for
    which `way_out` is one that adds what is not said.
    """
    said = [f"says {key} {value}" for key, value in model_metadata(checkpoint.metadata).items()]
    absent = [LABELS[part] for part in COMPONENTS if part not in map(component_of, key_map.sources)]
    # A training may begin without a UNet, and the VAE may come from elsewhere.
    if absent and absent not in ([LABELS["unet"]], [LABELS["vae"]]):
        return f"It holds no {' and no '.join(absent)}: give the whole model"
    said += [f"holds no {part}" for part in absent if said]
    if isinstance(checkpoint, DiffusersFolder):
        said += [f"has no {part}/config.json" for part in COMPONENTS if not checkpoint.config(part)]
    if said:
        return f"It {' and '.join(said)}, and its shapes do not tell the rest: {way_out}"
    if len(candidate_configs(checkpoint, key_map)) > 1:
        return f"Its shapes do not tell whether it predicts noise or velocity: {way_out}"
    return f"Its shapes do not tell: {way_out}"


def same_config(a: ModelConfig, b: ModelConfig) -> bool:
    """Whether two configurations describe the same, whatever they are called."""
    return _complete(a) == _complete(b)


def known_config_path(model: ModelConfig) -> str | None:
    """The path under the project's folder of the YAML that says the same as `model`, None if there is none."""
    return next((path for path in KNOWN if same_config(model, load_model_config(ROOT / path))), None)


def yaml_beside(path: Path, as_folder: bool | None = None) -> Path:
    """Where the model YAML of a checkpoint lies: `x.yaml` beside `x.safetensors`, `folder.yaml` beside `folder`.

    as_folder: whether `path` is one, None for what is there.
    """
    as_folder = is_folder(path) if as_folder is None else as_folder
    return path.parent / f"{path.name}.yaml" if as_folder else path.with_suffix(".yaml")


def _complete(model: ModelConfig) -> dict[str, Any]:
    content = {**model.content(), "architecture": ""}
    for part, defaults in DEFAULTS.items():
        content[part] = {**defaults, **content[part]}
    content["unet"]["attention_resolutions"] = sorted(content["unet"]["attention_resolutions"])
    return content


def _has_sizes(model: ModelConfig, sizes: Mapping[str, Mapping[str, Any]]) -> bool:
    ours = _complete(model)
    return all(ours[part][key] == value for part, found in sizes.items() for key, value in found.items())


# --- what shapes tell: as much as is there, so that a part of a model is judged by what it has ---


def _unet_sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    prefix = COMPONENTS["unet"]
    unet = {name[len(prefix) :]: shape for name, shape in shapes.items() if name.startswith(prefix)}
    contexts = {shape[-1] for name, shape in unet.items() if name.endswith("attn2.to_k.weight") and shape}
    sizes: dict[str, Any] = {"context_dim": contexts.pop()} if len(contexts) == 1 else {}
    first, last = unet.get("input_blocks.0.0.weight", ()), unet.get("out.2.weight", ())
    proj_in = unet.get("middle_block.1.proj_in.weight")
    if len(first) != 4 or len(last) != 4 or not first[0] or proj_in is None:
        return sizes
    widths, layers, attends, level = [], [], [], 0
    for block in range(1, _count(unet, r"input_blocks\.(\d+)\.")):
        if f"input_blocks.{block}.0.op.weight" in unet:
            level += 1
            continue
        if len(layers) == level:
            widths.append(unet.get(f"input_blocks.{block}.0.out_layers.3.weight", (0,))[0])
            layers.append(0)
            attends.append(f"input_blocks.{block}.1.norm.weight" in unet)
        if len(layers) == level + 1:
            layers[level] += 1
    if not layers or len(set(layers)) > 1 or any(width % first[0] for width in widths):
        return sizes
    sizes.update(
        in_channels=first[1],
        model_channels=first[0],
        out_channels=last[0],
        num_res_blocks=layers[0],
        attention_resolutions=[2**i for i, here in enumerate(attends) if here],
        channel_mult=[width // first[0] for width in widths],
        transformer_depth=max(1, _count(unet, r"middle_block\.1\.transformer_blocks\.(\d+)\.")),
        use_linear_in_transformer=len(proj_in) == 2,
    )
    return sizes


def _vae_sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    prefix = COMPONENTS["vae"]
    vae = {name[len(prefix) :]: shape for name, shape in shapes.items() if name.startswith(prefix)}
    names = ("encoder.conv_in.weight", "decoder.conv_in.weight", "decoder.conv_out.weight", "post_quant_conv.weight")
    if any(len(vae.get(name, ())) != 4 for name in names):
        return {}
    first, latent, last, post = (vae[name] for name in names)
    levels = range(_count(vae, r"encoder\.down\.(\d+)\."))
    widths = [vae.get(f"encoder.down.{level}.block.0.conv1.weight", (0,))[0] for level in levels]
    if not first[0] or any(width % first[0] for width in widths):
        return {}
    return dict(
        embed_dim=post[1],
        z_channels=latent[1],
        in_channels=first[1],
        out_ch=last[0],
        ch=first[0],
        ch_mult=[width // first[0] for width in widths],
        num_res_blocks=_count(vae, r"encoder\.down\.0\.block\.(\d+)\."),
    )


def _text_sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    prefix = COMPONENTS["text_encoder"] + "transformer.text_model."
    tokens = shapes.get(f"{prefix}embeddings.token_embedding.weight", ())
    positions = shapes.get(f"{prefix}embeddings.position_embedding.weight", ())
    if len(tokens) != 2 or len(positions) != 2:
        return {}
    layers = _count(shapes, re.escape(prefix) + r"encoder\.layers\.(\d+)\.")
    # The rows of `tokens` are CLIP's vocabulary and the tokens that were added to it, see ldm.weights.added_tokens.
    return dict(width=tokens[1], num_layers=layers, length=positions[0])


def _count(names: Mapping[str, Any], pattern: str) -> int:
    """How many different numbers `pattern` finds at the beginning of the names."""
    found = re.compile(pattern)
    return len({match[1] for match in map(found.match, names) if match})


# --- what a diffusers folder tells besides ---


def _from_folder(
    folder: DiffusersFolder, sizes: Mapping[str, Mapping[str, Any]], prediction_type: str | None
) -> ModelConfig | None:
    """The model of a whole diffusers folder; None where one of its config.json files is not there.

    Raises UserError for settings that the networks here do not have.
    """
    unet, vae, text = (folder.config(component) for component in ("unet", "vae", "text_encoder"))
    if not (unet and vae and text):
        return None
    scheduler = folder.read_json("scheduler/scheduler_config.json")

    def refuse(where: str, key: str, value: Any, wanted: str) -> None:
        raise UserError(f"{folder.path}: {key} in {where} is {plain(repr(value), 60)}{wanted}")

    def check(where: str, settings: Mapping[str, Any], key: str, *allowed: Any) -> None:
        if settings.get(key, allowed[0]) not in allowed:
            refuse(where, key, settings[key], f", which is not supported here (only {' or '.join(map(str, allowed))})")

    def whole(where: str, settings: Mapping[str, Any], key: str, default: int, most: int, least: int = 1) -> int:
        value = settings.get(key, default)
        if type(value) is not int or not least <= value <= most:
            refuse(where, key, value, f"; it must be a whole number from {least} to {most:,}")
        return value

    check("unet/config.json", unet, "act_fn", "silu", "swish")
    check("unet/config.json", unet, "norm_eps", 1e-5)
    check("unet/config.json", unet, "dual_cross_attention", False)
    check("unet/config.json", unet, "only_cross_attention", False)
    check("unet/config.json", unet, "class_embed_type", None)
    check("unet/config.json", unet, "addition_embed_type", None)
    check("vae/config.json", vae, "act_fn", "silu", "swish")
    check("vae/config.json", vae, "shift_factor", None)
    check("scheduler/scheduler_config.json", scheduler, "beta_schedule", "scaled_linear")
    check("scheduler/scheduler_config.json", scheduler, "trained_betas", None)
    check("scheduler/scheduler_config.json", scheduler, "rescale_betas_zero_snr", False)
    check("scheduler/scheduler_config.json", scheduler, "prediction_type", "epsilon", "v_prediction")

    channels = [sizes["unet"]["model_channels"] * mult for mult in sizes["unet"].get("channel_mult", ())]
    # diffusers' `attention_head_dim` counts heads, for historical reasons.
    key = "attention_head_dim" if unet.get("num_attention_heads") is None else "num_attention_heads"
    heads = unet.get(key, 8)
    per_level = heads if isinstance(heads, list) else [heads] * len(channels)
    if len(per_level) != len(channels) or any(
        type(count) is not int or not 1 <= count <= MOST_HEADS for count in per_level
    ):
        refuse(
            "unet/config.json",
            key,
            heads,
            f"; it must be a number from 1 to {MOST_HEADS:,}, or one for each of the {len(channels)} levels",
        )
    head_channels = {channel // count for channel, count in zip(channels, per_level)}
    model = {
        "unet": {
            **sizes["unet"],
            "num_groups": whole("unet/config.json", unet, "norm_num_groups", NUM_GROUPS, MOST_GROUPS),
        },
        "vae": {
            **sizes["vae"],
            "double_z": True,
            "num_groups": whole("vae/config.json", vae, "norm_num_groups", NUM_GROUPS, MOST_GROUPS),
        },
        "text": {
            **sizes["text"],
            "vocab_size": VOCABULARY_SIZE,
            "num_heads": whole("text_encoder/config.json", text, "num_attention_heads", 8, MOST_HEADS),
            "activation": text.get("hidden_act", "quick_gelu"),
        },
    }
    if len(set(per_level)) == 1:
        model["unet"]["num_heads"] = per_level[0]
    elif len(head_channels) == 1:
        model["unet"]["num_head_channels"] = head_channels.pop()
    else:
        refuse(
            "unet/config.json",
            key,
            heads,
            "; the networks here have one number of heads, or of channels a head, for all levels",
        )
    vae_factor = 2 ** (len(sizes["vae"]["ch_mult"]) - 1)
    sample_size = unet.get("sample_size") or 64
    sample_size = sample_size[0] if isinstance(sample_size, list) else sample_size
    whole("unet/config.json", {"sample_size": sample_size}, "sample_size", 64, MOST_SIDE // vae_factor)
    config = ModelConfig(
        path=str(folder.path),
        architecture="custom",
        prediction_type=prediction_type or "epsilon",
        linear_start=scheduler.get("beta_start", 0.00085),
        linear_end=scheduler.get("beta_end", 0.012),
        timesteps=whole(
            "scheduler/scheduler_config.json", scheduler, "num_train_timesteps", 1000, MOST_TIMESTEPS, least=2
        ),
        beta_schedule="scaled_linear",
        scale_factor=vae.get("scaling_factor", 0.18215),
        image_size=sample_size * vae_factor,
        latent_channels=sizes["vae"]["embed_dim"],
        vae_factor=vae_factor,
        context_dim=sizes["unet"]["context_dim"],
        pad_token=_pad_token(folder, text),
        **model,
    )
    document = model_document(config)
    # Its own rule names the architecture of a YAML that does not.
    del document["model"]["architecture"]
    return parse_model_config(document, folder.path)


def _pad_token(folder: DiffusersFolder, text: Mapping[str, Any]) -> str:
    """ "zero" where the tokenizer fills up with the token 0 ("!"), as SD2's does; without a tokenizer as the text
    encoder's activation has it: OpenCLIP's is gelu. Raises UserError where it fills up with an added token.
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
