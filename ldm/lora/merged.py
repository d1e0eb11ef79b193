"""The LoRAs that are merged into a model's weights, and how they are exchanged for others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Optional

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn

from ldm.errors import UserError
from ldm.lora.lora import LoRA
from ldm.lora.merge import LoRAMatch, Update, add_updates, check_range, match_shapes, may_overflow
from ldm.lora.strength import Strength
from ldm.weights.names import component_of

# The types that sums are cast to in NumPy. MindSpore rounds to bf16 itself, to the nearest.
NUMPY_TYPES = {ms.float32: np.float32, ms.float16: np.float16, ms.bfloat16: np.float32}

# Given canonical names and shapes of weights, returns what reads the fp32 weight of one of these names.
OpenBase = Callable[[Mapping[str, tuple[int, ...]]], Callable[[str], np.ndarray]]


@dataclass(frozen=True)
class SamplingRange:
    """The steps of a sampling from one share of them to another, such as 0.3 to 1 for all but the first 30 %.

    A step counts if it lies within the range as a whole, which is the rule of diffusers' control_guidance_start and
    control_guidance_end.

    Raises:
        UserError: The range is empty or not within 0 to 1.
    """

    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.start < self.end <= 1.0:
            raise UserError(
                f"a LoRA from share {self.start:g} to {self.end:g} of the sampling steps: start must be at least 0 and "
                "below end, and end at most 1"
            )

    @classmethod
    def from_ends(cls, start: float | None, end: float | None) -> SamplingRange | None:
        """Return the range, or None if neither end is given. The other end is then that of the sampling."""
        if start is None and end is None:
            return None
        return cls(0.0 if start is None else start, 1.0 if end is None else end)

    def includes(self, step: int, steps: int) -> bool:
        """Whether a step, counted from 0, is in the range."""
        return step / steps >= self.start and (step + 1) / steps <= self.end


class MergedLoRA(NamedTuple):
    """A LoRA with its strength, and when its UNet part is applied. `name` stands for it in errors."""

    name: str
    lora: LoRA
    strength: Strength
    sampling_range: Optional[SamplingRange] = None  # None for the time steps that it was trained on

    @property
    def applies_to_unet(self) -> bool:
        """Whether the strength of the UNet part is not zero, in some of the LoRA's blocks at least."""
        strength = self.strength
        if strength.blocks is None:
            return bool(strength.unet)
        return any(strength.of_layer(name) for name in self.lora.updates() if component_of(name) == "unet")

    def is_active(self, step: int, steps: int, timestep: int) -> bool:
        """Whether the UNet part is applied at a step of the sampling, counted from 0, and its time step."""
        if self.sampling_range is not None:
            return self.sampling_range.includes(step, steps)
        return self.lora.timesteps is None or timestep in self.lora.timesteps

    def applied_at(self) -> str:
        """Say when the UNet part is applied, if not always."""
        if self.sampling_range is not None:
            return f"; from share {self.sampling_range.start:g} to {self.sampling_range.end:g} of the sampling steps"
        timesteps = self.lora.timesteps
        return "" if timesteps is None else f"; at time steps {timesteps.start} to {timesteps.stop - 1}, as trained"


