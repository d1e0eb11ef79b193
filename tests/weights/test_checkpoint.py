"""Checkpoint files are read back as written, by MindSpore too. Errors say what other files are."""

import fractions
import io
import json
import os
import pickle
import struct
import zipfile

import mindspore as ms
import numpy as np
import pytest
from mindspore.train.checkpoint_pb2 import Checkpoint

from ldm.errors import UserError
from ldm.files.inputs import content_hash
from ldm.weights import arrays as checkpoint
from ldm.weights.checkpoint import open_checkpoint, read_checkpoint, write_checkpoint
from ldm.weights.file_formats import mindspore_ckpt, safetensors_file
from tests.weights.file_formats.legacy_files import legacy
from tests.weights.file_formats.torch_files import torch_bytes

ARRAYS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "half": np.array([1.5, -2.0], np.float16),
    "double": np.array([[1e300]], np.float64),
    "count": np.array(7, np.int64),
    "small": np.array([-1, 2], np.int8),
    "flags": np.array([True, False]),
    "not contiguous": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "nothing": np.zeros((0, 3), np.float32),
    "ключ": np.ones(1, np.float32),
}
TEXTS = {"prediction_type": "v_prediction", "empty": "", "accents": "é 图"}


@pytest.fixture(params=[".safetensors", ".ckpt"])
def suffix(request):
    return request.param


def write(path, content: bytes):
    path.write_bytes(content)
    return path


def whole_file(folder, suffix):
    path = folder / f"whole{suffix}"
    write_checkpoint(path, {f"layer.{i}.weight": np.full((40, 5), i, np.float32) for i in range(4)}, {"k": "v"})
    return path


class TestRoundTrip:
    def test_arrays_and_texts_come_back_bit_for_bit(self, tmp_path, suffix):
        path = tmp_path / f"x{suffix}"
        write_checkpoint(path, ARRAYS, TEXTS)
        arrays, texts = read_checkpoint(path)
        assert texts == TEXTS
        assert arrays.keys() == ARRAYS.keys()
        for name, array in ARRAYS.items():
            assert arrays[name].dtype == array.dtype and arrays[name].shape == array.shape
            np.testing.assert_array_equal(arrays[name], array)

    def test_shapes_are_known_without_reading(self, tmp_path, suffix):
        path = tmp_path / f"x{suffix}"
        write_checkpoint(path, ARRAYS)
        checkpoint = open_checkpoint(path)
        shapes = {name: checkpoint.shape(name) for name in checkpoint}
        assert shapes == {name: array.shape for name, array in ARRAYS.items()}
        assert checkpoint.shape("count") == ()

    def test_the_content_decides_the_format_not_the_suffix(self, tmp_path, suffix):
        path = whole_file(tmp_path, suffix).rename(tmp_path / "renamed.bin")
        assert open_checkpoint(path).format == suffix[1:]

    def test_a_tensor_in_several_pieces_is_joined(self, tmp_path, monkeypatch):
        monkeypatch.setattr(mindspore_ckpt, "CHUNK", 64)
        big = np.arange(100, dtype=np.float32).reshape(10, 10)
        write_checkpoint(tmp_path / "x.ckpt", {"big": big, "next": big + 1})
        arrays, _ = read_checkpoint(tmp_path / "x.ckpt")
        np.testing.assert_array_equal(arrays["big"], big)
        np.testing.assert_array_equal(arrays["next"], big + 1)
        np.testing.assert_array_equal(ms.load_checkpoint(str(tmp_path / "x.ckpt"))["big"].asnumpy(), big)

    def test_overwriting_leaves_nothing_else_behind(self, tmp_path, suffix):
        path = tmp_path / f"x{suffix}"
        write_checkpoint(path, {"a": np.zeros(3, np.float32)})
        write_checkpoint(path, {"a": np.ones(3, np.float32)})
        assert os.listdir(tmp_path) == [path.name]
        np.testing.assert_array_equal(read_checkpoint(path)[0]["a"], 1)

    def test_a_failed_write_keeps_the_old_file(self, tmp_path, suffix):
        path = tmp_path / f"x{suffix}"
        write_checkpoint(path, {"a": np.zeros(3, np.float32)})
        with pytest.raises(Exception):  # noqa: B017 - each library has its own
            write_checkpoint(path, {"a": np.ones(3, np.float32), "b": np.array(["text"])})
        assert os.listdir(tmp_path) == [path.name]
        np.testing.assert_array_equal(read_checkpoint(path)[0]["a"], 0)


