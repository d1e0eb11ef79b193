"""The file to share: the LoRA of each save as a .safetensors in kohya's form, with all that A1111 and ComfyUI show.

    ckpt/pokemon-step00000010.safetensors   beside lora-00000010.ckpt
    ckpt/pokemon.safetensors                the newest, as lora.ckpt is

docs/sharing.md says what it holds. What a resumed run writes differs from an uninterrupted one in dates alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.batches import BatchOrder
from ldm.data.training_data import TrainingData
from ldm.errors import UserError
from ldm.files.documents import valid_text
from ldm.files.inputs import is_folder, list_folder
from ldm.lora.formats import write_lora
from ldm.lora.lora import LoRA
from ldm.lora.metadata import MODELSPEC_TEXTS, compact_json, modelspec_metadata, ss_metadata, tag_frequency
from ldm.runtime.device import Runtime
from ldm.settings.model import ModelConfig
from ldm.settings.optimizer import OPTIMIZER_ALIASES
from ldm.settings.train import TrainSettings
from ldm.training.checks import base_model, image_size
from ldm.training.own_files import parse_name
from ldm.training.passport import PREFIX, VERSION, base_digests, code_digest, library_versions, settings_digests
from ldm.training.plan import RunPlan
from ldm.training.training_state import TrainingState
from ldm.weights.base_model import base_model_hash
from ldm.weights.checkpoint import open_checkpoint
from ldm.weights.hashes import legacy_hash

logger = logging.getLogger(__name__)

_STARTED = "ss_training_started_at"
_SECONDS = re.compile(r"[0-9]{1,11}(\.[0-9]{1,20})?")
MOST_CAPTIONS = 100_000  # whose tags are counted: 1 us each, and 20 us where the rows are on disk
MIXED_PRECISION = {"fp32": "no", "fp16": "fp16", "bf16": "bf16"}  # in sd-scripts' words
_HALF_RANGE = (
    float(np.finfo(np.float16).max),
    2.0**-25,
)  # numbers above the first, or below the second, are lost in fp16


class SharedFile:
    """Writes the LoRA of a run for others.

    Args:
        settings: Those of the run, with a share_name.
        runtime: Device, precision and processes.
        config: Of the base model.
        data: The rows that are trained.
        held_out: Number of images for validation.
        order: How many batches an epoch has.
        plan: Length of the run.
        fingerprint: What a training state is compared by (ldm.training.resume), which identifies the run.
        began: When the run was first started, in seconds since 1970.
    """

    def __init__(
        self,
        settings: TrainSettings,
        runtime: Runtime,
        config: ModelConfig,
        data: TrainingData,
        held_out: int,
        order: BatchOrder,
        plan: RunPlan,
        fingerprint: dict[str, Any],
        began: float,
    ):
        assert settings.share_name is not None
        self.name = settings.share_name
        self.settings, self.runtime, self.config, self.data = settings, runtime, config, data
        self.held_out, self.order, self.plan, self.began = held_out, order, plan, began
        self._session = int(hashlib.sha256(json.dumps(fingerprint).encode()).hexdigest()[:8], 16)
        self._code = {} if settings.no_metadata else code_digest()  # now, as the sources may change during the run

    def write(self, path: Path, lora: LoRA, state: TrainingState) -> None:
        """Write the LoRA of a training state. Raises UserError if it cannot be written."""
        dtype = self.settings.share_dtype
        if dtype == "fp16" and not fits_fp16(lora):
            logger.warning("%s: fp16 does not hold the LoRA's values, it is written in float", path.name)
            dtype = "fp32"
        shared = replace(lora, file_metadata=self.metadata(state))
        write_lora(path, shared, "kohya", self.config, dtype)

    def metadata(self, state: TrainingState) -> dict[str, str]:
        """Return what the file of a training state says beside what ldm.lora.formats.kohya writes itself."""
        if self.settings.no_metadata:
            return {}
        now = time.time()
        values = {
            **self._of_run,
            **self._of_data,
            "training_finished_at": now,
            "epoch": math.ceil(state.step / self.plan.steps_per_epoch - 1e-9),
            "steps": state.step,
        }
        metadata = {**ss_metadata(values), **self._modelspec(now), **self._passport}
        return {key: valid_text(text) for key, text in metadata.items()}

    @cached_property
    def _of_run(self) -> dict[str, Any]:
        """What sd-scripts says of a run, its settings and its base model, under sd-scripts' names."""
        settings, plan = self.settings, self.plan
        batch = settings.train_batch_size
        return {
            "session_id": self._session,
            "training_started_at": self.began,
            "output_name": self.name,
            "num_batches_per_epoch": self.order.steps_per_epoch,
            "num_epochs": math.ceil(plan.steps / plan.steps_per_epoch - 1e-9),
            "max_train_steps": plan.steps,
            "seed": settings.seed,
            "training_comment": settings.training_comment,
            "network_dropout": settings.lora_dropout or None,
            "clip_skip": None,
            "learning_rate": settings.start_learning_rate,
            "unet_lr": settings.unet_lr,
            "text_encoder_lr": settings.text_encoder_lr,
            "optimizer": describe_optimizer(settings),
            "lr_scheduler": settings.scheduler,
            "lr_warmup_steps": plan.warmup_steps,
            "max_grad_norm": settings.max_grad_norm if settings.clip_grad else 0.0,  # sd-scripts: 0 is no clipping
            "gradient_accumulation_steps": settings.gradient_accumulation_steps,
            "gradient_checkpointing": settings.gradient_checkpointing,
            "mixed_precision": MIXED_PRECISION[self.runtime.precision],
            "full_fp16": False,
            "cache_latents": settings.cache_latents and not self.data.augments,
            "lowram": False,
            "noise_offset": settings.noise_offset,
            "multires_noise_iterations": settings.multires_noise_iterations,
            "multires_noise_discount": settings.multires_noise_discount,
            "adaptive_noise_scale": settings.adaptive_noise_scale,
            "ip_noise_gamma": settings.ip_noise_gamma,
            "zero_terminal_snr": settings.zero_terminal_snr,
            "min_snr_gamma": settings.min_snr_gamma,
            "debiased_estimation": settings.debiased_estimation_loss,
            "loss_type": settings.loss_type,
            "prior_loss_weight": settings.prior_loss_weight,
            "scale_weight_norms": settings.scale_weight_norms,
            "batch_size_per_device": batch,
            "total_batch_size": batch * self.runtime.process_count * settings.gradient_accumulation_steps,
            **self._of_base(),
        }

    def _of_base(self) -> dict[str, str]:
        path = base_model(self.settings)
        hashes = (
            {} if is_folder(path) else {"sd_model_hash": legacy_hash(path), "new_sd_model_hash": base_model_hash(path)}
        )
        return {"sd_model_name": last_part(path), **hashes}

    @cached_property
    def _of_data(self) -> dict[str, Any]:
        """What sd-scripts says of the data. Of settings that subsets may have themselves, those of the first count."""
        data, settings = self.data, self.settings
        rules, buckets = data.rules[0], data.buckets
        has_buckets = self._of_subset("enable_bucket", settings.enable_bucket)
        class_images = np.array([subset.is_reg for subset in data.subsets])[self._subset_of_row]
        counts = np.bincount(buckets.of_row, buckets.repeats, len(buckets.sizes)).astype(int).tolist()
        return {
            "num_train_images": int(buckets.repeats[~class_images].sum()),
            "num_reg_images": int(buckets.repeats[class_images].sum()),
            "num_validation_images": self.held_out,
            "resolution": self._resolution,
            "flip_aug": rules.random_flip,
            "random_crop": rules.random_crop,
            "shuffle_caption": rules.captions.shuffle_caption,
            "keep_tokens": rules.captions.keep_tokens,
            "caption_dropout_rate": rules.captions.caption_dropout,
            "max_token_length": None,  # sd-scripts: 75 tokens
            "enable_bucket": has_buckets,
            "bucket_no_upscale": self._of_subset("bucket_no_upscale", settings.bucket_no_upscale),
            "min_bucket_reso": self._of_subset("min_bucket_reso", settings.min_bucket_reso) if has_buckets else None,
            "max_bucket_reso": self._of_subset("max_bucket_reso", settings.max_bucket_reso) if has_buckets else None,
            "dataset_dirs": self._folders(is_reg=False),
            "reg_dataset_dirs": self._folders(is_reg=True),
            "tag_frequency": tag_frequency(self._captions()),
            "bucket_info": {
                "buckets": {
                    number: {"resolution": list(size), "count": count}
                    for number, (size, count) in enumerate(zip(buckets.sizes, counts))
                }
            }
            if has_buckets
            else None,
        }

    def _of_subset(self, name: str, value: Any) -> Any:
        return self.data.subsets[0].settings.get(name, value)

    @cached_property
    def _resolution(self) -> tuple[int, int]:
        side = image_size(self.settings, self.config)
        width, height = self._of_subset("resolution", (side, side))
        return width, height

    @cached_property
    def _subset_of_row(self) -> np.ndarray:
        data = self.data
        if len(data.subsets) == 1:
            return np.zeros(len(data), np.int64)
        return np.fromiter((row.subset for row in data.rows), np.int64, len(data))

    def _folders(self, *, is_reg: bool) -> dict[str, dict[str, int]]:
        images = np.bincount(self._subset_of_row, minlength=len(self.data.subsets)).tolist()
        return {
            last_part(subset.folder): {"n_repeats": subset.num_repeats, "img_count": images[number]}
            for number, subset in enumerate(self.data.subsets)
            if subset.is_reg == is_reg
        }

    def _captions(self) -> Iterator[tuple[str, str, str]]:
        """Yield the folder, the caption and the separator of the rows, without class images."""
        names = [last_part(subset.folder) for subset in self.data.subsets]
        for place, row in enumerate(islice(self.data.rows, MOST_CAPTIONS)):
            if not self.data.subsets[row.subset].is_reg:
                rules = self.data.rules[row.subset].captions
                yield names[row.subset], self.data.text(place), rules.caption_separator

    def _modelspec(self, now: float) -> dict[str, str]:
        settings = self.settings
        texts = {name: getattr(settings, f"metadata_{name}") for name in MODELSPEC_TEXTS}
        texts["trigger_phrase"] = texts["trigger_phrase"] or settings.instance_prompt or settings.placeholder_token
        return modelspec_metadata(
            self.config.architecture,
            self.config.prediction_type,
            title=settings.metadata_title or self.name,
            resolution=self._resolution,
            seconds=now,
            **texts,
        )

    @cached_property
    def _passport(self) -> dict[str, str]:
        data = self.data.content_digest()
        runtime = self.runtime
        return {
            f"{PREFIX}version": VERSION,
            **{f"{PREFIX}{name}": digest for name, digest in base_digests(self.settings).items()},
            **({} if data is None else {f"{PREFIX}data": data}),
            f"{PREFIX}settings": compact_json(settings_digests(self.settings)),
            f"{PREFIX}code": compact_json(self._code),
            f"{PREFIX}libraries": compact_json(library_versions()),
            f"{PREFIX}device": compact_json(
                {"device": runtime.device, "precision": runtime.precision, "processes": runtime.process_count}
            ),
        }


