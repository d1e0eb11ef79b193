"""A folder of images with an `img_txt.csv` that names and describes them."""

from __future__ import annotations

import csv
import difflib
import io
import logging
import os
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from ldm.data.transforms import BrokenImage, open_rgb
from ldm.errors import UserError, plain
from ldm.files.inputs import is_folder, is_there, read_text
from ldm.runtime.logs import warn_of_each

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")

# csv's own limit, held here too: MindSpore raises it for the whole process when some of its modules are imported.
LONGEST_FIELD = 131_072
MOST_ROWS = 1_000_000  # 1 GB
MOST_BYTES = 128 << 20  # of the CSV: as many rows of 130 characters


class Row(NamedTuple):
    path: Path
    text: str


@dataclass
class ImageTextRows:
    """The rows to train on, in the CSV's order, and those left out as (name in the CSV, line and reason)."""

    rows: list[Row]
    bad: list[tuple[str, str]] = field(default_factory=list)


class _CsvRow(NamedTuple):
    line: int
    name: str
    text: str
    fault: str  # empty where the line itself is right


def read_image_text_csv(
    folder: str | Path,
    csv_name: str = "img_txt.csv",
    image_column: str = "dir",
    text_column: str = "text",
    max_bad_fraction: float = 0.10,
) -> ImageTextRows:
    """Read the rows of a data set, decoding every image once so that training meets no broken one.

    The CSV is UTF-8 (a byte-order mark is fine), with a header; other columns are ignored. Image names are relative to
    `folder`; what they name may be a link to anywhere. Where no file has a name, the only one that differs from it in
    case, Unicode form, kind of slash or encoding (GBK) is taken, and counted in a warning. A row whose image is missing
    or broken, or with too few or too many fields, is left out; the first ones are logged by name, all are counted. An
    empty caption is kept, as training without a caption is of use, and counted in a warning.

    Args:
        max_bad_fraction: the share of bad rows above which the data set is refused.

    Raises:
        UserError: no folder, no CSV, not UTF-8, empty, no header, a column missing, a line that is no CSV, an image
            outside the folder, or too many bad rows.
    """
    folder = Path(folder)
    csv_path = _find_csv(folder, csv_name)
    csv_rows = _parse(csv_path, image_column, text_column)
    for row in csv_rows:
        if not row.fault:
            _check_inside(folder, csv_path, row)
    images = _check_images(folder, list(dict.fromkeys(row.name for row in csv_rows if not row.fault)))

    rows: list[Row] = []
    bad: list[tuple[str, str]] = []
    for row in csv_rows:
        path, fault = (None, row.fault) if row.fault else images[row.name]
        if fault:
            bad.append((row.name, f"line {row.line}: {fault}"))
        else:
            rows.append(Row(path, row.text))
    warn_of_each(logger, "left out: %s", [f"{name or 'a row without an image'} ({reason})" for name, reason in bad])
    if len(bad) > max_bad_fraction * len(csv_rows):
        named = "; ".join(f"{plain(name, 80)} ({reason})" for name, reason in bad[:3])
        more = f"; and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise UserError(
            f"{plain(csv_path)}: {len(bad)} of {len(csv_rows)} rows are unusable, more than {max_bad_fraction:.0%}: "
            f"{named}{more}. Mend the images or take out the rows"
        )
    if bad:
        logger.warning("%s: %d of %d rows left out", csv_path, len(bad), len(csv_rows))
    near = [(name, path) for name, (path, fault) in images.items() if not fault and path != _path(folder, name)]
    if near:
        logger.warning(
            "%s: %d images are taken whose names differ in case, Unicode form, slashes or encoding, the first for %s: "
            "%s", csv_path, len(near), *near[0],
        )  # fmt: skip
    empty = sum(not row.text for row in rows)
    if empty:
        logger.warning("%s: %d of %d captions are empty and train as such", csv_path, empty, len(rows))
    return ImageTextRows(rows, bad)


def _find_csv(folder: Path, csv_name: str) -> Path:
    name = f"data_path {plain(folder)}"
    if not is_there(folder, "data_path"):
        raise UserError(f"the data folder {plain(folder)} does not exist: check data_path")
    if not is_folder(folder, "data_path"):
        raise UserError(f"{name} is not a folder: give the folder that holds {csv_name}")
    csv_path = folder / csv_name
    if not is_there(csv_path):
        try:
            below = sorted(inner.path for inner in os.scandir(folder) if os.path.isfile(f"{inner.path}/{csv_name}"))
        except OSError:  # the folder may be entered and not listed
            below = []
        hint = f"; there is one in {plain(below[0])}" if below else ": write one with the columns dir,text into it"
        raise UserError(f"the data folder {plain(folder)} has no {csv_name}{hint}")
    return csv_path


