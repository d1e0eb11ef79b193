"""Outputs are checked and locked before the work. Errors name other processes, and no files are left behind."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from ldm.errors import UserError
from ldm.files import outputs
from ldm.files.atomic import atomic_folder, atomic_path, remove_temporaries, temporary_folder
from ldm.files.outputs import claim_all, claim_file, claim_folder, claim_new

ROOT = Path(__file__).parents[2]
HOLDER = """
import sys
sys.argv = ["other.py"]
from ldm.files import outputs
with getattr(outputs, "{claim}")("{path}", "output"):
    print("held", flush=True)
    sys.stdin.read()
"""
CLAIMS = {"claim_folder": claim_folder, "claim_file": claim_file, "claim_new": claim_new}


@contextmanager
def held_elsewhere(claim: str, path: Path):
    """Hold the claim in another process, which ends with the block."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER.format(claim=claim, path=path)], cwd=ROOT, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "held\n"
        yield process
        if process.poll() is None:
            process.stdin.close()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


class TestASecondRun:
    @pytest.mark.parametrize("claim", CLAIMS)
    def test_is_refused_until_the_first_ends(self, tmp_path, claim):
        path = tmp_path / "out"
        with held_elsewhere(claim, path) as process:
            words = rf"--output .*out is in use by process {process.pid} on \S+ \(other.py, since 20.*: wait for it"
            with pytest.raises(UserError, match=words), CLAIMS[claim](path, "--output"):
                pass
        assert process.wait() == 0 and names(tmp_path) == []
        with CLAIMS[claim](path, "--output"):
            pass

    def test_takes_over_from_one_that_was_killed(self, tmp_path):
        with held_elsewhere("claim_folder", tmp_path) as process:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert names(tmp_path) == [".lock"]
        with claim_folder(tmp_path, "output_path"):
            assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
        assert names(tmp_path) == []

    def test_in_the_same_process_means_two_outputs_with_one_path(self, tmp_path):
        with claim_file(tmp_path / "a.json", "--output"):
            with pytest.raises(UserError, match="--save a?.*a.json is the path of two outputs of this run"):
                with claim_file(tmp_path / "." / "a.json", "--save"):
                    pass

    def test_is_refused_by_a_link_to_the_same_output(self, tmp_path):
        (tmp_path / "link").symlink_to("folder")
        (tmp_path / "link.npz").symlink_to("file.npz")
        (tmp_path / "folder").mkdir()
        for claim, pair in ((claim_folder, ("folder", "link")), (claim_file, ("file.npz", "link.npz"))):
            with claim(tmp_path / pair[0], "output"), pytest.raises(UserError, match="two outputs"):
                with claim(tmp_path / pair[1], "output"):
                    pass
        assert (tmp_path / "link.npz").is_symlink()

    def test_with_other_paths_is_allowed(self, tmp_path):
        with claim_all(*(claim_file(tmp_path / f"{i}.json", "--output") for i in range(3))):
            assert names(tmp_path) == [".0.json.lock", ".1.json.lock", ".2.json.lock"]
        assert names(tmp_path) == []

    def test_never_shares_a_lock_file_that_is_being_removed(self, tmp_path, monkeypatch):
        first = claim_folder(tmp_path, "output_path")
        first.__enter__()
        real, turns = fcntl.flock, []

        def flock(handle, operation):
            if not turns:  # between the opening and the locking
                first.__exit__(None, None, None)
            turns.append(handle)
            real(handle, operation)

        monkeypatch.setattr(fcntl, "flock", flock)
        with claim_folder(tmp_path, "output_path"):
            assert len(turns) == 2 and names(tmp_path) == [".lock"]
        assert names(tmp_path) == []


