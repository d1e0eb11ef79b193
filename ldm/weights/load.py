"""Loading a base checkpoint into the networks: strict, judged before anything is changed, and reported."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from mindspore import Tensor, nn

from ldm.config.model import ModelConfig, model_metadata
from ldm.errors import UserError
from ldm.weights.names import (
    COMPONENTS,
    LABELS,
    Plan,
    component_of,
    detect_family,
    plan_names,
    same_up_to_1x1,
    take,
    taken_shape,
)
from ldm.weights.read import Checkpoint, open_checkpoint

CONTEXT_OF = {768: "SD1.x", 1024: "SD2.x"}
_LORA_MARKS = (
    ".lora_down.", ".lora_up.", "lora_unet_", "lora_te", ".lora_A.", ".lora_B.", "_lora.", ".lora.up.", ".lora.down.",
    ".lora_linear_layer.", ".hada_w", ".lokr_w", "unet:", "text_encoder:",
)  # fmt: skip


@dataclass
class ComponentReport:
    """What of one network was found in a file; names are canonical, shapes are (in the file, in the network)."""

    matched: int = 0
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    wrong_shape: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not (self.missing or self.unexpected or self.wrong_shape)

    def __str__(self) -> str:
        counts = (
            (self.matched, "matched"),
            (len(self.missing), "missing"),
            (len(self.unexpected), "unexpected"),
            (len(self.wrong_shape), "of a wrong shape"),
        )
        return ", ".join(f"{count} {label}" for count, label in counts if count) or "0 matched"


@dataclass
class LoadReport:
    """What loading a file did: per component, with the keys that were left out counted by reason."""

    path: str
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


def load_base(
    model: nn.Cell, path: str | os.PathLike, components: Sequence[str] = tuple(COMPONENTS), partial: bool = False
) -> LoadReport:
    """Load a checkpoint of any single-file family into a StableDiffusion, or some of its components.

    Args:
        model: has parameters with canonical names; LoRA parameters in it are left alone.
        path: .safetensors or MindSpore .ckpt.
        components: which of "unet", "vae", "text_encoder" to load; the rest of the file is left out, and counted.
        partial: load what fits and leave the rest as it is, instead of an error.

    Returns:
        The report. Arrays are cast to the parameters' types; a linear layer and a 1x1 convolution stand for each other.

    Raises:
        UserError: the file cannot be read, is not a base checkpoint, or (unless `partial`) does not fit, with counts.
            The model is unchanged then.
    """
    checkpoint = open_checkpoint(path)
    plan = _plan(checkpoint)
    parameters = {
        parameter.name: parameter
        for parameter in model.get_parameters()
        if component_of(parameter.name) in components and ".lora_" not in parameter.name
    }
    report = compare(checkpoint, plan, {name: tuple(p.shape) for name, p in parameters.items()}, components)
    if not report.ok and not partial:
        raise UserError(_refusal(checkpoint, plan, report))
    if not any(component.matched for component in report.components.values()):
        raise UserError(f"{path}: none of its {len(checkpoint)} arrays fits the model ({report})")
    wrong = {name for component in report.components.values() for name, _, _ in component.wrong_shape}
    for name, parameter in parameters.items():
        if name in plan.sources and name not in wrong:
            array = take(checkpoint, plan.sources[name]).reshape(parameter.shape)
            parameter.set_data(Tensor(np.ascontiguousarray(array), dtype=parameter.dtype))
    return report


def check_base_metadata(metadata: Mapping[str, str], config: ModelConfig, path: str | os.PathLike) -> None:
    """Raise UserError where the texts of the base checkpoint at `path` contradict the model configuration.

    A checkpoint that says nothing passes: its shapes are judged by load_base, its prediction type is taken on trust.
    """
    for key, said in model_metadata(metadata).items():
        wanted = getattr(config, key)
        if said != wanted:
            raise UserError(
                f"{path} says that its {key} is {said}, but the model configuration {config.path} has {wanted}: choose "
                "the version or the model YAML that belongs to the checkpoint"
            )


def compare(
    checkpoint: Checkpoint, plan: Plan, wanted: dict[str, tuple[int, ...]], components: Sequence[str]
) -> LoadReport:
    """Compare a file's plan with the shapes of the parameters that want to be filled; nothing is read but shapes."""
    reports = {component: ComponentReport() for component in components}
    ignored = Counter(plan.ignored.values())
    for name, shape in wanted.items():
        report = reports[component_of(name)]
        if name not in plan.sources:
            report.missing.append(name)
            continue
        source = plan.sources[name]
        found = taken_shape(checkpoint.shape(source.name), source)
        if same_up_to_1x1(found, shape):
            report.matched += 1
        else:
            report.wrong_shape.append((name, found, shape))
    for name in plan.sources:
        component = component_of(name)
        if component not in reports:
            ignored[f"{LABELS[component]}, not asked for"] += 1
        elif name not in wanted:
            reports[component].unexpected.append(name)
    for name in plan.unknown:
        reports.setdefault(component_of(name), ComponentReport()).unexpected.append(name)
    return LoadReport(str(checkpoint.path), plan.family, reports, dict(ignored))


