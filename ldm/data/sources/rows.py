"""What every layout of a data set gives: rows of an image and its caption, and the subsets that they belong to.

Listing a data set decodes no image and asks the system for nothing but the names in each folder, so that a million
rows take seconds. Whether the images decode is checked later (`ldm.data.checked_images`).
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Optional, Union

from ldm.errors import UserError, plain, system_reason
from ldm.files.inputs import open_file, read_bytes
from ldm.runtime.logs import warn_each

if TYPE_CHECKING:
    from ldm.data.sources.row_file import RowFile

logger = logging.getLogger(__name__)

MAX_ROWS = 10_000_000
MAX_IMAGE_BYTES = 720_000_000  # size of an image file: 120 million pixels in RGB with 16 bits, uncompressed
LONGEST_CAPTION = 131_072  # characters; the csv module's default limit of a field
NAMED = 3  # examples in a warning that counts

# What the warnings of a listing count; the keys of Listing.counts.
NO_CAPTION = "images have no caption and train with an empty one"
EMPTY_CAPTION = "captions are empty and train as such"
CLASS_TOKENS = "images have no caption of their own and train with the class tokens"
SIMILAR_NAME = "image names differ from the files' in case, Unicode form, slashes or encoding"
SAME_STEM = "images share their caption file with an image of the same name and another suffix"
TWO_CAPTIONS = "images have two caption files, of which .txt is used"
NO_IMAGE = "caption files have no image"
NOT_LISTED = "images are not named by the metadata and are not used"
OTHER_FILES = "files are neither images nor captions"
LEFT_FOLDERS = "folders are not used"
OTHER_SPLIT = "images belong to another split and are not used"
_USUAL = frozenset({CLASS_TOKENS, OTHER_FILES, NOT_LISTED})  # logged at INFO, the others as warnings

_INVALID = re.compile("[\0\ud800-\udfff]")


class FilePart(NamedTuple):
    """An image inside of a larger file: a member of a tar shard, or a value in an Arrow file."""

    file: str
    offset: int  # bytes from the beginning of the file
    size: int  # bytes
    name: str  # the image's own, relative, with "/"


# The path of an image file, or a part of a file.
ImageFile = Union[str, FilePart]


class Row(NamedTuple):
    """An image and its caption. A million of them have to fit into memory."""

    image: ImageFile
    caption: str  # as the layout gives it, with all its lines
    subset: int  # index in Listing.subsets
    where: int  # line, row, entry or byte of the subset's file (see Subset.unit); 0 where the image has a file itself


@dataclass(frozen=True)
class Subset:
    """What rows have in common.

    Args:
        layout: Name of the layout, a key of `ldm.data.sources.LAYOUTS`.
        folder: Folder that image names are relative to.
        source: File or folder that gives the rows, for messages.
        unit: What `Row.where` counts in `source`: "line", "row", "entry" or "byte"; "" for folders.
        num_repeats: How often an epoch has each row.
        is_reg: Whether these are class images, for prior preservation.
        class_tokens: Caption of images without one; None if there is no such caption.
        settings: What the data set itself sets, under kohya's names (see `ldm.data.sources.dataset_config`). Settings
            that are not in it are those of the training.
        dataset: Index of the [[datasets]] in a dataset_config.
    """

    layout: str
    folder: str
    source: str
    unit: str = ""
    num_repeats: int = 1
    is_reg: bool = False
    class_tokens: Optional[str] = None
    settings: Mapping[str, object] = field(default_factory=dict)
    dataset: int = 0


@dataclass(frozen=True)
class ReadOptions:
    """How to read a data set. None stands for what the layout has by default.

    Args:
        image_column, caption_column: Columns of CSV, JSONL, Parquet and Arrow, and the caption's key in the .json of a
            tar shard. By default dir and text in img_txt.csv, file_name and text in an imagefolder's metadata, and
            image and text in a saved data set.
        caption_extension: Suffix of caption files; by default .txt, then .caption.
        image_dir: Folder that the names in a metadata file are relative to; by default that of the file.
        class_tokens: Caption of images without one.
        is_reg: Whether these are class images.
        num_repeats: How often an epoch has each row, where the layout does not say it.
        max_bad_fraction: The data set is refused if more than this fraction of its rows is unusable.
        recursive: Whether a folder of images includes the folders below.
        caption_separator: What stands between the caption and the tags of kohya's JSON, before a space.
        rows_on_disk: Whether the rows of tar shards are a RowFile, in the order of the shards. Others are in memory.
        leave_out: Real paths of folders with masks or class images, which a folder of images may hold and whose images
            are no rows.
    """

    image_column: Optional[str] = None
    caption_column: Optional[str] = None
    caption_extension: Optional[str] = None
    image_dir: Optional[str] = None
    class_tokens: Optional[str] = None
    is_reg: bool = False
    num_repeats: int = 1
    max_bad_fraction: float = 0.10
    recursive: bool = True
    caption_separator: str = ","
    rows_on_disk: bool = False
    leave_out: tuple[str, ...] = ()

    def check_folder(self, folder: str, name: str) -> None:
        """Raise UserError, which begins with `name`, if the folder itself is one that is left out."""
        if os.path.realpath(folder) in self.leave_out:
            raise UserError(
                f"{name} {plain(folder)} is the folder of the masks (conditioning_data_dir) or of the class images "
                "(class_data_dir) as well: give these a folder of their own"
            )

    def subset(self, layout: str, folder: str, source: str, unit: str) -> Subset:
        """Return the subset of a layout that says nothing of repeats, class images and class tokens."""
        return Subset(layout, folder, source, unit, self.num_repeats, self.is_reg, self.class_tokens)


class Listing(NamedTuple):
    """The rows of a data set.

    img_txt.csv keeps the order of its lines. The rows of a subset in any other layout are sorted by the image's name,
    so that the same images and captions give the same list in every layout. Rows on disk keep the order of the shards.
    """

    layout: str
    rows: Sequence[Row]  # a list, or a RowFile
    subsets: tuple[Subset, ...]
    left_out: list[tuple[str, str]]  # the unusable rows: name, place and reason
    counts: dict[str, int]  # what the warnings count

    def where(self, row: Row) -> str:
        """Return where a row comes from, for messages: "data/metadata.jsonl, line 5"."""
        subset = self.subsets[row.subset]
        if not subset.unit:
            return plain(image_name(row.image, subset.folder))
        source = row.image.file if isinstance(row.image, FilePart) else subset.source
        return f"{plain(source)}, {subset.unit} {row.where:,}"

    def name(self, row: Row) -> str:
        """Return the image's name relative to the folder of its subset."""
        return image_name(row.image, self.subsets[row.subset].folder)


