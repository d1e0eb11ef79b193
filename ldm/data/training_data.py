"""What a training sees of a data set: its rows, with the captions, crops and buckets that their subsets ask for."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ldm.data import dataset, sources
from ldm.data.buckets import Buckets, Size, check_multiple, join_buckets, make_buckets
from ldm.data.captions import cut_captions, cut_report, final_caption, whole_caption
from ldm.data.checked_images import broken_reason, check_images, each_image
from ldm.data.content import FileHash, content_key, content_key_of, file_hash
from ldm.data.draws import draws
from ldm.data.masks import ALPHA, Mask, MaskFinder, load_image_and_mask, load_mask
from ldm.data.prior import plan_prior, with_instance_prompt
from ldm.data.sources import image_text_csv
from ldm.data.sources.row_file import RowFile
from ldm.data.sources.rows import FilePart, ImageFile, Listing, ReadOptions, Row, Subset, image_name, report_left_out
from ldm.data.transforms import WHITE, Color, ImageNotes, load_image, parse_color, read_size
from ldm.errors import UserError, plain
from ldm.settings.data import BucketSettings, CaptionSettings
from ldm.settings.model import ModelConfig
from ldm.settings.train import TrainSettings
from ldm.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

MAX_CHECKED = 20_000  # images that are decoded before the first step, where check_images does not say it
MAX_BAD_FRACTION = 0.10
MAX_SAMPLES = 100_000_000  # of an epoch, whose order takes 20 bytes for each
# Settings that have an effect only with something else in the data.
_NEED_DATA = {
    "unmasked_weight": "masks (masked_loss or alpha_mask)",
    "normalize_masked_area_loss": "masks (masked_loss or alpha_mask)",
    "bucket_no_upscale": "enable_bucket",
    "max_buckets": "enable_bucket",
    "min_bucket_reso": "enable_bucket",
    "max_bucket_reso": "enable_bucket",
    "bucket_reso_steps": "enable_bucket",
    "prior_loss_weight": "class images",
    "num_class_images": "class images",
    "class_prompt": "class images",
    "class_data_dir": "class images",
}


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
        arrays = [_subsets(self.rows, len(self.subsets)), buckets.of_row, buckets.repeats, buckets.scales, self.weights]
        digests = [None if array is None else hashlib.sha256(array.tobytes()).hexdigest() for array in arrays]
        return [digests, buckets.sizes, [repr(rules) for rules in self.rules]]


def data_of_rows(rows: Sequence[dataset.Row], size: int, settings: TrainSettings, channels: int = 3) -> TrainingData:
    """Return the rows of an img_txt.csv that were read and checked before as the data of a training in one size."""
    subset = Subset(image_text_csv.NAME, str(rows[0].path.parent), "")
    return TrainingData(
        [Row(str(row.path), row.caption, 0, 0) for row in rows],
        (subset,),
        (_rules(settings, subset),),
        Buckets.single((size, size), len(rows)),
        [row.content for row in rows],
        channels,
        parse_color("alpha_color", settings.alpha_color),
    )


def read_listing(settings: TrainSettings) -> Listing:
    """Read the rows of a run's data set, in any layout. No image is opened.

    Raises:
        UserError: The data set cannot be read, or too many of its rows are unusable.
    """
    assert settings.data_path is not None
    return _read(settings.data_path, settings)


def _read(place: str, settings: TrainSettings) -> Listing:
    listing = sources.read(place, _read_options(settings))
    return listing if settings.instance_prompt is None else with_instance_prompt(listing, settings.instance_prompt)


def prepare_data(
    listing: Listing, settings: TrainSettings, config: ModelConfig, record: Path | None = None
) -> tuple[TrainingData, TrainingData | None]:
    """Check the images of a listing, and return what training sees of them and what is held out for validation.

    Args:
        listing: The rows, class images included.
        settings: Those of the run.
        config: Of the model, which takes only some sizes.
        record: File that remembers which images decode (see `CheckedImages`). None decodes all of them.

    Raises:
        UserError: Too many images are unusable, none is left to train on, or settings contradict each other.
    """
    checked = _check(listing, settings, record, plain(str(settings.data_path)))
    out = held_out(checked.listing, settings)
    training = checked.take(np.flatnonzero(~out))
    plan = plan_prior(training.listing, settings.prior_loss_weight)
    for line in plan.lines:
        logger.info("%s", line)
    used = np.flatnonzero(plan.repeats)
    weights = plan.weights[used] if plan.is_weighted else None
    data = _prepared(training.take(used), settings, config, plan.repeats[used], weights)
    if data.masks is not None and all(mask is None for mask in data.masks):
        raise UserError(
            "masked_loss is set and no image has a mask: give conditioning_data_dir, a folder with images of the same "
            "names, or alpha_mask"
        )
    for line in _without_effect(settings, data):
        logger.warning("%s", line)
    has_buckets = any(subset.settings.get("enable_bucket", settings.enable_bucket) for subset in listing.subsets)
    if has_buckets or len(data.buckets.sizes) > 1:
        for line in data.buckets.report(data.name):
            logger.info("%s", line)
    if settings.validation_data_path is not None:
        other = _read(settings.validation_data_path, settings)
        own_record = None if record is None else record.with_name(f"validation_{record.name}")
        validation = _check(other, settings, own_record, plain(settings.validation_data_path))
        _report_trained(validation, data)
    elif out.any():
        validation = checked.take(np.flatnonzero(out))
    else:
        if settings.validation_split:
            logger.warning(
                "validation_split %g of %s images is none: give a larger share to hold images out",
                settings.validation_split, f"{len(data.rows):,}",
            )  # fmt: skip
        return data, None
    logger.info(
        "%s images are for validation, %s for training", f"{len(validation.listing.rows):,}", f"{len(data.rows):,}"
    )
    return data, _prepared(validation, settings, config, np.ones(len(validation.listing.rows), np.int64), None)


def _without_effect(settings: TrainSettings, data: TrainingData) -> list[str]:
    """Return a line for each setting that is given but has no effect on this data, for a warning."""
    lines = {line: None for rules in data.rules for line in rules.captions.without_effect()}
    default = TrainSettings()
    given = {name for name in _NEED_DATA if getattr(settings, name) != getattr(default, name)}
    without = {
        "masks (masked_loss or alpha_mask)": data.masks is None,
        "enable_bucket": not any(
            subset.settings.get("enable_bucket", settings.enable_bucket) for subset in data.subsets
        ),
        "class images": not any(subset.is_reg for subset in data.subsets),
    }
    return [
        *lines,
        *(
            f"{name} has no effect without {need}"
            for name, need in _NEED_DATA.items()
            if name in given and without[need]
        ),
    ]


def _prepared(
    checked: _Checked, settings: TrainSettings, config: ModelConfig, repeats: np.ndarray, weights: np.ndarray | None
) -> TrainingData:
    listing, side = checked.listing, settings.image_size or config.image_size
    if repeats.sum() > MAX_SAMPLES:
        most = listing.rows[int(repeats.argmax())]
        raise UserError(
            f"an epoch would have {int(repeats.sum()):,} samples, at most {MAX_SAMPLES:,} are possible: "
            f"{plain(listing.subsets[most.subset].folder)} is repeated {int(repeats.max()):,} times; lower "
            "num_repeats, or the number that the folder's name begins with"
        )
    rules = tuple(_rules(settings, subset) for subset in listing.subsets)
    of_dataset = np.array([subset.dataset for subset in listing.subsets])[_subsets(listing.rows, len(listing.subsets))]
    parts = []
    for number in np.unique(of_dataset):
        places = np.flatnonzero(of_dataset == number)
        subset = listing.subsets[listing.rows[places[0]].subset]
        sides: Any = subset.settings.get("resolution", (side, side))
        resolution = sides[0], sides[1]
        if checked.sizes is None:
            for length in resolution:
                check_multiple("the resolution", length, config.size_multiple)
            parts.append((places, Buckets.single(resolution, len(places), repeats[places])))
        else:
            own = BucketSettings(**_own(subset, settings, BucketSettings))  # type: ignore[arg-type]
            buckets = make_buckets(checked.sizes[places], resolution, own, config.size_multiple, repeats[places])
            parts.append((places, buckets))
    buckets = parts[0][1] if len(parts) == 1 else join_buckets(parts)
    color = parse_color("alpha_color", settings.alpha_color)
    masks = _masks(listing, settings)
    return TrainingData(
        listing.rows, listing.subsets, rules, buckets, checked.contents, config.image_channels, color, weights, masks
    )


def _masks(listing: Listing, settings: TrainSettings) -> list[Mask | None] | None:
    """Return the mask of each row's image, None where neither masked_loss nor alpha_mask is set."""
    subsets = listing.subsets
    if not settings.masked_loss:
        own = any(subset.settings.get("conditioning_data_dir") for subset in subsets)
        if own:
            logger.warning("conditioning_data_dir has no effect without masked_loss: give that too")
        subsets = tuple(
            dataclasses.replace(
                subset, settings={k: v for k, v in subset.settings.items() if k != "conditioning_data_dir"}
            )
            for subset in subsets
        )
        if not any(subset.settings.get("alpha_mask", settings.alpha_mask) for subset in subsets):
            return None
    finder = MaskFinder(subsets, settings.conditioning_data_dir, settings.alpha_mask)
    return [None if subsets[row.subset].is_reg else finder.find(row) for row in listing.rows]


