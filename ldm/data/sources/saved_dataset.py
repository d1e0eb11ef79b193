"""A folder that `save_to_disk` of Hugging Face's datasets wrote: dataset_info.json, state.json and Arrow files."""

from __future__ import annotations

import os
from typing import Any, Optional

from ldm.data.sources.arrow import import_pyarrow
from ldm.data.sources.image_text_csv import show_columns
from ldm.data.sources.imagefolder import TRAIN
from ldm.data.sources.names import NamedImages
from ldm.data.sources.place import Place, look
from ldm.data.sources.rows import (
    SIMILAR_NAME,
    Collector,
    FilePart,
    Listing,
    ReadOptions,
    Row,
    caption_fault,
    logger,
)
from ldm.errors import UserError, plain
from ldm.files.documents import read_json
from ldm.files.inputs import check_file, open_file

NAME = "saved_dataset"
ABOUT = "a folder that save_to_disk of Hugging Face's datasets wrote"
STATE, INFO, SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
WAY = "write it again with save_to_disk"


def detect(place: Place) -> bool:
    """Return whether a folder holds the files of a saved data set, or of several splits."""
    return SPLITS in place.files or (STATE in place.files and INFO in place.files)


def read(place: Place, options: ReadOptions) -> Listing:
    """Return the rows of a saved data set, sorted by image name. See `ldm.data.sources.read`.

    Of a data set in splits, the rows of train are returned. Images that the Arrow files hold are not copied: a row has
    their place in the file. An image without a name has its number, as in 000000012.

    Raises:
        UserError: A file is missing or damaged, a column is missing or is none of images or texts, or pyarrow is not
            installed.
    """
    if SPLITS in place.files:
        return read(_train_split(place), options)
    collector = Collector(NAME, place.path, options)
    pyarrow = import_pyarrow(plain(place.path))
    number = 0
    for file in _data_files(place):
        number = _add_file(collector, pyarrow, file, place.path, options, number)
    subset = options.subset(NAME, place.path, place.path, "row")
    return collector.listing((subset,))


def _train_split(place: Place) -> Place:
    content = read_json(f"{place.path}/{SPLITS}", way=WAY)
    splits = content.get("splits") if isinstance(content, dict) else None
    if not isinstance(splits, list) or not splits or not all(isinstance(name, str) for name in splits):
        raise UserError(f"{plain(place.path)}/{SPLITS} has no list of splits: {WAY}")
    name = next((name for name in TRAIN if name in splits), splits[0] if len(splits) == 1 else None)
    if name is None:
        raise UserError(
            f"{plain(place.path)} has the splits {', '.join(map(plain, splits))} and no train: give the folder of one"
        )
    if name not in place.folders:
        raise UserError(f"{plain(place.path)} has no folder {plain(name)}, which {SPLITS} names: {WAY}")
    others = [plain(other) for other in splits if other != name]
    if others:
        logger.warning("%s: the split %s is used, and not %s", plain(place.path), plain(name), ", ".join(others))
    return look(f"{place.path}/{name}")