def _parse(csv_path: Path, image_column: str, text_column: str) -> list[_CsvRow]:
    way = "write it as a UTF-8 CSV, a large one in parts"
    # The text itself is not kept: StringIO copies it.
    reader = csv.reader(io.StringIO(read_text(csv_path, way=way, most=MOST_BYTES), newline=""), strict=True)
    rows: list[_CsvRow] = []
    image_at = text_at = -1
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
                image_at, text_at = _columns(csv_path, header, (image_column, text_column))
                continue
            if len(rows) == MOST_ROWS:
                raise UserError(f"{plain(csv_path)} has more than {MOST_ROWS:,} rows: split it")
            while len(fields) > len(header) and not fields[-1].strip():
                fields.pop()
            # Spreadsheets leave out the empty fields at a line's end.
            name, caption = (fields[at].strip() if at < len(fields) else "" for at in (image_at, text_at))
            fault = ""
            if len(fields) > len(header):
                fault = (
                    f"{len(fields)} fields where the header has {len(header)}: put captions that hold commas in "
                    "double quotes"
                )
            elif not name:
                fault = "no image is named"
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
    """Where the image's and the caption's column are."""
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
    """Refuse a name that leads out of the folder; a link that lies in it is its owner's wish."""
    inside = os.path.normpath(row.name)
    if os.path.isabs(inside) or inside == os.pardir or inside.startswith(os.pardir + os.sep):
        raise UserError(
            f"{plain(csv_path)}, line {row.line}: {plain(row.name)} is outside the folder: put the image, or a link to "
            f"it, into {plain(folder)} and name it relative to that"
        )


def _path(folder: Path, name: str) -> Path:
    # Without "..", which after a link would lead out of the folder.
    return folder / os.path.normpath(name)


def _check_images(folder: Path, names: list[str]) -> dict[str, tuple[Path, str]]:
    """The path of every named image and what is wrong with it, "" for nothing."""
    near_names = _NearNames(folder)

    def check(name: str) -> tuple[Path, str]:
        path = _path(folder, name)
        near = [] if _may_be_there(path) else near_names.find(name)
        if len(near) > 1:
            return path, f"the image does not exist, only {' and '.join(plain(other.name) for other in near[:2])}"
        try:
            path = near[0] if near else path
            open_rgb(path)
        except BrokenImage as error:
            return path, f"the image {error.fault}"
        return path, ""

    # Decoding leaves Python's lock, so threads help.
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        # The bar shows up only where the check takes longer than a second.
        checked = tqdm(pool.map(check, names), total=len(names), desc="checking images", unit="image", delay=1)
        return dict(zip(names, checked))
    finally:
        pool.shutdown(cancel_futures=True)


def _may_be_there(path: Path) -> bool:
    """Whether something is at `path`, a dead link too, or it cannot be told."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError):  # no permission, too long a name: opening it says so
        return True
    return True


class _NearNames:
    """Finds files whose names differ in case, Unicode form, kind of slash or encoding alone from those in a CSV."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._listed: dict[Path, dict[str, list[str]]] = {}

    def find(self, name: str) -> list[Path]:
        """The paths of all such files; ".." is in no listing, so all are in the folder."""
        places = [self._folder]
        for part in os.path.normpath(name.replace("\\", "/")).split("/"):
            places = [place / near for place in places for near in self._names(place).get(_folded(part), ())]
        return places

    def _names(self, folder: Path) -> dict[str, list[str]]:
        """Folded name -> the names in a folder that are so when folded."""
        if folder not in self._listed:
            names: dict[str, list[str]] = {}
            try:
                for name in sorted(os.listdir(folder)):
                    for form in {_folded(name), _folded(_from_gbk(name))}:
                        names.setdefault(form, []).append(name)
            except OSError:  # a file, or a folder that may not be listed
                pass
            self._listed[folder] = names
        return self._listed[folder]


def _folded(name: str) -> str:
    """A file name without what systems change in it."""
    return unicodedata.normalize("NFC", name.casefold())


def _from_gbk(name: str) -> str:
    """A file name whose bytes are GBK, as archives from Chinese Windows have them; by chance they may be UTF-8 too."""
    try:
        return os.fsencode(name).decode("gb18030")
    except UnicodeError:
        return name
