"""The hashes by which other projects know a file, against their definitions."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from safetensors.numpy import save

from ldm.errors import UserError
from ldm.weights.base_model import base_model_hash
from ldm.weights.checkpoint import write_checkpoint
from ldm.weights.hashes import data_hash, legacy_hash, sshs_hashes


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("count", [3, 0x40000 - 100, 0x44000, 0x60000])  # 4 bytes each: below, across, and beyond 1 MiB
def test_the_hashes_of_a_file_are_those_of_one_with_kohyas_keys_alone(tmp_path, count):
    """sd-scripts saves the tensors with these keys by the safetensors library, and reads the bytes."""
    arrays = {"a": np.arange(count, dtype=np.float32)}
    texts = {"ss_steps": "3", "modelspec.title": "a title", "architecture": "sd1"}
    saved = save(arrays, {"ss_steps": "3"})
    found = sshs_hashes(arrays, texts)
    assert found == {
        "sshs_model_hash": sha256(saved[8 + int.from_bytes(saved[:8], "little") :]),
        "sshs_legacy_hash": sha256(saved[0x100000:0x110000])[:8],
    }
    write_checkpoint(tmp_path / "a.safetensors", arrays, {**texts, **found})
    assert data_hash(tmp_path / "a.safetensors") == found["sshs_model_hash"]


def test_the_hashes_of_a_base_model(tmp_path):
    path = tmp_path / "base.safetensors"
    content = np.random.RandomState(0).bytes(0x120000)
    path.write_bytes(content)
    assert legacy_hash(path) == sha256(content[0x100000:0x110000])[:8]
    assert base_model_hash(path) == sha256(content)
    path.write_bytes(content[:-1])
    assert base_model_hash(path) == sha256(content[:-1])


def test_a_base_model_is_read_once(tmp_path, monkeypatch):
    path = tmp_path / "base.safetensors"
    path.write_bytes(b"weights")
    expected = base_model_hash(path)
    monkeypatch.setattr("ldm.weights.base_model.content_hash", None)
    assert base_model_hash(path) == expected


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\xff" * 100])
def test_what_has_no_header_is_refused_or_empty(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    if content:
        with pytest.raises(UserError, match="no .safetensors"):
            data_hash(path)
    else:
        assert data_hash(path) == sha256(b"")
