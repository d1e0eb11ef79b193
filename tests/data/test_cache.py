"""Arrays are computed once, kept on disk, and computed again if their file is damaged."""

import hashlib
import io
import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ldm.data.cache import ArrayCache, _checksum, content_key, file_hash
from ldm.errors import UserError
from ldm.runtime import peers

ROOT = Path(__file__).parents[2]


class Doubler:
    """Computes 2 * place for every place and records the places."""

    def __init__(self):
        self.asked = []

    def __call__(self, places):
        self.asked.append(list(places))
        return np.array([[2.0 * place, 1.0] for place in places], dtype=np.float32)


def keys(count):
    return [content_key("test", index) for index in range(count)]


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("on_disk", [False, True])
def test_every_key_gets_its_array(tmp_path, on_disk):
    cache, compute = ArrayCache(tmp_path / "cache" if on_disk else None), Doubler()
    arrays = cache.get_or_compute(keys(5), compute, batch_size=2, desc="numbers")
    assert [array.tolist() for array in arrays] == [[2.0 * index, 1.0] for index in range(5)]
    assert all(array.dtype == np.float32 for array in arrays)
    assert len(files(tmp_path)) == (5 if on_disk else 0)


def test_arrays_are_computed_in_batches():
    compute = Doubler()
    ArrayCache().get_or_compute(keys(5), compute, batch_size=2, desc="numbers")
    assert compute.asked == [[0, 1], [2, 3], [4]]


def test_processes_compute_a_share_each_and_read_the_rest(tmp_path, monkeypatch):
    first, other = Doubler(), Doubler()

    def computing_of_the_other():
        monkeypatch.setattr(peers, "gather", lambda: None)
        ArrayCache(tmp_path, 1, 2).get_or_compute(keys(5), other, batch_size=2, desc="numbers")

    monkeypatch.setattr(peers, "gather", computing_of_the_other)
    arrays = ArrayCache(tmp_path, 0, 2).get_or_compute(keys(5), first, batch_size=2, desc="numbers")
    assert [array[0] for array in arrays] == [0, 2, 4, 6, 8]
    assert (first.asked, other.asked) == ([[0, 2], [4]], [[1, 3]])


def test_a_process_computes_what_another_host_keeps_for_itself(tmp_path, caplog):
    compute = Doubler()
    ArrayCache(tmp_path, 1, 2).get_or_compute(keys(5), compute, batch_size=2, desc="numbers")
    assert compute.asked == [[1, 3], [0, 2], [4]]
    assert "numbers: 3 arrays of other processes" in caplog.text and "let all hosts share output_path" in caplog.text


def test_nothing_is_computed_twice_in_memory():
    cache, compute = ArrayCache(), Doubler()
    cache.get_or_compute(keys(4), compute, batch_size=4, desc="numbers")
    arrays = cache.get_or_compute(keys(6), compute, batch_size=4, desc="numbers")
    assert compute.asked == [[0, 1, 2, 3], [4, 5]]
    assert [array[0] for array in arrays] == [0, 2, 4, 6, 8, 10]


def test_nothing_is_computed_twice_from_disk(tmp_path):
    ArrayCache(tmp_path).get_or_compute(keys(4), Doubler(), batch_size=4, desc="numbers")
    compute = Doubler()
    arrays = ArrayCache(tmp_path).get_or_compute(keys(4)[::-1], compute, batch_size=4, desc="numbers")
    assert compute.asked == []
    assert [array[0] for array in arrays] == [6, 4, 2, 0]
    assert arrays[0].dtype == np.float32


def test_equal_keys_are_computed_once_and_share_their_array(tmp_path):
    compute = Doubler()
    same = keys(1) * 3
    arrays = ArrayCache(tmp_path).get_or_compute([*same, *keys(2)], compute, batch_size=2, desc="numbers")
    assert compute.asked == [[0, 4]]
    assert arrays[0] is arrays[1] is arrays[3]


def test_no_keys_compute_nothing(tmp_path):
    assert ArrayCache(tmp_path).get_or_compute([], Doubler(), batch_size=2, desc="numbers") == []


def test_a_cached_array_does_not_hold_its_batch_in_memory():
    arrays = ArrayCache().get_or_compute(keys(2), Doubler(), batch_size=2, desc="numbers")
    assert all(array.base is None for array in arrays)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:10],
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: b"\0" * len(content),
        lambda content: b"something else entirely",
        lambda content: b"\x80\x04N.",  # a pickle
    ],
    ids=["empty", "a few bytes", "half", "one byte short", "zeros", "foreign", "pickle"],
)
def test_a_broken_file_is_named_and_computed_again(tmp_path, caplog, damage):
    ArrayCache(tmp_path).get_or_compute(keys(3), Doubler(), batch_size=3, desc="numbers")
    [path] = tmp_path.rglob(f"{keys(3)[1]}*")
    path.write_bytes(damage(path.read_bytes()))
    compute = Doubler()
    with caplog.at_level(logging.WARNING):
        arrays = ArrayCache(tmp_path).get_or_compute(keys(3), compute, batch_size=1, desc="numbers")
    assert compute.asked == [[1]]
    assert [array[0] for array in arrays] == [0, 2, 4]
    assert str(path) in caplog.text and "broken" in caplog.text
    caplog.clear()
    again = Doubler()
    ArrayCache(tmp_path).get_or_compute(keys(3), again, batch_size=1, desc="numbers")
    assert again.asked == [] and caplog.text == ""


