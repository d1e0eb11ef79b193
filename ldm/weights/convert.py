"""Convert a base model from any form into any other, one array at a time."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import yaml

from ldm.errors import UserError, plain
from ldm.files.atomic import atomic_path
from ldm.files.inputs import is_file
from ldm.files.paths import check_free, writing
from ldm.models.stable_diffusion import build_model
from ldm.settings.model import ModelConfig, load_model_config, model_document, model_metadata
from ldm.weights.added_tokens import tokens_metadata, with_added_tokens, without_added_tokens
from ldm.weights.architecture import candidate_configs, known_config_path, missing_information, same_config, yaml_beside
from ldm.weights.arrays import Arrays, ArraysInMemory, Checkpoint, CheckpointView
from ldm.weights.base_model import map_base_model, open_base_model
from ldm.weights.checkpoint import write_checkpoint
from ldm.weights.diffusers_folder.writer import write_folder
from ldm.weights.load import LoadReport, check_metadata, compare_shapes, mismatch_message
from ldm.weights.names import COMPONENTS, CanonicalArrays, KeyMap, compvis, diffusers, mindone
from ldm.weights.names.tables import TEXT_PREFIX, Concatenation

logger = logging.getLogger(__name__)

# Suffix of the target -> format if none is given.
FORMAT_OF_SUFFIX = {".safetensors": "ldm", ".ckpt": "mindone", "": "diffusers"}
# Format -> suffixes that its targets may have, "" for a folder.
SUFFIXES = {"ldm": (".safetensors",), "diffusers": ("",), "mindone": (".ckpt",), "own": (".safetensors", ".ckpt")}
DTYPES = {"keep": None, "fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16)}


class ConvertedArrays(Arrays):
    """Arrays of another family of names, made of canonical ones when they are asked for.

    Args:
        canonical: The canonical arrays.
        layout: Name -> canonical arrays that make it up.
        dtype: Element type of floating-point arrays, None to keep that of each array.
    """

    def __init__(self, canonical: CanonicalArrays, layout: Mapping[str, Concatenation], dtype: np.dtype | None = None):
        self._canonical, self._layout, self._dtype = canonical, layout, dtype

    def spec(self, name: str) -> tuple[np.dtype, tuple[int, ...]]:
        specs = [self._canonical.spec(part) for part in self._layout[name].names]
        dtype = np.result_type(*(dtype for dtype, _ in specs))
        if self._dtype is not None and dtype.kind == "f":
            dtype = self._dtype
        shape = specs[0][1] if len(specs) == 1 else (sum(shape[0] for _, shape in specs), *specs[0][1][1:])
        return dtype, self._layout[name].shape or shape

    def __getitem__(self, name: str) -> np.ndarray:
        dtype, shape = self.spec(name)
        parts = [self._canonical[part] for part in self._layout[name].names]
        array = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return _cast(name, array.reshape(shape), dtype)

    def release(self, name: str) -> None:
        for part in self._layout[name].names:
            self._canonical.release(part)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layout)

    def __len__(self) -> int:
        return len(self._layout)


def _cast(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = array.astype(dtype, copy=False)
    if cast.dtype.itemsize < array.dtype.itemsize and not np.isfinite(cast).all() and np.isfinite(array).all():
        raise UserError(f"{name} has values up to {np.abs(array).max():g}, too large for fp16: keep fp32 (--dtype)")
    return cast


def convert(
    source: str | Path,
    target: str | Path,
    format: str | None = None,
    dtype: str = "keep",
    ema: bool = False,
    model_config: str | Path | None = None,
    prediction_type: str | None = None,
) -> LoadReport:
    """Convert a base model, and write a model YAML beside it if it is none of the models in configs/.

    Args:
        source: File or folder of any form.
        target: What to write.
        format: "ldm" (the single file of CompVis and Stability AI), "diffusers" (a folder), "mindone" or "own" (the
            names of this project). None for the format of the target's suffix in FORMAT_OF_SUFFIX.
        dtype: "fp32" or "fp16" for all weights, or "keep". bfloat16 becomes fp32.
        ema: Take the moving averages of the UNet's weights in place of the weights.
        model_config: Model YAML, if the source does not say which model it is.
        prediction_type: "epsilon" or "v_prediction", if the source does not say it.

    Returns:
        How the source fits the networks.

    Raises:
        UserError: The source is not a whole base model or does not say which one, the target exists or its suffix is
            not one of the format, a value is too large for fp16, or the disk refuses.
    """
    source, target = Path(source), Path(target)
    format = target_format(target, format)
    checkpoint = open_base_model(source)
    key_map = map_base_model(checkpoint, ema)
    configs = _configs_of_source(checkpoint, key_map, format, model_config, prediction_type)
    config = configs[0]
    is_certain = len(configs) == 1  # else only the prediction type is unknown
    if format == "diffusers":
        _check_diffusers_sizes(config)
    beside = yaml_beside(target, as_folder=format == "diffusers")
    has_yaml = is_file(beside)
    without_tokens = [without_added_tokens(other) for other in configs]  # a YAML has none, the checkpoint names them
    if has_yaml and not any(same_config(load_model_config(beside), other) for other in without_tokens):
        raise UserError(
            f"{beside} describes another model, and is read together with {target}: choose another name, or remove it "
            "first"
        )

    canonical, shapes, report = fit_networks(checkpoint, key_map, config)
    metadata = {"architecture": config.architecture, **tokens_metadata(config.added_tokens)}
    if is_certain:
        metadata["prediction_type"] = config.prediction_type
    if config.added_tokens and format in ("ldm", "mindone"):
        logger.warning(
            "%s: only this project reads the %d added tokens (%s) from such a file, and other programs may refuse its "
            "token embedding; a diffusers folder holds them for all",
            target, len(config.added_tokens), ", ".join(plain(added.text, 60) for added in config.added_tokens[:3]),
        )  # fmt: skip

    if format == "diffusers":
        write_diffusers_folder(target, canonical, shapes, config, dtype)
    else:
        constants: dict[str, np.ndarray] = {}
        if format == "ldm":
            layout = compvis.layout(shapes, openclip=config.pad_token == "zero")
            constants, kept = _published_constants(checkpoint, key_map, config, shapes, dtype)
            report.ignored = dict(Counter(report.ignored) - Counter(key_map.ignored[name] for name in kept))
            metadata["format"] = "pt"
        elif format == "mindone":
            layout = mindone.layout(shapes)
        else:
            layout = {name: Concatenation((name,)) for name in shapes}
        converted = ConvertedArrays(canonical, layout, DTYPES[dtype])
        unchanged = ArraysInMemory(constants)
        arrays = CheckpointView()
        arrays.sources = {name: (part, name) for part in (converted, unchanged) for name in part}
        write_checkpoint(target, arrays, metadata)
    if is_certain and known_config_path(without_tokens[0]) is None and not has_yaml:
        _write_yaml(beside, without_tokens[0], source)
    return report


def _configs_of_source(
    checkpoint: Checkpoint, key_map: KeyMap, format: str, model_config: str | Path | None, prediction_type: str | None
) -> list[ModelConfig]:
    """Return the configurations that the source may have: one, or several if only the prediction type is unknown.

    Raises UserError if there is none, if the format needs the prediction type, and for contradictions.
    """
    source = checkpoint.path
    if model_config is not None:
        configs = [with_added_tokens(load_model_config(model_config), checkpoint, key_map)]
    else:
        configs = candidate_configs(checkpoint, key_map, prediction_type)
    if not configs:
        reason = missing_information(checkpoint, key_map, "add --model_config with its YAML")
        raise UserError(f"which model is {source}? {reason}")
    if len(configs) > 1 and format == "diffusers":
        reason = missing_information(checkpoint, key_map, "add --prediction_type epsilon or v_prediction")
        raise UserError(f"a diffusers folder says whether noise or velocity is predicted. {source}: {reason}")
    if prediction_type is not None:
        stated = model_metadata(checkpoint.metadata).get("prediction_type", prediction_type)
        for where, other in ((source, stated), (configs[0].path, configs[0].prediction_type)):
            if other != prediction_type:
                raise UserError(
                    f"--prediction_type {prediction_type} contradicts {where}, which has {other}: leave it out, or "
                    "choose another YAML"
                )
    if len(configs) == 1:
        check_metadata(checkpoint.metadata, configs[0], source)
    return configs


def _published_constants(
    checkpoint: Checkpoint, key_map: KeyMap, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], dtype: str
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return what a published single file holds beside the weights, and which keys of it come from the source."""
    constants = compvis.schedule_buffers(config.linear_start, config.linear_end, config.timesteps)
    if config.pad_token != "zero":  # SD1's Hugging Face text encoder
        length = shapes[f"{TEXT_PREFIX}embeddings.position_embedding.weight"][0]
        constants[compvis.POSITION_IDS] = np.arange(length, dtype=np.int64)[None]
    # Such as the layer of SD2's text encoder that is not used.
    kept = [name for name in key_map.ignored if key_map.family == "ldm" and compvis.is_published(name)]
    for name in kept:
        array = checkpoint[name]
        is_weight = "." in name and array.dtype.kind == "f"  # names of the noise schedule have no dot
        constants[name] = _cast(name, array, DTYPES[dtype] or array.dtype) if is_weight else array
    return constants, kept


