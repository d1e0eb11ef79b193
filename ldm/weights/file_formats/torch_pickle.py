"""Read the pickles in PyTorch's files without executing them.

A pickle is a program, and Python's unpickler calls the functions that it names. Even if only some names are allowed, a
program of 100 bytes can fill the memory (a memo index of 2^28), never end (hashing a key of nested tuples takes
exponential time) or overflow the stack of the interpreter. Therefore `pickletools`, which executes nothing, splits the
program into instructions, and this module interprets those that PyTorch's files consist of. A call that rebuilds a
tensor gives a record of where its data is. Objects that training frameworks leave beside the weights, such as callbacks
and numpy scalars, become a placeholder. Any other name is refused.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np

from ldm.errors import plain
from ldm.files.npy import MAX_DIMENSIONS
from ldm.weights.arrays import BFLOAT16, MAX_ELEMENTS, MAX_NAME, MAX_TENSORS

MAX_PICKLE = 64 << 20  # bytes; the pickle of the largest published Stable Diffusion files has 2 MB
MAX_STEPS = 2_000_000  # instructions; 4,000 tensors, those of a training checkpoint, take 120,000
MAX_VALUES = 1_000_000  # values that are searched for tensors, counted again for every reference
MAX_LEVELS = 32  # nested dictionaries and lists

DTYPES: dict[str, np.dtype] = {"bfloat16": BFLOAT16, **{name: np.dtype(code) for name, code in {
    "float64": "<f8", "float32": "<f4", "float16": "<f2", "int64": "<i8", "int32": "<i4",
    "int16": "<i2", "int8": "i1", "uint8": "u1", "bool": "?", "uint64": "<u8", "uint32": "<u4", "uint16": "<u2",
}.items()}}  # fmt: skip
# Names of storages -> their element types. That of an untyped one is given with its tensor, see _tensor_of_type.
STORAGES = {f"torch.{name}": DTYPES[dtype] for name, dtype in {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "storage.UntypedStorage": "uint8",
    "storage._UntypedStorage": "uint8",
}.items()}  # fmt: skip
# Classes and functions of objects that files of PyTorch Lightning, textual inversion and trainers hold beside the
# weights. The objects are not needed and become placeholders.
UNUSED_OBJECTS = {
    "_codecs.encode", "argparse.Namespace", "collections.deque", "typing.Any",
    *(f"datetime.{name}" for name in ("datetime", "date", "time", "timedelta", "timezone")),
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in (  # the second is Python 3.13's
        "Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")),
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in (
        "set", "frozenset", "complex", "bytearray", "slice", "range", "xrange", "dict", "list", "tuple", "int", "long",
        "float", "str", "unicode", "bytes", "bool")),
    "numpy.dtype", "numpy.ndarray", "numpy.core.multiarray.scalar", "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar", "numpy._core.multiarray._reconstruct", "numpy.core.numeric._frombuffer",
    "numpy._core.numeric._frombuffer",
    "torch.device", "torch.Tensor", "torch.nn.parameter.Parameter", "torch.serialization._get_layout",
    *(f"torch.{name}" for name in DTYPES),
    *(f"torch.{name}" for name in ("complex64", "complex128", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz",
                                   "float8_e5m2fnuz")),
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig", "omegaconf.nodes.AnyNode",
    "omegaconf.base.Metadata", "omegaconf.base.ContainerMetadata",
}  # fmt: skip
# Packages whose functions have no use in a pickle other than to execute something.
PROGRAMS = {
    "builtins", "__builtin__", "os", "posix", "nt", "io", "sys", "subprocess", "shutil", "socket", "ctypes",
    "importlib", "runpy", "pty", "commands", "webbrowser", "operator", "functools", "types", "code", "pip", "asyncio",
    "timeit", "multiprocessing", "pickle", "cloudpickle", "dill", "pdb", "bdb", "profile", "cProfile", "doctest",
    "urllib",
}  # fmt: skip


class Refused(Exception):
    """The pickle refers to something that is not allowed, or exceeds a bound. The message has the way out."""


class Damaged(Exception):
    """The pickle is cut off, or not one that PyTorch writes."""


@dataclass(frozen=True)
class Storage:
    """A storage of elements: their type, and the name of its data in the file."""

    dtype: np.dtype
    key: str


@dataclass(frozen=True)
class Tensor:
    """A view of a storage. `offset` and `stride` are in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class _Name:
    """The name of a function or class, which is never imported."""

    text: str