class MergedLoRAs:
    """Merges LoRAs into a model's weights, and replaces them by other LoRAs.

    The weights are computed from those of the base model, not by subtraction, so they do not depend on what was merged
    before: they are those that merge_lora gives on the base model with the same LoRAs in the same order, bit for bit.
    The sums are computed in fp32 and cast to the type of the parameters. Only weights whose LoRAs or strengths change
    are written. The parameters stay the same with the same type and shape, so no network is compiled again.

    Args:
        model: A StableDiffusion or a part of one, without a LoRA merged into it.
        open_base: Opens the files of the base model, as BaseWeights.open does. None keeps a copy of each weight while
            a LoRA is merged into it.

    A LoRA can be applied at some steps of a sampling alone: `switch` takes its UNet part out of the weights and puts it
    back. The text is encoded before the first step, so its text encoder part is not switched.

    Attributes:
        loras: What is merged, in the order of merging.
    """

    def __init__(self, model: nn.Cell, open_base: Optional[OpenBase] = None) -> None:
        self.loras: tuple[MergedLoRA, ...] = ()
        self._active: tuple[bool, ...] = ()  # whether the UNet part of each is in the weights now
        self._model = model
        self._open_base = open_base
        self._copies: dict[str, np.ndarray] = {}  # base weights by parameter name, where there is no file
        self._updates: dict[str, list[Update]] = {}  # parameter name -> what its weight is now beside the base weight

    @property
    def holds_base_weights(self) -> bool:
        """Whether no weight is changed. After an error while weights were written, `loras` does not say that."""
        return not self._updates

    def set(self, loras: Sequence[MergedLoRA]) -> list[LoRAMatch]:
        """Make these LoRAs the merged ones. None gives the base model, bit for bit, and so does strength 0.

        Returns:
            How the layers of each LoRA fit.

        Raises:
            UserError: A LoRA or its block weights do not fit the model, a strength is no finite number, a sum is
                outside the range of the weight's type, or a file of the base model cannot be read any more. The model
                is unchanged then.
        """
        shapes = {parameter.name: tuple(parameter.shape) for parameter in self._model.get_parameters()}
        matches = []
        present = set(map(id, self.loras))
        for merged in loras:
            merged.strength.check(merged.name)
            matches.append(match_shapes(shapes, merged.lora))
            matches[-1].require(merged.name)
            merged.strength.check_model(shapes, merged.name)
            if id(merged) not in present:
                merged.strength.warn_of_layers(merged.lora, merged.name)
        self._write(loras)
        self.loras, self._active = tuple(loras), (True,) * len(loras)
        return matches

    def switch(self, active: Sequence[bool]) -> None:
        """Make the weights those with the UNet part of these of `loras` alone. Errors are those of `set`."""
        if tuple(active) != self._active:
            off = (merged._replace(strength=merged.strength.without_unet()) for merged in self.loras)
            self._write([merged if is_on else without for merged, without, is_on in zip(self.loras, off, active)])
            self._active = tuple(active)

    def _write(self, loras: Sequence[MergedLoRA]) -> None:
        """Write the weights that these LoRAs change."""
        parameters = {parameter.name: parameter for parameter in self._model.get_parameters()}
        wanted = _updates_of_weights(loras)
        changes = {
            name: wanted.get(name, [])
            for name in {**self._updates, **wanted}
            if not _same(wanted.get(name, []), self._updates.get(name, []))
        }
        # Only the files of networks with such a weight are opened.
        from_files = {
            name: tuple(parameters[name].shape) for name in changes if self._needs_file(parameters[name], changes[name])
        }
        read = self._open_base(from_files) if self._open_base is not None and from_files else None

        for name, updates in changes.items():
            if may_overflow(updates):
                start, more = self._start(parameters[name], updates, read)
                check_range(name, start, more, NUMPY_TYPES[parameters[name].dtype])
        for name, updates in changes.items():
            parameter = parameters[name]
            start, more = self._start(parameter, updates, read)
            if self._open_base is None and name not in self._copies:
                self._copies[name] = start.copy()
            total = add_updates(start, more, NUMPY_TYPES[parameter.dtype])
            parameter.set_data(Tensor(total, dtype=parameter.dtype))
            # Recorded weight by weight, so that a call that was interrupted can be repeated.
            if updates:
                self._updates[name] = updates
            else:
                del self._updates[name]
                self._copies.pop(name, None)

    def _needs_file(self, parameter: Parameter, updates: Sequence[Update]) -> bool:
        return self._open_base is not None and not self._continues(parameter, updates)

    def _continues(self, parameter: Parameter, updates: Sequence[Update]) -> bool:
        """Whether the wanted weight is the present one, which is not rounded, with further updates."""
        present = self._updates.get(parameter.name, [])
        return parameter.dtype == ms.float32 and _same(updates[: len(present)], present)

    def _start(
        self, parameter: Parameter, updates: Sequence[Update], read: Optional[Callable[[str], np.ndarray]]
    ) -> tuple[np.ndarray, Sequence[Update]]:
        """Return a weight to start from, and which of the updates have to be added to it."""
        if self._continues(parameter, updates):
            return parameter.asnumpy(), updates[len(self._updates.get(parameter.name, [])) :]
        if read is not None:
            return read(parameter.name), updates
        return self._copies.get(parameter.name, parameter.asnumpy()), updates


def _updates_of_weights(loras: Sequence[MergedLoRA]) -> dict[str, list[Update]]:
    """Return parameter name -> the updates of its weight, without those of strength 0."""
    updates: dict[str, list[Update]] = {}
    for merged in loras:
        for name, update in merged.lora.updates().items():
            strength = merged.strength.of_layer(name)
            if strength:
                updates.setdefault(name, []).append(Update(update, strength, merged.name))
    return updates


def _same(updates: Sequence[Update], others: Sequence[Update]) -> bool:
    """Whether both are the same factors, as objects, with the same strengths."""
    return [(id(update.layer), update.strength) for update in updates] == [
        (id(update.layer), update.strength) for update in others
    ]