def fit_networks(
    checkpoint: Checkpoint, key_map: KeyMap, config: ModelConfig
) -> tuple[CanonicalArrays, dict[str, tuple[int, ...]], LoadReport]:
    """Return the arrays of a base model under canonical names, their shapes in the networks' order, and a report.

    Raises:
        UserError: The checkpoint does not fit the networks.
    """
    parameters = build_model(config, random=False).get_parameters()
    shapes = {parameter.name: tuple(parameter.shape) for parameter in parameters}
    report = compare_shapes(checkpoint, key_map, shapes, tuple(COMPONENTS))
    if not report.ok:
        raise UserError(mismatch_message(checkpoint, report))
    return CanonicalArrays(checkpoint, key_map, shapes), shapes, report


def write_diffusers_folder(
    path: Path, canonical: CanonicalArrays, shapes: Mapping[str, tuple[int, ...]], config: ModelConfig, dtype: str
) -> None:
    """Write canonical arrays as a diffusers folder. Shapes are those of the networks, `dtype` is a key of DTYPES."""
    layouts: dict[str, dict[str, Concatenation]] = {component: {} for component in COMPONENTS}
    for key, concatenation in diffusers.layout(shapes, config).items():
        component, _, name = key.partition("/")
        layouts[component][name] = concatenation
    parts = {component: ConvertedArrays(canonical, layout, DTYPES[dtype]) for component, layout in layouts.items()}
    write_folder(path, config, parts)