def npy(array, **settings):
    buffer = io.BytesIO()
    np.save(buffer, array, **settings)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (npy(np.array([np.nan, 1], np.float32)), "holds values that are not finite"),
        (npy(np.array([np.inf, 1], np.float32)), "holds values that are not finite"),
        (npy(np.zeros(3, np.float32)), r"holds float32 of the shape \(3,\)"),
        (npy(np.zeros(2, np.int64)), "holds int64"),
        (npy(np.array(["a", "b"])), "holds <U1"),
        (npy(np.array([{}, 1], object), allow_pickle=True), "is broken"),
        (npy(np.zeros(2, np.float32))[:-3], "is broken"),
        (npy(np.zeros(2, np.float32)).replace(b"(2,)", b"(9,)"), "is broken"),
        (npy(np.zeros(2, np.float32)).replace(b"(2,), }", b"(9**9)}"), "is broken"),
        (npy(np.zeros(2, np.float32)).replace(b"'<f4'", b"'<f9'"), "is broken"),
        (b"PK\x03\x04 an archive", "is broken"),
        (b"", "is broken"),
    ],
)
def test_an_unusable_array_with_a_valid_checksum_is_named_and_computed_again(tmp_path, caplog, body, fault):
    cache = ArrayCache(tmp_path)
    cache.get_or_compute(keys(2), Doubler(), batch_size=2, desc="numbers")
    [path] = tmp_path.rglob(f"{keys(2)[1]}*")
    path.write_bytes(body + _checksum(keys(2)[1], body))
    arrays = ArrayCache(tmp_path).get_or_compute(keys(2), Doubler(), batch_size=1, desc="numbers", shape=(2,))
    assert [array.tolist() for array in arrays] == [[0, 1], [2, 1]]
    assert re.search(f"{path} {fault}.*; computing it again", caplog.text)


@pytest.mark.parametrize("kind", ["fifo", "link", "folder"])
def test_a_cache_file_that_is_no_file_is_not_waited_for(tmp_path, caplog, kind):
    ArrayCache(tmp_path).get_or_compute(keys(1), Doubler(), batch_size=1, desc="numbers")
    [path] = files(tmp_path)
    path.unlink()
    os.mkfifo(tmp_path / "elsewhere")
    {"fifo": os.mkfifo, "link": lambda place: place.symlink_to(tmp_path / "elsewhere"), "folder": os.mkdir}[kind](path)
    arrays = ArrayCache(tmp_path).get_or_compute(keys(1), Doubler(), batch_size=1, desc="numbers")
    assert arrays[0].tolist() == [0, 1]
    assert f"{path} is a" in caplog.text and "computing it again" in caplog.text
    assert (tmp_path / "elsewhere").is_fifo() and not path.is_file()  # nothing but a file is ever replaced


@pytest.mark.parametrize("closed", ["cache", "file"])
def test_a_cache_that_another_user_closed_is_computed_again_in_memory(unprivileged, caplog, closed):
    folder = unprivileged / "cache"
    ArrayCache(folder).get_or_compute(keys(3), Doubler(), batch_size=3, desc="numbers")
    [file] = folder.rglob(f"{keys(3)[1]}*")
    (folder if closed == "cache" else file).chmod(0)
    arrays = ArrayCache(folder).get_or_compute(keys(3), Doubler(), batch_size=1, desc="numbers")
    assert [array[0] for array in arrays] == [0, 2, 4]
    assert "Permission denied" in caplog.text


def test_of_many_broken_files_the_first_are_named_and_all_are_counted(tmp_path, caplog):
    ArrayCache(tmp_path).get_or_compute(keys(40), Doubler(), batch_size=40, desc="numbers")
    for path in files(tmp_path):
        path.write_bytes(b"")
    ArrayCache(tmp_path).get_or_compute(keys(40), Doubler(), batch_size=40, desc="numbers")
    assert len(caplog.records) == 21 and "20 more" in caplog.text


def test_no_flipped_byte_changes_an_array_unnoticed(tmp_path):
    ArrayCache(tmp_path).get_or_compute(keys(1), Doubler(), batch_size=1, desc="numbers")
    [path] = files(tmp_path)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        [array] = ArrayCache(tmp_path).get_or_compute(keys(1), Doubler(), batch_size=1, desc="numbers")
        assert array.tolist() == [0.0, 1.0] and array.dtype == np.float32, place


def test_a_file_under_another_key_is_not_taken_for_it(tmp_path):
    ArrayCache(tmp_path).get_or_compute(keys(2), Doubler(), batch_size=2, desc="numbers")
    [first], [second] = (list(tmp_path.rglob(f"{key}*")) for key in keys(2))
    second.write_bytes(first.read_bytes())
    arrays = ArrayCache(tmp_path).get_or_compute(keys(2), Doubler(), batch_size=2, desc="numbers")
    assert [array[0] for array in arrays] == [0, 2]


