"""PyTorch's files of before 1.6: read without PyTorch, damaged ones answered. torch writes them in tests/parity."""

from __future__ import annotations

import pickle
from collections import OrderedDict

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.weights.read import open_checkpoint

MAGIC = 0x1950A86A20F9469CFC6C
ARRAYS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "a.bias": np.array([1, -2], np.float16),
    "count": np.array(7, np.int64),
}


class Global:
    """Pickles as the name of a class or function, whatever it is."""

    def __init__(self, module: str, name: str):
        self.text = f"c{module}\n{name}\n".encode()


def encode(value) -> bytes:
    """Pickle's protocol 2, as far as these files need it, with names of things that are not there."""
    if isinstance(value, Global):
        return value.text
    if isinstance(value, (dict, OrderedDict)):
        return b"}(" + b"".join(encode(key) + encode(item) for key, item in value.items()) + b"u"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(encode, value)) + b"t"
    return pickle.dumps(value, 2)[2:-1]


def tensor(key: str, array: np.ndarray) -> bytes:
    kind = {"f4": "FloatStorage", "f2": "HalfStorage", "i8": "LongStorage"}[array.dtype.str[1:]]
    strides = tuple(stride // array.itemsize for stride in array.strides)
    storage = encode(("storage", Global("torch", kind), key, "cpu", array.size, None)) + b"Q"
    rest = encode(0) + encode(array.shape) + encode(strides) + encode(False) + encode(None)
    return encode(Global("torch._utils", "_rebuild_tensor_v2")) + b"(" + storage + rest + b"tR"


def legacy(arrays=ARRAYS, version=1001, machine=None, program: bytes | None = None, beside=None) -> bytes:
    """The bytes of a file; `beside`: arrays outside of its `state_dict`, which it has then."""
    content = b"}(" + b"".join(encode(name) + tensor(str(i), array) for i, (name, array) in enumerate(arrays.items()))
    if beside:
        outside = (tensor(str(len(arrays) + i), array) for i, array in enumerate(beside))
        content = b"}(" + encode("state_dict") + content + b"u" + encode("optimizer") + b"(" + b"".join(outside) + b"t"
        arrays = {**arrays, **dict(enumerate(beside))}
    machine = {"protocol_version": 1001, "little_endian": True} if machine is None else machine
    heads = b"".join(pickle.dumps(value, 2) for value in (MAGIC, version, machine))
    keys = [str(i) for i in range(len(arrays))]
    data = b"".join(array.size.to_bytes(8, "little") + array.tobytes() for array in arrays.values())
    return heads + (program or b"\x80\x02" + content + b"u.") + pickle.dumps(keys, 2) + data


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


@pytest.mark.parametrize("content, answer", [
    (legacy(program=b"\x80\x02cos\nsystem\n(X\x04\0\0\0truetR."), "wants to run os.system"),
    (legacy(version=1000), "in a form that is not read here"),
    (legacy(machine={"little_endian": False}), "in a form that is not read here"),
    (legacy(machine=[]), "damaged"),
    (legacy(program=b"\x80\x02K\x05."), "damaged"),
], ids=["code", "version", "big-endian", "machine", "no tensors"])
def test_other_contents_are_answered(tmp_path, content, answer):
    with pytest.raises(UserError, match=answer):
        opened(tmp_path, content)
