"""What all layers with a LoRA share: the base layer, the factors and their names, dropout, DoRA's magnitudes.

Kinds: ldm.lora.layers has pairs of low-rank factors, ldm.lora.product_layers those of LyCORIS with other factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn

from ldm.lora.dropout import StepDropout, UnitDropout
from ldm.lora.magnitude import ApplyMagnitude, row_norms
from ldm.lora.updates import DoRA, LayerUpdate, LoRALayer
from ldm.models.layers import Conv2d, Linear
from ldm.ops import cast, fork, identity, shared_cell


class Factor(nn.Cell):
    """One factor as `weight`, fp32 and trainable. `name` is the parameter's full name."""

    def __init__(self, array: np.ndarray, name: str):
        super().__init__()
        self.weight = Parameter(Tensor(array.astype(np.float32)), name=name)


class LoRACell(nn.Cell):
    """Superclass of the layers with a LoRA, of any kind. The output is the base layer's until it is trained.

    Args:
        base: The layer to replace.
        factors: Name in kohya's and LyCORIS's files -> initial values.
        name: Full name of the layer.
        rank: The rank of the factors.
        alpha: The update is multiplied by alpha / rank.
        scale: The update is also multiplied by this.
        fp16: Compute the update in the base layer's type instead of always in fp32.
        trainable_scale: Train the scale, starting from `scale`.
        dropout: Dropout on the input of the update. HardLoRAConv2d has no such input.
        rank_dropout: Dropout of whole ranks, or of outputs where the kind has no axis for ranks.
        module_dropout: Dropout of the layer's whole update.
        dora: Train the norms of the weight's rows by themselves (see ldm.lora.magnitude).
    """

    kind: type[LayerUpdate] = LoRALayer  # of what the layer holds, without DoRA's magnitudes
    rescaled = "lora_up.weight"  # the factor that is multiplied where a LoRA with another alpha is loaded
    magnitude: Any  # an ApplyMagnitude or None
    lora_scale: Any  # a Parameter or None

    def __init__(
        self,
        base: Linear | Conv2d,
        factors: Mapping[str, np.ndarray],
        name: str,
        rank: int,
        alpha: float,
        scale: float = 1.0,
        fp16: bool = True,
        trainable_scale: bool = False,
        dropout: StepDropout | None = None,
        rank_dropout: UnitDropout | None = None,
        module_dropout: UnitDropout | None = None,
        dora: bool = False,
    ):
        super().__init__()
        self.name, self.rank, self.alpha, self.scale, self.fp16 = name, rank, float(alpha), float(scale), fp16
        self.trainable_scale, self.dora = trainable_scale, dora
        self.multiplier = self.alpha / self.rank if trainable_scale else self.scale * self.alpha / self.rank
        # Assigning a child would put the attribute's name before parameter names that are complete already.
        self.insert_child_to_cell("base", base)
        for key, parameter in base.parameters_and_names(expand=False):
            self.insert_param_to_cell(key, parameter)  # so that its place in the model still agrees with its name
        self.part_names = tuple(factors)
        for part, array in factors.items():
            self._insert_factor(part, array)
        if dora:
            base.keeps_fp32 = True  # the norms are those of the weight itself
            weight = cast(base.weight, ms.float32)
            self._insert_factor("dora_scale", row_norms(weight.reshape(weight.shape[0], -1)).asnumpy())
            self.part_names += ("dora_scale",)
        self.magnitude = shared_cell(ApplyMagnitude, isinstance(base, Linear)) if dora else None
        if trainable_scale:
            start = Tensor(np.array([scale], np.float32))
            self.insert_param_to_cell("lora_scale", Parameter(start, name=f"{name}.lora_scale"))
        else:
            self.lora_scale = None
        self.insert_child_to_cell("lora_dropout", dropout or identity())
        self.drops_units = not (rank_dropout is None and module_dropout is None)
        for key, cell in (("rank_dropout", rank_dropout), ("module_dropout", module_dropout)):
            if cell is None:
                setattr(self, key, None)
            else:
                self.insert_child_to_cell(key, cell)
        self.insert_child_to_cell("fork", fork())
        self.set_train(base.training)
        self.create_operators()

    def _insert_factor(self, part: str, array: np.ndarray) -> None:
        """Add a trainable parameter, whose name ends with the part's, and begins with `lora_` after the layer's."""
        key = part if part.startswith("lora_") else f"lora_{part}"
        if key.endswith(".weight"):
            self.insert_child_to_cell(key[: -len(".weight")], Factor(array, f"{self.name}.{key}"))
        else:
            self.insert_param_to_cell(key, Factor(array, f"{self.name}.{key}").weight)

    def create_operators(self) -> None:
        """Create the operators that `construct` calls."""
        raise NotImplementedError

    def delta(self) -> Tensor:
        """Return the update of the weight as (out, in * k * k) in fp32, of which no gradient is needed."""
        raise NotImplementedError

    def parts(self) -> dict[str, Parameter]:
        """Return the factors, and DoRA's magnitudes, by their names in kohya's and LyCORIS's files."""
        parameters = {parameter.name: parameter for parameter in self.get_parameters()}
        return {
            part: parameters[f"{self.name}.{part if part.startswith('lora_') else f'lora_{part}'}"]
            for part in self.part_names
        }

    def lora_parameters(self) -> list[Parameter]:
        """Return the parameters that are trained: all factors, and the scale if it is trainable."""
        factors = list(self.parts().values())
        return factors + [self.lora_scale] if self.trainable_scale else factors

    def factors_cast_to(self, dtype: ms.Type) -> list[Parameter]:
        """Return the factors that `construct` casts to `dtype` wherever it uses them.

        A factor that is of this type already gives the same results.
        """
        return []

    def layer_update(self, arrays: Mapping[str, np.ndarray], scale: float) -> LayerUpdate:
        """Return what the layer does to its weight.

        Args:
            arrays: The values of `parts`.
            scale: That of the layer, trained or not.
        """
        direction = self.direction({part: array for part, array in arrays.items() if part != "dora_scale"}, scale)
        return DoRA(direction, arrays["dora_scale"]) if self.dora else direction

    def direction(self, factors: dict[str, np.ndarray], scale: float) -> LayerUpdate:
        """Return `layer_update` without DoRA's magnitudes."""
        raise NotImplementedError

    def kept(self, count: int) -> Tensor:
        """Return a mask for `count` ranks or outputs, of zeros for what this step drops: (count,), or (1,) for all."""
        if self.rank_dropout is None:
            return self.module_dropout(1)
        if self.module_dropout is None:
            return self.rank_dropout(count)
        return self.rank_dropout(count) * self.module_dropout(1)

    def with_magnitude(self, y: Tensor) -> Tensor:
        """Return the outputs y with DoRA's magnitudes."""
        kept = None if self.module_dropout is None else self.module_dropout(1)
        weight, bias = self.base.weight, self.base.bias
        return self.magnitude(y, weight, bias, self.delta(), self.lora_dora_scale, kept, self.fp16)
