"""Compiled graphs on disk: what they hang on, and that nothing half-written is ever read."""

from __future__ import annotations

import mindspore as ms
import pytest

from ldm.training import graph_cache
from ldm.training.graph_cache import cached_graphs, graph_key


@pytest.fixture
def context(monkeypatch):
    calls = []
    monkeypatch.setattr(graph_cache.ms, "set_context", lambda **settings: calls.append(settings))
    return calls


def test_the_key_hangs_on_settings_source_version_and_kernels(monkeypatch, tmp_path):
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
    one = graph_key()
    (tmp_path / "a.py").write_text("2")
    assert graph_key() != one != key


def test_a_graph_gets_its_name_when_the_step_has_run_and_is_found_then(tmp_path, context):
    with cached_graphs(tmp_path, "key") as found:
        assert not found and not (tmp_path / "key").exists()
        writing = tmp_path / context[-1]["compile_cache_path"]
        (writing / "graph").touch()
    assert (tmp_path / "key" / "graph").exists()
    assert context[-1] == {"enable_compile_cache": False}
    with cached_graphs(tmp_path, "key") as found:
        assert found and context[-1]["compile_cache_path"] == str(tmp_path / "key")


def test_what_failed_what_was_killed_and_what_is_stale_is_removed(tmp_path, context):
    (tmp_path / "key.77.partial").mkdir()
    (tmp_path / "stale").mkdir()
    with cached_graphs(tmp_path, "key"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["key"]
    with pytest.raises(RuntimeError), cached_graphs(tmp_path, "key"):
        raise RuntimeError("a graph that does not run")
    assert not list(tmp_path.iterdir()) and context[-1] == {"enable_compile_cache": False}
