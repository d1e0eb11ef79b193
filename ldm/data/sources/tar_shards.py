"""Tar shards (WebDataset): members of one basename that follow each other, such as 0001.jpg and 0001.txt, are a row."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Optional

import numpy as np

from ldm.data.sources.caption_files import MAX_BYTES, caption_suffixes
from ldm.data.sources.image_text_csv import show_columns
from ldm.data.sources.names import LISTED_SUFFIXES
from ldm.data.sources.place import Place
from ldm.data.sources.row_file import RowFile
from ldm.data.sources.rows import (
    MAX_IMAGE_BYTES,
    NAMED,
    NO_CAPTION,
    OTHER_FILES,
    Collector,
    FilePart,
    Listing,
    ReadOptions,
    Row,
    caption_fault,
    image_name,
)
from ldm.data.sources.tar_files import Member, tar_members
from ldm.errors import UserError, plain
from ldm.files.documents import parse_json
from ldm.files.inputs import decode_text

NAME = "tar_shards"
ABOUT = "tar shards (WebDataset): .tar files with images and their captions"
MAX_JSON = 1 << 20  # bytes of a member with an image's metadata


class _Sample(NamedTuple):
    """An image in a shard and its caption."""

    image: FilePart
    caption: Optional[str]  # None where the shard has none
    fault: str  # why the sample cannot be used; "" for a good one


def detect(place: Place) -> bool:
    """Return whether a path is a .tar file, or a folder holds some."""
    return place.suffix == ".tar" if place.is_file else bool(_shards(place))


def read(place: Place, options: ReadOptions) -> Listing:
    """Return the images of all shards, sorted by name. See `ldm.data.sources.read`.

    Headers and captions are read, and no image. A million rows of two members take 400 MB of memory. With
    `options.rows_on_disk` they take none, and keep the order of the shards.

    Raises:
        UserError: A shard is damaged, two images have the same name, or no image has a caption.
    """
    collector = Collector(NAME, place.path, options, RowFile() if options.rows_on_disk else None)
    hashes = array("q")  # of the names
    shards = [place.path] if place.is_file else [f"{place.path}/{name}" for name in _shards(place)]
    for shard in shards:
        for sample in _samples(shard, options, collector):
            if sample.fault:
                place_in_shard = f"{plain(os.path.basename(shard))}, byte {sample.image.offset:,}"
                collector.leave_out(sample.image.name, f"{place_in_shard}: {sample.fault}")
                continue
            caption = collector.own_or_class_tokens(sample.caption, sample.image.name)
            collector.add(Row(sample.image, caption, 0, sample.image.offset))
            if options.rows_on_disk:
                hashes.append(hash(sample.image.name))
    if collector.rows and collector.counted(NO_CAPTION) == len(collector.rows):
        raise UserError(
            f"{plain(place.path)} has {len(collector.rows):,} images and no caption: put a .txt, a .caption or a .json "
            f'with "{options.caption_column or "text"}" beside each image, or set caption_column or class_tokens'
        )
    subset = options.subset(NAME, place.path, place.path, "byte")
    listing = collector.listing((subset,))
    rows = _of_equal_hash(listing.rows, np.array(hashes)) if options.rows_on_disk else listing.rows
    for one, two in zip(rows, rows[1:]):
        if listing.name(one) == listing.name(two):
            raise UserError(
                f"{plain(listing.name(one))} is in {listing.where(one)} and in {listing.where(two)}: give images names "
                "of their own"
            )
    return listing


def _of_equal_hash(rows: Sequence[Row], hashes: np.ndarray) -> list[Row]:
    """Return rows whose hash (N,) int64 another row has, sorted by name. If there are many, not all of them."""
    in_order = np.sort(hashes)
    repeated = np.unique(in_order[1:][in_order[1:] == in_order[:-1]])[:NAMED]
    found = [rows[place] for place in np.flatnonzero(np.isin(hashes, repeated)).tolist()] if len(repeated) else []
    return sorted(found, key=lambda row: image_name(row.image, ""))


def _shards(place: Place) -> list[str]:
    return sorted(name for name in place.files if name.lower().endswith(".tar"))


class _Parts:
    """The members of one sample."""

    def __init__(self, key: str):
        self.key = key
        self.image: Optional[FilePart] = None
        self.texts: dict[str, bytes] = {}  # by suffix
        self.fault = ""


def _samples(path: str, options: ReadOptions, collector: Collector) -> Iterator[_Sample]:
    """Yield the samples of a shard in its order. `collector` counts what is not used."""
    extensions = caption_suffixes(options)
    parts: Optional[_Parts] = None
    for member in tar_members(path):
        folder, _, base = member.name.removeprefix("./").rpartition("/")
        stem, dot, suffix = base.partition(".")
        if not stem or not dot:
            if base:
                collector.count(OTHER_FILES, member.name)
            continue
        key, suffix = f"{folder}/{stem}" if folder else stem, f".{suffix.lower()}"
        if parts is None or key != parts.key:
            if parts is not None:
                yield from _finished(path, parts, extensions, options)
            parts = _Parts(key)
        _add(parts, member, suffix, extensions, collector)
    if parts is not None:
        yield from _finished(path, parts, extensions, options)


def _add(parts: _Parts, member: Member, suffix: str, extensions: tuple[str, ...], collector: Collector) -> None:
    if suffix in LISTED_SUFFIXES:
        if parts.image is not None:
            parts.fault = f"two images of this name: {plain(parts.image.name)} and {plain(member.name)}"
            return
        name = member.name.removeprefix("./")
        parts.image = FilePart(member.path, member.offset, member.size, name)
        if not member.size:
            parts.fault = "the image is an empty file"
        elif member.size > MAX_IMAGE_BYTES:
            parts.fault = f"the image has {member.size:,} bytes, at most {MAX_IMAGE_BYTES:,} are read: scale it down"
    elif suffix in extensions or suffix == ".json":
        most = MAX_JSON if suffix == ".json" else MAX_BYTES
        if suffix in parts.texts:
            parts.fault = f"it has two {suffix} members"
        elif member.size > most:
            parts.fault = f"its {suffix} has {member.size:,} bytes, at most {most:,} are read"
        else:
            parts.texts[suffix] = member.read()
    else:
        collector.count(OTHER_FILES, member.name)


def _finished(path: str, parts: _Parts, extensions: tuple[str, ...], options: ReadOptions) -> Iterator[_Sample]:
    """Yield the sample that the members of one basename make, if there is an image among them."""
    if parts.image is None:
        if parts.texts or parts.fault:
            image = FilePart(path, 0, 0, parts.key)
            yield _Sample(image, None, "no image follows or precedes its caption: put both together")
        return
    caption, fault = None, parts.fault
    if not fault:
        try:
            caption = _caption(parts, extensions, options)
        except UserError as error:
            fault = plain(error, 300)
    yield _Sample(parts.image, caption, fault)


def _caption(parts: _Parts, extensions: tuple[str, ...], options: ReadOptions) -> Optional[str]:
    """Return the caption of a sample, None if it has none. Raises UserError for one that is no text."""
    for suffix in extensions:
        if suffix in parts.texts:
            caption: Any = decode_text(parts.texts[suffix], f"its {suffix}", "write the caption as UTF-8 text").strip()
            break
    else:
        if ".json" not in parts.texts:
            return None
        fields = parse_json(decode_text(parts.texts[".json"], "its .json"), "its .json")
        if not isinstance(fields, dict):
            raise UserError("its .json is no object")
        column = next((name for name in (options.caption_column or "text", "caption") if name in fields), None)
        if column is None:
            if options.caption_column:
                raise UserError(f"its .json has no '{options.caption_column}', only {_shown(fields, options)}")
            return None
        caption = fields[column]
        caption = caption.strip() if isinstance(caption, str) else caption
    if fault := caption_fault(caption):
        raise UserError(fault)
    return str(caption)


def _shown(fields: dict[str, Any], options: ReadOptions) -> str:
    return show_columns(list(fields), options.caption_column or "text") or "an empty object"