def _read_options(settings: TrainSettings) -> ReadOptions:
    """Return how the data set of a run is read."""
    folders = settings.conditioning_data_dir, settings.class_data_dir
    return ReadOptions(
        image_column=settings.image_column,
        caption_column=settings.caption_column,
        caption_extension=settings.caption_extension,
        # Without a caption, an image has the token that is learned, for which ldm.training.inputs draws a template.
        class_tokens=settings.instance_prompt or settings.placeholder_token,
        num_repeats=settings.num_repeats,
        caption_separator=settings.caption_separator,
        rows_on_disk=settings.shuffle_buffer_size > 0,
        leave_out=tuple(os.path.realpath(folder) for folder in folders if folder is not None),
    )


def _own(subset: Subset, settings: object, names: type) -> dict[str, object]:
    """Return the values of the settings that `names` declares: the subset's own, or else those of the run."""
    return {
        field.name: subset.settings.get(field.name, getattr(settings, field.name))
        for field in dataclasses.fields(names)
    }


def _rules(settings: TrainSettings, subset: Subset) -> SubsetRules:
    batch_size = subset.settings.get("batch_size")
    if batch_size not in (None, settings.train_batch_size):
        raise UserError(
            f"{plain(settings.data_path)}: batch_size is {batch_size}, and train_batch_size "
            f"{settings.train_batch_size}: all data sets are trained with the same; give --train_batch_size "
            f"{batch_size}, or remove batch_size"
        )
    captions = CaptionSettings(**_own(subset, settings, CaptionSettings))  # type: ignore[arg-type]
    return SubsetRules(
        captions,
        bool(subset.settings.get("random_crop", settings.random_crop)),
        bool(subset.settings.get("random_flip", settings.random_flip)),
        subset.layout == image_text_csv.NAME,
    )


