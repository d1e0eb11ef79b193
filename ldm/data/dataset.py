"""Read a data set: a folder of images, with a CSV that names each image and gives its caption."""

from __future__ import annotations

import csv
import difflib
import io
import logging
import os
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from ldm.data.cache import FileHash
from ldm.data.checked_images import CheckedImages
from ldm.data.transforms import BrokenImage
from ldm.errors import UserError, plain
from ldm.files.inputs import is_folder, is_there, read_text
from ldm.runtime.logs import warn_each

logger = logging.getLogger(__name__)

CSV_NAME = "img_txt.csv"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")

# The csv module's default limit. Checked here as well, because some MindSpore modules raise it for the whole process.
LONGEST_FIELD = 131_072
MAX_ROWS = 1_000_000  # they take 1 GB of memory
MAX_BYTES = 128 << 20  # size of the CSV: a million rows of 130 characters


class Row(NamedTuple):
    """An image and its caption."""

    path: Path
    caption: str
    content: FileHash  # of the image file


class ImageTextRows(NamedTuple):
    """The rows of a data set, in the order of the CSV."""

    rows: list[Row]
    left_out: list[tuple[str, str]]  # the unusable rows: name in the CSV, line and reason


class _CsvRow(NamedTuple):
    line: int
    name: str
    caption: str
    fault: str  # empty if the line is well-formed


def read_image_text_csv(
    folder: str | Path,
    image_column: str = "dir",
    caption_column: str = "text",
    max_bad_fraction: float = 0.10,
    record: Path | None = None,
) -> ImageTextRows:
    """Read the rows of the img_txt.csv in a folder, and check that every image decodes.

    The CSV is UTF-8, with or without a byte-order mark, and has a header. Other columns are ignored. Image names are
    relative to `folder` and may be links to anywhere. If no file has a name, the only file whose name differs in case,
    Unicode form, kind of slash or encoding (GBK) is used, and a warning counts these. A row is left out if its image is
    missing or broken, or if it has too few or too many fields. The log names the first such rows and counts all. Empty
    captions are kept, because training without captions is useful, and a warning counts them.

    Args:
        max_bad_fraction: The data set is refused if more than this fraction of its rows is unusable.
        record: File that remembers which images decode (see `CheckedImages`). None decodes all of them.

    Raises:
        UserError: The folder or the CSV is missing, the CSV is empty, not UTF-8, malformed, or has no header or not the
            columns, an image is outside the folder, or too many rows are unusable.
    """
    folder = Path(folder)
    csv_path = _find_csv(folder)
    csv_rows = _parse(csv_path, image_column, caption_column)
    for row in csv_rows:
        if not row.fault:
            _check_inside(folder, csv_path, row)
    names = list(dict.fromkeys(row.name for row in csv_rows if not row.fault))
    images = _check_images(folder, names, record)

    rows: list[Row] = []
    left_out: list[tuple[str, str]] = []
    for row in csv_rows:
        image = row.fault or images[row.name]
        if isinstance(image, str):
            left_out.append((row.name, f"line {row.line}: {image}"))
        else:
            path, content = image
            rows.append(Row(path, row.caption, content))
    _report_left_out(csv_path, left_out, len(csv_rows), max_bad_fraction)
    paths = {name: image[0] for name, image in images.items() if not isinstance(image, str)}
    similar = [(name, path) for name, path in paths.items() if path != _path(folder, name)]
    if similar:
        logger.warning(
            "%s: %d image names differ from the CSV's in case, Unicode form, slashes or encoding, the first for %s: %s",
            csv_path, len(similar), *similar[0],
        )  # fmt: skip
    empty = sum(not row.caption for row in rows)
    if empty:
        logger.warning("%s: %d of %d captions are empty and train as such", csv_path, empty, len(rows))
    return ImageTextRows(rows, left_out)


