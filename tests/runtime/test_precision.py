"""What precision "auto" stands for, and what the processor says of itself."""

from __future__ import annotations

import pytest

from ldm.runtime import precision

XEON = "processor\t: 0\nflags\t\t: fpu sse avx512f amx_tile amx_bf16\n\nprocessor\t: 1\n"
ZEN4 = "flags\t: fpu avx512f avx512_bf16"
OLDER = "flags\t: fpu avx512f avx512_vnni amx_int8"
ARM = "Features\t: fp asimd bf16"


@pytest.mark.parametrize(("text", "found"), [(XEON, True), (ZEN4, True), (OLDER, False), (ARM, False), ("", False)])
def test_a_processor_multiplies_bf16_with_amx_or_avx512(tmp_path, monkeypatch, text, found):
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(precision, "CPUINFO", tmp_path / "cpuinfo")
    assert precision.processor_multiplies_bf16() == found


def test_a_machine_without_cpuinfo_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "CPUINFO", tmp_path / "none")
    assert not precision.processor_multiplies_bf16()


@pytest.mark.parametrize(
    ("automatic", "multiplies", "device", "keeps_fp32", "found"),
    [
        (False, True, "CPU", False, "fp32"),
        (False, True, "Ascend", False, "fp16"),
        (True, True, "CPU", False, "bf16"),
        (True, True, "CPU", True, "fp32"),
        (True, False, "CPU", False, "fp32"),
        (True, True, "Ascend", False, "fp16"),
    ],
)
def test_auto_is_bf16_only_where_it_is_switched_on_and_has_weights_to_hold(
    monkeypatch, automatic, multiplies, device, keeps_fp32, found
):
    monkeypatch.setattr(precision, "AUTOMATIC_BF16", automatic)
    monkeypatch.setattr(precision, "processor_multiplies_bf16", lambda: multiplies)
    assert precision.automatic_precision(device, keeps_fp32) == found
