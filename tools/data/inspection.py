"""What a training with given settings would see of its data set, found with the code that training uses."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Optional

import numpy as np

from ldm.data import sources
from ldm.data.batches import BatchOrder
from ldm.data.buckets import Buckets
from ldm.data.captions import MOST_TOKENS
from ldm.data.checked_images import CheckedImages
from ldm.data.checked_rows import MAX_CHECKED
from ldm.data.decoding import BrokenImage, read_size
from ldm.data.draws import caption_draws
from ldm.data.masks import MaskReport
from ldm.data.preparation import prepare_data, read_listing
from ldm.data.prior import PriorPlan, check_class_folder, plan_prior, with_class_images
from ldm.data.shard_files import ENTRY, HEADER
from ldm.data.sources.rows import EMPTY_CAPTION, NO_CAPTION, Listing, Row
from ldm.data.training_data import TrainingData
from ldm.errors import UserError, plain
from ldm.settings.model import ModelConfig
from ldm.settings.train import TrainSettings
from ldm.tokenizer import CONTEXT_LENGTH, Tokenizer
from ldm.training.plan import make_plan
from tools.data.captions import CaptionFigures, read_captions
from tools.data.contact_sheet import Cell, Choice
from tools.data.duplicates import find_duplicates
from tools.data.images import Measured, content_numbers, in_threads, measure
from tools.data.report import NAMED, Section, bytes_text, counted, in_columns, named, table

FREQUENT = 30  # tags or words that are printed
MOST_SUBSETS = 50  # that are printed
MOST_LISTED = 1000  # names, groups or tags that the JSON lists of a kind
RECORD_BYTES = HEADER.size + ENTRY.itemsize  # of a cached array besides its values
BYTES_A_VALUE = 4  # float32


class Inspection:
    """A data set as a training sees it.

    Args:
        settings: Those of the training.
        config: Of its model.
        model: What the model was taken from, for the report.
        record: File that remembers which images decode.

    Raises:
        UserError: A training with these settings would not start.
    """

    def __init__(self, settings: TrainSettings, config: ModelConfig, model: str, record: Path):
        self.settings, self.config, self.model, self.record = settings, config, model, record
        assert settings.data_path is not None
        self.detected = sources.detect(settings.data_path)
        self.missing_class_images = 0
        self.all_class_images: Optional[Listing] = None  # those that there are and the missing ones
        listing = read_listing(settings)
        self.own_listing = listing._replace(rows=list(listing.rows))  # in memory, as all are looked at together
        self.listing = self._with_class_images(self.own_listing)
        self.data, self.validation = prepare_data(self.listing, settings, config, record)
        self.left_out, self.surplus = self._find_left_out()
        self.measured: Measured = measure(self.data)
        self.captions: CaptionFigures = read_captions(self.data, Tokenizer(config.pad_token, config.added_tokens))

    def _with_class_images(self, listing: Listing) -> Listing:
        """Add the class images that there are already. Training draws the missing ones."""
        settings = self.settings
        if not settings.with_prior_preservation or not settings.prior_loss_weight:
            return listing
        # MindSpore, which takes seconds, is imported only here.
        from ldm.data.prior import list_class_images
        from ldm.training.class_images import class_images_folder, find_class_images

        folder = class_images_folder(settings)
        check_class_folder(listing, folder)
        # The record of decoded images belongs into this tool's folder.
        found = find_class_images(
            dataclasses.replace(settings, class_data_dir=str(folder), output_path=str(self.record.parents[1]))
        )
        self.missing_class_images = len(found.missing)
        prompt = settings.class_prompt or ""
        if found.missing:
            drawn = [folder / f"class-{number:06d}.png" for number in found.missing]
            self.all_class_images = list_class_images(folder, [*found.paths, *drawn], prompt)
        if not found.paths:
            return listing
        return with_class_images(listing, list_class_images(folder, found.paths, prompt))

    def _find_left_out(self) -> tuple[list[tuple[str, str]], list[Row]]:
        """Return name and reason of each row that cannot be used, and the class images that no epoch has."""
        used = {row for part in (self.data, self.validation) if part is not None for row in part.rows}
        left_out, surplus = list(self.listing.left_out), []
        check: Callable[[Any], object] = read_size
        if self.data.contents is not None:
            check = CheckedImages(self.record).check
        least = self.settings.image_filter_size
        for row in self.listing.rows:
            if row in used:
                continue
            try:
                check(row.image)
                if least and min(read_size(row.image)) < least:
                    left_out.append((self.listing.name(row), f"a side is shorter than image_filter_size {least}"))
                elif self.listing.subsets[row.subset].is_reg:
                    surplus.append(row)
            except BrokenImage as error:
                left_out.append((self.listing.name(row), f"the image {error.fault}"))
        return left_out, surplus

    @cached_property
    def planned(self) -> Optional[PriorPlan]:
        """Repeats and weights when the missing class images are drawn, None if none is missing."""
        if self.all_class_images is None:
            return None
        kept = {*self.data.rows, *self.surplus}
        own = self.own_listing._replace(rows=[row for row in self.own_listing.rows if row in kept])
        return plan_prior(with_class_images(own, self.all_class_images), self.settings.prior_loss_weight)

    def name(self, row: int) -> str:
        """Return the name of a row's image, with its folder where there are several."""
        data, subset = self.data, self.data.subsets[self.data.rows[row].subset]
        return f"{os.path.basename(subset.folder)}/{data.name(row)}" if len(data.subsets) > 1 else data.name(row)

    def sections(self) -> list[Section]:
        """Return the report."""
        return [
            self._data_set(),
            self._rows(),
            self._images(),
            self._captions(),
            self._tags(),
            self._duplicates(),
            self._buckets(),
            self._masks(),
            self._epoch(),
            self._cache(),
        ]

    # ---- the rows ---------------------------------------------------------------------------------------------------

    def _data_set(self) -> Section:
        section = Section("data set")
        about = {name: module.ABOUT for name, module in sources.LAYOUTS.items()}
        section.add("path", plain(str(self.settings.data_path)))
        section.add("read as", f"{self.detected.layout}: {about[self.detected.layout]}")
        if self.detected.ignored:
            section.add("ignored", [f"{name}: {about[name]}" for name in self.detected.ignored])
        side = self.settings.image_size or self.config.image_size
        section.add("model", self.model)
        section.add("image size", f"{side} x {side}; widths and heights are multiples of {self.config.size_multiple}")
        images = Counter(row.subset for row in self.data.rows)
        rows = [("folder", "images", "repeats", "class images", "caption of images without one")]
        subsets = []
        for number, subset in enumerate(self.listing.subsets):
            facts = {
                "folder": subset.folder, "layout": subset.layout, "images": images[number],
                "repeats": subset.num_repeats, "is_reg": subset.is_reg, "class_tokens": subset.class_tokens,
                "settings": subset.settings,
            }  # fmt: skip
            subsets.append(facts)
            rows.append((
                plain(subset.folder, 60), f"{images[number]:,}", f"{subset.num_repeats:,}",
                "yes" if subset.is_reg else "no", plain(subset.class_tokens or "-", 40),
            ))  # fmt: skip
        lines = table(rows[: MOST_SUBSETS + 1])
        if len(rows) > len(lines):
            lines.append(f"and {len(rows) - len(lines):,} more")
        section.add("subsets", lines)
        section.figures = {
            "path": self.settings.data_path, "layout": self.detected.layout, "ignored": list(self.detected.ignored),
            "model": self.model, "image_size": side, "size_multiple": self.config.size_multiple, "subsets": subsets,
        }  # fmt: skip
        return section

    def _rows(self) -> Section:
        section = Section("rows")
        listing = self.listing
        section.add("found", f"{len(listing.rows) + len(listing.left_out):,}")
        section.add(
            "left out",
            [f"{len(self.left_out):,}", *(f"{plain(name, 80)}: {plain(why)}" for name, why in self.left_out[:NAMED])],
        )
        for what, count in listing.counts.items():
            section.add("", f"{count:,} {what}")
        held_out = 0 if self.validation is None else len(self.validation)
        if self.validation is not None:
            origin = self.settings.validation_data_path
            section.add("validation", f"{held_out:,}, from {plain(origin)}" if origin else f"{held_out:,} are held out")
        section.add("trained", f"{len(self.data):,}")
        plan_lines: tuple[str, ...] = ()
        is_reg = np.array([listing.subsets[row.subset].is_reg for row in self.data.rows], bool)
        if is_reg.any() or self.surplus:
            used = {*self.data.rows, *self.surplus}
            kept = listing._replace(rows=[row for row in listing.rows if row in used])
            plan_lines = plan_prior(kept, self.settings.prior_loss_weight).lines
        if self.planned is not None:
            plan_lines = (
                f"{self.missing_class_images:,} are missing, and the base model will draw them. With them:",
                *self.planned.lines,
                "Images, captions, duplicates and buckets are counted without the missing ones",
            )
        if plan_lines:
            section.add("class images", plan_lines)
        section.figures = {
            "found": len(listing.rows) + len(listing.left_out), "left_out": len(self.left_out),
            "left_out_rows": [list(row) for row in self.left_out[:MOST_LISTED]], "counts": listing.counts,
            "validation": held_out, "trained": len(self.data), "class_images": int(is_reg.sum()),
            "class_images_not_used": len(self.surplus), "class_images_missing": self.missing_class_images,
        }  # fmt: skip
        return section

    # ---- images -----------------------------------------------------------------------------------------------------

    def _images(self) -> Section:
        section = Section("images")
        measured, data = self.measured, self.data
        readable = np.flatnonzero(measured.sizes[:, 0])
        pixels = measured.sizes[readable].prod(axis=1)
        order = readable[np.argsort(pixels, kind="stable")]
        figures: dict[str, Any] = {"broken": len(measured.broken), "decoded": data.contents is not None}
        if len(order):
            for label, row in (("smallest", order[0]), ("median", order[len(order) // 2]), ("largest", order[-1])):
                width, height = measured.sizes[row].tolist()
                name = "" if label == "median" else f"  {plain(self.name(int(row)), 80)}"
                section.add(label, f"{width:,} x {height:,}{name}")
                figures[label] = [width, height]
        enlarged = np.flatnonzero(measured.enlarged > 1.0 + 1e-6)
        figures["enlarged"] = len(enlarged)
        text = f"{len(enlarged):,} of {len(data):,}"
        if len(enlarged):
            most = int(measured.enlarged.argmax())
            figures["most_enlarged"] = float(measured.enlarged[most])
            text += f", at most {measured.enlarged[most]:.1f} times ({plain(self.name(most), 60)})"
        section.add("enlarged", text)
        if measured.broken:
            section.add(
                "broken",
                [
                    f"{len(measured.broken):,}, which training replaces by others:",
                    *(f"{plain(self.name(row), 80)}: {plain(fault)}" for row, fault in measured.broken[:NAMED]),
                ],
            )
        notes = measured.notes
        if data.contents is None:
            notes = [*notes, f"{counted(len(data), 'image is', 'images are')} not decoded (check_images)"]
        section.add("notes", notes or "none")
        section.figures = {**figures, "notes": measured.notes}
        return section

    def _contents(self, data: TrainingData) -> np.ndarray:
        return content_numbers((row.image for row in data.rows), data.contents)

    @cached_property
    def contents(self) -> np.ndarray:
        """A number (N,) of the content of each row's image, the same for equal files."""
        if self.validation is None:
            return self._contents(self.data)
        rows = [*self.data.rows, *self.validation.rows]
        hashes = (self.data.contents, self.validation.contents)
        known = None if None in hashes else [content for part in hashes for content in part or ()]
        return content_numbers((row.image for row in rows), known)

    def _duplicates(self) -> Section:
        section = Section("duplicates")
        data, count = self.data, len(self.data)
        # Class images share their caption, and two data sets of a config may share a folder.
        names = [data.rows[row].image for row in range(count)]
        labels = [name if isinstance(name, str) else f"{name.file}/{name.name}" for name in names]
        shown = {label: self.name(row) for row, label in enumerate(labels)}
        found = find_duplicates(labels, self.contents[:count], [row.caption for row in data.rows])

        def names_of(groups: Sequence[Sequence[str]]) -> list[list[str]]:
            return [[shown[label] for label in group] for group in groups]

        same, similar = names_of(found.same_content), names_of(found.similar_names)
        section.add("same content", [
            f"{counted(len(same), 'image')} under {counted(sum(map(len, same)), 'name')}" if same else "none",
            *(f"{named(group, len(group), 4)}" for group in same[:NAMED]),
        ])  # fmt: skip
        other = [(shown[label], captions) for label, captions in found.other_captions]
        section.add("other captions", [
            f"{counted(len(other), 'image has', 'images have')} different captions" if other else "none",
            *(f"{plain(name, 60)}: {'; '.join(_quoted(text) for text in captions[:3])}"
              for name, captions in other[:NAMED]),
        ])  # fmt: skip
        section.add("similar names", [
            counted(len(similar), "group") if similar else "none",
            *(named(group, len(group), 4) for group in similar[:NAMED]),
        ])  # fmt: skip
        in_both = 0
        if self.validation is not None:
            in_both = int(np.isin(self.contents[count:], self.contents[:count]).sum())
            section.add("in validation", f"{counted(in_both, 'image')} that are trained as well" if in_both else "none")
        section.figures = {
            "same_content": len(same), "same_content_names": same[:MOST_LISTED],
            "different_captions": len(other), "different_captions_of": dict(other[:MOST_LISTED]),
            "similar_names": len(similar), "similar_names_of": similar[:MOST_LISTED], "trained_and_validated": in_both,
        }  # fmt: skip
        return section

    # ---- captions ---------------------------------------------------------------------------------------------------

    def _captions(self) -> Section:
        section = Section("captions")
        figures, data, counts = self.captions, self.data, self.listing.counts
        section.add("missing", f"{counts.get(NO_CAPTION, 0):,}")
        section.add("empty", f"{figures.empty:,}")
        tokens = np.sort(figures.tokens)
        section.add(
            "tokens",
            f"shortest {tokens[0]:,}, median {tokens[len(tokens) // 2]:,}, longest {tokens[-1]:,} "
            f"({plain(self.name(int(figures.tokens.argmax())), 60)})",
        )
        section.add("cut", [
            f"{len(figures.cut):,} of {len(data):,} have more than {MOST_TOKENS} tokens",
            *(f'{plain(self.name(cut.row), 60)} loses "{plain(cut.lost, 100)}"' for cut in figures.cut[:NAMED]),
        ])  # fmt: skip
        repeated = figures.repeated
        section.add("repeated", [
            f"{counted(len(repeated), 'caption')} of {counted(sum(n for _, n in repeated), 'image')}"
            if repeated else "none",
            *(f"{count:,} x {_quoted(text)}" for text, count in repeated[:NAMED]),
        ])  # fmt: skip
        if not data.has_one_caption:
            section.add("changing", "captions change from step to step; the longest that may be drawn is counted here")
        dropout = float(data.dropout.max(initial=0.0))
        if dropout:
            section.add("dropped", f"up to {dropout:.0%} of the captions are replaced by the empty one at random")
        section.figures = {
            "missing": counts.get(NO_CAPTION, 0), "empty_in_files": counts.get(EMPTY_CAPTION, 0),
            "empty": figures.empty, "shortest": int(tokens[0]), "median": int(tokens[len(tokens) // 2]),
            "longest": int(tokens[-1]), "cut": len(figures.cut),
            "cut_captions": [{"name": self.name(cut.row), "lost": cut.lost} for cut in figures.cut[:MOST_LISTED]],
            "repeated": len(repeated), "repeated_captions": dict(repeated[:MOST_LISTED]),
            "change": not data.has_one_caption,
        }  # fmt: skip
        return section

    def _tags(self) -> Section:
        figures = self.captions
        kind = "tag" if figures.has_tags else "word"
        section = Section(f"{kind}s")
        section.add("different", f"{figures.distinct:,}")
        cells = [f"{count:>6,} {plain(text, 30)}" for text, count in figures.frequent[:FREQUENT] if count > 1]
        section.add("captions with", in_columns(cells) or "none is in two captions")
        section.figures = {"different": figures.distinct, "captions_with": dict(figures.frequent[:MOST_LISTED])}
        return section

    # ---- what is trained --------------------------------------------------------------------------------------------

    @cached_property
    def buckets(self) -> Buckets:
        """The buckets, with what is cropped away where training does not need to know it."""
        return dataclasses.replace(self.data.buckets, cropped=self.measured.cropped.astype(np.float32))

    def _buckets(self) -> Section:
        section = Section("buckets")
        lines = self.buckets.report(self.name)
        section.add("", lines)
        section.figures = {
            "graphs": self.buckets.graphs, "mean_crop": float(self.measured.cropped.mean()),
            "buckets": [
                {
                    "width": bucket.size[0], "height": bucket.size[1], "images": bucket.images,
                    "with_repeats": bucket.samples, "mean_crop": bucket.mean, "worst_crop": bucket.worst,
                    "worst_image": self.name(bucket.worst_row),
                }
                for bucket in self.buckets.reports()
            ],
        }  # fmt: skip
        return section

    def _epoch(self) -> Section:
        section = Section("training")
        settings, data = self.settings, self.data
        several, repeats, fill = len(data.buckets.sizes) > 1, data.buckets.repeats, data.fills_batches
        note = ""
        if self.planned is not None and several:
            note = ", without the missing class images"
        elif self.planned is not None:  # all have the same size
            repeats, note = self.planned.repeats[self.planned.repeats > 0], ", with the missing class images"
            fill = bool((repeats > 1).any())
        samples = int(repeats.sum())
        section.add("samples", f"{samples:,} an epoch, {counted(len(repeats), 'image')} with their repeats{note}")
        section.figures = {"samples": samples, "batch_size": settings.train_batch_size}
        try:
            order = BatchOrder(
                len(repeats), settings.train_batch_size, settings.seed,
                of_row=data.buckets.of_row if several else None, repeats=repeats, fill=fill,
            )  # fmt: skip
        except UserError as error:
            section.add("batches", f"none: {error}")
            section.figures["batches"] = 0
            return section
        batches, size = order.steps_per_epoch, settings.train_batch_size
        rest = samples - batches * size
        section.add("batches", f"{batches:,} of {counted(size, 'image')} an epoch, on one device")
        if rest > 0:
            section.add("left out", f"{rest:,} samples of each epoch, which do not fill a batch: others every time")
        elif rest < 0:
            section.add("filled", f"{-rest:,} samples more, which fill the last batch of each bucket")
        plan = make_plan(settings, batches)
        epochs = f"{plan.steps / plan.steps_per_epoch:,.4g} epochs"
        given = "max_steps" if settings.max_steps else "epochs"
        section.add("steps", f"{plan.steps_per_epoch:,.4g} an epoch; {plan.steps:,} in {epochs} ({given})")
        section.figures.update(
            batches=batches, left_out=max(0, rest), filled=max(0, -rest), steps_per_epoch=plan.steps_per_epoch,
            steps=plan.steps, graphs=self.buckets.graphs,
        )  # fmt: skip
        return section

    def _cache(self) -> Section:
        section = Section("cache on disk")
        settings, config, data = self.settings, self.config, self.data
        latents = texts = 0
        if not settings.cache_latents:
            section.add("latents", "none: cache_latents is False")
        elif data.augments:
            section.add("latents", "none: random_crop or random_flip changes images at every step")
        else:
            cached = {(int(content), data.buckets.size(row)) for row, content in enumerate(self.contents[: len(data)])}
            factor = config.vae_factor
            for _, (width, height) in cached:
                values = config.moment_channels * (width // factor) * (height // factor)
                latents += values * BYTES_A_VALUE + RECORD_BYTES
            section.add("latents", f"{bytes_text(latents)} of {counted(len(cached), 'image')}")
        if not settings.cache_text:
            section.add("texts", "none: cache_text is False")
        elif settings.trains_text_encoder:
            section.add("texts", "none: the text encoder is trained")
        else:
            size = CONTEXT_LENGTH * config.context_dim * BYTES_A_VALUE + RECORD_BYTES
            different = len({(row.subset, data.text(number)) for number, row in enumerate(data.rows)}) + 1
            texts = different * size
            text = f"{bytes_text(texts)} of {counted(different, 'caption')}, the empty one included"
            if not data.has_one_caption:
                text = f"{bytes_text(size)} for each caption that is drawn: they change from step to step"
                texts = 0
            section.add("texts", text)
        section.figures = {"latents_bytes": latents, "texts_bytes": texts}
        if data.masks is not None and not data.augments:
            masked = {
                (data.rows[row].image, mask, data.buckets.size(row))
                for row, mask in enumerate(data.masks)
                if mask is not None
            }
            masks = sum(w // config.vae_factor * (h // config.vae_factor) for _, _, (w, h) in masked) * BYTES_A_VALUE
            masks += len(masked) * RECORD_BYTES
            section.add("masks", f"{bytes_text(masks)} of {counted(len(masked), 'image')}")
            section.figures["masks_bytes"] = masks
        return section

    # ---- masks ------------------------------------------------------------------------------------------------------

    def mask(self, row: int) -> Optional[np.ndarray]:
        """Return the mask (h, w) of a row's image at the size of the latents, None if it has none."""
        mask = self.data.mask(row, self.config.vae_factor)
        return None if mask is None else mask[0]

    def _masks(self) -> Section:
        section = Section("masks")
        data = self.data
        if data.masks is None:
            return section
        # As many as training reads before its first step, evenly from all rows.
        read = np.linspace(0, len(data) - 1, min(len(data), MAX_CHECKED)).round().astype(int).tolist()
        rows = [row for row in read if not data.subsets[data.rows[row].subset].is_reg]
        report, covers = MaskReport(len(data)), []
        for row, mask in in_threads(rows, self.mask, "reading masks"):
            report.add(row, mask)
            covers += [] if mask is None else [float(mask.mean())]
        section.add("", report.lines(self.name))
        section.figures = {
            "read": len(rows),
            "found": len(covers),
            "mean_cover": sum(covers) / len(covers) if covers else None,
        }
        return section

    # ---- the sheet --------------------------------------------------------------------------------------------------

    def caption(self, row: int) -> str:
        """Return a caption as the last step of the first epoch may train it."""
        data, steps = self.data, 10**9
        [rng] = caption_draws(self.settings.seed, row, 1)
        return data.caption(row, rng, steps, 0, steps)

    @cached_property
    def lost(self) -> dict[int, str]:
        """What the caption of a row loses, of those that are cut."""
        return {cut.row: cut.lost for cut in self.captions.cut}

    def cell(self, choice: Choice) -> Cell:
        """Return a row as it is on the sheet. The notes say why an image cannot be read."""
        data, row = self.data, choice.row
        width, height = data.buckets.size(row)
        cropped = float(self.measured.cropped[row])
        notes = [f"{cropped:.0%} is cropped away"] if choice.why == "worst crop" else []
        if row in self.lost:
            notes.append(f'cut: loses "{self.lost[row]}"')
        facts = f"{width} x {height}, {cropped:.0%} cropped"
        if self.measured.enlarged[row] > 1.0 + 1e-6:
            facts += f", enlarged {self.measured.enlarged[row]:.1f} x"
        if data.subsets[data.rows[row].subset].is_reg:
            facts += ", class image"
        try:
            pixels, mask = data.image(row), self.mask(row)
        except UserError as error:
            return Cell(None, self.name(row), self.caption(row), facts, [*notes, str(error)])
        if mask is not None:
            facts += f", mask {mask.mean():.0%}"
            factor = self.config.vae_factor
            mask = np.repeat(np.repeat(mask, factor, axis=0), factor, axis=1)
        return Cell(pixels, self.name(row), self.caption(row), facts, notes, mask)


def _quoted(text: str) -> str:
    return f'"{plain(text, 80)}"'
