"""What precision "auto" stands for on the CPU, and what an estimate expects it to be."""

from __future__ import annotations

import pytest

from ldm.runtime import precision, processor
from ldm.runtime.processor import cpuinfo, instruction_sets, parse_cpuinfo

XEON = "processor\t: 0\nflags\t\t: fpu sse avx512f avx512_bf16 amx_bf16\n\nprocessor\t: 1\nflags\t: fpu\n"
ZEN4 = "flags\t: fpu avx512f avx512_bf16"
OLDER = "flags\t: fpu avx512f avx512_vnni amx_int8 xavx512_bf16"
ARM = "processor\t: 0\nFeatures\t: fp asimd bf16\n\nModel\t: a board"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Makes a machine with this /proc/cpuinfo and, in its PATH, this compiler."""

    def make(text, compiler="c++"):
        (tmp_path / "cpuinfo").write_text(text)
        if compiler:
            (tmp_path / compiler).touch(mode=0o755)
        monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)

    return make


@pytest.mark.parametrize(
    ("multiplies", "keeps_fp32", "found"), [(True, False, "bf16"), (True, True, "fp32"), (False, False, "fp32")]
)
def test_auto_is_bf16_only_where_it_is_multiplied_and_weights_are_frozen(multiplies, keeps_fp32, found):
    assert precision.automatic_precision(lambda: multiplies, keeps_fp32) == found


def test_kernels_are_not_compiled_to_keep_fp32():
    assert precision.automatic_precision(lambda: pytest.fail("asked"), keeps_fp32=True) == "fp32"


@pytest.mark.parametrize(("text", "found"), [(XEON, True), (ZEN4, True), (OLDER, False), (ARM, False), ("", False)])
def test_kernels_are_expected_to_multiply_with_avx512_bf16(machine, text, found):
    machine(text)
    assert precision.kernels_are_expected_to_multiply_bf16() == found


def test_without_a_compiler_they_are_not(machine, monkeypatch):
    machine(ZEN4, compiler=None)
    assert not precision.kernels_are_expected_to_multiply_bf16()
    machine(ZEN4, compiler="clang")
    assert not precision.kernels_are_expected_to_multiply_bf16()
    for command, found in (("clang -v", True), ("gcc", False), ('clang "', False), (" ", False)):
        monkeypatch.setenv("CXX", command)
        assert precision.kernels_are_expected_to_multiply_bf16() == found, command


def test_cpuinfo_is_that_of_the_first_processor(machine, tmp_path, monkeypatch):
    machine(XEON)
    assert cpuinfo()["processor"] == "0" and instruction_sets(cpuinfo()).endswith("amx_bf16")
    assert parse_cpuinfo(ARM)["Model"] == "a board" and instruction_sets(parse_cpuinfo(ARM)) == "fp asimd bf16"
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "none")
    assert cpuinfo() == {} and instruction_sets({}) == ""
