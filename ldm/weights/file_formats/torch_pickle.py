"""The pickles in PyTorch's files, read without running them.

A pickle is a program, and Python's unpickler calls what it names. Even with a closed list of names, a program of 100
bytes could fill the memory (a memo index of 2^28), never end (a key made of nested tuples is hashed in exponential
time) or overflow the interpreter's stack. So `pickletools`, which runs nothing, splits the program into its
instructions, and those that PyTorch's files are made of are worked through here on plain values: what rebuilds a tensor
becomes a record of where its bytes lie, and what training frameworks leave beside the weights (callbacks, numpy's
scalars) becomes an object that holds and does nothing. Any other name is refused.
"""

from __future__ import annotations

import pickletools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from ldm.errors import plain
from ldm.files.npy import MOST_DIMENSIONS
from ldm.weights.arrays import MOST_ELEMENTS, MOST_NAME, MOST_TENSORS

MOST_PICKLE = 64 << 20  # bytes; the pickle of the largest published Stable Diffusion files has 2 MB
MOST_STEPS = 2_000_000  # instructions; 4,000 tensors, those of a training checkpoint, take 120,000
MOST_VALUES = 1_000_000  # values that are looked at for tensors, those that are held twice counted twice
MOST_LEVELS = 32  # dictionaries and lists in one another

DTYPES = {
    "float64": "<f8", "float32": "<f4", "float16": "<f2", "bfloat16": "bf16", "int64": "<i8", "int32": "<i4",
    "int16": "<i2", "int8": "i1", "uint8": "u1", "bool": "?", "uint64": "<u8", "uint32": "<u4", "uint16": "<u2",
}  # fmt: skip
# The type of a storage's elements. That of an untyped one comes with its tensor (see _tensor_of_type).
STORAGES = {
    "torch.DoubleStorage": "<f8", "torch.FloatStorage": "<f4", "torch.HalfStorage": "<f2",
    "torch.BFloat16Storage": "bf16", "torch.LongStorage": "<i8", "torch.IntStorage": "<i4",
    "torch.ShortStorage": "<i2", "torch.CharStorage": "i1", "torch.ByteStorage": "u1", "torch.BoolStorage": "?",
    "torch.storage.UntypedStorage": "u1", "torch.storage._UntypedStorage": "u1",
}  # fmt: skip
# What stands beside the weights in files of PyTorch Lightning, of textual inversion and of trainers; nothing of it is
# needed, and nothing of it is made.
INERT = {
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
    "torch.nn.modules.container.ParameterDict",
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig", "omegaconf.nodes.AnyNode",
    "omegaconf.base.Metadata", "omegaconf.base.ContainerMetadata",
}  # fmt: skip
# Packages whose names in a pickle are there to run something.
PROGRAMS = {
    "builtins", "__builtin__", "os", "posix", "nt", "io", "sys", "subprocess", "shutil", "socket", "ctypes",
    "importlib", "runpy", "pty", "commands", "webbrowser", "operator", "functools", "types", "code", "pip", "asyncio",
    "timeit", "multiprocessing", "pickle", "cloudpickle", "dill", "pdb", "bdb", "profile", "cProfile", "doctest",
    "urllib",
}  # fmt: skip


class Refused(Exception):
    """The pickle names what is not in the list, or goes over a bound: the message says which, and the way out."""


class Damaged(Exception):
    """The pickle is cut off, or is none that PyTorch writes."""


@dataclass(frozen=True)
class Storage:
    dtype: str
    key: str

    @property
    def itemsize(self) -> int:
        return 2 if self.dtype == "bf16" else np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Tensor:
    storage: Storage
    offset: int  # elements
    shape: tuple[int, ...]
    stride: tuple[int, ...]  # elements


@dataclass(frozen=True)
class _Name:
    """The name of a function or class, which is never looked up."""

    text: str


class _Inert:
    """Stands for an object that is not made: it takes any state and items, and holds none."""


_NOTHING = _Inert()


def run(file: BinaryIO, pickles: int = 1) -> tuple[list[Any], dict[str, Storage]]:
    """Work through `pickles` that stand one after another from the file's position on, and no further.

    Returns:
        Their values: None, numbers, texts, bytes, lists, tuples, dictionaries (keys are texts and whole numbers, others
        are left out) and Tensors; and every storage that was named, by its key.

    Raises:
        Refused: see there.
        Damaged: see there.
    """
    machine, values = _Machine(), []
    try:
        for _ in range(pickles):
            for opcode, argument, _ in pickletools.genops(file):
                machine.step(opcode.name, argument)
            values.append(machine.finish())
    except IndexError:
        raise Damaged("an instruction finds too few values") from None
    except ValueError as error:  # of genops: a text that is cut off or no UTF-8, an unknown instruction, no end
        raise Damaged(plain(error, 100)) from None
    return values, machine.storages


