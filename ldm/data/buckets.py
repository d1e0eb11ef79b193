"""Aspect-ratio buckets: images of similar shape are trained together, cropped to one size and never stretched.

`make_buckets` sorts the images of a data set into sizes as kohya's sd-scripts does, `crop_box` says which part of an
image is trained. `ldm.data.batches.BatchOrder` says which images are in a batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Callable, NamedTuple

import numpy as np

from ldm.errors import UserError, plain
from ldm.settings.data import BucketSettings

Size = tuple[int, int]  # width and height in pixels
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels


def check_multiple(name: str, value: int, multiple: int) -> None:
    """Check that a size in pixels is one that the model takes.

    Args:
        name: The setting, for the error.
        multiple: `ModelConfig.size_multiple`: the VAE's factor times 2 for each level of the UNet but the first.

    Raises:
        UserError: It is no multiple.
    """
    if value % multiple:
        raise UserError(
            f"{name} is {value}: this model takes widths and heights that are multiples of {multiple} pixels (the "
            f"VAE's factor, times 2 for each halving in the UNet); {math.ceil(value / multiple) * multiple} is the next"
        )


def bucket_sizes(resolution: Size, settings: BucketSettings, multiple: int) -> list[Size]:
    """Return the sizes of the buckets, sorted by width and height.

    They are the largest square that has at most the area of `resolution`, and for each width the greatest height that
    keeps within this area, in both orientations. A `min_bucket_reso` that is no multiple of `bucket_reso_steps` is
    rounded down, and a `max_bucket_reso` up.

    Args:
        multiple: Of which the model takes sizes: see `check_multiple`.

    Raises:
        UserError: The settings contradict each other or do not fit the model.
    """
    step = settings.bucket_reso_steps
    check_multiple("bucket_reso_steps", step, multiple)
    least, most = settings.min_bucket_reso // step * step, math.ceil(settings.max_bucket_reso / step) * step
    width, height = resolution
    if min(resolution) < least:
        raise UserError(
            f"min_bucket_reso {settings.min_bucket_reso} is above the resolution {_text(resolution)}: lower it"
        )
    if max(resolution) > most:
        raise UserError(
            f"max_bucket_reso {settings.max_bucket_reso} is below the resolution {_text(resolution)}: raise it"
        )
    area = width * height
    square = math.isqrt(area) // step * step
    if square == 0:
        raise UserError(
            f"the resolution {_text(resolution)} is below bucket_reso_steps {step}: lower bucket_reso_steps or raise "
            "the resolution"
        )
    sizes = {(square, square)}
    for side in range(max(least, step), most + 1, step):
        other = min(most, area // side // step * step)
        if other >= max(least, step):
            sizes |= {(side, other), (other, side)}
    return sorted(sizes)


def crop_box(image_size: Size, target: Size, scale: float | None = None, rng: np.random.Generator | None = None) -> Box:
    """Return the part of an image that is scaled to `target`. It has the target's aspect, so nothing is stretched.

    sd-scripts scales the image to whole pixels first, and crops then. The parts differ by less than a pixel.

    Args:
        image_size: Of the image, upright.
        target: The size of the result.
        scale: Pixels of the result for a pixel of the image, for `bucket_no_upscale`. It is raised where the image
            would not cover the target. Without it, the largest part of the image is taken.
        rng: Draws where the part lies. Without it, it is in the middle.
    """
    part = _part(image_size, target, scale)
    margins = [side - length for side, length in zip(image_size, part)]
    if rng is not None:
        starts: list[float] = [int(rng.integers(int(margin) + 1)) for margin in margins]
    elif scale == 1.0:
        starts = [margin // 2 for margin in margins]  # at whole pixels, so that they are taken as they are
    else:
        starts = [margin / 2 for margin in margins]
    return starts[0], starts[1], starts[0] + part[0], starts[1] + part[1]


def _part(image_size: Size, target: Size, scale: float | None) -> tuple[float, float]:
    """Return width and height of the part of an image that becomes the target."""
    (width, height), (target_width, target_height) = image_size, target
    if scale is not None and target_width <= width * scale and target_height <= height * scale:
        return target_width / scale, target_height / scale
    # Products of integers, so that the whole width or height is exact.
    if target_width * height >= target_height * width:
        return width, width * target_height / target_width
    return height * target_width / target_height, height


class BucketReport(NamedTuple):
    """What the images of a bucket lose."""

    size: Size
    images: int
    samples: int  # images with their repeats
    mean: float  # share of the images that is cropped away
    worst: float
    worst_row: int


@dataclass(frozen=True)
class Buckets:
    """The buckets of a data set of N images."""

    sizes: list[Size]  # of the buckets in use, sorted
    of_row: np.ndarray  # (N,) int32: the bucket of each row
    cropped: np.ndarray  # (N,) float32: the share of each image that is cropped away
    repeats: np.ndarray  # (N,) int64
    scales: np.ndarray | None = None  # (N,) float64 with bucket_no_upscale, else NaN: see `crop_box`
    enlarged: int = 0  # images that are enlarged in spite of bucket_no_upscale
    changes: list[str] = field(default_factory=list)  # what was rounded or merged

    @classmethod
    def single(cls, size: Size, count: int, repeats: np.ndarray | None = None) -> Buckets:
        """Return one bucket of `count` images, whose own sizes are not known."""
        zeros = np.zeros(count, np.float32)
        return cls([size], zeros.astype(np.int32), zeros, _repeats(repeats, count))

    @property
    def graphs(self) -> int:
        """How many training steps are compiled: one for each size."""
        return len(self.sizes)

    def size(self, row: int) -> Size:
        """Return the width and height that a row's image is trained with."""
        return self.sizes[self.of_row[row]]

    def scale(self, row: int) -> float | None:
        """Return the `scale` of `crop_box` for a row's image."""
        return None if self.scales is None or np.isnan(self.scales[row]) else float(self.scales[row])

    def reports(self) -> Iterator[BucketReport]:
        """Yield what each bucket holds and loses."""
        for bucket, size in enumerate(self.sizes):
            rows = np.flatnonzero(self.of_row == bucket)
            cropped = self.cropped[rows]
            worst = int(cropped.argmax())
            yield BucketReport(
                size, len(rows), int(self.repeats[rows].sum()), float(cropped.mean()), float(cropped[worst]),
                int(rows[worst]),
            )  # fmt: skip

    def report(self, name_of: Callable[[int], str]) -> list[str]:
        """Return the lines that say before training what each bucket holds, what is cropped and what is compiled.

        Args:
            name_of: Returns the name of a row's image.
        """
        count = len(self.of_row)
        samples = int(self.repeats.sum())
        repeated = f" ({samples:,} with repeats)" if samples != count else ""
        worst = int(self.cropped.argmax())
        lines = [
            *self.changes,
            f"{_count(count, 'image', 'images')}{repeated} in {_count(len(self.sizes), 'bucket', 'buckets')}: "
            f"{_count(self.graphs, 'graph is', 'graphs are')} compiled",
        ]
        for bucket in self.reports():
            crop = f"{bucket.mean:.1%} cropped away on average, {bucket.worst:.1%} at most"
            repeated = f" ({bucket.samples:,} with repeats)" if bucket.samples != bucket.images else ""
            lines.append(f"  {_text(bucket.size)}: {_count(bucket.images, 'image', 'images')}{repeated}, {crop}")
        lines.append(
            f"cropped away: {self.cropped.mean():.1%} of an image on average, {self.cropped[worst]:.1%} at most "
            f"({plain(name_of(worst), 60)})"
        )
        if self.enlarged:
            lines.append(
                f"{_count(self.enlarged, 'image is', 'images are')} enlarged in spite of bucket_no_upscale, to cover "
                "the bucket"
            )
        return lines