class _Placeholder:
    """Stands for an object that is not created. It ignores the state and the items that it is given."""


_PLACEHOLDER = _Placeholder()


class _ParameterDict(dict):
    """The parameters of a torch.nn.ParameterDict, in which the first textual inversions are."""


def read_pickles(file: BinaryIO, pickles: int = 1) -> tuple[list[Any], dict[str, Storage]]:
    """Read consecutive pickles from the position of a file on.

    Args:
        file: It is read up to the end of the last pickle.
        pickles: Number of pickles.

    Returns:
        The values: None, numbers, texts, bytes, lists, tuples, dictionaries (without keys that are neither texts nor
        integers), Tensors and placeholders. And every storage that is named, by its key.

    Raises:
        Refused: A pickle refers to something that is not allowed, or exceeds a bound.
        Damaged: A pickle is cut off, or not one that PyTorch writes.
    """
    machine, values = _Machine(), []
    try:
        for _ in range(pickles):
            for opcode, argument, _ in pickletools.genops(file):
                machine.step(opcode.name, argument)
            values.append(machine.finish())
    except IndexError:
        raise Damaged("an instruction finds too few values") from None
    except ValueError as error:  # from genops: a cut-off or wrong text, an unknown instruction, or no end
        raise Damaged(plain(error, 100)) from None
    return values, machine.storages


