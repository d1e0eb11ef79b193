"""Pickles of PyTorch's files: what they name is known or refused, what they build is bounded, and none of it is run."""

from __future__ import annotations

import datetime
import io
import pickle
import struct
import zipfile
from argparse import Namespace
from collections import OrderedDict, deque
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.weights.checkpoint import open_checkpoint
from ldm.weights.file_formats import torch_pickle
from ldm.weights.file_formats.torch_pickle import Damaged, Refused, find_tensors, read_pickles
from tests.weights.file_formats.torch_files import Call, Tensor, write_torch

ARRAY = np.arange(6, dtype=np.float32).reshape(2, 3)


def text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


STORAGE = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x04tQ"


def tensor(shape: bytes = b"K\x04\x85", stride: bytes = b"K\x01\x85", storage: bytes = STORAGE) -> bytes:
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0" + shape + stride + b"tR"


def content(program: bytes):
    (value,), _ = read_pickles(io.BytesIO(b"\x80\x02" + program + b"."))
    return value


def tensors(program: bytes):
    return find_tensors(content(program))


class TestNames:
    @pytest.mark.parametrize(
        "name, wrapped",
        [
            ("_rebuild_parameter", (ARRAY, True, OrderedDict())),
            ("_rebuild_parameter_with_state", (ARRAY, True, OrderedDict(), {"tag": 1})),
            ("_rebuild_device_tensor_from_cpu_tensor", (ARRAY, Call("torch", "float32"), "xla:0", False)),
        ],
    )
    def test_what_wraps_a_tensor_is_the_tensor(self, tmp_path, name, wrapped):
        path = write_torch(tmp_path / "x.pt", {"w": Call("torch._utils", name, wrapped)})
        np.testing.assert_array_equal(open_checkpoint(path)["w"], ARRAY)

    def test_a_tensor_with_attributes_is_the_tensor(self):
        rebuild = b"ctorch._tensor\n_rebuild_from_type_v2\n("
        inner = b"ctorch._utils\n_rebuild_tensor_v2\nctorch.nn.parameter\nParameter\n("
        program = rebuild + inner + STORAGE + b"K\0K\x04\x85K\x01\x85t}tR"
        assert tensors(b"}" + text("w") + program + b"s")["w"].shape == (4,)

    @pytest.mark.parametrize("kind, dtype", [("uint16", "<u2"), ("uint32", "<u4"), ("float32", "<f4")])
    def test_a_tensor_of_an_untyped_storage_brings_its_type(self, kind, dtype):
        found = tensors(b"}" + text("w") + self.untyped(kind) + b"s")["w"]
        assert (found.storage.dtype, found.shape) == (dtype, (4,))

    def test_a_type_that_is_not_read_is_named(self):
        with pytest.raises(Refused, match="type torch.float8_e4m3fn, which cannot be read: convert it to float16"):
            content(self.untyped("float8_e4m3fn"))

    @staticmethod
    def untyped(kind: str) -> bytes:
        storage = STORAGE.replace(b"ctorch\nFloatStorage", b"ctorch.storage\nUntypedStorage")
        rest = b"K\0K\x04\x85K\x01\x85\x89ccollections\nOrderedDict\n)Rctorch\n" + kind.encode() + b"\ntR"
        return b"ctorch._utils\n_rebuild_tensor_v3\n(" + storage + rest

    @pytest.mark.parametrize(
        "new", [b"}", b"ccollections\nOrderedDict\n)R", b"ccollections\ndefaultdict\nc__builtin__\ndict\n\x85R"]
    )
    def test_tensors_are_found_in_every_kind_of_dictionary(self, new):
        assert list(tensors(new + text("w") + tensor() + b"s")) == ["w"]

    @pytest.mark.parametrize("protocol", [2, 4])
    def test_what_trainers_note_beside_the_weights_is_passed_over(self, protocol):
        notes = [
            datetime.datetime(2024, 1, 2, tzinfo=datetime.timezone.utc), datetime.timedelta(1), PurePosixPath("x"),
            PureWindowsPath("x"), Path("x"), deque([1.0]), Namespace(lr=1e-5), {1}, np.float64(1), np.arange(3),
        ]  # fmt: skip
        (value,), _ = read_pickles(io.BytesIO(pickle.dumps({"notes": notes, "step": 7}, protocol)))
        assert value["step"] == 7 and find_tensors(value) == {}

    def test_python_2_gives_an_ordered_dictionary_its_items_as_a_list(self):
        assert list(tensors(b"ccollections\nOrderedDict\n](](" + text("w") + tensor() + b"ee\x85R")) == ["w"]

    def test_protocol_4(self):
        names = b"\x8c\x0bcollections\x94\x8c\x0bOrderedDict\x94\x93\x94)R\x94"
        (value,), _ = read_pickles(
            io.BytesIO(b"\x80\x04\x95\0\0\0\0\0\0\0\0" + names + b"\x8c\x01aK\x01s\x8f(K\x01\x90\x86.")
        )
        assert value[0] == {"a": 1}

    def test_a_program_with_its_weights_is_called_so(self, tmp_path):
        path = write_torch(tmp_path / "x.pt", Call("__torch__.torch.nn", "Module"))
        with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/code/__torch__.py", "x = 1\n" * 100)
        with pytest.raises(UserError, match="TorchScript archive"):
            open_checkpoint(path)

    def test_a_modules_class_with_its_source_as_before_1_6(self):
        module = b"(" + text("module") + b"ctorch.nn.modules.container\nParameterDict\n" + text("x.py") + text("...")
        assert list(tensors(b"](" + module + b"tQ)\x81}b" + tensor() + b"e")) == ["1"]

    def test_a_parameter_dict_has_its_parameters(self):
        start = b"ctorch.nn.modules.container\nParameterDict\n)\x81}("
        parameters = text("_parameters") + b"}(" + text("*") + tensor() + b"u"
        assert list(tensors(start + parameters + text("training") + b"\x88ub")) == ["*"]
        assert not tensors(start + text("_parameters") + b"]" + b"ub") and not tensors(start[:-2] + b"]b")
        with pytest.raises(Refused, match="nested in more than 32 levels"):  # it holds itself
            tensors(start[:-2] + b"q\0}(" + text("_parameters") + b"}(" + text("*") + b"h\0uub")

    def test_attributes_change_no_storage(self):
        # A storage's type once could be set so after it had been checked.
        with pytest.raises(Damaged, match="attributes are set on a value that has none"):
            content(tensor(storage=STORAGE + b"}" + text("dtype") + text("O") + b"sb"))


