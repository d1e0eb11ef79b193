"""Loading a base checkpoint into the networks: strict, judged before anything is changed, and reported."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from mindspore import Tensor, nn

from ldm.errors import UserError, plain
from ldm.settings.model import ModelConfig, model_metadata
from ldm.weights.arrays import Arrays, Checkpoint
from ldm.weights.base_model import (
    map_base_model,
    open_base_model,
    open_component,
)
from ldm.weights.diffusers_folder.reader import DiffusersFolder
from ldm.weights.names import COMPONENTS, LABELS, CanonicalArrays, KeyMap, component_of, same_up_to_1x1, source_shape
from ldm.weights.recognise import other_task, version_of_width

logger = logging.getLogger(__name__)


@dataclass
class ComponentReport:
    """What of one network was found in a file; names are canonical, shapes are (in the file, in the network), types
    those of a file's arrays that are no floating-point numbers.
    """

    matched: int = 0
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    wrong_shape: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    wrong_type: list[tuple[str, str]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not (self.missing or self.unexpected or self.wrong_shape or self.wrong_type)

    def __str__(self) -> str:
        counts = (
            (self.matched, "matched"),
            (len(self.missing), "missing"),
            (len(self.unexpected), "unexpected"),
            (len(self.wrong_shape), "of a wrong shape"),
            (len(self.wrong_type), "of a wrong type"),
        )
        return ", ".join(f"{count} {label}" for count, label in counts if count) or "0 matched"


@dataclass
class LoadReport:
    """What loading a file did: per component, with the keys that were left out counted by reason."""

    family: str
    components: dict[str, ComponentReport]
    ignored: dict[str, int]

    @property
    def ok(self) -> bool:
        return all(component.ok for component in self.components.values())

    def __str__(self) -> str:
        text = "; ".join(f"{LABELS[name]}: {component}" for name, component in self.components.items())
        if self.ignored:
            text += "; left out: " + ", ".join(f"{count} ({reason})" for reason, count in self.ignored.items())
        return text


def load_base_model(
    model: nn.Cell,
    path: str | os.PathLike,
    components: Sequence[str] = tuple(COMPONENTS),
    partial: bool = False,
    ema: bool = False,
) -> LoadReport:
    """Load a checkpoint of any family, file or diffusers folder, into a StableDiffusion, or some of its components.

    One array is read at a time and becomes its parameter's own memory, in place of the memory that it had before.

    Args:
        model: has parameters with canonical names; LoRA parameters in it are left alone.
        path: .safetensors, MindSpore .ckpt, PyTorch file, or diffusers folder.
        components: which of "unet", "vae", "text_encoder" to load; the rest of the file is left out, and counted.
        partial: load what fits and leave the rest as it is, instead of an error.
        ema: take the UNet's moving averages, which some published files hold beside its weights.

    Returns:
        The report. Arrays are cast to the parameters' types; a linear layer and a 1x1 convolution stand for each other.

    Raises:
        UserError: the file cannot be read, is not a base checkpoint, or (unless `partial`) does not fit, with counts.
            The model is unchanged then.
    """
    return _load(model, open_base_model(path), components, partial, ema)


def load_component(model: nn.Cell, path: str | os.PathLike, component: str, config: ModelConfig) -> LoadReport:
    """Load one network, "unet" or "vae", in the place of the base's: from a file or folder that holds it alone, under
    its own names, or from any base model. See load_base_model for the rest; raises UserError also where what the file says
    contradicts the model configuration.
    """
    checkpoint = open_component(path, component)
    if component == "unet":  # what it predicts, and for which text embeddings
        check_metadata(checkpoint.metadata, config, path)
    if component == "vae" and isinstance(checkpoint, DiffusersFolder):
        factor = checkpoint.config("vae").get("scaling_factor", config.scale_factor)
        if factor != config.scale_factor:
            raise UserError(
                f"{path} is a VAE with a scaling_factor of {plain(repr(factor))}, the model wants "
                f"{config.scale_factor}: take a VAE of SD1.x or SD2.x"
            )
    return _load(model, checkpoint, (component,))


def _load(
    model: nn.Cell,
    checkpoint: Checkpoint,
    components: Sequence[str],
    partial: bool = False,
    ema: bool = False,
) -> LoadReport:
    key_map = map_base_model(checkpoint, ema)
    if isinstance(checkpoint, DiffusersFolder):
        for note in checkpoint.notes:
            logger.info("%s: %s", checkpoint.path, note)
    parameters = {
        parameter.name: parameter
        for parameter in model.get_parameters()
        if component_of(parameter.name) in components and ".lora_" not in parameter.name
    }
    report = compare_shapes(checkpoint, key_map, {name: tuple(p.shape) for name, p in parameters.items()}, components)
    if not report.ok and not partial:
        way = "; give --vae_ckpt_path with one, such as vae-ft-mse-840000-ema-pruned.safetensors"
        raise UserError(mismatch_message(checkpoint, report) + way * (_absent(report) == ["vae"]))
    if not any(component.matched for component in report.components.values()):
        raise UserError(f"{checkpoint.path}: none of its {len(checkpoint)} arrays fits the model ({report})")
    wrong = {name for part in report.components.values() for name, *_ in (*part.wrong_shape, *part.wrong_type)}
    shapes = {name: tuple(p.shape) for name, p in parameters.items() if name in key_map.sources and name not in wrong}
    canonical = CanonicalArrays(checkpoint, key_map, shapes)
    for name in shapes:
        array = np.asarray(canonical[name], order="C")
        parameters[name].set_data(Tensor(array, dtype=parameters[name].dtype))
        canonical.release(name)
    return report


def check_metadata(metadata: Mapping[str, str], config: ModelConfig, path: str | os.PathLike) -> None:
    """Raise UserError where the texts of the base checkpoint at `path` contradict the model configuration.

    A checkpoint that says nothing passes: its shapes are judged by load_base_model, its prediction type is taken on trust.
    """
    for key, said in model_metadata(metadata).items():
        wanted = getattr(config, key)
        if said != wanted:
            raise UserError(
                f"{path} says that its {key} is {said}, but the model configuration {config.path} has {wanted}: choose "
                "the version or the model YAML that belongs to the checkpoint"
            )


def compare_shapes(
    checkpoint: Arrays, key_map: KeyMap, wanted: dict[str, tuple[int, ...]], components: Sequence[str]
) -> LoadReport:
    """Compare a file's plan with the shapes of the parameters that want to be filled; nothing is read but shapes."""
    reports = {component: ComponentReport() for component in components}
    ignored = Counter(key_map.ignored.values())
    for name, shape in wanted.items():
        report = reports[component_of(name)]
        if name not in key_map.sources:
            report.missing.append(name)
            continue
        source = key_map.sources[name]
        dtype, whole = checkpoint.spec(source.name)
        found = source_shape(whole, source)
        if dtype.kind != "f":  # numbers of a quantised file, which mean nothing without their scales
            report.wrong_type.append((name, dtype.name))
        elif same_up_to_1x1(found, shape):
            report.matched += 1
        else:
            report.wrong_shape.append((name, found, shape))
    for name in key_map.sources:
        component = component_of(name)
        if component not in reports:
            ignored[f"{LABELS[component]}, not asked for"] += 1
        elif name not in wanted:
            reports[component].unexpected.append(name)
    for name in key_map.unknown:
        component = component_of(name)
        if component in COMPONENTS and component not in reports:
            ignored[f"{LABELS[component]}, not asked for"] += 1
        else:
            reports.setdefault(component, ComponentReport()).unexpected.append(name)
    return LoadReport(key_map.family, reports, dict(ignored))