class TestMindSporeAgrees:
    def test_mindspore_loads_written_files(self, tmp_path):
        write_checkpoint(tmp_path / "x.ckpt", ARRAYS, TEXTS)
        loaded = ms.load_checkpoint(str(tmp_path / "x.ckpt"))
        assert {name: loaded[name] for name in TEXTS} == TEXTS
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(loaded[name].asnumpy(), array)
            assert loaded[name].asnumpy().dtype == array.dtype

    @pytest.mark.parametrize("crc_check", [False, True])
    def test_files_that_mindspore_saves_are_read(self, tmp_path, crc_check):
        parameters = [
            {"name": "w", "data": ms.Tensor(ARRAYS["a.weight"])},
            {"name": "half", "data": ms.Tensor(ARRAYS["half"])},
            {"name": "bf16", "data": ms.Tensor([1.5, -2.0], ms.bfloat16)},
        ]
        extra = {"lora_rank": 4, "lora_scale": 0.5, "flag": True, "base": "sd1"}
        ms.save_checkpoint(parameters, str(tmp_path / "x.ckpt"), append_dict=extra, crc_check=crc_check)
        arrays, texts = read_checkpoint(tmp_path / "x.ckpt")
        assert texts == {"base": "sd1"}
        np.testing.assert_array_equal(arrays["w"], ARRAYS["a.weight"])
        assert arrays["half"].dtype == np.float16
        np.testing.assert_array_equal(arrays["bf16"], np.array([1.5, -2.0], np.float32))
        assert (int(arrays["lora_rank"]), float(arrays["lora_scale"]), bool(arrays["flag"])) == (4, 0.5, True)

    def test_a_damaged_checksum_is_noticed(self, tmp_path):
        weights = [{"name": "w", "data": ms.Tensor(np.ones(9, np.float32))}]
        ms.save_checkpoint(weights, str(tmp_path / "x"), crc_check=True)
        content = bytearray((tmp_path / "x.ckpt").read_bytes())
        content[-30] ^= 1
        with pytest.raises(UserError, match="checksum"):
            read_checkpoint(write(tmp_path / "y.ckpt", bytes(content)))


