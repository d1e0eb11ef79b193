"""What differs between MindSpore's versions."""

import logging
from pathlib import Path

import mindspore as ms
import pytest

from ldm.runtime.versions import check_version, mindspore_version, onednn_library, splits_into_views


@pytest.mark.parametrize(
    ("version", "numbers"), [("2.8.0", (2, 8, 0)), ("2.10.0", (2, 10, 0)), ("2.8.0rc1", (2, 8, 0)), ("2.9.dev", (2, 9))]
)
def test_a_version_is_compared_by_its_numbers(monkeypatch, version, numbers):
    monkeypatch.setattr(ms, "__version__", version)
    assert mindspore_version() == numbers
    assert splits_into_views() is True


def test_an_operator_that_2_7_lacks_on_the_cpu_is_not_used_there(monkeypatch):
    monkeypatch.setattr(ms, "__version__", "2.7.2")
    assert splits_into_views() is False


@pytest.mark.parametrize(
    ("version", "device", "words"),
    [
        ("2.8.0", "CPU", ""),
        ("2.7.2", "CPU", ""),
        ("2.10.0", "Ascend", ""),
        ("2.10.0", "CPU", "slow convolutions"),
        ("2.9.0", "CPU", "was not tested"),
        ("2.7.1", "CPU", "was not tested"),
        ("3.0.0", "Ascend", "was not tested"),
    ],
)
def test_a_version_that_was_not_tested_or_is_slow_is_reported_with_the_way_out(
    monkeypatch, caplog, version, device, words
):
    monkeypatch.setattr(ms, "__version__", version)
    with caplog.at_level(logging.WARNING):
        check_version(device)
    assert words in caplog.text and bool(words) == bool(caplog.text)
    assert bool(words) == ("pip install mindspore==2.8.0" in caplog.text)


def test_the_library_with_onednn_is_in_the_installed_version():
    assert (Path(ms.__file__).parent / "lib" / onednn_library()).exists()
