"""A folder of kohya's `N_class tokens` folders: N repeats of each image, and the caption of images without one."""

from __future__ import annotations

import dataclasses
import os
import re

from ldm.data.sources import caption_files
from ldm.data.sources.names import is_image
from ldm.data.sources.place import Place
from ldm.data.sources.rows import LEFT_FOLDERS, Collector, Listing, ReadOptions, Subset
from ldm.errors import UserError, plain
from ldm.settings.data import MAX_REPEATS

NAME = "kohya_folders"
ABOUT = "folders named `N_class tokens`, as kohya's sd-scripts read them"
_NUMBERED = re.compile("([0-9]+)_(.*)", re.DOTALL)


def detect(place: Place) -> bool:
    """Return whether a folder holds a folder whose name begins with a number and an underscore."""
    return any(_NUMBERED.match(name) for name in place.folders)


def read(place: Place, options: ReadOptions) -> Listing:
    """Return the images of all numbered folders; each is a subset. See `ldm.data.sources.read`.

    Folders without a number, with number 0, and those below the numbered ones are named and not used, as by kohya.

    Raises:
        UserError: Images with captions lie beside the numbered folders, a number is too large, or no image has a
            caption.
    """
    if caption_files.detect(place):
        raise UserError(
            f"{plain(place.path)} holds images with captions and folders named with a number: move the images into one "
            f"of these, such as 1_{plain(_first_tokens(place))}, or the folders to another place"
        )
    collector = Collector(NAME, place.path, options)
    subsets: list[Subset] = []
    repeats = {name: 0 if _is_left_out(place, name, options) else _repeats(place, name) for name in place.folders}
    collector.count_all(LEFT_FOLDERS, (name for name in place.folders if not repeats[name]))
    collector.count_all("images beside the numbered folders are not used", sorted(filter(is_image, place.files)))
    for name in filter(repeats.__getitem__, place.folders):
        match = _NUMBERED.fullmatch(name)
        tokens = (match.group(2).strip() if match else "") or options.class_tokens
        folder = f"{place.path}/{name}"
        collector.class_tokens = tokens
        caption_files.add_folder(
            collector, folder, len(subsets), dataclasses.replace(options, recursive=False)
        )  # fmt: skip
        subsets.append(Subset(NAME, folder, folder, "", repeats[name], options.is_reg, tokens))
    caption_files.check_captions(collector, place.path)
    return collector.listing(subsets)


def _is_left_out(place: Place, name: str, options: ReadOptions) -> bool:
    return bool(options.leave_out) and os.path.realpath(f"{place.path}/{name}") in options.leave_out


def is_read(name: str) -> bool:
    """Return whether a folder of this name is read."""
    match = _NUMBERED.fullmatch(name)
    return match is not None and bool(match.group(1).strip("0"))


def _repeats(place: Place, name: str) -> int:
    """Return the number that a folder's name begins with, 0 if there is none."""
    match = _NUMBERED.fullmatch(name)
    if not match:
        return 0
    digits = match.group(1).lstrip("0")
    if len(digits) > len(str(MAX_REPEATS)) or int(digits or 0) > MAX_REPEATS:
        raise UserError(f"{plain(place.path)}/{plain(name)}: the number is above {MAX_REPEATS:,}: name it 1_...")
    return int(digits or 0)


def _first_tokens(place: Place) -> str:
    return next(match.group(2) for name in place.folders if (match := _NUMBERED.match(name)))
