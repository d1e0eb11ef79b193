"""Image files are found in order and read in batches. Broken ones are named and left out."""

from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image

from ldm.errors import UserError
from ldm.metrics.image_files import ImageBatches, find_images

pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")  # pytest puts its own filters in place of the module's


def save(path, value=0, size=(4, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)
    return path


def test_images_are_found_sorted_by_name_whatever_their_kind(tmp_path):
    for name in ("b.JPG", "a.png", "00010.webp", "00009.bmp", ".a.12.partial.png"):
        save(tmp_path / name)
    Image.new("L", (4, 4)).save(tmp_path / "c.pgm")
    (tmp_path / "prompts.txt").write_text("a\n")
    assert [path.name for path in find_images(tmp_path)] == ["00009.bmp", "00010.webp", "a.png", "b.JPG", "c.pgm"]


@pytest.mark.parametrize("beginning", ["", "img_v2_"])
def test_numbered_names_are_in_the_order_of_their_numbers_with_one_warning(tmp_path, caplog, beginning):
    names = [f"{beginning}{number}.png" for number in range(12)]
    for name in names:
        save(tmp_path / name)
    assert [path.name for path in find_images(tmp_path)] == names
    [record] = caplog.records
    assert f"{beginning}9.png before {beginning}10.png" in record.getMessage()


@pytest.mark.parametrize(
    "names",
    [
        ["00000.png", "00001.png", "00010.png"],
        ["a.png", "a1.png", "b.png"],
        ["0a1f.png", "0b2.png"],
        ["1.png", "2.png"],
        ["1f9d1-200d-1f37c.png", "1f9d1-200d-1f9b1.png", "1f9d1.png"],  # emoji's code points, which are hexadecimal
        ["a1_10.png", "a1_9.png", "b1_2.png"],
        ["1.png", "10.png", "2.png", "cover.png"],
    ],
)
def test_other_names_are_sorted_as_text_without_a_warning(tmp_path, caplog, names):
    for name in names:
        save(tmp_path / name)
    assert [path.name for path in find_images(tmp_path)] == names
    assert caplog.text == ""


@pytest.mark.parametrize("target", ["fifo", "/dev/zero", "link"])
def test_only_a_file_or_a_folder_is_read_and_others_are_refused_at_once(tmp_path, target):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("fifo")
    with pytest.raises(UserError, match="is a (pipe|device).*: give an image or a folder of images"):
        find_images(tmp_path / target)


@pytest.mark.parametrize("closed", [".", "images", "images/samples"])
def test_a_folder_of_another_user_is_named_with_its_permission(unprivileged, closed):
    save(unprivileged / "images" / "samples" / "a.png")
    (unprivileged / closed).chmod(0)
    with pytest.raises(UserError, match="Permission denied: give this user the permission"):
        find_images(unprivileged / "images")


def test_a_single_image_is_found(tmp_path):
    assert find_images(save(tmp_path / "a.png")) == [tmp_path / "a.png"]


def test_an_output_folder_gives_its_samples_and_not_the_grid(tmp_path):
    save(tmp_path / "grid.png")
    save(tmp_path / "samples" / "00000.png")
    (tmp_path / "samples" / "prompts.txt").write_text("a\n")
    assert find_images(tmp_path) == [tmp_path / "samples" / "00000.png"]


def test_a_folder_without_images_is_refused_and_one_below_with_images_is_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        find_images(tmp_path / "none")
    with pytest.raises(UserError, match="has no images"):
        find_images(tmp_path)
    save(tmp_path / "train" / "a.png")
    with pytest.raises(UserError, match="there are some in .*train"):
        find_images(tmp_path)


def values(batches):
    return [(indices.tolist(), images.mean(axis=(1, 2, 3)).tolist()) for indices, images in batches]


def plain(image):
    return np.asarray(image, np.float32).transpose(2, 0, 1)


def test_batches_come_in_order_the_last_may_be_short(tmp_path):
    paths = [save(tmp_path / f"{i}.png", i) for i in range(7)]
    assert values(ImageBatches(paths, plain, 3)) == [([0, 1, 2], [0, 1, 2]), ([3, 4, 5], [3, 4, 5]), ([6], [6])]


def test_broken_images_are_named_and_left_out(tmp_path):
    paths = [save(tmp_path / f"{i}.png", i) for i in range(6)]
    paths[0].write_bytes(b"")
    paths[3].write_bytes(paths[2].read_bytes()[:40])
    paths[5].unlink()
    batches = ImageBatches(paths, plain, 2)
    assert values(batches) == [([1, 2], [1, 2]), ([4], [4])]
    assert list(batches.faults) == [0, 3, 5]
    assert "empty" in batches.faults[0] and "does not exist" in batches.faults[5]


def test_special_files_and_too_large_images_are_left_out(tmp_path):
    paths = [save(tmp_path / f"{i}.png", i) for i in range(4)]
    paths[0].unlink()
    os.mkfifo(paths[0])
    paths[1].unlink()
    paths[1].symlink_to("/dev/zero")
    paths[2].write_bytes(b"P6 13300 13300 255\n")
    batches = ImageBatches(find_images(tmp_path), plain, 2)
    assert values(batches) == [([3], [3])]
    assert [fault[:13] for fault in batches.faults.values()] == ["is a pipe (FI", "is a device, ", "has 13,300 x "]


def test_two_processes_take_the_blocks_in_turn_without_broken_images(tmp_path):
    """The second process has two blocks, and both images of the second one are broken."""
    paths = [save(tmp_path / f"{i}.png", i) for i in range(9)]
    for i in (0, 6, 7):
        paths[i].write_bytes(b"")
    first, second = (ImageBatches(paths, plain, 2, process_index=i, process_count=2) for i in (0, 1))
    assert values(first) == [([1], [1]), ([4, 5], [4, 5]), ([8], [8])] and list(first.faults) == [0]
    batches = [indices.tolist() for indices, _ in second]
    assert batches == [[2, 3], []] and list(second.faults) == [6, 7]


def test_a_process_without_a_block_has_no_batches(tmp_path):
    batches = ImageBatches([save(tmp_path / "a.png")], plain, 2, process_index=1, process_count=2)
    assert list(batches) == [] and not batches.faults


def test_no_more_than_two_batches_are_opened_ahead(tmp_path):
    paths = [save(tmp_path / f"{i:03d}.png", i) for i in range(100)]
    opened = []

    def prepare(image):
        opened.append(1)
        return plain(image)

    for number, _ in enumerate(ImageBatches(paths, prepare, 5), 1):
        assert len(opened) <= (number + 2) * 5
