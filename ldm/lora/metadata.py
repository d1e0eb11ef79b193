"""The metadata by which others know how a LoRA was trained: kohya's `ss_` keys and Stability AI's `modelspec.` keys.

What they say of the network itself (`ss_network_dim`, `ss_v2`, ...) and of the file (`sshs_model_hash`) is written by
ldm.lora.formats.kohya. Here are the others, from plain values: nothing of this module knows a run.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from typing import Any

MODELSPEC_VERSION = "1.0.1"
# Architectures of modelspec for the bases that have one there, by (architecture, prediction type).
MODELSPEC_ARCHITECTURES = {
    ("sd1", "epsilon"): "stable-diffusion-v1/lora",
    ("sd2", "epsilon"): "stable-diffusion-v2-512/lora",
    ("sd2", "v_prediction"): "stable-diffusion-v2-768-v/lora",
}
MODELSPEC_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}
MODELSPEC_TEXTS = ("author", "description", "license", "tags", "trigger_phrase", "usage_hint")

# kohya's keys, without `ss_`, of what ss_metadata is given. None is written as the text "None", as in sd-scripts.
OF_RUN = (
    "session_id", "training_started_at", "training_finished_at", "output_name", "num_train_images",
    "num_validation_images", "num_reg_images", "num_batches_per_epoch", "num_epochs", "epoch", "steps",
    "max_train_steps", "seed", "training_comment", "network_dropout", "clip_skip",
)  # fmt: skip
OF_RATES = (
    "learning_rate", "unet_lr", "text_encoder_lr", "optimizer", "lr_scheduler", "lr_warmup_steps", "max_grad_norm",
    "gradient_accumulation_steps", "gradient_checkpointing", "mixed_precision", "full_fp16", "cache_latents", "lowram",
)  # fmt: skip
OF_LOSS = (
    "noise_offset", "multires_noise_iterations", "multires_noise_discount", "adaptive_noise_scale", "ip_noise_gamma",
    "zero_terminal_snr", "min_snr_gamma", "debiased_estimation", "loss_type", "prior_loss_weight",
    "scale_weight_norms",
)  # fmt: skip
OF_DATA = (
    "batch_size_per_device", "total_batch_size", "resolution", "flip_aug", "random_crop", "shuffle_caption",
    "keep_tokens", "caption_dropout_rate", "max_token_length", "enable_bucket", "bucket_no_upscale",
    "min_bucket_reso", "max_bucket_reso",
)  # fmt: skip
OF_DATA_AS_JSON = ("dataset_dirs", "reg_dataset_dirs", "tag_frequency", "bucket_info")
OF_BASE = ("sd_model_name", "sd_model_hash", "new_sd_model_hash")
ABSENT_FOR_FOLDERS = OF_BASE[1:]  # the hashes are those of a file

MAX_TAG_BYTES = 1 << 20  # of all tags that are counted: captions in sentences are each a tag of their own


def ss_metadata(values: Mapping[str, Any]) -> dict[str, str]:
    """Return kohya's metadata of a training.

    Args:
        values: Name without `ss_` -> value, for all names above. Those in ABSENT_FOR_FOLDERS may be missing.

    Raises:
        ValueError: A name is missing or unknown.
    """
    known = {*OF_RUN, *OF_RATES, *OF_LOSS, *OF_DATA, *OF_DATA_AS_JSON, *OF_BASE}
    wrong = (known - {*ABSENT_FOR_FOLDERS}) - values.keys() | values.keys() - known
    if wrong:
        raise ValueError(f"missing or unknown: {sorted(wrong)}")
    return {
        f"ss_{name}": compact_json(value) if name in OF_DATA_AS_JSON else str(value) for name, value in values.items()
    }


def modelspec_metadata(
    architecture: str,
    prediction_type: str,
    *,
    title: str,
    resolution: tuple[int, int],
    seconds: float,
    **texts: str | None,
) -> dict[str, str]:
    """Return Stability AI's metadata of a LoRA.

    Args:
        architecture, prediction_type: Of the base model, as in ModelConfig.
        title: The LoRA's name.
        resolution: Width and height of the images it was trained with, in pixels.
        seconds: When the file is written, since 1970.
        **texts: Those of MODELSPEC_TEXTS that there are.
    """
    date = datetime.fromtimestamp(int(seconds), timezone.utc).replace(tzinfo=None)
    known = MODELSPEC_ARCHITECTURES.get((architecture, prediction_type), f"{architecture}/lora")
    values = {
        "sai_model_spec": MODELSPEC_VERSION,
        "architecture": known,
        "implementation": "diffusers",
        "title": title,
        "resolution": f"{resolution[0]}x{resolution[1]}",
        "date": date.isoformat(),
        "prediction_type": MODELSPEC_PREDICTIONS[prediction_type],
        **{name: texts[name] for name in MODELSPEC_TEXTS if texts.get(name)},
    }
    return {f"modelspec.{name}": str(text) for name, text in values.items()}


def tag_frequency(
    captions: Iterable[tuple[str, str, str]], most_bytes: int = MAX_TAG_BYTES
) -> dict[str, dict[str, int]]:
    """Count the tags in the captions of each folder, by which web UIs show the words that a LoRA knows.

    Tags are counted in lower case, once for each time that they are in a caption.

    Args:
        captions: The last part of a folder's name, a caption, and what separates its tags.
        most_bytes: That all tags may take. The rarest are left out beyond it.

    Returns:
        Folder -> tag -> count, the commonest first.
    """
    of_folder: dict[str, Counter[str]] = {}
    for folder, caption, separator in captions:
        tags = of_folder.setdefault(folder, Counter())
        tags.update(tag for part in caption.split(separator) if (tag := part.strip().lower()))
    ranked = sorted(
        ((count, folder, tag) for folder, tags in of_folder.items() for tag, count in tags.items()),
        key=lambda entry: -entry[0],  # stable: equals stay in the order of the captions
    )
    result: dict[str, dict[str, int]] = {folder: {} for folder in of_folder}
    for count, folder, tag in ranked:
        most_bytes -= len(tag.encode(errors="replace")) + len('"":1000,')
        if most_bytes < 0:
            break
        result[folder][tag] = count
    return result


def compact_json(value: Any) -> str:
    """Return a value as JSON without spaces."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
