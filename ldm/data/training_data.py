"""What a training sees of a data set: its rows, with the captions, crops and buckets that their subsets ask for."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ldm.data.buckets import Buckets
from ldm.data.captions import cut_captions, cut_report, final_caption, whole_caption
from ldm.data.content import FileHash, content_key, content_key_of, file_hash
from ldm.data.masks import ALPHA, Mask, load_image_and_mask, load_mask
from ldm.data.sources.row_file import RowFile
from ldm.data.sources.rows import FilePart, Row, Subset, image_name
from ldm.data.transforms import load_image
from ldm.data.upright import WHITE, Color, ImageNotes
from ldm.errors import plain
from ldm.settings.data import CaptionSettings
from ldm.tokenizer import Tokenizer


class SubsetRules(NamedTuple):
    """What is made of the images and captions of a subset."""

    captions: CaptionSettings
    random_crop: bool
    random_flip: bool
    joins_lines: bool  # img_txt.csv: a caption of several lines is one text, as in earlier versions


@dataclass
class TrainingData:
    """The rows of a training, in the order that batches count them by.

    Args:
        rows: The rows that are used.
        subsets: Those that `Row.subset` counts.
        rules: Those of each subset.
        buckets: The size that each row's image is trained in.
        contents: The hash of each image's content, if all images were read. Otherwise images are known by name, size
            and date, and one that turns out to be broken is replaced by another row.
        channels: Of the images: 3 for RGB, 1 for grey.
        alpha_color: Behind transparent parts.
        weights: Factor (N,) float32 of each row's loss, None if it is 1 for all.
        masks: Of each row's image, None if there are no masks.
        notes: What is said of images that are read all the same.
    """

    rows: Sequence[Row]  # a list, or a RowFile
    subsets: tuple[Subset, ...]
    rules: tuple[SubsetRules, ...]
    buckets: Buckets
    contents: list[FileHash] | None = None
    channels: int = 3
    alpha_color: Color = WHITE
    weights: np.ndarray | None = None
    masks: list[Mask | None] | None = None
    notes: ImageNotes = dataclasses.field(default_factory=ImageNotes)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def augments(self) -> bool:
        """Whether an image may be cropped or mirrored at random, so that it is another one at every step."""
        return any(rules.random_crop or rules.random_flip for rules in self.rules)

    @property
    def fills_batches(self) -> bool:
        """Whether the last batch of an epoch is filled: with buckets, which may be small, and with repeats."""
        return len(self.buckets.sizes) > 1 or bool((self.buckets.repeats > 1).any())

    @property
    def is_weighted(self) -> bool:
        """Whether the loss has weights: those of masks or of class images."""
        return self.masks is not None or self.weights is not None

    def file_of_row(self) -> np.ndarray | None:
        """Return the number (N,) int32 of the file that holds each row's image, None if each has a file of its own.

        Numbers are given in the order of the first rows.
        """
        if isinstance(self.rows, RowFile):
            return self.rows.file_numbers()
        if not any(isinstance(row.image, FilePart) for row in self.rows):
            return None
        numbers: dict[str, int] = {}
        files = (row.image.file if isinstance(row.image, FilePart) else row.image for row in self.rows)
        return np.fromiter((numbers.setdefault(file, len(numbers)) for file in files), np.int32, len(self.rows))

    @cached_property
    def dropout(self) -> np.ndarray:
        """The share (subsets,) float64 of the captions that become empty."""
        return np.array([rules.captions.caption_dropout for rules in self.rules])

    def name(self, row: int) -> str:
        """Return the name of a row's image relative to the folder of its subset."""
        found = self.rows[row]
        return image_name(found.image, self.subsets[found.subset].folder)

    def is_class_image(self, row: int) -> bool:
        """Return whether a row is one of DreamBooth's class images."""
        return self.subsets[self.rows[row].subset].is_reg

    def source(self, row: int) -> str:
        """Return the path of a row's image, for messages; of one inside a larger file, that file's path as well."""
        image = self.rows[row].image
        return f"{plain(image.file)}: {plain(image.name)}" if isinstance(image, FilePart) else plain(image)

    def content(self, row: int) -> FileHash | str:
        """Return what tells a row's image from others: the hash of its content, or its name, size and date."""
        if self.contents is not None:
            return self.contents[row]
        image = self.rows[row].image
        if isinstance(image, FilePart):
            return f"{self._file_content(image.file)}, {image.offset}, {image.size}"
        return self._file_content(image)

    @staticmethod
    def _file_content(path: str) -> str:
        try:
            status = os.stat(path)
        except (OSError, ValueError):  # loading the image raises the error
            return repr(path)
        return repr((path, status.st_size, status.st_mtime_ns))

    def caption(self, row: int, rng: np.random.Generator, step: int, epoch: int, total_steps: int | None) -> str:
        """Return the caption of a row at a step (see `ldm.data.captions.final_caption`), before it may be dropped."""
        rules = self.rules[self.rows[row].subset].captions
        return final_caption(self.text(row), rules, rng, step=step, epoch=epoch + 1, total_steps=total_steps)

    def whole_caption(self, row: int, rng: np.random.Generator) -> str:
        """Return the caption of a row of which nothing is dropped (see `ldm.data.captions.whole_caption`)."""
        return whole_caption(self.text(row), self.rules[self.rows[row].subset].captions, rng)

    @cached_property
    def has_one_caption(self) -> bool:
        """Whether the caption of a row never changes, but for those that become empty."""
        return not any(
            captions.changes_tags or captions.enable_wildcard or captions.caption_dropout_every_n_epochs
            for captions, *_ in self.rules
        )

    def image_and_mask(
        self, row: int, factor: int, rng: np.random.Generator | None = None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Return a row's image as float32 (C, height, width) in [-1, 1], and its mask if it has one.

        Args:
            row: Its number.
            factor: Pixels of the image for a pixel of the mask, along a side.
            rng: Draws crop and mirroring. None: neither.

        Raises:
            UserError: A file is missing, is not an image, is damaged or too large.
        """
        rules = self.rules[self.rows[row].subset]
        return load_image_and_mask(
            self.rows[row].image, None if self.masks is None else self.masks[row], self.buckets.size(row), factor,
            channels=self.channels, random_crop=rng is not None and rules.random_crop,
            random_flip=rng is not None and rules.random_flip, rng=rng, scale=self.buckets.scale(row),
            alpha_color=self.alpha_color, notes=self.notes,
        )  # fmt: skip

    def image(self, row: int) -> np.ndarray:
        """Return a row's image without random crop and mirroring. See `image_and_mask`."""
        return load_image(
            self.rows[row].image, self.buckets.size(row), channels=self.channels, scale=self.buckets.scale(row),
            alpha_color=self.alpha_color, notes=self.notes,
        )  # fmt: skip

    def mask(self, row: int, factor: int) -> np.ndarray | None:
        """Return the mask of `image` as float32 (1, h, w) in [0, 1]. See `image_and_mask`."""
        mask = None if self.masks is None else self.masks[row]
        if mask is None:
            return None
        return load_mask(mask, self.rows[row].image, self.buckets.size(row), factor, scale=self.buckets.scale(row))

    def mask_content(self, row: int) -> str:
        """Return what tells a row's mask from others, "" if it has none."""
        mask = None if self.masks is None else self.masks[row]
        if mask is None:
            return ""
        return f"alpha {self.content(row)}" if mask is ALPHA else self._file_content(str(mask))

    def cut_report(self, tokenizer: Tokenizer) -> str:
        """Return one line on the captions of more than 75 tokens, empty if there are none."""
        cut = []
        for place, row in enumerate(self.rows):  # in one pass, because the rows may be on disk
            found = cut_captions((self._text(row),), self.rules[row.subset].captions, tokenizer)
            cut += [caption._replace(row=place) for caption in found]
        return cut_report(cut, len(self.rows), self.name)

    def text(self, row: int) -> str:
        """Return the caption of a row as the data set gives it, in one line where lines have no meaning."""
        return self._text(self.rows[row])

    def _text(self, row: Row) -> str:
        rules = self.rules[row.subset]
        joins = rules.joins_lines and not rules.captions.enable_wildcard
        return " ".join(row.caption.split()) if joins else row.caption

    def fingerprint(self) -> str:
        """Return a hash of all that decides what training sees of the data: images, captions and their rules."""
        if self.contents is not None:
            parts: Iterator[FileHash | str] = (
                part for row, content in zip(self.rows, self.contents) for part in (content, row.caption)
            )
        else:
            folders = [subset.folder for subset in self.subsets]
            parts = (part for row in self.rows for part in (image_name(row.image, folders[row.subset]), row.caption))
        rules = self._own_rules()
        if self.masks is not None:
            rules.append([self._mask_fingerprint(row) for row in range(len(self.rows))])
        return content_key_of(chain(["rows"], parts, [repr(rules)] if rules else []))

    def content_digest(self) -> str | None:
        """Return a hash of the images with their captions, masks and repeats, whatever their order, names and layout.

        What a data set sets itself is part of it, class images are not. It is None if not all images were read.
        """
        if self.contents is None:
            return None
        own = [
            repr(sorted((name, value) for name, value in subset.settings.items() if name != "conditioning_data_dir"))
            for subset in self.subsets
        ]
        parts = sorted(
            content_key(self.contents[place], self._text(row), self._mask_fingerprint(place), repeats, own[row.subset])
            for place, (row, repeats) in enumerate(zip(self.rows, self.buckets.repeats.tolist()))
            if not self.subsets[row.subset].is_reg
        )
        return content_key_of(["images and captions", *parts])

    def _mask_fingerprint(self, row: int) -> str:
        mask = self.masks[row] if self.masks is not None else None
        if isinstance(mask, str):
            return file_hash(Path(mask)) if self.contents is not None else os.path.basename(mask)
        return "" if mask is None else "alpha"

    def _own_rules(self) -> list[object]:
        """Return what the settings of a run do not say: subsets, repeats and the settings of the data set itself.

        It is nothing for a data set of one subset without repeats and settings, as in earlier versions.
        """
        plain_data = len(self.subsets) < 2 and not self.subsets[0].settings and not (self.buckets.repeats > 1).any()
        if plain_data and self.weights is None:
            return []
        buckets = self.buckets
        arrays = [
            subset_numbers(self.rows, len(self.subsets)),
            buckets.of_row,
            buckets.repeats,
            buckets.scales,
            self.weights,
        ]
        digests = [None if array is None else hashlib.sha256(array.tobytes()).hexdigest() for array in arrays]
        return [digests, buckets.sizes, [repr(rules) for rules in self.rules]]


def subset_numbers(rows: Sequence[Row], count: int) -> np.ndarray:
    """Return the number of the subset (N,) of each row. There are `count` subsets."""
    if count == 1:
        return np.zeros(len(rows), np.int32)
    return np.fromiter((row.subset for row in rows), np.int32, len(rows))
