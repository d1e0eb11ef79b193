"""PyTorch's files are read without PyTorch, and nothing in them is run."""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections import OrderedDict

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.weights.checkpoint import open_checkpoint, read_checkpoint
from tests.weights.file_formats.torch_files import Call, Tensor, torch_bytes, write_torch

ARRAYS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "half": np.array([1.5, -2.0], np.float16),
    "double": np.array([[1e300]]),
    "count": np.array(7),
    "small": np.array([-1, 2], np.int8),
    "flags": np.array([True, False]),
    "nothing": np.zeros((0, 3), np.float32),
    "one": np.ones((1, 1, 4), np.float32),
}


def refused(path):
    with pytest.raises(UserError) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


class TestReading:
    @pytest.mark.parametrize("name", ["x.ckpt", "x.bin", "x.pt", "x.safetensors", "x"])
    @pytest.mark.parametrize("make", [dict, OrderedDict])
    def test_arrays_come_back_bit_for_bit_whatever_the_suffix(self, tmp_path, name, make):
        checkpoint = open_checkpoint(write_torch(tmp_path / name, make(ARRAYS)))
        assert checkpoint.format == "torch" and list(checkpoint) == list(ARRAYS)
        for key, array in ARRAYS.items():
            assert checkpoint.spec(key) == (array.dtype, array.shape)
            np.testing.assert_array_equal(checkpoint[key], array)
            assert not (array.size and checkpoint[key].flags.writeable)

    def test_the_state_dict_of_a_training_checkpoint(self, tmp_path):
        lightning = {
            "epoch": 3, "global_step": 470000, "pytorch-lightning_version": "1.4.2", "loops": None, "lr": 1e-4,
            "state_dict": OrderedDict(ARRAYS),
            "optimizer_states": [{"state": {0: {"exp_avg": np.ones(3, np.float32)}}}],
            "callbacks": {
                "x": {"best": Call("numpy.core.multiarray", "scalar",
                                   (Call("numpy", "dtype", ("f8", False, True)), Call("_codecs", "encode", ("a",))))},
            },
        }  # fmt: skip
        arrays, _ = read_checkpoint(write_torch(tmp_path / "sd.ckpt", lightning))
        assert list(arrays) == list(ARRAYS)

    def test_nested_tensors_have_dotted_names_and_numbers(self, tmp_path):
        path = write_torch(tmp_path / "x.pt", [{"up": np.ones(2, np.float32)}, [np.zeros(3, np.float32)], 5, "text"])
        assert {name: array.shape for name, array in open_checkpoint(path).items()} == {"0.up": (2,), "1.0": (3,)}

    def test_parameters(self, tmp_path):
        wrapped = Call("torch._utils", "_rebuild_parameter", (ARRAYS["a.weight"], True, OrderedDict()))
        np.testing.assert_array_equal(
            open_checkpoint(write_torch(tmp_path / "x.pt", {"w": wrapped}))["w"], ARRAYS["a.weight"]
        )

    def test_views_of_one_storage(self, tmp_path):
        storage = np.arange(24, dtype=np.float32)
        views = {
            "rows": Tensor(storage, (2, 6), (6, 1), 12),
            "transposed": Tensor(storage, (4, 6), (1, 4)),
            "every second": Tensor(storage, (3,), (2,), 5),
            "repeated": Tensor(storage, (3, 2), (0, 1), 4),
            "a size of one": Tensor(storage, (1, 4), (99, 1)),
        }
        whole = storage.reshape(4, 6)
        checkpoint = open_checkpoint(write_torch(tmp_path / "x.pt", views))
        np.testing.assert_array_equal(checkpoint["rows"], whole[2:])
        np.testing.assert_array_equal(checkpoint["transposed"], storage.reshape(6, 4).T)
        np.testing.assert_array_equal(checkpoint["every second"], [5, 7, 9])
        np.testing.assert_array_equal(checkpoint["repeated"], [[4, 5]] * 3)
        np.testing.assert_array_equal(checkpoint["a size of one"], [[0, 1, 2, 3]])

    def test_bfloat16_is_widened_exactly(self, tmp_path):
        values = (np.array([1.0, -2.5, 3e38, 0.0], np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
        stored = (values.view(np.uint32) >> 16).astype(np.uint16)
        path = write_torch(tmp_path / "x.pt", {"w": Tensor(stored, (4,), (1,), kind="BFloat16")})
        assert open_checkpoint(path)["w"].dtype == np.float32
        np.testing.assert_array_equal(open_checkpoint(path)["w"], values)


class TestNothingIsRun:
    @pytest.mark.parametrize(
        "module, name",
        [
            ("os", "system"), ("posix", "system"), ("subprocess", "Popen"), ("builtins", "eval"), ("builtins", "exec"),
            ("builtins", "getattr"), ("__builtin__", "eval"), ("operator", "attrgetter"), ("webbrowser", "open"),
        ],
    )  # fmt: skip
    def test_a_name_of_a_program_is_refused_as_malicious(self, tmp_path, module, name):
        target = tmp_path / "was_here"
        path = write_torch(tmp_path / "model.ckpt", {"state_dict": {"w": Call(module, name, (f"touch {target}",))}})
        assert f"its pickle would execute {module}.{name}" in refused(path)
        assert not target.exists()

    @pytest.mark.parametrize(
        "module, name",
        [
            ("torch", "load"), ("torch.hub", "load"), ("numpy.testing._private.utils", "runstring"),
            ("collections", "OrderedDict.fromkeys"), ("pytorch_lightning.callbacks", "Callback"),
            ("torch._utils", "_rebuild_sparse_tensor"), ("torch.storage", "_load_from_bytes"),
        ],
    )  # fmt: skip
    def test_an_unknown_name_is_refused_without_calling_it_malicious(self, tmp_path, module, name):
        words = refused(write_torch(tmp_path / "model.ckpt", {"state_dict": {"w": Call(module, name, ("x",))}}))
        assert f"its pickle refers to {module}.{name}, which is unknown and is not executed" in words
        assert "save its state_dict alone" in words and "malicious" not in words

    def test_pickles_own_reduce(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return (open, (str(tmp_path / "was_here"), "w"))

        with zipfile.ZipFile(tmp_path / "m.ckpt", "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps({"state_dict": Evil()}, protocol=4))
        assert "would execute" in refused(tmp_path / "m.ckpt") and not (tmp_path / "was_here").exists()

    def test_what_lies_beside_the_weights_holds_nothing(self, tmp_path):
        inert = Call("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint", ("anything",))
        path = write_torch(tmp_path / "x.ckpt", {"callbacks": inert, "w": np.ones(1, np.float32)})
        assert list(open_checkpoint(path)) == ["w"]


class TestDamaged:
    def test_cut_off_anywhere(self, tmp_path):
        content = torch_bytes({"state_dict": ARRAYS})
        for size in range(3, len(content) - 1, 37):
            (tmp_path / "x.ckpt").write_bytes(content[:size])
            refused(tmp_path / "x.ckpt")

    @pytest.mark.parametrize(
        "tensor",
        [
            Tensor(np.ones(4, np.float32), (5,), (1,)),
            Tensor(np.ones(4, np.float32), (4,), (1,), 1),
            Tensor(np.ones(4, np.float32), (2, 2), (3, 1)),
            Tensor(np.ones(4, np.float32), (2, 2), (1,)),
            Tensor(np.ones(4, np.float32), (2,), (1,), -1),
            Tensor(np.ones(4, np.float32), (2,), (-1,), 3),
            Tensor(np.ones(4, np.float32), (-2,), (1,)),
            Tensor(np.ones(4, np.float32), (2**30, 2**30), (0, 1)),
        ],
    )
    def test_a_tensor_that_reaches_out_of_its_storage(self, tmp_path, tensor):
        assert "is not within its data" in refused(write_torch(tmp_path / "x.pt", {"w": tensor}))

    def test_a_storage_shorter_than_its_tensor(self, tmp_path):
        path = write_torch(tmp_path / "x.pt", {"w": np.ones(4, np.float32)}, cut=1)
        assert "is not within its data" in refused(path)

    def test_a_storage_that_is_missing(self, tmp_path):
        content = torch_bytes({"w": np.ones(4, np.float32)}).replace(b"archive/data/0", b"archive/data/1")
        (tmp_path / "x.pt").write_bytes(content)
        assert "the data of w is missing" in refused(tmp_path / "x.pt")

    @pytest.mark.parametrize(
        "options, words",
        [({"byteorder": "big"}, "big-endian"), ({"compression": zipfile.ZIP_DEFLATED}, "compressed zip")],
    )
    def test_zips_that_pytorch_does_not_write_here(self, tmp_path, options, words):
        assert words in refused(write_torch(tmp_path / "x.pt", {"w": np.ones(400, np.float32)}, **options))

    @pytest.mark.parametrize(
        "program",
        [b"", b".", b"\x80\x02", b"\x80\x02}", b"\x80\x02(.", b"\x80\x02R.", b"\x80\x02Q.", b"\x80\x02N(Q.",
         b"\x80\x02X\xff\xff\xff\x7fab.", b"\x80\x09N.", b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
         b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(NNNNtR.", b"\x80\x02}q\x00h\x01.", b"\x80\x02X\x01\0\0\0\xff.",
         b"\x80\x02I1\n.", b"\x80\x02K\x012."],
    )  # fmt: skip
    def test_pickles_of_nonsense(self, tmp_path, program):
        with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
            archive.writestr("archive/data.pkl", program)
        assert "damaged PyTorch file" in refused(tmp_path / "x.pt")

    @pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
    def test_a_compressed_zip_is_not_unpacked_damaged_or_not(self, tmp_path, compression):
        content = bytearray(torch_bytes({"w": np.arange(400, dtype=np.float32)}, compression=compression))
        content[60:90] = bytes(30)  # within the pickle
        (tmp_path / "x.pt").write_bytes(content)
        assert "compressed zip" in refused(tmp_path / "x.pt")

    def test_a_list_of_members_that_points_before_the_file(self, tmp_path):
        content = bytearray(torch_bytes({"w": np.ones(4, np.float32)}))
        content[-6:-2] = b"\xff\xff\xff\x7f"  # where the list begins
        (tmp_path / "x.pt").write_bytes(content)
        assert "truncated or damaged" in refused(tmp_path / "x.pt")

    def test_a_list_of_members_that_points_past_the_end(self, tmp_path):
        content = bytearray(torch_bytes({"w": np.ones(4, np.float32)}))
        entry = content.rindex(b"archive/data/0") - 46  # its entry in the list, which ends with the name
        content[entry + 42 : entry + 46] = (len(content) + 7).to_bytes(4, "little")
        (tmp_path / "x.pt").write_bytes(content)
        assert "is not within its data" in refused(tmp_path / "x.pt")

    def test_a_password(self, tmp_path):
        content = bytearray(torch_bytes({"w": np.ones(4, np.float32)}))
        for header, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            content[content.index(header) + flags] |= 1
        (tmp_path / "x.pt").write_bytes(content)
        assert "is encrypted" in refused(tmp_path / "x.pt")

    @pytest.mark.parametrize("kind", ["O", "U8", "nonsense", "f4,f4"])
    def test_an_element_type_that_pytorch_has_not(self, tmp_path, kind):
        named = b"X" + struct.pack("<I", len(kind)) + kind.encode()
        storage = b"(X\x07\0\0\0storage" + named + b"X\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ"
        tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0K\x04\x85K\x01\x85tR"
        with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
            archive.writestr("archive/data.pkl", b"\x80\x02}X\x01\0\0\0w" + tensor + b"s.")
            archive.writestr("archive/data/0", bytes(64))
        assert "unknown kind of storage" in refused(tmp_path / "x.pt")

    def test_two_pickles(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
            for root in "ab":
                archive.writestr(f"{root}/data.pkl", b"\x80\x02}.")
        assert "2 PyTorch pickles" in refused(tmp_path / "x.pt")


def test_a_textual_inversion_is_called_so(tmp_path):
    learned = Call("torch.nn.modules.container", "ParameterDict")
    path = write_torch(tmp_path / "x.pt", {"string_to_token": {"*": 265}, "string_to_param": learned})
    assert "textual-inversion" in refused(path)
