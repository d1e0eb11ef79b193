"""What the dry run's tools read, and what they say where they cannot run."""

from __future__ import annotations

import sys
from collections import Counter

import pytest

from ldm.errors import UserError
from tools.ascend import stub_cann
from tools.ascend.dry_run import DoesNotCompile, check_compiled, report, training_flags
from tools.ascend.simulation import Simulated, _read

pytestmark = pytest.mark.without_dry_run

LOG = """\
[INFO] DEVICE(7,7f,python):2026-01-01 [a.cc:177] GenerateKernelMod] kernel opname:ZerosLike, kernel type:acl_kernel
@dry run: {}
[INFO] DEVICE(7,7f,python):2026-01-01 [a.cc:177] GenerateKernelMod] kernel opname:Cast, kernel type:opapi_kernel
[INFO] DEVICE(7,7f,python):2026-01-01 [a.cc:177] GenerateKernelMod] kernel opname:Cast, kernel type:opapi_kernel
[INFO] DEVICE(7,7f,python):2026-01-01 [a.cc:177] GenerateKernelMod] kernel opname:Conv2D, kernel type:acl_kernel
[INFO] DEVICE(7,7f,python):2026-01-01 [a.cc:12] Other] something else
a line of the program
@dry run: {"name": "unet", "peak_bytes": 1500000000, "seconds": 2.0}
"""


@pytest.fixture
def done():
    result = Simulated(0, Counter())
    _read(LOG.splitlines(keepends=True), result)
    return result


def test_kernels_are_counted_by_graph(done):
    (graph,) = done.graphs
    assert graph.table() == {"kernels": {"aclnn": {"Cast": 2}, "aclop": {"Conv2D": 1}}, "peak_bytes": 1500000000}
    assert done.kernels["ZerosLike", "aclop"] == 1
    assert list(done.lines) == ["a line of the program"]
    assert "| Cast | aclnn | 2 |" in report(graph) and "2 aclnn, 1 aclop; peak memory 1.500 GB" in report(graph)


def test_a_graph_that_is_missing_or_a_process_that_fails_is_an_error(done):
    check_compiled(done, ["unet"])
    with pytest.raises(DoesNotCompile, match="step(?s:.*)a line of the program"):
        check_compiled(done, ["unet", "step"])
    done.exit_code = 1
    with pytest.raises(DoesNotCompile):
        check_compiled(done, ["unet"])


def test_paths_are_absolute_for_the_process_that_runs_elsewhere():
    flags = training_flags(["--model_config", "tests/tiny.yaml"])
    assert f"--model_config={stub_cann.ROOT / 'tests' / 'tiny.yaml'}" in flags


@pytest.mark.parametrize(
    "name, value, reason",
    [
        ("shutil.which", lambda program: None, "gcc"),
        ("importlib.metadata.version", lambda package: "2.10.0", "2.8.0 only"),
        ("platform.machine", lambda: "aarch64", "x86-64"),
    ],
)
def test_where_it_is_not_possible_the_reason_is_named(monkeypatch, name, value, reason):
    monkeypatch.setattr(f"tools.ascend.stub_cann.{name}", value)
    assert reason in stub_cann.why_not_here()
    with pytest.raises(UserError, match=reason):
        stub_cann.stub_environment()


@pytest.mark.skipif(sys.platform != "linux", reason="the libraries are for Linux")
def test_a_c_function_of_the_stub_does_nothing():
    assert stub_cann._empty_function("aclnnAdd") == "long aclnnAdd(void) { return 0; }\n"
    assert "return 1" in stub_cann._empty_function("_ZN2ge15OperatorFactory9IsExistOpERKSs")
