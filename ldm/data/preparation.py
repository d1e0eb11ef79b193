"""Prepares the data of a run: reads the rows, checks their images, and divides them into training and validation."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data import dataset, sources
from ldm.data.buckets import Buckets, check_multiple, join_buckets, make_buckets
from ldm.data.checked_rows import CheckedRows, check_rows
from ldm.data.draws import draws
from ldm.data.masks import Mask, MaskFinder
from ldm.data.prior import plan_prior, with_instance_prompt
from ldm.data.sources import image_text_csv
from ldm.data.sources.rows import Listing, ReadOptions, Row, Subset
from ldm.data.training_data import SubsetRules, TrainingData, subset_numbers
from ldm.data.upright import parse_color
from ldm.errors import UserError, plain
from ldm.settings.data import BucketSettings, CaptionSettings
from ldm.settings.model import ModelConfig
from ldm.settings.train import TrainSettings

logger = logging.getLogger(__name__)

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
    checked = check_rows(listing, settings, record, plain(str(settings.data_path)))
    out = _held_out(checked.listing, settings)
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
        validation = check_rows(other, settings, own_record, plain(settings.validation_data_path))
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


def _held_out(listing: Listing, settings: TrainSettings) -> np.ndarray:
    """Return which rows (N,) bool are held out for validation: a share of the images of each subset.

    Rows of the same image go together. Class images are not held out. One image of a subset is left to train on unless
    the share is 1, and none is held out where validation_data_path gives other images.
    """
    subsets = subset_numbers(listing.rows, len(listing.subsets))
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


def _report_trained(validation: CheckedRows, data: TrainingData) -> None:
    """Warn if images for validation are trained as well, as far as they are known by their content."""
    trained = set(data.contents or ())
    count = sum(content in trained for content in validation.contents or ())
    if count:
        logger.warning(
            "%s of %s images for validation are trained as well: their loss does not say how new images fare",
            f"{count:,}", f"{len(validation.listing.rows):,}",
        )  # fmt: skip


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
    checked: CheckedRows, settings: TrainSettings, config: ModelConfig, repeats: np.ndarray, weights: np.ndarray | None
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
    of_dataset = np.array([subset.dataset for subset in listing.subsets])[
        subset_numbers(listing.rows, len(listing.subsets))
    ]
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
