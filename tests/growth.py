"""How the work of a function grows with its input, measured within one run: bounds in seconds depend on the machine."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

FACTOR = 4  # between the two inputs
MOST = 9.0  # times the work: four times where it grows linearly, sixteen times where it grows with the square
ROUNDS = 3  # at least, of each input in turn. The least time of each counts, which other processes disturb least
MOST_ROUNDS = 30
MEASURED = 0.002  # seconds of processor time that a measurement takes at least, by repeating the work
ENOUGH = 2.0  # seconds after which no further rounds are needed to see that the work grows too fast


def assert_linear(work: Callable[[Any], Any], make: Callable[[int], Any], size: int) -> None:
    """Fail if `work` takes more than MOST times as long for an input of `size` as for one of a quarter of it.

    Args:
        work: The function that is measured.
        make: Returns the input of a size, and is not measured.
        size: Of the larger input: the largest that is allowed, or one at which a square of it would be noticed.
    """
    inputs = make(size // FACTOR), make(size)
    repeats = 1
    while _seconds(work, inputs[0], repeats) < MEASURED:
        repeats *= 2
    least = [float("inf"), float("inf")]
    spent = 0.0
    for number in range(MOST_ROUNDS):
        for place, value in enumerate(inputs):
            # The larger input needs no repeats of its own to take as long.
            count = max(1, repeats // FACTOR) if place else repeats
            seconds = _seconds(work, value, count)
            spent += seconds
            least[place] = min(least[place], seconds / count)
        if number + 1 >= ROUNDS and least[1] <= MOST * least[0] or spent > ENOUGH:
            break
    ratio = least[1] / least[0]
    assert ratio <= MOST, f"{FACTOR} times the input takes {ratio:.1f} times as long ({least[1] * 1000:.3g} ms)"


def text_maker(begin: str, repeated: str, end: str = "") -> Callable[[int], str]:
    """Return a function from a number of characters to a text of at most as many, for `make` of assert_linear."""
    return lambda size: begin + repeated * ((size - len(begin + end)) // len(repeated)) + end


def _seconds(work: Callable[[Any], Any], value: Any, repeats: int) -> float:
    """Return the processor time of this thread for `repeats` calls, without those of the garbage collector."""
    collects = gc.isenabled()
    gc.disable()
    try:
        begin = time.thread_time()
        for _ in range(repeats):
            work(value)
        return time.thread_time() - begin
    finally:
        if collects:
            gc.enable()
