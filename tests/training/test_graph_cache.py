"""Compiled graphs on disk: what their key depends on, and that nothing half-written or damaged is read."""

from __future__ import annotations

import os
import shutil

import mindspore as ms
import pytest

from ldm.training import graph_cache
from ldm.training.graph_cache import cached_graphs, graph_key


@pytest.fixture
def context(monkeypatch):
    calls = []
    monkeypatch.setattr(graph_cache.ms, "set_context", lambda **settings: calls.append(settings))
    return calls


def test_the_key_depends_on_settings_source_version_and_kernels(monkeypatch, tmp_path):
    key = graph_key({"lora_rank": 4})
    assert graph_key({"lora_rank": 4}) == key != graph_key({"lora_rank": 8})
    monkeypatch.setattr(ms, "__version__", "2.7.2")
    assert graph_key({"lora_rank": 4}) != key
    monkeypatch.undo()
    monkeypatch.setattr(graph_cache, "kernels_in_use", lambda: tmp_path / "another.so")
    assert graph_key({"lora_rank": 4}) != key
    monkeypatch.undo()
    (tmp_path / "a.py").write_text("1")
    monkeypatch.setattr(graph_cache, "SOURCE", tmp_path)
    before = graph_key()
    (tmp_path / "a.py").write_text("2")
    assert graph_key() != before != key


def test_a_graph_gets_its_name_when_the_step_has_run_and_is_found_then(tmp_path, context):
    with cached_graphs(tmp_path, "key") as found:
        assert not found and not (tmp_path / "key").exists()
        writing = tmp_path / context[-1]["compile_cache_path"]
        (writing / "graph").touch()
    assert (tmp_path / "key" / "graph").exists()
    assert context[-1] == {"enable_compile_cache": False}
    with cached_graphs(tmp_path, "key") as found:
        assert found and context[-1]["compile_cache_path"] == str(tmp_path / "key")


def test_graphs_of_failed_killed_and_other_runs_are_removed(tmp_path, context):
    (tmp_path / "key.77.partial").mkdir()
    (tmp_path / "stale").mkdir()
    with cached_graphs(tmp_path, "key"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["key"]
    with pytest.raises(RuntimeError), cached_graphs(tmp_path, "key"):
        raise RuntimeError("a graph that does not run")
    assert not list(tmp_path.iterdir()) and context[-1] == {"enable_compile_cache": False}


@pytest.fixture
def kept(tmp_path, context):
    """A folder with a compiled graph under "key"."""
    with cached_graphs(tmp_path, "key"):
        writing = tmp_path / context[-1]["compile_cache_path"]
        (writing / "rank_0").mkdir()
        (writing / "rank_0" / "graph.mindir").write_bytes(bytes(range(100)))
        (writing / "weights.data").write_bytes(b"weights")
    return tmp_path / "key"


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    "damage",
    [
        lambda kept: flip(kept / "rank_0" / "graph.mindir"),
        lambda kept: (kept / "weights.data").write_bytes(b""),
        lambda kept: (kept / "weights.data").unlink(),
        lambda kept: (kept / "rank_0" / "more").touch(),
        lambda kept: (kept / "more").symlink_to("weights.data"),
        lambda kept: os.mkfifo(kept / "more"),
        lambda kept: flip(kept / graph_cache.CHECKSUMS),
        lambda kept: (kept / graph_cache.CHECKSUMS).unlink(),
        lambda kept: (kept / graph_cache.CHECKSUMS).write_text("[" * 10**5),
        lambda kept: (shutil.rmtree(kept), kept.touch()),
    ],
    ids=["a bit", "cut off", "missing", "one more", "a link", "a pipe", "checksums", "no checksums", "deep", "a file"],
)
def test_a_damaged_graph_is_named_and_compiled_again(tmp_path, kept, context, caplog, damage):
    damage(kept)
    with cached_graphs(tmp_path, "key") as found:
        assert not found and context[-1]["compile_cache_path"] != str(kept)
        (tmp_path / context[-1]["compile_cache_path"] / "new").touch()
    assert f"{kept} is damaged" in caplog.text
    with cached_graphs(tmp_path, "key") as found:
        assert found and (kept / "new").exists()


def test_without_a_folder_that_can_be_written_nothing_is_kept(unprivileged, context, caplog):
    unprivileged.chmod(0o555)
    with cached_graphs(unprivileged / "graphs", "key") as found:
        assert not found and not context
    assert "cannot be made (Permission denied" in caplog.text


def test_on_a_full_disk_nothing_is_kept(tmp_path, context, caplog, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.write_text", full)
        with cached_graphs(tmp_path, "key"):
            pass
    assert "No space left on device" in caplog.text and not list(tmp_path.iterdir())