def first_start(state: TrainingState | None) -> float:
    """Return when a run was first started, in seconds since 1970: now, unless it continues from a training state.

    The files to share beside the state say it. The state does not, so that equal runs have equal states.
    """
    if state is None or state.path is None:
        return time.time()
    folder = state.path.parent
    found = [shared for shared in map(parse_name, list_folder(folder)) if shared and shared.kind == "share"]
    for shared in sorted(found, key=lambda shared: (shared.step != state.step, shared.step)):
        try:
            text = open_checkpoint(folder / shared.name).metadata.get(_STARTED, "")
        except UserError:  # it is damaged, or not a file
            continue
        if _SECONDS.fullmatch(text):
            return float(text)
    return time.time()


def describe_optimizer(settings: TrainSettings) -> str:
    """Return the optimizer under sd-scripts' name with its options, such as "AdamW(betas=[0.9, 0.999],eps=1e-08)"."""
    names = {ours: theirs for theirs, ours in OPTIMIZER_ALIASES.items()}
    options = vars(settings.optimizer_options())
    return f"{names[settings.optim]}({','.join(f'{name}={value}' for name, value in options.items())})"


def last_part(path: str) -> str:
    """Return the last part of a path, which is all of it that leaves the machine."""
    name = os.path.basename(os.path.normpath(path))
    return os.path.basename(os.path.realpath(path)) if name in ("", ".", "..") else name


def fits_fp16(lora: LoRA) -> bool:
    """Whether fp16 holds the largest value of each array: it neither overflows nor becomes 0. Scalars stay fp32."""
    arrays = [array for update in lora.updates().values() for array in update.arrays().values() if array.ndim]
    largest = [float(np.abs(array).max(initial=0)) for array in (*arrays, *lora.embeddings.values())]
    return all(value == 0 or _HALF_RANGE[1] < value <= _HALF_RANGE[0] for value in largest)