def make_buckets(
    image_sizes: np.ndarray | Sequence[Size],
    resolution: Size,
    settings: BucketSettings,
    multiple: int,
    repeats: np.ndarray | Sequence[int] | None = None,
) -> Buckets:
    """Sort images into buckets.

    An image belongs to the bucket with the least difference of width / height, the first of equals. With
    `bucket_no_upscale`, only images of more pixels than `resolution` are scaled, down to these, and cropped to
    multiples of `bucket_reso_steps`; those of a merged bucket are scaled to cover the other one. Without
    `enable_bucket`, the resolution is the only bucket.

    Args:
        image_sizes: Widths and heights (N, 2) of the images, upright.
        resolution: Width and height of which a bucket has at most the area.
        multiple: Of which the model takes sizes: see `check_multiple`.
        repeats: How often each row is used in an epoch. None: once.

    Raises:
        UserError: There are no images, or the settings contradict each other or do not fit the model.
    """
    sizes = np.asarray(image_sizes, dtype=np.int64).reshape(-1, 2)
    if len(sizes) == 0:
        raise UserError("the data set has no usable images for buckets")
    if sizes.min() < 1:
        raise ValueError("an image has no pixels")
    counts = _repeats(repeats, len(sizes))
    if not settings.enable_bucket:
        for side in resolution:
            check_multiple("the resolution", side, multiple)
        of_row = np.zeros(len(sizes), dtype=np.int32)
        return Buckets([resolution], of_row, _cropped(sizes, [resolution], of_row, None), counts)
    if settings.bucket_no_upscale:
        check_multiple("bucket_reso_steps", settings.bucket_reso_steps, multiple)
        targets, own, scales = _own_sizes(sizes, resolution, settings.bucket_reso_steps)
        changes = []
    else:
        targets, scales = bucket_sizes(resolution, settings, multiple), None
        own, changes = _nearest(sizes, targets), _rounded(settings)
    goals, merged = _merged(targets, own, counts, settings)
    kept, places = np.unique(goals[own], return_inverse=True)
    targets, of_row = [targets[bucket] for bucket in kept], places.reshape(-1).astype(np.int32)
    enlarged = 0
    if scales is not None:
        cover = (np.asarray(targets)[of_row] / sizes).max(axis=1)
        scales = np.where(goals[own] == own, np.maximum(scales, cover), cover)
        enlarged = int((scales > 1.0).sum())
    cropped = _cropped(sizes, targets, of_row, scales)
    return Buckets(targets, of_row, cropped, counts, scales, enlarged, changes + merged)