@pytest.mark.parametrize("dtype, bytes_, values", [
    ("F8_E4M3", [0x00, 0x01, 0x07, 0x08, 0x38, 0x40, 0x7E, 0x7F, 0x80, 0xB9],
     [0, 2**-9, 7 * 2**-9, 2**-6, 1, 2, 448, np.nan, 0, -1.125]),
    ("F8_E5M2", [0x00, 0x01, 0x03, 0x04, 0x3C, 0x40, 0x7B, 0x7C, 0x7F, 0xBD],
     [0, 2**-16, 3 * 2**-16, 2**-14, 1, 2, 57344, np.inf, np.nan, -1.25]),
])  # fmt: skip
def test_types_of_8_bits_in_safetensors_are_widened_exactly(tmp_path, dtype, bytes_, values):
    header = json.dumps({"w": {"dtype": dtype, "shape": [2, 5], "data_offsets": [0, 10]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(bytes_))
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    assert checkpoint.spec("w") == (np.dtype(np.float32), (2, 5))
    np.testing.assert_array_equal(checkpoint["w"], np.array(values, np.float32).reshape(2, 5))


def test_bfloat16_in_safetensors_is_widened_exactly(tmp_path):
    header = json.dumps({"w": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}}).encode()
    values = np.array([1.0, -2.5, 3e38, 0.0], np.float32)
    values = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    content = struct.pack("<Q", len(header)) + header + (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    arrays, _ = read_checkpoint(write(tmp_path / "x.safetensors", content))
    assert arrays["w"].dtype == np.float32
    np.testing.assert_array_equal(arrays["w"], values.reshape(2, 2))


class TestCutOff:
    def test_a_file_cut_off_anywhere_is_refused_or_ends_between_two_tensors(self, tmp_path, suffix):
        content = whole_file(tmp_path, suffix).read_bytes()
        whole, _ = read_checkpoint(tmp_path / f"whole{suffix}")
        refused = 0
        for size in range(1, len(content), 7):
            path = write(tmp_path / f"cut{suffix}", content[:size])
            try:
                arrays, _ = read_checkpoint(path)
            except UserError as error:
                assert str(path) in str(error)
                refused += 1
            else:  # a .ckpt has no list of its tensors: what is left is a shorter, whole one
                assert suffix == ".ckpt" and arrays.keys() < whole.keys() | {"k"}
        assert refused >= len(range(1, len(content), 7)) - 4

    def test_the_error_says_so(self, tmp_path, suffix):
        content = whole_file(tmp_path, suffix).read_bytes()
        for part in (0.3, 0.5, 0.9):
            with pytest.raises(UserError, match="cut.off"):
                read_checkpoint(write(tmp_path / f"cut{suffix}", content[: int(len(content) * part)]))

    def test_trailing_bytes_are_refused(self, tmp_path, suffix):
        content = whole_file(tmp_path, suffix).read_bytes()
        with pytest.raises(UserError, match="damaged|cut off"):
            read_checkpoint(write(tmp_path / f"long{suffix}", content + b"more"))


def torch_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"state_dict": fractions.Fraction(1)}))
        archive.writestr("archive/data/0", b"\0" * 64)
    return buffer.getvalue()


def plain_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("image.png", b"x")
    return buffer.getvalue()


def npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


FOREIGN = {
    "empty": (b"", "empty file"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "git-lfs pointer"),
    "HTML page": (b"<!DOCTYPE html><html>401</html>" + b" " * 900, "HTML page"),
    "HTML after blank lines": (b"\n\n  <html><body>Sign in</body></html>" + b"\n" * 900, "HTML page"),
    "XML": (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "XML"),
    "PNG": (b"\x89PNG\r\n\x1a\n" + b"\0" * 300, "PNG image"),
    "JPEG": (b"\xff\xd8\xff\xe0" + b"\0" * 300, "JPEG image"),
    "torch zip": (torch_zip(), "refers to fractions.Fraction"),
    "pickle": (pickle.dumps({"state_dict": [1, 2, 3]}, protocol=2), "pickle"),
    "PyTorch before 1.6": (pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2) + b"\x80\x02M\xe9\x03.", "before 1.6"),
    "pickle protocol 5": (pickle.dumps({"state_dict": [1, 2, 3]}, protocol=5), "pickle"),
    "plain zip": (plain_zip(), "zip archive"),
    "npy": (npy(), "npy"),
    "gzip": (b"\x1f\x8b\x08" + b"\0" * 100, "gzip"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + b"\0" * 100, "HDF5"),
    "GGUF": (b"GGUF" + b"\0" * 100, "GGUF"),
    "JSON": (b'{"r": 4, "lora_alpha": 8}' * 9, "text file|not a .safetensors"),
    "text": (b"a photo of a cat\n" * 30, "text file|not a .safetensors"),
    "text after a line feed": (b"\na photo of a cat\n" * 30, "text file|not a .safetensors"),
    "zeros": (b"\0" * 1000, "neither|not a .safetensors"),
    "noise": (np.random.default_rng(0).bytes(1000), "neither|not a .safetensors"),
    "noise after 0x0a": (b"\n" + np.random.default_rng(1).bytes(1000), "neither|not a .safetensors|damaged|cut off"),
    "one byte": (b"\n", "neither|text file|not a .safetensors"),
    "a header of nonsense": (struct.pack("<Q", 20) + b"{" + b"x" * 40, "damaged"),
}


