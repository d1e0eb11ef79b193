"""A folder of images with a caption file beside each: cat.png and cat.txt, or cat.caption."""

from __future__ import annotations

import os
import re

from tqdm import tqdm

from ldm.data.sources.names import LISTED_SUFFIXES, Names, split_suffix, walk
from ldm.data.sources.place import Place
from ldm.data.sources.rows import (
    LEFT_FOLDERS,
    LONGEST_CAPTION,
    NO_CAPTION,
    NO_IMAGE,
    OTHER_FILES,
    SAME_STEM,
    TWO_CAPTIONS,
    Collector,
    Listing,
    ReadOptions,
    Row,
)
from ldm.errors import UserError, plain
from ldm.files.inputs import read_small_text

NAME = "caption_files"
ABOUT = "images with caption files of the same name (.txt, or else .caption)"
EXTENSIONS = (".txt", ".caption")
MAX_BYTES = 4 * LONGEST_CAPTION  # of a caption file; a character takes up to four
HOW = (
    "write the caption of cat.png into cat.txt (or .caption, or set caption_extension), add img_txt.csv with the "
    'columns dir,text, or metadata.jsonl with lines {"file_name": "cat.png", "text": "..."}, or set class_tokens'
)


def caption_suffixes(options: ReadOptions) -> tuple[str, ...]:
    """Return the lower-case suffixes of caption files. A `caption_extension` such as "txt" gets its dot."""
    if not options.caption_extension:
        return EXTENSIONS
    suffix = options.caption_extension.lower()
    # Others stay as they are: sd-scripts takes "_tags.txt" for cat_tags.txt.
    return (f".{suffix}" if suffix[0].isalnum() else suffix,)


def detect(place: Place) -> bool:
    """Return whether a folder holds an image with a caption file beside it."""
    stems = {split_suffix(name)[0] for name in place.files if split_suffix(name)[1] in EXTENSIONS}
    return any(
        stem in stems and suffix in LISTED_SUFFIXES for stem, suffix in (split_suffix(name) for name in place.files)
    )


def read(place: Place, options: ReadOptions) -> Listing:
    """Return the images of a folder and of those below it, sorted by name. See `ldm.data.sources.read`."""
    collector = Collector(NAME, place.path, options)
    add_folder(collector, place.path, 0, options)
    check_captions(collector, place.path)
    subset = options.subset(NAME, place.path, place.path, "")
    return collector.listing((subset,))


def add_folder(collector: Collector, folder: str, subset: int, options: ReadOptions) -> int:
    """Add the images of a folder and their captions to `collector`. Return how many captions files gave.

    `options.recursive` includes the folders below. `subset` is the number of the subset that the rows belong to.

    Raises:
        UserError: A folder cannot be read.
    """
    found = 0
    # The bar appears only if reading takes longer than a second.
    with tqdm(desc="reading captions", unit="image", delay=1, leave=False) as bar:
        for names in walk(folder, options.recursive, options.leave_out):
            found += _add_images(collector, names, subset, options, bar)
            collector.count_all(LEFT_FOLDERS, sorted(names.left_out))
            if not options.recursive:
                collector.count_all(LEFT_FOLDERS, sorted(names.folders))
    return found


def check_captions(collector: Collector, folder: str) -> None:
    """Raise UserError if no image has a caption file or class tokens, or there are no images.

    Empty caption files are captions: training without captions is useful where somebody asked for it.
    """
    if collector.left_out:
        return
    if not collector.rows:
        raise UserError(
            f"{plain(folder)} has no images: give a folder with some ({', '.join(sorted(LISTED_SUFFIXES))})"
        )
    if collector.counted(NO_CAPTION) == len(collector.rows):
        number = re.match(r"\d+_", os.path.basename(folder))
        hint = f"; for captions from the name of this folder, give the one above, {plain(os.path.dirname(folder))}"
        raise UserError(
            f"{plain(folder)} has {len(collector.rows):,} images and no caption: {HOW}{hint if number else ''}"
        )


def _add_images(collector: Collector, names: Names, subset: int, options: ReadOptions, bar: tqdm) -> int:
    suffixes = caption_suffixes(options)
    captions: dict[str, dict[str, str]] = {suffix: {} for suffix in suffixes}  # suffix -> stem -> file name
    images: list[tuple[str, str]] = []  # file name and stem
    for name in names.files:
        stem, suffix = split_suffix(name)
        if suffix in LISTED_SUFFIXES:
            images.append((name, stem))
        elif (longer := next((end for end in suffixes if name.lower().endswith(end)), None)) is not None:
            captions[longer][name[: -len(longer)]] = name
        else:
            collector.count(OTHER_FILES, name)

    found = 0
    used: dict[str, str] = {}
    folder = names.folder
    for name, stem in images:
        bar.update()
        files = [captions[suffix][stem] for suffix in suffixes if stem in captions[suffix]]
        if stem in used and files:
            collector.count(SAME_STEM, name)
        used[stem] = name
        caption = None
        if files:
            if len(files) > 1:
                collector.count(TWO_CAPTIONS, name)
            try:
                caption = read_caption(f"{folder}/{files[0]}")
            except UserError as error:
                collector.leave_out(f"{folder}/{name}", f"its caption {plain(error, 300)}")
                continue
            found += 1
        collector.add(Row(f"{folder}/{name}", collector.own_or_class_tokens(caption, name), subset, 0))
    for suffix in suffixes:
        collector.count_all(NO_IMAGE, (name for stem, name in captions[suffix].items() if stem not in used))
    return found


def read_caption(path: str) -> str:
    """Return the caption in a file, without white space at its ends.

    Raises:
        UserError: The file cannot be read, is too large, is UTF-16 or another encoding than UTF-8, or no text.
    """
    caption = read_small_text(path, way="write the caption as UTF-8 text", most=MAX_BYTES).strip()
    if len(caption) > LONGEST_CAPTION:
        raise UserError(f"{plain(path)} has {len(caption):,} characters, at most {LONGEST_CAPTION:,} are read")
    return caption
