"""The images of a data set: their sizes, what is cropped away, which are enlarged, and which have the same content."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar, Union

import numpy as np
from tqdm import tqdm

from ldm.data.buckets import Size, crop_box
from ldm.data.checked_images import image_content
from ldm.data.decoding import BrokenImage, read_size
from ldm.data.sources.rows import FilePart, ImageFile
from ldm.data.training_data import TrainingData
from ldm.data.upright import ImageNotes, open_rgb
from ldm.errors import UserError
from ldm.files.inputs import open_file

AT_ONCE = 10_000  # images that wait for a thread, which takes memory
TAIL = 4096  # bytes at the end of a file, which tell most files of the same length apart

Place = tuple[int, Union[str, int], int]  # length; file and offset, or device and inode

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(
    items: Sequence[Item], function: Callable[[Item], Result], desc: str
) -> Iterator[tuple[Item, Result]]:  # fmt: skip
    """Yield each item with what `function` returns for it. A progress bar appears after a second."""
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        with tqdm(total=len(items), desc=desc, unit="image", delay=1, leave=False) as bar:
            for start in range(0, len(items), AT_ONCE):
                part = items[start : start + AT_ONCE]
                for item, result in zip(part, pool.map(function, part)):
                    yield item, result
                    bar.update()
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass
class Measured:
    """What the images of a training are, and what is made of them.

    Args:
        sizes: Width and height (N, 2) of each row's image, upright. 0 where it cannot be read.
        cropped: The share (N,) of each image that is cropped away. 0 where it cannot be read.
        enlarged: How many times (N,) each image is enlarged, at most 1 where it is not.
        broken: Row and fault of the images that cannot be read, which a training replaces by others.
        notes: What is to be said of images that are read all the same, if they were decoded.
    """

    sizes: np.ndarray
    cropped: np.ndarray
    enlarged: np.ndarray
    broken: list[tuple[int, str]]
    notes: list[str]


def measure(data: TrainingData) -> Measured:
    """Read the sizes of all images. Those that a training decodes before its first step are decoded, for the notes."""
    notes, decodes = ImageNotes(), data.contents is not None

    def size_of(image: ImageFile) -> tuple[Size, str]:
        try:
            return (open_rgb(image, data.alpha_color, notes).size if decodes else read_size(image)), ""
        except BrokenImage as error:
            return (0, 0), error.fault

    images = list(dict.fromkeys(row.image for row in data.rows))
    size_of_image: dict[ImageFile, Size] = {}
    faults: dict[ImageFile, str] = {}
    for image, (size, fault) in in_threads(images, size_of, "reading images" if decodes else "reading image sizes"):
        size_of_image[image] = size
        if fault:
            faults[image] = fault
    count = len(data)
    sizes, cropped, enlarged = np.zeros((count, 2), np.int64), np.zeros(count), np.ones(count)
    broken = []
    for number, row in enumerate(data.rows):
        size = size_of_image[row.image]
        if not all(size):
            broken.append((number, f"the image {faults[row.image]}"))
            continue
        target = data.buckets.size(number)
        left, top, right, bottom = crop_box(size, target, data.buckets.scale(number))
        sizes[number] = size
        cropped[number] = max(0.0, 1 - (right - left) * (bottom - top) / (size[0] * size[1]))
        enlarged[number] = target[0] / (right - left)
    return Measured(sizes, cropped, enlarged, broken, notes.lines())


def content_numbers(images: Iterable[ImageFile], known: Iterable[str] | None = None) -> np.ndarray:
    """Return a number (N,) for each image. Images have the same number if their files have the same bytes.

    Only files that may be equal are read: those of the same length, and then those with the same end.

    Args:
        images: The images.
        known: The hash of each one's content, if they are known.
    """
    if known is not None:
        return _numbered(known)
    places: dict[Place, ImageFile] = {}  # where the bytes are -> an image there
    place_of = []
    for image in tqdm(list(images), desc="looking for duplicates", unit="image", delay=1, leave=False):
        place = _place(image)
        places.setdefault(place, image)
        place_of.append(place)
    kinds: dict[Place, Hashable] = {place: place[0] for place in places}  # what may be equal
    for function in (_tail, image_content):
        of_kind: dict[Hashable, list[Place]] = defaultdict(list)
        for place, kind in kinds.items():
            of_kind[kind].append(place)
        same = [place for group in of_kind.values() if len(group) > 1 for place in group]
        read = partial(_read, function, places)
        kinds = {**{place: place for place in kinds}, **dict(in_threads(same, read, "looking for duplicates"))}
    return _numbered(kinds[place] for place in place_of)


def _read(function: Callable[[ImageFile], Hashable], places: dict[Place, ImageFile], place: Place) -> Hashable:
    """Return what `function` returns for the image at a place, or the place if it cannot be read."""
    try:
        return place[0], function(places[place])
    except (UserError, OSError):
        return place


def _place(image: ImageFile) -> Place:
    """Return the length of an image's file and where its bytes are: links lead to the same place."""
    if isinstance(image, FilePart):
        return image.size, image.file, image.offset
    try:
        status = os.stat(image)
    except (OSError, ValueError):
        return -1, image, 0
    return status.st_size, status.st_dev, status.st_ino


def _tail(image: ImageFile) -> bytes:
    """Return a hash of the end of an image's file."""
    path = image.file if isinstance(image, FilePart) else image
    with open_file(path) as file:
        end = image.offset + image.size if isinstance(image, FilePart) else file.seek(0, os.SEEK_END)
        start = max(image.offset if isinstance(image, FilePart) else 0, end - TAIL)
        file.seek(start)
        return hashlib.blake2b(file.read(end - start), digest_size=16).digest()


def _numbered(values: Iterable[Hashable]) -> np.ndarray:
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values], np.int64)