class TestCleanUp:
    def test_new_folders_that_stay_empty_are_removed(self, tmp_path):
        with pytest.raises(KeyError), claim_folder(tmp_path / "a" / "b", "output_path"):
            assert (tmp_path / "a" / "b").is_dir()
            raise KeyError
        with claim_file(tmp_path / "a" / "b.json", "--output"):
            pass
        assert names(tmp_path) == []

    def test_folders_with_results_stay(self, tmp_path):
        with claim_folder(tmp_path / "a" / "b", "output_path"):
            (tmp_path / "a" / "b" / "result").touch()
        assert names(tmp_path) == ["a", "b", "result"]

    def test_a_process_that_ends_without_unwinding_leaves_nothing(self, tmp_path):
        out = tmp_path / "a"
        with pytest.raises(KeyError), claim_folder(out, "output_path"), claim_file(out / "b.npz", "--save"):
            with atomic_path(out / "x.npy") as file, atomic_folder(out / "y") as folder, temporary_folder(out) as parts:
                for path in (file, folder / "unet", parts / "single"):
                    path.write_text("half")
                remove_temporaries()  # as ldm.runtime.script does
                assert names(tmp_path) == []
                raise KeyError

    def test_a_folder_that_was_moved_meanwhile_is_no_error(self, tmp_path):
        with claim_file(tmp_path / "a" / "b.json", "--output"):
            (tmp_path / "a").rename(tmp_path / "c")
        assert not (tmp_path / "a").exists()


LONG = "n" * 255


@pytest.mark.parametrize(
    "claim, path, words",
    [
        ("claim_folder", "file", "file cannot be a folder, as .*file is a file"),
        ("claim_folder", "file/below", "below cannot be a folder, as .*file is a file"),
        ("claim_folder", "dead", "dead is a link to nowhere/x, which does not exist"),
        ("claim_folder", "ring", "ring cannot be accessed: .*circle"),
        ("claim_folder", "m" * 256, "cannot be accessed: File name too long: choose a shorter path"),
        ("claim_folder", "d/" * 2100, "cannot be accessed: File name too long: choose a shorter path"),
        ("claim_file", "folder", "folder is a folder: give the path of a file"),
        ("claim_file", "file/below.json", "cannot be a folder, as .*file is a file"),
        ("claim_file", "dead", "dead is a link to nowhere/x, whose folder does not exist: remove the link"),
        ("claim_file", "dead/below.json", "dead is a link to nowhere/x, which does not exist"),
        ("claim_file", "ring", "ring cannot be accessed: .*circle"),
        ("claim_file", "/dev/null", "/dev/null is not a regular file"),
        ("claim_file", "pipe", "pipe is not a regular file"),
        ("claim_file", "m" * 256, "cannot be accessed: File name too long"),
        ("claim_file", "a\0b", "is not a valid path"),
        ("claim_new", "file", "file exists: choose another name, or remove it first"),
        ("claim_new", "dead", "dead exists"),
        ("claim_new", "folder", "folder exists"),
        ("claim_new", "m" * 256, "cannot be accessed: File name too long"),
    ],
)
def test_an_unusable_output_is_named_before_the_work(tmp_path, claim, path, words):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "dead").symlink_to("nowhere/x")
    (tmp_path / "ring").symlink_to("ring")
    os.mkfifo(tmp_path / "pipe")
    before = names(tmp_path)
    with pytest.raises(UserError, match=words) as error, CLAIMS[claim](tmp_path / path, "output"):
        pytest.fail("it was claimed")
    assert str(error.value).startswith(("output", str(tmp_path))) and names(tmp_path) == before


def test_a_new_folder_may_replace_an_empty_one_only(tmp_path):
    (tmp_path / "empty").mkdir()
    with claim_new(tmp_path / "empty", "--target", folder=True), atomic_folder(tmp_path / "empty") as folder:
        (folder / "unet").touch()
    with pytest.raises(UserError, match="empty exists"), claim_new(tmp_path / "empty", "--target", folder=True):
        pass


NAMES = [LONG, "字" * 85, "n" * 250 + ".json", "." + "x" * 254, os.fsdecode(b"\xb0\xa1" * 120)]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_255_bytes_is_claimed_and_written(tmp_path, name):
    with claim_file(tmp_path / name, "--output"):
        with pytest.raises(UserError, match="two outputs"), claim_file(tmp_path / name, "--output"):
            pass
        with claim_file(tmp_path / (name[:-1] + "z"), "--save"):  # differs in its last character
            pass
        with atomic_path(tmp_path / name) as temporary:
            temporary.touch()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_link_to_a_file_that_does_not_exist_yet_is_followed(tmp_path):
    (tmp_path / "link.json").symlink_to("there.json")
    with claim_file(tmp_path / "link.json", "--output"), atomic_path(tmp_path / "link.json") as temporary:
        temporary.touch()
    assert names(tmp_path) == ["link.json", "there.json"] and (tmp_path / "link.json").is_symlink()


