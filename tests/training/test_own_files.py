"""The files in ckpt/ that a run wrote itself: only those are replaced, removed and moved."""

from __future__ import annotations

import json
import logging

import pytest

from ldm.errors import UserError
from ldm.training.own_files import OwnFiles, find_states, parse_name

LORAS = [f"lora-{step:08d}.ckpt" for step in (3, 6, 9)]
STATES = [f"state-{step:08d}.safetensors" for step in (3, 6, 9)]


def save(own: OwnFiles, *names: str) -> None:
    own.begin(names)
    for name in names:
        (own.folder / name).write_text("of the run")


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    "name",
    ["lora-best.ckpt", "lora-mystyle-v1.ckpt", "lora-9.ckpt", "lora-000000009.ckpt", "lora-00000009.safetensors",
     "state-99999999999999999999.safetensors", "lora-0000000\u0669.ckpt", "lora-00000009.ckpt.bak",
     "lora-2024-05.ckpt", "style-step9.safetensors", "style-step00000009.ckpt", "-step00000009.safetensors",
     ".style-step00000009.safetensors", "a/b-step00000009.safetensors", "lora-00000003-step00000009.safetensors"],
)  # fmt: skip
def test_only_names_of_the_exact_form_are_a_run_s(name):
    assert parse_name(name) is None
    assert parse_name("lora-00000009.ckpt") == ("lora", 9, "")
    assert parse_name("state-123456789.safetensors") == ("state", 123456789, "")
    assert parse_name("ti-00000009.safetensors") == ("ti", 9, "") and parse_name("ti-00000009.ckpt") is None
    assert parse_name("my-style-step00000009.safetensors") == ("share", 9, "my-style")


def test_states_are_found_by_name_the_newest_first(tmp_path):
    for name in (*STATES[:2], "state-100000000.safetensors", "state-99999999999999999999.safetensors"):
        (tmp_path / name).touch()
    (tmp_path / STATES[2]).mkdir()
    (tmp_path / "state-00000010.safetensors").symlink_to("nowhere")
    assert [path.name for path in find_states(tmp_path)] == ["state-100000000.safetensors", *STATES[1::-1]]
    assert find_states(tmp_path / "missing") == []


def test_pruning_keeps_the_last_files_and_all_that_are_not_the_run_s(tmp_path):
    users = {"lora-best.ckpt", "lora-mystyle-v1.ckpt", "lora-00000001.ckpt", "state-00000001.safetensors"}
    for name in users:
        (tmp_path / name).write_text("a user's")
    own = OwnFiles(tmp_path, resumed=False)
    for lora, state in zip(LORAS, STATES):
        save(own, lora, "lora.ckpt", state)
        own.prune("lora", 2)
        own.prune("state", 1)
    assert names(tmp_path) == {*users, *LORAS[1:], "lora.ckpt", STATES[2], "files.json"}
    assert {name for name in users if (tmp_path / name).read_text() == "a user's"} == users


def test_files_to_share_are_pruned_with_the_lora_of_their_step_before_it_and_no_others(tmp_path, monkeypatch):
    shared = [f"style-step{step:08d}.safetensors" for step in (3, 6, 9)]
    (tmp_path / "other-step00000003.safetensors").write_text("a user's")
    own = OwnFiles(tmp_path, resumed=False)
    for lora, share in zip(LORAS[:2], shared):
        save(own, lora, share, "lora.ckpt", "style.safetensors")
    own = OwnFiles(tmp_path, resumed=True)
    assert own.names == [LORAS[0], shared[0], LORAS[1], shared[1], "lora.ckpt", "style.safetensors"]
    save(own, LORAS[2], "lora.ckpt")  # none is written any more
    removed = []
    monkeypatch.setattr("pathlib.Path.unlink", lambda path, missing_ok: removed.append(path.name))
    own.prune("lora", 2, beside="share")
    assert removed == [shared[0], LORAS[0]]


def test_a_name_in_the_record_that_leaves_the_folder_is_not_the_run_s(tmp_path):
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "mine.safetensors").touch()
    (tmp_path / "ckpt" / "files.json").write_text(json.dumps({"files": ["../mine.safetensors", "/mine.safetensors"]}))
    assert OwnFiles(tmp_path / "ckpt", resumed=True).names == []


def test_the_record_is_written_before_the_files(tmp_path):
    own = OwnFiles(tmp_path, resumed=False)
    own.begin([LORAS[0], STATES[0]])
    assert json.loads((tmp_path / "files.json").read_text()) == {"files": [LORAS[0], STATES[0]]}
    (tmp_path / LORAS[0]).touch()  # killed here
    assert OwnFiles(tmp_path, resumed=True).names == [LORAS[0]]


@pytest.mark.parametrize("make", ["a file", "a folder", "a link", "a dead link"])
@pytest.mark.parametrize("name", ["lora.ckpt", LORAS[0], STATES[0]])
def test_a_file_in_the_way_that_is_not_the_run_s_is_renamed_with_a_warning(tmp_path, caplog, name, make):
    path, other = tmp_path / name, tmp_path / "best.bin"
    other.write_text("a user's")
    if make == "a file":
        path.write_text("a user's")
    elif make == "a folder":
        path.mkdir()
    else:
        path.symlink_to("best.bin" if make == "a link" else "nowhere")
    (tmp_path / f"{path.stem}-kept{path.suffix}").write_text("from before")
    save(OwnFiles(tmp_path, resumed=False), name)
    kept = tmp_path / f"{path.stem}-kept-2{path.suffix}"
    assert path.read_text() == "of the run" and other.read_text() == "a user's"
    assert kept.is_dir() if make == "a folder" else kept.is_symlink() == ("link" in make)
    assert str(path) in caplog.text and kept.name in caplog.text


