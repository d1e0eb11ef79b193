"""DreamBooth: which rows an epoch has, how often, and with which weight, if some of them are class images.

Class images keep a class as it was while an instance of it is trained (prior preservation, Ruiz et al. 2208.12242).
They are the rows of subsets with `is_reg`. As in kohya's sd-scripts, an epoch has as many samples of them as of the
instance images, and `prior_loss_weight` multiplies their loss.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from typing import NamedTuple, Optional, Union

import numpy as np

from ldm.data.sources import caption_files, kohya_folders
from ldm.data.sources.names import is_hidden
from ldm.data.sources.row_file import RowFile
from ldm.data.sources.rows import MAX_ROWS, Listing, Row, Subset, image_name, merged
from ldm.errors import UserError, plain

logger = logging.getLogger(__name__)

LAYOUT = "class_images"  # of the subset that list_class_images returns


class PriorPlan(NamedTuple):
    """How often an epoch has each row of a listing, and how much its loss counts."""

    repeats: np.ndarray  # (rows,) int64; rows with 0 are not trained
    weights: np.ndarray  # (rows,) float32: prior_loss_weight for class images, 1 for the others
    lines: tuple[str, ...]  # what the log says

    @property
    def is_weighted(self) -> bool:
        """Whether a row that is trained has another weight than 1."""
        return bool((self.weights[self.repeats > 0] != 1).any())


def plan_prior(listing: Listing, prior_loss_weight: float = 1.0) -> PriorPlan:
    """Return the repeats and the weights of the rows of a listing, which depend on nothing else.

    Instance images have the repeats of their subset. Class images are taken in their order, each with the repeats of
    its subset, until there are as many samples as of the instance images; the last one keeps its repeats. The others
    are not used. If there are too few, they are gone through again, once more each time. Every data set of a
    dataset_config is counted by itself. This is sd-scripts' rule.

    With weight 0 class images are left out, so that training is the same as without them.

    Raises:
        UserError: There are class images only.
    """
    subsets = np.zeros(len(listing.rows), np.int32)
    if len(listing.subsets) > 1:
        subsets = np.fromiter((row.subset for row in listing.rows), np.int32, len(listing.rows))
    repeats = np.array([subset.num_repeats for subset in listing.subsets], np.int64)[subsets]
    is_reg = np.array([subset.is_reg for subset in listing.subsets], bool)[subsets]
    weights = np.where(is_reg, np.float32(prior_loss_weight), np.float32(1.0))
    if not is_reg.any():
        return PriorPlan(repeats, weights, ())
    if is_reg.all():
        raise UserError(
            f"all {len(listing.rows):,} images are class images (is_reg, class_data_dir): give the images of the "
            "instance as well"
        )
    if not prior_loss_weight:
        left_out = f"prior_loss_weight 0: the {int(is_reg.sum()):,} class images are left out"
        return PriorPlan(np.where(is_reg, 0, repeats), weights, (left_out,))

    datasets = np.array([subset.dataset for subset in listing.subsets], np.int64)[subsets]
    lines: list[str] = []
    order = np.argsort(datasets, kind="stable")  # the rows of each data set side by side
    numbers, begins = np.unique(datasets[order], return_index=True)
    several = len(numbers) > 1
    for dataset, of_dataset in zip(numbers, np.split(order, begins[1:])):
        instance, rows = of_dataset[~is_reg[of_dataset]], of_dataset[is_reg[of_dataset]]
        if not len(rows):
            continue
        samples = int(repeats[instance].sum())
        available = int(repeats[rows].sum())
        repeats[rows] = _in_turn(repeats[rows], samples)
        used = repeats[rows][repeats[rows] > 0]
        name = f"data set {dataset + 1}: " if several else ""
        times = f", each {_times(used)}, with weight {prior_loss_weight:g} in the loss" if len(used) else ""
        lines.append(
            f"{name}an epoch has {samples:,} samples of {len(instance):,} instance images and {int(used.sum()):,} of "
            f"{len(used):,} class images{times}"
        )
        if len(used) < len(rows):
            first = listing.name(listing.rows[int(rows[len(used)])])
            way = f"; {-(-available // samples)} times as many repeats of them use all" if samples else ""
            lines.append(
                f"{name}{len(rows) - len(used):,} of {len(rows):,} class images are not used in any epoch, from "
                f"{plain(first, 80)} on, as it has only {samples:,} samples of instance images{way}"
            )
    return PriorPlan(repeats, weights, tuple(lines))


def _in_turn(repeats: np.ndarray, samples: int) -> np.ndarray:
    """Return the repeats (rows,) of class images, of which there are to be `samples` samples.

    Args:
        repeats: Those of their subsets, (rows,), at least 1.
    """
    before = np.cumsum(repeats) - repeats
    missing = samples - int(repeats.sum())
    if missing <= 0:
        return np.where(before < samples, repeats, 0)
    rounds, rest = divmod(missing, len(repeats))
    return repeats + rounds + (np.arange(len(repeats)) < rest)


def _times(repeats: np.ndarray) -> str:
    low, high = int(repeats.min()), int(repeats.max())
    if low == high:
        return "once" if low == 1 else f"{low:,} times"
    return f"{low:,} to {high:,} times"


def with_instance_prompt(listing: Listing, prompt: str) -> Listing:
    """Return a listing in which `prompt` is the caption of every image that is no class image, and log it.

    As in the DreamBooth scripts of diffusers and mindone, captions that the data set has are not used.
    """
    replaced, others = 0, 0
    rows: Union[list[Row], RowFile] = RowFile() if isinstance(listing.rows, RowFile) else []
    for row in listing.rows:
        if not listing.subsets[row.subset].is_reg:
            replaced += 1
            others += row.caption not in ("", prompt)
            row = Row(row.image, prompt, row.subset, row.where)
        rows.append(row)
    ignored = f"; {others:,} have another caption of their own, which is not used" if others else ""
    level = logging.WARNING if others else logging.INFO
    logger.log(level, 'instance_prompt "%s" is the caption of all %s images%s', prompt, f"{replaced:,}", ignored)
    return listing._replace(rows=rows)


def list_class_images(folder: str | os.PathLike, paths: Iterable[str | os.PathLike], prompt: str) -> Listing:
    """Return class images as a listing of one subset with `is_reg`, sorted by name, for `with_class_images`.

    Args:
        folder: class_data_dir, which names are relative to.
        paths: The images in it or below it.
        prompt: The caption of each.

    Raises:
        UserError: There are none, or more than a data set may have.
    """
    name = os.fspath(folder)
    rows = [Row(path, prompt, 0, 0) for path in sorted(os.fspath(path) for path in paths)]
    if not 0 < len(rows) <= MAX_ROWS:
        raise UserError(
            f"class_data_dir {plain(name)} has {len(rows):,} images: give a folder with 1 to {MAX_ROWS:,} images"
        )
    return Listing(LAYOUT, rows, (Subset(LAYOUT, name, name, is_reg=True, class_tokens=prompt),), [], {})


def check_class_folder(listing: Listing, folder: str | os.PathLike) -> None:
    """Check that class images in `folder` can be added to a data set, before they are drawn.

    Raises:
        UserError: The data set holds images of the folder, or would hold them at the next start, or it is a
            dataset_config of several [[datasets]].
    """
    name, place = plain(os.fspath(folder)), os.path.realpath(folder)
    if len({subset.dataset for subset in listing.subsets}) > 1:
        raise UserError(
            "with_prior_preservation is for one data set, and this dataset_config has several [[datasets]]: leave it "
            "out, and give each of them a subset with is_reg = true and the image_dir of its class images"
        )
    way = "give a class_data_dir outside of data_path"
    if (image := _image_within(listing, place)) is not None:
        raise UserError(
            f"the class images in {name} are images of data_path too, such as {plain(image_name(image, name))}: {way}"
        )
    if (data := _folder_that_lists(listing, place)) is not None:
        raise UserError(
            f"the folder of class images {name} is within {plain(data)}, whose folders are read as data_path: the next "
            f"start would train on the class images as on those of the instance; {way}"
        )


def _image_within(listing: Listing, place: str) -> Optional[str]:
    """Return an image of a data set that is in a folder or below it, None if there is none. `place` is a real path."""
    inside = f"{place}/"
    places: dict[str, bool] = {}  # folder of images -> whether it is within `place`
    for row in () if isinstance(listing.rows, RowFile) else listing.rows:  # a RowFile has no image files
        if not isinstance(row.image, str):
            continue
        of_row = row.image.rpartition("/")[0]
        if of_row not in places:
            places[of_row] = f"{os.path.realpath(of_row)}/".startswith(inside)
        if places[of_row]:
            return row.image
    return None


def _folder_that_lists(listing: Listing, place: str) -> Optional[str]:
    """Return the folder of a data set whose images are listed, those in `place` included, None if there is none."""
    for subset in listing.subsets:
        if subset.layout not in (caption_files.NAME, kohya_folders.NAME):
            continue
        # kohya's folders are listed side by side, new ones included.
        root = os.path.dirname(subset.folder) if subset.layout == kohya_folders.NAME else subset.folder
        below = os.path.relpath(place, os.path.realpath(root)).split(os.sep)
        if subset.layout == kohya_folders.NAME:
            is_listed = len(below) == 1 and kohya_folders.is_read(below[0])
        elif listing.layout == caption_files.NAME:
            is_listed = below == [os.curdir] or not any(map(is_hidden, below))  # as is "..", which leads out
        else:  # a subset of a dataset_config, without the folders below
            is_listed = below == [os.curdir]
        if is_listed:
            return root
    return None


def with_class_images(listing: Listing, class_images: Listing) -> Listing:
    """Return the rows of a data set and, behind them, those of `list_class_images`. See `check_class_folder`."""
    return merged(listing.layout, (listing, class_images))