def test_a_cache_file_is_an_array_to_numpy_as_well(tmp_path):
    ArrayCache(tmp_path).get_or_compute(keys(1), Doubler(), batch_size=1, desc="numbers")
    [path] = files(tmp_path)
    assert np.load(path, allow_pickle=False).tolist() == [0.0, 1.0]


def test_an_interrupted_computation_keeps_what_it_had(tmp_path):
    def failing(places):
        if places[0] >= 4:
            raise KeyboardInterrupt
        return Doubler()(places)

    with pytest.raises(KeyboardInterrupt):
        ArrayCache(tmp_path).get_or_compute(keys(6), failing, batch_size=2, desc="numbers")
    compute = Doubler()
    ArrayCache(tmp_path).get_or_compute(keys(6), compute, batch_size=2, desc="numbers")
    assert compute.asked == [[4, 5]]


def test_a_killed_process_leaves_a_sound_cache(tmp_path):
    script = f"""
import numpy as np
from ldm.data.cache import ArrayCache, _checksum, content_key
def compute(places):
    print(places[0], flush=True)
    return np.full((1, 20_000), places[0], np.float32)
ArrayCache({str(tmp_path)!r}).get_or_compute([content_key("test", i) for i in range(2_000)], compute, 1, "numbers")
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        while process.stdout.readline().strip() != b"20":
            assert process.poll() is None
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    asked = []

    def compute(places):
        asked.extend(places)
        return [np.full(20_000, place, np.float32) for place in places]

    arrays = ArrayCache(tmp_path).get_or_compute(keys(40), compute, batch_size=1, desc="numbers")
    assert all((array == index).all() for index, array in enumerate(arrays))
    assert set(range(20)).isdisjoint(asked)


def test_old_unfinished_files_of_killed_processes_are_removed_and_recent_ones_kept(tmp_path):
    (tmp_path / "ab").mkdir()
    old, young = tmp_path / "ab" / ".abc.1.partial.npy", tmp_path / "ab" / ".abd.2.partial.npy"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    ArrayCache(tmp_path)
    assert not old.exists() and young.exists()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused_and_not_kept(tmp_path, value):
    with pytest.raises(UserError, match="latents.*not finite.*precision"):
        ArrayCache(tmp_path).get_or_compute(keys(1), lambda places: [np.array([value])], 1, "latents")
    assert files(tmp_path) == []


def test_a_cache_that_cannot_be_written_stays_in_memory_with_one_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    cache = ArrayCache(tmp_path / "file" / "cache")
    with caplog.at_level(logging.WARNING):
        arrays = cache.get_or_compute(keys(3), Doubler(), batch_size=1, desc="numbers")
    assert [array[0] for array in arrays] == [0, 2, 4]
    assert caplog.text.count("cannot write the cache") == 1


def test_too_few_arrays_for_a_batch_are_an_error_of_the_caller():
    with pytest.raises(ValueError, match="1 arrays for a batch of 2"):
        ArrayCache().get_or_compute(keys(2), lambda places: [np.zeros(1)], 2, "numbers")


def test_a_key_is_64_hex_digits_of_all_parts(tmp_path):
    assert len(content_key("latents", "abc", 512)) == 64
    assert content_key("latents", "abc", 512) == content_key("latents", "abc", 512)


def test_the_key_depends_on_every_part_its_type_and_its_place():
    lists = [
        ("a",),
        ("a", "b"),
        ("ab",),
        ("b", "a"),
        ("a", ""),
        ("", "a"),
        (1,),
        ("1",),
        (1.0,),
        (b"1",),
        (b"'1'",),
        (),
    ]
    assert len({content_key(*parts) for parts in lists}) == len(lists)


def test_a_file_is_identified_by_its_content_not_its_name(tmp_path):
    for name, content in (("a.png", b"one"), ("b.png", b"one"), ("c.png", b"two")):
        (tmp_path / name).write_bytes(content)
    assert content_key(tmp_path / "a.png") == content_key(tmp_path / "b.png") != content_key(tmp_path / "c.png")
    before = content_key(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(b"changed")
    assert content_key(tmp_path / "a.png") != before


def test_a_file_that_is_gone_is_named(tmp_path):
    with pytest.raises(UserError, match="gone.png"):
        content_key(tmp_path / "gone.png")


@pytest.mark.parametrize("target", ["fifo", "/dev/zero", "folder"])
def test_only_a_regular_file_has_a_key(tmp_path, target):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.png").symlink_to(target)
    with pytest.raises(UserError, match="a.png is a (pipe|device|folder).*not a file: check data_path"):
        content_key(tmp_path / "a.png")


def test_the_key_of_a_file_is_that_of_its_bytes(tmp_path):
    """Caches of earlier versions stay valid."""
    content = bytes(range(256)) * 10_000
    (tmp_path / "a").write_bytes(content)
    assert content_key(file_hash(tmp_path / "a")) == content_key(tmp_path / "a")
    expected = hashlib.sha256(b"file" + hashlib.sha256(content).digest()).hexdigest()
    assert content_key(tmp_path / "a") == expected
