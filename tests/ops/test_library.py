"""kernels.cc: compiled once, done without where that is not possible, and strict about its inputs. Results are the same
for any number of threads. What its functions compute is tested in test_ops.py, test_attention.py and test_bf16.py."""

from __future__ import annotations

import _thread
import errno
import logging
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from ldm import ops
from ldm.models.stable_diffusion import build_model
from ldm.ops import cpu
from ldm.ops.cpu import library
from ldm.settings.model import load_model_config
from tests.conftest import ROOT
from tests.ops.helpers import needs_compiler

pytestmark = pytest.mark.usefixtures("graph_mode")


@pytest.fixture
def compiled() -> Path:
    """The library of this process, in the cache of the user."""
    return library.kernel_library()


@pytest.fixture
def find_library(compiled, tmp_path, monkeypatch):
    """library.kernel_library as in a new process whose cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return library.kernel_library.__wrapped__


@pytest.fixture
def ready(compiled, find_library, tmp_path) -> Path:
    """The compiled library in that cache, without compiling it again."""
    path = tmp_path / "cache" / "mindspore-stable-diffusion-lora" / compiled.name
    path.parent.mkdir(parents=True, mode=0o700)
    shutil.copyfile(compiled, path)
    return path


def compiler(folder, monkeypatch, text: str) -> None:
    """Let CXX name a shell script."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(path))