class _Machine:
    """What the instructions of pickles work on."""

    def __init__(self) -> None:
        self.storages: dict[str, Storage] = {}
        self._steps = 0
        self._clear()

    def _clear(self) -> None:
        self.stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks below each mark
        self._memo: dict[int, Any] = {}

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def finish(self) -> Any:
        """The value of the pickle that has ended."""
        value = self.stack.pop()
        self._clear()
        return value

    def step(self, name: str, argument: Any) -> None:
        self._count(1)
        if name in _LITERALS:
            self.push(argument)
        elif name in _ON_TOP:
            _ON_TOP[name](self)
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            if argument not in self._memo:
                raise Damaged("a value is used before it is there")
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
        if self._steps > MOST_STEPS:
            raise Refused(f"its pickle has more than {MOST_STEPS:,} instructions: get the weights as .safetensors")

    def _mark(self) -> None:
        self._below.append(self.stack)
        self.stack = []

    def _since_mark(self) -> list[Any]:
        values, self.stack = self.stack, self._below.pop()
        return values

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
        elif target is not _NOTHING:
            raise Damaged("values are added to what is no list")

    def _set(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            # Whatever else may be a key is not hashed: a tuple of tuples could take for ever, or overflow the stack.
            target.update((key, value) for key, value in zip(values[::2], values[1::2]) if isinstance(key, (str, int)))
        elif target is not _NOTHING:
            raise Damaged("items are set of what is no dictionary")

    def _build(self) -> None:
        self.stack.pop()  # attributes, such as the `_metadata` of a state dict
        if not isinstance(self.stack[-1], (dict, Tensor, _Inert)):
            raise Damaged("attributes are set of what has none")

    def _global(self) -> None:
        module, name = self._take(2)
        if not (isinstance(module, str) and isinstance(name, str)):
            raise Damaged("a name that is no text")
        self._name(module, name)

    def _name(self, module: str, name: str) -> None:
        text = f"{module}.{name}"
        if text not in _KNOWN:
            raise Refused(_refusal(module, text))
        self.push(_Name(text))

    def _call(self, count: int = 2) -> None:
        function, arguments, *_ = self._take(count)
        if not (isinstance(function, _Name) and isinstance(arguments, tuple)):
            raise Damaged("a call of what is no function")
        if function.text in _DICTIONARIES:
            self.push({})
            for argument in arguments:
                if isinstance(argument, (dict, list)):
                    self._count(len(argument))  # a copy that a memo index asks for is no less work than its parts
                    self._set(_flat(argument))
        else:
            self.push(_CALLS[function.text](arguments) if function.text in _CALLS else _NOTHING)

    def _persistent(self) -> None:
        identity = self.stack.pop()
        if isinstance(identity, tuple) and len(identity) == 4 and identity[0] == "module":
            self.push(identity[1])  # files of before 1.6 have the source of a module's class beside its name
            return
        if not (isinstance(identity, tuple) and 5 <= len(identity) <= 6 and identity[0] == "storage"):
            raise Damaged("an unknown kind of storage")
        _, kind, key, _device, _count, *view = identity  # what a storage is a view of, in files of before 1.6
        if any(part is not None for part in view):
            raise Damaged("a storage that is a part of another")
        if not (isinstance(kind, _Name) and kind.text in STORAGES and isinstance(key, str) and len(key) <= MOST_NAME):
            raise Damaged("an unknown kind of storage")
        self.storages[key] = Storage(STORAGES[kind.text], key)
        self.push(self.storages[key])


_LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
}  # fmt: skip
_ON_TOP = {
    "NONE": lambda machine: machine.push(None),
    "NEWTRUE": lambda machine: machine.push(True),
    "NEWFALSE": lambda machine: machine.push(False),
    "EMPTY_LIST": lambda machine: machine.push([]),
    "EMPTY_DICT": lambda machine: machine.push({}),
    "EMPTY_TUPLE": lambda machine: machine.push(()),
    "EMPTY_SET": lambda machine: machine.push(_NOTHING),
    "FROZENSET": lambda machine: (machine._since_mark(), machine.push(_NOTHING)),
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
    """The keys and values of a dictionary, or of a list of pairs, in turn; what is no pair is left out."""
    pairs = items.items() if isinstance(items, dict) else items
    return [part for pair in pairs if isinstance(pair, (list, tuple)) and len(pair) == 2 for part in pair]


def _refusal(module: str, name: str) -> str:
    if module.startswith("__torch__"):
        return (
            "it is a TorchScript archive, a program with its weights (OpenAI's CLIP came so): get the weights "
            "alone, as .safetensors or a Hugging Face folder"
        )
    name = plain(name, 100)
    if module.split(".")[0] in PROGRAMS:
        return (
            f"its pickle wants to run {name}, which no weights need, so it may be malicious: get the weights as "
            ".safetensors"
        )
    return (
        f"its pickle names {name}, which is unknown here and is not run: save its state_dict alone, of plain "
        "tensors, or get the weights as .safetensors"
    )


def _tensor(arguments: tuple[Any, ...]) -> Tensor:
    """torch._utils._rebuild_tensor and _rebuild_tensor_v2: (storage, offset, shape, stride, ...)."""
    if len(arguments) < 4 or not isinstance(arguments[0], Storage):
        raise Damaged("a tensor without a storage")
    storage, offset, shape, stride = arguments[:4]
    for sizes in (shape, stride):
        if not isinstance(sizes, (tuple, list)):
            raise Damaged("a tensor whose shape is none")
        if len(sizes) > MOST_DIMENSIONS:
            raise Damaged(f"a tensor of {len(sizes):,} dimensions, at most {MOST_DIMENSIONS} are read")
    if not all(isinstance(size, int) and abs(size) <= MOST_ELEMENTS for size in (offset, *shape, *stride)):
        raise Damaged(f"a tensor whose sizes are not whole numbers of at most {MOST_ELEMENTS:,}")
    return Tensor(storage, offset, tuple(shape), tuple(stride))


def _tensor_of_type(arguments: tuple[Any, ...]) -> Tensor:
    """torch._utils._rebuild_tensor_v3: (untyped storage, offset, shape, stride, gradient?, hooks, type, ...)."""
    tensor = _tensor(arguments)
    kind = arguments[6] if len(arguments) > 6 else None
    if not isinstance(kind, _Name):
        raise Damaged("a tensor without a type")
    dtype = DTYPES.get(kind.text[len("torch.") :])
    if dtype is None:
        raise Refused(f"it holds tensors of type {kind.text}, which is not read here: convert it to float16 or float32")
    return Tensor(Storage(dtype, tensor.storage.key), tensor.offset, tensor.shape, tensor.stride)


def _tensor_with_attributes(arguments: tuple[Any, ...]) -> Any:
    """torch._tensor._rebuild_from_type_v2: (function, class, its arguments, attributes)."""
    if len(arguments) < 3 or not isinstance(arguments[0], _Name) or not isinstance(arguments[2], tuple):
        raise Damaged("a tensor that nothing rebuilds")
    rebuild = _CALLS.get(arguments[0].text)
    if rebuild not in (_tensor, _tensor_of_type, _first):
        raise Damaged("a tensor that nothing rebuilds")
    return rebuild(arguments[2])


def _first(arguments: tuple[Any, ...]) -> Any:
    """For what wraps its first argument: torch.Size, and the parameter around a tensor."""
    if not arguments:
        raise Damaged("a parameter without a tensor")
    return arguments[0]


_DICTIONARIES = {"collections.OrderedDict", "collections.defaultdict", "collections.Counter"}
_CALLS = {
    "torch.Size": _first,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_type,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _first,
    "torch._tensor._rebuild_from_type_v2": _tensor_with_attributes,
}
_KNOWN = {*_CALLS, *_DICTIONARIES, *STORAGES, *INERT}


def find_tensors(content: Any) -> dict[str, Tensor]:
    """The tensors of `state_dict` where there is one, else all; nested names are joined by dots, numbers are the places
    in a list.

    Raises Refused for more than MOST_TENSORS, MOST_VALUES or MOST_LEVELS: lists that hold one another have no end.
    """
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    tensors: dict[str, Tensor] = {}
    for values, (name, tensor) in enumerate(_walk(content, "", 0)):
        if values >= MOST_VALUES or len(tensors) > MOST_TENSORS:
            raise Refused(
                f"it holds more than {MOST_VALUES:,} values or {MOST_TENSORS:,} tensors: get the weights as "
                ".safetensors"
            )
        if tensor is not None:
            tensors[name] = tensor
    return tensors


def _walk(value: Any, name: str, level: int) -> Iterator[tuple[str, Tensor | None]]:
    """Every value within `value`, in order, with its name; None for what is no tensor."""
    yield name, value if isinstance(value, Tensor) else None
    if isinstance(value, (dict, list, tuple)):
        if level == MOST_LEVELS:
            raise Refused(
                f"its lists hold one another, over more than {MOST_LEVELS} levels: get the weights as .safetensors"
            )
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if len(name) + (len(key) if isinstance(key, str) else 0) > MOST_NAME:
                raise Refused(f"a name in it has more than {MOST_NAME:,} characters: get the weights as .safetensors")
            yield from _walk(inner, f"{name}.{key}" if name else str(key), level + 1)
