"""Load base models into the networks. A checkpoint has to fit exactly, which is decided before anything is changed."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from mindspore import Tensor, nn

from ldm.errors import UserError, plain
from ldm.settings.model import ModelConfig, is_inpainting, model_metadata
from ldm.weights.arrays import Arrays, Checkpoint
from ldm.weights.base_model import map_base_model, open_base_model, open_component
from ldm.weights.diffusers_folder.reader import DiffusersFolder
from ldm.weights.names import COMPONENTS, LABELS, CanonicalArrays, KeyMap, component_of, same_up_to_1x1, source_shape
from ldm.weights.names.tables import UNET_PREFIX
from ldm.weights.recognise import other_task, version_of_width

logger = logging.getLogger(__name__)

Shape = tuple[int, ...]


@dataclass
class ComponentReport:
    """How the arrays of a checkpoint fit one network.

    Attributes:
        matched: Number of parameters that have their array.
        missing: Canonical names of parameters without an array.
        unexpected: Names of arrays without a parameter.
        wrong_shape: (canonical name, shape in the checkpoint, shape in the network).
        wrong_type: (canonical name, element type in the checkpoint) of arrays that are not floating-point.
    """

    matched: int = 0
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    wrong_shape: list[tuple[str, Shape, Shape]] = field(default_factory=list)
    wrong_type: list[tuple[str, str]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether the arrays are exactly the parameters."""
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
    """How a checkpoint fits the networks.

    Attributes:
        family: Family of its names.
        components: Report of each network.
        ignored: Reason -> number of keys that are left out for it.
    """

    family: str
    components: dict[str, ComponentReport]
    ignored: dict[str, int]

    @property
    def ok(self) -> bool:
        """Whether the checkpoint fits exactly."""
        return all(component.ok for component in self.components.values())

    @property
    def absent(self) -> list[str]:
        """Components that the checkpoint does not hold."""
        return [name for name, component in self.components.items() if component.missing and not component.matched]

    def __str__(self) -> str:
        # A model in pixel space has no VAE: its report is left out.
        parts = {name: part for name, part in self.components.items() if part != ComponentReport()}
        text = "; ".join(f"{LABELS[name]}: {part}" for name, part in parts.items())
        ignored = ", ".join(f"{count} ({reason})" for reason, count in self.ignored.items())
        return f"{text}; left out: {ignored}" if ignored else text


def load_base_model(
    model: nn.Cell, path: str | os.PathLike, components: Sequence[str] = tuple(COMPONENTS), ema: bool = False
) -> LoadReport:
    """Load a base model, or some of its components, into a StableDiffusion.

    One array at a time is read. It becomes the memory of its parameter and replaces the memory that the parameter had.
    Arrays are cast to the types of the parameters. A linear layer can be loaded into a 1x1 convolution and vice versa.

    Args:
        model: Network whose parameters have canonical names. LoRA parameters are left alone.
        path: A .safetensors file, a MindSpore .ckpt, a PyTorch file or a diffusers folder.
        components: Which of "unet", "vae" and "text_encoder" to load. The others are left out and counted.
        ema: Load the moving averages of the UNet's weights, which some published files hold beside the weights.

    Returns:
        How the checkpoint fits.

    Raises:
        UserError: The checkpoint cannot be read, is not a base model, or does not fit. The model is unchanged then.
    """
    return _load(model, open_base_model(path), components, ema)


def load_component(model: nn.Cell, path: str | os.PathLike, component: str, config: ModelConfig) -> LoadReport:
    """Load the weights of one network from a checkpoint of its own, in place of those of the base model.

    Arguments and errors are those of load_base_model and open_component. It is also an error if the checkpoint
    contradicts the configuration.
    """
    checkpoint = open_component(path, component)
    if component == "unet":
        check_metadata(checkpoint.metadata, config, path)
    if component == "vae" and isinstance(checkpoint, DiffusersFolder):
        factor = checkpoint.config("vae").get("scaling_factor", config.scale_factor)
        if factor != config.scale_factor:
            raise UserError(
                f"{path} is a VAE with a scaling_factor of {plain(repr(factor))}, the model has "
                f"{config.scale_factor}: take a VAE of SD1.x or SD2.x"
            )
    return _load(model, checkpoint, (component,))


def _load(model: nn.Cell, checkpoint: Checkpoint, components: Sequence[str], ema: bool = False) -> LoadReport:
    key_map = map_base_model(checkpoint, ema)
    if isinstance(checkpoint, DiffusersFolder):
        for note in checkpoint.notes:
            logger.info("%s: %s", checkpoint.path, note)
    parameters = {
        parameter.name: parameter
        for parameter in model.get_parameters()
        if component_of(parameter.name) in components and ".lora_" not in parameter.name
    }
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    report = compare_shapes(checkpoint, key_map, shapes, components)
    if not report.ok:
        way_out = "; give --vae_ckpt_path with one, such as vae-ft-mse-840000-ema-pruned.safetensors"
        lacks_vae = not any(
            part.missing or part.wrong_shape for name, part in report.components.items() if name != "vae"
        )
        raise UserError(mismatch_message(checkpoint, report) + way_out * (lacks_vae and report.absent == ["vae"]))
    canonical = CanonicalArrays(checkpoint, key_map, shapes)
    for name, parameter in parameters.items():
        array = np.asarray(canonical[name], order="C")
        parameter.set_data(Tensor(array, dtype=parameter.dtype))
        canonical.release(name)
    return report


