"""Layouts of data sets. One module reads each; all give the same rows for the same images and captions.

A layout's module has `NAME`, `ABOUT`, `detect(place)`, which tells whether a path has the layout, and
`read(place, options)`, which returns its rows as a `Listing`.
"""

from __future__ import annotations

import os
from collections import Counter
from types import ModuleType
from typing import NamedTuple

from ldm.data.sources import (
    caption_files,
    dataset_config,
    image_text_csv,
    imagefolder,
    kohya_folders,
    kohya_json,
    saved_dataset,
    tar_shards,
)
from ldm.data.sources.names import is_image, walk
from ldm.data.sources.place import Place, look
from ldm.data.sources.rows import Listing, ReadOptions, logger
from ldm.errors import UserError, plain

# In the order of detection. A file that was written to describe the data set comes before what the folder's content
# suggests. The first layout that a path has is read; the log names others that it has too.
DETECTED = (
    dataset_config, image_text_csv, saved_dataset, imagefolder, kohya_json, tar_shards, kohya_folders, caption_files,
)  # fmt: skip
MAX_SUBSETS = 100  # that the log names
LAYOUTS: dict[str, ModuleType] = {module.NAME: module for module in DETECTED}


class Detected(NamedTuple):
    """The layout of a path, and the others that it has as well, which are not read."""

    layout: str
    ignored: tuple[str, ...]


def detect(path: str | os.PathLike) -> Detected:
    """Return the layout of a data set.

    Raises:
        UserError: There is nothing at the path, or no known layout. The error names them.
    """
    return _detect(look(path))


def read(path: str | os.PathLike, options: ReadOptions = ReadOptions()) -> Listing:  # noqa: B008 (it is frozen)
    """Return the rows of a data set in any layout, which the log names. No image is opened.

    Unusable rows are left out, and named by the log. Missing captions and the like are counted.

    Raises:
        UserError: The path has no known layout, or is a folder that `options` leaves out, its files are malformed, a
            name leads out of the folder, no image has a caption, or more than `options.max_bad_fraction` of the rows
            are unusable.
    """
    place = look(path)
    options.check_folder(place.path, "data_path")
    found = _detect(place)
    about = LAYOUTS[found.layout].ABOUT
    if found.ignored:
        others = "; ".join(LAYOUTS[name].ABOUT for name in found.ignored)
        logger.warning("%s is read as %s. It also holds, and these are ignored: %s", plain(place.path), about, others)
    listing: Listing = LAYOUTS[found.layout].read(place, options)
    logger.info("%s: %s images; %s", plain(place.path), f"{len(listing.rows):,}", about)
    if len(listing.subsets) > 1:
        images = Counter(row.subset for row in listing.rows)
        for number, subset in enumerate(listing.subsets[:MAX_SUBSETS]):
            logger.info(
                "%s: %s images, repeated %s times%s", plain(subset.folder), f"{images[number]:,}",
                f"{subset.num_repeats:,}", ", class images" if subset.is_reg else "",
            )  # fmt: skip
    return listing


def _detect(place: Place) -> Detected:
    names = [module.NAME for module in DETECTED if module.detect(place)]
    if names:
        return Detected(names[0], tuple(names[1:]))
    if place.is_file:
        raise UserError(
            f"data_path {plain(place.path)} is no data set: give a folder, or a .toml, .json, .jsonl, .parquet or .tar "
            "file"
        )
    _explain_unsupported(place)
    if any(is_image(name) for names in walk(place.path) for name in names.files):
        return Detected(caption_files.NAME, ())
    below = [name for name in place.folders if "img_txt.csv" in look(f"{place.path}/{name}").files]
    hint = f"; {plain(below[0])} below it has img_txt.csv: give that folder" if below else ""
    raise UserError(
        f"data_path {plain(place.path)} is no data set: it has no images and none of "
        f"{', '.join(module.ABOUT.split(':')[0] for module in DETECTED[1:7])}{hint}"
    )


def _explain_unsupported(place: Place) -> None:
    """Raise UserError for archives and Parquet files that hold the images themselves, if a folder has nothing else."""
    if any(is_image(name) for name in place.files):
        return
    packed = sorted(name for name in place.files if name.lower().endswith((".zip", ".tar.gz", ".tgz", ".7z", ".rar")))
    if packed:
        raise UserError(
            f"data_path {plain(place.path)} holds archives ({plain(packed[0])}): unpack them, or write .tar"
        )
    folders = [place, *(look(f"{place.path}/{name}") for name in place.folders if name == "data")]
    if any(name.endswith(".parquet") for folder in folders for name in folder.files):
        raise UserError(
            f"data_path {plain(place.path)} holds Parquet files that are not metadata.parquet: load them with Hugging "
            "Face's datasets, and give the folder that save_to_disk writes"
        )