def image_name(image: ImageFile, folder: str) -> str:
    """Return the name of an image relative to `folder`."""
    if isinstance(image, FilePart):
        return image.name
    return image[len(folder) + 1 :] if image.startswith(f"{folder}/") else image


def readable_name(image: ImageFile | os.PathLike[str]) -> str:
    """Return what messages call an image: its path, or "cat.png in data/shard-00.tar"."""
    if isinstance(image, FilePart):
        return f"{plain(image.name)} in {plain(image.file)}"
    return plain(os.fspath(image))


def read_image(image: ImageFile, most: int = MAX_IMAGE_BYTES) -> bytes:
    """Return the bytes of an image file.

    Raises:
        UserError: It cannot be read, has more than `most` bytes, or its file is shorter than when it was listed. The
            message begins with "the image" and the `readable_name`.
    """
    if isinstance(image, str):
        return read_bytes(image, "the image", "check data_path", most)
    subject = f"the image {readable_name(image)}"
    if image.size > most:
        raise UserError(f"{subject} has {image.size:,} bytes, at most {most:,} are read: scale it down")
    try:
        with open_file(image.file, way="check data_path") as file:
            file.seek(image.offset)
            content = file.read(image.size)
    except OSError as error:
        raise UserError(f"{subject} cannot be read: {system_reason(error)}") from None
    except UserError as error:
        raise UserError(f"{subject} cannot be read: {error}") from None
    if len(content) < image.size:
        raise UserError(f"{subject} is cut off: the file has changed since it was listed; start again")
    return content


def caption_fault(caption: object) -> str:
    """Return why a value of a metadata file is no caption, or "" if it is one."""
    if not isinstance(caption, str):
        return f"its caption is a {type(caption).__name__}, not a text"
    if len(caption) > LONGEST_CAPTION:
        return f"its caption has {len(caption):,} characters, at most {LONGEST_CAPTION:,} are read"
    if not caption.isascii() and _INVALID.search(caption) or "\0" in caption:
        return "its caption holds a character that no text has (a zero byte, or half of a surrogate pair)"
    return ""


