"""The Fréchet distance: equal to its definition, never complex or negative, whatever the covariances."""

import os
import zipfile

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.files import archives
from ldm.metrics import frechet
from ldm.metrics.frechet import (
    FeatureStatistics,
    frechet_distance,
    frechet_of_features,
    read_statistics,
    write_statistics,
)


def features(n, d, seed=0, scale=1.0, shift=0.0):
    return np.random.default_rng(seed).normal(shift, scale, (n, d))


def statistics(x):
    return x.mean(axis=0), np.cov(x, rowvar=False).reshape(x.shape[1], x.shape[1])


def test_in_one_dimension_it_equals_the_formula():
    assert frechet_distance([1.0], [[4.0]], [3.0], [[9.0]]) == pytest.approx((1 - 3) ** 2 + (2 - 3) ** 2, rel=1e-12)


def test_for_diagonal_covariances_it_is_the_sum_over_dimensions():
    a, b = np.array([1.0, 4.0, 0.25]), np.array([9.0, 1.0, 0.0])
    expected = ((np.sqrt(a) - np.sqrt(b)) ** 2).sum() + 3 * 0.5**2
    assert frechet_distance(np.zeros(3), np.diag(a), np.full(3, 0.5), np.diag(b)) == pytest.approx(expected, rel=1e-12)


def test_turning_the_space_changes_nothing():
    x, y = features(50, 6, 1), features(40, 6, 2, 1.5, 0.3)
    turn = np.linalg.qr(features(6, 6, 3))[0]
    before = frechet_distance(*statistics(x), *statistics(y))
    assert frechet_distance(*statistics(x @ turn), *statistics(y @ turn)) == pytest.approx(before, rel=1e-10)


@pytest.mark.parametrize("n, m, d", [(100, 80, 10), (5, 7, 20), (20, 200, 20), (2, 2, 3)])
def test_from_features_it_is_that_of_their_statistics(n, m, d):
    x, y = features(n, d, n), features(m, d, m, 2.0, 0.1)
    expected = frechet_distance(*statistics(x), *statistics(y))
    assert frechet_of_features(x, y) == pytest.approx(expected, rel=1e-9)
    assert frechet_of_features(y, x) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n, d", [(300, 20), (10, 50), (2, 30)])
def test_between_a_set_and_itself_it_is_zero_up_to_rounding(n, d):
    x = features(n, d, scale=3.0)
    assert abs(frechet_distance(*statistics(x), *statistics(x))) < 1e-10
    assert abs(frechet_of_features(x, x)) < 1e-10


@pytest.mark.parametrize("seed", range(5))
def test_singular_covariances_give_a_real_number_that_is_not_negative(seed):
    x, y = features(8, 64, seed), features(9, 64, seed + 100)
    value = frechet_distance(*statistics(x), *statistics(y))
    assert isinstance(value, float) and np.isfinite(value) and value > 0


def test_for_constant_features_it_is_the_distance_of_the_means():
    assert frechet_distance(*statistics(np.zeros((3, 4))), *statistics(np.ones((3, 4)))) == pytest.approx(4.0)


@pytest.mark.parametrize("sizes", [(10,), (1, 9), (3, 3, 4), (9, 1), (1,) * 10])
def test_statistics_are_those_of_all_batches_together(monkeypatch, sizes):
    monkeypatch.setattr(frechet, "MERGED_AT_ONCE", 4)
    x = features(10, 5, scale=0.01, shift=1e4)  # the mean is a million standard deviations off: no digits may cancel
    gathered, start = FeatureStatistics(), 0
    for size in sizes:
        gathered.add(x[start : start + size].astype(np.float64))
        start += size
    np.testing.assert_allclose(gathered.mean, x.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(gathered.covariance, np.cov(x, rowvar=False), rtol=1e-6)
    assert gathered.count == 10


def test_statistics_keep_nothing_of_the_images(monkeypatch):
    monkeypatch.setattr(frechet, "MERGED_AT_ONCE", 100)
    gathered, batches = FeatureStatistics(), [features(64, 8, seed) for seed in range(30)]
    for batch in batches:
        gathered.add(batch)
        assert sum(map(len, gathered._pending)) < 100
    np.testing.assert_allclose(gathered.mean, np.concatenate(batches).mean(axis=0), rtol=1e-10)
    np.testing.assert_allclose(gathered.covariance, np.cov(np.concatenate(batches), rowvar=False), rtol=1e-10)
    held = sum(value.nbytes for value in vars(gathered).values() if isinstance(value, np.ndarray))
    assert held == 8 * 8 * 8 + 8 * 8 and not gathered._pending


def test_one_image_has_no_distance():
    gathered = FeatureStatistics()
    gathered.add(features(1, 4))
    with pytest.raises(UserError, match="two images"):
        gathered.covariance  # noqa: B018
    with pytest.raises(UserError, match="two images"):
        frechet_of_features(features(1, 4), features(5, 4))


def test_saved_statistics_come_back(tmp_path):
    gathered = FeatureStatistics()
    gathered.add(features(12, 6))
    write_statistics(tmp_path / "real.npz", gathered, "a network, sha256 12ab")
    saved = read_statistics(tmp_path / "real.npz")
    np.testing.assert_array_equal(saved.mean, gathered.mean)
    np.testing.assert_array_equal(saved.covariance, gathered.covariance)
    assert (saved.count, saved.network) == (12, "a network, sha256 12ab")


def test_pytorch_fids_statistics_say_nothing_of_count_and_network(tmp_path):
    np.savez(tmp_path / "theirs.npz", mu=np.zeros(3), sigma=np.eye(3))
    saved = read_statistics(tmp_path / "theirs.npz")
    assert saved.count is None and saved.network is None


GOOD = {"mu": np.zeros(3), "sigma": np.eye(3)}


@pytest.mark.parametrize(
    "arrays, answer",
    [
        ({"mu": np.zeros(3)}, "no sigma"),
        ({"sigma": np.eye(3)}, "no mu"),
        ({**GOOD, "mu": np.zeros(4)}, "expected"),
        ({**GOOD, "mu": np.zeros((3, 1))}, "expected"),
        ({**GOOD, "sigma": np.zeros((3, 2))}, "expected"),
        ({**GOOD, "mu": np.zeros(3, int)}, "not real numbers"),
        ({**GOOD, "sigma": np.eye(3).astype(complex)}, "not real numbers"),
        ({**GOOD, "mu": np.array([0, np.nan, 0])}, "not finite"),
        ({**GOOD, "sigma": np.diag([1, np.inf, 1])}, "not finite"),
        ({**GOOD, "sigma": np.triu(np.ones((3, 3)))}, "not a covariance"),
        ({**GOOD, "sigma": -np.eye(3)}, "not a covariance"),
        ({**GOOD, "mu": np.array([None] * 3, object)}, "not an .npz"),
    ],
)
def test_impossible_statistics_are_refused(tmp_path, arrays, answer):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=answer):
        read_statistics(tmp_path / "bad.npz")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not a file of numbers", b"\x93NUMPY\x01\x00v\x00"])