def test_a_link_in_the_place_of_an_own_file_is_not_followed(tmp_path):
    save(OwnFiles(tmp_path, resumed=False), "lora.ckpt")
    (tmp_path / "best.ckpt").write_text("a user's")
    (tmp_path / "lora.ckpt").unlink()
    (tmp_path / "lora.ckpt").symlink_to("best.ckpt")
    save(OwnFiles(tmp_path, resumed=True), "lora.ckpt")
    assert (tmp_path / "best.ckpt").read_text() == "a user's" and (tmp_path / "lora-kept.ckpt").is_symlink()


def test_a_run_without_a_record_has_the_files_of_its_form(tmp_path):
    for name in (*LORAS, "lora-best.ckpt", "lora.ckpt"):
        (tmp_path / name).touch()
    assert OwnFiles(tmp_path, resumed=True).names == []  # no state, so nobody knows whose they are
    (tmp_path / STATES[2]).touch()
    assert OwnFiles(tmp_path, resumed=True).names == [*LORAS[:2], LORAS[2], STATES[2], "lora.ckpt"]
    assert OwnFiles(tmp_path, resumed=False).names == []


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"files": {}}', b"\xff\xfe", b'{"files": ["lora-00000003.ckpt"', b"[" * 10**5]
)
def test_a_broken_record_is_not_used_and_kept(tmp_path, caplog, content):
    for name in (*LORAS, *STATES):
        (tmp_path / name).touch()
    (tmp_path / "files.json").write_bytes(content)
    own = OwnFiles(tmp_path, resumed=True)
    assert own.names == [] and "files.json" in caplog.text
    save(own, "lora-00000012.ckpt")
    own.prune("lora", 1)
    assert names(tmp_path) == {*LORAS, *STATES, "lora-00000012.ckpt", "files.json", "files-kept.json"}
    assert (tmp_path / "files-kept.json").read_bytes() == content


def test_a_record_names_nothing_outside_the_folder(tmp_path):
    folder = tmp_path / "ckpt"
    folder.mkdir()
    (tmp_path / LORAS[0]).touch()
    (folder / LORAS[1]).touch()
    listed = [f"../{LORAS[0]}", str(tmp_path / LORAS[0]), LORAS[1], LORAS[1], LORAS[2], 7, None, ["x"], ".", ""]
    (folder / "files.json").write_text(json.dumps({"files": listed}))
    assert OwnFiles(folder, resumed=True).names == [LORAS[1]]


def test_a_warning_names_a_file_that_cannot_be_removed_once(tmp_path, caplog, monkeypatch):
    own = OwnFiles(tmp_path, resumed=False)
    for lora in LORAS:
        save(own, lora)

    def refuse(path, missing_ok=False):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as context:
        context.setattr("pathlib.Path.unlink", refuse)
        own.prune("lora", 1)
        own.prune("lora", 1)
    assert caplog.text.count("cannot be removed (Permission denied") == 1
    own.prune("lora", 1)
    assert names(tmp_path) == {LORAS[2], "files.json"}


def test_files_of_another_run_beyond_the_step_are_moved_aside_with_a_warning(tmp_path, caplog):
    save(OwnFiles(tmp_path, resumed=False), *LORAS, *STATES, "lora.ckpt")
    (tmp_path / "lora-00000012.ckpt").write_text("a user's")
    (tmp_path / "abandoned-after-00000003").mkdir()  # from before
    own = OwnFiles(tmp_path, resumed=True)
    with caplog.at_level(logging.WARNING):
        own.set_aside_later(3)
    aside = tmp_path / "abandoned-after-00000003-2"
    assert names(aside) == {*LORAS[1:], *STATES[1:]}
    assert own.names == [LORAS[0], STATES[0], "lora.ckpt"] and (tmp_path / "lora-00000012.ckpt").exists()
    assert "4 files" in caplog.text and str(aside) in caplog.text


def test_files_of_an_interrupted_save_are_not_taken_for_another_run_s(tmp_path, caplog):
    """Killed between the LoRA of step 6 and its state: the run resumes from step 3 and writes it again."""
    own = OwnFiles(tmp_path, resumed=False)
    save(own, LORAS[0], STATES[0])
    own.begin([LORAS[1], STATES[1]])
    (tmp_path / LORAS[1]).touch()
    own = OwnFiles(tmp_path, resumed=True)
    own.set_aside_later(3)
    save(own, "lora-00000005.ckpt")
    own.prune("lora", 1)
    assert not caplog.text and names(tmp_path) == {"lora-00000005.ckpt", STATES[0], "files.json"}


def test_a_folder_that_cannot_be_written_is_named(unprivileged):
    (unprivileged / "ckpt").mkdir()
    own = OwnFiles(unprivileged / "ckpt", resumed=False)
    (unprivileged / "ckpt").chmod(0o555)
    with pytest.raises(UserError, match="files.json cannot be written: Permission denied: give"):
        own.begin([LORAS[0]])
    (unprivileged / "ckpt").chmod(0)
    with pytest.raises(UserError, match="ckpt cannot be"):
        find_states(unprivileged / "ckpt")
