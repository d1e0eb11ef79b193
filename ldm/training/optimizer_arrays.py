"""Which arrays the optimizer works on: small parameters as parts of one flat array, large ones by themselves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mindspore import Parameter, Tensor


class OptimizerArrays:
    """The arrays that the optimizer works on: one flat array of all small parameters, and each large parameter itself.

    An operator on the flat array takes the place of one for each parameter: on Ascend a launch costs about as much
    as the work on an array of 10^6 elements. A large parameter is not copied, so that training a whole network does not
    need its memory a second time.

    Args:
        parameters: The parameters to train.
        large: Number of elements from which a parameter is large.
    """

    def __init__(self, parameters: Sequence[Parameter], large: int):
        self.small = tuple(p for p in parameters if p.size < large)
        if len(self.small) == 1:
            self.small = ()
        small = {id(p) for p in self.small}
        self.large = tuple(p for p in parameters if id(p) not in small)
        self.flat = None
        if self.small:
            values = np.concatenate([p.asnumpy().ravel() for p in self.small])
            self.flat = Parameter(Tensor(values), name="flat", requires_grad=False)

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The trained parameters in the order in which the step handles them: the small ones come first."""
        return self.small + self.large

    @property
    def arrays(self) -> tuple[Parameter, ...]:
        return self.large if self.flat is None else (self.flat, *self.large)

    def split(self, values: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Return a copy of `values`, one for each of `arrays`, by parameter name."""
        values, result = list(values), {}
        if self.flat is not None:
            ends = np.cumsum([p.size for p in self.small])[:-1]
            result = {p.name: part.reshape(p.shape) for p, part in zip(self.small, np.split(values.pop(0), ends))}
        result.update({p.name: value for p, value in zip(self.large, values)})
        return {name: value.copy() for name, value in result.items()}

    def join(self, values: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Return one array for each of `arrays` of values by parameter name, the inverse of `split`."""
        rows = [values[p.name] for p in self.large]
        if self.flat is not None:
            rows.insert(0, np.concatenate([values[p.name].ravel() for p in self.small]))
        return [np.ascontiguousarray(row, np.float32) for row in rows]