class Collector:
    """Collects the rows of a data set and what its warnings count.

    Args:
        layout: Name of the layout.
        subject: The data set's file or folder, which begins the messages.
        options: How to read.
        rows: Where rows are collected. None: in memory.

    Attributes:
        class_tokens: Caption of images without one; a layout may change it from folder to folder.
    """

    def __init__(self, layout: str, subject: str, options: ReadOptions, rows: Optional[RowFile] = None):
        self._layout, self._subject, self._options = layout, plain(subject), options
        self.class_tokens = options.class_tokens
        self.rows: Union[list[Row], RowFile] = [] if rows is None else rows
        self.left_out: list[tuple[str, str]] = []
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, list[str]] = {}

    def add(self, row: Row) -> None:
        """Add a row. Raises UserError for more than MAX_ROWS."""
        if len(self.rows) == MAX_ROWS:
            raise UserError(f"{self._subject} has more than {MAX_ROWS:,} rows: split it")
        self.rows.append(row)

    def leave_out(self, name: str, reason: str) -> None:
        """Note a row that cannot be used. `reason` begins with its place, such as "line 5: "."""
        self.left_out.append((name, reason))

    def count(self, what: str, name: str) -> None:
        """Count a case of a warning, such as NO_CAPTION; the first are named."""
        self._counts[what] += 1
        examples = self._examples.setdefault(what, [])
        if len(examples) < NAMED:
            examples.append(plain(os.path.basename(name) or name, 80))

    def count_all(self, what: str, names: Iterable[str]) -> None:
        """Count all cases of a warning."""
        for name in names:
            self.count(what, name)

    def own_or_class_tokens(self, caption: Any, name: str) -> Any:
        """Return the caption of the image `name`: its own or, where that is None, the class tokens or an empty one."""
        if caption is not None:
            if caption == "":
                self.count(EMPTY_CAPTION, name)
            return caption
        self.count(CLASS_TOKENS if self.class_tokens else NO_CAPTION, name)
        return self.class_tokens or ""

    def counted(self, what: str) -> int:
        """Return the number of cases of a warning."""
        return self._counts[what]

    def listing(self, subsets: Iterable[Subset], sort: bool = True) -> Listing:
        """Log what was left out and counted, and return the rows, sorted by name if they are in memory.

        Raises:
            UserError: Too many rows are unusable, or there are none.
        """
        total = len(self.rows) + len(self.left_out)
        report_left_out(self._subject, self.left_out, total, self._options.max_bad_fraction)
        for what, number in self._counts.items():
            level = logging.INFO if what in _USUAL else logging.WARNING
            more = ", ..." if number > NAMED else ""
            logger.log(
                level, "%s: %s %s: %s%s", self._subject, f"{number:,}", what, ", ".join(self._examples[what]), more
            )
        if not self.rows:
            raise UserError(f"{self._subject} has no rows: add images to it")
        if sort and isinstance(self.rows, list):
            self.rows.sort(key=lambda row: row.image if isinstance(row.image, str) else row.image.name)
        return Listing(self._layout, self.rows, tuple(subsets), self.left_out, dict(self._counts))


def merged(layout: str, listings: Iterable[Listing]) -> Listing:
    """Return the rows of several listings as one, in this order."""
    rows: list[Row] = []
    subsets: list[Subset] = []
    left_out: list[tuple[str, str]] = []
    counts: Counter[str] = Counter()
    for listing in listings:
        first = len(subsets)
        subsets += listing.subsets
        rows += [row._replace(subset=row.subset + first) for row in listing.rows] if first else listing.rows
        left_out += listing.left_out
        counts.update(listing.counts)
    return Listing(layout, rows, tuple(subsets), left_out, dict(counts))


def report_left_out(
    subject: str, left_out: list[tuple[str, str]], count: int, max_bad_fraction: float, before: int = 0
) -> None:
    """Warn about rows that are left out.

    Raises UserError if they, and the `before` that were left out before, are more than `max_bad_fraction` of `count`.
    """
    rows = [f"{name or 'a row without an image'} ({reason})" for name, reason in left_out]
    warn_each(logger, "left out: %s", rows)
    if len(left_out) + before > max_bad_fraction * count:
        named = "; ".join(f"{plain(name, 80)} ({reason})" for name, reason in left_out[:3])
        rest = len(left_out) + before - min(3, len(left_out))
        more = f"; and {rest} more" if rest else ""
        raise UserError(
            f"{subject}: {len(left_out) + before} of {count} rows are unusable, more than {max_bad_fraction:.0%}: "
            f"{named}{more}. Repair the images or remove the rows"
        )
    if left_out:
        logger.warning("%s: %d of %d rows left out", subject, len(left_out), count)
