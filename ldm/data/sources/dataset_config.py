"""kohya's dataset_config: a TOML with several data sets, each of several folders, and settings for each of them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Optional

from ldm.data.sources import caption_files, image_text_csv, imagefolder, kohya_json, saved_dataset, tar_shards
from ldm.data.sources.place import Place, look
from ldm.data.sources.rows import Listing, ReadOptions, logger, merged
from ldm.errors import UserError, plain
from ldm.files.documents import read_toml
from ldm.files.inputs import is_there
from ldm.files.paths import expanded
from ldm.settings.data import MAX_REPEATS, BucketSettings, CaptionSettings
from ldm.settings.declare import MAX_BATCH, MAX_SEED, setting
from ldm.settings.model_yaml import MAX_SIDE
from ldm.settings.read import read_mapping
from ldm.settings.values import nearest, settings_of

NAME = "dataset_config"
ABOUT = "kohya's dataset_config: a .toml with [general], [[datasets]] and [[datasets.subsets]]"
# The layouts that an image_dir may have, in the order of detection. kohya_folders is not among them, because a
# dataset_config gives each folder its own repeats.
IN_IMAGE_DIR = (image_text_csv, saved_dataset, imagefolder, tar_shards)
# Settings of kohya's that this project has no counterpart of, with the values that ask for nothing. cache_info only
# makes kohya's start faster.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "color_aug": (False,),
    "face_crop_aug_range": (),
    "network_multiplier": (1, 1.0),
    "custom_attributes": ({},),
    "resize_interpolation": ("",),
    "skip_image_resolution": (),
    "cache_info": (False, True),
}


@dataclass
class AscendingSettings(CaptionSettings):
    """Settings of a subset that [general], [[datasets]] and [[datasets.subsets]] may give. The innermost one wins."""

    num_repeats: int = setting(1, "how often an epoch has each image", low=1, high=MAX_REPEATS)
    caption_dropout: float = setting(0.0, key="caption_dropout_rate", low=0, high=1)
    random_flip: bool = setting(False, key="flip_aug")
    random_crop: bool = setting(False)
    alpha_mask: bool = setting(False)
    validation_split: float = setting(0.0, low=0, high=1)
    validation_seed: Optional[int] = setting(None, low=0, high=MAX_SEED)
    caption_extension: Optional[str] = setting(None)
    class_tokens: Optional[str] = setting(None)


@dataclass
class DatasetSettings(BucketSettings, AscendingSettings):
    """Settings of a data set, which [general] and [[datasets]] may give."""

    resolution: list[int] = setting([512, 512], low=8, high=MAX_SIDE, length=2)  # width and height
    batch_size: int = setting(1, low=1, high=MAX_BATCH)


@dataclass
class SubsetSettings(AscendingSettings):
    """Settings of [[datasets.subsets]]."""

    image_dir: Optional[str] = setting(None, path=True)
    metadata_file: Optional[str] = setting(None, path=True)
    is_reg: bool = setting(False)
    conditioning_data_dir: Optional[str] = setting(None, path=True)


# Settings that say what is read, and are therefore not in Subset.settings.
_READ_HERE = ("num_repeats", "class_tokens", "caption_extension", "image_dir", "metadata_file", "is_reg")


def detect(place: Place) -> bool:
    """Return whether a path is a .toml file."""
    return place.suffix == ".toml"


def read(place: Place, options: ReadOptions) -> Listing:
    """Return the rows of all subsets, in the order of the file. See `ldm.data.sources.read`.

    A relative image_dir, metadata_file or conditioning_data_dir is relative to the current folder, as in kohya's
    scripts, or else to that of the TOML. An image_dir is read without the folders below it. It may also hold
    img_txt.csv, an imagefolder's metadata, tar shards or a saved data set. Settings that no level gives are those of
    `options`.

    Raises:
        UserError: The file is no such TOML, a key is unknown (the nearest is named) or its value wrong, a folder is
            missing, or as the layout of a subset.
    """
    content = read_toml(place.path)
    where = plain(place.path)
    _check_keys(content, ("general", "datasets"), where, "")
    general = _values(DatasetSettings, content.get("general", {}), where, "general.")
    listings = []
    for i, dataset in enumerate(_tables(content, "datasets", where, "")):
        prefix = f"datasets[{i}]."
        own = {key: value for key, value in dataset.items() if key != "subsets"}
        of_dataset = {**general, **_values(DatasetSettings, own, where, prefix)}
        _check_bucket_sides(of_dataset, where, prefix)
        for j, subset in enumerate(_tables(dataset, "subsets", where, prefix)):
            prefix_of_subset = f"{prefix}subsets[{j}]."
            values = {**of_dataset, **_values(SubsetSettings, subset, where, prefix_of_subset)}
            listings.append(_read_subset(values, place.path, prefix_of_subset, i, options))
    return merged(NAME, listings)


def _check_keys(content: Mapping[str, Any], known: tuple[str, ...], where: str, prefix: str) -> None:
    for key in content:
        if key not in known:
            raise UserError(
                f'{where}: unknown setting "{prefix}{plain(key, 100)}": did you mean "{nearest(key, known)}"?'
            )


def _tables(content: Mapping[str, Any], key: str, where: str, prefix: str) -> list[dict[str, Any]]:
    """Return the tables of [[datasets]] or [[datasets.subsets]]. Raises UserError if there are none."""
    name = "datasets.subsets" if prefix else key
    tables = content.get(key, [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UserError(f"{where}: {prefix}{key} must be tables: begin each with a line [[{name}]]")
    if not tables:
        raise UserError(f"{where}{': ' + prefix[:-1] if prefix else ''} has no [[{name}]]: add one, with image_dir")
    return tables


def _values(cls: type, content: Any, where: str, prefix: str) -> dict[str, Any]:
    """Return the settings that a table gives. Raises UserError for unknown and wrong ones."""
    if not isinstance(content, dict):
        raise UserError(f"{where}: {prefix[:-1]} must be a table: begin it with a line [{prefix[:-1]}]")
    given = dict(content)
    for key in UNSUPPORTED.keys() & given.keys():
        if given.pop(key) not in UNSUPPORTED[key]:
            raise UserError(f"{where}: {prefix}{key} is not supported: remove it")
        logger.info("%s: %s%s has no effect", where, prefix, key)
    if type(given.get("resolution")) is int:  # a square's side
        given["resolution"] = [given["resolution"]] * 2
    known = _names(cls)
    for key in given.keys() - set(known):
        for other, tables in ((DatasetSettings, "[[datasets]] or [general]"), (SubsetSettings, "[[datasets.subsets]]")):
            if key in _names(other):
                raise UserError(f"{where}: {prefix}{key} belongs to {tables}: move it there")
    _check_keys(given, (*known, "subsets") if prefix.startswith("datasets") else known, where, prefix)
    return read_mapping(cls, given, where, prefix, partial=True)


def _names(cls: type) -> tuple[str, ...]:
    return tuple(settings_of(cls))


def _check_bucket_sides(values: dict[str, Any], where: str, prefix: str) -> None:
    low, high = values.get("min_bucket_reso"), values.get("max_bucket_reso")
    if low is not None and high is not None and low > high:
        raise UserError(f"{where}: {prefix}min_bucket_reso {low} is above max_bucket_reso {high}: exchange them")


def _read_subset(values: dict[str, Any], toml: str, prefix: str, dataset: int, options: ReadOptions) -> Listing:
    where = f"{plain(toml)}: {prefix[:-1]}"
    image_dir, metadata = (
        values[key] and _resolved(values[key], toml, f"{where}.{key}") if key in values else None
        for key in ("image_dir", "metadata_file")
    )
    if values.get("conditioning_data_dir") is not None:
        masks = _resolved(values["conditioning_data_dir"], toml, f"{where}.conditioning_data_dir")
        if look(masks, f"{where}.conditioning_data_dir").is_file:
            raise UserError(f"{where}.conditioning_data_dir {plain(masks)} is a file: give the folder with the masks")
        values["conditioning_data_dir"] = masks
        options = dataclasses.replace(options, leave_out=(*options.leave_out, os.path.realpath(masks)))
    if image_dir is not None:
        options.check_folder(image_dir, f"{where}.image_dir")
    options = dataclasses.replace(
        options,
        recursive=False,
        image_dir=image_dir,
        num_repeats=values.get("num_repeats", options.num_repeats),
        is_reg=values.get("is_reg", options.is_reg),
        class_tokens=values.get("class_tokens", options.class_tokens),
        caption_extension=values.get("caption_extension", options.caption_extension),
        caption_separator=values.get("caption_separator", options.caption_separator),
    )
    if metadata is not None:
        listing = _read_metadata(look(metadata, f"{where}.metadata_file"), f"{where}.metadata_file", options)
    elif image_dir is not None:
        listing = _read_image_dir(look(image_dir, f"{where}.image_dir"), f"{where}.image_dir", options)
    else:
        raise UserError(f"{where} has no image_dir: give the folder with its images")
    rest = {key: value for key, value in values.items() if key not in _READ_HERE}
    subsets = tuple(dataclasses.replace(subset, settings=rest, dataset=dataset) for subset in listing.subsets)
    return listing._replace(subsets=subsets)


def _read_image_dir(place: Place, name: str, options: ReadOptions) -> Listing:
    if place.is_file and place.suffix != ".tar":
        raise UserError(f"{name} {plain(place.path)} is a file: give the folder with the images")
    layout = next((module for module in IN_IMAGE_DIR if module.detect(place)), None)
    if layout is None:
        return caption_files.read(place, options)
    if caption_files.detect(place):
        logger.warning(
            "%s is read as %s: the caption files beside its images are ignored", plain(place.path), layout.NAME
        )
    return layout.read(place, options)


def _read_metadata(place: Place, name: str, options: ReadOptions) -> Listing:
    readers: dict[str, Callable[[Place, ReadOptions], Listing]] = {
        ".json": kohya_json.read, ".jsonl": imagefolder.read, ".csv": imagefolder.read, ".parquet": imagefolder.read,
    }  # fmt: skip
    if place.suffix not in readers:
        raise UserError(f"{name} {plain(place.path)} is no {', '.join(readers)} file: give one")
    return readers[place.suffix](place, options)


def _resolved(path: str, toml: str, name: str) -> str:
    """Return the path of a file or folder that a TOML names, relative to the current folder or to that of the TOML."""
    path = expanded(path)
    beside = os.path.join(os.path.dirname(toml), path)
    if is_there(path, name) or not is_there(beside, name):
        return path
    return beside
