"""Rows whose images cannot be used are left out and named, and some are held out for validation."""

import pytest
from PIL import Image

from ldm.errors import UserError
from tests.data.prepared_data import BUCKETS, names, prepared, training, write


def test_images_that_are_not_decoded_before_are_known_by_name_size_and_date(tmp_path):
    write(tmp_path, [(16, 16)] * 3)
    checked, unchecked = training(tmp_path), training(tmp_path, check_images=False)
    assert unchecked.contents is None and checked.contents is not None
    assert len({unchecked.content(row) for row in range(3)}) == 3
    before = unchecked.content(0)
    Image.new("RGB", (16, 16)).save(tmp_path / "00.png")
    assert unchecked.content(0) != before and unchecked.content(1) == training(tmp_path, check_images=False).content(1)


def test_small_images_are_left_out_and_broken_ones_named(tmp_path, caplog):
    write(tmp_path, [(16, 16)] * 11 + [(7, 30)])
    (tmp_path / "03.png").write_bytes(b"no image")
    data = training(tmp_path, image_filter_size=8)
    assert "03.png" not in names(data) and "11.png" not in names(data) and len(data) == 10
    assert "left out: 03.png (the image" in caplog.text


@pytest.mark.parametrize("check_images", [True, False])
def test_too_many_broken_images_are_refused(tmp_path, check_images):
    write(tmp_path, [(16, 16)] * 4)
    (tmp_path / "03.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="1 of 4 rows are unusable"):
        training(tmp_path, check_images=check_images, **BUCKETS)


def test_a_share_of_the_images_is_held_out_and_the_seed_says_which(tmp_path):
    write(tmp_path, [(16, 16)] * 20)
    kept, out = prepared(tmp_path, validation_split=0.25)
    assert (len(kept), len(out)) == (15, 5)
    assert sorted(names(kept) + names(out)) == [f"{number:02}.png" for number in range(20)]
    assert names(prepared(tmp_path, validation_split=0.25)[1]) == names(out)
    assert names(prepared(tmp_path, validation_split=0.25, validation_seed=7)[1]) != names(out)
    assert names(prepared(tmp_path, validation_split=0.25, seed=5)[1]) != names(out)


def test_one_image_is_left_to_train_on_unless_all_are_held_out(tmp_path):
    write(tmp_path, [(16, 16)] * 2)
    assert [len(data) for data in prepared(tmp_path, validation_split=0.99)] == [1, 1]
    with pytest.raises(UserError, match="no usable images to train on"):
        prepared(tmp_path, validation_split=1.0)


def test_rows_of_one_image_are_held_out_together(tmp_path):
    folder = write(tmp_path, [(16, 16)] * 4)
    lines = [f"{number % 4:02}.png,caption {number}" for number in range(12)]
    (folder / "img_txt.csv").write_text("\n".join(["dir,text", *lines]))
    kept, out = prepared(folder, validation_split=0.5)
    assert not set(names(kept)) & set(names(out)) and len(kept) == len(out) == 6


def test_validation_has_a_folder_of_its_own(tmp_path):
    write(tmp_path / "train", [(16, 16)] * 3)
    write(tmp_path / "other", [(16, 16)] * 2)
    kept, out = prepared(tmp_path / "train", validation_data_path=str(tmp_path / "other"))
    assert (len(kept), len(out)) == (3, 2) and "other" in out.source(0)


def test_broken_images_for_validation_are_left_out_and_named(tmp_path, caplog):
    write(tmp_path / "train", [(16, 16)] * 3)
    write(tmp_path / "other", [(16, 16)] * 12)
    (tmp_path / "other" / "03.png").write_bytes(b"no image")
    _, out = prepared(tmp_path / "train", validation_data_path=str(tmp_path / "other"))
    assert len(out) == 11 and out.contents is not None and "left out: 03.png (the image" in caplog.text
    for number in range(4, 9):
        (tmp_path / "other" / f"{number:02}.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=f"{tmp_path / 'other'}: 6 of 12 rows are unusable"):
        prepared(tmp_path / "train", validation_data_path=str(tmp_path / "other"))


def test_images_that_are_trained_and_validated_are_counted(tmp_path, caplog):
    write(tmp_path, [(16, 16)] * 3)
    prepared(tmp_path, validation_data_path=str(tmp_path))
    assert "3 of 3 images for validation are trained as well" in caplog.text


def test_a_split_that_holds_no_image_out_is_said(tmp_path, caplog):
    assert prepared(write(tmp_path, [(16, 16)] * 3), validation_split=0.1)[1] is None
    assert "validation_split 0.1 of 3 images is none" in caplog.text


def test_without_a_split_nothing_is_held_out(tmp_path):
    assert prepared(write(tmp_path, [(16, 16)] * 3))[1] is None


def test_class_images_are_neither_held_out_nor_trained_with_weight_zero(tmp_path):
    write(tmp_path / "a", [(16, 16)] * 4), write(tmp_path / "b", [(16, 16)] * 9)
    (tmp_path / "config.toml").write_text(
        "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\n[[datasets.subsets]]\nimage_dir = 'b'\nis_reg = true\n"
    )
    kept, out = prepared(tmp_path / "config.toml", validation_split=0.5, prior_loss_weight=0.5)
    assert len(out) == 2 and all("/a/" in out.source(row) for row in range(2))
    assert kept.weights.tolist() == [1, 1, 0.5, 0.5]  # as many class images as instance images
    alone = training(tmp_path / "config.toml", prior_loss_weight=0)
    assert len(alone) == 4 and alone.weights is None