def made(command: list[str], body: bytes) -> bytes:
    """In the place of a compiler that is called by `command`."""
    if command[-2] == "-o":
        Path(command[-1]).write_bytes(body)
        return b""
    return subprocess.run(command, capture_output=True, check=True).stdout


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@needs_compiler
class TestCompiling:
    def test_once(self, find_library, tmp_path):
        first = find_library()
        assert first.parent == tmp_path / "cache" / "mindspore-stable-diffusion-lora"
        assert files(tmp_path) == [first.name]
        assert stat.S_IMODE(first.parent.stat().st_mode) == 0o700, "nobody else can put a library there"
        compiled = first.stat().st_ino
        assert find_library() == first and first.stat().st_ino == compiled

    def test_a_folder_that_others_can_write_to_is_not_used(self, find_library, tmp_path, caplog):
        folder = tmp_path / "cache" / "mindspore-stable-diffusion-lora"
        folder.mkdir(parents=True)
        folder.chmod(0o777)
        assert find_library() is None
        assert "other users can write" in caplog.text and not files(tmp_path)

    @pytest.mark.parametrize(
        "damage",
        [
            lambda raw: b"",
            lambda raw: raw[: len(raw) // 2],
            lambda raw: raw[:4096] + bytes(len(raw) - 4096),
            lambda raw: raw[:-2000] + bytes([raw[-2000] ^ 1]) + raw[-1999:],
            lambda raw: raw[:-32],
        ],
        ids=["empty", "half", "zeros inside", "a bit changed", "without its seal"],
    )
    def test_a_damaged_library_is_named_and_compiled_again_not_loaded(
        self, find_library, ready, monkeypatch, caplog, damage
    ):
        """As a power cut leaves it. Loading it would end the process, or compute something else."""
        assert find_library() == ready and not caplog.text
        whole = ready.read_bytes()
        ready.unlink()  # it stays loaded in this process
        ready.write_bytes(damage(whole))
        monkeypatch.setattr(library, "_output", lambda command, _=None: made(command, whole[:-32]))
        assert find_library() == ready and ready.read_bytes() == whole
        assert f"{ready} is damaged; compiling it again" in caplog.text
        assert files(ready.parent) == [ready.name]

    def test_what_a_killed_process_was_compiling_is_removed(self, find_library, ready, monkeypatch):
        left, young = (ready.with_name(f"{library.TEMPORARY_PREFIX}{name}") for name in ("left", "young"))
        left.mkdir()
        young.mkdir()
        os.utime(left, (0, 0))
        ready.with_name(f"{library.TEMPORARY_PREFIX}gone").symlink_to(
            "nowhere"
        )  # as one that is removed at this moment
        body = ready.read_bytes()[:-32]
        ready.unlink()
        monkeypatch.setattr(library, "_output", lambda command, _=None: made(command, body))
        assert find_library() == ready
        assert not left.exists() and young.exists()

    def test_libraries_that_nobody_used_for_90_days_are_removed_when_another_is_compiled(
        self, find_library, ready, monkeypatch
    ):
        """Not those of other checkouts, versions or machines that share the cache, nor what is no library."""
        days, names = 24 * 3600, {"kernels-old.so": 91, "kernels-in-use.so": 89, "kernels-new.so": 0, "notes.txt": 91}
        for name, age in names.items():
            ready.with_name(name).write_bytes(b"")
            os.utime(ready.with_name(name), (time.time(), time.time() - age * days))
        ready.with_name("kernels-gone.so").symlink_to("nowhere")  # as one that is removed at this moment
        assert find_library() == ready and ready.with_name("kernels-old.so").exists(), "nothing was compiled"
        body = ready.read_bytes()[:-32]
        ready.unlink()
        monkeypatch.setattr(library, "_output", lambda command, _=None: made(command, body))
        assert find_library() == ready
        assert files(ready.parent) == sorted([*names.keys() - {"kernels-old.so"}, ready.name])

    def test_a_use_makes_a_library_young(self, find_library, ready):
        os.utime(ready, (0, 0))
        assert find_library() == ready and time.time() - ready.stat().st_mtime < 3600

    def test_a_cache_on_a_read_only_file_system_is_used(self, find_library, ready, monkeypatch):
        def refuse(path):
            raise OSError(errno.EROFS, "Read-only file system", str(path))

        monkeypatch.setattr(os, "utime", refuse)
        assert find_library() == ready

    @pytest.mark.parametrize("part", ["kernels.cc", "norms.h"])
    def test_a_changed_source_is_compiled_anew(self, find_library, ready, tmp_path, monkeypatch, part):
        monkeypatch.setattr(library, "_output", lambda command, _=None: made(command, ready.read_bytes()[:-32]))
        first = find_library()
        changed = tmp_path / "sources"
        shutil.copytree(library.SOURCES, changed)
        with (changed / part).open("a") as file:
            file.write("// changed\n")
        monkeypatch.setattr(library, "SOURCES", changed)
        assert find_library() != first and find_library().exists() and first.exists()

    def test_another_processor_too(self, find_library, ready, monkeypatch):
        monkeypatch.setattr(library, "_output", lambda command, _=None: made(command, ready.read_bytes()[:-32]))
        first = find_library()
        monkeypatch.setattr(library, "processor", lambda: "another")
        assert find_library() != first


class TestWithoutACompiler:
    def said(self, find_library, caplog) -> str:
        with caplog.at_level(logging.WARNING):
            assert find_library() is None
        assert "install g++" in caplog.text
        return caplog.text

    def test_none_is_there(self, find_library, monkeypatch, caplog):
        monkeypatch.setenv("CXX", "/nowhere/c++")
        assert "/nowhere/c++" in self.said(find_library, caplog)

    def test_its_name_cannot_be_read(self, find_library, monkeypatch, caplog):
        monkeypatch.setenv("CXX", 'g++ "-O2')
        assert "No closing quotation" in self.said(find_library, caplog)

    def test_what_it_makes_cannot_be_loaded(self, find_library, tmp_path, monkeypatch, caplog):
        compiler(tmp_path, monkeypatch, '[ "$1" = --version ] && exit; for last; do :; done; echo half > "$last"')
        assert "kernels-" in self.said(find_library, caplog)

    def test_mindspore_takes_no_colon(self, find_library, tmp_path, monkeypatch, caplog):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a:b"))
        compiler(tmp_path, monkeypatch, "exit 0")
        assert "colon" in self.said(find_library, caplog)

    def test_it_fails(self, find_library, tmp_path, monkeypatch, caplog):
        compiler(tmp_path, monkeypatch, '[ "$1" = --version ] || { echo no such flag >&2; exit 1; }')
        assert "no such flag" in self.said(find_library, caplog)
        assert files(tmp_path / "cache") == []

    def test_it_is_stopped(self, find_library, tmp_path, monkeypatch, caplog):
        compiler(
            tmp_path, monkeypatch, '[ "$1" = --version ] && exit; for last; do :; done; echo half > "$last"; kill -9 $$'
        )
        self.said(find_library, caplog)
        assert files(tmp_path / "cache") == []

    def test_the_cache_cannot_be_written(self, find_library, tmp_path, monkeypatch, caplog):
        (tmp_path / "cache").write_text("a file")
        compiler(tmp_path, monkeypatch, "exit 0")
        assert str(tmp_path / "cache") in self.said(find_library, caplog)

    def test_an_interrupt_kills_it_and_leaves_nothing(self, find_library, tmp_path, monkeypatch):
        started = tmp_path / "started"
        compiler(
            tmp_path,
            monkeypatch,
            f'''[ "$1" = --version ] && exit
            mktemp > "{started}.name"
            sleep 60 & echo $! $$ > "{started}.part"; mv "{started}.part" "{started}"; wait''',
        )

        def interrupt():
            while not started.exists():
                time.sleep(0.01)
            _thread.interrupt_main()

        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            find_library()
        for process in started.read_text().split():
            status = Path(f"/proc/{process}/stat")
            assert not status.exists() or status.read_text().split()[2] == "Z"
        assert not Path(f"{started}.name").read_text().startswith(tempfile.gettempdir() + "/tmp.")
        assert not list((tmp_path / "cache" / "mindspore-stable-diffusion-lora").iterdir())

    def test_other_systems_say_nothing(self, find_library, monkeypatch, caplog):
        monkeypatch.setattr(sys, "platform", "darwin")
        assert find_library() is None and not caplog.records


def tiny_unet(monkeypatch, compiled: bool):
    monkeypatch.setattr(ops, "kernel_library", library.kernel_library if compiled else lambda: None)
    np.random.seed(3)
    return build_model(load_model_config(ROOT / "tests" / "tiny.yaml")).model.diffusion_model


def kernel_cells(net: nn.Cell) -> set[type]:
    kinds = {cpu.MultiHeadAttention, cpu.Conv3x3, cpu.Norm, cpu.Pointwise, cpu.SwapMiddleAxes}
    return {type(cell) for _, cell in net.cells_and_names()} & kinds


@needs_compiler
def test_a_network_computes_the_same_without(monkeypatch):
    given = [
        Tensor(np.random.default_rng(i).standard_normal(shape).astype(np.float32))
        for i, shape in enumerate([(4, 4, 16, 16), (4, 77, 32)])
    ]
    timesteps = Tensor(np.array([500, 3, 0, 999], np.int32))
    nets = tiny_unet(monkeypatch, True), tiny_unet(monkeypatch, False)
    assert len(kernel_cells(nets[0])) == 5 and not kernel_cells(nets[1])
    found, plain = (net(given[0], timesteps, given[1]).asnumpy() for net in nets)
    np.testing.assert_allclose(found, plain, atol=1e-5 * np.abs(plain).max())


COMPUTE = """
import sys
import numpy as np
import ldm.runtime.device
ldm.runtime.device.setup_runtime("CPU")
from mindspore import Tensor, nn
import mindspore as ms
from ldm import ops
from ldm.ops import cpu
rng = np.random.default_rng(0)
def normal(*shape):
    return Tensor(rng.standard_normal(shape).astype(np.float32))
fp32 = ms.float32
results = [
    ops.silu()(normal(100_001)),
    ops.gelu()(normal(100_003)),
    ops.gelu_gate()(normal(777, 302)),
    ops.group_norm(3, 1e-5)(normal(3, 9, 65, 63), normal(9), normal(9), fp32),
    ops.layer_norm(1e-5)(normal(3001, 65), normal(65), normal(65), fp32),
    ops.conv2d(20, 3, 1, 1, False)(normal(3, 17, 63, 65), normal(20, 17, 3, 3), None, fp32),
    ops.conv2d(42, 3, 1, 1, False)(normal(1, 40, 32, 32), normal(42, 40, 3, 3), None, fp32),
    ops.attention(3, 5)(normal(1400, 15), normal(1000, 15), normal(1000, 15), 2),
]
def held(*shape):
    return normal(*shape).astype(ms.bfloat16)
class AttentionOfTwo(nn.Cell):
    def __init__(self, bf16):
        super().__init__()
        self.attention = ops.attention(3, 10, bf16=bf16)
    def construct(self, q, k, v):
        return self.attention(q, k, v, 2)
def with_gradient(product, x, weight):
    y = product(x, weight)
    return [y, ms.ops.GradOperation(sens_param=True)(product)(x, weight, normal(*y.shape))]
def with_gradients(attention):
    given = [normal(n, 30) for n in (2800, 1000, 1000)]
    gradients = ms.ops.GradOperation(get_all=True, sens_param=True)(attention)
    return [attention(*given), *gradients(*given, normal(2800, 30))]
results += with_gradients(AttentionOfTwo(False))
for product in [cpu.UnpackedMatMul(), *([cpu.Bf16MatMul()] if ops.multiplies_bf16() else [])]:
    results += with_gradient(product, normal(2100, 300), held(700, 300))
    results += with_gradient(product, normal(3, 1000), held(1100, 1000))
results += with_gradient(cpu.UnpackedConv2d(42, 3, 1, 1), normal(1, 40, 32, 32), held(42, 40, 3, 3))
if ops.multiplies_bf16():
    results += with_gradient(cpu.Bf16Conv2d(50, 3), normal(2, 18, 63, 65), held(50, 18, 3, 3))
    results += with_gradient(cpu.Bf16Conv2d(250, 3), normal(1, 180, 9, 9), held(250, 180, 3, 3))
    results += with_gradient(cpu.Bf16Conv2d(50, 1), normal(2, 300, 31, 33), held(50, 300, 1, 1))
    results += with_gradients(AttentionOfTwo(True))
np.savez(sys.argv[1], *[result.asnumpy() for result in results])
"""


@needs_compiler
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one processor")
def test_nothing_depends_on_the_number_of_threads(tmp_path):
    """To the last bit: a training that goes on elsewhere ends alike."""
    one = min(os.sched_getaffinity(0))
    script = tmp_path / "compute.py"
    script.write_text(COMPUTE)
    for name, processors in (("one", {one}), ("all", os.sched_getaffinity(0))):
        subprocess.run([sys.executable, str(script), str(tmp_path / f"{name}.npz")], check=True,
                       env={**os.environ, "PYTHONPATH": str(ROOT)},
                       preexec_fn=lambda processors=processors: os.sched_setaffinity(0, processors))  # fmt: skip
    with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "all.npz") as many:
        assert len(one.files) == (32 if ops.multiplies_bf16() else 18)
        for name in one.files:
            np.testing.assert_array_equal(one[name], many[name])


