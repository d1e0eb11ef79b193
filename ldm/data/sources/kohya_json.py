"""The metadata JSON of kohya's fine-tuning: {"cat": {"caption": "a cat", "tags": "fur, paws"}, ...}."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from ldm.data.sources.image_text_csv import list_named_images
from ldm.data.sources.place import Place
from ldm.data.sources.rows import Listing, ReadOptions
from ldm.errors import UserError, plain
from ldm.files.documents import parse_json
from ldm.files.inputs import read_text

NAME = "kohya_json"
ABOUT = "kohya's metadata JSON (meta_cap.json, meta_lat.json, ...)"
MAX_BYTES = 1 << 30  # size of the file, which is read at once
WAY = 'write {"name of the image": {"caption": "...", "tags": "..."}, ...}'


class _Entry(NamedTuple):
    """The values of an image's entry. Others, such as train_resolution, are not kept."""

    caption: Any
    tags: Any


def detect(place: Place) -> bool:
    """Return whether a path is a .json file, or a folder has one named meta*.json, as kohya's tools write it."""
    return place.suffix == ".json" if place.is_file else bool(_files(place))


def read(place: Place, options: ReadOptions) -> Listing:
    """Return the images of a metadata JSON, sorted by name. See `ldm.data.sources.read`.

    A key is the image's name below `options.image_dir`, with or without suffix, or its absolute path there. The tags
    follow the caption, or each line of it, after `options.caption_separator` and a space.

    Raises:
        UserError: The file is no such JSON, a key is given twice or leads out of the folder, or a folder has several.
    """
    path = place.path
    if not place.is_file:
        files = _files(place)
        if len(files) > 1:
            raise UserError(
                f"{plain(path)} has {len(files)} metadata files ({', '.join(map(plain, files[:4]))}): give the path of "
                "one"
            )
        path = f"{path}/{files[0]}"
    folder = (options.image_dir or os.path.dirname(path) or ".").rstrip("/") or "/"
    subset = options.subset(NAME, folder, path, "entry")
    return list_named_images(subset, _entries(path, folder, options.caption_separator), options, stems=True)


def _files(place: Place) -> list[str]:
    return sorted(name for name in place.files if name.startswith("meta") and name.endswith(".json"))


def _make(fields: dict[str, Any]) -> Any:
    """Return an entry for an object of values, and the object itself if it holds entries. Saves 400 bytes an image."""
    if any(isinstance(value, _Entry) for value in fields.values()):
        return fields
    return _Entry(fields.get("caption"), fields.get("tags"))


def _entries(path: str, folder: str, separator: str) -> Iterator[tuple[int, object, object, str]]:
    where = plain(path)
    images = parse_json(read_text(path, way="split it", most=MAX_BYTES), where, make=_make)
    if not isinstance(images, dict):
        raise UserError(f"{where} has no entries of images: {WAY}")
    root = os.path.abspath(folder).rstrip("/") + "/"
    keys = list(images)
    for number, key in enumerate(keys, 1):
        keys[number - 1] = ""
        # The entry is freed, because its row takes as much memory again.
        yield number, *_row(key, images.pop(key), root, separator)


def _row(key: str, entry: Any, root: str, separator: str) -> tuple[object, object, str]:
    """Return (image name, caption, fault) of an entry."""
    name = key[len(root) :] if key.startswith(root) else key
    if not isinstance(entry, _Entry):
        return name, "", f"its entry is no object with a caption: {WAY}"
    caption, tags = entry
    if caption is None or tags is None or tags == "":
        text = tags if caption is None else caption
        return name, text.strip() if isinstance(text, str) else text, ""
    if not (isinstance(caption, str) and isinstance(tags, str)):
        return name, "", "its caption or its tags are no text"
    line = tags.strip().replace("\n", separator + " ")
    return name, "\n".join(f"{text.strip()}{separator} {line}" for text in caption.strip().split("\n")), ""
