"""The settings of training that concern its data: how it is read, its captions, buckets, masks and class images.

Names and defaults are those of kohya's sd-scripts, of diffusers and of mindone. TrainSettings holds them all. A subset
of a dataset_config may have its own values.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Optional

from ldm.errors import UserError, plain
from ldm.settings.declare import MAX_BATCH, MAX_COUNT, MAX_SEED, input_path, setting
from ldm.settings.model_yaml import MAX_SIDE
from ldm.settings.read import check_values

MAX_REPEATS = 1_000_000
MAX_BUCKETS = 1_000

# Settings of the data decide which images and captions a step sees. Diffusers' script has no counterpart of most.
data_setting = partial(setting, resume="fixed", not_in_diffusers="diffusers' script has no such setting")


@dataclass
class ImageSettings:
    """How a data set is read, and what is made of its images."""

    image_column: Optional[str] = setting(
        None,
        "column with the image's file name; None: dir in img_txt.csv, file_name in an imagefolder's metadata, image in "
        "a saved data set",
        group="data",
    )
    caption_column: Optional[str] = setting(None, "column with the caption; None: text")
    caption_extension: Optional[str] = setting(None, "suffix of caption files; None: .txt, then .caption")
    num_repeats: int = data_setting(
        1,
        "how often an epoch has each image, where the data set does not say it itself",
        low=1,
        high=MAX_REPEATS,
        aliases=("train_data_repeats",),
    )
    image_size: Optional[int] = setting(
        None,
        "width and height in pixels; None for the model's own. With enable_bucket, the area of the largest bucket is "
        "its square",
        low=8,
        high=MAX_SIDE,
        resume="fixed",
        aliases=("resolution",),
    )
    image_filter_size: int = setting(
        0,
        "leave out images whose width or height is smaller, in pixels",
        low=0,
        high=100_000,
        not_in_diffusers="leave small images out of the data set instead",
    )
    random_crop: bool = setting(
        False,
        "crop at a random place instead of the middle; latents are then not cached",
        resume="fixed",
        shared_with_diffusers=True,
    )
    random_flip: bool = setting(
        False,
        "mirror half of the images; latents are then not cached",
        resume="fixed",
        shared_with_diffusers=True,
        aliases=("flip_aug",),
    )
    alpha_color: str = data_setting(
        "white", "colour behind the transparent parts of an image: a name, #rrggbb or rgb(r, g, b)"
    )
    validation_split: float = data_setting(
        0.0, "share of the images, or of each subset, that is held out for validation", low=0, high=1
    )
    validation_seed: Optional[int] = data_setting(
        None, "seed that chooses the images held out; None: seed", low=0, high=MAX_SEED
    )
    validation_data_path: Optional[str] = input_path(
        "data set for validation, instead of validation_split", not_in_diffusers="diffusers' script has no validation"
    )
    shuffle_buffer_size: int = data_setting(
        0,
        "tar shards: read one after the other, in a new order in every epoch, and shuffle within a buffer of so many "
        "images; the list of images is then kept on disk. 0: draw from all images at random",
        low=0,
        high=MAX_COUNT,
    )
    check_images: Optional[bool] = setting(
        None,
        "decode every image before the first step; None: up to 20,000 images. Broken images that are found later are "
        "replaced by another image of the data set and named",
        resume="fixed",
    )
    cache_latents: bool = setting(
        True, "encode each image once and keep it under output_path/cache", shared_with_diffusers=True
    )
    cache_text: bool = setting(
        True, "encode each caption once and keep it under output_path/cache", shared_with_diffusers=True
    )
    cache_only: bool = setting(
        False,
        "encode all images and captions into the cache, and end. A training with the same settings then uses it",
        not_in_diffusers="it trains nothing",
    )
    encode_ahead: int = setting(
        64, "batches whose images and captions are encoded together, ahead of the training", low=1, high=MAX_COUNT
    )
    num_workers: int = setting(1, "threads that load images", low=1, high=256)


@dataclass
class CaptionSettings:
    """How the captions of a subset are changed, under the names and with the defaults of sd-scripts."""

    caption_prefix: Optional[str] = data_setting(
        None, "text before every caption, joined by one space", group="captions"
    )
    caption_suffix: Optional[str] = data_setting(None, "text after every caption, joined by one space")
    shuffle_caption: bool = data_setting(False, "shuffle the tags of a caption at every step")
    caption_separator: str = data_setting(",", "what separates the tags of a caption")
    keep_tokens: int = data_setting(0, "first tags that are neither shuffled nor dropped", low=0, high=MAX_COUNT)
    keep_tokens_separator: Optional[str] = data_setting(
        None,
        'text such as "|||" behind the tags that are neither shuffled nor dropped, instead of keep_tokens; a second '
        "one stands before such tags at the end",
    )
    secondary_separator: Optional[str] = data_setting(
        None,
        'text such as ";;;" between tags that are shuffled and dropped together; it becomes caption_separator',
    )
    enable_wildcard: bool = data_setting(
        False, "draw one of the texts in {a|b} ({{ and }} stand for braces), and one of the lines of a caption"
    )
    caption_dropout: float = setting(
        0.0,
        "share of captions replaced by the empty one, for guidance",
        low=0,
        high=1,
        resume="fixed",
        shared_with_diffusers=True,
        aliases=("caption_dropout_rate",),
    )
    caption_dropout_every_n_epochs: int = data_setting(
        0,
        "every n-th epoch is trained with empty captions, from the n-th on; 0: none",
        low=0,
        high=MAX_COUNT,
    )
    caption_tag_dropout_rate: float = data_setting(0.0, "share of tags left out at every step", low=0, high=1)
    token_warmup_min: int = data_setting(
        1, "tags of a caption at the first step of the token warm-up", low=0, high=MAX_COUNT
    )
    token_warmup_step: float = data_setting(
        0.0, "steps until all tags are used; below 1: share of all steps", low=0, high=MAX_COUNT
    )

    def __post_init__(self) -> None:
        """Check each setting, and the settings against each other. Raises UserError."""
        check_values(self)
        if not self.caption_separator:
            raise UserError('caption_separator is empty: give the text that separates tags, such as ","')

    @property
    def changes_tags(self) -> bool:
        """Whether captions are split into tags. Otherwise their separators and spaces stay as they are."""
        return self.shuffle_caption or self.token_warmup_step > 0 or self.caption_tag_dropout_rate > 0

    def without_effect(self) -> list[str]:
        """Return a line for each setting that is given but has no effect, for a warning."""
        lines = []
        if not self.changes_tags:
            way = "give shuffle_caption, caption_tag_dropout_rate or token_warmup_step, or leave it out"
            if self.keep_tokens:
                lines.append(f"keep_tokens has no effect: {way}")
            if self.keep_tokens_separator:
                text = plain(self.keep_tokens_separator)
                lines.append(f'keep_tokens_separator has no effect, and "{text}" stays in the captions: {way}')
        if self.token_warmup_min != 1 and not self.token_warmup_step:
            lines.append("token_warmup_min has no effect: give token_warmup_step, or leave it out")
        return lines


@dataclass
class BucketSettings:
    """Which buckets there are, under the names and with the defaults of sd-scripts."""

    enable_bucket: bool = data_setting(
        False, "train images in their own shapes, instead of one square", group="buckets"
    )
    min_bucket_reso: int = data_setting(256, "least width and height in pixels", low=8, high=MAX_SIDE)
    max_bucket_reso: int = data_setting(1024, "greatest width and height in pixels", low=8, high=MAX_SIDE)
    bucket_reso_steps: int = data_setting(64, "widths and heights are multiples of it, in pixels", low=8, high=MAX_SIDE)
    bucket_no_upscale: bool = data_setting(False, "never enlarge an image: its own size, rounded down, is its bucket")
    max_buckets: Optional[int] = data_setting(
        None, "merge the rarest buckets of a data set into similar ones until so many are left", low=1, high=MAX_BUCKETS
    )

    def __post_init__(self) -> None:
        """Check each setting. Raises UserError."""
        check_values(self)


@dataclass
class MaskSettings:
    """Which parts of an image are trained."""

    masked_loss: bool = data_setting(
        False, "train only what the masks in conditioning_data_dir show in white", group="masks"
    )
    conditioning_data_dir: Optional[str] = input_path(
        "folder with the masks, which have the names of their images: the red channel counts, white is trained",
        resume="fixed",
        not_in_diffusers="diffusers' script has no masks",
    )
    alpha_mask: bool = data_setting(False, "the alpha channel of an image is its mask")
    unmasked_weight: float = data_setting(0.0, "least weight of what a mask hides", low=0, high=1)
    normalize_masked_area_loss: bool = data_setting(
        False, "divide the loss of an image by its mask's mean, so that small masks train as much"
    )


@dataclass
class PriorSettings:
    """DreamBooth: an instance, and images of its class that keep the class as it was."""

    with_prior_preservation: bool = data_setting(
        False, "train on images of the class as well, which the base model draws where there are too few",
        group="DreamBooth",
    )  # fmt: skip
    instance_prompt: Optional[str] = data_setting(None, "caption of every image in data_path")
    class_data_dir: Optional[str] = setting(
        None,
        "folder of the class images; None: output_path/class_images",
        path=True,
        not_in_diffusers="diffusers' script has no class images",
    )
    class_prompt: Optional[str] = data_setting(None, "caption of every class image, and what they are drawn from")
    num_class_images: int = data_setting(
        200, "class images that there must be; those that are missing are drawn", low=1, high=MAX_COUNT
    )
    prior_loss_weight: float = data_setting(
        1.0, "weight of the class images' loss; 0 leaves them out", low=0, high=1000
    )
    sample_batch_size: int = setting(
        4, "class images that are drawn at once", low=1, high=MAX_BATCH, not_in_diffusers="see num_class_images"
    )