class _Machine:
    """The state that the instructions of pickles change."""

    def __init__(self) -> None:
        self.storages: dict[str, Storage] = {}
        self._steps = 0
        self._clear()

    def _clear(self) -> None:
        self.stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stack below each mark
        self._memo: dict[int, Any] = {}

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def finish(self) -> Any:
        """Return the value of the pickle that has ended."""
        value = self.stack.pop()
        self._clear()
        return value

    def step(self, name: str, argument: Any) -> None:
        self._count(1)
        if name in _LITERALS:
            self.push(argument)
        elif name in _ON_STACK:
            _ON_STACK[name](self)
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            if argument not in self._memo:
                raise Damaged("a value is used before it is stored")
            self.push(self._memo[argument])
        elif name == "GLOBAL":
            self._name(*argument.split(" ", 1))
        elif name == "PROTO":
            if argument > 5:
                raise Damaged(f"pickle protocol {argument}")
        elif name not in ("FRAME", "STOP"):
            raise Damaged(f"the instruction {name}, which PyTorch does not write")

    def _count(self, steps: int) -> None:
        self._steps += steps
        if self._steps > MAX_STEPS:
            raise Refused(f"its pickle has more than {MAX_STEPS:,} instructions: get the weights as .safetensors")

    def _mark(self) -> None:
        self._below.append(self.stack)
        self.stack = []

    def _since_mark(self) -> list[Any]:
        values, self.stack = self.stack, self._below.pop()
        return values

    def _frozenset(self) -> None:
        self._since_mark()
        self.push(_PLACEHOLDER)

    def _take(self, count: int) -> tuple[Any, ...]:
        if len(self.stack) < count:
            raise IndexError
        values = tuple(self.stack[-count:])
        del self.stack[-count:]
        return values

    def _memoize(self) -> None:
        self._memo[len(self._memo)] = self.stack[-1]

    def _append(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(values)
        elif target is not _PLACEHOLDER:
            raise Damaged("values are appended to something that is not a list")

    def _set(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            # Other keys are not hashed: for nested tuples it could take for ever, or overflow the stack.
            target.update((key, value) for key, value in zip(values[::2], values[1::2]) if isinstance(key, (str, int)))
        elif target is not _PLACEHOLDER:
            raise Damaged("items are set in something that is not a dictionary")

    def _build(self) -> None:
        attributes = self.stack.pop()  # such as the `_metadata` of a state dict
        target = self.stack[-1]
        if not isinstance(target, (dict, Tensor, _Placeholder)):
            raise Damaged("attributes are set on a value that has none")
        if isinstance(target, _ParameterDict) and isinstance(attributes, dict):
            parameters = attributes.get("_parameters")
            if isinstance(parameters, dict):
                self._count(len(parameters))
                target.update(parameters)

    def _global(self) -> None:
        module, name = self._take(2)
        if not (isinstance(module, str) and isinstance(name, str)):
            raise Damaged("a name that is not a text")
        self._name(module, name)

    def _name(self, module: str, name: str) -> None:
        text = f"{module}.{name}"
        if text not in _KNOWN:
            raise Refused(_refusal(module, text))
        self.push(_Name(text))

    def _call(self, count: int = 2) -> None:
        function, arguments, *_ = self._take(count)
        if not (isinstance(function, _Name) and isinstance(arguments, tuple)):
            raise Damaged("a call of something that is not a function")
        if function.text in _DICTIONARIES:
            self.push({})
            for argument in arguments:
                if isinstance(argument, (dict, list)):
                    self._count(len(argument))  # copying costs as many steps as there are items
                    self._set(_flat(argument))
        elif function.text == _PARAMETER_DICT:
            self.push(_ParameterDict())
        else:
            self.push(_CALLS[function.text](arguments) if function.text in _CALLS else _PLACEHOLDER)

    def _persistent(self) -> None:
        identity = self.stack.pop()
        if isinstance(identity, tuple) and len(identity) == 4 and identity[0] == "module":
            self.push(identity[1])  # before 1.6 the source of a module's class follows its name
            return
        if not (isinstance(identity, tuple) and 5 <= len(identity) <= 6 and identity[0] == "storage"):
            raise Damaged("an unknown kind of storage")
        _, kind, key, _device, _count, *view = identity  # before 1.6 a storage can be a view of another
        if any(part is not None for part in view):
            raise Damaged("a storage that is a part of another")
        if not (isinstance(kind, _Name) and kind.text in STORAGES and isinstance(key, str) and len(key) <= MAX_NAME):
            raise Damaged("an unknown kind of storage")
        self.storages[key] = Storage(STORAGES[kind.text], key)
        self.push(self.storages[key])


_LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
}  # fmt: skip
_ON_STACK: dict[str, Callable[[_Machine], object]] = {
    "NONE": lambda machine: machine.push(None),
    "NEWTRUE": lambda machine: machine.push(True),
    "NEWFALSE": lambda machine: machine.push(False),
    "EMPTY_LIST": lambda machine: machine.push([]),
    "EMPTY_DICT": lambda machine: machine.push({}),
    "EMPTY_TUPLE": lambda machine: machine.push(()),
    "EMPTY_SET": lambda machine: machine.push(_PLACEHOLDER),
    "FROZENSET": _Machine._frozenset,
    "ADDITEMS": lambda machine: machine._since_mark(),
    "TUPLE": lambda machine: machine.push(tuple(machine._since_mark())),
    "TUPLE1": lambda machine: machine.push(machine._take(1)),
    "TUPLE2": lambda machine: machine.push(machine._take(2)),
    "TUPLE3": lambda machine: machine.push(machine._take(3)),
    "APPEND": lambda machine: machine._append([machine.stack.pop()]),
    "APPENDS": lambda machine: machine._append(machine._since_mark()),
    "SETITEM": lambda machine: machine._set(list(machine._take(2))),
    "SETITEMS": lambda machine: machine._set(machine._since_mark()),
    "MARK": _Machine._mark,
    "POP": lambda machine: machine.stack.pop(),
    "POP_MARK": lambda machine: machine._since_mark(),
    "MEMOIZE": _Machine._memoize,
    "STACK_GLOBAL": _Machine._global,
    "REDUCE": _Machine._call,
    "NEWOBJ": _Machine._call,
    "NEWOBJ_EX": lambda machine: machine._call(3),
    "BUILD": _Machine._build,
    "BINPERSID": _Machine._persistent,
}


def _flat(items: dict | list) -> list[Any]:
    """Return keys and values in turn, of a dictionary or a list of pairs. Items that are not pairs are left out."""
    pairs = items.items() if isinstance(items, dict) else items
    return [part for pair in pairs if isinstance(pair, (list, tuple)) and len(pair) == 2 for part in pair]


def _refusal(module: str, name: str) -> str:
    if module.startswith("__torch__"):
        return (
            "it is a TorchScript archive, a program with its weights, as OpenAI's CLIP was published: get the weights "
            "alone, as .safetensors or a Hugging Face folder"
        )
    name = plain(name, 100)
    if module.split(".")[0] in PROGRAMS:
        return (
            f"its pickle would execute {name}, which weights do not need, so it may be malicious: get the weights as "
            ".safetensors"
        )
    return (
        f"its pickle refers to {name}, which is unknown and is not executed: save its state_dict alone, with plain "
        "tensors, or get the weights as .safetensors"
    )


def _tensor(arguments: tuple[Any, ...]) -> Tensor:
    """torch._utils._rebuild_tensor and _rebuild_tensor_v2: (storage, offset, shape, stride, ...)."""
    if len(arguments) < 4 or not isinstance(arguments[0], Storage):
        raise Damaged("a tensor without a storage")
    storage, offset, shape, stride = arguments[:4]
    for sizes in (shape, stride):
        if not isinstance(sizes, (tuple, list)):
            raise Damaged("a tensor whose shape is not a tuple")
        if len(sizes) > MAX_DIMENSIONS:
            raise Damaged(f"a tensor of {len(sizes):,} dimensions, at most {MAX_DIMENSIONS} are read")
    if not all(isinstance(size, int) and abs(size) <= MAX_ELEMENTS for size in (offset, *shape, *stride)):
        raise Damaged(f"a tensor whose sizes are not whole numbers of at most {MAX_ELEMENTS:,}")
    return Tensor(storage, offset, tuple(shape), tuple(stride))


def _tensor_of_type(arguments: tuple[Any, ...]) -> Tensor:
    """torch._utils._rebuild_tensor_v3: (untyped storage, offset, shape, stride, gradient?, hooks, type, ...)."""
    tensor = _tensor(arguments)
    kind = arguments[6] if len(arguments) > 6 else None
    if not isinstance(kind, _Name):
        raise Damaged("a tensor without a type")
    dtype = DTYPES.get(kind.text[len("torch.") :])
    if dtype is None:
        raise Refused(f"it holds tensors of type {kind.text}, which cannot be read: convert it to float16 or float32")
    return replace(tensor, storage=Storage(dtype, tensor.storage.key))


def _tensor_with_attributes(arguments: tuple[Any, ...]) -> Any:
    """torch._tensor._rebuild_from_type_v2: (function, class, its arguments, attributes)."""
    if len(arguments) < 3 or not isinstance(arguments[0], _Name) or not isinstance(arguments[2], tuple):
        raise Damaged("a tensor without a function that rebuilds it")
    rebuild = _CALLS.get(arguments[0].text)
    if rebuild not in (_tensor, _tensor_of_type, _first_argument):
        raise Damaged("a tensor without a function that rebuilds it")
    return rebuild(arguments[2])


def _first_argument(arguments: tuple[Any, ...]) -> Any:
    """torch.Size and functions that wrap a tensor: (value, ...)."""
    if not arguments:
        raise Damaged("a call without a value")
    return arguments[0]


_DICTIONARIES = {"collections.OrderedDict", "collections.defaultdict", "collections.Counter"}
_CALLS = {
    "torch.Size": _first_argument,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_type,
    "torch._utils._rebuild_parameter": _first_argument,
    "torch._utils._rebuild_parameter_with_state": _first_argument,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _first_argument,
    "torch._tensor._rebuild_from_type_v2": _tensor_with_attributes,
}
_PARAMETER_DICT = "torch.nn.modules.container.ParameterDict"
_KNOWN = {_PARAMETER_DICT, *_CALLS, *_DICTIONARIES, *STORAGES, *UNUSED_OBJECTS}


def find_tensors(content: Any) -> dict[str, Tensor]:
    """Return the tensors in `content`, or in its `state_dict` if there is one.

    Returns:
        Name -> tensor. Keys of nested dictionaries and positions in lists are joined by dots.

    Raises:
        Refused: There are more than MAX_TENSORS, MAX_VALUES or MAX_LEVELS. Lists that contain each other have no
            end.
    """
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    tensors: dict[str, Tensor] = {}
    for values, (name, tensor) in enumerate(_walk(content, "", 0)):
        if values >= MAX_VALUES or len(tensors) > MAX_TENSORS:
            raise Refused(
                f"it holds more than {MAX_VALUES:,} values or {MAX_TENSORS:,} tensors: get the weights as .safetensors"
            )
        if tensor is not None:
            tensors[name] = tensor
    return tensors


def _walk(value: Any, name: str, level: int) -> Iterator[tuple[str, Tensor | None]]:
    """Yield the name of every value in `value` in order, with the tensor, or None for other values."""
    yield name, value if isinstance(value, Tensor) else None
    if isinstance(value, (dict, list, tuple)):
        if level == MAX_LEVELS:
            raise Refused(f"its lists are nested in more than {MAX_LEVELS} levels: get the weights as .safetensors")
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if len(name) + (len(key) if isinstance(key, str) else 0) > MAX_NAME:
                raise Refused(f"a name in it has more than {MAX_NAME:,} characters: get the weights as .safetensors")
            yield from _walk(inner, f"{name}.{key}" if name else str(key), level + 1)