def _check_diffusers_sizes(config: ModelConfig) -> None:
    """Raise UserError for a model whose sizes diffusers' networks cannot have."""
    unet, vae = config.unet, config.vae
    if config.in_pixel_space:
        raise UserError(
            f"{config.path} is a model in pixel space, and the pipelines that read a diffusers folder need a VAE: "
            "write ldm, mindone or own"
        )
    if unet["channel_mult"][0] != 1 or vae["ch_mult"][0] != 1:
        raise UserError(
            f"{config.path}: channel_mult and ch_mult must begin with 1 in a diffusers folder, whose first "
            "convolution is as wide as the first level; write ldm or own"
        )
    if vae["z_channels"] != vae["embed_dim"]:
        raise UserError(
            f"{config.path}: z_channels {vae['z_channels']} and embed_dim {vae['embed_dim']} are one number "
            "in a diffusers folder; write ldm or own"
        )


def target_format(target: Path, format: str | None) -> str:
    """Return the format to write: the given one, or that of the target's suffix.

    Raises UserError if the suffix is not one of the format, or if something is at `target`.
    """
    suffix = target.suffix if target.suffix in (".safetensors", ".ckpt", ".bin", ".pt", ".pth") else ""
    if format is None:
        if suffix not in FORMAT_OF_SUFFIX:
            raise UserError(f"{target}: {suffix} is not written; give a .safetensors, a .ckpt or a folder")
        format = FORMAT_OF_SUFFIX[suffix]
    if suffix not in SUFFIXES[format]:
        words = " or ".join(suffix or "a folder's name, without suffix" for suffix in SUFFIXES[format])
        raise UserError(f"{target} is no name for the format {format}, which wants {words}")
    check_free(target, empty_folder=format == "diffusers")
    return format


def _write_yaml(path: Path, config: ModelConfig, source: Path) -> None:
    text = f"# The model of {source.name}, as it was converted.\n"
    text += yaml.safe_dump(model_document(config), sort_keys=False, allow_unicode=True, width=120)
    with writing(path), atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    assert same_config(config, load_model_config(path))
    logger.info("%s: the YAML of the model, for --config and --model_config", path)
