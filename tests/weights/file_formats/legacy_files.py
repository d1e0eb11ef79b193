"""Files such as torch.save wrote before PyTorch 1.6, for an environment without PyTorch."""

from __future__ import annotations

import pickle
from collections import OrderedDict

import numpy as np

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