def _report_left_out(csv_path: Path, left_out: list[tuple[str, str]], count: int, max_bad_fraction: float) -> None:
    """Warn about rows that are left out. Raises UserError if they are more than `max_bad_fraction` of `count`."""
    rows = [f"{name or 'a row without an image'} ({reason})" for name, reason in left_out]
    warn_each(logger, "left out: %s", rows)
    if len(left_out) > max_bad_fraction * count:
        named = "; ".join(f"{plain(name, 80)} ({reason})" for name, reason in left_out[:3])
        more = f"; and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        raise UserError(
            f"{plain(csv_path)}: {len(left_out)} of {count} rows are unusable, more than {max_bad_fraction:.0%}: "
            f"{named}{more}. Repair the images or remove the rows"
        )
    if left_out:
        logger.warning("%s: %d of %d rows left out", csv_path, len(left_out), count)


def _find_csv(folder: Path) -> Path:
    if not is_there(folder, "data_path"):
        raise UserError(f"the data folder {plain(folder)} does not exist: check data_path")
    if not is_folder(folder, "data_path"):
        raise UserError(f"data_path {plain(folder)} is not a folder: give the folder that holds {CSV_NAME}")
    csv_path = folder / CSV_NAME
    if not is_there(csv_path):
        try:
            below = sorted(inner.path for inner in os.scandir(folder) if os.path.isfile(f"{inner.path}/{CSV_NAME}"))
        except OSError:  # the folder may be entered but not listed
            below = []
        hint = f"; there is one in {plain(below[0])}" if below else ": write one with the columns dir,text into it"
        raise UserError(f"the data folder {plain(folder)} has no {CSV_NAME}{hint}")
    return csv_path


def _parse(csv_path: Path, image_column: str, caption_column: str) -> list[_CsvRow]:
    way = "write it as a UTF-8 CSV, a large one in parts"
    # The text is not kept in a variable, because StringIO copies it.
    reader = csv.reader(io.StringIO(read_text(csv_path, way=way, most=MAX_BYTES), newline=""), strict=True)
    rows: list[_CsvRow] = []
    image_at = caption_at = -1
    header: list[str] = []
    line = 1
    try:
        for fields in reader:
            if any(len(value) > LONGEST_FIELD for value in fields):
                raise csv.Error(f"a field of more than {LONGEST_FIELD:,} characters")
            start, line = line, reader.line_num + 1
            if not any(value.strip() for value in fields):
                continue
            if not header:
                header = [name.strip() for name in fields]
                image_at, caption_at = _columns(csv_path, header, (image_column, caption_column))
                continue
            if len(rows) == MAX_ROWS:
                raise UserError(f"{plain(csv_path)} has more than {MAX_ROWS:,} rows: split it")
            while len(fields) > len(header) and not fields[-1].strip():
                fields.pop()
            # Spreadsheets omit empty fields at the end of a line.
            name, caption = (fields[at].strip() if at < len(fields) else "" for at in (image_at, caption_at))
            fault = ""
            if len(fields) > len(header):
                fault = (
                    f"{len(fields)} fields where the header has {len(header)}: put captions that hold commas in "
                    "double quotes"
                )
            elif not name:
                fault = "it names no image"
            rows.append(_CsvRow(start, name, "" if fault else caption, fault))
    except csv.Error as error:
        raise UserError(
            f"{plain(csv_path)}, line {max(line, reader.line_num)}: {error}; check its double quotes"
        ) from None
    if not rows:
        content = "a header but no rows" if header else "nothing in it"
        raise UserError(f"{plain(csv_path)} has {content}: add images to it")
    return rows


