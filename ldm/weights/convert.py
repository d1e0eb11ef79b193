"""A base model from any form into any other, one array at a time."""

from __future__ import annotations

import logging
import os
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
from ldm.weights.arrays import Arrays
from ldm.weights.base_model import map_base_model, open_base_model
from ldm.weights.checkpoint import write_checkpoint
from ldm.weights.diffusers_folder.writer import write_folder
from ldm.weights.load import LoadReport, check_metadata, compare_shapes, mismatch_message
from ldm.weights.names import COMPONENTS, CanonicalArrays, compvis, diffusers, mindone
from ldm.weights.names.tables import TEXT_PREFIX, Concatenation

logger = logging.getLogger(__name__)

FORMS = ("ldm", "diffusers", "mindone", "own")
FORMAT_OF_SUFFIX = {".safetensors": "ldm", ".ckpt": "mindone", "": "diffusers"}
SUFFIXES_OF = {"ldm": (".safetensors",), "mindone": (".ckpt",), "own": (".safetensors", ".ckpt")}
DTYPES = {"keep": None, "fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16)}


class ConvertedArrays(Arrays):
    """Arrays under the names of another family, made of canonical ones when they are asked for.

    dtype: of the floating-point arrays, None for each its own. constants: further arrays, given as they are.
    """

    def __init__(
        self,
        canonical: CanonicalArrays,
        made: Mapping[str, Concatenation],
        dtype: np.dtype | None = None,
        constants: Mapping[str, np.ndarray] | None = None,
    ):
        self._canonical, self._made, self._dtype = canonical, made, dtype
        self._constants = constants or {}

    def spec(self, name: str) -> tuple[np.dtype, tuple[int, ...]]:
        if name in self._constants:
            return self._constants[name].dtype, self._constants[name].shape
        made = self._made[name]
        specs = [self._canonical.spec(part) for part in made.names]
        dtype = np.result_type(*(own for own, _ in specs))
        if self._dtype is not None and dtype.kind == "f":
            dtype = self._dtype
        shape = specs[0][1] if len(specs) == 1 else (sum(own[0] for _, own in specs), *specs[0][1][1:])
        return dtype, made.shape or shape

    def __getitem__(self, name: str) -> np.ndarray:
        if name in self._constants:
            return self._constants[name]
        dtype, shape = self.spec(name)
        parts = [self._canonical[part] for part in self._made[name].names]
        array = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return _cast(name, array.reshape(shape), dtype)

    def release(self, name: str) -> None:
        if name in self._made:
            for part in self._made[name].names:
                self._canonical.release(part)

    def __iter__(self) -> Iterator[str]:
        yield from self._made
        yield from self._constants

    def __len__(self) -> int:
        return len(self._made) + len(self._constants)


def _cast(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = array.astype(dtype, copy=False)
    if cast.dtype.itemsize < array.dtype.itemsize and not np.isfinite(cast).all() and np.isfinite(array).all():
        raise UserError(f"{name} has values up to {np.abs(array).max():g}, too large for fp16: keep fp32 (--dtype)")
    return cast


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    form: str | None = None,
    dtype: str = "keep",
    ema: bool = False,
    model_config: str | os.PathLike | None = None,
    prediction_type: str | None = None,
) -> LoadReport:
    """Write the base model `source`, a file or folder of any form, to `target`; beside it a model YAML where the model
    is none of configs/.

    Args:
        form: "ldm" (CompVis's and Stability AI's single file), "diffusers" (a folder), "mindone", "own" (this project's
            names); None for the one that goes with the target's suffix, see FORMAT_OF_SUFFIX.
        dtype: "fp32" or "fp16" for all weights, "keep" for each as it is (bfloat16 becomes fp32).
        ema: the UNet's moving averages in place of its weights.
        model_config: the model YAML, where the source does not say enough.
        prediction_type: "epsilon" or "v_prediction", where the source does not say it.

    Returns:
        What of the source was taken.

    Raises:
        UserError: the source is no complete base model or not known well enough, the target exists or its suffix is not
            the form's, a value is too large for fp16, the disk refuses.
    """
    source, target = Path(source), Path(target)
    form = target_format(target, form)
    checkpoint = open_base_model(source)
    key_map = map_base_model(checkpoint, ema)
    if model_config is not None:
        found = [with_added_tokens(load_model_config(model_config), checkpoint, key_map)]
    else:
        found = candidate_configs(checkpoint, key_map, prediction_type)
    if not found:
        raise UserError(
            f"which model is {source}? {missing_information(checkpoint, key_map, 'add --model_config with its YAML')}"
        )
    if len(found) > 1 and form == "diffusers":
        says = missing_information(checkpoint, key_map, "add --prediction_type epsilon or v_prediction")
        raise UserError(f"a diffusers folder says whether noise or velocity is predicted. {source}: {says}")
    model = found[0]
    if prediction_type is not None:
        said = model_metadata(checkpoint.metadata).get("prediction_type", prediction_type)
        for where, other in ((source, said), (model.path, model.prediction_type)):
            if other != prediction_type:
                raise UserError(
                    f"--prediction_type {prediction_type} contradicts {where}, which has {other}: leave it "
                    "out, or choose another YAML"
                )
    if len(found) == 1:
        check_metadata(checkpoint.metadata, model, source)
    if form == "diffusers":
        check_diffusers_sizes(model)
    beside = yaml_beside(target, as_folder=form == "diffusers")
    there = is_file(beside)
    architectures = [without_added_tokens(other) for other in found]  # the tokens are told by the checkpoint itself
    if there and not any(same_config(load_model_config(beside), other) for other in architectures):
        raise UserError(
            f"{beside} describes another model, and is read wherever {target} is: choose another name, or "
            "remove it first"
        )

    networks = build_model(model, random=False)
    shapes = {parameter.name: tuple(parameter.shape) for parameter in networks.get_parameters()}
    del networks
    report = compare_shapes(checkpoint, key_map, shapes, tuple(COMPONENTS))
    if not report.ok:
        raise UserError(mismatch_message(checkpoint, report))
    canonical = CanonicalArrays(checkpoint, key_map, shapes)
    metadata = {"architecture": model.architecture, **tokens_metadata(model.added_tokens)}
    if model.added_tokens and form in ("ldm", "mindone"):
        logger.warning(
            "%s holds %d added tokens (%s) for this project alone: other programs read no tokens from such a file, and "
            "may refuse its token embedding; a diffusers folder holds them for all",
            target, len(model.added_tokens), ", ".join(plain(added.text, 60) for added in model.added_tokens[:3]),
        )  # fmt: skip
    if len(found) == 1:
        metadata["prediction_type"] = model.prediction_type

    if form == "diffusers":
        write_folder(target, model, diffusers_arrays(canonical, shapes, model, DTYPES[dtype]))
    else:
        constants: dict[str, np.ndarray] = {}
        if form == "ldm":
            openclip = model.pad_token == "zero"
            made = compvis.layout(shapes, openclip)
            constants = compvis.schedule_buffers(model.linear_start, model.linear_end, model.timesteps)
            if not openclip:
                length = shapes[f"{TEXT_PREFIX}embeddings.position_embedding.weight"][0]
                constants[compvis.POSITION_IDS] = np.arange(length, dtype=np.int64)[None]
            if key_map.family == "ldm":  # what a published file holds besides, SD2's unused layer for example
                kept = [name for name in key_map.ignored if compvis.is_published(name)]
                for name in kept:
                    array = checkpoint[name]
                    is_weight = "." in name and array.dtype.kind == "f"  # the noise schedule's names have no dot
                    constants[name] = _cast(name, array, DTYPES[dtype] or array.dtype) if is_weight else array
                report.ignored = dict(Counter(report.ignored) - Counter(key_map.ignored[name] for name in kept))
            metadata["format"] = "pt"
        elif form == "mindone":
            made = mindone.layout(shapes)
        else:
            made = {name: Concatenation((name,)) for name in shapes}
        write_checkpoint(target, ConvertedArrays(canonical, made, DTYPES[dtype], constants), metadata)
    if len(found) == 1 and known_config_path(architectures[0]) is None and not there:
        _write_yaml(beside, architectures[0], source)
    return report


def diffusers_arrays(
    canonical: CanonicalArrays, shapes: Mapping[str, tuple[int, ...]], model: ModelConfig, dtype: np.dtype | None = None
) -> dict[str, ConvertedArrays]:
    """The arrays of a diffusers folder's networks, for write_folder; `shapes` are those of the canonical ones."""
    made = diffusers.layout(shapes, model)
    return {
        component: ConvertedArrays(
            canonical,
            {name.partition("/")[2]: how for name, how in made.items() if name.startswith(f"{component}/")},
            dtype,
        )
        for component in COMPONENTS
    }


def check_diffusers_sizes(model: ModelConfig) -> None:
    """Raise UserError for a model whose sizes diffusers' networks cannot have."""
    unet, vae = model.unet, model.vae
    if unet["channel_mult"][0] != 1 or vae["ch_mult"][0] != 1:
        raise UserError(
            f"{model.path}: channel_mult and ch_mult must begin with 1 in a diffusers folder, whose first "
            "convolution is as wide as the first level; write ldm or own"
        )
    if vae["z_channels"] != vae["embed_dim"]:
        raise UserError(
            f"{model.path}: z_channels {vae['z_channels']} and embed_dim {vae['embed_dim']} are one number "
            "in a diffusers folder; write ldm or own"
        )


def target_format(target: Path, form: str | None) -> str:
    """The form that `target` is written in: the one given, or the one of its suffix. Raises UserError for a suffix that
    is not the form's, and where something is there.
    """
    suffix = target.suffix if target.suffix in (".safetensors", ".ckpt", ".bin", ".pt", ".pth") else ""
    if form is None:
        if suffix not in FORMAT_OF_SUFFIX:
            raise UserError(f"{target}: {suffix} is not written; give a .safetensors, a .ckpt or a folder")
        form = FORMAT_OF_SUFFIX[suffix]
    wanted = SUFFIXES_OF.get(form, ("",))
    if suffix not in wanted:
        words = " or ".join(suffix or "a folder's name, without suffix" for suffix in wanted)
        raise UserError(f"{target} is no name for the format {form}, which wants {words}")
    check_free(target, empty_folder=form == "diffusers")
    return form


def _write_yaml(path: Path, model: ModelConfig, source: Path) -> None:
    text = f"# The model of {source.name}, as it was converted.\n"
    text += yaml.safe_dump(model_document(model), sort_keys=False, allow_unicode=True, width=120)
    with writing(path), atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    assert same_config(model, load_model_config(path))
    logger.info("%s: the model's YAML, for --config and --model_config", path)