class TestWithoutPermission:
    @pytest.mark.parametrize("claim", CLAIMS)
    @pytest.mark.parametrize("mode, path", [(0o500, "out"), (0o000, "out"), (0o000, "a/out"), (0o500, "a/b/out")])
    def test_an_output_is_refused_by_name(self, unprivileged, claim, mode, path):
        closed = unprivileged / "closed"
        closed.mkdir()
        closed.chmod(mode)
        with pytest.raises(UserError, match="output .*closed.*Permission denied: give this user the permission"):
            with CLAIMS[claim](closed / path, "output"):
                pass

    def test_a_folder_of_ones_own_that_may_not_be_written(self, unprivileged):
        (unprivileged / "closed").mkdir(mode=0o500)
        with pytest.raises(UserError, match="output_path .*closed cannot be written: Permission denied"):
            with claim_folder(unprivileged / "closed", "output_path"):
                pass


@pytest.fixture
def nobody():
    """A folder of the user nobody, as whom the test runs; it may become root again. For tests with two users."""
    if os.geteuid() != 0:
        pytest.skip("another user's files can be made by root alone")
    folder = Path(tempfile.mkdtemp(prefix="nobody-", dir="/tmp"))  # not in $TMPDIR, which may be root's alone
    os.chown(folder, 65534, 65534)
    os.setegid(65534)
    os.seteuid(65534)
    yield folder
    os.seteuid(0)
    os.setegid(0)
    shutil.rmtree(folder)


class TestWithAnotherUser:
    def test_another_users_file_in_a_shared_folder(self, nobody):
        shared = nobody / "shared"
        os.seteuid(0)
        shared.mkdir()
        (shared / "theirs.json").touch()
        shared.chmod(0o1777)
        os.seteuid(65534)
        with pytest.raises(UserError, match="theirs.json cannot be written: Operation not permitted"):
            with claim_file(shared / "theirs.json", "--output"):
                pass
        assert names(shared) == ["theirs.json"]

    def test_another_users_lock_is_respected_while_it_is_held_and_removed_afterwards(self, nobody):
        os.seteuid(0)
        lock = nobody / ".lock"
        lock.write_text("process 7 on another")
        lock.chmod(0o644)
        with open(lock) as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            os.seteuid(65534)
            with pytest.raises(UserError, match="in use by process 7 on another"), claim_folder(nobody, "output"):
                pass
        with claim_folder(nobody, "output"):
            assert lock.owner() == "nobody"
        assert names(nobody) == []


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog, number):
    def flock(handle, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with claim_folder(tmp_path, "output_path"), claim_file(tmp_path / "a.json", "--output"):
        assert names(tmp_path) == []
    assert "has no locks" in caplog.text and names(tmp_path) == []


def test_a_file_system_without_lasting_inode_numbers_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(os.path, "samestat", lambda first, second: False)
    with claim_folder(tmp_path, "output_path"):
        assert "no lasting inode numbers" in caplog.text


def test_a_lock_holds_although_a_full_disk_has_no_room_for_its_text(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(outputs.os, "pwrite", full)
    with claim_folder(tmp_path, "output_path"), pytest.raises(UserError, match="in use by another process"):
        with claim_folder(tmp_path, "output_path"):
            pass


@pytest.mark.parametrize("kind", ["text", "link", "folder", "pipe"])
def test_the_lock_file_of_another_program_is_not_touched(tmp_path, kind):
    elsewhere, lock = tmp_path / "elsewhere", tmp_path / "out" / ".lock"
    lock.parent.mkdir()
    {"text": lambda: lock.write_text("pid 7"), "link": lambda: lock.symlink_to(elsewhere), "folder": lock.mkdir,
     "pipe": lambda: os.mkfifo(lock)}[kind]()  # fmt: skip
    with pytest.raises(UserError, match="out cannot be locked, because .*lock belongs to another program"):
        with claim_folder(tmp_path / "out", "output_path"):
            pass
    assert not elsewhere.exists() and os.path.lexists(lock)
    assert kind != "text" or lock.read_text() == "pid 7"