def _subsets(rows: Sequence[Row], count: int) -> np.ndarray:
    """Return the number of the subset (N,) of each row. There are `count` subsets."""
    if count == 1:
        return np.zeros(len(rows), np.int32)
    return np.fromiter((row.subset for row in rows), np.int32, len(rows))


class _Checked(NamedTuple):
    """The rows whose images can be used, as far as they were read."""

    listing: Listing
    contents: list[FileHash] | None
    sizes: np.ndarray | None  # (N, 2) width and height, upright

    def take(self, places: np.ndarray) -> _Checked:
        """Return some of the rows. Raises UserError if there are none."""
        if not len(places):
            raise UserError("the data set has no usable images to train on: add images, or hold fewer of them out")
        if len(places) == len(self.listing.rows):
            return self
        rows, contents = self.listing.rows, self.contents
        return _Checked(
            self.listing._replace(
                rows=rows.take(places) if isinstance(rows, RowFile) else [rows[place] for place in places]
            ),
            None if contents is None else [contents[place] for place in places],
            None if self.sizes is None else self.sizes[places],
        )


def _report_trained(validation: _Checked, data: TrainingData) -> None:
    """Warn if images for validation are trained as well, as far as they are known by their content."""
    trained = set(data.contents or ())
    count = sum(content in trained for content in validation.contents or ())
    if count:
        logger.warning(
            "%s of %s images for validation are trained as well: their loss does not say how new images fare",
            f"{count:,}", f"{len(validation.listing.rows):,}",
        )  # fmt: skip