def _data_files(place: Place) -> list[str]:
    state = read_json(f"{place.path}/{STATE}", way=WAY)
    entries = state.get("_data_files") if isinstance(state, dict) else None
    names = [entry.get("filename") for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    if not names:
        raise UserError(f"{plain(place.path)}/{STATE} names no data files: {WAY}")
    for name in names:
        if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", ".."):
            raise UserError(f"{plain(place.path)}/{STATE}: {plain(name)} is no file name in this folder: {WAY}")
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise UserError(f"{plain(place.path)} selects rows by indices: call flatten_indices() before save_to_disk")
    return [f"{place.path}/{name}" for name in names]


def _add_file(collector: Collector, pyarrow: Any, path: str, folder: str, options: ReadOptions, number: int) -> int:
    """Add the rows of an Arrow file, of which the first follows row `number`. Return the number of the last."""
    check_file(path, way=WAY)
    columns = options.image_column or "image", options.caption_column or "text"
    images = NamedImages(folder)
    try:
        # The file is mapped and not read: its values are at addresses within the map, which give their offsets.
        content = pyarrow.memory_map(path).read_buffer()
        with open_file(path) as file:
            is_file_format = file.read(6) == b"ARROW1"
        open_arrow = pyarrow.ipc.open_file if is_file_format else pyarrow.ipc.open_stream
        schema = open_arrow(content).schema
        fields = [schema.get_field_index(column) for column in columns]
        for column, field, setting in zip(columns, fields, ("image_column", "caption_column")):
            if field < 0:
                raise UserError(
                    f"{plain(path)} has no column '{column}', only {show_columns(schema.names, column)}: set {setting}"
                )
        _check_types(pyarrow, path, [schema.field(field) for field in fields])
        # Of the file format, pyarrow copies the columns that are chosen, so all are taken, which are mapped.
        chosen = [] if is_file_format else sorted(fields)
        reader = open_arrow(content, options=pyarrow.ipc.IpcReadOptions(included_fields=chosen))
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file_format else reader
        for batch in batches:
            batch.validate(full=True)  # offsets that lead out of a damaged file
            captions = batch.column(batch.schema.get_field_index(columns[1])).to_pylist()
            values = _images(pyarrow, batch.column(batch.schema.get_field_index(columns[0])), path, content)
            for (part, name), caption in zip(values, captions):
                number += 1
                _add_row(collector, images, path, number, part, name, caption)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{plain(path)} is no readable Arrow file ({plain(error, 100)}): {WAY}") from None
    return number


def _check_types(pyarrow: Any, path: str, fields: list[Any]) -> None:
    """Raise UserError if the first field holds no images or the second no texts."""
    image, caption = fields
    types = pyarrow.types
    kind, allowed = image.type, [types.is_binary, types.is_large_binary]
    if types.is_struct(kind):
        kind = next((kind.field(i).type for i in range(kind.num_fields) if kind.field(i).name == "bytes"), kind)
    else:
        allowed += [types.is_string, types.is_large_string]
    if not any(test(kind) for test in allowed):
        raise UserError(
            f"{plain(path)}: the column '{plain(image.name)}' is of the type {plain(image.type, 80)}, and images are "
            "bytes, paths, or both: set image_column"
        )
    if not any(test(caption.type) for test in (types.is_string, types.is_large_string, types.is_null)):
        raise UserError(
            f"{plain(path)}: the column '{plain(caption.name)}' is of the type {plain(caption.type, 80)}, and captions "
            "are texts: set caption_column"
        )


# The offset and the size of an image's bytes in its file.
_Part = tuple[int, int]


def _images(pyarrow: Any, column: Any, path: str, content: Any) -> list[tuple[Optional[_Part], Optional[str]]]:
    """Return (place of the bytes, path) of every image of a column, each None where it is missing."""
    types = pyarrow.types
    missing = [None] * len(column)
    if types.is_string(column.type) or types.is_large_string(column.type):
        return list(zip(missing, column.to_pylist()))
    if not types.is_struct(column.type):
        return list(zip(_parts(pyarrow, column, path, content), missing))
    fields = dict(zip((field.name for field in column.type), column.flatten()))
    parts = _parts(pyarrow, fields["bytes"], path, content) if "bytes" in fields else missing
    return list(zip(parts, fields["path"].to_pylist() if "path" in fields else missing))


def _parts(pyarrow: Any, values: Any, path: str, content: Any) -> list[Optional[_Part]]:
    """Return the place of every value of an array of bytes in the file that is mapped as `content`."""
    _, offsets, data = values.buffers()
    if data is None or offsets is None or values.null_count == len(values):
        return [None] * len(values)
    first = data.address - content.address
    if not 0 <= first <= content.size - data.size:
        raise UserError(f"{plain(path)} is compressed, in which no image can be found: {WAY}")
    ends = memoryview(offsets).cast("q" if pyarrow.types.is_large_binary(values.type) else "i")
    ends = ends[values.offset : values.offset + len(values) + 1]
    return [
        (first + ends[i], ends[i + 1] - ends[i]) if valid else None
        for i, valid in enumerate(values.is_valid().to_pylist())
    ]


def _add_row(
    collector: Collector,
    images: NamedImages,
    path: str,
    number: int,
    part: Optional[_Part],
    name: Optional[str],
    caption: Optional[str],
) -> None:
    shown = name or f"{number - 1:09d}"
    fault = ""
    found: Any = ""
    if part is not None:
        fault = "" if part[1] else "the image is empty"
        found = FilePart(path, *part, shown)
    elif not name:
        fault = "it has no image"
    else:
        inside = name[len(images.folder) + 1 :] if name.startswith(f"{images.folder}/") else name
        found, fault, similar = images.find(inside, f"{plain(path)}, row {number}")
        if similar:
            collector.count(SIMILAR_NAME, name)
    if not fault:
        caption = collector.own_or_class_tokens(caption.strip() if caption is not None else None, shown)
        fault = caption_fault(caption)
    if fault:
        collector.leave_out(shown, f"row {number}: {fault}")
    else:
        collector.add(Row(found, str(caption), 0, number))