def ckpt(*values) -> bytes:
    """A .ckpt of (name, dims, type, content) written with MindSpore's own message class."""
    message = Checkpoint()
    for name, dims, dtype, content in values:
        value = message.value.add()
        value.tag, value.tensor.tensor_type, value.tensor.tensor_content = name, dtype, content
        value.tensor.dims.extend(dims)
    return message.SerializeToString()


def field(number: int, content: bytes) -> bytes:
    """A field of protobuf's wire format that has a length."""
    size, length = len(content), b""
    while size > 127:
        length += bytes([size & 127 | 128])
        size >>= 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + content


FLOAT32 = field(2, b"Float32")


class TestDamagedCkpt:
    @pytest.mark.parametrize(
        "values, pattern",
        [
            ([("w", [2, 2], "Float32", b"\0" * 12)], r"damaged: w \(2, 2\) holds 12 bytes"),
            ([("w", [2], "Float32", b"\0" * 16)], "damaged: w"),
            ([("w", [8], "Int4", b"\0" * 4)], "w is of type Int4"),
            (
                [("w", [1], "Float32", b"\0" * 4), ("v", [1], "Float32", b"\0" * 4), ("w", [1], "Float32", b"\0" * 4)],
                "'w' twice",
            ),
            ([("t", [0], "str", b"\xff\xff\xff\xff")], "the text 't'"),
        ],
    )
    def test_says_which_array(self, tmp_path, values, pattern):
        with pytest.raises(UserError, match=pattern):
            read_checkpoint(write(tmp_path / "x.ckpt", ckpt(*values)))

    @pytest.mark.parametrize(
        "tensor, words",
        [
            (b"\x08\x01" * 33 + FLOAT32 + field(3, b"1234"), "more than 32 dimensions"),
            (b"\x08\x01" * 100_000 + FLOAT32 + field(3, b"1234"), "more than 32 dimensions"),
            (field(1, b"\x01" * 100_000) + FLOAT32 + field(3, b"1234"), "more than 32 dimensions"),
            ((b"\x08" + b"\xff" * 8 + b"\x7f") * 2 + FLOAT32 + field(3, b"1234"), "w .*holds 4 bytes"),
            (b"\x08\0" + (b"\x08" + b"\xff" * 8 + b"\x7f") * 2 + FLOAT32 + field(3, b""), "1,099,511,627,776 elements"),
            (b"\x08\x01" + FLOAT32 * 2 + field(3, b"1234"), "field 2 of a tensor"),
            (b"\x08\x01" + FLOAT32 + field(3, b"1234") * 2, "field 3 of a tensor"),
            (b"\x08\x01" + field(2, b"F" * 5000) + field(3, b"1234"), "a name of 5,000 bytes"),
            (b"\x08\x01" + FLOAT32, "an incomplete tensor"),
            (field(2, b"str") + b"\x08\0" + field(3, bytes(4 * 200)), "the text 'w' has 800 bytes, at most 400"),
        ],
    )
    def test_no_number_is_believed(self, tmp_path, monkeypatch, tensor, words):
        monkeypatch.setattr(mindspore_ckpt, "MAX_TEXT", 400)
        with pytest.raises(UserError, match=words):
            open_checkpoint(write(tmp_path / "x.ckpt", field(1, field(1, b"w") + field(2, tensor))))

    def test_a_value_has_one_name_and_one_tensor(self, tmp_path):
        tensor = field(2, b"\x08\x01" + FLOAT32 + field(3, b"1234"))
        for value in (field(1, b"w") + field(1, b"w") + tensor, field(1, b"w") + tensor + tensor):
            with pytest.raises(UserError, match="of a value"):
                open_checkpoint(write(tmp_path / "x.ckpt", field(1, value)))

    def test_pieces_are_counted_as_tensors(self, tmp_path, monkeypatch):
        monkeypatch.setattr(mindspore_ckpt, "MAX_TENSORS", 10)
        content = ckpt(("w", [1], "Float32", b"")) * 12
        with pytest.raises(UserError, match="more than 10 tensors"):
            open_checkpoint(write(tmp_path / "x.ckpt", content))

    def test_a_scalar_of_older_versions(self, tmp_path):
        path = write(tmp_path / "x.ckpt", ckpt(("step", [0], "Int64", (7).to_bytes(8, "little"))))
        assert read_checkpoint(path)[0]["step"] == 7 and open_checkpoint(path).shape("step") == ()


