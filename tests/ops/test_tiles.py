"""Products by Intel's AMX tiles, computed by a model of their instructions (tile_model.h): any AVX512-BF16 will do.

The model ends the process where a processor would end it with a fault. Integers are exact, so a sum that lacks a
product, or has one too many, shows. Memory that must not be touched is NaN, or not there at all.
"""

from __future__ import annotations

import ctypes
import faulthandler
import itertools
import mmap
import os
import resource
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest

from ldm.ops.cpu import library
from tests.ops.helpers import call, needs_compiler, normal
from tests.ops.test_bf16 import rounded

pytestmark = [
    needs_compiler,
    pytest.mark.skipif(not library.multiplies_bf16(), reason="this processor has no AVX512-BF16"),
]

HERE = Path(__file__).parent
PANEL = 64
libc = ctypes.CDLL(None, use_errno=True)


TILERELEASE = bytes.fromhex("c4e27849c0")
INSTRUCTIONS = ["-mamx-tile", "-mamx-bf16"]
# What computes: the intrinsics as functions, the instructions that the compiler made, each of which ends in a handler
# that does the same, or the tiles of this processor.
FLAGS = {
    "model": ["-O1", "-include", str(HERE / "tile_model.h")],
    "traps": [*INSTRUCTIONS, "-include", str(HERE / "tile_traps.h")],
    "processor": INSTRUCTIONS,
}
COMPILER = os.environ.get("CXX") or "c++"
HAS_TILES = "amx_tile" in library.processor()


@cache
def knows(compiler: str, *flags: str) -> bool:
    """Whether the compiler is there and takes these flags. (g++ 10 has AVX512-BF16 and no AMX.)"""
    command = [*shlex.split(compiler), *flags, "-fsyntax-only", "-x", "c++", os.devnull]
    return shutil.which(command[0]) is not None and subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Callable[..., Path]:
    @cache
    def compile_with(kind: str, compiler: str = COMPILER, *more: str) -> Path:
        if not knows(compiler, *FLAGS[kind]):
            pytest.skip(f"{compiler} is not here, or has no AMX")
        path = tmp_path_factory.mktemp("tiles") / f"{kind}.so"
        sources = [*more, *FLAGS[kind], str(HERE / "tile_products.cc")]
        command = [*shlex.split(compiler), *library.COMPILE, *sources, *library.LINK, "-o", str(path)]
        subprocess.run(command, check=True)
        return path

    return compile_with


def loaded(path: Path) -> ctypes.CDLL:
    kernels = ctypes.CDLL(str(path))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LDM_AMX", raising=False)
        assert unit(kernels) == b"amx"
    return kernels


@pytest.fixture(scope="module")
def model(compiled) -> ctypes.CDLL:
    return loaded(compiled("model"))


@pytest.fixture(scope="module", params=FLAGS)
def tiles(request, compiled) -> ctypes.CDLL:
    """Kernels by tiles, with the functions of tile_products.cc."""
    if request.param == "traps" and HAS_TILES:
        pytest.skip("this processor does not refuse the instructions")
    if request.param == "processor" and library.bf16_unit() != "amx":
        pytest.skip("this processor has no AMX")
    return loaded(compiled(request.param))