def check_metadata(metadata: Mapping[str, str], config: ModelConfig, path: str | os.PathLike) -> None:
    """Raise UserError if the metadata of the base model at `path` contradicts the configuration.

    A checkpoint without such metadata passes. load_base_model checks its shapes; its prediction type is not checked.
    """
    for key, stated in model_metadata(metadata).items():
        if stated != getattr(config, key):
            raise UserError(
                f"{path} says that its {key} is {stated}, but the model configuration {config.path} has "
                f"{getattr(config, key)}: choose the version or the model YAML that belongs to the checkpoint"
            )


def compare_shapes(
    checkpoint: Arrays, key_map: KeyMap, wanted: Mapping[str, Shape], components: Sequence[str]
) -> LoadReport:
    """Compare the arrays of a checkpoint with the parameters of some components, without reading them.

    `wanted` has the shapes of the parameters under their canonical names.
    """
    reports = {component: ComponentReport() for component in components}
    ignored = Counter(key_map.ignored.values())
    for name, shape in wanted.items():
        report = reports[component_of(name)]
        if name not in key_map.sources:
            report.missing.append(name)
            continue
        source = key_map.sources[name]
        dtype, key_shape = checkpoint.spec(source.name)
        array_shape = source_shape(key_shape, source)
        if dtype.kind != "f":  # the integers of a quantized file mean nothing without their scales
            report.wrong_type.append((name, dtype.name))
        elif same_up_to_1x1(array_shape, shape):
            report.matched += 1
        else:
            report.wrong_shape.append((name, array_shape, shape))
    for name in (*key_map.sources, *key_map.unknown):
        component = component_of(name)
        if component in COMPONENTS and component not in reports:
            ignored[f"{LABELS[component]}, not asked for"] += 1
        elif name not in wanted:
            reports.setdefault(component, ComponentReport()).unexpected.append(name)
    return LoadReport(key_map.family, reports, dict(ignored))


def mismatch_message(checkpoint: Checkpoint, report: LoadReport) -> str:
    """Say in one line why a checkpoint does not fit: what it is where that is known, the counts, and an example."""
    reason = _architecture_mismatch(report)
    parts = report.components.values()
    wrong_shape = [entry for part in parts for entry in part.wrong_shape]
    wrong_type = [entry for part in parts for entry in part.wrong_type]
    missing = [name for part in parts for name in part.missing]
    unexpected = [name for part in parts for name in part.unexpected]
    if not reason and report.absent and not wrong_shape:
        reason = f"it holds no {' and no '.join(LABELS[component] for component in report.absent)}"
    example = way_out = ""
    if wrong_shape:
        name, shape, wanted = wrong_shape[0]
        example = f"; for example {name} is {shape}, wanted {wanted}"
    elif wrong_type:
        name, dtype = wrong_type[0]
        example = f"; for example {name} is {dtype}: take the file in fp32, fp16 or bf16"
    elif missing or unexpected:
        example = f"; for example {plain((missing or unexpected)[0])}"
    if not (wrong_shape or wrong_type or missing):
        way_out = ": remove the arrays that the networks do not have from the file"
    return f"{checkpoint.path} does not fit the model{f': {reason}' if reason else ''} ({report}{example}){way_out}"


def _architecture_mismatch(report: LoadReport) -> str:
    parts = report.components.values()
    wrong_shape = {name: (shape, wanted) for part in parts for name, shape, wanted in part.wrong_shape}
    shape, wanted = wrong_shape.get(f"{UNET_PREFIX}input_blocks.0.0.weight", ((), ()))
    if len(shape) == 4 and shape[1] != wanted[1]:
        # Without an entry, the output has as many channels as the model's latents.
        out_shape, _ = wrong_shape.get(f"{UNET_PREFIX}out.2.weight", ((wanted[1],), ()))
        task = other_task(shape[1], next(iter(out_shape), 0))
        if task is not None:
            return f"it is {task}"
        inpaints, wanted_inpaints = (is_inpainting(channels, 4) for channels in (shape[1], wanted[1]))
        if inpaints != wanted_inpaints:
            kinds = "an inpainting model", "no inpainting model"
            return (
                f"it is {kinds[not inpaints]} (its UNet takes {shape[1]} channels), and the model configuration is of "
                f"{kinds[inpaints]} ({wanted[1]} channels): leave out the version and the model's YAML, or choose that "
                "of the checkpoint"
            )
        return f"its UNet takes {shape[1]} channels, that of the model configuration {wanted[1]}"
    vae = report.components.get("vae")
    if vae is not None and vae.unexpected and not (vae.matched or vae.missing or vae.wrong_shape or vae.wrong_type):
        return "it has a VAE, and the model configuration describes a model in pixel space, which has none"
    for name, (shape, wanted) in wrong_shape.items():
        if name.endswith("attn2.to_k.weight") and shape[-1] != wanted[-1]:
            return (
                f"it is of another architecture, {version_of_width(shape[-1])}, and the model configuration describes "
                f"{version_of_width(wanted[-1])}"
            )
    return ""