def _columns(csv_path: Path, header: list[str], wanted: tuple[str, str]) -> tuple[int, int]:
    """Return the places of the image column and the caption column."""
    missing = [name for name in wanted if name not in header]
    if not missing:
        twice = [name for name in wanted if header.count(name) > 1]
        if twice:
            raise UserError(f"{plain(csv_path)} has the column '{twice[0]}' twice: rename one")
        return header.index(wanted[0]), header.index(wanted[1])
    expected = ",".join(wanted)
    if any(name.lower().endswith(IMAGE_SUFFIXES) for name in header):
        raise UserError(f"{plain(csv_path)} has no header: make {expected} its first line")
    if len(header) == 1 and any(mark in header[0] for mark in ";\t|"):
        raise UserError(
            f"{plain(csv_path)} is not separated by commas (it begins with {plain(header[0])!r}): save it with commas"
        )
    near = {name.lower(): name for name in header}
    close = difflib.get_close_matches(missing[0].lower(), near, n=1, cutoff=0.5)
    nearest = f" (nearest: '{plain(near[close[0]], 40)}')" if close else ""
    found = ", ".join(f"'{plain(name, 40)}'" for name in header[:8]) + (", ..." if len(header) > 8 else "")
    raise UserError(
        f"{plain(csv_path)} has no column '{missing[0]}', only {found}{nearest}: its first line must name {expected}"
    )


def _check_inside(folder: Path, csv_path: Path, row: _CsvRow) -> None:
    """Raise UserError for a name that leads out of the folder. Links in the folder are allowed."""
    inside = os.path.normpath(row.name)
    if os.path.isabs(inside) or inside == os.pardir or inside.startswith(os.pardir + os.sep):
        raise UserError(
            f"{plain(csv_path)}, line {row.line}: {plain(row.name)} is outside the folder: put the image, or a link to "
            f"it, into {plain(folder)} and name it relative to that"
        )


def _path(folder: Path, name: str) -> Path:
    # Normalized, because ".." after a link would lead out of the folder.
    return folder / os.path.normpath(name)


def _check_images(folder: Path, names: list[str], record: Path | None) -> dict[str, tuple[Path, FileHash] | str]:
    """Return the path and the content of every named image, or the fault of an unusable one."""
    checked_images = CheckedImages(record)
    similar_names = _SimilarNames(folder)

    def check(name: str) -> tuple[Path, FileHash] | str:
        path = _path(folder, name)
        if not _may_exist(path):
            similar = similar_names.find(name)
            if len(similar) > 1:
                both = " and ".join(plain(other.name) for other in similar[:2])
                return f"the image does not exist, only {both}"
            path = similar[0] if similar else path
        try:
            return path, checked_images.check(path)
        except BrokenImage as error:
            return f"the image {error.fault}"

    # Decoding releases Python's lock, so threads help.
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        # The bar appears only if the check takes longer than a second.
        checked = tqdm(pool.map(check, names), total=len(names), desc="checking images", unit="image", delay=1)
        images = dict(zip(names, checked))
    finally:
        pool.shutdown(cancel_futures=True)
    checked_images.save()
    return images


def _may_exist(path: Path) -> bool:
    """Return whether there is a file or a dead link at `path`, also if this cannot be determined."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError):  # no permission, or too long a name: the error comes when the image is opened
        pass
    return True


class _SimilarNames:
    """Finds files whose names differ from those in a CSV only in case, Unicode form, kind of slash or encoding."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._listed: dict[Path, dict[str, list[str]]] = {}

    def find(self, name: str) -> list[Path]:
        """Return the paths of all such files. They are inside the folder, because no listing contains ".."."""
        paths = [self._folder]
        for part in os.path.normpath(name.replace("\\", "/")).split("/"):
            paths = [path / similar for path in paths for similar in self._names(path).get(_folded(part), ())]
        return paths

    def _names(self, folder: Path) -> dict[str, list[str]]:
        """Return the names in a folder by their folded form."""
        if folder not in self._listed:
            names: dict[str, list[str]] = {}
            try:
                for name in sorted(os.listdir(folder)):
                    for folded in {_folded(name), _folded(_from_gbk(name))}:
                        names.setdefault(folded, []).append(name)
            except OSError:  # not a folder, or it may not be listed
                pass
            self._listed[folder] = names
        return self._listed[folder]


def _folded(name: str) -> str:
    """Return a file name without the differences that operating systems introduce."""
    return unicodedata.normalize("NFC", name.casefold())


def _from_gbk(name: str) -> str:
    """Decode a file name as GBK, which archives from Chinese Windows use, even if its bytes are valid UTF-8."""
    try:
        return os.fsencode(name).decode("gb18030")
    except UnicodeError:
        return name
