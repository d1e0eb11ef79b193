"""A folder with img_txt.csv: a CSV that names each image and gives its caption.

The CSVs and the named images of other layouts are read here too.
"""

from __future__ import annotations

import csv
import difflib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ldm.data.sources.names import IMAGE_SUFFIXES, NamedImages
from ldm.data.sources.place import Place
from ldm.data.sources.rows import (
    LONGEST_CAPTION,
    MAX_ROWS,
    NOT_LISTED,
    SIMILAR_NAME,
    Collector,
    Listing,
    ReadOptions,
    Row,
    Subset,
    caption_fault,
)
from ldm.errors import UserError, plain
from ldm.files.inputs import is_folder, is_there, text_lines

NAME = "image_text_csv"
ABOUT = "img_txt.csv, which names the images and gives their captions"
CSV_NAME = "img_txt.csv"
MAX_BYTES = 4 << 30  # size of a CSV: 10 million rows of 400 characters
WAY = "write it as a UTF-8 CSV, a large one in parts"


class CsvRow(NamedTuple):
    """A row of a CSV, not yet compared with the files."""

    line: int
    name: str
    caption: str
    fault: str  # empty if the line is well-formed


def detect(place: Place) -> bool:
    """Return whether a folder holds img_txt.csv."""
    return CSV_NAME in place.files


def read(place: Place, options: ReadOptions) -> Listing:
    """Return the rows of img_txt.csv, in its order. See `ldm.data.sources.read`."""
    csv_path = f"{place.path}/{CSV_NAME}"
    subset = options.subset(NAME, place.path, csv_path, "line")
    rows = parse_csv(csv_path, options.image_column or "dir", options.caption_column or "text")
    return list_named_images(
        subset, ((row.line, row.name, row.caption, row.fault) for row in rows), options, sort=False
    )


def list_named_images(
    subset: Subset,
    entries: Iterator[tuple[int, object, object, str]],
    options: ReadOptions,
    sort: bool = True,
    stems: bool = False,
) -> Listing:
    """Return the listing of a metadata file.

    Args:
        subset: The only subset. Image names are relative to its folder.
        entries: (line or row, image name, caption, fault) of each row; the fault is "" for a well-formed one. A caption
            of None is a missing one.
        options: How to read.
        sort: Whether to sort the rows by the image's name.
        stems: Whether image names may leave the suffix away.
    """
    collector = Collector(subset.layout, subset.source, options)
    images = NamedImages(subset.folder)
    source, unit = plain(subset.source), subset.unit
    used = set()
    for number, name, caption, fault in entries:
        path = ""
        if not fault and not isinstance(name, str):
            fault = "it names no image" if name is None else f"its image is a {type(name).__name__}, not a file name"
        if not fault:
            caption = collector.own_or_class_tokens(caption, str(name))
            fault = caption_fault(caption)
        if not fault:
            path, fault, similar = images.find(str(name), f"{source}, {unit} {number}", stems)
            if similar:
                collector.count(SIMILAR_NAME, str(name))
        if fault:
            collector.leave_out(name if isinstance(name, str) else "", f"{unit} {number}: {fault}")
            continue
        used.add(path)
        collector.add(Row(path, str(caption), 0, number))
    collector.count_all(NOT_LISTED, images.unused(used))
    return collector.listing((subset,), sort)


def find_csv(folder: Path) -> Path:
    """Return the path of the img_txt.csv in a folder. Raises UserError if there is none."""
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


def parse_csv(csv_path: str | os.PathLike, image_column: str, caption_column: str) -> Iterator[CsvRow]:
    """Yield the rows of a CSV, without holding it in memory.

    Raises:
        UserError: The CSV cannot be read, is not UTF-8, malformed, empty, too long, or has no header or not the
            columns.
    """
    csv_path = os.fspath(csv_path)
    reader = csv.reader(text_lines(csv_path, way=WAY, most=MAX_BYTES), strict=True)
    count = 0
    image_at = caption_at = -1
    header: list[str] = []
    line = 1
    try:
        for fields in reader:
            # The csv module's default limit. Checked here too, because some MindSpore modules raise it for the process.
            if any(len(value) > LONGEST_CAPTION for value in fields):
                raise csv.Error(f"a field of more than {LONGEST_CAPTION:,} characters")
            start, line = line, reader.line_num + 1
            if not any(value.strip() for value in fields):
                continue
            if not header:
                header = [name.strip() for name in fields]
                image_at, caption_at = _columns(csv_path, header, (image_column, caption_column))
                continue
            if count == MAX_ROWS:
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
            count += 1
            yield CsvRow(start, name, "" if fault else caption, fault)
    except csv.Error as error:
        raise UserError(
            f"{plain(csv_path)}, line {max(line, reader.line_num)}: {error}; check its double quotes"
        ) from None
    if not count:
        content = "a header but no rows" if header else "nothing in it"
        raise UserError(f"{plain(csv_path)} has {content}: add images to it")


def _columns(csv_path: str, header: list[str], wanted: tuple[str, str]) -> tuple[int, int]:
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
    raise UserError(
        f"{plain(csv_path)} has no column '{missing[0]}', only {show_columns(header, missing[0])}: its first line must "
        f"name {expected}"
    )


def show_columns(columns: list[str], wanted: str) -> str:
    """Return the names of columns for an error, with the one nearest to `wanted`."""
    near = {name.lower(): name for name in columns}
    close = difflib.get_close_matches(wanted.lower()[:100], near, n=1, cutoff=0.5)
    nearest = f" (nearest: '{plain(near[close[0]], 40)}')" if close else ""
    return ", ".join(f"'{plain(name, 40)}'" for name in columns[:8]) + (", ..." if len(columns) > 8 else "") + nearest
