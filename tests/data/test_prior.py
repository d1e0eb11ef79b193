"""DreamBooth's epochs: how often each row is trained, its weight, and what the log says of it."""

from __future__ import annotations

import logging
from contextlib import nullcontext

import numpy as np
import pytest
from PIL import Image

from ldm.data.prior import check_class_folder, list_class_images, plan_prior, with_class_images, with_instance_prompt
from ldm.data.sources import read
from ldm.data.sources.rows import Listing, Row, Subset
from ldm.errors import UserError
from tests.growth import assert_linear


def listing(*subsets: tuple[int, Subset]) -> Listing:
    """A listing of subsets with these numbers of images, whose captions are empty."""
    rows = [
        Row(f"{subset.folder}/{image:03d}.png", "", number, 0)
        for number, (images, subset) in enumerate(subsets)
        for image in range(images)
    ]
    return Listing("test", rows, tuple(subset for _, subset in subsets), [], {})


def instance(repeats: int = 1, **rules) -> Subset:
    return Subset("test", "instance", "instance", num_repeats=repeats, **rules)


def of_class(repeats: int = 1, **rules) -> Subset:
    return Subset("test", "class", "class", num_repeats=repeats, is_reg=True, **rules)


def taken_in_turn(repeats: list[int], samples: int) -> list[int]:
    """The repeats of class images, counted sample by sample as sd-scripts counts them."""
    taken, count, first_round = [0] * len(repeats), 0, True
    while count < samples:
        for row, of_subset in enumerate(repeats):
            more = of_subset if first_round else 1
            taken[row] += more
            count += more
            if count >= samples:
                break
        first_round = False
    return taken


def test_without_class_images_rows_have_the_repeats_of_their_subsets():
    plan = plan_prior(listing((2, instance(3)), (1, instance(5))))
    assert plan.repeats.tolist() == [3, 3, 5]
    assert plan.weights.tolist() == [1, 1, 1] and not plan.is_weighted
    assert plan.lines == ()


@pytest.mark.parametrize("samples", [1, 2, 5, 6, 7, 11, 12, 13, 14, 29, 120])
@pytest.mark.parametrize("repeats", [[1] * 6, [2, 2, 3, 3, 1], [1], [7]])
def test_class_images_are_taken_in_turn_until_there_are_as_many_samples(samples, repeats):
    classes = [(1, of_class(number)) for number in repeats]
    plan = plan_prior(listing((1, instance(samples)), *classes))
    assert plan.repeats.tolist() == [samples, *taken_in_turn(repeats, samples)]


def test_class_images_weigh_prior_loss_weight_wherever_they_stand():
    plan = plan_prior(listing((2, of_class()), (3, instance())), prior_loss_weight=0.25)
    assert plan.weights.dtype == np.float32
    assert plan.weights.tolist() == [0.25, 0.25, 1, 1, 1] and plan.is_weighted
    assert plan.repeats.tolist() == [2, 1, 1, 1, 1]


def test_a_weight_of_rows_that_are_not_trained_does_not_count():
    assert not plan_prior(listing((3, instance()), (2, of_class())), prior_loss_weight=0).is_weighted


def test_weight_0_leaves_the_class_images_out():
    plan = plan_prior(listing((3, instance(2)), (4, of_class())), prior_loss_weight=0)
    assert plan.repeats.tolist() == [2, 2, 2, 0, 0, 0, 0]
    assert plan.lines == ("prior_loss_weight 0: the 4 class images are left out",)


def test_the_surplus_is_said_and_what_would_use_it():
    used, surplus = plan_prior(listing((5, instance(8)), (200, of_class()))).lines
    assert "40 samples of 5 instance images" in used and "40 of 40 class images" in used
    assert "160 of 200 class images are not used" in surplus and "from 040.png on" in surplus
    assert "5 times as many repeats" in surplus
    plan = plan_prior(listing((5, instance(8 * 5)), (200, of_class())))
    assert (plan.repeats[5:] == 1).all() and len(plan.lines) == 1


def test_repeated_class_images_are_said():
    (line,) = plan_prior(listing((5, instance(8)), (12, of_class()))).lines
    assert "40 of 12 class images, each 3 to 4 times, with weight 1 in the loss" in line


def test_each_data_set_of_a_config_is_balanced_by_itself():
    plan = plan_prior(listing((2, instance()), (9, of_class()), (3, instance(2, dataset=1)), (4, of_class(dataset=1))))
    assert plan.repeats[2:11].tolist() == [1, 1] + [0] * 7
    assert plan.repeats[14:].tolist() == [2, 2, 1, 1]
    assert plan.lines[0].startswith("data set 1: ") and plan.lines[-1].startswith("data set 2: ")


def test_class_images_of_a_data_set_without_an_instance_are_not_used():
    plan = plan_prior(listing((2, instance()), (3, of_class(dataset=1))))
    assert plan.repeats.tolist() == [1, 1, 0, 0, 0]
    assert "3 of 3 class images are not used" in plan.lines[-1]


def test_class_images_alone_are_refused():
    with pytest.raises(UserError, match="all 4 images are class images.*give the images of the instance"):
        plan_prior(listing((4, of_class())))