def _plan(checkpoint: Checkpoint) -> Plan:
    names = list(checkpoint)
    path = checkpoint.path
    if sum(any(mark in name for mark in _LORA_MARKS) for name in names) * 2 > len(names):
        raise UserError(f"{path} is a LoRA file, not a base checkpoint: give it as --lora_ckpt_path")
    if any(name.startswith("conditioner.embedders.") for name in names):
        raise UserError(f"{path} is an SDXL checkpoint; only SD1.x and SD2.x are supported")
    if detect_family(names) is None:
        part = _diffusers_part(names)
        if part:
            raise UserError(
                f"{path} is the {part} of a diffusers folder alone, not a single-file checkpoint: "
                "give a file that holds the whole model"
            )
        if names and all(name in ("emb_params", "string_to_param") or name.startswith("<") for name in names):
            raise UserError(f"{path} is a textual-inversion embedding, not a base checkpoint")
        shown = ", ".join(names[:2]) or "none"
        raise UserError(f"{path} is not a Stable Diffusion checkpoint: {len(names)} unknown names ({shown}, ...)")
    try:
        return plan_names(names)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _diffusers_part(names: list[str]) -> str | None:
    if any(name.startswith("down_blocks.") for name in names):
        return "UNet"
    if any(name.startswith("encoder.down_blocks.") for name in names):
        return "VAE"
    if any(name.startswith("text_model.") for name in names):
        return "text encoder"
    return None


def _refusal(checkpoint: Checkpoint, plan: Plan, report: LoadReport) -> str:
    """One line on why a file does not fit: what it is where that is known, the counts, an example."""
    why = _architecture_mismatch(report)
    wrong, missing, unexpected = (
        [entry for component in report.components.values() for entry in getattr(component, kind)]
        for kind in ("wrong_shape", "missing", "unexpected")
    )
    empty = [LABELS[name] for name, found in report.components.items() if found.missing and not found.matched]
    if not why and empty and not wrong:
        why = f"it holds no {' and no '.join(empty)}"
    example = ""
    if wrong:
        name, found, wanted = wrong[0]
        example = f"; for example {name} is {found}, wanted {wanted}"
    elif missing or unexpected:
        example = f"; for example {(missing or unexpected)[0]}"
    return f"{checkpoint.path} does not fit the model{f': {why}' if why else ''} ({report}{example})"


def _architecture_mismatch(report: LoadReport) -> str:
    for component in report.components.values():
        for name, found, _ in component.wrong_shape:
            if name.endswith("input_blocks.0.0.weight") and len(found) == 4 and found[1] == 9:
                return "it is an inpainting checkpoint (9 input channels), which is not supported"
    for component in report.components.values():
        for name, found, wanted in component.wrong_shape:
            if name.endswith("attn2.to_k.weight") and found[-1] != wanted[-1]:
                return (
                    f"it is of another architecture, {CONTEXT_OF.get(found[-1], f'context {found[-1]}')}, where the "
                    f"model configuration says {CONTEXT_OF.get(wanted[-1], f'context {wanted[-1]}')}"
                )
    return ""
