"""kernels.cc: compiled once, and done without where that is not possible. What its functions compute is tested in
test_device_forms.py and test_attention.py."""

from __future__ import annotations

import logging
import stat
import sys

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from ldm.config.model import load_model_config
from ldm.models import device_forms, kernels
from ldm.models.stable_diffusion import build_model
from tests.conftest import ROOT

pytestmark = pytest.mark.usefixtures("graph_mode")
needs_compiler = pytest.mark.skipif(not kernels.available(), reason="no C++ compiler here")


@pytest.fixture
def library(tmp_path, monkeypatch):
    """kernels.library as in a new process whose cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return kernels.library.__wrapped__


def compiler(folder, monkeypatch, text: str) -> None:
    """Let CXX name a shell script."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(path))


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@needs_compiler
class TestCompiling:
    def test_once(self, library, tmp_path):
        first = library()
        assert first.parent == tmp_path / "cache" / "mindspore-stable-diffusion-lora"
        assert files(tmp_path) == [first.name]
        made = first.stat().st_mtime_ns
        assert library() == first and first.stat().st_mtime_ns == made

    def test_nobody_else_can_put_a_library_there(self, library):
        assert stat.S_IMODE(library().parent.stat().st_mode) == 0o700

    def test_another_source_is_compiled_anew(self, library, tmp_path, monkeypatch):
        first = library()
        changed = tmp_path / "kernels.cc"
        changed.write_bytes(kernels.SOURCE.read_bytes() + b"// changed\n")
        monkeypatch.setattr(kernels, "SOURCE", changed)
        assert library() != first and library().exists() and first.exists()

    def test_another_processor_too(self, library, monkeypatch):
        first = library()
        monkeypatch.setattr(kernels, "processor", lambda: "another")
        assert library() != first


class TestWithoutACompiler:
    def said(self, library, caplog) -> str:
        with caplog.at_level(logging.WARNING):
            assert library() is None
        assert "install g++" in caplog.text
        return caplog.text

    def test_none_is_there(self, library, monkeypatch, caplog):
        monkeypatch.setenv("CXX", "/nowhere/c++")
        assert "/nowhere/c++" in self.said(library, caplog)

    def test_it_fails(self, library, tmp_path, monkeypatch, caplog):
        compiler(tmp_path, monkeypatch, '[ "$1" = --version ] || { echo no such flag >&2; exit 1; }')
        assert "no such flag" in self.said(library, caplog)
        assert files(tmp_path / "cache") == []

    def test_it_is_stopped(self, library, tmp_path, monkeypatch, caplog):
        compiler(tmp_path, monkeypatch,
                 '[ "$1" = --version ] && exit; for last; do :; done; echo half > "$last"; kill -9 $$')
        self.said(library, caplog)
        assert files(tmp_path / "cache") == []

    def test_the_cache_cannot_be_written(self, library, tmp_path, monkeypatch, caplog):
        (tmp_path / "cache").write_text("a file")
        compiler(tmp_path, monkeypatch, "exit 0")
        assert str(tmp_path / "cache") in self.said(library, caplog)

    def test_other_systems_say_nothing(self, library, monkeypatch, caplog):
        monkeypatch.setattr(sys, "platform", "darwin")
        assert library() is None and not caplog.records


def tiny_unet(monkeypatch, compiled: bool):
    monkeypatch.setattr(device_forms, "available", lambda: compiled)
    np.random.seed(3)
    return build_model(load_model_config(ROOT / "tests" / "tiny.yaml")).model.diffusion_model


@needs_compiler
def test_a_network_computes_the_same_without(monkeypatch):
    given = [Tensor(np.random.default_rng(i).standard_normal(shape).astype(np.float32))
             for i, shape in enumerate([(2, 4, 16, 16), (2, 77, 32)])]
    found, plain = (tiny_unet(monkeypatch, compiled)(given[0], Tensor(np.array([500, 3], np.int32)), given[1]).asnumpy()
                    for compiled in (True, False))
    np.testing.assert_allclose(found, plain, atol=1e-5 * np.abs(plain).max())


@needs_compiler
@pytest.mark.parametrize("mode", [ms.GRAPH_MODE, ms.PYNATIVE_MODE], ids=["graph", "pynative"])
def test_what_threads_share_is_whole(mode):
    """Enough values for all threads, in a number that they cannot share evenly."""
    ms.set_context(mode=mode)

    class Twice(nn.Cell):
        def __init__(self):
            super().__init__()
            self.silu = device_forms.silu()

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
        kernels.kernel("silu", kernels.like(0))(Tensor(np.ones(4, np.float16))).asnumpy()