def safetensors_of(header: bytes, data: bytes = b"1234") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


class TestDamagedSafetensors:
    @pytest.mark.parametrize(
        "shape, size, words",
        [
            ([1] * 50, 4, "w has 50 dimensions, at most 32"),
            ([1] * 100_000, 4, "w has 100,000 dimensions, at most 32"),
            ([0, 1 << 62, 1 << 62], 0, "more than 1,099,511,627,776 elements"),
            ([1 << 63, 2], 4, "damaged or cut-off"),
            ([-1], 4, "damaged or cut-off"),
        ],
    )
    def test_no_shape_is_believed(self, tmp_path, shape, size, words):
        header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
        with pytest.raises(UserError, match=words):
            open_checkpoint(write(tmp_path / "x.safetensors", safetensors_of(header, bytes(size))))

    def test_a_long_name(self, tmp_path):
        header = json.dumps({"w" * 5000: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
        with pytest.raises(UserError, match="has 5,000 characters, at most 1,000") as caught:
            open_checkpoint(write(tmp_path / "x.safetensors", safetensors_of(header)))
        assert len(str(caught.value)) < 500

    def test_a_large_header(self, tmp_path, monkeypatch):
        monkeypatch.setattr(safetensors_file, "MAX_HEADER", 1000)
        with pytest.raises(UserError, match="its header has 1,002 bytes, at most 1,000"):
            open_checkpoint(write(tmp_path / "x.safetensors", safetensors_of(b"{" + b" " * 1000 + b"}")))

    def test_more_tensors_than_any_model_has(self, tmp_path, monkeypatch):
        monkeypatch.setattr(checkpoint, "MAX_TENSORS", 10)
        entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        header = json.dumps({str(i): entry for i in range(11)}).encode()
        with pytest.raises(UserError, match="names 11 tensors, at most 10"):
            open_checkpoint(write(tmp_path / "x.safetensors", safetensors_of(header, b"")))

    def test_a_name_given_twice(self, tmp_path):
        entry = b'"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
        with pytest.raises(UserError, match='"w" is given twice'):
            open_checkpoint(write(tmp_path / "x.safetensors", safetensors_of(b"{" + entry + b"," + entry + b"}")))


@pytest.mark.parametrize("kind", ["safetensors", "ckpt", "torch", "legacy"])
def test_a_flipped_bit_is_answered_or_changes_a_number(tmp_path, kind):
    arrays = {"a.weight": ARRAYS["a.weight"], "half": ARRAYS["half"], "nothing": ARRAYS["nothing"]}
    if kind in ("safetensors", "ckpt"):
        write_checkpoint(tmp_path / f"x.{kind}", arrays, TEXTS)
        content = (tmp_path / f"x.{kind}").read_bytes()
    else:
        content = torch_bytes({"state_dict": arrays}) if kind == "torch" else legacy(arrays)
    rng = np.random.default_rng(0)
    for place, bit in zip(rng.integers(0, len(content), 150), rng.integers(0, 8, 150)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << bit
        try:
            for array in open_checkpoint(write(tmp_path / "flipped", bytes(flipped))).values():
                array.sum()
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 600


class TestForeignFiles:
    @pytest.mark.parametrize("kind", FOREIGN)
    def test_the_error_says_what_it_is(self, tmp_path, suffix, kind):
        content, pattern = FOREIGN[kind]
        path = write(tmp_path / f"model{suffix}", content)
        with pytest.raises(UserError, match=pattern) as caught:
            read_checkpoint(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_a_pickle_in_disguise_runs_nothing(self, tmp_path, suffix):
        class Evil:
            def __reduce__(self):
                return (open, (str(tmp_path / "was_here"), "w"))

        with pytest.raises(UserError):
            read_checkpoint(write(tmp_path / f"model{suffix}", pickle.dumps(Evil())))
        assert not (tmp_path / "was_here").exists()

    def test_a_folder(self, tmp_path):
        with pytest.raises(UserError, match="is a folder"):
            read_checkpoint(tmp_path)

    @pytest.mark.parametrize("linked", [False, True])
    @pytest.mark.parametrize("kind, words", [("fifo", "is a pipe"), ("device", "is a device")])
    def test_a_path_that_is_not_a_regular_file_is_not_opened(self, tmp_path, kind, words, linked):
        path = tmp_path / "model.safetensors"
        if kind == "fifo":
            os.mkfifo(path)
        else:
            path.symlink_to("/dev/zero")
        if linked:
            path = path.rename(tmp_path / "other")
            (tmp_path / "model.safetensors").symlink_to(path)
            path = tmp_path / "model.safetensors"
        for read in (open_checkpoint, content_hash):
            with pytest.raises(UserError, match=words):
                read(path)

    def test_a_missing_file_names_the_nearest(self, tmp_path, suffix):
        whole_file(tmp_path, suffix)
        with pytest.raises(UserError, match=f"does not exist: did you mean whole{suffix}"):
            read_checkpoint(tmp_path / f"whoel{suffix}")
        with pytest.raises(UserError, match="does not exist"):
            read_checkpoint(tmp_path / "no folder" / f"x{suffix}")

    def test_an_unknown_element_type(self, tmp_path):
        header = json.dumps({"w": {"dtype": "F6_E2M3", "shape": [8], "data_offsets": [0, 8]}}).encode()
        with pytest.raises(UserError, match="F6_E2M3|damaged"):
            read_checkpoint(write(tmp_path / "x.safetensors", struct.pack("<Q", len(header)) + header + b"\0" * 8))


class TestWriting:
    @pytest.mark.parametrize("name", ["x.pt", "x", "x.safetensor", "x.ckpt.bak"])
    def test_another_suffix_is_refused(self, tmp_path, name):
        with pytest.raises(UserError, match=".safetensors or .ckpt"):
            write_checkpoint(tmp_path / name, ARRAYS)
        assert not os.listdir(tmp_path)

    def test_a_place_that_cannot_be_written_is_named(self, tmp_path, suffix):
        write(tmp_path / "file", b"")
        with pytest.raises(UserError, match="cannot be written"):
            write_checkpoint(tmp_path / "file" / f"x{suffix}", ARRAYS)

    def test_metadata_is_text(self, tmp_path, suffix):
        with pytest.raises(TypeError, match="lora_rank"):
            write_checkpoint(tmp_path / f"x{suffix}", ARRAYS, {"lora_rank": 4})


def test_arrays_are_aligned_wherever_they_lie_in_the_file(tmp_path):
    """A .ckpt has names of any length between the arrays. MindSpore 2.7 makes no Tensor of an unaligned array."""
    arrays = {"n" * length: np.arange(3, dtype=np.float32) for length in range(1, 9)}
    write_checkpoint(tmp_path / "names.ckpt", arrays)
    checkpoint = open_checkpoint(tmp_path / "names.ckpt")
    for name, array in arrays.items():
        assert checkpoint[name].flags.aligned and not checkpoint[name].flags.writeable
        np.testing.assert_array_equal(checkpoint[name], array)
