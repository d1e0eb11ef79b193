"""How cells become graphs: one cell for all layers with the same settings, and cells that are called many times."""

from __future__ import annotations

from functools import cache
from typing import Any

from mindspore import Tensor, nn, ops
from mindspore.common.api import _cell_graph_executor

from ldm.runtime.device import give_back_memory

# One primitive for all uses. `x.astype(t)` and `x + y` are functions that the compiler reads again at each use: the
# additions alone make 38 of 1,081 functions in the training graph of a small UNet.
cast = ops.Cast()
add = ops.Add()


@cache
def shared_cell(cell_type: type, *args: Any, **kwargs: Any) -> nn.Cell:
    """Return the only `cell_type(*args, **kwargs)` of the process, which all layers with the same settings share.

    MindSpore's compiler reads and differentiates each cell object once. With shared cells the training graph of three
    transformer blocks compiles in 4.7 s instead of 6.0 s, and their forward graph in 2.4 s instead of 3.4 s (one core).

    Args:
        cell_type: A cell without parameters and state, or one of MindSpore's primitives.
        args: Its arguments, which must be hashable. They may be shared cells themselves.
        kwargs: Its keyword arguments, likewise.
    """
    return cell_type(*args, **kwargs)


class Identity(nn.Cell):
    """x -> x."""

    def construct(self, x: Tensor) -> Tensor:
        return x


class Sequential(nn.SequentialCell):
    """One to four cells, called one after the other.

    They are filled up to four with Identity and called without a loop. The loop of nn.SequentialCell costs the compiler
    three functions for each cell: 406 of 1,040 in the training graph of a small UNet.
    """

    def __init__(self, *cells: nn.Cell):
        super().__init__([*cells, *[shared_cell(Identity)] * (4 - len(cells))])

    def construct(self, x: Tensor) -> Tensor:
        cells = self.cell_list
        return cells[3](cells[2](cells[1](cells[0](x))))


class RepeatedCell(nn.Cell):
    """A cell that is called many times as one graph.

    MindSpore writes the graph's name into every cell below at each call, in Python: 4.3 ms for a nano UNet with 670
    cells, whose graph takes 200 ms. This class writes it only when it has changed (0.3 ms). A cell that several graphs
    use has the name of the one compiled last.

    After compiling, the memory that the compiler has freed is returned to the system before the graph allocates its
    own: 0.13 GB for the LoRA training of SD1.5.
    """

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the graph and return freed memory to the system if a new graph was compiled."""
        count = len(self.compile_cache)
        super().compile(*args, **kwargs)
        if len(self.compile_cache) > count:
            give_back_memory()

    @property
    def compile_phase(self) -> str:
        """The name of the compiled graph."""
        return self._compile_phase

    @compile_phase.setter
    def compile_phase(self, value: str) -> None:
        if value != self._compile_phase:
            nn.Cell.compile_phase.fset(self, value)


def free_graphs(cell: nn.Cell) -> None:
    """Free the compiled graphs of a cell that is not called again.

    MindSpore 2.8 holds the cell, so that it frees nothing by itself: of the nano model's UNet, each compilation kept 43
    MB instead of 8 MB, and kernels keep copies of SD's weights.
    """
    _cell_graph_executor.del_net_res(cell, cell.compile_cache)
    cell.compile_cache.clear()