class TestBounds:
    """Each of these programs of at most a few hundred bytes would never end, fill the memory or end the process."""

    def test_lists_that_hold_themselves(self):
        with pytest.raises(Refused, match="nested in more than 32 levels"):
            tensors(b"]q\0h\0a")

    def test_lists_that_double_at_every_level(self, monkeypatch):
        monkeypatch.setattr(torch_pickle, "MAX_VALUES", 1000)
        doubled = b"".join(b"](h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1]) for i in range(30))
        with pytest.raises(Refused, match="more than 1,000 values"):
            tensors(b"]q\0" + doubled)

    def test_a_list_that_is_held_twice_is_looked_at_twice(self):
        assert list(tensors(b"](]q\0" + tensor() + b"ah\0e")) == ["0.0", "1.0"]

    def test_a_key_of_nested_tuples_is_not_hashed(self):
        doubled = b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))
        assert content(b"})" + doubled + b"Ns" + text("a") + b"K\x01s") == {"a": 1}

    def test_memo_indices_take_no_place(self):
        assert content(b"Nr\xff\xff\xff\xff") is None

    def test_deep_nesting(self):
        with pytest.raises(Refused, match="more than 32 levels"):
            tensors(b")" + b"\x85" * 100_000)

    @pytest.mark.parametrize("opcode", [b"\x8e", b"\x8d", b"\x96"], ids=["BINBYTES8", "BINUNICODE8", "BYTEARRAY8"])
    @pytest.mark.parametrize("size", [1 << 40, (1 << 64) - 1])
    def test_texts_that_say_they_are_long(self, opcode, size):
        with pytest.raises(Damaged):
            content(opcode + size.to_bytes(8, "little"))

    @pytest.mark.parametrize("program", [b"]", b"(", b"Nr\0\0\0\0", b"ccollections\nOrderedDict\n0"])
    def test_instructions_are_counted(self, monkeypatch, program):
        monkeypatch.setattr(torch_pickle, "MAX_STEPS", 1000)
        with pytest.raises(Refused, match="more than 1,000 instructions"):
            content(program * 1001)

    def test_copies_are_counted_as_instructions(self, monkeypatch):
        monkeypatch.setattr(torch_pickle, "MAX_STEPS", 1000)
        pairs = b"](" + b"K\x01K\x01\x86" * 100 + b"e\x85q\0"
        with pytest.raises(Refused, match="more than 1,000 instructions"):
            content(pairs + b"ccollections\nOrderedDict\nh\0R" * 10)

    def test_tensors_are_counted(self, monkeypatch):
        monkeypatch.setattr(torch_pickle, "MAX_TENSORS", 10)
        with pytest.raises(Refused, match="10 tensors"):
            tensors(b"](" + tensor() + b"q\0" + b"h\0" * 12 + b"e")

    def test_a_long_name(self):
        with pytest.raises(Refused, match="more than 1,000 characters"):
            tensors(b"}" + text("k" * 999) + b"}" + text("kk") + b"Nss")

    @pytest.mark.parametrize(
        "shape, words",
        [
            (b"(" + b"K\x01" * 50 + b"t", "50 dimensions, at most 32"),
            (b"(" + b"K\x01" * 100_000 + b"t", "100,000 dimensions"),
            (b"\x8a\x09" + b"\0" * 8 + b"\x01\x85", "at most 1,099,511,627,776"),
            (b"G\x40\0\0\0\0\0\0\0\x85", "not whole numbers"),
            (b"](" + text("4") + b"e", "not whole numbers"),
            (text("44"), "whose shape is not a tuple"),
            (b"N", "whose shape is not a tuple"),
        ],
    )
    def test_absurd_shapes(self, shape, words):
        with pytest.raises(Damaged, match=words):
            content(tensor(shape))
        with pytest.raises(Damaged, match=words):
            content(tensor(stride=shape))

    @pytest.mark.parametrize(
        "shape, stride, words",
        [
            ((2**30, 2**30), (0, 0), r"w is \(1073741824, 1073741824\), more than 1,099,511,627,776 elements"),
            ((0, 2**30, 2**30), (1, 1, 1), "more than 1,099,511,627,776 elements"),
            ((2**30,), (0,), "its tensors overlap, 4,294,967,296 bytes in a file of"),
        ],
    )
    def test_more_elements_than_the_file_holds(self, tmp_path, shape, stride, words):
        path = write_torch(tmp_path / "x.pt", {"w": Tensor(np.ones(1, np.float32), shape, stride)})
        with pytest.raises(UserError, match=words):
            open_checkpoint(path)


@pytest.mark.parametrize(
    "program",
    [b"K\x01}b", b"K\x01K\x02a", b"]K\x01K\x02s", b"K\x01)R", b"ccollections\nOrderedDict\nK\x01R", b"h\0", b"a", b"0",
     b"K\x01\x85Q", b"(" + text("storage") + b"K\x01" + text("0") + b"NK\x01tQ", b"]K\x01\x93", b"\x82\x01", b"2",
     b"cos", b"\xff", b"ctorch._utils\n_rebuild_parameter\n)R", b"ctorch._tensor\n_rebuild_from_type_v2\n)R"],
)  # fmt: skip
def test_pickles_of_nonsense_are_damaged(program):
    with pytest.raises(Damaged):
        content(program)