def mismatch_message(checkpoint: Checkpoint, report: LoadReport) -> str:
    """One line on why a file does not fit: what it is where that is known, the counts, an example."""
    why = _architecture_mismatch(report)
    wrong, types, missing, unexpected = (
        [entry for component in report.components.values() for entry in getattr(component, kind)]
        for kind in ("wrong_shape", "wrong_type", "missing", "unexpected")
    )
    absent = [LABELS[component] for component in _absent(report)]
    if not why and absent and not wrong:
        why = f"it holds no {' and no '.join(absent)}"
    example = ""
    if wrong:
        name, found, wanted = wrong[0]
        example = f"; for example {name} is {found}, wanted {wanted}"
    elif types:
        example = f"; for example {types[0][0]} is {types[0][1]}: take the file in fp32, fp16 or bf16"
    elif missing or unexpected:
        example = f"; for example {plain((missing or unexpected)[0])}"
    way = "" if wrong or types or missing else ": take out of the file what no network here has"
    return f"{checkpoint.path} does not fit the model{f': {why}' if why else ''} ({report}{example}){way}"


def _absent(report: LoadReport) -> list[str]:
    """The components of which nothing was found."""
    return [name for name, found in report.components.items() if found.missing and not found.matched]


def _architecture_mismatch(report: LoadReport) -> str:
    for component in report.components.values():
        for name, found, wanted in component.wrong_shape:
            if name.endswith("input_blocks.0.0.weight") and len(found) == 4 and found[1] != wanted[1]:
                task = other_task(found[1])
                return f"it is {task}" if task is not None else ""
    for component in report.components.values():
        for name, found, wanted in component.wrong_shape:
            if name.endswith("attn2.to_k.weight") and found[-1] != wanted[-1]:
                return (
                    f"it is of another architecture, {version_of_width(found[-1])}, and the model configuration "
                    f"describes {version_of_width(wanted[-1])}"
                )
    return ""