@pytest.fixture(scope="module")
def vectors(tmp_path_factory) -> ctypes.CDLL:
    """The kernels as they are on this processor, without its tiles if it has any."""
    path = tmp_path_factory.mktemp("vectors") / "vectors.so"
    shutil.copyfile(library.kernel_library(), path)  # which is loaded as another
    kernels = ctypes.CDLL(str(path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LDM_AMX", "0")
        assert unit(kernels) == b"avx512_bf16"
    return kernels


def unit(kernels: ctypes.CDLL) -> bytes:
    kernels.bf16_unit.restype = ctypes.c_char_p
    return kernels.bf16_unit()


def guarded(values: np.ndarray, at_end: bool) -> np.ndarray:
    """Return a copy that ends (or starts) where memory does: reading or writing beyond it ends the process."""
    values = np.ascontiguousarray(values)
    page = mmap.PAGESIZE
    size = -(-max(values.nbytes, 1) // page) * page
    memory = mmap.mmap(-1, size + 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for forbidden in (start, start + page + size):
        assert libc.mprotect(ctypes.c_void_p(forbidden), ctypes.c_size_t(page), 0) == 0
    offset = page + (size - values.nbytes if at_end else 0)
    copy = np.frombuffer(memory, values.dtype, values.size, offset).reshape(values.shape)
    copy[:] = values
    return copy


def integers(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(-8, 9, shape).astype(np.float32)


def bf16(values: np.ndarray) -> np.ndarray:
    """Return the bits of values that bf16 holds."""
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def address(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


class Rows(ctypes.Structure):
    """gemm_bf16.h"""

    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("row", "outer", "outers", "inners"))]


NAN_PAIR = np.uint32(0x7FC07FC0)


def left_factor(values: np.ndarray, kind: str, inners: int, at_end: bool) -> tuple[np.ndarray, Rows]:
    """Lay out (m, pairs, 2) as the kernels do. What is between the values is NaN."""
    m, pairs = values.shape[:2]
    bits = bf16(values).astype(np.uint32)
    packed = bits[..., 0] | bits[..., 1] << 16
    if kind == "rows":  # of a linear layer
        held = np.full((m, pairs + 3), NAN_PAIR)
        held[:, :pairs] = packed
        memory = guarded(held.reshape(-1)[: held.size - 3], at_end)
        return memory, Rows(memory.ctypes.data, pairs + 3, 0, 1, pairs)
    # of a convolution's gradient: `inners` pairs of each row, one row after the other. With 1, also of attention's.
    outers = pairs // inners
    held = np.full((outers, m * inners + 2), NAN_PAIR)
    held[:, : m * inners] = packed.reshape(m, outers, inners).transpose(1, 0, 2).reshape(outers, -1)
    memory = guarded(held.reshape(-1)[: held.size - 2], at_end)
    return memory, Rows(memory.ctypes.data, inners, m * inners + 2, outers, inners)


def panels(values: np.ndarray, at_end: bool) -> np.ndarray:
    """Pack (pairs, 2, n). Columns from n on are NaN."""
    pairs, _, n = values.shape
    bits = bf16(values).astype(np.uint32)
    count = -(-n // PANEL)
    packed = np.full((pairs, count * PANEL), NAN_PAIR)
    packed[:, :n] = bits[:, 0] | bits[:, 1] << 16
    return guarded(packed.reshape(pairs, count, PANEL).transpose(1, 0, 2), at_end)


SIZES = [
    *[(m, 40, 64) for m in (1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 96)],
    *[(33, n, 32) for n in (1, 15, 16, 17, 31, 32, 33, 48, 49, 63, 64, 65, 81, 127, 128, 130)],
    *[(5, 70, pairs) for pairs in (256, 300, 513, 513)],
    # Straight from memory, without gathering, beyond the first CHUNK.
    *[size for size in ((32, 70, 512), (48, 64, 640), (96, 40, 272), (49, 65, 513)) for _ in ("set", "add")],
    *[(19, 50, pairs) for pairs in (16, 17, 20, 24, 31, 39, 40, 126, 255, 256, 257, 272, 280, 523)],
]


@pytest.mark.parametrize("kind", ["rows", "transposed", "taps"])
def test_product(tiles, kind):
    """Edges of rows, columns and pairs, alone and at random together."""
    rng = np.random.default_rng(0)
    some = zip(rng.integers(1, 100, 60), rng.integers(1, 200, 60), rng.integers(16, 150, 60))
    for number, (m, n, pairs) in enumerate([*SIZES, *some]):
        inners = {"rows": 1, "transposed": 1, "taps": 9}[kind]
        m, n, pairs = int(m), int(n), -(-int(pairs) // inners) * inners
        add, at_end = bool(number % 2), bool(number // 2 % 2)
        a, b = integers(rng, m, pairs, 2), integers(rng, pairs, 2, n)
        before = integers(rng, m, n)
        memory, rows = left_factor(a, kind, inners, at_end)
        ldc = n + int(rng.integers(0, 20))
        held = np.full((m, ldc), np.nan, np.float32)
        if add:
            held[:, :n] = before
        c, packed = guarded(held.reshape(-1)[: (m - 1) * ldc + n], at_end), panels(b, at_end)
        sizes = ctypes.c_int64(m), ctypes.c_int64(n)
        tiles.product_by_tiles(*sizes, ctypes.byref(rows), address(packed), address(c), ctypes.c_int64(ldc), int(add))
        found = np.full(m * ldc, np.nan, np.float32)
        found[: c.size] = c
        expected = np.full((m, ldc), np.nan, np.float32)
        expected[:, :n] = a.reshape(m, -1) @ b.reshape(-1, n) + add * before
        np.testing.assert_array_equal(found.reshape(m, ldc), expected, err_msg=f"{m} {n} {pairs} {add}")
        del memory  # which `rows` points to


def both(tiles, vectors, name: str, inputs: list[np.ndarray], outputs: list[tuple[int, ...]]) -> list[list[np.ndarray]]:
    """Return the outputs by vectors and those by tiles."""
    found = []
    for kernels in (vectors, tiles):
        for at_end in (True, False) if kernels is tiles else (True,):
            results = [guarded(np.full(shape, np.nan, np.float32), at_end) for shape in outputs]
            call(kernels, name, *(guarded(x, at_end) for x in inputs), *results)
            assert not hasattr(tiles, "tiles_are_configured") or not tiles.tiles_are_configured(), (
                "the thread goes on to other code"
            )
        found.append(results)
    return found


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 32, 2), (13, 520, 514), (103, 300, 66), (77, 768, 320)])
def test_linear(tiles, vectors, rows, inputs, outputs):
    rng = np.random.default_rng(0)
    weight = integers(rng, outputs, inputs)
    for name, width, result in (("linear_bf16", inputs, outputs), ("linear_bf16_dx", outputs, inputs)):
        x = integers(rng, rows, width)
        by_vectors, by_tiles = both(tiles, vectors, name, [x, bf16(weight)], [(rows, result)])
        np.testing.assert_array_equal(by_tiles[0], by_vectors[0])
        np.testing.assert_array_equal(by_tiles[0], x @ (weight.T if result == outputs else weight))


def test_no_outputs(tiles):
    call(tiles, "linear_bf16", normal(3, 32), np.empty((0, 32), np.uint16), np.empty((3, 0), np.float32))


@pytest.mark.parametrize(
    ("shape", "outputs", "side"),
    [
        ((2, 30, 8, 8), 58, 3),
        ((1, 4, 5, 7), 36, 3),
        ((1, 320, 3, 3), 4, 3),
        ((2, 34, 9, 31), 6, 1),
        ((1, 520, 3, 3), 40, 1),
    ],
)
def test_convolution(tiles, vectors, shape, outputs, side):
    rng = np.random.default_rng(0)
    weight = bf16(integers(rng, outputs, shape[1], side, side))
    for name, before, after in (("conv_bf16", shape[1], outputs), ("conv_bf16_dx", outputs, shape[1])):
        x = integers(rng, shape[0], before, *shape[2:])
        by_vectors, by_tiles = both(tiles, vectors, name, [x, weight], [(shape[0], after, *shape[2:])])
        np.testing.assert_array_equal(by_tiles[0], by_vectors[0])


@pytest.mark.parametrize(("shape", "outputs"), [((1, 34, 16, 17), 50), ((2, 66, 9, 33), 66)])
def test_convolution_by_winograd(tiles, vectors, shape, outputs):
    rng = np.random.default_rng(0)
    weight = bf16(4 * integers(rng, outputs, shape[1], 3, 3))
    for name, before, after in (("convolution_bf16", shape[1], outputs), ("convolution_bf16_dx", outputs, shape[1])):
        x = integers(rng, shape[0], before, *shape[2:])
        sizes = [(shape[0], after, *shape[2:]), (after, 16, before // 2)]
        by_vectors, by_tiles = both(tiles, vectors, name, [x, weight], sizes)
        np.testing.assert_array_equal(by_tiles[0], by_vectors[0])


@pytest.mark.parametrize(
    ("heads", "tokens", "keys", "dim"),
    [(2, 50, 77, 40), (1, 49, 300, 80), (1, 16, 64, 160), (3, 33, 20, 35), (1, 5, 1, 8)],
)
def test_attention(tiles, vectors, heads, tokens, keys, dim):
    """Two images. Scores are summed in another order, which may round a probability to the other neighbour in bf16."""
    q, k, v = (normal(2 * rows, heads * dim, seed=seed) for seed, rows in enumerate((tokens, keys, keys)))
    settings = np.float32([2, heads, 0])
    by_vectors, by_tiles = both(tiles, vectors, "attention_bf16", [q, k, v, settings], [q.shape])
    near(by_tiles, by_vectors)
    inputs = [q, k, v, np.array(by_vectors[0]), normal(*q.shape, seed=3), settings]
    by_vectors, by_tiles = both(tiles, vectors, "attention_bf16_dx", inputs, [q.shape, k.shape, v.shape])
    near(by_tiles, by_vectors)


def near(actual: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for x, y in zip(actual, expected):
        assert np.sqrt(np.mean((x - y) ** 2)) <= 3e-4 * np.sqrt(np.mean(y**2)) + 1e-6


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one processor")
@pytest.mark.parametrize("name", ["linear_bf16", "convolution_bf16", "attention_bf16", "attention_bf16_dx"])
def test_the_results_do_not_depend_on_the_threads(tiles, name):
    """To the last bit, of numbers that are rounded."""
    q, k, v = normal(2 * 300, 80), normal(2 * 130, 80, seed=1), normal(2 * 130, 80, seed=2)
    settings = np.float32([2, 2, 0])
    inputs, outputs = {
        "linear_bf16": ([normal(1100, 64), bf16(normal(336, 64, seed=1))], [(1100, 336)]),
        "convolution_bf16": ([normal(1, 34, 48, 48), bf16(normal(50, 34, 3, 3))], [(1, 50, 48, 48), (50, 16, 17)]),
        "attention_bf16": ([q, k, v, settings], [q.shape]),
        "attention_bf16_dx": ([q, k, v, normal(*q.shape), normal(*q.shape), settings], [q.shape, k.shape, v.shape]),
    }[name]
    processors = os.sched_getaffinity(0)
    ms.ops.add(ms.Tensor(np.ones(100000, np.float32)), 1).asnumpy()  # MindSpore has its threads
    found = []
    for some in ({min(processors)}, processors):
        results = [np.full(shape, np.nan, np.float32) for shape in outputs]
        os.sched_setaffinity(0, some)
        try:
            call(tiles, name, *inputs, *results)
        finally:
            os.sched_setaffinity(0, processors)
        found.append(results)
    for one, many in zip(*found):
        np.testing.assert_array_equal(one, many)


def test_the_result_of_a_row_does_not_depend_on_others(tiles):
    x, weight = normal(1100, 64), bf16(normal(336, 64, seed=1))
    y, alone = np.empty((1100, 336), np.float32), np.empty((1, 336), np.float32)
    call(tiles, "linear_bf16", x, weight, y)
    for row in (0, 40, 1007, 1099):
        call(tiles, "linear_bf16", x[row : row + 1], weight, alone)
        np.testing.assert_array_equal(alone[0], y[row])


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("LDM_AMX", 0),
        ("TILE_MODEL_REFUSES", 1),
        ("TILE_MODEL_WRONG", 1),
        *[("TILE_MODEL_WRONG_STRIDE", stride) for stride in (256, 1024, 1200, 360, 200)],
    ],
)
def test_without_tiles_that_work_products_are_by_vectors(compiled, vectors, tmp_path, monkeypatch, variable, value):
    """The user does not want them, Linux refuses, or a product is wrong: at all, or with loads of a panel, of gathered
    rows, of rows as they are, or of sums of 90 or of 50 columns."""
    monkeypatch.delenv("LDM_AMX", raising=False)
    monkeypatch.setenv(variable, str(value))
    path = tmp_path / "others.so"
    shutil.copyfile(compiled("model"), path)  # which is loaded as another
    kernels = ctypes.CDLL(str(path))
    assert unit(kernels) == b"avx512_bf16"
    x, weight = normal(33, 100), bf16(rounded(normal(50, 100, seed=1)))
    found = []
    for each in (kernels, vectors):
        found.append(np.empty((33, 50), np.float32))
        call(each, "linear_bf16", x, weight, found[-1])
    np.testing.assert_array_equal(*found)


# clang++ up to 14 has other names for the macros of AMX.
@pytest.mark.parametrize("compiler", ["g++", "clang++", "clang++-14"])
def test_the_processor_and_linux_are_asked(compiled, compiler):
    """As users compile the kernels where there are tiles. Here the processor may say that it has none."""
    path = compiled("processor", compiler, "-O1")
    assert TILERELEASE in path.read_bytes(), "tiles are compiled"
    kernels = ctypes.CDLL(str(path))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LDM_AMX", raising=False)
        assert unit(kernels) in ((b"amx", b"avx512_bf16") if HAS_TILES else (b"avx512_bf16",))


def test_the_units_name(monkeypatch):
    assert library.bf16_unit() in ("amx", "avx512_bf16")
    monkeypatch.setattr(library, "kernel_library", lambda: None)
    assert library.bf16_unit.__wrapped__() is None


def signal_of_child(function: Callable[[], object]) -> int:
    """Return the number of the signal that ends a process which calls the function, 0 if it ends without."""
    child = os.fork()
    if not child:
        try:
            signal.alarm(10)  # other threads may have held locks
            faulthandler.disable()
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            function()
        finally:
            os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


@pytest.mark.skipif(HAS_TILES, reason="this processor does not refuse the instructions")
@pytest.mark.parametrize("number", range(4))
def test_traps_leave_other_instructions_to_the_handler_before(compiled, number):
    traps = loaded(compiled("traps"))
    assert signal_of_child(lambda: traps.execute_no_tile(number)) == signal.SIGILL
    assert signal_of_child(lambda: traps.execute_no_tile(-1)) == 0


class TestModel:
    @pytest.mark.parametrize("number", range(14))
    def test_what_a_processor_refuses_ends_the_process(self, model, number):
        assert signal_of_child(lambda: model.misuse(number)) == signal.SIGABRT

    def test_what_it_accepts_does_not(self, model):
        model.misuse(-1)

    @pytest.mark.parametrize(("rows", "pairs", "columns"), list(itertools.product((1, 16), (1, 7, 16), (1, 16))))
    def test_product(self, model, rows, pairs, columns):
        rng = np.random.default_rng(0)
        a, b = rounded(normal(rows, pairs, 2)), rounded(normal(pairs, columns, 2, seed=1))
        a[:, 0, 0], b[0, :, 0] = 2.0**-127, 2.0**100  # a denormal number counts as 0
        c = integers(rng, rows, columns)
        left, right = (guarded(bf16(x).view(np.uint32), True) for x in (a, b))
        result = guarded(c, True)
        model.one_product(rows, pairs, columns, address(left), address(right), address(result))
        a[:, 0, 0] = 0
        expected = c + np.einsum("mki,kni->mn", a.astype(np.float64), b.astype(np.float64))
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
