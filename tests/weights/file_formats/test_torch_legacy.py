"""PyTorch's files of before 1.6: read without PyTorch, damaged ones answered. torch writes them in tests/parity."""

from __future__ import annotations

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.weights.checkpoint import open_checkpoint
from tests.weights.file_formats.legacy_files import ARRAYS, encode, legacy, tensor


def opened(tmp_path, content: bytes):
    (tmp_path / "old.pth").write_bytes(content)
    return open_checkpoint(tmp_path / "old.pth")


def test_arrays_come_out_as_they_went_in(tmp_path):
    checkpoint = opened(tmp_path, legacy())
    assert list(checkpoint) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert checkpoint[name].dtype == array.dtype
        np.testing.assert_array_equal(checkpoint[name], array)


def test_tensors_beside_the_state_dict_are_left_out(tmp_path):
    checkpoint = opened(tmp_path, legacy(beside=[np.ones(5, np.float32), np.ones(3, np.float16)]))
    assert list(checkpoint) == list(ARRAYS)
    np.testing.assert_array_equal(checkpoint["a.weight"], ARRAYS["a.weight"])


@pytest.mark.parametrize("cut", [1, 20, 60, 100, 200, 300, 400, 500])
def test_a_cut_off_file_is_answered(tmp_path, cut):
    with pytest.raises(UserError, match="before 1.6"):
        opened(tmp_path, legacy()[:-cut])


FLAT = tensor("0", np.ones((1,) * 30, np.float32))


@pytest.mark.parametrize(
    "content, answer",
    [
        (legacy(program=b"\x80\x02cos\nsystem\n(X\x04\0\0\0truetR."), "would execute os.system"),
        (legacy(version=1000), "in a form that cannot be read"),
        (legacy(machine={"little_endian": False}), "in a form that cannot be read"),
        (legacy(machine=[]), "damaged"),
        (legacy(program=b"\x80\x02K\x05."), "damaged"),
        (legacy({}, program=b"\x80\x02]q\0h\0a."), "lists are nested"),
        (legacy(program=b"\x80\x02}" + encode("w") + FLAT.replace(b"K\x01" * 30, b"K\x01" * 50) + b"s."), "at most 32"),
        (legacy().replace(b"X\x01\0\0\x000", b"X\x01\0\0\x009", 1), "damaged"),
    ],
    ids=["code", "version", "big-endian", "machine", "no tensors", "a list in itself", "50 dimensions", "storage"],
)
def test_other_contents_are_answered(tmp_path, content, answer):
    with pytest.raises(UserError, match=answer):
        opened(tmp_path, content)