def _check(listing: Listing, settings: TrainSettings, record: Path | None, place: str) -> _Checked:
    """Leave out the rows whose images do not decode or are too small, as far as images are read at all.

    `place` is that of the data set, for errors.
    """
    decodes = len(listing.rows) <= MAX_CHECKED if settings.check_images is None else settings.check_images
    needs_sizes = bool(settings.image_filter_size) or any(
        subset.settings.get("enable_bucket", settings.enable_bucket) for subset in listing.subsets
    )
    if not decodes and not needs_sizes:
        return _Checked(listing, None, None)
    images = list(dict.fromkeys(row.image for row in listing.rows))
    contents: dict[ImageFile, FileHash] = {}
    sizes: dict[ImageFile, Size] = {}
    if decodes:
        found, faults = check_images(images, record)
        contents = {image: each.content for image, each in found.items()}
        sizes = {image: each.size for image, each in found.items()}
    else:
        sizes, faults = each_image(images, read_size, "reading image sizes")

    places: list[int] = []
    broken: list[tuple[str, str]] = []
    small = 0
    for number, row in enumerate(listing.rows):
        if row.image in faults:
            broken.append((listing.name(row), broken_reason(listing, row, faults)))
        elif min(sizes[row.image]) < settings.image_filter_size:
            small += 1
        else:
            places.append(number)
    if broken:
        count, before = len(listing.rows) + len(listing.left_out), len(listing.left_out)
        report_left_out(place, broken, count, MAX_BAD_FRACTION, before)
    if small:
        logger.info(
            "%d of %d images left out: a side is shorter than image_filter_size %d",
            small, len(listing.rows), settings.image_filter_size,
        )  # fmt: skip
    checked = _Checked(listing, None, None).take(np.array(places, np.int64))
    rows = checked.listing.rows
    return checked._replace(
        contents=[contents[row.image] for row in rows] if decodes else None,
        sizes=np.array([sizes[row.image] for row in rows], np.int64) if needs_sizes else None,
    )


def held_out(listing: Listing, settings: TrainSettings) -> np.ndarray:
    """Return which rows (N,) bool are held out for validation: a share of the images of each subset.

    Rows of the same image go together. Class images are not held out. One image of a subset is left to train on unless
    the share is 1, and none is held out where validation_data_path gives other images.
    """
    subsets = _subsets(listing.rows, len(listing.subsets))
    out = np.zeros(len(subsets), bool)
    for number, subset in enumerate(listing.subsets):
        share: Any = subset.settings.get("validation_split", settings.validation_split)
        if not share or subset.is_reg or settings.validation_data_path is not None:
            continue
        seed: Any = subset.settings.get("validation_seed", settings.validation_seed)
        places = np.flatnonzero(subsets == number)
        images = list(dict.fromkeys(listing.rows[place].image for place in places))
        count = len(images) if share == 1 else min(round(len(images) * share), len(images) - 1)
        seed = settings.seed if seed is None else seed
        chosen = {images[i] for i in draws(seed, "validation", number).permutation(len(images))[: max(0, count)]}
        out[places] = [listing.rows[place].image in chosen for place in places]
    return out
