"""Hugging Face's imagefolder: images with metadata.jsonl, metadata.csv or metadata.parquet."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Optional

from ldm.data.sources.arrow import import_pyarrow
from ldm.data.sources.image_text_csv import list_named_images, parse_csv, show_columns
from ldm.data.sources.names import walk
from ldm.data.sources.place import Place
from ldm.data.sources.rows import (
    MAX_ROWS,
    OTHER_SPLIT,
    Collector,
    Listing,
    ReadOptions,
    image_name,
    logger,
    merged,
)
from ldm.errors import UserError, plain
from ldm.files.documents import parse_json
from ldm.files.inputs import open_file, text_lines

NAME = "imagefolder"
ABOUT = "Hugging Face's imagefolder: metadata.jsonl, metadata.csv or metadata.parquet"
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
MAX_BYTES = 8 << 30  # size of a JSONL: 10 million rows of 800 characters
# The names of splits that datasets recognises.
TRAIN, OTHERS = ("train", "training"), ("validation", "valid", "dev", "val", "test", "testing", "eval", "evaluation")

Entry = tuple[int, object, object, str]


def detect(place: Place) -> bool:
    """Return whether a path is such a metadata file, or such a file is in the folder or in one directly below it."""
    if place.is_file:
        return place.suffix in (".jsonl", ".parquet") or os.path.basename(place.path) in METADATA
    return bool(_metadata_in(place.files)) or any(
        os.path.isfile(f"{place.path}/{folder}/{name}") for folder in place.folders for name in METADATA
    )


def read(place: Place, options: ReadOptions) -> Listing:
    """Return the rows of all metadata files in a folder and below, sorted by image name. See `ldm.data.sources.read`.

    Of a data set in splits (train/, test/, ...), the rows of train are returned, and the others are counted.

    Raises:
        UserError: A folder has two metadata files, two files name the same image, or a file is malformed.
    """
    if place.is_file:
        return _read_file(place.path, options.image_dir or os.path.dirname(place.path) or ".", options)
    root, dropped = _split_of(place)
    if dropped:
        logger.warning("%s: the split train is used, and not %s", plain(place.path), ", ".join(map(plain, dropped)))
    files: list[str] = []
    for names in walk(root):
        found = _metadata_in(frozenset(names.files))
        if len(found) > 1:
            raise UserError(f"{plain(names.folder)} has {' and '.join(found)}: keep one of them")
        files += [f"{names.folder}/{name}" for name in found]
    listing = merged(NAME, [_read_file(file, os.path.dirname(file), options) for file in files])
    if len(files) > 1:
        _check_once(listing)
        listing = listing._replace(rows=sorted(listing.rows, key=lambda row: str(row.image)))
    return _without_other_splits(listing, place.path, options)


def _metadata_in(files: frozenset[str]) -> list[str]:
    return [name for name in METADATA if name in files]


def _split_of(place: Place) -> tuple[str, list[str]]:
    """Return the folder to read and the names of the splits that are not read."""
    if not _metadata_in(place.files):
        train = next((name for name in TRAIN if name in place.folders), None)
        others = [name for name in place.folders if name in OTHERS]
        if train is not None and others:
            return f"{place.path}/{train}", others
    return place.path, []


def _without_other_splits(listing: Listing, folder: str, options: ReadOptions) -> Listing:
    """Return the rows of train if names in the metadata are divided into train/ and other splits."""
    first = [image_name(str(row.image), folder).partition("/")[0] for row in listing.rows]
    if not (set(first) & set(TRAIN) and set(first) & set(OTHERS)):
        return listing
    other = Collector(NAME, folder, options)
    rows = []
    for row, split in zip(listing.rows, first):
        if split in OTHERS:
            other.count(OTHER_SPLIT, listing.name(row))
        else:
            rows.append(row)
    other.rows = rows
    counts = other.listing(listing.subsets, sort=False).counts
    return listing._replace(rows=rows, counts={**listing.counts, **counts})


def _check_once(listing: Listing) -> None:
    """Raise UserError if two metadata files name the same image."""
    files: dict[str, int] = {}
    for row in listing.rows:
        if files.setdefault(str(row.image), row.subset) != row.subset:
            both = " and ".join(plain(listing.subsets[number].source) for number in (files[str(row.image)], row.subset))
            raise UserError(f"{plain(row.image)} is named by {both}: take it out of one of them")


def _read_file(path: str, folder: str, options: ReadOptions) -> Listing:
    suffix = os.path.splitext(path)[1].lower()
    unit = "row" if suffix == ".parquet" else "line"
    subset = options.subset(NAME, folder, path, unit)
    columns = options.image_column or "file_name", options.caption_column or "text"
    if suffix == ".csv":
        entries: Iterator[Entry] = ((row.line, row.name, row.caption, row.fault) for row in parse_csv(path, *columns))
    elif suffix == ".jsonl":
        entries = _jsonl_entries(path, *columns)
    else:
        entries = _parquet_entries(path, *columns)
    return list_named_images(subset, entries, options)


def _jsonl_entries(path: str, image_column: str, caption_column: str) -> Iterator[Entry]:
    where = plain(path)
    way = "write one JSON object on each line"
    columns: Optional[list[str]] = None
    with_image = with_caption = False
    count = 0
    for number, line in enumerate(text_lines(path, way=way, most=MAX_BYTES), 1):
        if not line.strip():
            continue
        row = parse_json(line, f"{where}, line {number}", lines=False)
        if not isinstance(row, dict):
            raise UserError(f"{where}, line {number} is no JSON object: {way}")
        count += 1
        if count > MAX_ROWS:
            raise UserError(f"{where} has more than {MAX_ROWS:,} rows: split it")
        columns = list(row) if columns is None else columns
        with_image, with_caption = with_image or image_column in row, with_caption or caption_column in row
        name, caption = row.get(image_column), row.get(caption_column)
        yield number, name, caption.strip() if isinstance(caption, str) else caption, ""
    if columns is None:
        raise UserError(f"{where} has nothing in it: add lines to it")
    for found, column in ((with_image, image_column), (with_caption, caption_column)):
        if not found:
            raise UserError(
                f"{where} has no '{column}' in any line, only {show_columns(columns, column) or 'empty objects'}: "
                f"rename it, or set {'image' if column == image_column else 'caption'}_column"
            )


def _parquet_entries(path: str, image_column: str, caption_column: str) -> Iterator[Entry]:
    where = plain(path)
    pyarrow = import_pyarrow(where)
    import pyarrow.parquet as parquet

    number = 0
    with open_file(path, way="give a Parquet file") as file:
        try:
            table = parquet.ParquetFile(file)
            names = table.schema_arrow.names
            for column, setting in ((image_column, "image_column"), (caption_column, "caption_column")):
                if column not in names:
                    raise UserError(
                        f"{where} has no column '{column}', only {show_columns(names, column)}: rename it, or set "
                        f"{setting}"
                    )
            if table.metadata.num_rows > MAX_ROWS:
                raise UserError(f"{where} has more than {MAX_ROWS:,} rows: split it")
            if not table.metadata.num_rows:
                raise UserError(f"{where} has no rows: add images to it")
            for batch in table.iter_batches(batch_size=10_000, columns=[image_column, caption_column]):
                images, captions = batch.column(image_column).to_pylist(), batch.column(caption_column).to_pylist()
                for name, caption in zip(images, captions):
                    number += 1
                    yield number, name, caption.strip() if isinstance(caption, str) else caption, ""
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise UserError(f"{where} is no readable Parquet file ({plain(error, 100)}): write it again") from None