@needs_compiler
@pytest.mark.parametrize("mode", [ms.GRAPH_MODE, ms.PYNATIVE_MODE], ids=["graph", "pynative"])
def test_what_threads_share_is_whole(mode):
    """Enough values for all threads, in a number that they cannot share evenly."""
    ms.set_context(mode=mode)

    class Twice(nn.Cell):
        def __init__(self):
            super().__init__()
            self.silu = ops.silu()

        def construct(self, x):
            return self.silu(self.silu(x))

    x = np.random.default_rng(0).standard_normal(1_000_003).astype(np.float32)
    wide = x.astype(np.float64)
    for _ in range(2):
        wide = wide / (1 + np.exp(-wide))
    np.testing.assert_allclose(Twice()(Tensor(x)).asnumpy(), wide, atol=1e-6)


@needs_compiler
def test_a_type_that_it_does_not_compute_in_is_refused():
    """Rather than read as another. No layer passes one on."""
    with pytest.raises(RuntimeError, match="function\\(silu\\) is 1"):
        cpu.kernel("silu", cpu.first_shape)(Tensor(np.ones(4, np.float16))).asnumpy()


def weight_in_bf16(*shape):
    return Tensor(np.ones(shape, np.float32)).astype(ms.bfloat16)


@needs_compiler
def test_channels_that_do_not_fit_are_refused():
    x = Tensor(np.ones((1, 10, 2, 2), np.float32))
    with pytest.raises(RuntimeError, match="group_norm"):
        ops.group_norm(3, 1e-5)(x, x[0, :, 0, 0], x[0, :, 0, 0], ms.float32).asnumpy()
    x = Tensor(np.ones((1, 16, 16, 16), np.float32))
    with pytest.raises(RuntimeError, match="convolution"):
        ops.conv2d(16, 3, 1, 1, has_bias=False)(
            x, Tensor(np.ones((16, 32, 3, 3), np.float32)), None, ms.float32
        ).asnumpy()
    rows = Tensor(np.ones((4, 10), np.float32))
    with pytest.raises(RuntimeError, match="linear_unpacked"):
        cpu.UnpackedMatMul()(rows, weight_in_bf16(6, 12)).asnumpy()
    with pytest.raises(RuntimeError, match="linear_unpacked"):  # the weight is fp32
        cpu.UnpackedMatMul()(rows, Tensor(np.ones((6, 10), np.float32))).asnumpy()
    with pytest.raises(RuntimeError, match="linear_unpacked_dx"):
        cpu.UnpackedMatMul().product_dx(rows, weight_in_bf16(12, 6)).asnumpy()
    convolution, convolution_dx = cpu.winograd_kernels()
    for kernel, given, shape in (
        (convolution, x, (16, 32, 3, 3)),
        (convolution_dx, x, (32, 16, 3, 3)),
        (convolution, x, (16, 16, 1, 1)),
        (convolution, x.astype(ms.float16), (16, 16, 3, 3)),
    ):
        with pytest.raises(RuntimeError, match="convolution"):
            kernel(given, weight_in_bf16(*shape))[0].asnumpy()
    if ops.multiplies_bf16():
        with pytest.raises(RuntimeError, match="linear_bf16"):
            cpu.Bf16MatMul()(rows, weight_in_bf16(6, 12)).asnumpy()
        with pytest.raises(RuntimeError, match="conv_bf16"):
            ops.conv2d(16, 1, 1, 0, False, True)(x, weight_in_bf16(16, 32, 1, 1), None, ms.float32).asnumpy()
        with pytest.raises(RuntimeError, match="linear_bf16"):  # the weight is fp32
            cpu.Bf16MatMul()(rows, Tensor(np.ones((6, 10), np.float32))).asnumpy()
    with pytest.raises(RuntimeError, match="attention"):
        ops.attention(3, 3)(rows, rows, rows, 1).asnumpy()