def test_files_that_are_no_statistics_are_refused(tmp_path, content):
    (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(UserError, match="not an .npz"):
        read_statistics(tmp_path / "bad.npz")


def zipped(path, content, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("mu.npy", content)
    return path


def test_statistics_that_inflate_to_gigabytes_are_not_unpacked(tmp_path):
    path = zipped(tmp_path / "bomb.npz", bytes(2 << 20))
    content = path.read_bytes()  # the list of members stands at the end: the size before packing at byte 24
    place = content.rindex(b"PK\x01\x02") + 24
    path.write_bytes(content[:place] + (4_000_000_000).to_bytes(4, "little") + content[place + 4 :])
    with pytest.raises(UserError, match="mu.npy has 4,000,000,000 bytes, at most 135,266,304 are read"):
        read_statistics(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_statistics_compressed_so_that_a_chunk_has_no_largest_size(tmp_path, compression):
    with pytest.raises(UserError, match="unsupported compression method"):
        read_statistics(zipped(tmp_path / "x.npz", bytes(1000), compression))


def test_a_list_of_a_million_members_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_LIST", 200)
    np.savez(tmp_path / "x.npz", **{f"array{i}": np.zeros(1) for i in range(9)})
    with pytest.raises(UserError, match="the list of its members has .* bytes, at most 200 are read"):
        read_statistics(tmp_path / "x.npz")


def test_a_member_that_promises_more_than_it_holds(tmp_path):
    text = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,)}\n"
    zipped(tmp_path / "x.npz", b"\x93NUMPY\x01\0" + len(text).to_bytes(2, "little") + text)
    with pytest.raises(UserError, match="mu: it is truncated"):
        read_statistics(tmp_path / "x.npz")


def test_statistics_that_are_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "fifo.npz")
    (tmp_path / "device.npz").symlink_to("/dev/zero")
    for name, words in (("fifo.npz", "is a pipe"), ("device.npz", "is a device"), (".", "is a folder")):
        with pytest.raises(UserError, match=words):
            read_statistics(tmp_path / name)


@pytest.mark.parametrize("count, network", [(np.nan, 1), (np.inf, 1.5), ("many", np.zeros(2)), (np.zeros(2), ["a"])])
def test_a_count_or_network_of_another_kind_is_unknown(tmp_path, count, network):
    np.savez(tmp_path / "x.npz", **GOOD, count=count, network=network)
    saved = read_statistics(tmp_path / "x.npz")
    assert saved.count is None and saved.network is None


def test_an_array_alone_is_no_statistics(tmp_path):
    np.save(tmp_path / "bad.npy", np.zeros(3))
    with pytest.raises(UserError, match="not an .npz"):
        read_statistics(tmp_path / "bad.npy")


def test_statistics_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_statistics(tmp_path / "none.npz")
    with pytest.raises(UserError, match="written as .npz"):
        write_statistics(tmp_path / "real.txt", FeatureStatistics(), "")


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("no folder")
    gathered = FeatureStatistics()
    gathered.add(features(3, 2))
    with pytest.raises(UserError, match="real.npz cannot be written"):
        write_statistics(tmp_path / "file" / "real.npz", gathered, "")