def test_the_work_grows_with_the_rows_alone():
    def rows(count):
        return listing((10, instance(count // 10)), (count, of_class()))

    plan = plan_prior(rows(100_000))
    assert plan.repeats.sum() == 200_000 and len(plan.lines) == 1
    assert_linear(plan_prior, rows, 100_000)


def test_the_work_grows_with_the_number_of_data_sets_alone():
    def rows(count):
        return listing(*((120, make(dataset=number)) for number in range(count) for make in (instance, of_class)))

    assert len(plan_prior(rows(2000)).lines) == 2000
    assert_linear(plan_prior, rows, 2000)


def test_the_instance_prompt_replaces_every_caption_but_those_of_class_images(caplog):
    rows = [
        Row("instance/0.png", "a dog on grass", 0, 0),
        Row("instance/1.png", "", 0, 0),
        Row("class/0.png", "a dog", 1, 0),
    ]
    before = Listing("test", rows, (instance(), of_class()), [], {})
    caplog.set_level(logging.INFO, "ldm")
    after = with_instance_prompt(before, "a photo of sks dog")
    assert [row.caption for row in after.rows] == ["a photo of sks dog", "a photo of sks dog", "a dog"]
    assert [row.image for row in after.rows] == [row.image for row in rows]
    (record,) = caplog.records
    assert record.levelname == "WARNING"  # somebody wrote that caption
    assert "all 2 images" in record.getMessage() and "1 have another caption" in record.getMessage()


def test_class_images_come_behind_the_data_set_with_their_prompt():
    images = list_class_images("class", ["class/b.png", "class/a.png"], "a dog")
    both = with_class_images(listing((2, instance(3))), images)
    assert [row.image for row in both.rows[2:]] == ["class/a.png", "class/b.png"]
    assert [row.caption for row in both.rows[2:]] == ["a dog", "a dog"]
    assert [both.subsets[row.subset].is_reg for row in both.rows] == [False, False, True, True]
    assert both.name(both.rows[2]) == "a.png"
    assert plan_prior(both).repeats.tolist() == [3, 3, 3, 3]


def test_class_images_within_the_data_set_are_refused(tmp_path):
    inside = tmp_path / "data" / "class"
    inside.mkdir(parents=True)
    (tmp_path / "link").symlink_to(inside)
    rows = Listing("test", [Row(f"{inside}/0.png", "", 0, 0)], (instance(),), [], {})
    with pytest.raises(UserError, match="0.png: give a class_data_dir outside of data_path"):
        check_class_folder(rows, tmp_path / "link")


def data_set(tmp_path, *folders: str) -> Listing:
    """A data set of an image with a caption in each of these folders of data, "" for data itself."""
    for folder in folders:
        (tmp_path / "data" / folder).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / folder / "a.png")
        (tmp_path / "data" / folder / "a.txt").write_text("a dog")
    return read(tmp_path / "data")


@pytest.mark.parametrize(
    ("folders", "place", "is_refused"),
    [
        ([""], "data/class", True),
        ([""], "data/run/class_images", True),
        ([""], "link/class", True),
        ([""], "class", False),
        ([""], "data-class", False),
        ([""], "data/.class", False),  # hidden folders are not listed
        (["1_dog"], "data/5_class", True),
        (["1_dog"], "data/class", False),
        (["1_dog"], "data/0_class", False),
        (["1_dog"], "data/1_dog/class", False),
    ],
)
def test_a_folder_that_the_next_start_would_list_is_refused_before_there_are_images(
    tmp_path, folders, place, is_refused
):
    rows = data_set(tmp_path, *folders)
    (tmp_path / "link").symlink_to(tmp_path / "data")
    with pytest.raises(UserError) if is_refused else nullcontext() as caught:
        check_class_folder(rows, tmp_path / place)
    if is_refused:
        message = str(caught.value)
        assert f"{tmp_path}/{place} is within {tmp_path}/data, " in message and "outside of data_path" in message
    # What a start lists once class images are there.
    (tmp_path / place).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / place / "class-000000.png")
    assert (len(read(tmp_path / "data").rows) > len(rows.rows)) == is_refused


def test_an_image_dir_of_a_config_is_no_folder_of_class_images_but_one_below_is(tmp_path):
    data_set(tmp_path, "")
    (tmp_path / "config.toml").write_text(
        f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{tmp_path}/data'\nclass_tokens = 'dog'\n"
    )
    rows = read(tmp_path / "config.toml")
    check_class_folder(rows, tmp_path / "data" / "class")
    with pytest.raises(UserError, match="outside of data_path"):
        check_class_folder(rows, tmp_path / "data")


def test_class_images_for_several_data_sets_of_a_config_are_refused(tmp_path):
    two = listing((12, instance()), (60, instance(dataset=1)))
    with pytest.raises(UserError, match=r"several \[\[datasets\]\].*is_reg = true"):
        check_class_folder(two, tmp_path)
    check_class_folder(listing((12, instance()), (60, instance())), tmp_path)


def test_a_folder_without_class_images_is_refused(tmp_path):
    with pytest.raises(UserError, match=f"class_data_dir {tmp_path} has 0 images"):
        list_class_images(tmp_path, [], "a dog")