def join_buckets(parts: Sequence[tuple[np.ndarray, Buckets]]) -> Buckets:
    """Return the buckets of several data sets as those of one. Buckets of the same size become one.

    Args:
        parts: The rows (n,) of each data set in the whole, and their buckets.
    """
    sizes = sorted({size for _, part in parts for size in part.sizes})
    count = sum(len(rows) for rows, _ in parts)
    of_row, cropped, repeats = np.zeros(count, np.int32), np.zeros(count, np.float32), np.ones(count, np.int64)
    scales = np.full(count, np.nan)
    for rows, part in parts:
        of_row[rows] = np.array([sizes.index(size) for size in part.sizes], np.int32)[part.of_row]
        cropped[rows], repeats[rows] = part.cropped, part.repeats
        if part.scales is not None:
            scales[rows] = part.scales
    changes = [line for _, part in parts for line in part.changes]
    has_scales = any(part.scales is not None for _, part in parts)
    return Buckets(
        sizes,
        of_row,
        cropped,
        repeats,
        scales if has_scales else None,
        sum(part.enlarged for _, part in parts),
        changes,
    )


def _repeats(repeats: np.ndarray | Sequence[int] | None, count: int) -> np.ndarray:
    if repeats is None:
        return np.ones(count, dtype=np.int64)
    counts = np.asarray(repeats, dtype=np.int64)
    if counts.shape != (count,) or (count and counts.min() < 1):
        raise ValueError("repeats must be a number of at least 1 for each row")
    return counts


def _rounded(settings: BucketSettings) -> list[str]:
    step = settings.bucket_reso_steps
    least, most = settings.min_bucket_reso // step * step, math.ceil(settings.max_bucket_reso / step) * step
    pairs = [("min_bucket_reso", settings.min_bucket_reso, least), ("max_bucket_reso", settings.max_bucket_reso, most)]
    return [
        f"{name} {given} counts as {used}, a multiple of bucket_reso_steps {step}"
        for name, given, used in pairs
        if given != used
    ]


def _nearest(sizes: np.ndarray, targets: list[Size]) -> np.ndarray:
    """Return the bucket (N,) int32 of each image, that of the least difference of width / height.

    The bucket of an image's own size has no difference, and no two buckets have the same aspect.
    """
    aspects = sizes[:, 0] / sizes[:, 1]
    least = np.full(len(sizes), np.inf)
    of_row = np.zeros(len(sizes), dtype=np.int32)
    for bucket, (width, height) in enumerate(targets):
        # A bucket at a time, because all differences of a million images to 17 buckets take 136 MB.
        difference = np.abs(width / height - aspects)
        closer = difference < least
        least[closer] = difference[closer]
        of_row[closer] = bucket
    return of_row


