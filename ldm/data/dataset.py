"""A folder of pictures with an `img_txt.csv` that names and describes them."""

from __future__ import annotations

import csv
import difflib
import io
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from ldm.data.transforms import PICTURE_ERRORS, open_rgb, picture_fault
from ldm.errors import UserError

logger = logging.getLogger(__name__)

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")

# csv's own limit, held here too: MindSpore raises it for the whole process when some of its modules are imported.
LONGEST_FIELD = 131_072


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
    """Read the rows of a data set, decoding every picture once so that training meets no broken one.

    The CSV is UTF-8 (a byte-order mark is fine), with a header; other columns are ignored. Picture names are relative
    to `folder`. A row whose picture is missing or broken, or with too few or too many fields, is logged by name and
    left out. An empty caption is kept, as training without a caption is of use, and counted in a warning.

    Args:
        max_bad_fraction: the share of bad rows above which the data set is refused.

    Raises:
        UserError: no folder, no CSV, not UTF-8, empty, no header, a column missing, a line that is no CSV, a picture
            outside the folder, or too many bad rows.
    """
    folder = Path(folder)
    csv_path = _find_csv(folder, csv_name)
    csv_rows = _parse(csv_path, image_column, text_column)
    for row in csv_rows:
        if not row.fault:
            _check_inside(folder, csv_path, row)
    faults = _picture_faults(folder, [row.name for row in csv_rows if not row.fault])

    rows: list[Row] = []
    bad: list[tuple[str, str]] = []
    for row in csv_rows:
        fault = row.fault or faults[row.name]
        if fault:
            bad.append((row.name, f"line {row.line}: {fault}"))
        else:
            rows.append(Row(folder / row.name, row.text))
    for name, reason in bad:
        logger.warning("left out: %s (%s)", name or "a row without a picture", reason)
    if len(bad) > max_bad_fraction * len(csv_rows):
        named = "; ".join(f"{name} ({reason})" for name, reason in bad[:3])
        more = f"; and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise UserError(
            f"{csv_path}: {len(bad)} of {len(csv_rows)} rows are unusable, more than {max_bad_fraction:.0%}: "
            f"{named}{more}. Mend the pictures or take out the rows"
        )
    if bad:
        logger.warning("%s: %d of %d rows left out", csv_path, len(bad), len(csv_rows))
    empty = sum(not row.text for row in rows)
    if empty:
        logger.warning("%s: %d of %d captions are empty and train as such", csv_path, empty, len(rows))
    return ImageTextRows(rows, bad)


def _find_csv(folder: Path, csv_name: str) -> Path:
    if not folder.exists():
        raise UserError(f"the data folder {folder} does not exist: check data_path")
    if not folder.is_dir():
        raise UserError(f"data_path {folder} is not a folder: give the folder that holds {csv_name}")
    csv_path = folder / csv_name
    if not csv_path.is_file():
        below = sorted(path.parent for path in folder.glob(f"*/{csv_name}"))
        hint = f"; there is one in {below[0]}" if below else f": write one with the columns dir,text into {folder}"
        raise UserError(f"the data folder {folder} has no {csv_name}{hint}")
    return csv_path


def _parse(csv_path: Path, image_column: str, text_column: str) -> list[_CsvRow]:
    reader = csv.reader(io.StringIO(_read_text(csv_path), newline=""), strict=True)
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
            name = fields[image_at].strip() if image_at < len(fields) else ""
            fault = ""
            if len(fields) != len(header):
                way_out = ": put captions that hold commas in double quotes" if len(fields) > len(header) else ""
                fault = f"{len(fields)} fields where the header has {len(header)}{way_out}"
            elif not name:
                fault = "no picture is named"
            rows.append(_CsvRow(start, name, "" if fault else fields[text_at].strip(), fault))
    except csv.Error as error:
        raise UserError(f"{csv_path}, line {max(line, reader.line_num)}: {error}; check its double quotes") from None
    if not rows:
        raise UserError(f"{csv_path} has {'a header but no rows' if header else 'nothing in it'}: add pictures to it")
    return rows


def _read_text(csv_path: Path) -> str:
    try:
        raw = csv_path.read_bytes()
    except OSError as error:
        raise UserError(f"{csv_path} cannot be read ({error.strerror}): check its permissions") from None
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{csv_path} is UTF-16: save it as UTF-8")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{csv_path}, line {line}: not UTF-8: save the file as UTF-8") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{csv_path}, line {line}: holds a zero byte, so it is no text file: write it as a UTF-8 CSV")
    return text


def _columns(csv_path: Path, header: list[str], wanted: tuple[str, str]) -> tuple[int, int]:
    """Where the picture's and the caption's column are."""
    missing = [name for name in wanted if name not in header]
    if not missing:
        twice = [name for name in wanted if header.count(name) > 1]
        if twice:
            raise UserError(f"{csv_path} has the column '{twice[0]}' twice: rename one")
        return header.index(wanted[0]), header.index(wanted[1])
    expected = ",".join(wanted)
    if any(name.lower().endswith(PICTURE_SUFFIXES) for name in header):
        raise UserError(f"{csv_path} has no header: make {expected} its first line")
    if len(header) == 1 and any(mark in header[0] for mark in ";\t|"):
        raise UserError(f"{csv_path} is not separated by commas (its first line is {header[0]!r}): save it with commas")
    near = {name.lower(): name for name in header}
    close = difflib.get_close_matches(missing[0].lower(), near, n=1, cutoff=0.5)
    nearest = f" (nearest: '{near[close[0]]}')" if close else ""
    found = ", ".join(f"'{name}'" for name in header[:8]) + (", ..." if len(header) > 8 else "")
    raise UserError(
        f"{csv_path} has no column '{missing[0]}', only {found}{nearest}: its first line must name {expected}"
    )


def _check_inside(folder: Path, csv_path: Path, row: _CsvRow) -> None:
    """Refuse a picture that is not below the folder, be it by name or through a link."""
    root = os.path.realpath(folder)
    place = os.path.realpath(os.path.join(root, row.name))
    if os.path.isabs(row.name) or os.path.commonpath([root, place]) != root:
        raise UserError(
            f"{csv_path}, line {row.line}: {row.name} is outside the folder: put the picture into {folder} "
            "and name it relative to that"
        )


def _picture_faults(folder: Path, names: list[str]) -> dict[str, str]:
    """What is wrong with each named picture, "" for nothing. Decoding leaves Python's lock, so threads help."""

    def fault(name: str) -> str:
        try:
            open_rgb(folder / name)
        except PICTURE_ERRORS as error:
            return f"the picture {picture_fault(folder / name, error)}"
        return ""

    unique = list(dict.fromkeys(names))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        # The bar shows up only where the check takes longer than a second.
        checked = tqdm(pool.map(fault, unique), total=len(unique), desc="checking pictures", unit="picture", delay=1)
        return dict(zip(unique, checked))