def _own_sizes(sizes: np.ndarray, resolution: Size, step: int) -> tuple[list[Size], np.ndarray, np.ndarray]:
    """Return the buckets of images that are never enlarged, the bucket (N,) int32 of each image, and its scale (N,).

    An image above the area is scaled so that its width or its height is a multiple of `step`, whichever changes the
    aspect less when both are rounded down.
    """
    width, height = sizes[:, 0].astype(np.float64), sizes[:, 1].astype(np.float64)
    aspect, area = width / height, resolution[0] * resolution[1]

    def rounded(lengths: np.ndarray) -> np.ndarray:
        # An image of less than a step is enlarged: sd-scripts has no bucket for it.
        return np.maximum(np.floor(lengths + 0.5) // step * step, step)

    by_width = rounded(np.sqrt(area * aspect))
    by_height = rounded(area / np.sqrt(area * aspect))
    width_errs = np.abs(by_width / rounded(by_width / aspect) - aspect)
    height_errs = np.abs(rounded(by_height * aspect) / by_height - aspect)
    takes_width = width_errs < height_errs
    is_large = width * height > area
    scales = np.where(is_large, np.where(takes_width, by_width / width, by_height / height), 1.0)
    new_width = np.where(takes_width, by_width, np.floor(by_height * aspect + 0.5))
    new_height = np.where(takes_width, np.floor(by_width / aspect + 0.5), by_height)
    scaled = np.stack([np.where(is_large, new_width, width), np.where(is_large, new_height, height)], axis=1)
    # One number for each size, because numpy takes 7 s to find the unique rows of a million.
    numbers = np.maximum(scaled // step * step, step).astype(np.int64) @ (1 << 32, 1)
    unique, of_row = np.unique(numbers, return_inverse=True)
    return [(number >> 32, number & 0xFFFFFFFF) for number in unique.tolist()], of_row.astype(np.int32), scales


def _merged(
    targets: list[Size], of_row: np.ndarray, repeats: np.ndarray, settings: BucketSettings
) -> tuple[np.ndarray, list[str]]:
    """Merge the rarest buckets until `max_buckets` are left, not counting empty ones.

    The images of the bucket with the fewest samples, the first of equals, move to the bucket of the most similar
    aspect. Aspects are compared by their ratio, which is the share that is cropped away. With `bucket_no_upscale`,
    buckets that lie within the rarest one come first, because nothing is enlarged for them.

    Returns:
        The bucket that each bucket becomes, and a line for each that is merged.
    """
    weights = np.bincount(of_row, weights=repeats, minlength=len(targets))
    samples = {bucket: int(weight) for bucket, weight in enumerate(weights) if weight}
    images = np.bincount(of_row, minlength=len(targets))
    goals = np.arange(len(targets), dtype=np.int32)
    lines = []
    while settings.max_buckets is not None and len(samples) > settings.max_buckets:
        rarest = min(samples, key=lambda bucket: samples[bucket])
        count = samples.pop(rarest)
        width, height = targets[rarest]

        def unlike(bucket: int, width: int = width, height: int = height) -> tuple[bool, float, int]:
            other_width, other_height = targets[bucket]
            enlarges = settings.bucket_no_upscale and (other_width > width or other_height > height)
            ratio = abs(math.log(width * other_height / (height * other_width)))
            return enlarges, ratio, abs(width * height - other_width * other_height)

        goal = min(samples, key=unlike)
        samples[goal] += count
        images[goal] += images[rarest]
        goals[goals == rarest] = goal
        repeated = f", {count:,} with repeats" if count != images[rarest] else ""
        lines.append(
            f"{_text(targets[rarest])} ({_count(int(images[rarest]), 'image', 'images')}{repeated}) is merged into "
            f"{_text(targets[goal])}, because max_buckets is {settings.max_buckets}"
        )
    return goals, lines


def _cropped(sizes: np.ndarray, targets: list[Size], of_row: np.ndarray, scales: np.ndarray | None) -> np.ndarray:
    """Return the share (N,) float32 of each image that is not in its part."""
    target = np.asarray(targets, dtype=np.float64)[of_row]
    if scales is not None:
        kept = target.prod(axis=1) / scales**2 / sizes.prod(axis=1)
    else:
        ratio = sizes[:, 0] * target[:, 1] / (sizes[:, 1] * target[:, 0])
        kept = np.minimum(ratio, 1.0 / ratio)
    return np.clip(1.0 - kept, 0.0, 1.0).astype(np.float32)


def _text(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def _count(count: int, singular: str, plural: str) -> str:
    return f"{count:,} {singular if count == 1 else plural}"
